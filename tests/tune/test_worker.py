"""The worker's two ends: answers, limits, and what a process that is gone leaves behind."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.tune import plan
from fastlora.tune.worker import DiedError, Worker

CPU = torch.device("cpu")
SPEAKER = str(Path(__file__).with_name("speaker.py"))


def steps(*words: str) -> dict[str, Any]:
    return {"steps": words}


def says(**answer: Any) -> str:
    return f"say {json.dumps(answer)}"


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(CPU, (sys.executable, SPEAKER))
    yield made
    made.close()


def pid(worker: Worker) -> int:
    assert worker._process is not None
    return worker._process.pid


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_answers_come_in_order_from_one_process(worker: Worker) -> None:
    assert worker.ask(steps(says(n=1)), 20) == {"n": 1}
    first = pid(worker)
    assert worker.ask(steps(says(n=2)), 20) == {"n": 2}
    assert pid(worker) == first
    worker.close()
    assert not is_running(first)
    worker.close()


def test_what_begins_is_noted_and_has_the_time_anew(worker: Worker) -> None:
    slow = [step for name in ("a", "b", "c", "d") for step in (says(begins=name), "sleep 0.4")]
    assert worker.ask(steps(*slow, says(n=1)), 1.0) == {"n": 1}
    assert worker.begun == "d"
    assert worker.ask(steps(says(n=2)), 20) == {"n": 2}
    assert worker.begun == ""


def test_one_that_hangs_is_ended(worker: Worker) -> None:
    worker.ask(steps(says(n=1)), 20)
    first = pid(worker)
    start = time.monotonic()
    with pytest.raises(DiedError, match=r"^gave no answer within 0 s$"):
        worker.ask(steps(says(begins="slow"), "sleep 600"), 0.3)
    assert time.monotonic() - start < 20
    assert worker.begun == "slow"
    assert not is_running(first)


def test_one_that_crashes_says_by_what_and_its_last_words(worker: Worker) -> None:
    with pytest.raises(DiedError, match=r"^ended its process with signal SIGSEGV \(something went wrong\)$"):
        worker.ask(steps("note first", "note something went wrong", "crash"), 20)


def test_one_that_exits(worker: Worker) -> None:
    with pytest.raises(DiedError, match=r"^ended its process with status 7$"):
        worker.ask(steps("exit 7"), 20)


def test_the_next_job_starts_another(worker: Worker) -> None:
    with pytest.raises(DiedError):
        worker.ask(steps("exit 7"), 20)
    assert worker.ask(steps(says(n=1)), 20) == {"n": 1}


def test_an_error_is_answered_and_its_process_used_no_more(worker: Worker) -> None:
    worker.ask(steps(says(n=1)), 20)
    first = pid(worker)
    assert worker.ask(steps(says(error="RuntimeError: lost")), 20) == {"error": "RuntimeError: lost"}
    assert not is_running(first)
    assert worker.ask(steps(says(n=2)), 20) == {"n": 2}


def test_the_real_one_checks_and_measures(tmp_path: Path) -> None:
    case = plan.Case(33, 40, 24, 5, "float32", "float32", True, True)
    size = plan.Size("lora_matmul", "forward", 33, 40, 24, 5, "float32", "float32", False)
    check = {"do": "check", "verb": "lora_matmul", "case": case}
    worker = Worker(CPU)
    try:
        assert worker.ask(check | {"kernel": "library"}, 120) == {"outcome": "passed", "why": ""}
        names = ["library", "library:last"]
        job = {"do": "measure", "size": size, "names": names, "rule": "library", "grads": {}, "seconds": 0.0}
        answer = worker.ask(job, 120)
        assert (set(answer["samples"]), answer["wrong"]) == (set(names), {})
        assert worker.begun == "library:last"
        assert worker.ask(check | {"kernel": "nobody"}, 120) == {"error": "KeyError: 'nobody'"}
    finally:
        worker.close()
