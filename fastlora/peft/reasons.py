"""The reasons, in words, why a call of a patched layer runs PEFT's own forward, and what several proofs look at."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Reason: TypeAlias = str

DISABLED = "the adapters are disabled"
MERGED = "the adapter is merged into the base weight"
ARGUMENTS = "forward got more than x (adapter_names of a mixed batch, or offsets of a variant)"
NO_ADAPTER = "none of the active adapters is in this layer"
MASKS = "several adapters are active with dropout: each has a mask of its own, so they are no single product"
STRICT = "strict_dtype keeps PEFT's float32 branch for float32 adapters on a half-precision base"

# States that a user chose: no warning.
ASKED_FOR = frozenset({DISABLED, MERGED, ARGUMENTS, STRICT})

TENSORS = (Tensor, nn.Parameter)

WATCHED = {
    name: f"{name} has hooks, a forward or a class of its own, which reading its weight would skip"
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout")
}


def is_exotic(weight: Any) -> bool:
    """Returns True unless the weight is a plain dense Parameter.

    DTensors and quantised weights are subclasses, FSDP and weight_norm put plain tensors, ZeRO-3 leaves a stub.
    """
    return type(weight) is not nn.Parameter or weight.layout is not torch.strided or hasattr(weight, "ds_id")


def exotic(name: str, weight: Any) -> Reason:
    """Gives the reason for leaving a weight that is no plain dense Parameter to PEFT."""
    if hasattr(weight, "ds_id"):
        return f"a weight of {name} is partitioned by DeepSpeed's ZeRO-3"
    if weight is None:
        return f"the weight of {name} is no Parameter (FSDP1 and weight_norm put a tensor there)"
    return f"a weight of {name} is a {type(weight).__name__}, not a plain dense Parameter"


def variant(layer: Any, name: str) -> Reason:
    """Gives the reason for leaving an adapter that is no plain LoRA to PEFT."""
    return f"the adapter is a variant of LoRA ({type(layer.lora_variant[name]).__name__})"


def refused_input(x: Any) -> Reason | None:
    """Gives the reason for leaving an x to PEFT."""
    if type(x) not in TENSORS or x.layout is not torch.strided or x.is_nested or x.is_meta:
        return "x is no plain dense tensor with data"
    return None
