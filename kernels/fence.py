"""The fence between cp.async's data in shared memory and the tensor cores that read them, which Triton 3.6 leaves out.

cp.async writes shared memory through the generic proxy; wgmma and tcgen05.mma read it through the async proxy. Only
``fence.proxy.async`` orders the two (PTX ISA, memory consistency model, proxies). Triton writes it from 3.7 on.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import current_target

_LEFT_OUT = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))


@triton.constexpr_function
def _lacks_fence(first: int, last: int) -> bool:
    """Whether the code now made is for sm_``first`` to sm_``last``, and this Triton leaves the fence out of it."""
    if knobs.runtime.interpret or not _LEFT_OUT:
        return False
    target = current_target()
    return target is not None and target.backend == "cuda" and first <= target.arch <= last


@triton.constexpr_function
def copy_stages() -> int | None:
    """The ``num_stages`` of a loop over loaded tiles that ``fence_async_proxy`` guards: None is the launch's own.

    No fence of ours can go into a pipelined loop for tcgen05 (sm_100 to sm_119): there the loop goes without cp.async.
    """
    return 1 if _lacks_fence(100, 119) else None


@triton.jit
def fence_async_proxy(step):
    """What a thread sees in shared memory, its next product sees: stands just before a ``tl.dot`` of loaded tiles.

    ``step`` is the loop's counter, on which the fence hangs.
    """
    if _lacks_fence(90, 99):
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.u32 $0, $1;", "=r,r", [step], dtype=tl.int32, is_pure=False, pack=1
        )
