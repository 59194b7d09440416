"""A stage's process: run under a limit and watched by the log of its tests, its failures told as they come."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import outcomes
from .outcomes import Outcome

ROOT = Path(__file__).resolve().parents[2]

# Seconds between two looks at a process.
LOOK = 0.1


def run(
    command: Sequence[str],
    output: Path,
    end: float,
    variables: Mapping[str, str] | None = None,
    log: Path | None = None,
    stall: float | None = None,
) -> int | None:
    """The exit status of a process; None where it was ended, at ``end`` or for ``stall`` seconds of silence.

    Args:
        command: what to run, from the repository's root.
        output: the file that what it prints is added to.
        end: by ``time.monotonic``.
        variables: added to its environment.
        log: the file in which its tests say how they end; the failures in it are printed.
        stall: seconds without a new line of the log, counted from its first.
    """
    if shutil.which(command[0]) is None:
        output.write_text(f"there is no {command[0]} here\n", encoding="utf-8")
        return 127
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(variables or {})
    told = len(outcomes.read(log)) if log else 0
    with output.open("a", encoding="utf-8") as printed:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            # From the first word on: imports and collection are no test.
            heard: float | None = None
            while (rc := process.poll()) is None:
                now = time.monotonic()
                if log is not None and (lines := _tell(log, told)) > told:
                    told, heard = lines, now
                if now > end or (stall is not None and heard is not None and now > heard + stall):
                    return None
                time.sleep(LOOK)
            if log is not None:
                _tell(log, told)
            return rc
        finally:
            # Also what a process that is over has left running.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def note(log: Path, lines: Sequence[Outcome]) -> None:
    """Adds to the log what tests cannot say themselves, and prints the failures among it."""
    told = len(outcomes.read(log))
    with log.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line._asdict()) + "\n" for line in lines)
    _tell(log, told)


def _tell(log: Path, told: int) -> int:
    """Prints the failures among the lines that are new; returns how many lines there are."""
    lines = outcomes.read(log)
    for outcome in lines[told:]:
        if outcome.is_failure:
            print(f"  {outcome}"[:240], flush=True)
    return len(lines)


def kernel_functions() -> list[str]:
    """The names of the kernels as a GPU's tools see them, from the sources."""
    triton = (re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M) for path in ROOT.glob("kernels/*.py"))
    cuda = (re.findall(r"__global__[^;{]*?\b(\w+)\(const", path.read_text()) for path in ROOT.glob("csrc/*.cu*"))
    return sorted({name for names in (*triton, *cuda) for name in names})


def sanitizer() -> list[str]:
    """The sanitizer on our own kernels; on all of torch's it takes hours."""
    names = [word for name in kernel_functions() for word in ("--kernel-name", f"kns={name}")]
    return ["compute-sanitizer", "--tool", "memcheck", *names, "--error-exitcode", "9"]
