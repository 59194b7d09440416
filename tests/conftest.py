"""What every test starts from: Triton's interpreter where there is no GPU, one seed, and no forced backend."""

import os

import pytest
import torch

# Triton reads this when it is first imported, so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastlora.backends import dispatch

# The tensors are small: waking a second thread costs more than it computes.
torch.set_num_threads(1)

collect_ignore = []
try:
    from hypothesis import settings
except ImportError:
    collect_ignore += ["ops/test_eager.py", "ops/test_properties.py"]
else:
    settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=60)
    settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def same_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    dispatch.forget()
    torch.manual_seed(0)
    # Tests are small for time's sake: what they look at is the verbs, but where they ask for small calls.
    if request.node.get_closest_marker("small_calls") is None:
        monkeypatch.setattr(dispatch, "small_of", lambda x: None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
