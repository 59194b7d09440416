"""The pictures of a run. Each is a function of its rows alone, so the same rows give the same bytes.

Every picture carries the digest of the file it was drawn from: a test holds the committed ones to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..cases import FLOOR, Case, ModelCase
from .files import read
from .rows import LayerRow, ModelRow, shown

T = TypeVar("T")


class _Style(NamedTuple):
    colour: str
    marker: str
    size: int = 6


# fastlora stands out; the others keep one colour and mark each in every picture.
_STYLES = {
    "fastlora": _Style("#d62728", "o", 9),
    "patched": _Style("#393b79", "o", 7),
    "fastlora-mlp": _Style("#d62728", "*", 9),
    "fastlora-alone": _Style("#d62728", "x", 7),
    "fastlora-fp32": _Style("#ff9896", "o", 7),
    "fastlora-lora": _Style("#ff9896", "x", 7),
    "plain": _Style("#7f7f7f", "s"),
    "addmm": _Style("#1f77b4", "^"),
    "compiled": _Style("#17becf", "P"),
    "compiled-fastlora": _Style("#9edae5", "P"),
    "peft-same": _Style("#9467bd", "D"),
    "peft-fp32": _Style("#c5b0d5", "D"),
    "loralib": _Style("#bcbd22", "p"),
    "full": _Style("#2ca02c", "v"),
    "fastlora-library": _Style("#e377c2", "x"),
    "fastlora-triton-skinny": _Style("#d95f02", ">"),
    "fastlora-triton-portable": _Style("#ffbb78", "<"),
    "fastlora-triton-serial": _Style("#ff7f0e", "o", 8),
    "fastlora-cuda-serial": _Style("#636363", ">"),
    "fastlora-cuda-z_jobs": _Style("#000000", "o", 8),
    "lorafusion": _Style("#8c564b", "*", 8),
    "unsloth": _Style("#aec7e8", "h"),
    "freesolo-chalk": _Style("#98df8a", "8"),
    "lycoris": _Style("#c49c94", "d"),
}
_OTHER = _Style("#8c564b", "x")
_RATIOS = (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 10, 20)
_DIGEST = "Description"

# Captions by the suffix of a picture's name.
CAPTIONS = {
    "": "Time over the frozen layer's, by layer and mode",
    "-by-tokens": "Step time over the frozen layer's, by M",
    "-throughput": "Tokens a second of whole training steps",
    "-memory": "Peak memory of a training step, by sequence length",
}

# A line through fewer sizes than this says nothing.
_FEWEST_SIZES = 3


def save(path: Path) -> list[Path]:
    """Draws the pictures of a result file beside it and returns their paths; none without matplotlib."""
    rows = read(path).rows
    layers = shown([row for row in rows if isinstance(row, LayerRow)])
    models = [row for row in rows if isinstance(row, ModelRow)]
    try:
        figures = (ratio_by_layer(layers), time_by_tokens(layers), throughput(models), memory_by_sequence(models))
    except ImportError:
        return []
    written = []
    for suffix, figure in zip(CAPTIONS, figures, strict=True):
        picture = path.with_name(f"{path.stem}{suffix}.png")
        if figure is None:
            _remove(picture)
        else:
            figure.savefig(picture, dpi=150, metadata={"Software": None, _DIGEST: digest(path)})
            written.append(picture)
    return written


def discard(path: Path) -> None:
    """Removes the pictures beside a result file that is about to change; a file that is no picture of ours stays."""
    for suffix in CAPTIONS:
        _remove(path.with_name(f"{path.stem}{suffix}.png"))


def _remove(picture: Path) -> None:
    if picture.is_file() and _DIGEST.encode() + b"\0" in picture.read_bytes():
        picture.unlink()


def digest(path: Path) -> str:
    """A digest of the result file, which its pictures carry."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def ratio_by_layer(rows: Sequence[LayerRow]) -> Any:
    """Time over the frozen floor, one panel per mode, one line of dots per case, a tick for the arithmetic."""
    timed = [row for row in rows if row.ratio is not None and row.arm != FLOOR and not row.case.is_host]
    if not timed:
        return None
    cases, modes = _distinct(row.case for row in timed), _distinct(row.mode for row in timed)
    arms = _distinct(row.arm for row in timed)
    figure = _figure(3 + 4 * len(modes), 1.6 + 0.36 * len(cases))
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        for arm in sorted(arms, key=lambda name: name == "fastlora"):
            points = [(row.ratio, cases.index(row.case)) for row in timed if (row.mode, row.arm) == (mode, arm)]
            _draw(panel, arm, points, linestyle="none")
        least = [(row.theory, cases.index(row.case)) for row in timed if row.mode == mode and row.theory is not None]
        if least:
            panel.plot(*zip(*least, strict=True), "|", color="black", markersize=11, label="arithmetic", zorder=3)
        panel.axvline(1, color="black", linewidth=1)
        _ratio_axis(panel.xaxis, panel.set_xscale)
        panel.set_title(mode)
        panel.set_xlabel("time over the frozen layer's")
        _tidy(panel, "both")
    panels[0].set_yticks(range(len(cases)), [_case_label(case) for case in cases])
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    _legend(figure, panels)
    return figure


