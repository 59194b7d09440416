"""The host's time of each verb on Triton's kernels and csrc, with a driver that launches nothing: µs, least and median.

    python -m tests.stub_gpu.cost        builds the stubs and prints a table

Everything that the host does for a launch is real: the plan, memory, the binder, Triton's launcher, csrc's host code.
What is missing is the driver's own few microseconds a launch, and the vendor's GEMM of ``triton-skinny`` is left out.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.stub_gpu import build, stand_in

ROUNDS = 400


def _microseconds(call: Callable[[], Any]) -> str:
    import torch

    # Without the stand-in's answers for tensors, each of which costs more than a tensor's own.
    with torch._C.DisableTorchFunction():
        return _timed(call)


def _timed(call: Callable[[], Any]) -> str:
    for _ in range(20):
        call()
    samples = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    return f"{min(samples):>8.1f}{statistics.median(samples):>9.1f}"


def _measure(family: str) -> None:
    stand_in.enter()
    import torch

    if family == "cuda":
        os.environ["FASTLORA_CUDA_LIBRARY"] = str(build.LIBRARY)
        torch.Tensor.get_device = lambda tensor: 0  # type: ignore[method-assign]

    from fastlora.backends import dispatch, triton_skinny
    from fastlora.backends.dropout import Dropout, draw_seed
    from fastlora.backends.request import Product

    m, k, n, r = 256, 512, 768, 16
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    x, dy, t = torch.empty(m, k, **bf16), torch.empty(m, n, **bf16), torch.empty(m, r, **bf16)
    w, a, b = torch.empty(n, k, **bf16), torch.empty(r, k, **bf16), torch.empty(n, r, **bf16)

    def line(kernel: str, what: str, call: Callable[[], Any]) -> None:
        print(f"{kernel:<16}{what + masked:<28}{_microseconds(call)}", flush=True)

    for p in (0.0, 0.1):
        masked = f", dropout {p}" if p else ""
        dropout = Dropout(p, draw_seed(stand_in.DEVICE)) if p else None
        product = Product(x, w, a, b, 1.7, None, p, None if dropout is None else dropout.seed)
        for kernel in dispatch.KERNELS["lora_matmul"]:
            if kernel.name == "triton-skinny" and family == "triton":
                z = triton_skinny.launch(product)[1]
                line(kernel.name, "forward", partial(triton_skinny.launch, product))
                line(kernel.name, "backward", partial(triton_skinny.launch_gradients, product, dy, z))
            elif kernel.name.partition("-")[0] == family:
                line(kernel.name, "lora_matmul", partial(kernel.run, product))
        for kernel in dispatch.KERNELS["rank_grad"]:
            if kernel.name == family:
                line(kernel.name, "rank_grad", partial(kernel.run, t, x, dtype=torch.bfloat16, dropout=dropout))


def main() -> int:
    """Prints the table, or one family's part of it in the process whose driver is a stub."""
    if len(sys.argv) > 1:
        _measure(sys.argv[1])
        return 0
    build.driver()
    build.library()
    print(f"{'kernel':<16}{'verb':<28}{'least':>8}{'median':>9}")
    for family in ("triton", "cuda"):
        print(build.finish(build.start("tests.stub_gpu.cost", family, STUB_GPU_CAPABILITY="90")), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
