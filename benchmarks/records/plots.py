"""The pictures of a run. Each is a function of its rows alone, so the same rows give the same bytes.

Every picture carries the digest of the file it was drawn from: a test holds the committed ones to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..cases import FLOOR
from .environment import machine
from .files import read
from .glance import at_a_glance
from .rows import LayerRow, ModelRow, shown
from .styles import case_label, figure, ink_on, model_label, style_of, tidy
from .verdict import STALLED, stalled

T = TypeVar("T")


_RATIOS = (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 10, 20)
# Where ratios span more than this, their labels would run into one another.
_WIDE, _FEW_RATIOS = 4, (0.5, 1, 2, 4, 8, 16, 32, 64)
# Equal curves stand beside one another: each arm is drawn at so much more of its size.
_BESIDE = 1.03
_DIGEST = "Description"

# Captions by the suffix of a picture's name.
CAPTIONS = {
    "-glance": "fastlora beside PEFT, and plain LoRA or full fine-tuning",
    "": "Time over the frozen layer's, by layer and mode",
    "-by-tokens": "Step time over the frozen layer's, by M",
    "-throughput": "Tokens a second of whole training steps",
    "-memory": "Peak memory of a training step, by sequence length",
}

# A line through fewer sizes than this says nothing.
_FEWEST_SIZES = 3


def save(path: Path) -> list[Path]:
    """Draws the pictures of a result file beside it and returns their paths; none without matplotlib."""
    environment, rows = read(path).environment, read(path).rows
    on = machine(environment)
    layers = shown([row for row in rows if isinstance(row, LayerRow)])
    models = [row for row in rows if isinstance(row, ModelRow)]
    try:
        figures = (
            at_a_glance([*layers, *models], on),
            ratio_by_layer(layers, on),
            time_by_tokens(layers, on),
            throughput(models, on),
            memory_by_sequence(models, on),
        )
    except ImportError:
        return []
    written = []
    for suffix, drawn in zip(CAPTIONS, figures, strict=True):
        picture = path.with_name(f"{path.stem}{suffix}.png")
        if drawn is None:
            _remove(picture)
        else:
            drawn.savefig(picture, dpi=150, metadata={"Software": None, _DIGEST: digest(path)})
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


def ratio_by_layer(rows: Sequence[LayerRow], on: str) -> Any:
    """Time over the frozen floor, one panel per mode, one line of dots per case, a tick for the arithmetic."""
    timed = [row for row in rows if row.ratio is not None and row.arm != FLOOR and not row.case.is_host]
    if not timed:
        return None
    cases, modes = _distinct(row.case for row in timed), _distinct(row.mode for row in timed)
    arms = _distinct(row.arm for row in timed)
    title = f"Time over the frozen layer's, {on}"
    # Every arm has a lane of its own within the case's, so that no mark hides another.
    lanes = {arm: (i + 0.5) / len(arms) - 0.5 for i, arm in enumerate(arms)}
    drawn = figure(3 + 4 * len(modes), 1.8 + max(0.36, 0.055 * len(arms)) * len(cases))
    panels = drawn.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        for i in range(1, len(cases), 2):
            panel.axhspan(i - 0.5, i + 0.5, color="#f4f4f4", zorder=0)
        for arm in arms:
            mine = [row for row in timed if (row.mode, row.arm) == (mode, arm)]
            points = [(row.ratio, cases.index(row.case) + 0.9 * lanes[arm]) for row in mine]
            _draw(panel, arm, points, linestyle="none")
        least = [(row.theory, cases.index(row.case)) for row in timed if row.mode == mode and row.theory is not None]
        if least:
            panel.plot(*zip(*least, strict=True), "|", color="black", markersize=11, label="arithmetic", zorder=3)
        panel.axvline(1, color="black", linewidth=1)
        _ratio_axis(panel.xaxis, panel.set_xscale, [row.ratio for row in timed if row.ratio is not None])
        panel.set_title(mode, fontsize=9)
        panel.set_xlabel("time over the frozen layer's")
        tidy(panel, "both")
    names = [f"{case_label(case)}{f' ({STALLED})' if str(case) in stalled(rows) else ''}" for case in cases]
    panels[0].set_yticks(range(len(cases)), names)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    _finish(drawn, panels, title)
    return drawn


def time_by_tokens(rows: Sequence[LayerRow], on: str) -> Any:
    """A step's time over the frozen layer's by M, one panel for each layer that ran at several M."""
    timed = [row for row in rows if row.mode == "step" and row.ratio is not None and row.arm != FLOOR]
    groups = _groups(timed, lambda row: row.case._replace(m=0), lambda row: row.m)
    if not groups:
        return None
    arms = _largest_first(row.arm for row in timed)
    drawn_ratios = [row.ratio for group in groups.values() for row in group if row.ratio is not None]
    title = f"A step over the frozen layer's by tokens, {on}"
    drawn = figure(3 + 4 * len(groups), 4.8)
    panels = drawn.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, (case, group) in zip(panels, groups.items(), strict=True):
        for arm in arms:
            points = sorted((row.m, row.ratio) for row in group if row.arm == arm and row.ratio is not None)
            _draw(panel, arm, points)
        least = sorted({(row.m, row.theory) for row in group if row.theory is not None})
        if least:
            panel.plot(*zip(*least, strict=True), color="black", linewidth=1, linestyle=":", label="arithmetic")
        panel.axhline(1, color="black", linewidth=1)
        _sizes_axis(panel, _distinct(sorted(row.m for row in group)))
        _ratio_axis(panel.yaxis, panel.set_yscale, drawn_ratios)
        panel.set_title(case_label(case._replace(m=0)), fontsize=9)
        panel.set_xlabel("tokens, M")
        tidy(panel, "both")
    panels[0].set_ylabel("step over the frozen layer's")
    _finish(drawn, panels, title)
    return drawn


def throughput(rows: Sequence[ModelRow], on: str) -> Any:
    """Tokens per second of whole training steps, a group of bars per case."""
    timed = [row for row in rows if row.tokens_per_second is not None]
    if not timed:
        return None
    cases = _distinct(row.case for row in timed)
    title = f"Training steps of whole models, {on}"
    drawn = figure(9, 1.8 + 0.2 * (len(timed) + 1.5 * len(cases)))
    panel = drawn.subplots()
    y, ticks = 0.0, []
    for case in cases:
        group = [row for row in timed if row.case == case]
        best = max(row.tokens_per_second or 0 for row in group)
        ticks.append(y + (len(group) - 1) / 2)
        for row in group:
            tokens = row.tokens_per_second or 0
            panel.barh(y, tokens / best, 0.9, color=style_of(row.arm).colour, label=row.arm)
            panel.annotate(
                f"{tokens:,.0f}", (0.005, y), va="center", fontsize=7, color=ink_on(style_of(row.arm).colour)
            )
            y += 1
        y += 1.5
    panel.set_yticks(ticks, [model_label(case) for case in cases])
    panel.set_ylim(y - 1.5, -1)
    panel.set_xlim(0, 1.02)
    panel.set_xlabel("tokens a second (in the bars) over the best of the group")
    tidy(panel, "x")
    _finish(drawn, [panel], title)
    return drawn


def memory_by_sequence(rows: Sequence[ModelRow], on: str) -> Any:
    """Peak memory by sequence length, one panel for each case that ran at several; a cross marks out of memory."""
    known = [row for row in rows if row.peak_bytes is not None or row.status == "oom"]
    groups = _groups(known, lambda row: row.case._replace(sequence=0), lambda row: row.sequence)
    if not groups:
        return None
    arms = _largest_first(row.arm for row in known)
    unit, name = (2**30, "GiB") if max(row.peak_bytes or 0 for row in known) >= 2**30 else (2**20, "MiB")
    beside = {arm: _BESIDE ** (i - (len(arms) - 1) / 2) for i, arm in enumerate(arms)}
    title = f"Peak memory of a training step, {on}"
    drawn = figure(3 + 4 * len(groups), 4.8)
    panels = drawn.subplots(1, len(groups), squeeze=False)[0]
    for panel, (case, group) in zip(panels, groups.items(), strict=True):
        top = max(row.peak_bytes or 0 for row in group) / unit
        for arm in arms:
            mine = sorted((row for row in group if row.arm == arm), key=lambda row: row.sequence)
            points = [(beside[arm] * row.sequence, row.peak_bytes / unit) for row in mine if row.peak_bytes is not None]
            _draw(panel, arm, points)
            first = next((row.sequence for row in mine if row.status == "oom"), None)
            if first is not None:
                panel.plot(first, top, "X", color=style_of(arm).colour, markersize=9)
        _sizes_axis(panel, _distinct(sorted(row.sequence for row in group)))
        panel.set_ylim(bottom=0)
        panel.set_title(model_label(case._replace(sequence=0)), fontsize=9)
        panel.set_xlabel("sequence length, tokens (side by side: equal arms; X: out of memory)")
        tidy(panel, "both")
    panels[0].set_ylabel(f"peak memory of a training step, {name}")
    _finish(drawn, panels, title)
    return drawn


def _draw(panel: Any, arm: str, points: Sequence[tuple[float | None, float | None]], linestyle: str = "-") -> None:
    if points:
        style = style_of(arm)
        shape = {"marker": style.marker, "markersize": style.size, "linestyle": linestyle, "linewidth": 1}
        panel.plot(*zip(*points, strict=True), color=style.colour, label=arm, **shape)


def _ratio_axis(axis: Any, set_scale: Callable[[str], object], ratios: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    set_scale("log")
    wide = max(ratios) > _WIDE * min(1.0, *ratios)
    axis.set_major_locator(FixedLocator(_FEW_RATIOS if wide else _RATIOS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _sizes_axis(panel: Any, sizes: Sequence[int]) -> None:
    panel.set_xscale("log")
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()


def _finish(drawn: Any, panels: Sequence[Any], title: str) -> None:
    """One legend for all panels, under the title."""
    labelled = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    heading: dict[str, Any] = {"title": title, "title_fontsize": 10}
    columns = min(len(labelled), int(drawn.get_figwidth() / 1.6))
    drawn.legend(
        labelled.values(), labelled.keys(), loc="outside upper center", ncols=columns, frameon=False, **heading
    )


def _groups(rows: Iterable[T], group: Callable[[T], Hashable], size: Callable[[T], int]) -> dict[Any, list[T]]:
    groups: dict[Any, list[T]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    return {key: members for key, members in groups.items() if len({size(row) for row in members}) >= _FEWEST_SIZES}


def _distinct(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _largest_first(arms: Iterable[str]) -> list[str]:
    """Sorts arms by the size of their marks, so that none hides another where lines coincide."""
    return sorted(_distinct(arms), key=lambda arm: -style_of(arm).size)
