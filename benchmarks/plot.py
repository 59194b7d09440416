"""The picture of a run: time over the frozen floor, one panel per mode, one line of dots per case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cases import Case
from .providers import FLOOR
from .results import Row

# fastlora stands out; the others keep one colour and mark each in every picture.
_MARKS = {
    "fastlora": ("#d62728", "o", 9),
    "fastlora-fp32": ("#ff9896", "o", 7),
    "plain": ("#7f7f7f", "s", 6),
    "addmm": ("#1f77b4", "^", 6),
    "peft-same": ("#9467bd", "D", 6),
    "peft-fp32": ("#c5b0d5", "D", 6),
    "full": ("#2ca02c", "v", 6),
}
_OTHER_BACKEND = ("#8c564b", "x", 6)


def save(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws the layers (host-sized cases left out) and returns what was written: nothing without matplotlib or rows."""
    timed = [row for row in rows if row.ratio is not None and row.provider != FLOOR and not row.case.is_host]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    except ImportError:
        return []
    if not timed:
        return []

    cases = list(dict.fromkeys(row.case for row in timed))
    modes = list(dict.fromkeys(row.mode for row in timed))
    arms = list(dict.fromkeys(row.provider for row in timed if _is_drawn(row, timed)))
    figure = Figure(figsize=(3 + 4 * len(modes), 1.6 + 0.36 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        for arm in sorted(arms, key=lambda name: name == "fastlora"):
            points = [(row.ratio, cases.index(row.case)) for row in timed if (row.mode, row.provider) == (mode, arm)]
            colour, marker, size = _MARKS.get(arm, _OTHER_BACKEND)
            panel.plot(*zip(*points, strict=True), marker, color=colour, markersize=size, label=arm, linestyle="none")
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator([0.5, 1, 1.5, 2, 3, 4, 6, 10, 20]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(mode)
        panel.set_xlabel("time over the frozen layer's")
        panel.grid(axis="both", color="#e0e0e0", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(cases)), [_label(case) for case in cases])
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)
    return [path]


def _label(case: Case) -> str:
    return f"{case.layer}  M={case.m} R={case.r} {case.dtype}{f' p={case.dropout:g}' if case.dropout else ''}"


def _is_drawn(row: Row, timed: Sequence[Row]) -> bool:
    """Leaves out a forced backend where it is what ``fastlora`` chose anyway."""
    chosen = {other.backend for other in timed if other.provider == "fastlora"}
    return row.provider not in {f"fastlora-{backend}" for backend in chosen} or len(chosen) > 1
