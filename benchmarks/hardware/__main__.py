"""``python -m benchmarks.hardware``: proves and times every kernel on this machine's GPU within ten minutes.

Stages run in processes of their own, the smallest kernels first: one that hangs or loses the GPU costs one test, or one
stage of the timing, and kernels that failed are not timed. What was learned is in DIR/results.tgz after every stage;
the last lines are a table. ``--ingest DIR`` files what came back: rows, ledger, README; ``--ingest FILE`` what
``python -m fastlora.tune --export FILE`` wrote: the package's table of that GPU, and its lines of the ledger.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..records import environment
from . import ingest
from .run import Run, estimate, pick
from .stages import GROUPS, KERNELS, NAMES, STAGES, Sizes

_COMMIT = re.compile(r"[0-9a-f]{7,40}(-dirty)?")


def main(
    argv: Sequence[str] | None = None,
    sizes: Sizes | None = None,
    python: Sequence[str] = (sys.executable,),
    parallel: bool | None = None,
) -> int:
    """Runs the command line; returns the exit status: 0 where every stage was good, 1 where one was not."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hardware", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results.tgz goes, or is gone on with")
    parser.add_argument("--seconds", type=float, default=570.0, metavar="S", help="of wall time in all (default: 570)")
    parser.add_argument(
        "--only", nargs="+", choices=(*NAMES, *GROUPS), metavar="STAGE", help=f"only {', '.join(NAMES)}"
    )
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="only these, by name or its beginning")
    parser.add_argument("--commit", metavar="SHA", help="what the tree is a copy of, where git cannot say")
    parser.add_argument("--list", action="store_true", help="list the stages with their seconds, and stop")
    parser.add_argument(
        "--ingest", type=Path, metavar="PATH", help="file the results in a folder, or a table, and stop"
    )
    args = parser.parse_args(argv)
    if args.list:
        for stage in STAGES:
            print(f"{stage.name:<16}{stage.seconds:>4.0f} s, at most {stage.limit:>3.0f}  {stage.about}")
        return 0
    if args.ingest is not None:
        try:
            print(ingest.ingest(args.ingest))
        except (OSError, ValueError) as error:
            print(f"--ingest {args.ingest}: {error}", file=sys.stderr)
            return 2
        return 0
    if args.out is None:
        parser.error("--out DIR is missing: where results.tgz is to go")
    kernels = _kernels(parser, args.kernels)
    commit = args.commit or environment.commit()
    if commit is None or _COMMIT.fullmatch(commit) is None:
        parser.error(f"--commit: expected the hash of a commit, got {commit}; git does not know this tree's here")
    if args.commit:
        os.environ["FASTLORA_COMMIT"] = args.commit
    only = [name for word in args.only or () for name in GROUPS.get(word, (word,))]
    stages = pick(only, kernels)
    print(estimate(stages, args.seconds), flush=True)
    work = Path(tempfile.mkdtemp(prefix="fastlora-hardware-"))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return Run(args.out, work, args.seconds, kernels, sizes, python, parallel, commit).run(stages)
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(work, ignore_errors=True)


def _kernels(parser: argparse.ArgumentParser, names: Sequence[str]) -> list[str]:
    """The kernels whose names these are, or begin with."""
    for name in names:
        if not any(kernel.startswith(name) for kernel in KERNELS):
            parser.error(f"--kernels {name}: expected {', '.join(KERNELS)}, or how their names begin")
    return [kernel for kernel in KERNELS if not names or any(kernel.startswith(name) for name in names)]


if __name__ == "__main__":
    sys.exit(main())
