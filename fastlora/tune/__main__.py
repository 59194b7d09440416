"""``python -m fastlora.tune``: proves the kernels on this machine and measures which is the fastest at which sizes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from ..atomic import new_file
from ..backends import measured
from ..backends.machine import machine_of
from . import plan, report
from .layers import Layer, of_config
from .run import CASE_SECONDS, QUICK_SECONDS, SECONDS, Run
from .worker import StartError

_ABOUT = """\
Proves the kernels on this machine's GPU and measures which is the fastest at which sizes; from then on fastlora takes
that one. On a CPU it measures the forms of the vendor's products. A quarter of an hour, or minutes with --quick; the
result is kept, Ctrl-C keeps what is done, and the same command goes on. docs/tuning.md has more.
"""


def main(
    arguments: Sequence[str] | None = None,
    *,
    python: Sequence[str] = (sys.executable,),
    case_seconds: float = CASE_SECONDS,
    stream: TextIO | None = None,
) -> int:
    """Runs the command and returns its exit status.

    It is 1 where the table could not be kept or no kernel tried, 2 for what cannot be done.

    Args:
        arguments: of the command line.
        python: the command that runs Python in the process that tries the kernels.
        case_seconds: how long a kernel may take for one case.
        stream: where progress is told; standard error by default.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        layers = _layers(options, device)
        path = measured.table_path(machine_of(device))
        run = Run(
            layers,
            options.tokens or plan.usual_tokens(device, options.quick),
            device,
            kernels=options.kernel,
            seconds=QUICK_SECONDS if options.quick else SECONDS,
            again=options.again,
            path=path,
            python=python,
            stream=stream,
            case_seconds=case_seconds,
        )
        _check_named_file(run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_what_it_does(device, run), file=stream or sys.stderr)
    status = 0
    try:
        done = run.run()
    except KeyboardInterrupt:
        print("\nstopped: what is done is kept, and the same command goes on", file=sys.stderr)
        status, done = 130, 1
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        status, done = 1, 1
    print(_summary(run, done))
    if run.keeper.obstacle is not None:
        print(f"error: the table could not be kept: {run.keeper.obstacle}", file=sys.stderr)
        status = status or 1
    if options.export is not None:
        try:
            with new_file(options.export) as temporary:
                temporary.write_text(report.export(run.table), encoding="utf-8")
        except OSError as error:
            print(f"error: --export {options.export}: {error.strerror}", file=sys.stderr)
            return status or 1
        print(*report.ledger(run.table), f"written to {options.export}", sep="\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.tune", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, and less time for each")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, metavar="CONFIG.json", help="the layers of a model of transformers")
    which.add_argument(
        "--layer", nargs=2, type=_size, action="append", default=[], metavar=("K", "N"), help="one layer: its widths"
    )
    parser.add_argument("--tokens", nargs="+", type=_size, metavar="M", help="in a call: batch times sequence length")
    parser.add_argument("--rank", nargs="+", type=_size, default=[], metavar="R", help="of the adapters; default: 16")
    parser.add_argument("--dtype", nargs="+", default=[], metavar="NAME", help=f"of the base: {', '.join(plan.DTYPES)}")
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="only these, or what begins so")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write what the project can use of it, to be sent")
    parser.add_argument("--again", action="store_true", help="do everything once more")
    return parser


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _layers(options: argparse.Namespace, device: torch.device) -> list[Layer]:
    if unknown := [name for name in options.dtype if name not in plan.DTYPES]:
        raise ValueError(f"unknown --dtype {', '.join(unknown)}: expected {', '.join(plan.DTYPES)}")
    shapes: list[tuple[int, int]] = [(k, n) for k, n in options.layer]
    if options.model is not None:
        found = of_config(options.model, 1, torch.bfloat16, torch.bfloat16)
        shapes = list(dict.fromkeys((layer.k, layer.n) for layer in found))
    return plan.usual_layers(device, options.quick, options.rank, options.dtype, shapes)


def _check_named_file(run: Run) -> None:
    """Raises ValueError where a file that the user has named would be put aside."""
    if run.keeper.unusable is not None and os.environ.get("FASTLORA_TABLE"):
        raise ValueError(
            f"FASTLORA_TABLE={run.keeper.path} cannot be gone on with ({run.keeper.unusable}): name another file"
        )


def _what_it_does(device: torch.device, run: Run) -> str:
    machine = run.table.machine
    lines = [f"{machine.device} ({machine.capability}), torch {machine.torch}, kernels {machine.kernels}"]
    if device.type == "cpu":
        lines.append(
            "no GPU here: the forms of the vendor's products are timed; kernels are proven where they can run without "
            "one (TRITON_INTERPRET=1)"
        )
    if run.keeper.unusable is not None:
        lines.append(f"{run.keeper.path} is put aside: {run.keeper.unusable}")
    return "\n".join(lines)


def _summary(run: Run, done: int) -> str:
    lines = [report.table(run.table, run.refusals), report.winners(run.table)]
    times = [proof.time for proof in run.table.proofs] + [bucket.time for bucket in run.table.buckets]
    if not done:
        lines.append(f"up to date: measured on {max(times)[:10]}" if times else "nothing to choose among here")
    if run.keeper.aside is not None:
        lines.append(f"the older file is {run.keeper.aside}")
    if run.keeper.obstacle is None:
        lines.append(f"kept in {run.keeper.path}")
    return "\n".join(line for line in lines if line)


if __name__ == "__main__":
    sys.exit(main())
