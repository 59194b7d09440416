"""Inputs the tests share, and what the reference says about them. Never square, b never zero, scale never 1."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import lora_linear
from fastlora.accuracy import Step, assert_close_to_oracle, oracle_step, reference_step
from fastlora.backends import dispatch
from fastlora.backends.dropout import Dropout, draw_seed
from fastlora.backends.request import Kernel, Product, Together

SCALE = 1.7

# (dtype of the base, dtype of the adapters): the pairs the package promises.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16_fp32_adapters": (torch.float16, torch.float32),
    "bf16_fp32_adapters": (torch.bfloat16, torch.float32),
}


class Operands(NamedTuple):
    """The tensors of one call of ``lora_linear``, in its argument order."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Operands:
        return Operands(*(None if t is None else f(t) for t in self))

    def named(self) -> dict[str, Tensor]:
        return {name: t for name, t in self._asdict().items() if t is not None}

    def leaves(self, *names: str) -> Operands:
        """The same values and strides as new leaves; the named ones, or all where none is named, ask for a gradient."""
        names = names or self._fields
        return Operands(
            *(None if t is None else t.detach().requires_grad_(name in names) for name, t in self._asdict().items())
        )

    def double(self) -> Operands:
        return self.map(lambda t: t.detach().double())

    def product(self, dropout: Dropout | None = None, *, scale: float = SCALE, on_product: bool = False) -> Product:
        """The operands of a verb: x as [M, K]."""
        mask = (0.0, None) if dropout is None else (dropout.p, dropout.seed)
        x, weight, a, b, bias = self
        return Product(x if x.dim() == 2 else _rows(x), weight, a, b, scale, bias, *mask, on_product)

    def __call__(self, **options: Any) -> Tensor:
        return lora_linear(*self[:4], bias=self.bias, **({"scale": SCALE} | options))


def make(
    m: int = 37,
    k: int = 48,
    n: int = 29,
    r: int = 6,
    *,
    lead: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    seed: int = 1,
) -> Operands:
    """Normal data scaled so that the base and the update are of one size. ``lead`` replaces m by leading dimensions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    adapter_dtype = adapter_dtype or dtype
    return Operands(
        normal(*((m,) if lead is None else lead), k, std=1.0, dtype=dtype),
        normal(n, k, std=max(k, 1) ** -0.5, dtype=dtype),
        normal(r, k, std=max(k, 1) ** -0.5, dtype=adapter_dtype),
        normal(n, r, std=r**-0.5, dtype=adapter_dtype),
        normal(n, std=0.5, dtype=dtype) if bias else None,
    )


def kernel_named(name: str, verb: str = "lora_matmul") -> Kernel:
    """A kernel of the package."""
    return next(kernel for kernel in dispatch.KERNELS[verb] if kernel.name == name)


def replace_kernel(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    """Puts a changed kernel of ``lora_matmul`` in the place of the one of that name."""
    changed = tuple(k._replace(**fields) if k.name == name else k for k in dispatch.KERNELS["lora_matmul"])
    monkeypatch.setitem(dispatch.KERNELS, "lora_matmul", changed)
    dispatch.forget()


def count_runs(monkeypatch: pytest.MonkeyPatch, name: str) -> list[torch.Size]:
    """The shape of x in each product that a kernel runs from now on, compiled calls included; dy's in a backward."""
    shapes: list[torch.Size] = []
    kernel = kernel_named(name)

    def noted(product: Product) -> object:
        shapes.append(product.x.shape)
        return kernel.run(product)

    def noted_gradients(product: Product, dy: Tensor, z: Tensor) -> object:
        assert kernel.gradients is not None
        shapes.append(dy.shape)
        return kernel.gradients(product, dy, z)

    replace_kernel(
        monkeypatch,
        name,
        run=noted,
        gradients=kernel.gradients and noted_gradients,
        together=kernel.together and _noting(kernel.together, shapes),
    )
    return shapes


