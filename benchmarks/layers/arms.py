"""The arms of every comparison: the frozen floor, full fine-tuning, LoRA in torch, PEFT, loralib, peers and fastlora.

Each arm wraps the same operands, sharing the storage of w, in the form its users would call. Optional packages are
imported when an arm is built; the arms of other fused kernels are in ``peers``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import fastlora
from fastlora.backends import cuda, dispatch, triton
from fastlora.backends.dropout import Dropout, draw_seed

from ..cases import FLOOR, Case
from ..measure.failures import AbsentError
from .arm import Arm, Built, adapters, imported, linear_over
from .operands import Operands
from .peers import PEERS


def _frozen(case: Case, o: Operands, p: float) -> Built:
    return Built(linear_over(o), {}, base=True)


def _full(case: Case, o: Operands, p: float) -> Built:
    linear = linear_over(o, trained=True)
    return Built(
        linear, {f"d{'w' if name == 'weight' else name}": q for name, q in linear.named_parameters()}, base=True
    )


def _plain(case: Case, o: Operands, p: float) -> Built:
    a, b = adapters(o)

    def layer(x: Tensor) -> Tensor:
        return F.linear(x, o.w, o.bias) + o.scale * ((F.dropout(x, p) @ a.T) @ b.T)

    return Built(layer, {"da": a, "db": b})


def _compiled(case: Case, o: Operands, p: float) -> Built:
    _check_inductor(o.w.device)
    # All builds share one code object: past dynamo's limit on its recompilations the next would fail.
    torch._dynamo.reset()
    plain = _plain(case, o, p)
    return replace(plain, layer=torch.compile(plain.layer, fullgraph=True, dynamic=False))


def _check_inductor(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise AbsentError("inductor needs Triton on a GPU")
        return
    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise AbsentError("inductor finds no C++ compiler: install g++ or set CXX") from error


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
    a, b = adapters(o)

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
        peft = imported("peft")
        config = peft.LoraConfig(r=case.r, lora_dropout=p)
        layer = peft.tuners.lora.Linear(linear_over(o), "default", config=config, r=case.r)
        layer.scaling["default"] = o.scale
        a, b = adapters(o, dtype)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        return Built(layer, {"da": a, "db": b})

    return build


def _loralib(case: Case, o: Operands, p: float) -> Built:
    layer = imported("loralib").Linear(
        case.k, case.n, r=case.r, lora_dropout=p, merge_weights=False, bias=case.bias, device="meta"
    )
    base = linear_over(o)
    layer.weight, layer.bias = base.weight, base.bias
    layer.lora_A, layer.lora_B = adapters(o)
    layer.scaling = o.scale
    return Built(layer, {"da": layer.lora_A, "db": layer.lora_B})


def _fastlora(backend: str, wide: bool = False) -> Callable[[Case, Operands, float], Built]:
    def build(case: Case, o: Operands, p: float) -> Built:
        dtype = _adapter_dtype(case, wide)
        layer = fastlora.LoRALinear.from_linear(
            linear_over(o), r=case.r, lora_alpha=o.scale * case.r, lora_dropout=p, adapter_dtype=dtype
        )
        layer.lora_A, layer.lora_B = adapters(o, dtype)
        chosen = fastlora.explain(
            o.xs[0], layer.weight, layer.lora_A, layer.lora_B, scale=o.scale, bias=layer.bias, dropout_p=p
        )
        if chosen.chosen is None:
            raise AbsentError(dict(chosen.verdicts)[backend] or "refused")
        if chosen.chosen == "triton" and not o.w.is_cuda:
            raise AbsentError("runs here in Triton's interpreter, whose time means nothing")
        if chosen.chosen == "cuda" and not o.w.is_cuda:
            raise AbsentError("runs here in the host model, whose time means nothing")
        tile = _tile(chosen.chosen, o, layer, p)
        return Built(layer, {"da": layer.lora_A, "db": layer.lora_B}, kernel=chosen.chosen, tile=tile)

    return build


def _tile(backend: str, o: Operands, layer: fastlora.LoRALinear, p: float) -> str | None:
    """The design and tile of the forward, of a backend that has several. A forced one may be impossible."""
    if backend == "cuda":
        return cuda.design()
    if backend != "triton":
        return None
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    try:
        triton.plan(o.dys[0], o.w.T, b.T, a.T)
        return triton.plan(o.xs[0].detach(), o.w, a, b, dropout=Dropout(p, draw_seed(o.w.device)) if p else None)
    except RuntimeError as refusal:
        raise AbsentError(str(refusal)) from refusal


def arms() -> dict[str, Arm]:
    """Every arm by name, the floor first; fastlora's kernels are forced one by one."""
    known = [
        Arm(FLOOR, "the frozen base layer alone: the floor", _frozen),
        Arm("plain", "F.linear(x, w, bias) + scale * ((dropout(x) @ a.T) @ b.T)", _plain),
        Arm("addmm", "hand-written autograd Function over addmm_", _addmm),
        Arm("compiled", "plain under torch.compile, static shapes", _compiled),
        Arm("peft-fp32", "PEFT as shipped: float32 adapters on a half-precision base", _peft(wide=True)),
        Arm("peft-same", "PEFT, adapters in the base's dtype", _peft(wide=False)),
        Arm("loralib", "microsoft's loralib.Linear, adapters in the base's dtype", _loralib),
        Arm("full", "full fine-tuning: nn.Linear with its weight trained", _full),
        *PEERS,
        _ours("fastlora", "fastlora, backend chosen by itself", "auto"),
        _ours("fastlora-fp32", "the same with float32 adapters", "auto", wide=True),
    ]
    known += [
        _ours(f"fastlora-{name}", f"fastlora forced to {name}", name)
        for name in dispatch.BACKENDS
        if name != "reference"
    ]
    known += [
        _ours(f"fastlora-{name}-{design}", f"fastlora forced to {name}'s {design} design", name, design=design)
        for name, design in (("triton", "portable"), ("triton", "one_launch"), ("cuda", "serial"))
    ]
    return {arm.name: arm for arm in known}


def _ours(name: str, about: str, backend: str, wide: bool = False, design: str | None = None) -> Arm:
    variables = {"FASTLORA_BACKEND": backend, "FASTLORA_TRITON_DESIGN": None, "FASTLORA_CUDA_DESIGN": None}
    if design is not None:
        variables[f"FASTLORA_{backend.upper()}_DESIGN"] = design
    return Arm(name, about, _fastlora(backend, wide), own_mask=True, variables=variables)
