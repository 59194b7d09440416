"""Runs stages: processes of their own with limits, what they said kept and packed after each, a table last."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import outcomes, processes
from .outcomes import Outcome
from .stages import EASY, STAGES, TIMED, Context, Sizes, Stage

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = "results.tgz"

# Seconds under which no stage is started.
_LEAST = 3.0
# Pytest's own: all passed, some failed, nothing left to run.
_PYTEST_ENDS = (0, 1, 5)
# What tests/conftest.py ends a process with that has lost the GPU.
_LOST_STATUS = 70
_TEST_SECONDS = 60
_LAST_LINES = 16
_LOST = re.compile(r"the GPU is lost")
_NO_GPU = 2


class Ended(NamedTuple):
    """A stage that is over: how, after how many seconds, and its last line."""

    stage: str
    result: str
    seconds: float
    last: str

    @property
    def is_good(self) -> bool:
        """True where its process returned 0."""
        return self.result == "ok"


class Run:
    """One run: the stages picked, the seconds left, and the folder ``work`` that is packed into ``out``.

    Args:
        out: where ``results.tgz`` goes; one that is there already is gone on with.
        work: an empty folder.
        seconds: of wall time in all.
        kernels: the kernels that tests and times are of.
        sizes: how large what is timed is.
        python: the command that runs Python.
        parallel: whether tests run in several processes; None where xdist and pytest-timeout are there for it.
        commit: of the tree; what another one left in ``results.tgz`` is put aside.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        seconds: float,
        kernels: Sequence[str],
        sizes: Sizes | None = None,
        python: Sequence[str] = (sys.executable,),
        parallel: bool | None = None,
        commit: str | None = None,
    ) -> None:
        self.out, self.work, self.kernels, self.python = out, work, tuple(kernels), list(python)
        self.sizes = sizes or Sizes()
        self._start = time.monotonic()
        self._end = self._start + seconds
        self.table: list[Ended] = []
        self._easy_only = False
        if parallel is None:
            parallel = all(importlib.util.find_spec(name) is not None for name in ("xdist", "pytest_timeout"))
        self.parallel = parallel
        out.mkdir(parents=True, exist_ok=True)
        if (out / ARCHIVE).exists():
            unpack(out / ARCHIVE, work)
            self._keep_only_of(commit)

    def _keep_only_of(self, commit: str | None) -> None:
        """Puts an archive of another commit aside, so that nothing of it is taken for this one's."""
        facts = self.work / "facts.json"
        before = (
            json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {"commit": "unknown", "dirty": False}
        )
        named = f"{before['commit']}{'-dirty' if before['dirty'] else ''}"
        if named != commit:
            (self.out / ARCHIVE).replace(self.out / f"results-{named}.tgz")
            for path in self.work.iterdir():
                path.unlink()

    def run(self, stages: Sequence[Stage]) -> int:
        """Runs these stages; returns the exit status: 1 where one was not good, 2 where there is no GPU."""
        status = 1
        try:
            if (no_gpu := self._stages(stages)) is not None:
                status = no_gpu
            else:
                status = 0 if all(ended.is_good for ended in self.table) else 1
        except KeyboardInterrupt:
            print("\nstopped: what follows is what was done until then", flush=True)
            status = 130
        finally:
            self._close()
        return status

    def _stages(self, stages: Sequence[Stage]) -> int | None:
        for i, stage in enumerate(stages):
            later = sum(other.seconds for other in stages[i + 1 :])
            limit = self._limit(stage, later)
            if limit < min(_LEAST, stage.seconds):
                self.table.append(Ended(stage.name, "no time", 0.0, ""))
                continue
            gpu = self._gpu()
            self._forget(stage.name)
            began = time.monotonic()
            self._say(f"{stage.name}: {stage.about} (at most {limit:.0f} s)")
            result = self._tests(stage, limit) if stage.is_tests else self._module(stage, limit)
            last = next((line for line in reversed(self._log(stage.name).splitlines()) if line.strip()), "")
            self.table.append(Ended(stage.name, result, time.monotonic() - began, last.strip()[:110]))
            self._say(f"{stage.name}: {result} after {self.table[-1].seconds:.0f} s: {last.strip()[:150]}")
            if stage.kind == "timing" and (result == "time out" or _LOST.search(self._log(stage.name))):
                self._easy_only = True
            if stage.name == "facts":
                if result == f"rc {_NO_GPU}":
                    return _NO_GPU
                if gpu not in (None, self._gpu()):
                    self._forget(*(other.name for other in STAGES if other.name != "facts"))
                    (self.work / "stages.json").unlink()
            self._pack()
        return None

    def _limit(self, stage: Stage, later: float) -> float:
        """The seconds of a stage: what those after it leave, or its share where that is more, within its own limit."""
        left = self._end - time.monotonic()
        share = left * stage.seconds / (stage.seconds + later)
        return min(stage.limit, max(share, left - later))

    def fit(self) -> list[str]:
        """The kernels that may be timed."""
        unfit = outcomes.unfit(self._outcomes())
        kernels = [name for name in self.kernels if name not in unfit]
        return [name for name in kernels if name in EASY] if self._easy_only else kernels

    def _outcomes(self) -> dict[str, Outcome]:
        return all_outcomes(self.work)

    def _context(self, stage: Stage) -> Context:
        return Context(self.work, self.sizes, self.fit() if stage.kind == "timing" else self.kernels)

    def _module(self, stage: Stage, limit: float) -> str:
        command = [*self.python, *stage.arguments(self._context(stage))]
        return _result(processes.run(command, self._log_path(stage.name), time.monotonic() + limit))

    def _tests(self, stage: Stage, limit: float) -> str:
        """Runs pytest until each test has run once: one that ends the process, or hangs, is noted and left behind."""
        end = time.monotonic() + limit
        log, done = self.work / f"{stage.name}.tests.jsonl", self.work / f"{stage.name}.done"
        options = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
        prefix: list[str] = []
        variables = {
            "FASTLORA_TEST_LOG": str(log),
            "FASTLORA_TEST_SKIP": str(done),
            "FASTLORA_TEST_KERNELS": " ".join(self.kernels),
        }
        parallel = self.parallel and stage.kind == "tests"
        if stage.kind == "memcheck":
            prefix = processes.sanitizer()
            # Under the caching allocator most accesses out of bounds land in a neighbour's memory, unseen.
            variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        elif parallel:
            options += ["-n", str(stage.workers), "--max-worker-restart", "99"]
            options += ["--timeout", str(_TEST_SECONDS), "--timeout-method", "thread"]
        command = [*prefix, *self.python, *options, *stage.arguments(self._context(stage))]
        while True:
            known = outcomes.by_test(outcomes.read(log))
            done.write_text("".join(f"{test}\n" for test in known), encoding="utf-8")
            stall = None if parallel else self.sizes.stall
            rc = processes.run(command, self._log_path(stage.name), end, variables, log, stall)
            after = outcomes.by_test(outcomes.read(log))
            running = [test for test, outcome in after.items() if outcome.outcome == outcomes.STARTED]
            on = running or (rc == _LOST_STATUS and len(after) > len(known))
            if rc in _PYTEST_ENDS or not on or time.monotonic() > end - processes.LOOK:
                break
            why = "hung" if rc is None else "crashed"
            lines = [Outcome(test, why, "" if rc is None else f"the process ended with {rc}") for test in running]
            processes.note(log, lines)
        failures = [outcome for outcome in after.values() if outcome.is_failure]
        if rc is None:
            return "time out"
        if rc == 5 and after:
            rc = 0
        return f"{len(failures)} failed" if failures else _result(rc)

    def _log_path(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def _log(self, name: str) -> str:
        path = self._log_path(name)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def _forget(self, *stages: str) -> None:
        """Removes what an earlier run of the stages left."""
        for name in stages:
            for suffix in ("log", "tests.jsonl", "done", "json", "jsonl"):
                (self.work / f"{name}.{suffix}").unlink(missing_ok=True)

    def _gpu(self) -> str | None:
        """The name of the GPU that the results are of."""
        path = self.work / "facts.json"
        return str(json.loads(path.read_text(encoding="utf-8"))["device_name"]) if path.exists() else None

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._start:4.0f} s] {line}", flush=True)

    def _pack(self) -> None:
        names = [ended.stage for ended in self.table]
        before = read_table(self.work)
        kept = [ended for ended in before if ended.stage not in names]
        _write(self.work / "stages.json", json.dumps([*kept, *self.table]))
        fresh = self.out / f"{ARCHIVE}.new"
        with tarfile.open(fresh, "w:gz") as archive:
            for path in sorted(self.work.iterdir()):
                archive.add(path, arcname=path.name)
        fresh.replace(self.out / ARCHIVE)

    def _close(self) -> None:
        """The last lines: what failed, what was left out, the ends of the measuring stages, the table."""
        self._pack()
        tests = self._outcomes()
        failures = [outcome for outcome in tests.values() if outcome.is_failure]
        for outcome in failures[:20]:
            print(f"  {outcome}"[:200])
        if len(failures) > 20:
            print(f"  and {len(failures) - 20} more")
        for kernel, reason in outcomes.unfit(tests).items():
            print(f"not timed: {kernel}, since {reason}"[:200])
        if self._easy_only:
            print(f"after a stage that hung or lost the GPU only {' and '.join(EASY)} were timed")
        ran = {ended.stage for ended in self.table}
        for name in ("ceilings", *TIMED):
            if name in ran:
                lines = [line for line in self._log(name).splitlines() if line.strip()]
                print(f"--- {name}", *(line[:125] for line in lines[-_LAST_LINES:]), sep="\n")
        print(f"\n{'stage':<16}{'result':<12}{'s':>5}  last line")
        for ended in self.table:
            print(f"{ended.stage:<16}{ended.result:<12}{ended.seconds:>5.0f}  {ended.last}")
        print(f"wrote {self.out / ARCHIVE}", flush=True)


