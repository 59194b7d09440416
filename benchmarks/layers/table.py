"""The table on the screen: one block a case, one line an arm, and the summary at the end."""

from __future__ import annotations

from collections.abc import Sequence

from ..cases import FLOOR
from ..records.rows import LayerRow, Spread
from ..records.units import geometric_mean, readable_bytes

# Adapters in the base's dtype; each as it comes (ours in the base's dtype, theirs in float32); float32 on both sides.
PAIRS = (("fastlora", "peft-same"), ("fastlora", "peft-fp32"), ("fastlora-fp32", "peft-fp32"))

# Column widths.
_TIME, _RATIO, _WALL, _BYTES = 24, 9, 15, 11


def render_case(rows: Sequence[LayerRow]) -> str:
    """One case: milliseconds (p20-p80) and times the floor in each mode, bytes, and the worst error over its bound.

    On a GPU these are the device's, and the wall's stand behind them: what lies between is the host's. The last line is
    the least ratio that the FLOPs allow on any device.
    """
    modes = list(dict.fromkeys(row.mode for row in rows))
    noise = [f"{row.mode} {row.noise:.1%}" for row in rows if row.arm == FLOOR and row.noise is not None]
    arms = {name: [row for row in rows if row.arm == name] for name in dict.fromkeys(row.arm for row in rows)}
    width = max(map(len, (*arms, "(arithmetic)")))
    lines = [str(rows[0].case) + (f"   noise: {', '.join(noise)}" if noise else "")]
    heads = "".join(f"{mode + ' ms':>{_TIME}}{'× floor':>{_RATIO}}" for mode in modes)
    heads += "".join(f"{mode + ' wall':>{_WALL}}" for mode in modes if _on_gpu(rows))
    lines.append(f"  {'':{width}}{heads}{'kept':>{_BYTES}}{'peak':>{_BYTES}}{'error':>{_RATIO}}")
    least = "".join(f"{'':{_TIME}}{row.theory:>{_RATIO}.3f}" for row in next(iter(arms.values())) if row.theory)
    lines += [f"  {name:<{width}}{_arm_line(group, wall=_on_gpu(rows))}" for name, group in arms.items()]
    lines.append(f"  {'(arithmetic)':<{width}}{least}")
    return "\n".join(lines)


def render_summary(rows: Sequence[LayerRow]) -> str:
    """Step time of PEFT over fastlora's: geometric mean and worst case over the layers, and the host's alone."""
    lines = ["Step time of PEFT over that of fastlora (above 1: fastlora is faster)"]
    for ours, theirs in PAIRS:
        for what, host in (("layers", False), ("host overhead", True)):
            speedups = step_speedups([row for row in rows if row.case.is_host is host], ours, theirs)
            if speedups:
                lines.append(
                    f"  {theirs} / {ours:<14} {what}: geometric mean {geometric_mean(speedups):.2f}, "
                    f"worst {min(speedups):.2f} of {len(speedups)}"
                )
    return "\n".join(lines) if len(lines) > 1 else ""


def step_speedups(rows: Sequence[LayerRow], ours: str, theirs: str) -> list[float]:
    """Step time of ``theirs`` over that of ``ours``, for each case that has both."""
    steps = {(row.case, row.arm): row.ms.p50 for row in rows if row.mode == "step" and row.ms is not None}
    return [steps[case, theirs] / ms for (case, name), ms in steps.items() if name == ours and (case, theirs) in steps]


def _on_gpu(rows: Sequence[LayerRow]) -> bool:
    return any(row.device_ms is not None for row in rows)


def _arm_line(group: list[LayerRow], wall: bool) -> str:
    first = group[0]
    if all(row.status != "ok" for row in group):
        return f"  {first.status}: {first.reason}"
    error = first.worst_error
    line = "".join(_timing(row) for row in group)
    line += "".join(f"{_three_digits(row.wall_ms):>{_WALL}}" for row in group if wall)
    line += f"{readable_bytes(first.kept_bytes):>{_BYTES}}{readable_bytes(first.peak_bytes):>{_BYTES}}"
    line += f"{_two_digits(error):>{_RATIO}}"
    return line + (f"  -> {first.kernel}" if first.kernel else "")


def _timing(row: LayerRow) -> str:
    return f"{row.status if row.ms is None else _milliseconds(row.ms):>{_TIME}}{_two_digits(row.ratio):>{_RATIO}}"


def _three_digits(ms: Spread | None) -> str:
    return "-" if ms is None else f"{ms.p50:.3f}"


def _two_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _milliseconds(ms: Spread) -> str:
    digits = 4 if ms.p50 < 0.1 else 3 if ms.p50 < 10 else 1
    return f"{ms.p50:.{digits}f} ({ms.p20:.{digits}f}-{ms.p80:.{digits}f})"
