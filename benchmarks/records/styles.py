"""What the pictures share: a colour and a mark for each arm, an empty figure, and the names of cases."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..cases import Case, ModelCase


class Style(NamedTuple):
    """Colour, mark, and its size in points."""

    colour: str
    marker: str
    size: int = 6


# fastlora stands out; the others keep one colour and mark each in every picture.
STYLES = {
    "fastlora": Style("#d62728", "o", 9),
    "patched": Style("#393b79", "o", 7),
    "fastlora-mlp": Style("#d62728", "*", 9),
    "fastlora-alone": Style("#d62728", "x", 7),
    "fastlora-fp32": Style("#ff9896", "o", 7),
    "fastlora-lora": Style("#ff9896", "x", 7),
    "plain": Style("#7f7f7f", "s"),
    "addmm": Style("#1f77b4", "^"),
    "compiled": Style("#17becf", "P"),
    "compiled-fastlora": Style("#9edae5", "P"),
    "peft-same": Style("#9467bd", "D"),
    "peft-fp32": Style("#c5b0d5", "D"),
    "loralib": Style("#bcbd22", "p"),
    "full": Style("#2ca02c", "v"),
    "fastlora-library": Style("#e377c2", "x"),
    "fastlora-triton-skinny": Style("#d95f02", ">"),
    "fastlora-triton-portable": Style("#ffbb78", "<"),
    "fastlora-triton-serial": Style("#ff7f0e", "o", 8),
    "fastlora-cuda-serial": Style("#636363", ">"),
    "fastlora-cuda-z_jobs": Style("#000000", "o", 8),
    "lorafusion": Style("#8c564b", "*", 8),
    "unsloth": Style("#aec7e8", "h"),
    "freesolo-chalk": Style("#98df8a", "8"),
    "lycoris": Style("#c49c94", "d"),
}
OTHER = Style("#8c564b", "x")


def style_of(arm: str) -> Style:
    """The arm's colour and mark."""
    return STYLES.get(arm, OTHER)


def ink_on(colour: str) -> str:
    """Black or white, which of the two is read on this colour."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"


def figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def tidy(panel: Any, grid: str) -> None:
    """Pale lines of a grid, and no frame at the top and right."""
    panel.grid(axis=grid, color="#e0e0e0", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def case_label(case: Case) -> str:
    """The name of a layer's case."""
    tokens = f" M={case.m}" if case.m else ""
    return f"{case.layer} {tokens} R={case.r} {case.dtype}{f' p={case.dropout:g}' if case.dropout else ''}"


def model_label(case: ModelCase) -> str:
    """The name of a model's case."""
    batch = f"{case.batch} × {case.sequence}" if case.sequence else f"batch {case.batch}"
    dropout = f" p={case.dropout:g}" if case.dropout else ""
    return f"{case.model}  {batch}  R={case.r} {case.dtype}{dropout}{'  checkpointing' if case.checkpointing else ''}"
