"""The arms of every comparison: the frozen floor, full fine-tuning, LoRA in torch, PEFT, loralib, peers and fastlora.

Each arm wraps the same operands, sharing the storage of w, in the form its users would call. Optional packages are
imported when an arm is built; the arms of other fused kernels are in ``peers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import fastlora
from fastlora.quantised import stored_weight

from ..cases import FLOOR, Case
from ..measure.failures import AbsentError, imported
from .arm import KERNELS, Build, Built, Formula, LayerArm, choice, each_layer, needs_kernel, needs_module
from .operands import Operands, Together
from .peers import PEERS


@each_layer
def _frozen(case: Case, o: Operands, p: float) -> Built:
    return Built(o.base(), {}, formula="base")


@each_layer
def _full(case: Case, o: Operands, p: float) -> Built:
    linear = o.linear(trained=True)
    return Built(
        linear, {f"d{'w' if name == 'weight' else name}": q for name, q in linear.named_parameters()}, formula="base"
    )


class _Plain(nn.Module):
    """What a user writes in a model: a layer over the case's operands."""

    def __init__(self, o: Operands, p: float) -> None:
        super().__init__()
        base = o.linear()
        self.weight, self.bias = base.weight, base.bias
        self.a, self.b = o.adapters()
        self.scale, self.p = o.scale, p

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.linear(x, self.weight, self.bias)
        return y + self.scale * ((F.dropout(x, self.p) @ self.a.T) @ self.b.T)

    def built(self) -> Built:
        return Built(self, {"da": self.a, "db": self.b})


class _PlainOnAny(_Plain):
    """The same over a base layer that is called, such as a quantised one."""

    def __init__(self, o: Operands, p: float) -> None:
        super().__init__(o, p)
        self.base = o.base()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.scale * ((F.dropout(x, self.p) @ self.a.T) @ self.b.T)


class _PlainDora(_Plain):
    """DoRA as its paper writes it: the whole product b a in each call, its norm a constant."""

    def __init__(self, o: Operands, p: float) -> None:
        super().__init__(o, p)
        assert o.magnitude is not None
        self.magnitude = nn.Parameter(o.magnitude.clone())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self.weight + self.scale * (self.b @ self.a), dim=1)
        y: Tensor = F.linear(x, self.weight) + self.scale * ((x @ self.a.T) @ self.b.T)
        y = self.magnitude / norm * y
        return y if self.bias is None else y + self.bias

    def built(self) -> Built:
        return Built(self, {"da": self.a, "db": self.b, "dm": self.magnitude}, formula="dora")


@each_layer
def _plain(case: Case, o: Operands, p: float) -> Built:
    if case.is_dora:
        if p:
            raise AbsentError("takes no dropout with DoRA")
        return _PlainDora(o, p).built()
    return (_Plain if o.stored is None else _PlainOnAny)(o, p).built()


def _compiled(case: Case, o: Operands | Together, p: float) -> Built:
    # All builds share one code object: past dynamo's limit on its recompilations the next would fail.
    torch._dynamo.reset()
    plain = _plain(case, o, p)
    return replace(plain, layer=torch.compile(plain.layer, fullgraph=True, dynamic=False))


def _needs_inductor(device: torch.device) -> None:
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


class _Addmm(_Plain):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _AddmmLoRA.apply(x, self.weight, self.bias, self.a, self.b, self.scale)  # type: ignore[no-untyped-call]
        return y


@each_layer
def _addmm(case: Case, o: Operands, p: float) -> Built:
    if case.dropout:
        raise AbsentError("takes no dropout")
    return _Addmm(o, p).built()


def _adapter_dtype(case: Case, wide: bool) -> torch.dtype:
    if wide and case.dtype == "fp32":
        raise AbsentError("the base is float32 already")
    return torch.float32 if wide else case.torch_dtype


def _peft(wide: bool) -> Build:
    @each_layer
    def build(case: Case, o: Operands, p: float) -> Built:
        dtype = _adapter_dtype(case, wide)
        peft = imported("peft")
        config = peft.LoraConfig(r=case.r, lora_dropout=p, use_dora=case.is_dora)
        layer = _peft_kind(peft.tuners.lora, case)(o.base(), "default", config=config, r=case.r)
        layer.scaling["default"] = o.scale
        a, b = o.adapters(dtype)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        if o.magnitude is None:
            return Built(layer, {"da": a, "db": b})
        magnitude = layer.lora_magnitude_vector["default"].weight = nn.Parameter(o.magnitude.to(dtype, copy=True))
        return Built(layer, {"da": a, "db": b, "dm": magnitude}, formula="dora")

    return build


