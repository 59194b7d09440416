"""Memory: what one step allocates at its peak, and what the forward keeps for the backward."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .clocks import prepare
from .operands import Operands
from .providers import Built


def peak_bytes(built: Built, operands: Operands) -> int:
    """The most that one step holds at a time beyond inputs and parameters: y, gradients and temporaries.

    On CUDA from the caching allocator. On a CPU from the profiler's record of every allocation of torch's allocator,
    those inside operators included; scratch that a vendor library takes from the system directly is not seen.
    """
    step = prepare("step", built, operands, 0)
    if operands.w.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return peak


def kept_bytes(built: Built, operands: Operands) -> int:
    """Bytes that the forward keeps for the backward beyond x, w, bias and the adapters, each storage once.

    Counts what autograd is given to save; tensors hidden elsewhere (attributes of a graph node) would be missed.
    """
    x = operands.xs[0]
    known = [x, operands.w, *built.trained.values(), *([] if operands.bias is None else [operands.bias])]
    free = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = built.layer(x)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    del y
    return sum(size for pointer, size in storages.items() if pointer not in free)
