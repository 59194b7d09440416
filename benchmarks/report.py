"""``python -m benchmarks report``: renders the committed results into README.md, between two markers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .clocks import geometric_mean
from .environment import Environment
from .providers import FLOOR
from .results import RESULTS, Row, read
from .table import PAIRS, readable_bytes, step_speedups

HELP = "render the committed results into README.md"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
NO_GPU = "No GPU result yet: `python -m benchmarks --publish` on a machine with one adds its table here."
COLUMNS = ("plain", "addmm", "peft-fp32", "peft-same", "full", "fastlora-fp32", "fastlora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="PATH", help="the file to rewrite")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where <device>/*.jsonl lie")


def run(args: argparse.Namespace) -> int:
    """Rewrites what lies between the markers; the same results give the same bytes. Returns the exit status."""
    try:
        text = args.readme.read_text(encoding="utf-8")
        rendered = replace_between_markers(text, render_results(args.results, args.readme.parent))
    except (OSError, ValueError) as error:
        print(f"{args.readme}: {error}", file=sys.stderr)
        return 2
    args.readme.write_text(rendered, encoding="utf-8")
    print(f"wrote {args.readme}")
    return 0


def replace_between_markers(text: str, body: str) -> str:
    """``text`` with what lies between START and END replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end or START in rest or END in head + tail:
        raise ValueError(f"expected {START} and {END}, once each and in this order")
    return f"{head}{START}\n{body.strip()}\n{END}{tail}"


def render_results(folder: Path, relative_to: Path) -> str:
    """Every committed run: GPUs first, or a line that says there is none."""
    files = sorted(path for path in folder.glob("*/layers-*.jsonl") if path.parent.name != "local")
    runs = [(path, *read(path)) for path in files]
    runs.sort(key=lambda item: item[1]["device"] == "cpu")
    sections = [] if any(environment["device"] == "cuda" for _, environment, _ in runs) else [NO_GPU]
    for path, environment, rows in runs:
        sections += [render_environment(environment), render_markdown(rows)]
        picture = path.with_suffix(".png")
        if picture.exists():
            link = Path(os.path.relpath(picture, relative_to)).as_posix()
            sections.append(f"![Time over the frozen layer's, by layer and mode]({link})")
    return "\n\n".join(sections)


def render_environment(environment: Environment) -> str:
    """One paragraph: machine, software, commit and method."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    machine = environment["device_name"]
    if environment["device"] == "cpu":
        machine += f" ({environment['threads']} threads)"
    commit = (environment["commit"] or "unknown commit")[:9] + (" with local changes" if environment["dirty"] else "")
    return (
        f"**{machine}**, {packages}, Python {environment['python']}, profile `{environment['profile']}` at {commit}, "
        f"{environment['time'][:10]}: median of up to {environment['rounds']} interleaved rounds."
    )


def render_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table of training steps (forward and backward), and the speed-ups over PEFT below it.

    Each number is time over the frozen layer's own step, or the word for why there is none; ``kept`` is what fastlora
    and PEFT (adapters in the base's dtype) keep for the backward beyond x.
    """
    steps = {(row.case, row.provider): row for row in rows if row.mode == "step"}
    arms = [name for name in COLUMNS if any(provider == name and row.ms for (_, provider), row in steps.items())]
    heads = ["layer", "M", "K → N", "R", "dtype", "dropout", "frozen, ms", *arms, "kept: ours / PEFT"]
    lines = [_line(heads), _line(["---"] * 3 + ["--:"] * (len(heads) - 3))]
    for case in dict.fromkeys(row.case for row in rows if not row.case.is_host):
        floor = steps.get((case, FLOOR))
        cells = [case.layer, str(case.m), f"{case.k} → {case.n}", str(case.r), case.dtype, f"{case.dropout:g}"]
        cells.append("-" if floor is None or floor.ms is None else f"{floor.ms.p50:.3g}")
        cells += [_ratio(steps.get((case, arm)), bold=arm == "fastlora") for arm in arms]
        kept = [steps.get((case, name)) for name in ("fastlora", "peft-same")]
        cells.append(" / ".join(readable_bytes(row.kept_bytes if row else None) for row in kept))
        lines.append(_line(cells))
    return "\n".join([*lines, "", *_speedups(rows), *_host_overhead(rows)]).strip()


def _speedups(rows: Sequence[Row]) -> list[str]:
    lines = []
    for ours, theirs in PAIRS:
        speedups = step_speedups([row for row in rows if not row.case.is_host], ours, theirs)
        if speedups:
            lines.append(
                f"- `{theirs}` over `{ours}`, step: {geometric_mean(speedups):.2f}× (geometric mean of "
                f"{len(speedups)} layers, worst {min(speedups):.2f}×)"
            )
    return lines


def _host_overhead(rows: Sequence[Row]) -> list[str]:
    lines = []
    for case in dict.fromkeys(row.case for row in rows if row.case.is_host):
        steps = [row for row in rows if row.case == case and row.mode == "step" and not _forced(row)]
        times = ", ".join(f"{row.provider} {1e3 * row.wall_ms.p50:.0f}" for row in steps if row.wall_ms)
        lines.append(f"- host overhead of a step (M = {case.m}, K = N = {case.k}, {case.dtype}), µs: {times}")
    return lines


def _forced(row: Row) -> bool:
    """Whether the row belongs to one backend by force."""
    return row.backend is not None and row.provider.endswith(f"-{row.backend}")


def _ratio(row: Row | None, bold: bool) -> str:
    if row is None or row.ratio is None:
        return "-" if row is None or row.status in ("ok", "absent") else row.status
    return f"**{row.ratio:.2f}**" if bold else f"{row.ratio:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
