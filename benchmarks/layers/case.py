"""One case, start to end: check each arm, time those that pass in every mode, measure their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from fastlora.clock import Clock

from ..cases import FLOOR, Case
from ..measure.contest import Subject, compete
from ..measure.failures import failures_into
from ..records.rows import LayerRow
from .arm import Built, LayerArm
from .gate import Gate
from .operands import Operands, Together, make_operands
from .work import broken, kept_bytes, peak_bytes, prepare

# A host-sized call takes microseconds: more rounds cost nothing and steady its median.
HOST_ROUNDS = 20


def run_case(
    case: Case,
    arms: Sequence[LayerArm],
    modes: Sequence[str],
    rounds: int,
    seconds: float,
    clock: Clock,
    device: torch.device,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[LayerRow]:
    """Every arm in every mode of one case, the floor first; failures are rows, never exceptions.

    A mode is over after ``rounds``, or after ``seconds`` where MIN_ROUNDS are done by then.
    """
    rows = {arm.name: [LayerRow.of(case, arm.name, mode) for mode in modes] for arm in arms}
    everything = [row for group in rows.values() for row in group]
    operands = None
    with failures_into(everything):
        operands = make_operands(case, device)
    if operands is None:
        return everything
    gate, sound = Gate(case, operands), []
    for arm in arms:
        progress(f"{arm.name}: accuracy")
        if (built := _checked(arm, rows[arm.name], gate, operands)) is not None:
            sound.append((arm, built))
    for i, mode in enumerate(modes):
        progress(mode)
        subjects = [
            Subject(partial(prepare, mode, built, operands), rows[arm.name][i], arm.turn) for arm, built in sound
        ]
        if subjects:
            factor = HOST_ROUNDS if case.is_host else 1
            # A host-sized case is judged by its wall time alone.
            compete(subjects, clock, factor * rounds, seconds, on_device=not case.is_host)
        _over_the_floor([group[i] for group in rows.values()])
    for arm, built in sound:
        progress(f"{arm.name}: memory")
        _weigh(arm, built, rows[arm.name], operands)
    return everything


def _checked(arm: LayerArm, group: Sequence[LayerRow], gate: Gate, operands: Operands | Together) -> Built | None:
    """The arm's layer, held to the oracle; None where its rows say why it may not be timed."""
    built = None
    with arm.turn(), failures_into(group):
        arm.require_case(gate.case)
        arm.require(operands.xs[0].device)
        errors = gate.check(arm)
        for row in group:
            row.record_errors(errors)
            row.gate_dropout = gate.dropout_of(arm)
        if all(row.status == "ok" for row in group):
            built = arm.build(gate.case, operands, gate.case.dropout)
            wrong = broken(built, operands)
            for row in group:
                row.kernel, row.tile = built.kernel, built.tile
                if wrong is not None:
                    row.fail("wrong", wrong)
    return built if all(row.status == "ok" for row in group) else None


def _over_the_floor(rows: Sequence[LayerRow]) -> None:
    floor = next((row for row in rows if row.arm == FLOOR and row.ms is not None), None)
    for row in rows:
        if floor is not None and row.ms is not None:
            row.ratio = row.median / floor.median


def _weigh(arm: LayerArm, built: Built, group: Sequence[LayerRow], operands: Operands | Together) -> None:
    """Memory, once the timing is over: in the first calls of a process Python itself frees a temporary later."""
    measured = [row for row in group if row.status == "ok"]
    with arm.turn(), failures_into(measured):
        kept, peak = kept_bytes(built, operands), peak_bytes(built, operands)
        for row in measured:
            row.kept_bytes, row.peak_bytes = kept, peak
