"""One case of the model benchmark, start to end.

First each arm by itself: accuracy, then memory, with nothing else on the device, so that running out of it is the arm's
own doing. Then time, in turns: step by step where all arms fit on the device together, else in blocks of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..cases import ModelCase
from ..measure.clocks import Clock, no_garbage_collection, shuffled
from ..measure.failures import failures_into
from ..records.rows import ModelRow, Spread
from .arms import Arm
from .gate import ModelGate
from .training import Memory, Training, capacity, release, require_room

# However little time there is, so many rounds are run.
MIN_ROUNDS = 3

# How often each arm is built anew where arms do not fit together.
BLOCKS = 3

# All arms are resident together up to this part of the device's memory.
_FULL_AT = 0.8


@dataclass
class _Entrant:
    """An arm past the gate, its row, its bytes, and its samples in milliseconds."""

    arm: Arm
    row: ModelRow
    memory: Memory
    samples: list[float] = field(default_factory=list)

    def sample(self, training: Training, clock: Clock, turn: int) -> None:
        """Times one step. A failure ends up in the row."""
        with self.arm.turn(), failures_into([self.row]):
            self.samples.append(clock.wall(training.prepare(turn)))


def run_case(
    case: ModelCase,
    arms: Sequence[Arm],
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
    entrants = []
    for arm, row in zip(arms, rows, strict=True):
        if reason := arm.refuses(case, device):
            row.fail("absent", reason)
        elif smaller := _out_of_memory(row, earlier):
            row.fail("oom", f"out of memory already at batch {smaller.batch} x {smaller.sequence} tokens")
        else:
            progress(f"{arm.name}: accuracy and memory")
            entrants += _admit(case, arm, row, gate, device)
            release(device)
    if entrants:
        progress("time")
        _time(case, entrants, rounds, seconds, clock, device)
    return rows


def _out_of_memory(row: ModelRow, earlier: Sequence[ModelRow]) -> ModelRow | None:
    """The first row of the same arm and sweep that ran out of memory at no greater a size."""
    sweep = row.case._replace(batch=0, sequence=0)
    for other in earlier:
        same = other.arm == row.arm and other.case._replace(batch=0, sequence=0) == sweep
        if same and other.status == "oom" and other.batch <= row.batch and other.sequence <= row.sequence:
            return other
    return None


def _admit(case: ModelCase, arm: Arm, row: ModelRow, gate: ModelGate, device: torch.device) -> list[_Entrant]:
    """Holds the arm to the oracle and measures its bytes, alone on the device; empty where it may not be timed."""
    with arm.turn(), failures_into([row]):
        require_room(case, arm, device)
        row.record_errors(gate.check(arm, case))
        if row.status != "ok":
            return []
        release(device)
        training = Training(case, arm, device)
        if broken := training.broken():
            row.fail("wrong", broken)
            return []
        row.parameters = sum(p.numel() for p in training.subject.model.parameters())
        row.trained_parameters = sum(p.numel() for p in training.subject.trained)
        memory = training.memory()
        for name, value in memory._asdict().items():
            setattr(row, name, value)
        row.kernel = training.kernel
        return [_Entrant(arm, row, memory)]
    return []


def _time(
    case: ModelCase, entrants: list[_Entrant], rounds: int, seconds: float, clock: Clock, device: torch.device
) -> None:
    """Times all entrants in turn and writes times and noise into their rows. The first one runs twice a round."""
    first = entrants[0]
    again = _Entrant(first.arm, first.row, first.memory)
    together = sum(e.memory.held for e in entrants) + max(e.memory.step for e in entrants)
    take_turns = _step_by_step if together <= _FULL_AT * capacity(device) else _block_by_block
    with no_garbage_collection():
        take_turns(case, [*entrants, again], rounds, seconds, clock, device)
    release(device)
    noise = None
    if first.row.status == "ok":
        noise = abs(Spread.of(again.samples).p50 / Spread.of(first.samples).p50 - 1)
    for entrant in entrants:
        row = entrant.row
        if row.status == "ok":
            row.rounds, row.noise, row.step_ms = len(entrant.samples), noise, Spread.of(entrant.samples)
            row.tokens_per_second = case.batch * case.sequence / (1e-3 * row.step_ms.p50)


def _step_by_step(
    case: ModelCase, entrants: list[_Entrant], rounds: int, seconds: float, clock: Clock, device: torch.device
) -> None:
    trainings: dict[str, Training] = {}
    for entrant in entrants:
        if entrant.arm.name not in trainings:
            with entrant.arm.turn(), failures_into([entrant.row]):
                trainings[entrant.arm.name] = Training(case, entrant.arm, device)
    deadline = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for entrant in shuffled(entrants, turn):
            if entrant.row.status == "ok":
                entrant.sample(trainings[entrant.arm.name], clock, turn)


def _block_by_block(
    case: ModelCase, entrants: list[_Entrant], rounds: int, seconds: float, clock: Clock, device: torch.device
) -> None:
    deadline = time.perf_counter() + seconds
    steps = -(-rounds // BLOCKS)
    for block in range(BLOCKS):
        if block * steps >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for entrant in shuffled(entrants, block):
            if entrant.row.status != "ok":
                continue
            with entrant.arm.turn(), failures_into([entrant.row]):
                _block(case, entrant, range(block * steps, (block + 1) * steps), clock, device)
            release(device)


def _block(case: ModelCase, entrant: _Entrant, turns: Sequence[int], clock: Clock, device: torch.device) -> None:
    training = Training(case, entrant.arm, device)
    for turn in turns:
        entrant.sample(training, clock, turn)
