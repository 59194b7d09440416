"""``python -m benchmarks report``: renders the committed results: README.md, and a page with pictures per device."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ..measure.runner import StopError
from ..paper import command as paper
from ..records import plots
from ..records.environment import machine
from ..records.files import RESULTS, Results, read
from ..records.rows import ClaimRow, LayerRow, Measured, ModelRow, Row
from . import markdown

HELP = "render the committed results into README.md, pages and pictures"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
NO_GPU = "No GPU result yet: `make publish` on a machine with one adds its tables here."

# The pictures that the README shows, by suffix.
_BRIEF = ("-glance",)

# The profiles that the README may show, the first that is there; else what `benchmarks.hardware` brought back.
_PROFILES = ("quick", "full")

R = TypeVar("R", bound=Row)
Runs = dict[Path, Results]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="PATH", help="the file to rewrite")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where <device>/*.jsonl lie")


def run(args: argparse.Namespace) -> int:
    """Rewrites pictures, pages and what lies between the markers; the same results give the same bytes."""
    try:
        text = _text(args.readme)
        folders = devices(args.results)
        if not folders:
            raise ValueError(f"--results {args.results}: expected FOLDER/<device>/*.jsonl, found none")
        written = [picture for runs in folders.values() for path in runs for picture in plots.save(path)]
        rendered = {folder / "README.md": page(runs) for folder, runs in folders.items()}
        rendered[args.readme] = replace_between_markers(text, readme_section(folders, args.readme.parent))
    except (OSError, ValueError) as error:
        raise StopError(2, str(error)) from None
    for path, content in rendered.items():
        path.write_text(content, encoding="utf-8")
    print("\n".join(f"wrote {path}" for path in (*written, *rendered)))
    return 0


def _text(readme: Path) -> str:
    if not readme.is_file():
        raise ValueError(f"--readme {readme}: expected a file that is there and holds {START} and {END}")
    return readme.read_text(encoding="utf-8")


def replace_between_markers(text: str, body: str) -> str:
    """``text`` with what lies between START and END replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end or START in rest or END in head + tail:
        raise ValueError(f"the file to rewrite: expected {START} and {END}, once each and in this order")
    return f"{head}{START}\n{body.strip()}\n{END}{tail}"


def devices(results: Path) -> dict[Path, Runs]:
    """The runs of each device's folder, GPUs first."""
    folders: dict[Path, Runs] = {}
    for path in sorted(results.glob("*/*.jsonl")):
        if path.parent.name != "local":
            folders.setdefault(path.parent, {})[path] = read(path)
    return dict(sorted(folders.items(), key=lambda item: _first(item[1]).environment["device"] == "cpu"))


def readme_section(folders: dict[Path, Runs], relative_to: Path) -> str:
    """The section of the README: each device's quick profile in brief, or its full one, or a first run's cases."""
    on_gpu = any(_first(runs).environment["device"] == "cuda" for runs in folders.values())
    sections = [] if on_gpu else [NO_GPU]
    for folder, runs in folders.items():
        sections.append(f"**{machine(_first(runs).environment)}**")
        for command in ("layers", "model"):
            known = {path.stem: path for path in runs}
            names = (*(f"{command}-{profile}" for profile in _PROFILES), f"hardware-{command}")
            if chosen := next((known[name] for name in names if name in known), None):
                sections += _section(chosen, runs[chosen], relative_to, brief=True)
        link = _link(folder / "README.md", relative_to)
        sections.append(
            f"Every arm, all pictures and the LoRA paper's claims on this machine: [{folder.name}]({link})."
        )
    return "\n\n".join(sections)


def page(runs: Runs) -> str:
    """Everything that was measured on one device."""
    sections = [f"# {machine(_first(runs).environment)}", "Rendered by `python -m benchmarks report`."]
    for path, results in runs.items():
        sections += [f"## {path.stem}", *_section(path, results, path.parent, brief=False)]
    return "\n\n".join(sections) + "\n"


def _section(path: Path, results: Results, relative_to: Path, brief: bool) -> list[str]:
    rows = results.rows
    tables: list[str] = []
    if layers := _of(rows, LayerRow):
        tables += [markdown.layers_in_brief(layers)] if brief else [markdown.layers(layers), markdown.host(layers)]
    if models := _of(rows, ModelRow):
        tables += [markdown.models_in_brief(models)] if brief else [markdown.models(models), markdown.memory(models)]
    if claims := _of(rows, ClaimRow):
        tables.append(paper.markdown(claims))
    for suffix, caption in plots.CAPTIONS.items():
        picture = path.with_name(f"{path.stem}{suffix}.png")
        if picture.exists() and (suffix in _BRIEF or not brief):
            tables.append(f"![{caption}]({_link(picture, relative_to)})")
    absent = "" if brief else markdown.absences([row for row in rows if isinstance(row, Measured)])
    return [markdown.provenance(results.environment), *filter(None, tables), *([absent] if absent else [])]


def _of(rows: Sequence[Row], kind: type[R]) -> list[R]:
    return [row for row in rows if isinstance(row, kind)]


def _first(runs: Runs) -> Results:
    return next(iter(runs.values()))


def _link(path: Path, relative_to: Path) -> str:
    return Path(os.path.relpath(path, relative_to)).as_posix()
