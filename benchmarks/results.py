"""Rows: what one provider did in one mode of one case, as JSON Lines behind one record of the environment."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fastlora.testing import Errors

from .cases import Case
from .clocks import Spread
from .environment import Environment

RESULTS = Path(__file__).parent / "results"
LOCAL = RESULTS / "local"

# What happened to a row: measured; refused by its own word; inaccurate, hence without speed; out of memory; raised.
STATUSES = ("ok", "absent", "wrong", "oom", "error")


@dataclass
class Row:
    """One provider, one mode, one case.

    Attributes:
        layer, m, k, n, r, bias, dtype, dropout: the case.
        provider, mode: who, and forward, backward or step.
        status: one of STATUSES; ``reason`` says why it is not ``ok``.
        backend: what fastlora chose; None for anybody else.
        rounds: how many samples the times are of.
        wall_ms, device_ms: milliseconds, ``device_ms`` on CUDA alone.
        ratio: median over the frozen floor's in the same mode (device time on CUDA, else wall time).
        noise: how far the floor's second timing lay from its first, relative; the same in every row of case and mode.
        peak_bytes: the most one step held beyond inputs and parameters.
        kept_bytes: kept for backward beyond x and parameters.
        errors: for y, dx and each gradient, rms and max error with their bounds.
        gate_dropout: the dropout probability at which the errors were taken.
    """

    layer: str
    m: int
    k: int
    n: int
    r: int
    bias: bool
    dtype: str
    dropout: float
    provider: str
    mode: str
    status: str = "ok"
    reason: str | None = None
    backend: str | None = None
    rounds: int | None = None
    wall_ms: Spread | None = None
    device_ms: Spread | None = None
    ratio: float | None = None
    noise: float | None = None
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    errors: dict[str, dict[str, float | None]] | None = None
    gate_dropout: float | None = None

    @staticmethod
    def of(case: Case, provider: str, mode: str) -> Row:
        """A row that says only what was asked."""
        return Row(case.layer, case.m, case.k, case.n, case.r, case.bias, case.dtype, case.dropout, provider, mode)

    @property
    def case(self) -> Case:
        """The case it belongs to."""
        return Case(self.layer, self.m, self.r, self.dtype, self.dropout)

    @property
    def ms(self) -> Spread | None:
        """The time that ``ratio`` compares: the device's where there is one, else the wall's."""
        return self.device_ms or self.wall_ms

    def record_errors(self, errors: dict[str, Errors]) -> None:
        """Keeps the numbers, and where one is out of bounds turns the row ``wrong`` with the reason."""
        numbers = ("rms", "rms_bound", "max", "max_bound")
        self.errors = {name: {key: _finite_or_none(getattr(e, key)) for key in numbers} for name, e in errors.items()}
        wrong = [f"{name}: {e}" for name, e in errors.items() if not e.ok]
        if wrong:
            self.status, self.reason = "wrong", "; ".join(wrong)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; spreads become objects with p20, p50 and p80."""
        spreads = {"wall_ms": self.wall_ms, "device_ms": self.device_ms}
        return {"record": "row", **asdict(self)} | {k: s and s._asdict() for k, s in spreads.items()}

    @staticmethod
    def from_json(record: dict[str, Any]) -> Row:
        """The inverse of :meth:`to_json`."""
        values = {key: value for key, value in record.items() if key != "record"}
        for key in ("wall_ms", "device_ms"):
            values[key] = values[key] and Spread(**values[key])
        return Row(**values)


class ResultFile:
    """Writes the environment, then rows one by one, each flushed: what is finished survives an interrupt."""

    def __init__(self, path: Path, environment: Environment) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = 0
        self._file = path.open("w", encoding="utf-8")
        self._write({"record": "environment", **environment})

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows and flushes them."""
        for row in rows:
            self._write(row.to_json())
            self.rows += 1

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read(path: Path) -> tuple[Environment, list[Row]]:
    """A result file's environment and rows.

    Raises:
        ValueError: the file does not begin with an environment record.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not records or records[0].get("record") != "environment":
        raise ValueError(f"{path} does not begin with an environment record: it is no result file of this package")
    return records[0], [Row.from_json(record) for record in records[1:]]


def _finite_or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None
