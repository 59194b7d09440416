"""A run: proves kernels, times those that passed, and keeps each result as it comes."""

from __future__ import annotations

import datetime
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TextIO

import torch

from ..backends import dispatch, first_use
from ..backends.machine import machine_of
from ..backends.measured import Bucket, Proof, Table
from ..backends.request import Kernel
from . import plan, work
from .keep import Keeper
from .layers import Layer
from .plan import Case, Size
from .verdict import winner
from .worker import DiedError, Worker

# A case, its compilation among it, and a kernel's part of a size.
CASE_SECONDS = 120.0

# Of timing, at one size.
SECONDS, QUICK_SECONDS = 1.0, 0.5


class Run:
    """One run on one device.

    Args:
        layers: whose products are timed.
        tokens: in a call, several numbers.
        device: where.
        kernels: names of those that are proven and timed beside the library, or how they begin; empty for all.
        seconds: of timing at one size.
        again: whether what is kept already is done once more.
        path: the file that is read and written.
        python: the command that runs Python.
        stream: where progress is told.
        case_seconds: how long a kernel may take for a case, and for its part of a size.

    Raises:
        ValueError: a kernel's name is unknown.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        tokens: Sequence[int],
        device: torch.device,
        *,
        kernels: Sequence[str] = (),
        seconds: float = SECONDS,
        again: bool = False,
        path: Path,
        python: Sequence[str] = (sys.executable,),
        stream: TextIO | None = None,
        case_seconds: float = CASE_SECONDS,
    ) -> None:
        self.device = device
        self.keeper = Keeper(path, machine_of(device))
        self.refusals: dict[tuple[str, str], str] = {}
        self._kernels = list(plan.kernels(kernels))
        self._layers, self._tokens = layers, tokens
        self._seconds, self._again = seconds, again
        self._python, self._stream = python, stream or sys.stderr
        self._case_seconds = case_seconds
        self._withdrawn = False
        self._began = time.monotonic()

    @property
    def table(self) -> Table:
        """What is known so far."""
        return self.keeper.table

    def run(self) -> int:
        """Does what has not been done; returns how much that was."""
        done = self._prove_all() + self._time_all(self._again)
        while self._withdrawn:
            # What failed at one size may have been the fastest at another that was timed before.
            self._withdrawn = False
            done += self._time_all(again=False)
        return done

    def _time_all(self, again: bool) -> int:
        """Times what is proven at each size that needs it; returns the number of sizes."""
        sizes = plan.sizes(self._layers, self._tokens)
        left = [(size, names) for size in sizes if (names := self._contenders(size, again))]
        self._began = time.monotonic()
        with closing(Worker(self.device, self._python)) as worker:
            for i, (size, names) in enumerate(left):
                self._say(f"timing {size}: {len(names)} ways", i, len(left))
                self._measure(worker, size, names)
        return len(left)

    def _prove_all(self) -> int:
        """Proves each kernel in a process of its own; returns the number of proofs."""
        proofs = list(self._unproven())
        total, done = sum(len(cases) for *_, cases in proofs), 0
        for (verb, kernel), of_kernel in itertools.groupby(proofs, lambda proof: proof[:2]):
            with closing(Worker(self.device, self._python)) as worker:
                for *_, dtype, cases in of_kernel:
                    self._say(f"proving {kernel.name} ({verb}, {dtype}): {len(cases)} cases", done, total)
                    if proof := self._prove(worker, verb, kernel, dtype, cases):
                        self.keeper.add(proof)
                    done += len(cases)
        return len(proofs)

    def _unproven(self) -> Iterable[tuple[str, Kernel, str, list[Case]]]:
        """The kernels that can run here and have not been proven, in each dtype."""
        ranks = {layer.r for layer in self._layers}
        for verb, kernel in self._kernels:
            for name in plan.DTYPES.values():
                dtype = str(name).removeprefix("torch.")
                cases = plan.cases(dtype, ranks, large=self.device.type == "cuda")
                able = [case for case in cases if (reason := self._refusal(verb, kernel, case)) is None]
                if not able:
                    self.refusals.setdefault((verb, kernel.name), reason or "")
                    continue
                kept = self.table.proof(verb, kernel.name, dtype)
                if self._again or kept is None or (kept.passed and kept.checks < len(able)):
                    yield verb, kernel, dtype, able

    def _refusal(self, verb: str, kernel: Kernel, case: Case) -> str | None:
        """Why a kernel cannot run any direction of a case; what depends on addresses is found out in the worker."""
        reasons = (kernel.refuses(size.request(self.device)) for size in case.sizes if size.verb == verb)
        return next(filter(None, reasons), None)

    def _prove(self, worker: Worker, verb: str, kernel: Kernel, dtype: str, cases: Sequence[Case]) -> Proof | None:
        """Runs the cases until one of them fails; what is refused there is no check.

        None where the GPU's memory is full.
        """
        why, passed = "", 0
        for case in cases:
            try:
                answer = worker.ask(
                    {"do": "check", "verb": verb, "kernel": kernel.name, "case": case}, self._case_seconds
                )
            except DiedError as died:
                answer = {"error": str(died)}
            if answer.get("no_memory"):
                print(f"  {kernel.name} is not proven: {case}: {answer['error']}", file=self._stream, flush=True)
                return None
            if why := answer.get("error") or (answer["why"] if answer["outcome"] == "failed" else ""):
                why = f"{case}: {why}"
                print(f"  {kernel.name} failed: {why}", file=self._stream, flush=True)
                break
            passed += answer["outcome"] == "passed"
        if not (why or passed):
            why = f"every case was refused: {answer['why']}"
        return Proof(verb, kernel.name, dtype, passed, not why, why, _now())

    def _contenders(self, size: Size, again: bool) -> list[str]:
        """What is timed at a size, the rule's kernel among it; empty where there is nothing to choose, or to do."""
        request = size.request(self.device)
        library = dispatch.named(size.verb)["library"]
        if self.device.type == "cpu":
            names = [form.name for form in library.ways("gradients" if size.direction == "backward" else "run")]
        else:
            names = ["library"]
            chosen = {kernel.name for verb, kernel in self._kernels if verb == size.verb}
            for kernel in dispatch.KERNELS[size.verb]:
                proof = self.table.proof(size.verb, kernel.name, size.dtype)
                if kernel.name in chosen and proof and proof.passed and kernel.refuses(request) is None:
                    names.append(kernel.name)
        kept = self._bucket(size)
        if kept is not None:
            chosen_from = kept.rule, kept.best or kept.rule
            if not again and set(names) <= set(kept.times) and all(self._may_run(size, name) for name in chosen_from):
                return []
            # What was timed before is timed once more beside the others: times of two runs are not compared.
            names += [name for name in kept.times if name in dispatch.named(size.verb) and self._may_run(size, name)]
            names = list(dict.fromkeys(names))
        return names if len(names) > 1 else []

    def _bucket(self, size: Size) -> Bucket | None:
        key = (size.verb, size.direction, size.dtype, size.adapter_dtype, size.dropout)
        mine = (
            b for b in self.table.buckets if b.kind == key and (b.m, b.k, b.n, b.r) == (size.m, size.k, size.n, size.r)
        )
        return next(mine, None)

    def _rule(self, size: Size) -> str:
        """The kernel that runs without a table: the skinny ones where they have passed here."""
        name = first_use.KERNELS[size.verb]
        proof = self.table.proof(size.verb, name, size.dtype)
        able = dispatch.named(size.verb)[name].refuses(size.request(self.device)) is None
        return name if self.device.type == "cuda" and able and proof is not None and proof.passed else "library"

    def _measure(self, worker: Worker, size: Size, names: list[str]) -> None:
        """Times kernels at a size, and once more without one that hung or crashed there: that one has failed."""
        while len(names) > 1:
            rule = self._rule(size)
            names = [name for name in names if self._may_run(size, name)]
            job = {
                "do": "measure",
                "size": size,
                "names": names,
                "rule": rule,
                "grads": {name: self._fastest_grad(grad) for name, grad in size.grads.items()},
                "seconds": self._seconds,
            }
            try:
                answer = worker.ask(job, self._case_seconds)
            except DiedError as died:
                answer = {"error": str(died)}
            if "error" in answer:
                if worker.begun in ("", "library") or answer.get("no_memory"):
                    # Such as no memory for the inputs: no kernel's fault.
                    print(f"  not timed: {answer['error']}", file=self._stream, flush=True)
                    return
                self._fail(size, worker.begun, answer["error"])
                names = [name for name in names if name != worker.begun]
                continue
            for name, why in answer["wrong"].items():
                self._fail(size, name, why)
            if rule in answer["wrong"]:
                # There is another rule now.
                names = [name for name in names if name not in answer["wrong"]]
                continue
            samples = answer["samples"]
            if rule in samples and len(samples) > 1 and answer["again"]:
                best, ahead = winner(samples, rule, answer["again"])
                times = {name: [round(ms, 6) for ms in work.spread(taken)] for name, taken in samples.items()}
                self.keeper.add(Bucket(**size._asdict(), times=times, rule=rule, best=best, ahead=ahead, time=_now()))
            return

    def _may_run(self, size: Size, name: str) -> bool:
        kernel = name.partition(":")[0]
        proof = self.table.proof(size.verb, kernel, size.dtype)
        return kernel == "library" or (proof is not None and proof.passed)

    def _fail(self, size: Size, name: str, why: str) -> None:
        """Notes that a kernel did not do at a size what it had done in its cases."""
        kernel = name.partition(":")[0]
        print(f"  {name} failed: {size}: {why}", file=self._stream, flush=True)
        proof = self.table.proof(size.verb, kernel, size.dtype)
        if proof is not None:
            self._withdrawn |= proof.passed
            self.keeper.add(proof._replace(passed=False, why=f"{size}: {why}", time=_now()))

    def _fastest_grad(self, grad: Size) -> str:
        """The kernel of rank_grad that a backward leaves da or db to."""
        bucket = self._bucket(grad)
        best = None if bucket is None else bucket.best
        return best if best is not None and self._may_run(grad, best) else self._rule(grad)

    def _say(self, what: str, done: int, total: int) -> None:
        elapsed = time.monotonic() - self._began
        left = f", about {_minutes(elapsed * (total - done) / done)} left" if done else ""
        print(f"[{done + 1} of {total}{left}] {what}", file=self._stream, flush=True)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
