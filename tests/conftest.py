"""What every test starts from: Triton's interpreter where there is no GPU, one seed, and no forced backend.

``python -m benchmarks.hardware`` reads how each test ended from ``FASTLORA_TEST_LOG``, a line as it happens, and names
in the file ``FASTLORA_TEST_SKIP`` those that are not to run again.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton reads this when it is first imported, so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What somebody measured on this machine is no part of a test.
os.environ["FASTLORA_TABLE"] = "none"

from fastlora.backends import dispatch

# The tensors are small: waking a second thread costs more than it computes.
torch.set_num_threads(1)

collect_ignore = []
try:
    from hypothesis import settings
except ImportError:
    collect_ignore += ["ops/test_eager.py", "ops/test_group_properties.py", "ops/test_properties.py"]
else:
    settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
    settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def same_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    monkeypatch.setenv("FASTLORA_TABLE", "none")
    dispatch.forget()
    torch.manual_seed(0)
    # Tests are small for time's sake: what they look at is the verbs, but where they ask for small calls.
    if request.node.get_closest_marker("small_calls") is None:
        monkeypatch.setattr(dispatch, "small_of", lambda x: None)


# Whether this is one of several processes that run the tests: these report to the one that started them.
_is_worker = False


def pytest_configure(config: pytest.Config) -> None:
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if path := os.environ.get("FASTLORA_TEST_SKIP"):
        done = set(Path(path).read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Ends the process where a test has lost the GPU: every later one would fail without a fault of its own.

    Only where the command for a GPU reads how tests end: elsewhere tests pretend to have a GPU, and to lose it.
    """
    try:
        return (yield)
    finally:
        if "FASTLORA_TEST_LOG" in os.environ and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                why = f"the GPU is lost: {str(error).splitlines()[0]}"
                print(f"{item.nodeid}: {why}", file=sys.__stderr__, flush=True)
                _note(item.nodeid, "lost", why)
                os._exit(70)


def pytest_runtest_logstart(nodeid: str) -> None:
    if not _is_worker:
        _note(nodeid, "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _is_worker:
        return
    if report.when not in ("setup", "call", "teardown"):
        # What xdist makes of a worker that is gone.
        _note(report.nodeid, "crashed", "it ended its process, or ran too long")
    elif report.when == "call" or report.outcome != "passed":
        _note(report.nodeid, report.outcome, _why(report) if report.failed else "")


def _why(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    words = str(report.longrepr) if crash is None else crash.message
    return next((line for line in words.splitlines() if line.strip()), "")[:300]


def _note(test: str, outcome: str, why: str = "") -> None:
    if path := os.environ.get("FASTLORA_TEST_LOG"):
        # One write: workers append to it too.
        with open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps({"test": test, "outcome": outcome, "why": why}) + "\n")
