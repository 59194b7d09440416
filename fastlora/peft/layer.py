"""``FusedLoraLinear``: PEFT's LoRA layer, on fastlora in the calls that are proven to compute the same.

:class:`Fused` is what it has in common with the layers of :mod:`fastlora.peft.quantised`.

Imports peft, so ``fastlora.peft`` imports this file inside its functions: ``import fastlora`` must not need peft.

Every call is proven again, because the state that decides can change at any time (``merge_adapter``, hooks, ``to``).
The proof costs a few microseconds, less than the four module calls that it saves. What shapes
and dtypes prove, ``lora_linear`` remembers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D as Conv1D

from .. import siblings
from ..dtypes import HALF, WIDE
from ..eager import is_eager
from ..gated import is_watched
from ..mergeable import joined_bias
from ..ops.base import StoredWeight
from ..ops.dora import dora_linear, forget_norms
from ..ops.group import Branch
from ..ops.linear import lora_linear
from ..text import class_name, dtype_name
from . import calls
from .adapter import Adapter, adapter_of
from .named import PatchedLayer
from .reasons import (
    ARGUMENTS,
    ASKED_FOR,
    DISABLED,
    MERGED,
    NO_ADAPTER,
    STRICT,
    TENSORS,
    WATCHED,
    Reason,
    exotic,
    is_exotic,
    refused_input,
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _log_while_compiling(reason: str) -> None:
    # Dynamo runs this once, while it traces, and cannot pass the layer.
    tracer = "torch.export" if torch.compiler.is_exporting() else "torch.compile"
    calls.log_reason(f"a layer that {tracer} traces", reason, asked_for=reason in ASKED_FOR)


class Base(NamedTuple):
    """The frozen half of a layer: weight [N, K], bias [N] or None."""

    weight: Tensor | StoredWeight
    bias: Tensor | None


class Proven(NamedTuple):
    """The operands of ``lora_linear`` in a call for which PEFT's forward would compute nothing else."""

    weight: Tensor | StoredWeight
    bias: Tensor | None
    adapter: Adapter


class Fused(PatchedLayer):
    """A layer of PEFT whose forward is one :func:`fastlora.lora_linear`, or ``dora_linear``, where that is proven.

    It adds no state: parameters, buffers, state dict, config and every method but ``forward`` and what prints are
    PEFT's. Instances are made by :func:`fastlora.patch_peft` from PEFT's layers, never by the constructor.
    """

    strict_dtype = False

    def usual(self, x: Tensor) -> Proven | None:
        """What :func:`prove` returns for calls of the most usual kind, in less time; None for all else."""
        return None

    @staticmethod
    def base_refusal(base: Any) -> Reason | None:
        """The reason why a base can never run on fastlora as it is, or None."""
        raise NotImplementedError

    @staticmethod
    def base_dtype(base: Any) -> torch.dtype:
        """The dtype of the products with a base."""
        dtype: torch.dtype = base.weight.dtype
        return dtype

    @staticmethod
    def base_words(base: Any) -> str | None:
        """What a report says of a base, if anything."""
        return None

    def base_in_call(self, x: Tensor) -> Base | Reason:
        """The base in a call with x, or the reason why PEFT's own forward must run."""
        raise NotImplementedError

    def dtype_refusal(self, x: Tensor, base: Base, adapter: Adapter) -> Reason | None:
        """The reason if ``lora_linear`` takes not these dtypes, or its result would have another than PEFT's."""
        raise NotImplementedError

    def lora_branch(self, x: Tensor) -> Branch | None:
        """What the layer would pass to ``lora_linear`` in a call with x; None where PEFT's forward would run."""
        proof = self.usual(x) or prove(self, x)
        if isinstance(proof, str):
            return None
        weight, bias, (a, b, scale, p, update_bias, magnitude) = proof
        # Several adapters, and biases, are joined for one call alone: no later one can prove that they are equal.
        if type(a) is not nn.Parameter or update_bias is not None or magnitude is not None:
            return None
        return Branch(weight, a, b, scale, bias, p)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] → y [..., N], as PEFT's own."""
        proof = ARGUMENTS if args or kwargs else self.usual(x) or prove(self, x)
        if isinstance(proof, str):
            if torch.compiler.is_compiling():
                _log_while_compiling(proof)
            else:
                calls.count_fallback(self, proof, asked_for=proof in ASKED_FOR)
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        if calls.counters and not torch.compiler.is_compiling():
            calls.count_fast(self)
        weight, bias, (a, b, scale, p, update_bias, magnitude) = proof
        if magnitude is not None:
            return dora_linear(x, weight, a, b, magnitude, scale=scale, bias=bias, dropout_p=p)
        if update_bias is not None:
            bias = _rounded_bias(bias, update_bias, x, weight)
        elif siblings.formed and type(a) is nn.Parameter:
            return siblings.multiply(self, x, Branch(weight, a, b, scale, bias, p))
        return lora_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=p)


