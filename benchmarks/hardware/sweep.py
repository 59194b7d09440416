"""``python -m benchmarks.hardware.sweep``: every kernel's forward by K, beside the vendor's GEMM alone.

Between two K the time that is added is the main loop's: its rate is the GEMM core's, and what is left the rest's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.accuracy import compare
from fastlora.backends import dispatch, reference
from fastlora.backends.request import Kernel, Product, Request
from fastlora.clock import Clock

from ..cases import SCALE
from .ceilings import normal, time_on_device

VENDOR = "vendor"


def main() -> int:
    """Prints and writes one line for each K and kernel; status 1 where a kernel was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, default=8192)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--k", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--kernels", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--json", type=Path, required=True, metavar="PATH")
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock(device)
    kernels = [kernel for kernel in dispatch.KERNELS["lora_matmul"] if kernel.name in args.kernels]
    lines: list[dict[str, Any]] = []
    for k in args.k:
        x, w = normal(device, args.m, k), normal(device, args.n, k, std=k**-0.5)
        a, b = normal(device, args.r, k, std=k**-0.5), normal(device, args.n, args.r, std=args.r**-0.5)
        product = Product(x, w, a, b, SCALE)
        vendor = time_on_device(clock, lambda x=x, w=w: torch.nn.functional.linear(x, w))  # type: ignore[misc]
        of_k: list[dict[str, Any]] = [{"k": k, "kernel": VENDOR, "status": "ok", "ms": vendor._asdict(), "ratio": 1.0}]
        for kernel in kernels:
            of_k.append({"k": k, "kernel": kernel.name, **_measured(kernel, product, clock, vendor.p50)})
        lines += of_k
        for line in of_k:
            print(_in_words(line, lines, args.m, args.n), flush=True)
        args.json.write_text(json.dumps({"m": args.m, "n": args.n, "r": args.r, "lines": lines}))
    return 1 if any(line["status"] in ("wrong", "error") for line in lines) else 0


def _measured(kernel: Kernel, p: Product, clock: Clock, vendor_ms: float) -> dict[str, Any]:
    """One kernel at one K: checked first, and without a time where it is wrong."""
    if refusal := kernel.refuses(Request.of_lora_matmul(p)):
        return {"status": "absent", "why": refusal}
    try:
        y = kernel.run(p)[0]
        oracle, baseline = reference.lora_matmul(p.map(Tensor.double))[0], reference.lora_matmul(p)[0]
        assert oracle is not None
        assert baseline is not None
        errors = compare(y, oracle=oracle, baseline=baseline)
        if not errors.ok:
            return {"status": "wrong", "why": f"y: {errors}"}
        del y, oracle, baseline
        ms = time_on_device(clock, lambda: kernel.run(p))
    except Exception as error:
        torch.cuda.synchronize()
        return {"status": "error", "why": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"status": "ok", "ms": ms._asdict(), "ratio": ms.p50 / vendor_ms}


def loop_rate(lines: Sequence[dict[str, Any]], kernel: str, k: int, m: int, n: int) -> float | None:
    """FLOP/s of what this K adds to the K before it; None for the first, and where it adds nothing."""
    times = {line["k"]: line["ms"]["p50"] for line in lines if line["kernel"] == kernel and line["status"] == "ok"}
    before = max((other for other in times if other < k), default=None)
    if before is None or k not in times or times[k] <= times[before]:
        return None
    return float(2e3 * m * n * (k - before) / (times[k] - times[before]))


def _in_words(line: dict[str, Any], lines: Sequence[dict[str, Any]], m: int, n: int) -> str:
    start = f"K={line['k']:<6} {line['kernel']:<16} "
    if line["status"] != "ok":
        return f"{start}{line['status']}: {line['why']}"
    rate = loop_rate(lines, line["kernel"], line["k"], m, n)
    loop = "" if rate is None else f"  loop {1e-12 * rate:.0f} TFLOP/s"
    return f"{start}{1e3 * line['ms']['p50']:8.0f} us  {line['ratio']:.3f} of the vendor's{loop}"


if __name__ == "__main__":
    sys.exit(main())
