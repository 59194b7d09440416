"""What was launched, once for all tests of this folder, and in a line at the end of the run."""

from __future__ import annotations

import pytest

from tests.stub_gpu import launch
from tests.stub_gpu.launch import Outcome

FOUND = pytest.StashKey[list[Outcome]]()


@pytest.fixture(scope="session")
def found(pytestconfig: pytest.Config) -> list[Outcome]:
    """What became of every call."""
    pytestconfig.stash[FOUND], _ = launch.launch_everywhere()
    return pytestconfig.stash[FOUND]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if found := config.stash.get(FOUND, None):
        terminalreporter.write_line(f"launched without a GPU: {launch.table(found).splitlines()[-1]}")