def _noting(way: Together, shapes: list[torch.Size]) -> Together:
    def run(products: Sequence[Product]) -> Any:
        shapes.extend(p.x.shape for p in products)
        return way.run(products)

    def gradients(products: Sequence[Product], dys: Sequence[Tensor], zs: Sequence[Tensor]) -> Any:
        shapes.extend(dy.shape for dy in dys)
        return way.gradients(products, dys, zs)

    return Together(run, gradients)


def gradient_of(y: Tensor, seed: int = 2) -> Tensor:
    """An incoming gradient for y."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)


def upcoming_dropout(p: float) -> Dropout | None:
    """The dropout the next call on the CPU will draw; leaves torch's generator as it was."""
    if p == 0:
        return None
    with torch.random.fork_rng(devices=[]):
        return Dropout(p, draw_seed(torch.device("cpu")))


def run(operands: Operands, dy: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """y and the gradient of every operand that asks for one, by ``lora_linear``."""
    y = operands(**options)
    y.backward(gradient_of(y) if dy is None else dy)
    gradients = {name: t.grad for name, t in operands.named().items() if t.grad is not None}
    return {"y": y.detach()} | gradients


def assert_matches_reference(
    actual: dict[str, Tensor],
    operands: Operands,
    dy: Tensor,
    *,
    scale: float = SCALE,
    dropout: Dropout | None = None,
) -> None:
    """Holds every tensor of ``actual`` to the one error rule: oracle in float64, baseline in the tested dtype."""
    operands, dy = operands.map(Tensor.detach), dy.detach()
    oracle = _step(oracle_step, operands, dy, scale, dropout) | _base_gradients(operands.double(), dy.double())
    baseline = _step(reference_step, operands, dy, scale, dropout) | _base_gradients(operands, dy)
    for name, tensor in actual.items():
        assert_close_to_oracle(tensor, oracle=oracle[name], baseline=baseline[name], name=name)


def check_against_reference(
    operands: Operands, dropout_p: float = 0.0, dy: Tensor | None = None, scale: float = SCALE
) -> None:
    """Forward and every gradient of one call against the reference."""
    dropout = upcoming_dropout(dropout_p)
    operands = operands.leaves()
    y = operands(dropout_p=dropout_p, scale=scale)
    dy = gradient_of(y) if dy is None else dy
    y.backward(dy)
    actual = {"y": y} | {name: t.grad for name, t in operands.named().items()}
    assert_matches_reference(actual, operands, dy, scale=scale, dropout=dropout)


def _step(
    step: Callable[..., Step], operands: Operands, dy: Tensor, scale: float, dropout: Dropout | None
) -> dict[str, Tensor]:
    y, dx, da, db = step(operands.product(dropout, scale=scale), _rows(dy))
    return {"y": y.view(dy.shape), "x": dx.view(operands.x.shape), "lora_a": da, "lora_b": db}


def _base_gradients(operands: Operands, dy: Tensor) -> dict[str, Tensor]:
    return {"weight": _rows(dy).T @ _rows(operands.x), "bias": _rows(dy).sum(0)}


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _sliced(x: Tensor) -> Tensor:
    padded = x.new_full([size + 3 for size in x.shape], float("nan"))
    view = padded[tuple(slice(1, 1 + size) for size in x.shape)]
    return view.copy_(x)


def _every_second(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    return wide[..., ::2].copy_(x)


def _expanded_rows(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def _expanded_columns(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x)


# Ways to hold a tensor other than contiguously. The gaps of the sliced ones are NaN: reading one shows.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "sliced": _sliced,
    "every_second": _every_second,
    "expanded_rows": _expanded_rows,
    "expanded_columns": _expanded_columns,
}


class OpLog(TorchDispatchMode):
    """Records the operators that run while it is entered, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func._schema.name, args, result))
        return result

    def count(self, names: Iterable[str]) -> dict[str, int]:
        """How often each of these operators ran."""
        counter = Counter(name for name, _, _ in self.calls)
        return {name: counter[name] for name in names}
