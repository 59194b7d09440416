"""Fixtures of the tests of the benchmarks."""

from __future__ import annotations

import pytest

from fastlora.backends import dispatch


@pytest.fixture(scope="module")
def no_interpreter():
    """A benchmark is what a user runs: no kernel under Triton's interpreter, which the other tests switch on.

    Not for tests that import kernels: Triton reads the variable then.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        dispatch.forget()
        yield
    dispatch.forget()
