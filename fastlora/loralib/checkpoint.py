"""loralib's two helpers: one freezes all but the adapters, the other picks them out of a state dict."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import LoRALayer

_BIAS = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes every parameter whose name lacks ``lora_``, then asks for the gradients of some biases.

    Args:
        model: any model.
        bias: ``"none"``; ``"all"``, every parameter with ``bias`` in its name; or ``"lora_only"``, the ``bias`` of each
            :class:`LoRALayer` (a convolution keeps its own in ``conv``, and it stays frozen, as in loralib).

    Raises:
        NotImplementedError: ``bias`` is none of these.
    """
    _check(bias)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = bias == "all" and "bias" in name
    if bias == "lora_only":
        for module in model.modules():
            own: Any = getattr(module, "bias", None)
            if isinstance(module, LoRALayer) and own is not None:
                own.requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Returns the part of a state dict that LoRA trains: the keys with ``lora_``, and some biases.

    Args:
        model: any model.
        bias: ``"none"``; ``"all"``, every key with ``bias`` in it; or ``"lora_only"``, the ``bias`` beside each
            ``lora_`` key.

    Raises:
        NotImplementedError: ``bias`` is none of these.
    """
    _check(bias)
    state: dict[str, Tensor] = model.state_dict()
    names = [name for name in state if "lora_" in name or (bias == "all" and "bias" in name)]
    if bias == "lora_only":
        # Each bias behind the first key that it is beside, which is loralib's order.
        names = [each for name in names for each in (name, name.split("lora_")[0] + "bias") if each in state]
    return {name: state[name] for name in names}


def _check(bias: str) -> None:
    if bias not in _BIAS:
        raise NotImplementedError(f"bias must be one of {', '.join(map(repr, _BIAS))}, got {bias!r}")