def _rounded_bias(bias: Tensor | None, update_bias: Tensor, x: Tensor, weight: Tensor | StoredWeight) -> Tensor:
    """The base's bias and the adapter's as one, rounded once: here, or where autocast or a stored weight casts all."""
    total = joined_bias(bias, update_bias)
    cast = isinstance(weight, StoredWeight) or torch.is_autocast_enabled(x.device.type)
    return total if cast else total.to(x.dtype)


def _usual(layer: Any, x: Tensor) -> Proven | None:
    """What :func:`prove` returns for one plain adapter, eager and without autocast; None for all else.

    It looks at all that ``prove`` looks at, in one piece: a fifth of its time, and an eighth of a small step.
    """
    if (
        layer._disable_adapters
        or layer.merged_adapters
        or not layer.cast_input_dtype_enabled
        or len(names := layer._active_adapter) != 1
        or type(names) is not list
        or (name := names[0]) in layer.lora_variant
        or type(x) not in TENSORS
        or x.is_nested
        or x.is_meta
        or not is_eager()
        or _has_any_global_hook()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
    ):
        return None
    # Submodules and parameters are read from their dictionaries: nn.Module.__getattr__ takes ten times as long.
    modules: Any = layer._modules
    base, dropout = modules["base_layer"], modules["lora_dropout"]._modules.get(name)
    down, up = modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
    if not (type(base) is type(down) is type(up) is nn.Linear):
        return None
    p = 0.0
    if type(dropout) is nn.Dropout:
        if dropout.inplace or not 0 <= dropout.p < 1:
            return None
        p = dropout.p if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:
        return None
    for module in (base, down, up, dropout):
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return None
    weight: Any = base._parameters.get("weight")
    bias: Any = base._parameters.get("bias")
    a: Any = down._parameters.get("weight")
    b: Any = up._parameters.get("weight")
    strided = torch.strided
    for t in (weight, a, b) if bias is None else (weight, a, b, bias):
        if type(t) is not nn.Parameter or t.layout is not strided or hasattr(t, "ds_id"):
            return None
    dtype, scale = x.dtype, layer.scaling[name]
    if (
        type(scale) is not float
        or x.layout is not strided
        or weight.dtype is not dtype
        or (bias is not None and bias.dtype is not dtype)
        or a.dtype is not b.dtype
        or (a.dtype is not dtype and (layer.strict_dtype or a.dtype is not torch.float32 or dtype not in HALF))
        or (dtype not in HALF and dtype not in WIDE)
        or down._parameters.get("bias") is not None
        or up._parameters.get("bias") is not None
    ):
        return None
    return Proven(weight, bias, Adapter(a, b, scale, p))


