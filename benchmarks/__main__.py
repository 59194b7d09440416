"""``python -m benchmarks [SUBCOMMAND]``: one module a subcommand, ``layers`` where none is named."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import layers, report

# A subcommand is a module with HELP, add_arguments(parser) and run(args) -> exit status.
COMMANDS = {"layers": layers, "report": report}
DEFAULT = "layers"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status. Unknown names raise SystemExit(2), listing the known ones."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, DEFAULT)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