def estimate(stages: Sequence[Stage], seconds: float) -> str:
    """One line before anything runs."""
    expected = sum(stage.seconds for stage in stages)
    return f"{len(stages)} stages, about {expected:.0f} s expected on one H100, ended after {seconds:.0f} s"


def pick(only: Sequence[str] | None, kernels: Sequence[str]) -> list[Stage]:
    """The stages of these names, without those that are about other kernels; the facts always come first."""
    named = [stage for stage in STAGES if not only or stage.name in only or stage.name == "facts"]
    return [stage for stage in named if not stage.of or set(stage.of) & set(kernels)]


def all_outcomes(work: Path) -> dict[str, Outcome]:
    """How every test of every stage ended, those under the sanitizer aside."""
    logs = [work / f"{stage.name}.tests.jsonl" for stage in STAGES if stage.kind == "tests"]
    return outcomes.by_test(outcome for log in logs for outcome in outcomes.read(log))


def read_table(work: Path) -> list[Ended]:
    """The stages that a folder holds the results of."""
    path = work / "stages.json"
    return [Ended(*line) for line in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def unpack(archive: Path, folder: Path) -> None:
    """What was packed, into a folder; nothing outside it is written."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")


def _result(rc: int | None) -> str:
    return "time out" if rc is None else "ok" if rc == 0 else f"rc {rc}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
