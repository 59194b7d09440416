"""One case, start to end: admit each arm through the gate, then time those admitted, round by round."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..cases import FLOOR, Case
from ..measure.clocks import Clock, no_garbage_collection, shuffled
from ..measure.failures import failures_into
from ..records.rows import LayerRow, Spread
from .arm import Arm, Built
from .gate import Gate
from .operands import Operands, make_operands
from .work import broken, kept_bytes, peak_bytes, prepare

WARM_UP = 2

# However little time there is, so many rounds are run.
MIN_ROUNDS = 5

# A host-sized call takes microseconds: more rounds cost nothing and steady its median.
HOST_ROUNDS = 20


@dataclass
class _Entrant:
    """An arm past the gate, its row in this mode, and its samples in milliseconds."""

    arm: Arm
    built: Built
    row: LayerRow
    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    def sample(self, clock: Clock, operands: Operands, calls: Iterator[int]) -> None:
        """Times one call; on CUDA a second one for the device's time. A failure ends up in the row."""
        with self.arm.turn(), failures_into([self.row]):
            mode = self.row.mode
            self.wall.append(clock.wall(prepare(mode, self.built, operands, next(calls))))
            if (ms := clock.device(prepare(mode, self.built, operands, next(calls)))) is not None:
                self.device.append(ms)

    def warm_up(self, clock: Clock, operands: Operands, calls: Iterator[int]) -> None:
        """Calls often enough for lazy set-up and compilation to be over, each until the device is done."""
        with self.arm.turn(), failures_into([self.row]):
            for _ in range(WARM_UP):
                clock.wall(prepare(self.row.mode, self.built, operands, next(calls)))

    @property
    def median(self) -> float:
        """Of device time where there is any and it is not the host's that matters, else of wall time."""
        return Spread.of(self.wall if self.row.case.is_host else self.device or self.wall).p50


def run_case(
    case: Case,
    arms: Sequence[Arm],
    modes: Sequence[str],
    rounds: int,
    seconds: float,
    clock: Clock,
    device: torch.device,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[LayerRow]:
    """Every arm in every mode of one case; the floor must be among the arms. Failures are rows, never exceptions.

    A mode is over after ``rounds``, or after ``seconds`` where MIN_ROUNDS are done by then.
    """
    rows = {arm.name: [LayerRow.of(case, arm.name, mode) for mode in modes] for arm in arms}
    everything = [row for group in rows.values() for row in group]
    operands = admitted = None
    with failures_into(everything):
        operands = make_operands(case, device)
        admitted = _admit(case, arms, rows, operands, progress)
    if operands is not None and admitted is not None:
        rounds *= HOST_ROUNDS if case.is_host else 1
        for i, mode in enumerate(modes):
            progress(mode)
            entrants = [_Entrant(arm, built, rows[arm.name][i]) for arm, built in admitted]
            _time(entrants, rounds, seconds, clock, operands)
        for arm, built in admitted:
            progress(f"{arm.name}: memory")
            _weigh(arm, built, rows[arm.name], operands)
    return everything


def _admit(
    case: Case,
    arms: Sequence[Arm],
    rows: dict[str, list[LayerRow]],
    operands: Operands,
    progress: Callable[[str], None],
) -> list[tuple[Arm, Built]]:
    """Builds each arm and holds it to the oracle; returns those that may be timed."""
    gate = Gate(case, operands)
    admitted = []
    for arm in arms:
        progress(f"{arm.name}: accuracy")
        group = rows[arm.name]
        with arm.turn(), failures_into(group):
            errors = gate.check(arm)
            for row in group:
                row.record_errors(errors)
                row.gate_dropout = gate.dropout_of(arm)
            if any(row.status != "ok" for row in group):
                continue
            built = arm.build(case, operands, case.dropout)
            wrong = broken(built, operands)
            for row in group:
                row.kernel, row.tile = built.kernel, built.tile
                if wrong is not None:
                    row.fail("wrong", wrong)
            if wrong is None:
                admitted.append((arm, built))
    return admitted


def _weigh(arm: Arm, built: Built, group: Sequence[LayerRow], operands: Operands) -> None:
    """Memory, once the timing is over: in the first calls of a process Python itself frees a temporary later."""
    measured = [row for row in group if row.status == "ok"]
    with arm.turn(), failures_into(measured):
        kept, peak = kept_bytes(built, operands), peak_bytes(built, operands)
        for row in measured:
            row.kept_bytes, row.peak_bytes = kept, peak


def _time(entrants: list[_Entrant], rounds: int, seconds: float, clock: Clock, operands: Operands) -> None:
    """Times all entrants in turn and writes times, ratios and noise into their rows. The floor runs twice a round."""
    floor = next((e for e in entrants if e.arm.name == FLOOR), None)
    again = None if floor is None else _Entrant(floor.arm, floor.built, floor.row)
    arms = [*entrants, *([] if again is None else [again])]
    calls = itertools.count()
    for arm in arms:
        arm.warm_up(clock, operands, calls)
    torch.manual_seed(0)
    deadline = time.perf_counter() + seconds
    with no_garbage_collection():
        for turn in range(rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for arm in shuffled(arms, turn):
                if arm.row.status == "ok":
                    arm.sample(clock, operands, calls)
    floor_ms = noise = None
    if floor is not None and again is not None and floor.row.status == "ok":
        floor_ms, noise = floor.median, abs(again.median / floor.median - 1)
    for arm in entrants:
        if arm.row.status == "ok":
            arm.row.rounds = len(arm.wall)
            arm.row.wall_ms = Spread.of(arm.wall)
            arm.row.device_ms = Spread.of(arm.device) if arm.device else None
            arm.row.ratio = None if floor_ms is None else arm.median / floor_ms
            arm.row.noise = noise
