"""``AdaptedLinear``: a linear layer with any number of named adapters, one of them active; made by ``fastlora.inject``.

The layer stays the object it was and changes its class, so that its Parameters, ties, hooks and place in the model stay
too; ``restore`` gives the class back. Its state dict keeps ``weight`` and ``bias`` and gains ``lora_A.<name>`` and
``lora_B.<name>``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import siblings
from ..mergeable import Mergeable, Update, owner_of, parameter_of
from ..ops.group import Branch
from ..ops.linear import lora_linear
from ..text import dtype_name
from .matching import is_conv1d
from .state import State

_BASE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class AdaptedLinear(Mergeable, nn.Linear):
    """An ``nn.Linear`` with adapters: ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias`` with the A and B of the active one.

    Made by :func:`fastlora.inject`, never constructed.
    """

    lora_A: nn.ParameterDict  # noqa: N815
    lora_B: nn.ParameterDict  # noqa: N815
    scale: dict[str, float]
    lora_dropout: dict[str, float]
    _state: State

    @property
    def active_adapter(self) -> str | None:
        """The model's active adapter, which need not have a part in this layer."""
        return self._state.active

    @property
    def adapters_disabled(self) -> bool:
        """True while the model's adapters are switched off."""
        return self._state.disabled

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]; merged, disabled or not adapted, exactly one GEMM."""
        state = self._state
        name: Any = state.active
        if state.disabled or name not in self.scale:
            return self._base(x, self._unmerged_weight if self.merged else self.weight)
        if self.merged:
            return self._base(x, self.weight)
        branch = self._branch(name)
        if siblings.formed and type(self) in _KINDS:
            return siblings.multiply(self, x, branch)
        weight, a, b, scale, bias, p = branch
        return lora_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=p)

    def lora_branch(self, x: Tensor) -> Branch | None:
        """What the layer would pass to ``lora_linear`` in a call with x; None where it does something else, or may."""
        state = self._state
        if type(self) not in _KINDS or state.disabled or self.merged or state.active not in self.scale:
            return None
        return self._branch(state.active)

    def _branch(self, name: Any) -> Branch:
        """What the layer passes to ``lora_linear`` with the adapter of this name."""
        weight = parameter_of(self, "weight")
        return Branch(
            weight.T if self.fan_in_fan_out else weight,
            parameter_of(self._modules["lora_A"], name),  # type: ignore[arg-type]
            parameter_of(self._modules["lora_B"], name),  # type: ignore[arg-type]
            self.scale[name],
            parameter_of(self, "bias"),
            self.lora_dropout[name] if self.training else 0.0,
        )

    @property
    def _has_update(self) -> bool:
        return not self._state.disabled and self._state.active in self.scale

    def _base(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def _base_repr(self) -> str:
        return super().extra_repr()

    def _update(self) -> Update:
        name: Any = self.active_adapter
        return Update.of(self.lora_A[name], self.lora_B[name], self.scale[name], self.fan_in_fan_out)

    def extra_repr(self) -> str:
        """The line inside ``AdaptedLinear(...)`` when printed."""
        ranks = ", ".join(f"{name!r} r={a.shape[0]}" for name, a in self.lora_A.items())
        text = f"{self._base_repr()}, adapters: {ranks}, active: {self.active_adapter!r}"
        return text + (", disabled" if self.adapters_disabled else "") + (", merged" if self.merged else "")


class AdaptedConv1D(AdaptedLinear):
    """A ``Conv1D`` of transformers with adapters: its weight is stored as [in, out] and read through its strides."""

    fan_in_fan_out = True

    def _base(self, x: Tensor, weight: Tensor) -> Tensor:
        # As Conv1D computes it, to the bit.
        y: Tensor = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    def _base_repr(self) -> str:
        k, n = self.weight.shape
        return f"in_features={k}, out_features={n}, bias={self.bias is not None}"


# Of a subclass nobody knows what it does around the product, or how it keeps its weight.
_KINDS = (AdaptedLinear, AdaptedConv1D)


def features(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, adapted or not."""
    first, second = layer.weight.shape
    return (first, second) if isinstance(layer, AdaptedConv1D) or is_conv1d(layer) else (second, first)


def obstacle(module: nn.Module, parent: nn.Module | None = None) -> str | None:
    """Gives the reason why this module cannot have an adapter, with the remedy; None where it can.

    Args:
        module: any module.
        parent: the module that holds it.
    """
    kind = type(module).__name__
    weight: Any = module._parameters.get("weight")
    if isinstance(module, AdaptedLinear):
        return _owned(module, weight)
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "nn.TransformerEncoderLayer reads its weight without calling it in eval mode: call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    if type(module) is not nn.Linear and not (is_conv1d(module) and kind == "Conv1D"):
        if isinstance(module, nn.Linear) or is_conv1d(module):
            return f"{kind} is a subclass, which may store something else as its weight: dequantise or unwrap it first"
        return f"{kind} is no linear layer: fastlora adapts nn.Linear and transformers' Conv1D"
    if "forward" in module.__dict__:
        return "its forward was replaced (by accelerate's hooks, for one): inject before that"
    if (reason := _owned(module, weight)) is not None:
        return reason
    if weight is None:
        return "its weight is no Parameter of its own (weight_norm computes it, for one): remove that first"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is {type(weight.data).__name__}, not a plain tensor: dequantise it first"
    if weight.dtype not in _BASE_DTYPES:
        return f"its weight is {dtype_name(weight.dtype)}: fastlora adapts floating-point weights"
    return None


def _owned(layer: nn.Module, weight: Tensor) -> str | None:
    owner = owner_of(layer, weight)
    return None if owner is None else f"its weight belongs to {owner}: inject before the model is sharded"


def add_adapter(
    layer: nn.Module, state: State, name: str, lora_a: Tensor, lora_b: Tensor, scale: float, lora_dropout: float
) -> None:
    """Adds an adapter to a layer that has no :func:`obstacle`; it does not train yet.

    The first adapter of a layer makes it read the model's ``state``.
    """
    if not isinstance(layer, AdaptedLinear):
        layer.__class__ = AdaptedConv1D if is_conv1d(layer) else AdaptedLinear
        assert isinstance(layer, AdaptedLinear)
        layer.lora_A, layer.lora_B = nn.ParameterDict(), nn.ParameterDict()
        layer.scale, layer.lora_dropout = {}, {}
        layer._state = state
        layer._become_mergeable()
    layer.lora_A[name] = nn.Parameter(lora_a, requires_grad=False)
    layer.lora_B[name] = nn.Parameter(lora_b, requires_grad=False)
    layer.scale[name], layer.lora_dropout[name] = scale, lora_dropout


def remove_adapter(layer: AdaptedLinear, name: str) -> None:
    """Removes one adapter; with the last one, the layer becomes what it was."""
    if layer.active_adapter == name:
        layer.unmerge()
    for values in (layer.lora_A, layer.lora_B, layer.scale, layer.lora_dropout):
        del values[name]
    if not layer.lora_A:
        restore(layer)


def restore(layer: Any) -> None:
    """Removes all adapters: the layer gets its old class and attributes back and keeps its weight as it is now."""
    siblings.dissolve(layer)
    layer._become_plain()
    for name in ("lora_A", "lora_B", "scale", "lora_dropout", "_state"):
        delattr(layer, name)
    if isinstance(layer, AdaptedConv1D):
        layer.__class__ = importlib.import_module("transformers.pytorch_utils").Conv1D
    else:
        layer.__class__ = nn.Linear
