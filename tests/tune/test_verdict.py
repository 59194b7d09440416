"""Who wins: the fastest beyond the noise of the run itself, and nobody within it."""

from __future__ import annotations

import random

import pytest

from fastlora.tune.verdict import Winner, winner
from fastlora.tune.work import spread

ROUNDS = 20


def noisy(ms: float, noise: float, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [ms * (1 + noise * generator.uniform(-1, 1)) for _ in range(ROUNDS)]


def test_the_fastest_wins_and_is_compared_with_the_next() -> None:
    samples = {"library": [1.0] * ROUNDS, "slow": [2.0] * ROUNDS, "fast": [0.8] * ROUNDS, "next": [0.9] * ROUNDS}
    assert winner(samples, "library", [1.0] * ROUNDS) == Winner("fast", 1.125)


@pytest.mark.parametrize("rule", ["library", "skinny"])
def test_the_rules_own_kernel_is_no_winner(rule: str) -> None:
    samples = {"library": [1.0] * ROUNDS, "skinny": [2.0] * ROUNDS}
    expected = Winner(None, 1.0) if rule == "library" else Winner("library", 2.0)
    assert winner(samples, rule, samples[rule]) == expected


def test_equal_code_does_not_win() -> None:
    for seed in range(200):
        samples = {"library": noisy(1, 0.05, seed), "same": noisy(1, 0.05, seed + 1000)}
        assert winner(samples, "library", noisy(1, 0.05, seed + 2000)).kernel is None


def test_what_is_ahead_by_less_than_the_noise_does_not_win() -> None:
    samples = {"library": [1.0] * ROUNDS, "fast": [0.95] * ROUNDS}
    assert winner(samples, "library", [1.0] * ROUNDS).kernel == "fast"
    # The rule's kernel itself is 10 % from itself.
    assert winner(samples, "library", [1.1] * ROUNDS).kernel is None


def test_what_is_ahead_in_half_of_the_rounds_does_not_win() -> None:
    samples = {"library": [1.0] * ROUNDS, "fitful": [0.5, 1.5] * (ROUNDS // 2 - 1) + [0.5, 0.5]}
    assert winner(samples, "library", [1.0] * ROUNDS).kernel is None


def test_a_steady_second_wins_where_the_first_is_fitful() -> None:
    samples = {"library": [1.0] * ROUNDS, "fitful": [0.5] * 14 + [1.5] * 6, "steady": [0.9] * ROUNDS}
    assert winner(samples, "library", [1.0] * ROUNDS) == Winner("steady", 1.1111)


def test_a_drift_of_the_clock_is_no_noise() -> None:
    # Every kernel slows down, as on a GPU that grows hot; within each round the order is the same.
    slope = [1 + i / ROUNDS for i in range(ROUNDS)]
    samples = {"library": slope, "fast": [0.9 * ms for ms in slope]}
    assert winner(samples, "library", slope).kernel == "fast"


def test_spread() -> None:
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == [2.0, 3.5, 5.0]
    assert spread([2.0]) == [2.0, 2.0, 2.0]
