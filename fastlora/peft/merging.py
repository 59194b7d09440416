"""The adapters of PEFT's linear layers folded into their base weights for a while, and taken out again bit for bit.

PEFT's own ``merge`` adds to the weight, and its ``unmerge`` subtracts again: each pair leaves the rounding of both.
Here the base is set aside and given back. Nothing imports peft as this file loads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import FLOATING, wide_of
from ..mergeable import Keep, Update, base_weight, fill, folded, folded_bias, scaled_bias, set_aside
from ..ownership import why_not_mergeable
from ..quantised import dense_linear, is_quantised
from ..text import class_name, dtype_name
from .reasons import Reason

_FOLDABLE = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
}


def is_lora(layer: nn.Module) -> bool:
    """Whether a module is one of the layers of PEFT's LoRA, of any kind."""
    # Not imported here: where nobody has, no layer is, and peft may be missing.
    lora = sys.modules.get("peft.tuners.lora.layer")
    return lora is not None and isinstance(layer, lora.LoraLayer)


def active_adapters(layer: Any) -> list[str]:
    """The names of the adapters that a layer of PEFT's adds to its base now: none if merged or disabled."""
    if layer.merged or layer.disable_adapters:
        return []
    parts = {name for dictionary in (layer.lora_A, layer.lora_embedding_A) for name in dictionary}
    return [name for name in dict.fromkeys(layer.active_adapters) if name in parts]


def why_not_foldable(layer: Any, names: Sequence[str]) -> Reason | None:
    """Gives the reason why these adapters cannot be folded into a base, with the remedy; None where they can."""
    from peft.tuners.lora.variants import DoraLinearVariant

    kind, base = _kind_of(layer), layer.base_layer
    if (kind.__module__, kind.__name__) not in _FOLDABLE:
        return (
            f"a {kind.__module__}.{kind.__name__} is none of the layers that can be: peft.tuners.lora.Linear, "
            "Linear4bit and Linear8bitLt"
        )
    if "forward" in layer.__dict__ and not hasattr(layer, "_hf_hook"):
        return "its forward was replaced on the instance (X-LoRA does so), and no sum of weights computes that"
    for name in names:
        if type(variant := layer.lora_variant.get(name)) not in (type(None), DoraLinearVariant):
            return f"adapter {name!r} is a {type(variant).__name__}: only plain LoRA, lora_bias and DoRA can be"
    if len(names) > 1 and any(name in layer.lora_variant for name in names):
        return f"adapters {list(names)} are active together and one is DoRA, so they are no sum: set one of them active"
    return None if is_quantised(base) else _why_not_base(base)


def _why_not_base(base: Any) -> Reason | None:
    from .layer import Conv1D

    kind = type(base)
    if kind is not Conv1D and not (isinstance(base, nn.Linear) and kind.forward is nn.Linear.forward):
        return f"base_layer is a {class_name(base)}, whose forward is not known: nn.Linear and Conv1D can hold a sum"
    if (reason := why_not_mergeable(base)) is not None:
        return reason
    weight = base.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.dtype not in FLOATING:
        return f"its base weight is a {type(weight).__name__} of {dtype_name(weight.dtype)}, which cannot hold a sum"
    return None


def _kind_of(layer: nn.Module) -> type:
    """PEFT's class of a layer that may have one of this package."""
    ours = __package__.split(".")[0] + "."
    return next(kind for kind in type(layer).__mro__ if not kind.__module__.startswith(ours))


def update_of(layer: Any, names: Sequence[str]) -> Update:
    """The sum of the updates of some adapters of a layer, as one product."""
    from .layer import Conv1D

    base = layer.base_layer
    turned, device = isinstance(base, Conv1D), base.weight.device
    scales = [float(layer.scaling[name]) for name in names]
    lora_as = [layer.lora_A[name].weight.detach().to(device) for name in names]
    lora_bs = [layer.lora_B[name].weight.detach().to(device) for name in names]
    biases = [
        scaled_bias(bias.detach().to(device), scale)
        for scale, name in zip(scales, names, strict=True)
        if (bias := layer.lora_B[name].bias) is not None
    ]
    bias = torch.stack(biases).sum(0) if biases else None
    if len(names) == 1:
        dora = layer.lora_magnitude_vector[names[0]].weight.detach().to(device) if layer.lora_variant else None
        return Update.of(lora_as[0], lora_bs[0], scales[0], turned, dora, bias)
    wide = wide_of(lora_as[0].dtype)
    lora_b = torch.cat([scale * b.to(wide) for scale, b in zip(scales, lora_bs, strict=True)], dim=1)
    return Update.of(torch.cat([a.to(wide) for a in lora_as]), lora_b, 1.0, turned, bias=bias)