def time_by_tokens(rows: Sequence[LayerRow]) -> Any:
    """A step's time over the frozen layer's by M, one panel for each layer that ran at several M."""
    timed = [row for row in rows if row.mode == "step" and row.ratio is not None and row.arm != FLOOR]
    groups = _groups(timed, lambda row: row.case._replace(m=0), lambda row: row.m)
    if not groups:
        return None
    arms = _largest_first(row.arm for row in timed)
    figure = _figure(3 + 4 * len(groups), 4.5)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, (case, group) in zip(panels, groups.items(), strict=True):
        for arm in arms:
            points = sorted((row.m, row.ratio) for row in group if row.arm == arm and row.ratio is not None)
            _draw(panel, arm, points)
        least = sorted({(row.m, row.theory) for row in group if row.theory is not None})
        if least:
            panel.plot(*zip(*least, strict=True), color="black", linewidth=1, linestyle=":", label="arithmetic")
        panel.axhline(1, color="black", linewidth=1)
        _sizes_axis(panel, _distinct(sorted(row.m for row in group)))
        _ratio_axis(panel.yaxis, panel.set_yscale)
        panel.set_title(_case_label(case._replace(m=0)))
        panel.set_xlabel("tokens, M")
        _tidy(panel, "both")
    panels[0].set_ylabel("step over the frozen layer's")
    _legend(figure, panels)
    return figure


def throughput(rows: Sequence[ModelRow]) -> Any:
    """Tokens per second of whole training steps, a group of bars per case."""
    timed = [row for row in rows if row.tokens_per_second is not None]
    if not timed:
        return None
    cases = _distinct(row.case for row in timed)
    figure = _figure(9, 1.5 + 0.2 * (len(timed) + 1.5 * len(cases)))
    panel = figure.subplots()
    y, ticks = 0.0, []
    for case in cases:
        group = [row for row in timed if row.case == case]
        best = max(row.tokens_per_second or 0 for row in group)
        ticks.append(y + (len(group) - 1) / 2)
        for row in group:
            tokens = row.tokens_per_second or 0
            panel.barh(y, tokens / best, 0.9, color=_STYLES.get(row.arm, _OTHER).colour, label=row.arm)
            panel.annotate(f"{tokens:,.0f}", (0.005, y), va="center", fontsize=7, color="white")
            y += 1
        y += 1.5
    panel.set_yticks(ticks, [_model_label(case) for case in cases])
    panel.set_ylim(y - 1.5, -1)
    panel.set_xlim(0, 1.02)
    panel.set_xlabel("tokens a second (in the bars) over the best of the group")
    _tidy(panel, "x")
    _legend(figure, [panel])
    return figure


def memory_by_sequence(rows: Sequence[ModelRow]) -> Any:
    """Peak memory by sequence length, one panel for each case that ran at several; a cross marks out of memory."""
    known = [row for row in rows if row.peak_bytes is not None or row.status == "oom"]
    groups = _groups(known, lambda row: row.case._replace(sequence=0), lambda row: row.sequence)
    if not groups:
        return None
    arms = _largest_first(row.arm for row in known)
    figure = _figure(3 + 4 * len(groups), 4.5)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for panel, (case, group) in zip(panels, groups.items(), strict=True):
        top = max(row.peak_bytes or 0 for row in group) / 2**30
        for arm in arms:
            mine = sorted((row for row in group if row.arm == arm), key=lambda row: row.sequence)
            _draw(panel, arm, [(row.sequence, row.peak_bytes / 2**30) for row in mine if row.peak_bytes is not None])
            first = next((row.sequence for row in mine if row.status == "oom"), None)
            if first is not None:
                panel.plot(first, top, "X", color=_STYLES.get(arm, _OTHER).colour, markersize=9)
        _sizes_axis(panel, _distinct(sorted(row.sequence for row in group)))
        panel.set_ylim(bottom=0)
        panel.set_title(_model_label(case._replace(sequence=0)))
        panel.set_xlabel("sequence length, tokens (X: out of memory)")
        _tidy(panel, "both")
    panels[0].set_ylabel("peak memory of a training step, GiB")
    _legend(figure, panels)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(panel: Any, arm: str, points: Sequence[tuple[float | None, float | None]], linestyle: str = "-") -> None:
    if points:
        style = _STYLES.get(arm, _OTHER)
        shape = {"marker": style.marker, "markersize": style.size, "linestyle": linestyle, "linewidth": 1}
        panel.plot(*zip(*points, strict=True), color=style.colour, label=arm, **shape)


def _ratio_axis(axis: Any, set_scale: Callable[[str], object]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    set_scale("log")
    axis.set_major_locator(FixedLocator(_RATIOS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _sizes_axis(panel: Any, sizes: Sequence[int]) -> None:
    panel.set_xscale("log")
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()


def _tidy(panel: Any, grid: str) -> None:
    panel.grid(axis=grid, color="#e0e0e0", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    labelled = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(labelled), int(figure.get_figwidth() / 1.6))
    figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=columns, frameon=False)


def _groups(rows: Iterable[T], group: Callable[[T], Hashable], size: Callable[[T], int]) -> dict[Any, list[T]]:
    groups: dict[Any, list[T]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    return {key: members for key, members in groups.items() if len({size(row) for row in members}) >= _FEWEST_SIZES}


def _distinct(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _largest_first(arms: Iterable[str]) -> list[str]:
    """Sorts arms by the size of their marks, so that none hides another where lines coincide."""
    return sorted(_distinct(arms), key=lambda arm: -_STYLES.get(arm, _OTHER).size)


def _case_label(case: Case) -> str:
    tokens = f" M={case.m}" if case.m else ""
    return f"{case.layer} {tokens} R={case.r} {case.dtype}{f' p={case.dropout:g}' if case.dropout else ''}"


def _model_label(case: ModelCase) -> str:
    batch = f"{case.batch} × {case.sequence}" if case.sequence else f"batch {case.batch}"
    dropout = f" p={case.dropout:g}" if case.dropout else ""
    return f"{case.model}  {batch}  R={case.r} {case.dtype}{dropout}{'  checkpointing' if case.checkpointing else ''}"