def _peft_kind(lora: Any, case: Case) -> Any:
    """PEFT's layer over a base that is stored so."""
    if case.quantised is None:
        return lora.Linear
    bnb = imported("peft.tuners.lora.bnb")
    return bnb.Linear4bit if case.quantised == "nf4" else bnb.Linear8bitLt


@each_layer
def _loralib(case: Case, o: Operands, p: float) -> Built:
    layer = imported("loralib").Linear(
        case.k, case.n, r=case.r, lora_dropout=p, merge_weights=False, bias=case.bias, device="meta"
    )
    base = o.linear()
    layer.weight, layer.bias = base.weight, base.bias
    layer.lora_A, layer.lora_B = o.adapters()
    layer.scaling = o.scale
    return Built(layer, {"da": layer.lora_A, "db": layer.lora_B})


def _alone(wide: bool = False, *, without_magnitude: bool = False) -> Build:
    """One LoRALinear for each layer; of DoRA's cases with its magnitude, or as LoRA."""

    @each_layer
    def build(case: Case, o: Operands, p: float) -> Built:
        dtype = _adapter_dtype(case, wide)
        dora = case.is_dora and not without_magnitude
        layer = fastlora.LoRALinear.from_linear(
            o.base(), r=case.r, lora_alpha=o.scale * case.r, lora_dropout=p, use_dora=dora, adapter_dtype=dtype
        )
        a, b = layer.lora_A, layer.lora_B = o.adapters(dtype)
        trained: dict[str, Tensor] = {"da": a, "db": b}
        if dora:
            assert o.magnitude is not None
            trained["dm"] = layer.lora_magnitude = nn.Parameter(o.magnitude.to(dtype, copy=True))
        x, dy = o.w.new_empty(case.m, case.k), o.w.new_empty(case.m, case.n)
        forward = choice(x, o.w, a, b, bias=o.bias, dropout_p=p)
        backward = choice(dy, o.w.T, b.T, a.T)
        if refusal := forward.refusal or backward.refusal:
            raise AbsentError(refusal)
        kernels = dict.fromkeys(each.kernel or "" for each in (forward, backward))
        formula: Formula = "dora" if dora else "lora"
        return Built(layer, trained, formula, kernel="+".join(kernels), tile=forward.tile)

    return build


def _fastlora(wide: bool = False) -> Build:
    """The layer; several of one input by lora_linear_group, an MLP by lora_swiglu_mlp."""

    def build(case: Case, o: Operands | Together, p: float) -> Built:
        alone = _alone(wide)(case, o, p)
        if isinstance(o, Operands):
            return alone
        a_s, bs = ([alone.trained[f"{name}{i}"] for i in range(len(o.branches))] for name in ("da", "db"))
        if case.is_mlp:
            return replace(alone, layer=_mlp(o, a_s, bs, p))
        weights, biases = [_weight(each) for each in o.branches], [each.bias for each in o.branches]
        scales = [each.scale for each in o.branches]

        def layer(x: Tensor) -> tuple[Tensor, ...]:
            return fastlora.lora_linear_group(x, weights, a_s, bs, scales=scales, biases=biases, dropout_ps=p)

        return replace(alone, layer=layer)

    return build


def _mlp(o: Together, a_s: Sequence[Tensor], bs: Sequence[Tensor], p: float) -> Callable[[Tensor], Tensor]:
    gate, up, down = (
        fastlora.Branch(_weight(each), a, b, each.scale, each.bias, p)
        for each, a, b in zip(o.branches, a_s, bs, strict=True)
    )
    return lambda x: fastlora.lora_swiglu_mlp(x, gate, up, down)


def _weight(o: Operands) -> Tensor | fastlora.StoredWeight:
    """What fastlora's functions take as the base weight."""
    if o.stored is None:
        return o.w
    stored = stored_weight(o.stored)
    assert not isinstance(stored, str), stored
    return stored


def _as_lora(case: Case, o: Operands | Together, p: float) -> Built:
    if not case.is_dora:
        raise AbsentError("the same as fastlora's, but in the cases of DoRA")
    return _alone(without_magnitude=True)(case, o, p)


def _one_by_one(case: Case, o: Operands | Together, p: float) -> Built:
    if isinstance(o, Operands):
        raise AbsentError("a layer by itself: the same as fastlora's")
    return _alone()(case, o, p)


