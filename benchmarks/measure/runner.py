"""Parts of every measuring subcommand: its options, and the loop over cases, which can be stopped and resumed."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from ..cases import C, Profile, branches_of
from ..names import suggestion
from ..records import environment, plots
from ..records.files import LOCAL, RESULTS, ResultFile
from ..records.rows import Row
from .failures import DeviceLostError
from .progress import Progress

R = TypeVar("R", bound=Row)
Doing = Callable[[str], None]


class StopError(Exception):
    """Ends the run with an exit status and a message on stderr."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def add_arguments(
    parser: argparse.ArgumentParser, profiles: Sequence[str] = ("quick", "full")
) -> argparse._MutuallyExclusiveGroup:
    """The options of every measuring subcommand; returns the group that says where results go."""
    parser.add_argument(
        "--profile", type=one_of(profiles), default="quick", metavar="NAME", help=f"{', '.join(profiles)}; see --list"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (default: cuda if there is one)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--json", type=Path, metavar="PATH", help="write the rows here (JSON Lines)")
    where.add_argument(
        "--publish", action="store_true", help="copy a finished run of a whole profile to benchmarks/results/<device>/"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same options")
    return where


def add_arm_option(parser: argparse.ArgumentParser, about: str, choices: Iterable[str] | None = None) -> None:
    """``--arm NAME ...``, and its former name ``--provider``."""
    for option, text in (("--arm", about), ("--provider", argparse.SUPPRESS)):
        kind = str if choices is None else one_of(choices)
        parser.add_argument(option, dest="arm", nargs="+", type=kind, metavar="NAME", help=text)


@dataclass
class Run(Generic[C]):
    """One call of a measuring subcommand.

    ``settings`` are the options' effect, axes aside: they go into the file, and a resumed run must have the same. A
    ``narrowed`` one is less than its profile, or more.
    """

    command: str
    args: argparse.Namespace
    device: torch.device
    profile: Profile[C]
    cases: Sequence[C]
    settings: dict[str, Any]
    narrowed: bool = False

    @property
    def path(self) -> Path:
        """Where its rows go: a narrowed run has a file of its own, one for the same options."""
        path: Path | None = self.args.json
        asked = json.dumps([self.settings, list(map(str, self.cases))], sort_keys=True).encode()
        part = f"-part-{hashlib.sha256(asked).hexdigest()[:6]}" if self.narrowed else ""
        return path or LOCAL / environment.slug(self.device) / f"{self.command}-{self.args.profile}{part}.jsonl"

    def measure(
        self,
        case_rows: Callable[[C, Sequence[R], Doing], list[R]],
        render: Callable[[list[R]], str],
        work: Callable[[C], float] = lambda case: 1.0,
    ) -> list[R]:
        """Measures every case that is not in the file yet, prints each as it ends, and returns the rows of all.

        ``case_rows`` is given the rows of the cases before, those of a resumed run included.

        Raises:
            StopError: the file is of something else, or Ctrl-C; what was finished is in the file.
        """
        settings = {"profile": self.args.profile, **self.settings, "all": [str(case) for case in self.cases]}
        record = environment.describe(self.device, self.command, settings, len(self.cases))
        try:
            file = ResultFile(self.path, record, self.args.resume)
        except ValueError as error:
            raise StopError(2, str(error)) from None
        except OSError as error:
            raise StopError(2, f"{self.path} cannot be written: {error.strerror}; --json PATH names another") from None
        plots.discard(self.path)
        if file.aside:
            print(f"the results that were in {self.path} are in {file.aside} now", file=sys.stderr)
        progress = Progress([work(case) for case in self.cases])
        rows: list[R] = []
        with file:
            try:
                for case in self.cases:
                    finished = cast("list[R] | None", file.finished.get(str(case)))
                    if finished is None:
                        progress.case(case)
                        finished = case_rows(case, rows, progress.doing)
                        progress.clear()
                        file.append(str(case), finished, environment.seen(self.device))
                        print(render(finished), end="\n\n", flush=True)
                    else:
                        progress.skip()
                    rows += finished
            except (KeyboardInterrupt, DeviceLostError) as stop:
                lost = isinstance(stop, DeviceLostError)
                raise StopError(
                    1 if lost else 130,
                    f"\n{stop if lost else 'interrupted'}: {len(file.finished)} of {len(self.cases)} cases are in "
                    f"{self.path}; the same command with --resume does the rest",
                ) from None
        return rows

    def publish(self, written: Sequence[Path]) -> Sequence[Path]:
        """Copies the files to the committed results if --publish is set; prints and returns their paths."""
        if self.args.publish:
            folder = RESULTS / environment.slug(self.device)
            folder.mkdir(parents=True, exist_ok=True)
            plots.discard(folder / self.path.name)
            written = [Path(shutil.copy(file, folder)) for file in written]
        print("\n".join(f"wrote {file}" for file in written))
        return written


def start(
    command: str,
    args: argparse.Namespace,
    profiles: Mapping[str, Mapping[str, Profile[C]]],
    axes: Mapping[str, Sequence[Any] | None],
    settings: Mapping[str, Any],
    whole: bool,
) -> Run[C]:
    """Resolves device, profile and cases. ``whole`` says that no option but the axes narrows the profile.

    Raises:
        StopError: no CUDA device for a run on one, or --publish of a part of a profile.
    """
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StopError(
            2,
            f"--device cuda: torch sees no CUDA device here; `python -m benchmarks {command} --device cpu` runs on "
            "this machine's CPU",
        )
    narrowed = not (whole and all(values is None for values in axes.values()))
    if args.publish and narrowed:
        raise StopError(2, "--publish takes a whole profile: drop the options that select or shorten")
    profile = profiles[device.type].get(args.profile)
    if profile is None:
        there = ", ".join(profiles[device.type])
        raise StopError(2, f"--profile {args.profile} is not for --device {device.type}: expected one of {there}")
    return Run(command, args, device, profile, profile.cases(**axes), dict(settings), narrowed)


def listing(profiles: Mapping[str, Mapping[str, Profile[C]]], sections: Mapping[str, Mapping[str, str]]) -> str:
    """The text of ``--list``: the profiles, and names with their descriptions under each title."""
    lines = ["profiles"]
    for device, group in profiles.items():
        for name, profile in group.items():
            lines.append(f"  --device {device:<5} --profile {name:<6} {profile.about}: {len(profile.cases())} cases")
    for title, known in sections.items():
        width = max(map(len, known))
        lines += [title, *(f"  {name:<{width}}  {about}" for name, about in known.items())]
    return "\n".join(lines)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """The type of an option that takes one of these names; an unknown one is told the nearest."""
    known = list(names)

    def named(text: str) -> str:
        if text not in known:
            expected = f"{suggestion(text, known)}expected one of {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"unknown name {text!r}: {expected}")
        return text

    return named


def positive(text: str) -> int:
    """An option's whole number from 1 up."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def probability(text: str) -> float:
    """An option's dropout probability."""
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0 and below 1, got {text!r}")
    return value


def number(text: str) -> float:
    """An option's number; NaN, which lies in no range, for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def layer_name(text: str) -> str:
    """An option's named layer or group, KxN or KxN+N."""
    try:
        branches_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
