"""The timed contest: every subject once a round, in shuffled rounds; samples become spreads, exceptions statuses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from fastlora.clock import Clock, Hold, Work, no_garbage_collection, shuffled

from ..records.rows import Measured
from .failures import failures_into

# Lazy set-up and compilation are over after so many calls.
WARM_UP = 2

# However little time there is, so many rounds are run.
MIN_ROUNDS = 5


@dataclass
class Subject:
    """A call to be timed again and again.

    Attributes:
        prepare: makes the call of this number, outside the clock.
        row: receives the times. An exception ends up there too, and the others go on; without a row it passes.
        turn: a context around the subject's calls, entered and left outside the clock.
        wall, device: samples in milliseconds.
        hold: of the stream before its calls that are timed on the device.
    """

    prepare: Callable[[int], Work]
    row: Measured | None = None
    turn: Callable[[], AbstractContextManager[None]] = nullcontext
    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    hold: Hold = field(default_factory=Hold)

    def sample(self, clock: Clock, numbers: Iterator[int], calls: int, on_device: bool = False) -> None:
        """Times so many calls, unless one has failed before."""
        if self.row is not None and self.row.status != "ok":
            return
        with self.turn(), nullcontext() if self.row is None else failures_into([self.row]):
            for _ in range(calls):
                self.wall.append(clock.wall(self.prepare(next(numbers))))
                if on_device and (ms := clock.device(self.prepare(next(numbers)), self.hold)) is not None:
                    self.device.append(ms)


def compete(
    subjects: Sequence[Subject],
    clock: Clock,
    rounds: int,
    seconds: float,
    *,
    block: int = 1,
    warm_up: int = WARM_UP,
    on_device: bool = False,
) -> None:
    """Times all subjects in turns; those with a row get their times there, and the noise.

    The first of these runs twice a round: the noise is the distance of its second median from its first, relative.

    Args:
        subjects: at least one.
        clock: of the device they run on.
        rounds: samples of each.
        seconds: no round begins later than this where MIN_ROUNDS are done.
        block: rounds that a subject runs in one turn, before the next one's.
        warm_up: calls of each before the clock counts.
        on_device: also measure the GPU's own time.
    """
    again = replace(subjects[0], wall=[], device=[])
    everyone = [*subjects, again] if again.row else subjects
    numbers = itertools.count()
    for subject in everyone if warm_up else ():
        subject.sample(clock, numbers, warm_up)
        subject.wall.clear()
    torch.manual_seed(0)
    deadline = time.perf_counter() + seconds
    with no_garbage_collection():
        for done in range(0, rounds, block):
            if done >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for subject in shuffled(everyone, done):
                subject.sample(clock, numbers, block, on_device)
    noise = None
    for subject in subjects:
        if subject.row is not None and subject.row.status == "ok":
            subject.row.record_times(subject.wall, subject.device)
            if subject is subjects[0]:
                twin = replace(subject.row)
                twin.record_times(again.wall, again.device)
                noise = abs(twin.median / subject.row.median - 1)
            subject.row.noise = noise
