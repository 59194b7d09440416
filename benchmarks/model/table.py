"""The model benchmark on the screen: one block per case, one line per arm, and the summary at the end."""

from __future__ import annotations

from collections.abc import Sequence

from ..records.rows import ModelRow
from ..records.tables import BYTES, PAIRS, TIME, kernels, memory, timing, two_digits, warning, wrapped
from ..records.units import readable_bytes
from ..records.verdict import STALLED, duels, stalled, verdict
from .arms import FULL

LEGEND = (
    "ms of a whole step with half of its range p20 to p80; × the tokens/s of full fine-tuning; bytes by kind, and the\n"
    "most at a time; the largest error over its bound"
)

_SIZES = {
    "weights": "weight_bytes",
    "gradients": "gradient_bytes",
    "optimiser": "optimizer_bytes",
    "activations": "activation_bytes",
    "peak": "peak_bytes",
}

# Other ways to run the same on fastlora, with PEFT's own.
_OTHERS = (("patched", "peft-same"), ("fastlora-mlp", "peft-same"))

# Column widths.
_SPEED, _RATIO, _ERROR = 10, 7, 6


def render_case(rows: Sequence[ModelRow]) -> str:
    """One case: milliseconds of a step, tokens a second, bytes, and the worst error over its bound.

    Absent arms have no line.
    """
    present = [row for row in rows if row.status != "absent"]
    width = max((len(row.arm) for row in present), default=0)
    noise = next((f"noise: {row.noise:.1%}" for row in rows if row.noise is not None), None)
    remarks = [*([STALLED.upper()] if stalled(rows) else []), *_parameters(rows), *([noise] if noise else [])]
    remarks += kernels(rows)
    heads = f"{'step ms':>{TIME}}{'tokens/s':>{_SPEED}}{'×':>{_RATIO}}"
    heads += "".join(f"{name:>{_size_width(name)}}" for name in _SIZES) + f"{'error':>{_ERROR}}"
    full = next((row.tokens_per_second for row in rows if row.arm == FULL), None)
    lines = [str(rows[0].case), *([wrapped(f"  {'; '.join(remarks)}")] if remarks else []), f"  {'':{width}}{heads}"]
    return "\n".join([*lines, *(_line(f"  {row.arm:<{width}}", row, full) for row in present)])


def render_summary(rows: Sequence[ModelRow]) -> str:
    """fastlora against the others over all cases: tokens a second, and the peak of memory."""
    lines = ["fastlora over others (geometric means; above 1: more tokens a second, below 1: less memory)"]
    for ours, theirs in (*PAIRS, *_OTHERS, ("fastlora", FULL)):
        if found := duels(rows, ours, theirs):
            peak = memory(rows, ours, theirs, "peak memory", lambda row: row.peak_bytes)
            kept = memory(rows, ours, theirs, "activations", lambda row: row.activation_bytes)
            lines.append(f"  {ours + ' / ' + theirs:<26} tokens/s {verdict(found)}")
            lines += [f"  {'':<26} {', '.join([*peak, *kept])}"] if peak or kept else []
    return "\n".join([*lines, *warning(rows)]) if len(lines) > 1 else ""


def _parameters(rows: Sequence[ModelRow]) -> list[str]:
    """The numbers of parameters of the base and of its adapters, in millions."""
    whole = next((row.parameters for row in rows if row.arm == FULL and row.parameters), None)
    adapted = next((row.trained_parameters for row in rows if row.arm != FULL and row.trained_parameters), None)
    counts = (whole, "parameters"), (adapted, "of adapters")
    named = [f"{count / 1e6:,.1f} M {what}" for count, what in counts if count]
    return [", ".join(named)] if named else []


def _size_width(name: str) -> int:
    return max(BYTES, len(name) + 2)


def _line(head: str, row: ModelRow, full: float | None) -> str:
    if row.status != "ok" or row.step_ms is None or row.tokens_per_second is None:
        return wrapped(f"{head}  {row.status}: {row.reason}")
    ratio = None if full is None else row.tokens_per_second / full
    sizes = "".join(f"{readable_bytes(getattr(row, of)):>{_size_width(name)}}" for name, of in _SIZES.items())
    speed = f"{row.tokens_per_second:>{_SPEED},.0f}{two_digits(ratio):>{_RATIO}}"
    return f"{head}{timing(row.step_ms)}{speed}{sizes}{two_digits(row.worst_error):>{_ERROR}}"