class DenseBase(nn.Linear):
    """What stands in for a quantised base while merged: a dense layer that takes and gives the dtype of its input.

    Its state dict is that of the packed layer, which waits in ``packed``.
    """

    def __init__(self, packed: Any, weight: Tensor, bias: Tensor | None) -> None:
        n, k = weight.shape
        super().__init__(k, n, bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        self.train(packed.training)
        # In a tuple: no child, so that it is neither moved nor listed.
        self.packed = (packed,)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., N], multiplied in the dtype of the weight."""
        return dense_linear(x, self.weight, self.bias)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The packed layer's."""
        return self.packed[0].state_dict(*args, **kwargs)


class Folding:
    """One layer of PEFT's whose active adapters are folded into its base weight, and what it was before.

    While merged, the layer's ``unmerge`` is this one's: PEFT calls it before it runs the base alone
    (``disable_adapter``) or changes which adapters are active, and finds the base as it was, bit for bit. The layer's
    state dict holds the base, and loading one unmerges the layer. PEFT's ``merge`` is refused: the end of the block
    would take out what it merged.
    """

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        self.adapters = active_adapters(layer)
        self.keep: Keep = "device"
        self.merged = False
        self._bases: dict[str, Tensor] = {}
        self._packed: Any = None
        self._handles: list[Any] = []

    @property
    def holder(self) -> Any:
        """The module whose weight gets the sum."""
        return self.layer.base_layer

    @property
    def holder_name(self) -> str:
        """Its name in the model."""
        return f"{self.name}.base_layer".lstrip(".")

    @property
    def why_not(self) -> Reason | None:
        """Why the adapters cannot be folded in, with the remedy; None where they can."""
        return why_not_foldable(self.layer, self.adapters)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, keep: Keep) -> None:
        """Folds the adapters in: computed in float32 and rounded once.

        Raises:
            RuntimeError: an adapter has a bias and the layer has none.
            ValueError: the sum is not finite; the layer is then as it was.
        """
        layer, base = self.layer, self.holder
        update, called = update_of(layer, self.adapters), self.name or f"a {type(layer).__name__}"
        weight = folded(base_weight(base), update, f"the weight of {called}")
        bias = folded_bias(base.bias, update, f"the bias of {called}")
        self.merged, self.keep = True, keep
        try:
            if is_quantised(base):
                self._packed = base
                layer.base_layer = DenseBase(base, weight, base.bias if bias is None else bias)
            else:
                for which, total in (("weight", weight), ("bias", bias)):
                    if total is not None:
                        self._bases[which] = set_aside(getattr(base, which), keep)
                        fill(getattr(base, which), total, keep)
            layer.merged_adapters = list(self.adapters)
            layer.unmerge, layer.merge = self.unmerge, _refuse_to_merge
            # torch sets an attribute of the hook, which a method has no room for.
            self._handles = [
                layer.register_state_dict_post_hook(partial(self._save_base)),
                layer.register_load_state_dict_pre_hook(self._before_load),
            ]
        except BaseException:  # no memory for a copy, or interrupted
            self.unmerge()
            raise

    def unmerge(self, *_: Any) -> None:
        """Gives weight and bias back, bit for bit, or the packed layer. Not merged: no-op."""
        if not self.merged:
            return
        layer = self.layer
        if self._packed is not None:
            self._packed.train(layer.base_layer.training)
            layer.base_layer, self._packed = self._packed, None
        for which, base in self._bases.items():
            fill(getattr(layer.base_layer, which), base, self.keep)
        self._bases = {}
        for handle in self._handles:
            handle.remove()
        layer.__dict__.pop("unmerge", None)
        layer.__dict__.pop("merge", None)
        layer.merged_adapters = []
        self.merged = False

    def _save_base(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for which, base in self._bases.items():
            state_dict[f"{prefix}base_layer.{which}"] = base

    def _before_load(self, *_: Any) -> None:
        self.unmerge()


def _refuse_to_merge(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "the adapters are folded in by fastlora.merged, and the end of its block takes them out: call merge_adapter "
        "and merge_and_unload outside of it"
    )
