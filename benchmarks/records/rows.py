"""The rows of a result file: one dataclass per kind, which is also its schema.

A row is one JSON object whose ``record`` names the kind. Reading one checks every name and type.
"""

from __future__ import annotations

import math
import statistics
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

from fastlora.accuracy import Errors

from ..cases import Case, ModelCase

# Outcomes: measured; the arm declined; inaccurate, hence without speed; out of memory; raised.
STATUSES = ("ok", "absent", "wrong", "oom", "error")

Numbers = dict[str, dict[str, float | None]]


class Spread(NamedTuple):
    """Milliseconds: the median of the samples, and the range that holds the middle 60 % of them."""

    p20: float
    p50: float
    p80: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """The percentiles, linear between neighbouring samples."""
        if len(samples) == 1:
            return Spread(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Spread(fifths[0], statistics.median(samples), fifths[3])


class Row:
    """The base of all rows; each kind is a dataclass."""

    KIND: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """A JSON object; a spread becomes an object with p20, p50 and p80."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {"record": self.KIND} | {k: v._asdict() if isinstance(v, Spread) else v for k, v in values.items()}


@dataclass
class Measured(Row):
    """A measurement: its status, and the errors by which it was checked.

    Attributes:
        status: one of STATUSES; ``reason`` says why it is not ``ok``.
        kernel: the kernel that fastlora ran; None for anybody else.
        tile: the text of its tile in the forward, where it has one; of layers alone.
        errors: for each result that was checked, rms and max error with their bounds.
        rounds: how many samples the times are of.
        noise: how far the second timing of the same arm lay from its first, relative; one number a case and mode.
    """

    arm: str
    status: str = "ok"
    reason: str | None = None
    kernel: str | None = None
    tile: str | None = None
    errors: Numbers | None = None
    rounds: int | None = None
    noise: float | None = None

    def record_errors(self, errors: dict[str, Errors]) -> None:
        """Keeps the numbers, and where one is out of bounds turns the row ``wrong`` with the reason."""
        numbers = ("rms", "rms_bound", "max", "max_bound")
        self.errors = {name: {key: _finite_or_none(getattr(e, key)) for key in numbers} for name, e in errors.items()}
        wrong = [f"{name}: {e}" for name, e in errors.items() if not e.ok]
        if wrong:
            self.status, self.reason = "wrong", "; ".join(wrong)

    def fail(self, status: str, reason: str) -> None:
        """Sets a status other than ``ok``, with its reason."""
        self.status, self.reason = status, reason

    def record_times(self, wall: Sequence[float], device: Sequence[float]) -> None:
        """Keeps the spread of the samples, in milliseconds; ``device`` is empty where the GPU's own time is unknown."""
        raise NotImplementedError

    @property
    def median(self) -> float:
        """The median of the time that comparisons use, of a row that has one."""
        assert self.ms is not None
        return self.ms.p50

    @property
    def worst_error(self) -> float | None:
        """The largest of all errors over its bound: at most 1 passes. None where nothing was compared."""
        quotients = [
            value / bound
            for numbers in (self.errors or {}).values()
            for kind in ("rms", "max")
            if (value := numbers[kind]) is not None and (bound := numbers[f"{kind}_bound"])
        ]
        return max(quotients, default=None)

    @property
    def case(self) -> Case | ModelCase:
        """The case it belongs to."""
        raise NotImplementedError

    @property
    def key(self) -> tuple[object, ...]:
        """Identifies the measurement: two rows of the same key are comparable."""
        raise NotImplementedError

    @property
    def ms(self) -> Spread | None:
        """The time that comparisons use."""
        raise NotImplementedError


@dataclass
class LayerRow(Measured):
    """One arm in one mode of one layer's case.

    Attributes:
        layer, m, k, n, r, bias, dtype, dropout: the case; of several layers ``n`` is their sum.
        mode: forward, backward or step.
        wall_ms, device_ms: milliseconds, ``device_ms`` on CUDA alone.
        ratio: median over the frozen floor's in the same mode, of the time that ``ms`` is.
        theory: the least ratio by arithmetic, whatever the device: the low-rank products' FLOPs over the floor's.
        peak_bytes: the most one step held beyond inputs and parameters.
        kept_bytes: kept for backward beyond x and parameters.
        gate_dropout: the dropout probability at which the errors were taken.
    """

    KIND = "layer"

    layer: str = ""
    m: int = 0
    k: int = 0
    n: int = 0
    r: int = 0
    bias: bool = False
    dtype: str = ""
    dropout: float = 0.0
    mode: str = ""
    wall_ms: Spread | None = None
    device_ms: Spread | None = None
    ratio: float | None = None
    theory: float | None = None
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    gate_dropout: float | None = None

    @staticmethod
    def of(case: Case, arm: str, mode: str) -> LayerRow:
        """A row before any measurement."""
        row = LayerRow(arm, mode=mode, **case._asdict())
        row.k, row.n, row.bias, row.theory = case.k, case.n, case.bias, case.theory(mode)
        return row

    def fail(self, status: str, reason: str) -> None:
        """Sets a status other than ``ok``, and removes the times."""
        super().fail(status, reason)
        self.wall_ms = self.device_ms = self.ratio = self.noise = self.rounds = None

    def record_times(self, wall: Sequence[float], device: Sequence[float]) -> None:
        """Keeps the spread of both; there is a device's time on CUDA alone."""
        self.rounds = len(wall)
        self.wall_ms, self.device_ms = Spread.of(wall), Spread.of(device) if device else None

    @property
    def case(self) -> Case:
        """The case it belongs to."""
        return Case(self.layer, self.m, self.r, self.dtype, self.dropout)

    @property
    def is_forced(self) -> bool:
        """True where the arm forces one of fastlora's kernels."""
        others = ("fastlora-alone", "fastlora-fp32", "fastlora-lora", "fastlora-mlp")
        return self.arm.startswith("fastlora-") and self.arm not in others

    @property
    def key(self) -> tuple[object, ...]:
        """Case, arm and mode."""
        return (*self.case, self.arm, self.mode)

    @property
    def ms(self) -> Spread | None:
        """The device's time where there is one, else the wall's; of a host-sized case always the wall's."""
        return self.wall_ms if self.case.is_host else self.device_ms or self.wall_ms


@dataclass
class ModelRow(Measured):
    """One arm training one architecture at one size: whole steps, optimiser included.

    Attributes:
        model, batch, sequence, r, dtype, dropout, checkpointing: the case; ``sequence`` in tokens.
        parameters, trained_parameters: how many.
        step_ms: milliseconds of wall time, until the device is done.
        tokens_per_second: batch × sequence over the median step.
        weight_bytes, gradient_bytes, optimizer_bytes: every storage once; gradients as they stand after the backward.
        activation_bytes: kept by the forward for the backward.
        peak_bytes: the most held at a time, weights and optimiser included. It is not the sum of the others: it has
            temporaries, and activations are mostly freed when the last gradients arrive.
    """

    KIND = "model"

    model: str = ""
    batch: int = 0
    sequence: int = 0
    r: int = 0
    dtype: str = ""
    dropout: float = 0.0
    checkpointing: bool = False
    parameters: int | None = None
    trained_parameters: int | None = None
    step_ms: Spread | None = None
    tokens_per_second: float | None = None
    weight_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    activation_bytes: int | None = None
    peak_bytes: int | None = None

    @staticmethod
    def of(case: ModelCase, arm: str) -> ModelRow:
        """A row before any measurement."""
        return ModelRow(arm, **case._asdict())

    def record_times(self, wall: Sequence[float], device: Sequence[float]) -> None:
        """Keeps the spread of wall time, and the throughput at its median."""
        self.rounds, self.step_ms = len(wall), Spread.of(wall)
        self.tokens_per_second = self.batch * self.sequence / (1e-3 * self.step_ms.p50)

    @property
    def case(self) -> ModelCase:
        """The case it belongs to."""
        return ModelCase(self.model, self.batch, self.sequence, self.r, self.dtype, self.dropout, self.checkpointing)

    @property
    def key(self) -> tuple[object, ...]:
        """Case and arm."""
        return (*self.case, self.arm)

    @property
    def ms(self) -> Spread | None:
        """The step's time."""
        return self.step_ms


@dataclass
class ClaimRow(Row):
    """One claim of the LoRA paper beside what we find.

    Attributes:
        claim: what is claimed, in a few words.
        source: section or table of the paper.
        stated: the paper's figure, as printed there.
        ours: our figure, with its unit.
        how: ``computed`` or ``measured``.
        verdict: ``holds``, ``differs``, ``not measured``, or ``error`` where examining it raised.
        note: the arithmetic, or what differs and why.
    """

    KIND = "claim"

    claim: str
    source: str
    stated: str
    ours: str
    how: str
    verdict: str
    note: str


def shown(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Rows without the forced arms that ran nothing but what ``fastlora`` chose by itself."""
    chosen = {row.case: (row.kernel, row.tile) for row in rows if row.arm == "fastlora"}
    differing = {
        row.arm
        for row in rows
        if row.is_forced and row.status == "ok" and (row.kernel, row.tile) != chosen.get(row.case)
    }
    return [row for row in rows if not row.is_forced or row.arm in differing]


# Fields of older rows, by the names they have now.
_RENAMED = {"provider": "arm", "backend": "kernel"}

KINDS: dict[str, type[Row]] = {kind.KIND: kind for kind in (LayerRow, ModelRow, ClaimRow)}


def from_json(record: dict[str, Any]) -> Row:
    """The inverse of :meth:`Row.to_json`.

    Raises:
        ValueError: an unknown kind, a field missing, unknown, or of another type; the message names it.
    """
    values = {_RENAMED.get(name, name): value for name, value in record.items()}
    kind = KINDS.get(values.pop("record", ""))
    if kind is None:
        raise ValueError(f"unknown record {record.get('record')!r}: expected {', '.join(KINDS)}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if set(names) != set(values):
        missing, unknown = sorted(set(names) - set(values)), sorted(set(values) - set(names))
        raise ValueError(f"{kind.KIND} row: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
    try:
        return kind(**{name: _decoded(values[name], hints[name], name) for name in names})
    except TypeError as error:
        raise ValueError(f"{kind.KIND} row: {error}") from None


def _decoded(value: Any, hint: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _decoded(value, arguments[0], name)
    if origin is dict and type(value) is dict:
        return {key: _decoded(inner, arguments[1], f"{name}.{key}") for key, inner in value.items()}
    if hint is Spread and type(value) is dict:
        return Spread(**{key: _decoded(inner, float, f"{name}.{key}") for key, inner in value.items()})
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError(f"{name} must be {hint.__name__}, got {value!r}")
    return value


def _finite_or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None
