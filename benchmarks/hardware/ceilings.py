"""``python -m benchmarks.hardware.ceilings``: the two rates that bound every kernel, of bytes and of products."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastlora.clock import Clock, Hold, Work

from ..cases import layer_named
from ..records.rows import Spread

ROUNDS, WARM_UP = 15, 3


def time_on_device(clock: Clock, work: Work) -> Spread:
    """Milliseconds of the GPU's own time, L2 flushed before each call."""
    hold = Hold()
    for _ in range(WARM_UP):
        clock.device(work, hold)
    samples: list[float] = []
    for _ in range(3 * ROUNDS):
        if (ms := clock.device(work, hold)) is not None:
            samples.append(ms)
        if len(samples) == ROUNDS:
            break
    if not samples:
        raise RuntimeError("no sample in time: the host queued every call too late")
    return Spread.of(samples)


def normal(device: torch.device, *shape: int, std: float = 1.0) -> Tensor:
    """Random bfloat16: products of zeros run faster than those of data."""
    return (torch.randn(shape, device=device) * std).to(torch.bfloat16)


def _copy(clock: Clock, size: int, device: torch.device) -> Spread:
    source = torch.randint(127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return time_on_device(clock, lambda: target.copy_(source))


def main() -> int:
    """Prints copy bandwidth, read and written, and the vendor's GEMM at each layer's shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1 << 32, help="of the tensor that is copied")
    parser.add_argument("--tokens", type=int, default=8192, metavar="M")
    parser.add_argument("--layer", nargs="+", default=["llama3-8b.q"], metavar="NAME")
    parser.add_argument("--json", type=Path, required=True, metavar="PATH")
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock(device)
    ms = _copy(clock, args.bytes, device)
    copy = {"bytes": args.bytes, "ms": ms._asdict(), "bytes_per_second": 2e3 * args.bytes / ms.p50}
    print(f"copy of {args.bytes:,} bytes: {1e-12 * copy['bytes_per_second']:.2f} TB/s read and written")
    products = []
    for name in args.layer:
        k, n, _ = layer_named(name)
        x, w = normal(device, args.tokens, k), normal(device, n, k, std=k**-0.5)
        ms = time_on_device(clock, lambda x=x, w=w: torch.nn.functional.linear(x, w))  # type: ignore[misc]
        flops = 2e3 * args.tokens * k * n / ms.p50
        products.append({"layer": name, "m": args.tokens, "k": k, "n": n, "ms": ms._asdict(), "flops": flops})
        print(f"vendor's GEMM, bf16, {args.tokens} x {k} x {n}: {1e3 * ms.p50:.0f} us, {1e-12 * flops:.0f} TFLOP/s")
    args.json.write_text(json.dumps({"copy": copy, "products": products}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
