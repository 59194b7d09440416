"""Arms of other fused LoRA kernels: found by import, none a dependency.

An adapter makes the call that the peer's own integration makes, without its patches to PEFT or transformers; where that
integration would leave the layer to PEFT, or fail, the arm is absent and says so. What is said of a peer was read in
its source: lorafusion c48d7fd, unsloth 2026.10.9, freesolo-chalk 0.5.7, lycoris-lora 4.1.3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from ..cases import Case
from ..measure.failures import AbsentError, imported
from .arm import Built, LayerArm, each_layer, needs_module
from .operands import Operands

# Dropout that drops nothing and scales by one in float32, for a kernel that cannot go without.
_TINY = 1e-9


@each_layer
def _lorafusion(case: Case, o: Operands, p: float) -> Built:
    lora = imported("lorafusion.ops.lora_v1")
    if case.dtype == "fp32":
        raise AbsentError("multiplies float32 in TF32")
    if case.r < 16 or case.r & (case.r - 1):
        raise AbsentError(f"takes ranks that are powers of two from 16 on, got {case.r}")
    if case.k % 256:
        raise AbsentError(f"its dx kernel reads past in_features that are no multiple of 256, got {case.k}")
    if not case.dropout:
        raise AbsentError("its backward fails without dropout")
    a, b = o.adapters()

    def layer(x: Tensor) -> Tensor:
        y: Tensor = lora.fused_linear_lora(x.unsqueeze(0), o.w, a, b, o.scale, dropout_p=p or _TINY, linear_bias=o.bias)
        return y.squeeze(0)

    return Built(layer, {"da": a, "db": b})


@each_layer
def _unsloth(case: Case, o: Operands, p: float) -> Built:
    function = imported("unsloth.kernels.fast_lora").LoRA_W
    if case.bias:
        raise AbsentError("its autograd Function takes no bias of the base")
    a, b = o.adapters()
    # Releases that know no dropout know no such argument.
    dropout = [p] if p else []

    def layer(x: Tensor) -> Tensor:
        y: Tensor = function.apply(x.unsqueeze(0), o.w, None, a, b, o.scale, *dropout)
        return y.squeeze(0)

    return Built(layer, {"da": a, "db": b})


@each_layer
def _chalk(case: Case, o: Operands, p: float) -> Built:
    lora = imported("chalk.ops.lora")
    if case.dropout:
        raise AbsentError("leaves layers with dropout to PEFT")
    if case.m < lora._FUSE_MIN_TOKENS:
        raise AbsentError(f"leaves fewer than {lora._FUSE_MIN_TOKENS} tokens to PEFT, got {case.m}")
    delta = _chalk_delta(lora)
    if delta is None:
        raise AbsentError("its self-test fails on this GPU, where it leaves everything to PEFT")
    base = o.linear()
    a, b = o.adapters()
    return Built(lambda x: base(x) + delta(x, a, b, o.scale), {"da": a, "db": b})


@functools.cache
def _chalk_delta(lora: ModuleType) -> Callable[..., Tensor] | None:
    """Its kernel for this GPU after its self-test, which takes seconds; None where that fails."""
    delta: Callable[..., Tensor] | None = lora.load_lora()
    return delta


@each_layer
def _lycoris(case: Case, o: Operands, p: float) -> Built:
    lycoris = imported("lycoris")
    if case.dropout:
        raise AbsentError("drops the adapter's output, not its input")
    base = o.linear()
    layer = lycoris.LoConModule("lora", base, lora_dim=case.r, alpha=o.scale * case.r, bypass_mode=True).to(o.w)
    a, b = o.adapters()
    layer.lora_down.weight, layer.lora_up.weight = a, b
    return Built(layer, {"da": a, "db": b})


PEERS = (
    LayerArm(
        "lorafusion",
        "LoRAFusion's fused_linear_lora",
        _lorafusion,
        require=needs_module("lorafusion.ops.lora_v1", gpu=True),
    ),
    LayerArm(
        "unsloth",
        "unsloth's LoRA_W; only by name, since its import patches transformers and PEFT under the other arms",
        _unsloth,
        require=needs_module("unsloth.kernels.fast_lora"),
        by_name_only=True,
    ),
    LayerArm(
        "freesolo-chalk",
        "nn.Linear plus chalk's LoRA delta for this GPU, PEFT unpatched",
        _chalk,
        require=needs_module("chalk.ops.lora", "freesolo-chalk", gpu=True),
    ),
    LayerArm(
        "lycoris",
        "LyCORIS LoConModule in bypass mode, which keeps the low rank; its default builds all of b @ a",
        _lycoris,
        require=needs_module("lycoris", "lycoris-lora"),
    ),
)
