"""``FusedLinear4bit``, ``FusedLinear8bitLt``: PEFT's layers on bitsandbytes' ones, on fastlora where that is proven.

The base's own forward is not called: what it would settle at its first call is settled here, and what it does besides,
such as packing its weight anew for a CPU in calls without gradients, is not done.

Imports peft's file for bitsandbytes, which exists where bitsandbytes does; imported inside functions only.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import bnb
from torch import Tensor

from ..dtypes import HALF
from ..gated import is_watched
from ..quantised import dense_dtype, is_quantised, quantised_as, stored_weight, why_not_stored
from ..text import class_name, dtype_name
from .adapter import Adapter
from .layer import KINDS, Base, Fused
from .reasons import STRICT, WATCHED, Reason, exotic, is_exotic, refused_input


class Quantised(Fused):
    """:class:`Fused` on a layer of bitsandbytes, whose weight is asked of it in each call."""

    @staticmethod
    def base_refusal(base: Any) -> Reason | None:
        """The reason for leaving a layer that is none of bitsandbytes' itself, or has no state yet, to PEFT."""
        return why_not_stored(base) if is_quantised(base) else _another(base)

    @staticmethod
    def base_dtype(base: Any) -> torch.dtype:
        """That in which the layer computes; inside of :func:`fastlora.merged` that of the sum in its place."""
        return dense_dtype(base) if is_quantised(base) else Fused.base_dtype(base)

    @staticmethod
    def base_words(base: Any) -> str | None:
        """How it is quantised, and what is done with it; nothing of the sum in its place while merged."""
        if not is_quantised(base):
            return None
        if quantised_as(base) == "int8":
            return "an 8-bit base, multiplied by bitsandbytes, dequantised in the backward"
        return f"a 4-bit base ({quantised_as(base)}), dequantised for each product"

    def base_in_call(self, x: Tensor) -> Base | Reason:
        """The stored weight and the bias, in whichever dtype that is."""
        base: Any = self._modules["base_layer"]
        # First, because a weight that has no dtype to compute in yet takes that of x.
        if reason := refused_input(x):
            return reason
        if is_watched(base):
            return WATCHED["base_layer"]
        if not is_quantised(base):
            return _another(base)
        weight, bias = stored_weight(base, x), base._parameters.get("bias")
        if isinstance(weight, str):
            return weight
        return exotic("base_layer", bias) if bias is not None and is_exotic(bias) else Base(weight, bias)

    def dtype_refusal(self, x: Tensor, base: Base, adapter: Adapter) -> Reason | None:
        """The weight's own dtype for the products, that of x for the result."""
        weight: Any = base.weight
        compute, dtype, other = weight.compute_dtype(x), adapter.a.dtype, adapter.b.dtype
        if dtype is not other:
            return f"lora_A is {dtype_name(dtype)} and lora_B {dtype_name(other)}"
        for name, each in (("x", x.dtype), ("the dtype in which base_layer computes", compute), ("lora_A", dtype)):
            if each is not torch.float32 and each not in HALF:
                return f"{name} is {dtype_name(each)}"
        if dtype in HALF and compute in HALF and dtype is not compute:
            return (
                f"lora_A is {dtype_name(dtype)}, which {dtype_name(compute)}, in which the base computes, cannot hold"
            )
        if torch.is_autocast_enabled(x.device.type):
            return self._autocast_refusal(x, compute, adapter.magnitude is not None)
        if torch.is_autocast_enabled() and x.device.type != "cuda":
            return "autocast is on for a GPU and x is on another device"
        if dtype is torch.float32 and compute in HALF:
            if x.dtype is torch.float32:
                return (
                    f"x and lora_A are float32 and the base computes in {dtype_name(compute)}, without autocast: PEFT "
                    "computes the adapter in float32 (with the Trainer, bf16=True or fp16=True turns autocast on)"
                )
            return STRICT if self.strict_dtype else None
        return None

    def _autocast_refusal(self, x: Tensor, compute: torch.dtype, of_dora: bool) -> Reason | None:
        """The reason if the base's dtypes and autocast's are such that PEFT's result is more precise, or another."""
        autocast = torch.get_autocast_dtype(x.device.type)
        words = f"under autocast in {dtype_name(autocast)}"
        if self._casts_as_autocast_does(x) and x.dtype is not autocast:
            return f"{words} an 8-bit base on a {x.device.type} in training gives that, not {dtype_name(x.dtype)}"
        if compute in HALF and compute is not autocast:
            return f"{words} the base computes in {dtype_name(compute)}, and the adapter would not"
        if x.device.type == "cuda" and x.dtype in HALF and (of_dora or x.dtype is not autocast):
            return f"{words} the result for {dtype_name(x.dtype)} is float32"
        return None

    def _casts_as_autocast_does(self, x: Tensor) -> bool:
        """Whether the base's product is one of torch's own, which autocast knows."""
        return False


def _another(base: Any) -> Reason:
    return f"base_layer is a {class_name(base)}, not Linear4bit or Linear8bitLt of bitsandbytes itself"


class FusedLinear4bit(Quantised, bnb.Linear4bit):
    """:class:`Quantised` for ``peft.tuners.lora.bnb.Linear4bit``."""


class StrictLinear4bit(FusedLinear4bit):
    """:class:`FusedLinear4bit` that leaves float32 adapters on a half-precision base to PEFT, outside of autocast."""

    strict_dtype = True


class FusedLinear8bitLt(Quantised, bnb.Linear8bitLt):
    """:class:`Quantised` for ``peft.tuners.lora.bnb.Linear8bitLt``."""

    def _casts_as_autocast_does(self, x: Tensor) -> bool:
        base: Any = self._modules["base_layer"]
        return bool(base.training) and x.device.type in ("cpu", "xpu")


class StrictLinear8bitLt(FusedLinear8bitLt):
    """:class:`FusedLinear8bitLt` that leaves float32 adapters on a half-precision base to PEFT, outside of autocast."""

    strict_dtype = True


KINDS[bnb.Linear4bit] = (FusedLinear4bit, StrictLinear4bit)
KINDS[bnb.Linear8bitLt] = (FusedLinear8bitLt, StrictLinear8bitLt)
