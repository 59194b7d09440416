"""One case of the model benchmark, start to end.

First each arm by itself: accuracy, then memory, with nothing else on the device, so that running out of it is the arm's
own doing. Then time, in turns: step by step where all arms fit on the device together, else in blocks of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fastlora.clock import Clock, Work

from ..cases import ModelCase
from ..measure.contest import Subject, compete
from ..measure.failures import failures_into
from ..records.rows import ModelRow
from .arms import ModelArm
from .gate import ModelGate
from .training import Memory, Training, capacity, release, require_room

# How often each arm is built anew where arms do not fit together.
BLOCKS = 3

# All arms are resident together up to this part of the device's memory.
_FULL_AT = 0.8


def run_case(
    case: ModelCase,
    arms: Sequence[ModelArm],
    earlier: Sequence[ModelRow],
    gate: ModelGate,
    rounds: int,
    seconds: float,
    clock: Clock,
    device: torch.device,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[ModelRow]:
    """Every arm of one case; failures are rows, never exceptions. ``earlier`` are the rows of the cases before.

    Timing is over after ``rounds``, or after ``seconds`` where MIN_ROUNDS are done by then.
    """
    rows = [ModelRow.of(case, arm.name) for arm in arms]
    sound = []
    for arm, row in zip(arms, rows, strict=True):
        if reason := arm.refuses(case, device):
            row.fail("absent", reason)
        elif smaller := _out_of_memory(row, earlier):
            row.fail("oom", f"out of memory already at batch {smaller.batch} x {smaller.sequence} tokens")
        else:
            progress(f"{arm.name}: accuracy and memory")
            if (memory := _checked(case, arm, row, gate, device)) is not None:
                sound.append((arm, row, memory))
            release(device)
    if sound:
        progress("time")
        _time(case, sound, rounds, seconds, clock, device)
        release(device)
    return rows


def _out_of_memory(row: ModelRow, earlier: Sequence[ModelRow]) -> ModelRow | None:
    """The first row of the same arm and sweep that ran out of memory at no greater a size."""
    sweep = row.case._replace(batch=0, sequence=0)
    for other in earlier:
        same = other.arm == row.arm and other.case._replace(batch=0, sequence=0) == sweep
        if same and other.status == "oom" and other.batch <= row.batch and other.sequence <= row.sequence:
            return other
    return None


def _checked(case: ModelCase, arm: ModelArm, row: ModelRow, gate: ModelGate, device: torch.device) -> Memory | None:
    """Holds the arm to the oracle and measures its bytes, alone on the device; None where it may not be timed."""
    with arm.turn(), failures_into([row]):
        require_room(case, arm, device)
        row.record_errors(gate.check(arm, case))
        if row.status != "ok":
            return None
        release(device)
        training = Training(case, arm, device)
        if broken := training.broken():
            row.fail("wrong", broken)
            return None
        row.parameters = sum(p.numel() for p in training.subject.model.parameters())
        row.trained_parameters = sum(p.numel() for p in training.subject.trained)
        memory = training.memory()
        for name, value in memory._asdict().items():
            setattr(row, name, value)
        row.kernel = training.kernel
        return memory
    return None


def _time(
    case: ModelCase,
    sound: Sequence[tuple[ModelArm, ModelRow, Memory]],
    rounds: int,
    seconds: float,
    clock: Clock,
    device: torch.device,
) -> None:
    """Times the arms step by step where all fit on the device together, else in blocks of steps."""
    memories = [memory for _, _, memory in sound]
    together = sum(memory.held for memory in memories) + max(memory.step for memory in memories)
    fits = together <= _FULL_AT * capacity(device)
    subjects = []
    for arm, row, _ in sound:
        resident = _Resident(case, arm, device, stays=fits)
        subjects.append(Subject(resident.prepare, row, resident.turn))
    # Its first call builds an arm, and a built one is warm.
    block = 1 if fits else -(-rounds // BLOCKS)
    compete(subjects, clock, rounds, seconds, block=block, warm_up=1 if fits else 0)


class _Resident:
    """An arm's training, built at its first call; it ``stays`` on the device, or leaves at the end of each turn."""

    def __init__(self, case: ModelCase, arm: ModelArm, device: torch.device, *, stays: bool) -> None:
        self._case, self._arm, self._device, self._stays = case, arm, device, stays
        self._training: Training | None = None

    def prepare(self, number: int) -> Work:
        """The step of this number."""
        if self._training is None:
            self._training = Training(self._case, self._arm, self._device)
        return self._training.prepare(number)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Forces the arm's kernel for a while."""
        with self._arm.turn():
            yield
        if not self._stays:
            self._training = None
            release(self._device)
