"""What is proven and what is measured: cases that a kernel must get right, and sizes at which it is timed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..backends import dispatch, first_use
from ..backends.request import Kernel, Product, Request, new_middle
from ..text import dtype_name
from .layers import Layer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Of a case that must give the same bits each time.
REPEATS = 20

_LAYERS = {"cuda": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)), "cpu": ((768, 768), (2048, 512))}
_TOKENS = {"cuda": (512, 2048, 8192), "cpu": (128, 512)}
_RANK = 16


class Case(NamedTuple):
    """One layer, whose products a kernel must get right in both directions; dtypes by name."""

    m: int
    k: int
    n: int
    r: int
    dtype: str
    adapter_dtype: str
    dropout: bool
    bias: bool
    repeats: int = 1

    @property
    def sizes(self) -> list[Size]:
        """Its products in both directions."""
        layer = layer_of(self.k, self.n, self.r, self.dtype, self.adapter_dtype, self.dropout)
        return list(sizes_of(layer, self.m, self.dropout).values())

    def __str__(self) -> str:
        text = f"M={self.m} K={self.k} N={self.n} R={self.r} {self.dtype}"
        if self.adapter_dtype != self.dtype:
            text += f", {self.adapter_dtype} adapters"
        return text + (", dropout" if self.dropout else "") + (", bias" if self.bias else "")


class Size(NamedTuple):
    """One verb in one direction at one size: what is timed, and becomes a bucket of the table."""

    verb: str
    direction: str
    m: int
    k: int
    n: int
    r: int
    dtype: str
    adapter_dtype: str
    dropout: bool

    @property
    def grads(self) -> dict[str, Size]:
        """The products of rank_grad behind a backward, by direction."""
        layer = layer_of(self.n, self.k, self.r, self.dtype, self.adapter_dtype, self.dropout)
        return {name: size for name, size in sizes_of(layer, self.m, self.dropout).items() if size.verb == "rank_grad"}

    def request(self, device: torch.device) -> Request:
        """What a kernel is asked, by tensors without data."""
        dtype, adapter_dtype = (getattr(torch, name) for name in (self.dtype, self.adapter_dtype))
        m, k, n, r = self.m, self.k, self.n, self.r

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        if self.verb == "rank_grad":
            wide = empty(m, max(k, n))
            narrow = new_middle(wide, min(k, n))
            p, q = (narrow, wide) if self.direction == "da" else (wide, narrow)
            return Request.of_rank_grad(p, q, adapter_dtype, self.dropout)._replace(device=device)
        backward = self.direction == "backward"
        product = Product(
            empty(m, k),
            empty(k, n).T if backward else empty(n, k),
            empty(r, k, dtype=adapter_dtype),
            empty(n, r, dtype=adapter_dtype),
            1.0,
            seed=empty(2, dtype=torch.int64) if self.dropout else None,
            on_product=backward,
        )
        return Request.of_lora_matmul(product)._replace(device=device)

    def __str__(self) -> str:
        adapters = "" if self.adapter_dtype == self.dtype else f", {self.adapter_dtype} adapters"
        return (
            f"{self.direction} M={self.m} K={self.k} N={self.n} R={self.r} {self.dtype}{adapters}"
            f"{', dropout' if self.dropout else ''}"
        )


# M, K, N, R, float32 adapters on a half-precision base, dropout, bias: every value with most of the others. The sizes
# are whole tiles, tiles with an edge, one token, rows that do not start on 16 bytes.
_CASES = (
    (256, 512, 384, 16, False, False, True),
    (193, 328, 264, 8, False, False, False),
    (193, 328, 264, 16, False, True, True),
    (129, 520, 776, 64, True, False, False),
    (1, 256, 136, 16, False, False, False),
    (17, 264, 136, 1, False, False, True),
    (77, 136, 200, 12, True, True, False),
    (150, 256, 272, 128, False, True, True),
    (67, 101, 83, 5, False, False, False),
    (67, 101, 83, 16, True, True, True),
)
# Of more tiles than a GPU has multiprocessors.
_LARGE_CASES = (
    (2056, 1024, 2312, 16, False, False, False),
    (4104, 768, 2304, 64, True, True, True),
)


def cases(dtype: str, ranks: Iterable[int], large: bool) -> list[Case]:
    """The cases of one dtype; ``ranks`` beyond the usual ones are added, ``large`` are sizes for a GPU alone."""
    rows = [*_CASES, *(_LARGE_CASES if large else ())]
    known = {row[3] for row in rows}
    for r in sorted(set(ranks) - known):
        rows += [(193, 328, 264, r, False, False, True), (77, 136, 200, r, True, True, False)]
    return [
        Case(m, k, n, r, dtype, "float32" if wide else dtype, dropout, bias, REPEATS if large or i == 2 else 1)
        for i, (m, k, n, r, wide, dropout, bias) in enumerate(rows)
    ]


def usual_layers(
    device: torch.device, quick: bool, ranks: Sequence[int], dtypes: Sequence[str], shapes: Sequence[tuple[int, int]]
) -> list[Layer]:
    """Layers where nobody named a model, with what is not given: real widths, with and without dropout."""
    shapes = list(shapes) or list(_LAYERS[device.type])
    if quick and device.type == "cuda":
        shapes = shapes[:2]
    names = list(dtypes) or (["bf16"] if device.type == "cuda" else ["fp32", "bf16"])
    found = []
    for name in names:
        dtype = DTYPES[name]
        for adapter_dtype in [dtype] if quick or dtype is torch.float32 else [dtype, torch.float32]:
            for dropout in [False] if quick else [False, True]:
                found += [
                    Layer(k, n, r, dtype, adapter_dtype, dropout, False) for k, n in shapes for r in ranks or [_RANK]
                ]
    return found


def usual_tokens(device: torch.device, quick: bool) -> tuple[int, ...]:
    """How many tokens a call has, where nobody said."""
    return _TOKENS[device.type][-1:] if quick else _TOKENS[device.type]


def layer_of(k: int, n: int, r: int, dtype: str, adapter_dtype: str, dropout: bool) -> Layer:
    """A layer whose dtypes are given by name."""
    return Layer(k, n, r, getattr(torch, dtype), getattr(torch, adapter_dtype), dropout, False)


def sizes_of(layer: Layer, m: int, dropout: bool) -> dict[str, Size]:
    """The products of one layer, by direction; the contracted width of each is its k."""
    k, n, r = layer.k, layer.n, layer.r
    dtypes = dtype_name(layer.dtype), dtype_name(layer.adapter_dtype)
    return {
        "da": Size("rank_grad", "da", m, r, k, min(r, k), *dtypes, dropout),
        "db": Size("rank_grad", "db", m, n, r, min(n, r), *dtypes, False),
        "forward": Size("lora_matmul", "forward", m, k, n, r, *dtypes, dropout),
        "backward": Size("lora_matmul", "backward", m, n, k, r, *dtypes, dropout),
    }


def sizes(layers: Iterable[Layer], tokens: Sequence[int]) -> list[Size]:
    """What to time for these layers, each once; rank_grad first, since a backward is timed with the fastest of it.

    A layer with dropout also runs forward without it, where it does not train.
    """
    found: dict[Size, None] = {}
    for layer in layers:
        for m in tokens:
            found |= dict.fromkeys(sizes_of(layer, m, layer.dropout).values())
            found[sizes_of(layer, m, False)["forward"]] = None
    return sorted(found, key=lambda size: size.verb != "rank_grad")


def kernels(names: Sequence[str]) -> Iterator[tuple[str, Kernel]]:
    """The verbs and kernels to prove: all, or those whose names these are or begin, and those of the rule.

    Raises:
        ValueError: a name is unknown.
    """
    known = {kernel.name for kernels in dispatch.KERNELS.values() for kernel in kernels} - {"reference"}
    for name in names:
        if not any(f"{kernel}-".startswith(f"{name}-") for kernel in known):
            raise ValueError(f"unknown kernel {name!r}: expected {', '.join(sorted(known))}, or how their names begin")
    for verb, of_verb in dispatch.KERNELS.items():
        for kernel in of_verb:
            # rank_grad has one kernel a family: it is part of each of them.
            mine = (f"{kernel.name}-".startswith(f"{n}-") or n.startswith(f"{kernel.name}-") for n in names)
            wanted = not names or kernel.name == first_use.KERNELS[verb] or any(mine)
            if kernel.name not in ("library", "reference") and wanted:
                yield verb, kernel
