"""The timed contest: turns, blocks, failures, noise. Calls are counted, no time is asserted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.measure.contest import MIN_ROUNDS, Subject, compete
from benchmarks.records.rows import LayerRow
from fastlora.clock import Clock

CLOCK = Clock(torch.device("cpu"))


def contest(names, rounds=6, seconds=60.0, fails: Callable[[str, int], bool] = lambda name, number: False, **options):
    """The rows of a contest, and each turn as the name and the numbers of its calls."""
    turns = []

    def subject(name):
        @contextmanager
        def turn():
            turns.append((name, []))
            yield

        def prepare(number):
            turns[-1][1].append(number)
            if fails(name, number):
                raise ValueError(f"{name} at {number}")
            return lambda: None

        return Subject(prepare, LayerRow.of(Case("host", 1, 1, "fp32", 0.0), name, "step"), turn)

    subjects = [subject(name) for name in names]
    compete(subjects, CLOCK, rounds, seconds, **options)
    return [subject.row for subject in subjects], turns


def test_the_first_runs_twice_a_round_and_calls_are_numbered_in_one_row():
    rows, turns = contest("ab", rounds=6, warm_up=1)
    assert [row.rounds for row in rows] == [6, 6]
    assert [sorted(name for name, _ in turns[i : i + 3]) for i in range(0, 21, 3)] == [["a", "a", "b"]] * 7
    assert [number for _, numbers in turns for number in numbers] == list(range(21))
    assert rows[0].noise == rows[1].noise >= 0


def test_a_block_is_one_turn():
    rows, turns = contest("ab", rounds=5, block=2, warm_up=0)
    assert [row.rounds for row in rows] == [6, 6]
    assert [len(numbers) for _, numbers in turns] == [2] * 9


@pytest.mark.parametrize("block", [1, 2])
def test_time_that_is_over_ends_it_after_the_least_rounds(block):
    rows, _ = contest("a", rounds=100, seconds=0.0, block=block)
    assert rows[0].rounds == -(-MIN_ROUNDS // block) * block


def test_a_failure_ends_a_subject_and_the_others_go_on():
    rows, turns = contest("ab", fails=lambda name, number: name == "b" and number > 8)
    assert [(row.status, row.rounds) for row in rows] == [("ok", 6), ("error", None)]
    assert rows[1].reason.startswith("ValueError: b at ")
    assert sum(name == "b" for name, _ in turns) < 7


def test_without_the_first_there_is_no_noise():
    rows, _ = contest("ab", fails=lambda name, number: name == "a")
    assert [row.status for row in rows] == ["error", "ok"]
    assert rows[1].noise is None
    assert rows[1].wall_ms is not None


def test_a_subject_without_a_row_has_samples_and_lets_exceptions_pass():
    calls = []
    subject = Subject(lambda number: lambda: calls.append(number))
    compete([subject], CLOCK, 6, 60.0, warm_up=1)
    assert calls == list(range(7))
    assert len(subject.wall) == 6
    assert subject.device == []
    with pytest.raises(ZeroDivisionError):
        compete([Subject(lambda number: lambda: 1 / 0)], CLOCK, 6, 60.0)


def test_a_late_call_lengthens_the_hold_of_its_own_subject_alone(monkeypatch):
    """Every sample waits for its hold: the long one that an arm of many launches needs is not everybody's."""
    running, held = [], {"quick": [], "slow": []}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def query(self):
            return running[-1] == "slow" and held["slow"][-1] < 40_000_000

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: held[running[-1]].append(cycles))
    clock = Clock(torch.device("cuda"))
    clock._flush = SimpleNamespace(zero_=lambda: None)

    def subject(name):
        def prepare(number):
            running.append(name)
            return lambda: None

        return Subject(prepare, LayerRow.of(Case("64x48", 1, 1, "fp32", 0.0), name, "step"))

    subjects = [subject("quick"), subject("slow")]
    compete(subjects, clock, 6, 60.0, on_device=True)
    assert held["quick"] == [5_000_000] * 12
    assert held["slow"] == [5_000_000, 10_000_000, 20_000_000, 40_000_000, 40_000_000, 40_000_000]
    assert [len(subject.device) for subject in subjects] == [6, 3]
    assert all(subject.row.device_ms.p50 == 1.5 for subject in subjects)
