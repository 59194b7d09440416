"""The arms of every comparison: the frozen floor, plain and hand-written LoRA, PEFT, full fine-tuning, fastlora.

Each provider wraps the same operands, sharing the storage of w, in the form its users would call.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import fastlora
from fastlora import dispatch

from .cases import Case
from .operands import Operands

FLOOR = "frozen"


class AbsentError(Exception):
    """This provider cannot run this case here, by its own word: no failure."""


@dataclass(frozen=True)
class Built:
    """A layer ready to call.

    ``trained`` maps the name of each gradient (``da``, ``db``; ``dw``, ``dbias``) to the tensor it belongs to, ``base``
    is whether the layer has no adapter, and ``backend`` what fastlora chose, None for anybody else.
    """

    layer: Callable[[Tensor], Tensor]
    trained: dict[str, Tensor]
    base: bool = False
    backend: str | None = None


@dataclass(frozen=True)
class Provider:
    """One arm.

    ``build`` raises :class:`AbsentError` where the arm has nothing to offer. ``own_mask`` says that its dropout mask is
    fastlora's, so that it can be checked with dropout on. ``backend`` is what ``FASTLORA_BACKEND`` is set to meanwhile.
    """

    name: str
    about: str
    build: Callable[[Case, Operands, float], Built]
    own_mask: bool = False
    backend: str = "auto"

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Forces the provider's backend for a while; entered and left outside every clock."""
        before = os.environ.get("FASTLORA_BACKEND")
        os.environ["FASTLORA_BACKEND"] = self.backend
        try:
            yield
        finally:
            if before is None:
                del os.environ["FASTLORA_BACKEND"]
            else:
                os.environ["FASTLORA_BACKEND"] = before


def _linear(o: Operands, trained: bool) -> nn.Linear:
    """``nn.Linear`` over the operands' own storage."""
    linear = nn.Linear(o.w.shape[1], o.w.shape[0], bias=o.bias is not None, device="meta")
    linear.weight = nn.Parameter(o.w, requires_grad=trained)
    if o.bias is not None:
        linear.bias = nn.Parameter(o.bias, requires_grad=trained)
    return linear


def _frozen(case: Case, o: Operands, p: float) -> Built:
    return Built(_linear(o, trained=False), {}, base=True)


def _full(case: Case, o: Operands, p: float) -> Built:
    linear = _linear(o, trained=True)
    return Built(
        linear, {f"d{'w' if name == 'weight' else name}": q for name, q in linear.named_parameters()}, base=True
    )


def _plain(case: Case, o: Operands, p: float) -> Built:
    a, b = nn.Parameter(o.a.clone()), nn.Parameter(o.b.clone())

    def layer(x: Tensor) -> Tensor:
        return F.linear(x, o.w, o.bias) + o.scale * ((F.dropout(x, p) @ a.T) @ b.T)

    return Built(layer, {"da": a, "db": b})


class _AddmmLoRA(torch.autograd.Function):
    """The low-rank product added to y and dx in place; x and z are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        z = x @ a.T
        ctx.save_for_backward(x, w, a, b, z)
        ctx.scale = scale
        return F.linear(x, w, bias).addmm_(z, b.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, z = ctx.saved_tensors
        t = dy @ b
        dx = (dy @ w).addmm_(t, a, alpha=ctx.scale)
        da = torch.empty_like(a).addmm_(t.T, x, beta=0, alpha=ctx.scale)
        db = torch.empty_like(b).addmm_(dy.T, z, beta=0, alpha=ctx.scale)
        return dx, None, None, da, db, None


def _addmm(case: Case, o: Operands, p: float) -> Built:
    if case.dropout:
        raise AbsentError("takes no dropout")
    a, b = nn.Parameter(o.a.clone()), nn.Parameter(o.b.clone())

    def layer(x: Tensor) -> Tensor:
        y: Tensor = _AddmmLoRA.apply(x, o.w, o.bias, a, b, o.scale)  # type: ignore[no-untyped-call]
        return y

    return Built(layer, {"da": a, "db": b})


def _adapter_dtype(case: Case, wide: bool) -> torch.dtype:
    if wide and case.dtype == "fp32":
        raise AbsentError("the base is float32 already")
    return torch.float32 if wide else case.torch_dtype


def _peft(wide: bool) -> Callable[[Case, Operands, float], Built]:
    def build(case: Case, o: Operands, p: float) -> Built:
        dtype = _adapter_dtype(case, wide)
        if importlib.util.find_spec("peft") is None:
            raise AbsentError("peft is not installed")
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        config = LoraConfig(r=case.r, lora_dropout=p)
        layer = Linear(_linear(o, trained=False), "default", config=config, r=case.r)
        layer.scaling["default"] = o.scale
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        a.weight, b.weight = nn.Parameter(o.a.to(dtype, copy=True)), nn.Parameter(o.b.to(dtype, copy=True))
        return Built(layer, {"da": a.weight, "db": b.weight})

    return build


def _fastlora(backend: str, wide: bool = False) -> Callable[[Case, Operands, float], Built]:
    def build(case: Case, o: Operands, p: float) -> Built:
        dtype = _adapter_dtype(case, wide)
        layer = fastlora.LoRALinear.from_linear(
            _linear(o, trained=False), r=case.r, lora_alpha=o.scale * case.r, lora_dropout=p, adapter_dtype=dtype
        )
        layer.lora_A, layer.lora_B = nn.Parameter(o.a.to(dtype, copy=True)), nn.Parameter(o.b.to(dtype, copy=True))
        chosen = fastlora.explain(
            o.xs[0], layer.weight, layer.lora_A, layer.lora_B, scale=o.scale, bias=layer.bias, dropout_p=p
        )
        if chosen.chosen is None:
            raise AbsentError(dict(chosen.verdicts)[backend] or "refused")
        if chosen.chosen == "triton" and not o.w.is_cuda:
            raise AbsentError("runs here in Triton's interpreter, whose time means nothing")
        return Built(layer, {"da": layer.lora_A, "db": layer.lora_B}, backend=chosen.chosen)

    return build


def providers() -> dict[str, Provider]:
    """Every provider by name, the floor first; fastlora's backends are those its dispatcher knows."""
    known = [
        Provider(FLOOR, "the frozen base layer alone: the floor", _frozen),
        Provider("plain", "F.linear(x, w, bias) + scale * ((dropout(x) @ a.T) @ b.T)", _plain),
        Provider("addmm", "hand-written autograd Function over addmm_", _addmm),
        Provider("peft-fp32", "PEFT as shipped: float32 adapters on a half-precision base", _peft(wide=True)),
        Provider("peft-same", "PEFT, adapters in the base's dtype", _peft(wide=False)),
        Provider("full", "full fine-tuning: nn.Linear with its weight trained", _full),
        Provider("fastlora", "fastlora, backend chosen by itself", _fastlora("auto"), own_mask=True),
        Provider("fastlora-fp32", "the same with float32 adapters", _fastlora("auto", wide=True), own_mask=True),
    ]
    known += [
        Provider(f"fastlora-{name}", f"fastlora forced to {name}", _fastlora(name), own_mask=True, backend=name)
        for name in dispatch.BACKENDS
        if name != "reference"
    ]
    return {provider.name: provider for provider in known}
