"""Memory: the allocations of a call, at their peak and in the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class Allocation(NamedTuple):
    """Bytes beyond those before the call: ``peak`` the most at a time, ``live`` those still held at its end."""

    peak: int
    live: int


def stored_bytes(tensors: Iterable[Tensor | None]) -> int:
    """The bytes of all storages beneath, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def allocation(work: Callable[[], object], device: torch.device) -> Allocation:
    """Measures the allocations of a call; its result still counts as live.

    On CUDA from the caching allocator. On a CPU from the profiler's record of every allocation of torch's allocator,
    those inside operators included; scratch that a vendor library takes from the system directly is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        seen = Allocation(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
        del result
        return seen
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    del result
    return Allocation(peak, live)
