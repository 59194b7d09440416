"""What a fine-tune leaves behind: a table on the terminal, a plot and a JSON file."""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastlora

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "benchmarks" / "results" / "local"
COLUMNS = (
    ("variant", "{variant}"),
    ("trainable", "{trainable:,}"),
    ("train loss", "{train_loss:.4f}"),
    ("held-out before", "{held_out_before:.4f}"),
    ("after", "{held_out_after:.4f}"),
    ("tokens/s", "{tokens_per_second:,.0f}"),
    ("x plain", "{speed_over_plain:.2f}"),
    ("peak MB", "{peak_mb}"),
    ("x plain", "{memory_over_plain}"),
)


def show(results: dict[str, Any]) -> bool:
    """Prints the table and the verdict of each check; returns whether none failed."""
    print(f"\n{table(results['rows'])}")
    print("loss in nats a byte, training loss over the last 10 steps; x plain on speed: median of the steps' ratios\n")
    curves, adapter = results["curves"], results["adapter"]
    checks = [
        (
            curves["coincide"] if curves["compared"] else None,
            f"loss curves, plain and fastlora: at most {curves['max_difference']:.1e} nats or "
            f"{curves['max_relative_difference']:.1e} of the loss apart (bound {curves['bound']:.1e}; plain LoRA "
            f"started one rounding away: {curves['max_control_difference']:.1e})"
            if curves["compared"]
            else "loss curves not compared: with dropout, plain and fastlora each draw their own masks",
        ),
        (
            adapter["loaded_equal"],
            f"adapter saved, {adapter['adapter_bytes'] / 1e6:.2f} MB beside {adapter['model_bytes'] / 1e6:.1f} MB of "
            "weights, and loaded: the same logits, bit for bit",
        ),
        (
            adapter["merged_equal"],
            f"merged: logits at most {adapter['merged_relative_difference']:.1e} of the largest apart "
            f"(bound {adapter['merged_bound']:.0e}: each merged weight is rounded once)",
        ),
        (adapter["unmerged_equal"], "unmerged: the base weights back, bit for bit"),
    ]
    for passed, text in checks:
        print(f"{'--' if passed is None else 'ok' if passed else 'FAILED':<8}{text}")
    return not any(passed is False for passed, _ in checks)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows under their headings, numbers to the right; n/a where memory could not be measured."""
    lines = [[heading for heading, _ in COLUMNS]]
    for row in rows:
        peak, ratio = row["peak_bytes"], row["memory_over_plain"]
        shown = row | {
            "peak_mb": "n/a" if peak is None else f"{peak / 1e6:,.1f}",
            "memory_over_plain": "n/a" if ratio is None else f"{ratio:.2f}",
        }
        lines.append([form.format(**shown) for _, form in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "fastlora": fastlora.__version__,
        "commit": commit(),
    }


def commit() -> str | None:
    """The checked-out commit, marked when the tree differs from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def published(device: torch.device) -> Path:
    """The folder of committed results for this device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Writes finetune.json, and finetune.png where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, plot = folder / "finetune.json", folder / "finetune.png"
    rows.write_text(json.dumps(results, indent=1) + "\n")
    return [rows, plot] if draw(plot, results) else [rows]


def draw(path: Path, results: dict[str, Any]) -> bool:
    """The loss curves, and below them how far apart the two LoRA curves lie. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    losses = results["losses"]
    steps = range(1, len(losses["plain"]) + 1)
    figure = Figure(figsize=(7.5, 5.5), dpi=150, layout="constrained")
    curves, gap = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    curves.plot(steps, losses["full"], color="#b0b0b0", linewidth=1.5, label="full fine-tuning")
    curves.plot(steps, losses["plain"], color="#f4b183", linewidth=6, label="plain LoRA", solid_capstyle="round")
    curves.plot(steps, losses["fastlora"], color="#1f2d5a", linewidth=1.5, linestyle=(0, (4, 2)), label="fastlora")
    curves.set_ylabel("training loss, nats a byte")
    curves.legend(frameon=False)
    curves.set_title(results["title"], fontsize=10, loc="left")

    compared = results["curves"]
    for name, color, label in (
        ("control_differences", "#f4b183", "plain LoRA started one rounding away"),
        ("relative_differences", "#1f2d5a", "fastlora"),
    ):
        apart = [distance or math.nan for distance in compared[name]]
        gap.semilogy(steps, apart, color=color, linewidth=1, marker=".", label=label)
    gap.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    gap.margins(y=0.35)
    gap.set_ylabel("distance to plain,\nrelative")
    gap.set_xlabel("step (no dot: equal)")
    for axes in (curves, gap):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path)
    return True
