"""The process that runs kernels nobody has proven: one that hangs, crashes or loses the GPU costs no more than itself.

``python -m fastlora.tune.worker DEVICE`` reads jobs from stdin and writes answers to stdout, a line of JSON for each;
:class:`Worker` is the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NoReturn

import torch

from ..backends import dispatch
from . import work
from .plan import Case, Size

Answer = dict[str, Any]

# Until the process answers at all: imports, and the GPU's context.
_START_SECONDS = 300.0


class DiedError(Exception):
    """The worker is gone, or was ended since it did not answer; the message says which."""


class StartError(RuntimeError):
    """No worker can be started: no fault of a kernel; the message has its last words."""


class Worker:
    """A worker process, started with the first job and again after its end.

    Args:
        device: where its kernels run.
        python: the command that runs Python.

    Attributes:
        begun: what the present or last job was at when it last said so; empty before it has.
    """

    def __init__(self, device: torch.device, python: Sequence[str] = (sys.executable,)) -> None:
        self._command = [*python, "-m", __name__, str(device)]
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: IO[str] | None = None
        self.begun = ""

    def ask(self, job: Mapping[str, Any], seconds: float) -> Answer:
        """The answer to a job; where it raised ``error`` is among it, and ``no_memory`` where that was the reason.

        Args:
            job: the keyword arguments of a job, and its name as ``do``.
            seconds: how long it may take, and each part of it that says that it begins.

        Raises:
            DiedError: there was none.
            StartError: there is nobody to answer.
        """
        self.begun = ""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        while "begins" in (answer := self._next(seconds)):
            self.begun = answer["begins"]
        if "error" in answer:
            # It may have lost its GPU with that.
            self.close()
        return answer

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        assert self._errors is not None
        self._errors.close()
        self._process = None

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see close
        # A session of its own: Ctrl-C is the parent's to handle.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._answers = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        try:
            self._next(_START_SECONDS)
        except DiedError as died:
            raise StartError(f"the process that tries kernels does not start: it {died}") from None

    def _next(self, seconds: float) -> Answer:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise DiedError(f"gave no answer within {seconds:.0f} s") from None
        if line is not None:
            answer: Answer = json.loads(line)
            return answer
        assert self._process is not None
        status = self._process.wait()
        last = self._last_words()
        self.close()
        ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        raise DiedError(f"ended its process with {ended}{f' ({last})' if last else ''}")

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""


def _read(stream: IO[str], answers: queue.SimpleQueue[str | None]) -> None:
    with stream:
        for line in stream:
            answers.put(line)
    answers.put(None)


def main() -> NoReturn:
    """Does jobs until there are no more."""
    # What libraries print is no answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    device = torch.device(sys.argv[1])

    def say(answer: Answer) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    if device.type == "cuda":
        # The GPU's context is made here: where there is no room for it, no kernel is to blame.
        torch.zeros(1, device=device)
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    say({"begins": "the worker"})
    while True:
        job = json.loads(jobs.get())
        try:
            answer = _JOBS[job.pop("do")](device, say, **job)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
            if isinstance(error, torch.OutOfMemoryError):
                answer["no_memory"] = True
        say(answer)


def _read_jobs(jobs: queue.SimpleQueue[str]) -> None:
    """Ends the process with stdin, whatever a kernel does: the command may have been killed while one hangs."""
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


def _check(device: torch.device, say: Callable[[Answer], None], verb: str, kernel: str, case: list[Any]) -> Answer:
    return work.check(verb, dispatch.named(verb)[kernel], Case(*case), device)._asdict()


def _measure(
    device: torch.device,
    say: Callable[[Answer], None],
    size: list[Any],
    names: list[str],
    rule: str,
    grads: dict[str, str],
    seconds: float,
) -> Answer:
    return work.measure(Size(*size), names, rule, grads, device, seconds, lambda name: say({"begins": name}))._asdict()


_JOBS: dict[str, Callable[..., Answer]] = {"check": _check, "measure": _measure}

if __name__ == "__main__":
    main()
