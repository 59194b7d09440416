"""The layer benchmark on the screen: one block per case, one line per arm, and the summary at the end."""

from __future__ import annotations

from collections.abc import Sequence

from ..cases import FLOOR
from ..records.rows import LayerRow
from ..records.tables import (
    BYTES,
    PAIRS,
    TIME,
    kernels,
    memory,
    milliseconds,
    timing,
    two_digits,
    warning,
    wrapped,
)
from ..records.units import readable_bytes
from ..records.verdict import STALLED, duels, stalled, verdict

LEGEND = (
    "ms with half of its range p20 to p80; × the frozen layer's time; kept for the backward, and the peak of a step;\n"
    "the largest error over its bound; (arithmetic): the least that the FLOPs allow on any device"
)

_TIME_TITLE = "Step time over that of fastlora (geometric mean; above 1: fastlora is faster)"
_MEMORY_TITLE = "Memory of fastlora over that of others (geometric mean; below 1: fastlora holds less)"

# Column widths.
_RATIO, _WALL = 6, 9


def render_case(rows: Sequence[LayerRow]) -> str:
    """One case: time and ratio to the floor in each mode, bytes, and the worst error over its bound.

    On a GPU the times are the device's, and behind them stands the last mode's wall time, which holds the host's, too.
    Absent arms have no line.
    """
    modes = list(dict.fromkeys(row.mode for row in rows))
    on_gpu = any(row.device_ms is not None for row in rows)
    present = [row for row in rows if row.status != "absent"]
    arms = {name: [row for row in present if row.arm == name] for name in dict.fromkeys(row.arm for row in present)}
    width = max(map(len, (*arms, "(arithmetic)")))
    noise = [f"{row.mode} {row.noise:.1%}" for row in rows if row.arm == FLOOR and row.noise is not None]
    remarks = [*([STALLED.upper()] if stalled(rows) else []), *([f"noise: {', '.join(noise)}"] if noise else [])]
    remarks += kernels(rows)
    heads = "".join(f"{mode + ' ms':>{TIME}}{'×':>{_RATIO}}" for mode in modes)
    heads += f"{'wall ms':>{_WALL}}" if on_gpu else ""
    least = "".join(f"{'':{TIME}}{rows[0].case.theory(mode):>{_RATIO}.3f}" for mode in modes)
    lines = [str(rows[0].case), *([wrapped(f"  {'; '.join(remarks)}")] if remarks else [])]
    lines.append(f"  {'':{width}}{heads}{'kept':>{BYTES}}{'peak':>{BYTES}}{'error':>{_RATIO}}")
    lines += [_arm_line(f"  {name:<{width}}", group, on_gpu) for name, group in arms.items()]
    return "\n".join([*lines, f"  {'(arithmetic)':<{width}}{least}"])


def render_summary(rows: Sequence[LayerRow]) -> str:
    """The verdict: step time of others over fastlora's, of layers and of the host alone, and memory the other way."""
    lines = []
    for ours, theirs in PAIRS:
        for what, host in (("layers", False), ("host overhead", True)):
            group = [row for row in rows if row.case.is_host is host]
            if found := duels(group, ours, theirs):
                lines.append(f"  {theirs + ' / ' + ours:<26} {what}: {verdict(found)}")
    return "\n".join([_TIME_TITLE, *lines, *_memory(rows), *warning(rows)]) if lines else ""


def _memory(rows: Sequence[LayerRow]) -> list[str]:
    steps = [row for row in rows if row.mode == "step" and not row.case.is_host]
    lines = []
    for ours, theirs in PAIRS:
        kept = memory(steps, ours, theirs, "kept", lambda row: row.kept_bytes)
        peak = memory(steps, ours, theirs, "peak", lambda row: row.peak_bytes)
        if kept or peak:
            lines.append(f"  {ours + ' / ' + theirs:<26} {', '.join([*kept, *peak])}")
    return [_MEMORY_TITLE, *lines] if lines else []


def _arm_line(name: str, group: Sequence[LayerRow], on_gpu: bool) -> str:
    first, last = group[0], group[-1]
    if all(row.status != "ok" for row in group):
        return wrapped(f"{name}  {first.status}: {first.reason}")
    cells = "".join(_time(row) for row in group)
    if on_gpu:
        cells += f"{'-' if last.wall_ms is None else milliseconds(last.wall_ms.p50):>{_WALL}}"
    cells += f"{readable_bytes(first.kept_bytes):>{BYTES}}{readable_bytes(first.peak_bytes):>{BYTES}}"
    return f"{name}{cells}{two_digits(first.worst_error):>{_RATIO}}"


def _time(row: LayerRow) -> str:
    return f"{row.status if row.ms is None else timing(row.ms):>{TIME}}{two_digits(row.ratio):>{_RATIO}}"