class FusedLoraLinear(Fused, lora.Linear):
    """:class:`Fused` for ``peft.tuners.lora.Linear``.

    The name holds "Linear" because PEFT's ``target_modules="all-linear"`` looks for it in a class name.
    """

    usual = _usual

    @staticmethod
    def base_refusal(base: Any) -> Reason | None:
        """The reason for leaving another layer than nn.Linear or Conv1D itself, or another weight, to PEFT."""
        if type(base) is not nn.Linear and type(base) is not Conv1D:
            kind = class_name(base)
            return f"base_layer is a {kind}, not nn.Linear or Conv1D itself (quantised, parametrised or wrapped)"
        weight = base._parameters.get("weight")
        return exotic("base_layer", weight) if is_exotic(weight) else None

    def base_in_call(self, x: Tensor) -> Base | Reason:
        """The weights of an nn.Linear or a Conv1D, as they are."""
        base: Any = self._modules["base_layer"]
        kind = type(base)
        if (kind is nn.Linear or kind is Conv1D) and is_watched(base):
            return WATCHED["base_layer"]
        if reason := self.base_refusal(base):
            return reason
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if bias is not None and is_exotic(bias):
            return exotic("base_layer", bias)
        return Base(weight.T if kind is Conv1D else weight, bias)

    def dtype_refusal(self, x: Tensor, base: Base, adapter: Adapter) -> Reason | None:
        """One dtype throughout, or float32 adapters on half precision; whatever autocast brings to that."""
        return _dtypes(self.strict_dtype, x, *base, adapter.a, adapter.b)


class StrictLoraLinear(FusedLoraLinear):
    """:class:`FusedLoraLinear` that leaves float32 adapters on a half-precision base to PEFT, outside of autocast."""

    strict_dtype = True


# PEFT's class → ours, and ours for strict_dtype. The file for bitsandbytes adds its own.
KINDS: dict[type, tuple[type[Fused], type[Fused]]] = {lora.Linear: (FusedLoraLinear, StrictLoraLinear)}


def prove(layer: Any, x: Tensor) -> Proven | Reason:
    """Returns the operands of this call, or the reason why PEFT's own forward must run."""
    if layer.disable_adapters:
        return DISABLED
    if layer.merged:
        if not torch.compiler.is_compiling():
            # PEFT merges, and unmerges, behind the version of a weight.
            forget_norms(layer.base_layer.weight)
        return MERGED
    if not layer.cast_input_dtype_enabled:
        return "casting of the input is switched off (disable_input_dtype_casting)"
    if reason := _context():
        return reason

    base: Base | Reason = layer.base_in_call(x)
    if isinstance(base, str):
        return base

    downs: Any = layer._modules["lora_A"]
    names = [name for name in layer.active_adapters if name in downs._modules]
    if not names:
        return NO_ADAPTER
    adapter = adapter_of(layer, names)
    if isinstance(adapter, str):
        return adapter

    if reason := refused_input(x) or layer.dtype_refusal(x, base, adapter):
        return reason
    return Proven(*base, adapter)


def _context() -> Reason | None:
    """Gives the reason if something around the call would see the inside of PEFT's forward."""
    if _has_any_global_hook():
        return "a global module hook would miss the submodules' calls"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            return "torch.export with strict=False traces with tensors that have no data: pass strict=True"
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transforms and forward-mode AD need plain torch operators"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace needs plain torch operators"
    return None


def _dtypes(strict: bool, x: Tensor, weight: Any, bias: Any, a: Tensor, b: Tensor) -> Reason | None:
    """Gives the reason if ``lora_linear`` does not take these dtypes, or its result would have another than PEFT's."""
    dtype, adapter = x.dtype, a.dtype
    if adapter is not b.dtype:
        return f"lora_A is {dtype_name(adapter)} and lora_B {dtype_name(b.dtype)}"
    if torch.is_autocast_enabled(x.device.type):
        operands = (x, weight, a) if bias is None else (x, weight, a, bias)
        if all(t.dtype is torch.float32 or t.dtype in HALF for t in operands):
            return None
        return "autocast leaves some of the operands in their dtype"
    if weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
        return f"x is {dtype_name(dtype)} and base_layer {dtype_name(weight.dtype)}, without autocast"
    if dtype in HALF:
        if adapter is torch.float32:
            return STRICT if strict else None
    elif dtype not in WIDE:
        return f"x is {dtype_name(dtype)}"
    return None if adapter is dtype else f"lora_A is {dtype_name(adapter)} on a {dtype_name(dtype)} base"
