"""``python -m benchmarks layers``: one LoRA layer at a time, every provider beside the frozen base layer."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import environment, plot
from .cases import AXES, DTYPES, LAYERS, MODES, PROFILES, Case
from .clocks import Clock
from .contest import run_case
from .progress import Progress
from .providers import FLOOR, Provider, providers
from .results import LOCAL, RESULTS, ResultFile, Row
from .table import render_case, render_summary

HELP = "time LoRA layers of real models beside the frozen layer, PEFT and others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options. An axis given on the command line replaces the profile's own."""
    parser.add_argument(
        "--profile", choices=PROFILES, help="which cases (default: gpu with a CUDA device, else quick); see --list"
    )
    axes = parser.add_argument_group("axes", "each replaces the profile's own; several values make a product")
    axes.add_argument("--layer", dest="layers", nargs="+", choices=LAYERS, metavar="NAME", help="named layers")
    axes.add_argument("--tokens", nargs="+", type=_positive, metavar="M", help="tokens")
    axes.add_argument("--rank", dest="ranks", nargs="+", type=_positive, metavar="R", help="ranks")
    axes.add_argument("--dtype", dest="dtypes", nargs="+", choices=DTYPES, help="dtypes of the base")
    axes.add_argument("--dropout", dest="dropouts", nargs="+", type=_probability, metavar="P", help="dropout")
    parser.add_argument(
        "--provider", nargs="+", choices=providers(), metavar="NAME", help="only these; the floor always runs"
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="only these modes")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="timings of each provider in each mode")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--json", type=Path, metavar="PATH", help="write the rows here, and the plot beside them")
    where.add_argument(
        "--publish", action="store_true", help="copy a finished run of a whole profile to benchmarks/results/<device>/"
    )
    parser.add_argument("--list", action="store_true", help="list profiles, layers and providers, and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    if args.list:
        print(_listing())
        return 0
    name = args.profile or ("gpu" if torch.cuda.is_available() else "quick")
    profile = PROFILES[name]
    if profile.device == "cuda" and not torch.cuda.is_available():
        print(
            f"profile {name} needs a CUDA device and torch sees none here; this machine can run "
            "`python -m benchmarks layers --profile quick`",
            file=sys.stderr,
        )
        return 2
    axes = {axis: getattr(args, axis) for axis in AXES}
    if args.publish and (any(axes.values()) or args.provider or args.rounds or tuple(args.mode) != MODES):
        print("--publish takes a whole profile: drop the options that select or shorten", file=sys.stderr)
        return 2

    device = torch.device(profile.device)
    rounds = args.rounds or profile.rounds
    arms = [p for p in providers().values() if not args.provider or p.name in (FLOOR, *args.provider)]
    if device.type == "cpu" and (busy := environment.busy()):
        print(busy, file=sys.stderr)
    path = args.json or LOCAL / environment.slug(device) / f"layers-{name}.jsonl"
    with ResultFile(path, environment.describe(device, name, rounds)) as results:
        try:
            rows = _run_all(profile.cases(**axes), arms, args.mode, rounds, profile.seconds, device, results)
        except KeyboardInterrupt:
            print(f"\ninterrupted: {results.rows} finished rows are in {path}", file=sys.stderr)
            return 130
    print(render_summary(rows))
    written = [path, *plot.save(rows, path.with_suffix(".png"))]
    if args.publish:
        folder = RESULTS / environment.slug(device)
        folder.mkdir(parents=True, exist_ok=True)
        written = [Path(shutil.copy(file, folder)) for file in written]
    print("\n".join(f"wrote {file}" for file in written))
    return 1 if any(row.status in ("wrong", "error") for row in rows) else 0


def _run_all(
    cases: Sequence[Case],
    arms: Sequence[Provider],
    modes: Sequence[str],
    rounds: int,
    seconds: float,
    device: torch.device,
    results: ResultFile,
) -> list[Row]:
    clock, progress, rows = Clock(device), Progress(cases), []
    for case in cases:
        progress.case(case)
        finished = run_case(case, arms, modes, rounds, seconds, clock, device, progress.doing)
        progress.clear()
        results.append(finished)
        rows += finished
        print(render_case(finished), end="\n\n", flush=True)
    return rows


def _listing() -> str:
    lines = ["profiles"]
    lines += [f"  {name:<20} {p.about}: {len(p.cases())} cases, {p.rounds} rounds" for name, p in PROFILES.items()]
    lines += ["layers"]
    lines += [f"  {name:<20} K={v.k} N={v.n}{' with bias' if v.bias else ''}" for name, v in LAYERS.items()]
    lines += ["providers"]
    lines += [f"  {name:<20} {provider.about}" for name, provider in providers().items()]
    return "\n".join(lines)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {value}")
    return value
