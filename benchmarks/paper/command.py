"""``python -m benchmarks paper``: the claims of the LoRA paper as a checklist, each beside our own figure."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..cases import Profile
from ..measure import runner
from ..measure.runner import Doing, one_of
from ..records.rows import ClaimRow
from . import computed, measured
from .claims import COMPUTED, DIFFERS, ERROR, HOLDS, MEASURED, NOT_MEASURED, Claim, Lab

HELP = "check the claims of the LoRA paper, computed or measured here"

CLAIMS: dict[str, Claim] = {claim.name: claim for part in (computed, measured) for claim in part.CLAIMS}

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LABS = {
    "cpu": {
        "quick": Lab(CPU, "gpt2", "small", batch=4, sequence=64, rounds=51, seconds=3.0),
        "full": Lab(CPU, "gpt2-medium", "gpt2", batch=4, sequence=256, rounds=51, seconds=60.0),
    },
    "cuda": {
        "quick": Lab(CUDA, "gpt2-medium", "gpt2-medium", batch=8, sequence=512, rounds=31, seconds=10.0),
        "full": Lab(CUDA, "gpt2-xl", "gpt2-large", batch=8, sequence=1024, rounds=51, seconds=30.0),
    },
}

MARKS = {HOLDS: "✓", DIFFERS: "≠", NOT_MEASURED: "·", ERROR: "✗"}

# A figure of the paper that its own formulas do not give is no result that failed here.
_KINDS = {COMPUTED: "The paper's own arithmetic", MEASURED: "Measured here"}
_SAME = {HOLDS: "holds", NOT_MEASURED: "not measured", ERROR: "error"}
_WORDS = {
    COMPUTED: {**_SAME, DIFFERS: "the paper's figure is another"},
    MEASURED: {**_SAME, DIFFERS: "not reproduced"},
}

# Columns of the text; a narrower terminal wins.
_WIDTH = 110


class ClaimCase(NamedTuple):
    """One claim, by its name."""

    claim: str

    def __str__(self) -> str:
        return self.claim


def _profile(lab: Lab) -> Profile[ClaimCase]:
    about = f"every claim, measured on {lab.model}, training on {lab.trained}"
    return Profile(about, lab.rounds, lab.seconds, ClaimCase, ({"claim": tuple(CLAIMS)},))


PROFILES = {device: {name: _profile(lab) for name, lab in labs.items()} for device, labs in LABS.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    runner.add_arguments(parser)
    parser.add_argument("--claim", nargs="+", type=one_of(CLAIMS), metavar="NAME", help="only these; see --list")
    parser.add_argument("--list", action="store_true", help="list profiles and claims, and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status: 1 where a claim ended in an error, whatever the verdicts."""
    if args.list:
        claims = {name: f"{claim.how}: {claim.claim} ({claim.source})" for name, claim in CLAIMS.items()}
        print(runner.listing(PROFILES, {"claims": claims}))
        return 0
    job = runner.start("paper", args, PROFILES, {"claim": args.claim}, {}, whole=True)
    lab = LABS[job.device.type][args.profile]
    job.settings["lab"] = str(lab)

    def case_rows(case: ClaimCase, before: Sequence[ClaimRow], doing: Doing) -> list[ClaimRow]:
        return [CLAIMS[case.claim].examine(lab)]

    rows = job.measure(case_rows, render, lambda case: 4.0 if CLAIMS[case.claim].how == MEASURED else 1.0)
    if args.resume:
        print(render(rows), end="\n\n")
    print("\n".join(summary(rows)))
    job.publish([job.path])
    return 1 if any(row.verdict == ERROR for row in rows) else 0


def render(rows: Sequence[ClaimRow]) -> str:
    """The checklist for a terminal: mark and claim, then the paper's figure, ours, and the note below."""
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns)
    return "\n\n".join(_block(row, width) for row in rows)


def summary(rows: Sequence[ClaimRow]) -> list[str]:
    """Counts the claims by verdict, those of the paper's own arithmetic apart from what was measured here."""
    lines = []
    for how, title in _KINDS.items():
        verdicts = Counter(row.verdict for row in rows if row.how == how)
        counts = [
            f"{mark} {verdicts[verdict]} {_WORDS[how][verdict]}" for verdict, mark in MARKS.items() if verdicts[verdict]
        ]
        if counts:
            lines.append(f"{title}, {verdicts.total()} in all: {', '.join(counts)}")
    return lines


def markdown(rows: Sequence[ClaimRow]) -> str:
    """The checklist for a page: a table, and the notes folded away below it."""
    lines = [_cells("", "claim", "in the paper", "the paper", "ours", ""), _cells(*["---"] * 6)]
    lines += [_cells(MARKS[row.verdict], row.claim, row.source, row.stated, row.ours, _how(row)) for row in rows]
    notes = [f"- **{row.claim}** ({row.source}): {row.note}" for row in rows]
    folded = ["<details><summary>The arithmetic, and what was measured</summary>", "", *notes, "", "</details>"]
    return "\n".join([*lines, "", *(f"- {line}" for line in summary(rows)), "", *folded])


def _block(row: ClaimRow, width: int) -> str:
    def wrapped(text: str, first: str) -> list[str]:
        return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * 11, break_on_hyphens=False)

    lines = wrapped(f"{row.claim}  [{row.source}]", f"{MARKS[row.verdict]} ")
    lines += wrapped(row.stated, "    paper  ")
    lines += wrapped(f"{row.ours}  ({_how(row)})", "    ours   ")
    return "\n".join([*lines, *wrapped(row.note, " " * 11)])


def _how(row: ClaimRow) -> str:
    words = _WORDS[row.how][row.verdict]
    return words if row.verdict in (NOT_MEASURED, ERROR) else f"{row.how}, {words}"


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
