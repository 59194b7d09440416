"""``AdaptedLinear``: a linear layer with any number of named adapters, one of them active; made by ``fastlora.inject``.

The layer stays the object it was and changes its class, so that its Parameters, ties, hooks and place in the model stay
too; ``restore`` gives the class back. Its state dict keeps ``weight`` and ``bias`` and gains ``lora_A.<name>`` and
``lora_B.<name>``, of an adapter with a bias of its own ``lora_bias.<name>``, and of DoRA ``lora_magnitude.<name>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import siblings
from ..mergeable import Mergeable, Update, joined_bias, parameter_of, scaled_bias
from ..ops.dora import dora_linear
from ..ops.group import Branch
from ..ops.linear import lora_linear
from ..quantised import dense_dtype, is_quantised, quantised_as
from .matching import is_conv1d
from .state import State

# What an adapter may have in a layer, each a ParameterDict by adapter; after the first two, where some adapter has it.
PARTS = ("lora_A", "lora_B", "lora_bias", "lora_magnitude")
_PARTS_OF_ALL = frozenset(PARTS[:2])


class AdaptedLinear(Mergeable, nn.Linear):
    """An ``nn.Linear`` with adapters: ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias`` with the A and B of the active one.

    Where that has a bias of its own, ``scale · lora_bias`` is added; where it is a DoRA, each row of W + scale · B A
    has the length that ``lora_magnitude`` says, as in :func:`fastlora.dora_linear`.

    Made by :func:`fastlora.inject`, never constructed.
    """

    lora_A: nn.ParameterDict  # noqa: N815
    lora_B: nn.ParameterDict  # noqa: N815
    scale: dict[str, float]
    lora_dropout: dict[str, float]
    _state: State
    # Whether the weight is stored otherwise than as a matrix.
    _is_packed = False

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
            return self._base(x)
        if self.merged:
            if self.training:
                self._note_training()
            return self._merged(x)
        branch = self._branch(name, x)
        # In this order: with few tokens a call of a function shows.
        if self._modules.keys() > _PARTS_OF_ALL and self._is_alone(name):
            return self._multiply_alone(name, x, branch)
        if siblings.formed and type(self) in KINDS:
            return siblings.multiply(self, x, branch)
        weight, a, b, scale, bias, p = branch
        return lora_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=p)

    def lora_branch(self, x: Tensor) -> Branch | None:
        """What the layer would pass to ``lora_linear`` in a call with x; None where it does something else, or may."""
        state = self._state
        if type(self) not in KINDS or state.disabled or self.merged or state.active not in self.scale:
            return None
        return None if self._is_alone(state.active) else self._branch(state.active, x)

    def _branch(self, name: Any, x: Tensor) -> Branch:
        """What the layer passes to ``lora_linear`` with the adapter of this name."""
        if self._is_packed:
            weight: Any = self._stored(x)
        else:
            weight = parameter_of(self, "weight")
            if self.fan_in_fan_out:
                weight = weight.T
        modules: Any = self._modules
        return Branch(
            weight,
            parameter_of(modules["lora_A"], name),
            parameter_of(modules["lora_B"], name),
            self.scale[name],
            self._bias(name) if "lora_bias" in modules else parameter_of(self, "bias"),
            self.lora_dropout[name] if self.training else 0.0,
        )

    def _stored(self, x: Tensor) -> Any:
        """The weight of a packed base for a call with x."""
        raise NotImplementedError

    def _multiply_alone(self, name: Any, x: Tensor, branch: Branch) -> Tensor:
        """The product of a layer that is in no group: DoRA's, or LoRA's with a bias of its own."""
        weight, a, b, scale, bias, p = branch
        if self._has("lora_magnitude", name):
            magnitude = parameter_of(self._modules["lora_magnitude"], name)  # type: ignore[arg-type]
            return dora_linear(x, weight, a, b, magnitude, scale=scale, bias=bias, dropout_p=p)
        return lora_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=p)

    @property
    def _has_update(self) -> bool:
        return not self._state.disabled and self._state.active in self.scale

    def _is_alone(self, name: Any) -> bool:
        """Whether the layer computes by itself with the adapter of this name.

        DoRA is another product. A bias of the adapter's own makes a new tensor in each call, of which nobody could tell
        that it is the one of the call before.
        """
        return self._has("lora_magnitude", name) or self._has("lora_bias", name)

    def _has(self, part: str, name: Any) -> bool:
        """Whether the adapter of this name has such a part here."""
        return part in self._modules and name in self._modules[part]  # type: ignore[operator]

    def _bias(self, name: str) -> Tensor | None:
        """bias + scale · lora_bias, in float32 and rounded once; of an adapter without one the bias itself."""
        bias: Tensor | None = parameter_of(self, "bias")
        if not self._has("lora_bias", name):
            return bias
        return self._rounded(joined_bias(bias, self._scaled_bias(name)))

    def _rounded(self, bias: Tensor) -> Tensor:
        """A bias that was computed wide, in the dtype that goes with the weight."""
        return bias.to(parameter_of(self, "weight").dtype)

    def _scaled_bias(self, name: str) -> Tensor:
        """scale · lora_bias [N] in float32, or wider."""
        return scaled_bias(parameter_of(self._modules["lora_bias"], name), self.scale[name])  # type: ignore[arg-type]

    def _base(self, x: Tensor) -> Tensor:
        """What the layer computes without adapters."""
        return self._linear(x, self._unmerged_weight, self._unmerged_bias) if self.merged else self._merged(x)

    def _merged(self, x: Tensor) -> Tensor:
        """What the layer computes with its weight and bias as they are."""
        return self._linear(x, self.weight, self.bias)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @property
    def _has_dora(self) -> bool:
        return "lora_magnitude" in self._modules

    def _base_repr(self) -> str:
        return super().extra_repr()

    def _update(self) -> Update:
        name: Any = self.active_adapter
        bias = self._scaled_bias(name) if self._has("lora_bias", name) else None
        magnitude = parts_of(self, name).get("lora_magnitude")
        return Update.of(self.lora_A[name], self.lora_B[name], self.scale[name], self.fan_in_fan_out, magnitude, bias)

    def extra_repr(self) -> str:
        """The line inside ``AdaptedLinear(...)`` when printed."""
        ranks = ", ".join(f"{name!r} r={a.shape[0]}" for name, a in self.lora_A.items())
        text = f"{self._base_repr()}, adapters: {ranks}, active: {self.active_adapter!r}"
        return text + (", disabled" if self.adapters_disabled else "") + (", merged" if self.merged else "")


class AdaptedConv1D(AdaptedLinear):
    """A ``Conv1D`` of transformers with adapters: its weight is stored as [in, out] and read through its strides."""

    fan_in_fan_out = True

    def _linear(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        # As Conv1D computes it, to the bit.
        y: Tensor = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    def _base_repr(self) -> str:
        k, n = self.weight.shape
        return f"in_features={k}, out_features={n}, bias={self.bias is not None}"


# Of a subclass nobody knows what it does around the product, or how it keeps its weight.
KINDS: set[type] = {AdaptedLinear, AdaptedConv1D}


def features(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, adapted or not."""
    if is_quantised(layer):
        return layer.in_features, layer.out_features
    first, second = layer.weight.shape
    return (first, second) if is_turned(layer) else (second, first)


def is_turned(layer: nn.Module) -> bool:
    """Whether a linear layer, adapted or not, stores its weight as [in, out]."""
    return isinstance(layer, AdaptedConv1D) or is_conv1d(layer)


def base_dtypes(layer: Any) -> tuple[torch.dtype, ...]:
    """The dtypes that an adapter can have for its base: that of the weight; of a quantised one those it computes in."""
    if not is_quantised(layer):
        return (layer.weight.dtype,)
    # One of 8 bits computes in the dtype of what it gets.
    return (torch.float16, torch.bfloat16) if quantised_as(layer) == "int8" else (dense_dtype(layer),)


def shapes_of(layer: Any, r: int, parts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's parts in a linear layer, adapted or not."""
    k, n = features(layer)
    shapes = {"lora_A": (r, k), "lora_B": (n, r), "lora_bias": (n,), "lora_magnitude": (n,)}
    return {part: shapes[part] for part in parts}


def parts_of(layer: AdaptedLinear, name: str) -> dict[str, Tensor]:
    """The Parameters of the adapter of this name in a layer, by part."""
    return {part: getattr(layer, part)[name] for part in PARTS if layer._has(part, name)}
