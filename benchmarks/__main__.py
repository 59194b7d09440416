"""What LoRA costs, with fastlora and without. Options without a subcommand are those of ``layers``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .layers import command as layers
from .measure.runner import StopError
from .model import command as model
from .paper import command as paper
from .predict import command as predict
from .report import command as report
from .report import compare

# A subcommand is a module with HELP, add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "layers": layers,
    "model": model,
    "paper": paper,
    "predict": predict,
    "compare": compare,
    "report": report,
}
DEFAULT = "layers"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Raises SystemExit: 2 for unknown names, listing the known ones; 0 behind the help, which no arguments ask for, too.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        arguments = ["--help"]
    elif arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments.insert(0, DEFAULT)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except StopError as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        # Outside the cases, whose loop says more: while packages are imported or pictures drawn.
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing is left to be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
