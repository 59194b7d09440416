"""A stand-in for the interpreter that ``benchmarks.hardware`` starts: on a GPU that is not there, or by a script.

``STAND_IN_SCRIPT`` names a JSON file: for each stage of tests what becomes of each test, for others what becomes of the
process (``hang``, ``crash``, ``lost``). What a module would write is copied from the folder ``STAND_IN_CANNED``; where
``STAND_IN_REAL`` is set instead, modules run on the stand-in for ``torch.cuda``.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import time
from pathlib import Path


def main() -> int:
    """Runs the arguments as Python would."""
    arguments = sys.argv[1:]
    print("argv", *arguments, flush=True)
    script = json.loads(Path(os.environ["STAND_IN_SCRIPT"]).read_text())
    if arguments[:2] == ["-m", "pytest"]:
        return tests(script)
    if arguments[0] != "-m":
        return process(script.get("build"))
    written = Path(arguments[arguments.index("--json") + 1]) if "--json" in arguments else None
    if status := process(script.get(written.stem if written else "info")):
        return status
    if "STAND_IN_REAL" in os.environ:
        return on_the_stand_in(arguments[1:])
    if written:
        shutil.copy(Path(os.environ["STAND_IN_CANNED"]) / written.name, written)
    return 0


def process(fate: str | None) -> int:
    """What becomes of a process."""
    if fate == "hang":
        time.sleep(600)
    elif fate == "crash":
        os.abort()
    elif fate == "lost":
        print("the GPU is lost to this process after fastlora-cuda-z_jobs")
    return {None: 0, "lost": 1, "no_gpu": 2}[fate]


def tests(script: dict[str, dict[str, str]]) -> int:
    """Writes the log that tests/conftest.py would."""
    log = Path(os.environ["FASTLORA_TEST_LOG"])
    skipped = Path(os.environ["FASTLORA_TEST_SKIP"]).read_text().splitlines()
    mine = {test: fate for test, fate in script.get(log.name.partition(".")[0], {}).items() if test not in skipped}
    for test, fate in mine.items():
        note(log, test, "started")
        process(fate if fate in ("hang", "crash") else None)
        note(log, test, fate, "off by one" if fate == "failed" else "")
    return 5 if not mine else 1 if "failed" in mine.values() else 0


def note(log: Path, test: str, outcome: str, why: str = "") -> None:
    with log.open("a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "why": why}) + "\n")


def on_the_stand_in(arguments: list[str]) -> int:
    """A module as on a GPU, with kernels that launch into the stubs and results from the reference."""
    import torch

    from fastlora.clock import Clock
    from tests.stub_gpu import bench

    bench.prepare()
    # Not a quarter of a gigabyte before every sample.
    Clock._flush = torch.empty(1)  # type: ignore[assignment]
    sys.argv = [arguments[0], *arguments[1:]]
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
