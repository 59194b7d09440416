"""``python -m benchmarks layers``: one LoRA layer at a time, every arm beside the frozen base layer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fastlora.clock import Clock

from ..cases import DTYPES, FLOOR, GROUPS, LAYERS, MLPS, MODES, PROFILES, VARIANTS, Case
from ..measure import runner
from ..measure.failures import AbsentError
from ..measure.runner import Doing, layer_name, one_of, positive, probability
from ..records import plots
from ..records.rows import LayerRow
from ..records.tables import closing, opening
from .arm import LayerArm, absent
from .arms import arms
from .case import run_case
from .table import LEGEND, render_case, render_summary

HELP = "time LoRA layers of real models beside the frozen layer, PEFT and others"

# Work of a case beyond its products, in multiply-adds: building, checking and the profiler.
_FIXED_WORK = 2e8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options. An axis given on the command line replaces the profile's own."""
    runner.add_arguments(parser, list(dict.fromkeys(name for group in PROFILES.values() for name in group)))
    axes = parser.add_argument_group("axes", "each replaces the profile's own; several values make a product")
    axes.add_argument(
        "--layer",
        nargs="+",
        type=layer_name,
        metavar="NAME",
        help="named layers, KxN, or KxN+N; with :nf4, :int8 or :dora behind",
    )
    axes.add_argument("--tokens", dest="m", nargs="+", type=positive, metavar="M", help="tokens")
    axes.add_argument("--rank", dest="r", nargs="+", type=positive, metavar="R", help="ranks")
    axes.add_argument(
        "--dtype", nargs="+", type=one_of(DTYPES), metavar="NAME", help=f"dtypes of the base: {', '.join(DTYPES)}"
    )
    axes.add_argument("--dropout", nargs="+", type=probability, metavar="P", help="dropout")
    runner.add_arm_option(parser, "only these; the floor always runs", choices=arms())
    parser.add_argument(
        "--mode", nargs="+", type=one_of(MODES), default=MODES, metavar="NAME", help=f"only these of {', '.join(MODES)}"
    )
    parser.add_argument("--rounds", type=positive, metavar="N", help="timings of each arm in each mode")
    parser.add_argument("--list", action="store_true", help="list profiles, layers and arms, and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status: 1 where an arm was wrong or failed."""
    if args.list:
        about = {name: arm.about for name, arm in arms().items()}
        print(
            runner.listing(
                PROFILES,
                {
                    "layers (or KxN)": _layers(),
                    "of one input (or KxN+N)": _several(GROUPS),
                    "MLPs": _several(MLPS),
                    "behind a layer's name": VARIANTS,
                    "arms": about,
                },
            )
        )
        return 0
    named = (FLOOR, *args.arm) if args.arm else tuple(arms())
    chosen = [_unless_named(arm, args.arm or ()) for name, arm in arms().items() if name in named]
    settings = {"arms": [arm.name for arm in chosen], "modes": list(args.mode), "rounds": args.rounds}
    axes = {axis: getattr(args, axis) for axis in Case._fields}
    whole = not (args.arm or args.rounds or tuple(args.mode) != MODES)
    job = runner.start("layers", args, PROFILES, axes, settings, whole)
    clock, profile = Clock(job.device), job.profile
    rounds = args.rounds or profile.rounds

    def case_rows(case: Case, before: Sequence[LayerRow], doing: Doing) -> list[LayerRow]:
        return run_case(case, chosen, args.mode, rounds, profile.seconds, clock, job.device, doing)

    missing = absent(chosen, job.device)
    print(opening(LEGEND, missing))
    rows = job.measure(case_rows, render_case, lambda case: case.m * case.weights + _FIXED_WORK)
    print(closing(render_summary(rows), rows, missing))
    job.publish([job.path, *plots.save(job.path)])
    return 1 if any(row.status in ("wrong", "error") for row in rows) else 0


def _unless_named(arm: LayerArm, named: Sequence[str]) -> LayerArm:
    """An arm that takes part only by name is absent where it was not named."""

    def require(device: torch.device) -> None:
        raise AbsentError(f"takes part only where it is named: --arm {arm.name}")

    return replace(arm, require=require) if arm.by_name_only and arm.name not in named else arm


def _layers() -> dict[str, str]:
    return {name: f"K={layer.k} N={layer.n}{' with bias' if layer.bias else ''}" for name, layer in LAYERS.items()}


def _several(known: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: ", ".join(layers) for name, layers in known.items()}
