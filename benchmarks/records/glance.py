"""The picture that compares fastlora with PEFT, and with plain LoRA or full fine-tuning, in bars with their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .rows import LayerRow, Measured, ModelRow
from .styles import case_label, figure, model_label, style_of, tidy
from .verdict import STALLED, Duel, steady, steps

_LAYERS, _MODELS = ("plain", "peft-same", "fastlora"), ("full", "peft-same", "fastlora")


def at_a_glance(rows: Sequence[Measured], on: str) -> Any:
    """Three bars a case: a layer's step over the frozen layer's, or a model's tokens a second over the best of them.

    Args:
        rows: of layers or of models; a case counts where fastlora and another of the three were timed.
        on: the name of the machine.

    Returns:
        The figure, or None where no case counts. A case in which the machine stalled has its name and no bars.
    """
    groups: dict[Any, dict[str, Measured]] = {}
    for row in steps(rows):
        layer = isinstance(row, LayerRow)
        if row.ms is not None and _value(row) and row.arm in (_LAYERS if layer else _MODELS) and not _is_host(row):
            groups.setdefault(row.case, {})[row.arm] = row
    groups = {case: group for case, group in groups.items() if "fastlora" in group and len(group) > 1}
    if not groups:
        return None
    of_layers = isinstance(next(iter(groups.values()))["fastlora"], LayerRow)
    drawn = figure(9, 1.9 + 0.17 * (sum(map(len, groups.values())) + len(groups)))
    panel = drawn.subplots()
    y, ticks, names, labelled = 0.0, [], [], set()
    for case, group in groups.items():
        quiet = all(steady(row) for row in group.values())
        ticks.append(y + (len(group) - 1) / 2)
        names.append((case_label(case) if of_layers else model_label(case)) + ("" if quiet else f" ({STALLED})"))
        best = max(_value(row) for row in group.values())
        for arm in _LAYERS if of_layers else _MODELS:
            if quiet and arm in group:
                length = _value(group[arm]) / (1 if of_layers else best)
                panel.barh(y, length, 0.9, color=style_of(arm).colour, label=None if arm in labelled else arm)
                text = f" {_number(group[arm])}{_mark(group, arm)}"
                panel.annotate(text, (length, y), va="center", fontsize=7, fontweight=_weight(arm))
                labelled.add(arm)
            y += arm in group
        y += 1
    if of_layers:
        panel.axvline(1, color="black", linewidth=1)
    panel.set_yticks(ticks, names)
    panel.set_ylim(y - 1, -1)
    panel.margins(x=0.12)
    panel.set_xlim(left=0)
    what = "over the frozen layer's step (the line)" if of_layers else "over the best of the three"
    panel.set_xlabel(f"{what}; ≈: within noise of fastlora", fontsize=8)
    tidy(panel, "x")
    kind = "Steps of single layers (shorter is faster)" if of_layers else "Tokens/s of whole models (longer is faster)"
    title = f"{kind}, {on}"
    if labelled:
        drawn.legend(loc="outside upper center", ncols=3, frameon=False, title=title, title_fontsize=10)
    else:
        drawn.suptitle(title, fontsize=10)
    return drawn


def _value(row: Measured) -> float:
    number = row.ratio if isinstance(row, LayerRow) else row.tokens_per_second if isinstance(row, ModelRow) else None
    return number or 0.0


def _is_host(row: Measured) -> bool:
    return isinstance(row, LayerRow) and row.case.is_host


def _number(row: Measured) -> str:
    return f"{_value(row):.2f}" if isinstance(row, LayerRow) else f"{_value(row):,.0f}"


def _mark(group: dict[str, Measured], arm: str) -> str:
    return " ≈" if arm != "fastlora" and not Duel(group["fastlora"], group[arm]).apart else ""


def _weight(arm: str) -> str:
    return "bold" if arm == "fastlora" else "normal"