# Other entries to the same product, timed in the host's cases alone; no picture shows them.
HOST_ARMS = ("injected", "patched", "drop-in")


def _host_only(case: Case) -> None:
    if case.is_plain and not case.is_host:
        raise AbsentError("the same product as fastlora's: timed where the host's time alone is looked at")


@each_layer
def _injected(case: Case, o: Operands, p: float) -> Built:
    _host_only(case)
    model = nn.Sequential(o.linear())
    fastlora.inject(model, ["0"], r=case.r, lora_alpha=o.scale * case.r, lora_dropout=p)
    layer: Any = model[0]
    a, b = layer.lora_A["default"], layer.lora_B["default"] = o.adapters()
    return Built(layer, {"da": a, "db": b})


@each_layer
def _patched(case: Case, o: Operands, p: float) -> Built:
    _host_only(case)
    built = _peft(wide=False)(case, o, p)
    fastlora.patch_peft(nn.ModuleList([built.layer]))  # type: ignore[list-item]
    return built


@each_layer
def _drop_in(case: Case, o: Operands, p: float) -> Built:
    from fastlora import loralib

    _host_only(case)
    layer = loralib.Linear(case.k, case.n, r=case.r, lora_dropout=p, merge_weights=False, bias=case.bias)
    base = o.linear()
    layer.weight, layer.bias = base.weight, base.bias
    layer.lora_A, layer.lora_B = o.adapters()
    layer.scaling = o.scale
    return Built(layer, {"da": layer.lora_A, "db": layer.lora_B})


def _compiled_fastlora(case: Case, o: Operands | Together, p: float) -> Built:
    torch._dynamo.reset()
    built = _fastlora()(case, o, p)
    return replace(built, layer=torch.compile(built.layer, fullgraph=True, dynamic=False))


def arms() -> dict[str, LayerArm]:
    """Every arm by name, the floor first; fastlora's kernels are forced one by one."""
    peft = needs_module("peft")
    known = [
        LayerArm(FLOOR, "the frozen base layer alone: the floor", _frozen, variants=True),
        LayerArm("plain", "F.linear(x, w, bias) + scale * ((dropout(x) @ a.T) @ b.T)", _plain, variants=True),
        LayerArm("addmm", "hand-written autograd Function over addmm_", _addmm),
        LayerArm("compiled", "plain under torch.compile, static shapes", _compiled, require=_needs_inductor),
        LayerArm(
            "peft-fp32",
            "PEFT as shipped: float32 adapters on a half-precision base",
            _peft(True),
            variants=True,
            require=peft,
        ),
        LayerArm("peft-same", "PEFT, adapters in the base's dtype", _peft(False), variants=True, require=peft),
        LayerArm("loralib", "loralib.Linear, adapters in the base's dtype", _loralib, require=needs_module("loralib")),
        LayerArm("full", "full fine-tuning: nn.Linear with its weight trained", _full),
        *PEERS,
        LayerArm("injected", "fastlora.inject, in the host's cases", _injected, own_mask=True),
        LayerArm(
            "patched",
            "PEFT under fastlora.patch_peft, in the host's cases, of quantised bases and of DoRA",
            _patched,
            own_mask=True,
            variants=True,
            require=peft,
        ),
        LayerArm("drop-in", "fastlora.loralib.Linear, in the host's cases", _drop_in, own_mask=True),
        LayerArm(
            "compiled-fastlora",
            "fastlora under torch.compile, static shapes",
            _compiled_fastlora,
            require=_needs_inductor,
        ),
        LayerArm(
            "fastlora",
            "fastlora, kernel chosen by itself; layers of one input, or of an MLP, together",
            _fastlora(),
            own_mask=True,
            variants=True,
        ),
        LayerArm("fastlora-alone", "such layers one after the other", _one_by_one, own_mask=True, variants=True),
        LayerArm("fastlora-fp32", "the same with float32 adapters", _fastlora(wide=True), own_mask=True, variants=True),
        LayerArm("fastlora-lora", "LoRA in the cases of DoRA", _as_lora, own_mask=True, variants=True),
        *map(_forced, KERNELS),
    ]
    return {arm.name: arm for arm in known}


def _forced(kernel: str) -> LayerArm:
    name, about = f"fastlora-{kernel}", f"fastlora forced to {kernel}"
    return LayerArm(name, about, _fastlora(), own_mask=True, kernel=kernel, require=needs_kernel(kernel))
