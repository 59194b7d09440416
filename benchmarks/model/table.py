"""The model benchmark on the screen: one block a case, one line an arm, and the summary at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..records.rows import ModelRow, Spread
from ..records.units import geometric_mean, readable_bytes
from .arms import FULL

PAIRS = (
    ("fastlora", "peft-same"),
    ("fastlora", "peft-fp32"),
    ("fastlora-fp32", "peft-fp32"),
    ("fastlora", FULL),
)

_BYTES = {
    "weights": "weight_bytes",
    "gradients": "gradient_bytes",
    "optimiser": "optimizer_bytes",
    "activations": "activation_bytes",
    "peak": "peak_bytes",
}

# Column widths.
_TIME, _SPEED, _RATIO, _SIZE = 24, 11, 8, 12


def render_case(rows: Sequence[ModelRow]) -> str:
    """One case: milliseconds a step (p20-p80), tokens a second, bytes, and the worst error over its bound."""
    noise = next((f"   noise {row.noise:.1%}" for row in rows if row.noise is not None), "")
    width = max(len(row.arm) for row in rows)
    sizes = "".join(f"{name:>{_SIZE}}" for name in _BYTES)
    lines = [f"{rows[0].case}{_parameters(rows)}{noise}"]
    lines.append(
        f"  {'':{width}}{'step ms':>{_TIME}}{'tokens/s':>{_SPEED}}{'× full':>{_RATIO}}{sizes}{'error':>{_RATIO}}"
    )
    full = next((row.tokens_per_second for row in rows if row.arm == FULL), None)
    return "\n".join([*lines, *(f"  {row.arm:<{width}}{_line(row, full)}" for row in rows)])


def render_summary(rows: Sequence[ModelRow]) -> str:
    """fastlora against the others over all cases: tokens a second, and the peak of memory."""
    lines = ["fastlora over others (geometric mean; above 1: more tokens a second)"]
    for ours, theirs in PAIRS:
        speeds = quotients(rows, ours, theirs, lambda row: row.tokens_per_second)
        peaks = quotients(rows, ours, theirs, lambda row: row.peak_bytes)
        if speeds:
            lines.append(
                f"  {ours + ' / ' + theirs:<26} tokens/s {geometric_mean(speeds):.2f} (worst {min(speeds):.2f} of "
                f"{len(speeds)}), peak memory {geometric_mean(peaks):.2f} (worst {max(peaks):.2f})"
            )
    return "\n".join(lines) if len(lines) > 1 else ""


def quotients(
    rows: Sequence[ModelRow], ours: str, theirs: str, value: Callable[[ModelRow], float | None]
) -> list[float]:
    """A value of ``ours`` over that of ``theirs``, for each case that has both."""
    known = {(row.case, row.arm): number for row in rows if row.status == "ok" and (number := value(row))}
    return [
        number / known[case, theirs] for (case, arm), number in known.items() if arm == ours and (case, theirs) in known
    ]


def _parameters(rows: Sequence[ModelRow]) -> str:
    """How many the base has, and how many of an adapted model are trained."""
    whole = next((row.parameters for row in rows if row.arm == FULL and row.parameters), None)
    adapted = next((row.trained_parameters for row in rows if row.arm != FULL and row.trained_parameters), None)
    named = [
        f"{count / 1e6:,.1f} M {what}" for count, what in ((whole, "parameters"), (adapted, "of adapters")) if count
    ]
    return f"   {', '.join(named)}" if named else ""


def _line(row: ModelRow, full: float | None) -> str:
    if row.status != "ok" or row.step_ms is None or row.tokens_per_second is None:
        return f"  {row.status}: {row.reason}"
    ratio = "-" if full is None else f"{row.tokens_per_second / full:.2f}"
    sizes = "".join(f"{readable_bytes(getattr(row, name)):>{_SIZE}}" for name in _BYTES.values())
    error = row.worst_error
    return (
        f"{_milliseconds(row.step_ms):>{_TIME}}{row.tokens_per_second:>{_SPEED},.0f}{ratio:>{_RATIO}}{sizes}"
        f"{'-' if error is None else f'{error:.2f}':>{_RATIO}}{f'  -> {row.kernel}' if row.kernel else ''}"
    )


def _milliseconds(ms: Spread) -> str:
    return f"{ms.p50:.1f} ({ms.p20:.1f}-{ms.p80:.1f})"
