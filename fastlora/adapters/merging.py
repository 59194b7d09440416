"""Merges the active adapter into the base of a whole model and takes it out again; reports the rounding.

A merged weight is ``W + scale · B A``, of a DoRA with its rows given their lengths, computed in float32 and rounded
once to the dtype of W. Taken out, the base is what it was, bit for bit: it is set aside, not computed back.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dtypes import wide_of
from ..mergeable import Update, base_weight, folded, folded_bias
from ..ownership import check_untied
from ..quantised import is_quantised, quantised_as
from ..text import dtype_name
from .layer import AdaptedLinear
from .model import adapted_layers, adapted_model, injected_models, unload
from .swap import make_dense, restore

_log = logging.getLogger("fastlora")

_FORGET = (
    ". Before save_pretrained, model.hf_quantizer.remove_quantization_config(model) lets the model forget that it was "
    "quantised"
)

# How many layers a report has a line of.
_WORST = 3

# Elements measured at a time: float64 copies of a whole weight would take several times its memory.
_BLOCK = 1 << 18


class LayerMerge(NamedTuple):
    """One merged weight: its distance from the exact sum (float64), and the size of the update.

    ``into`` says which weight was in the sum where that is not the layer's own, such as ``"dequantised nf4"``.
    """

    name: str
    dtype: torch.dtype
    max_error: float
    rms_error: float
    rms_update: float
    into: str = ""

    @property
    def lost(self) -> float:
        """RMS of the rounding over RMS of the update: 0 is exact, 1 is an update lost in rounding."""
        return self.rms_error / self.rms_update if self.rms_update else 0.0


@dataclass(frozen=True)
class MergeReport:
    """The rounding of a merge, layer by layer, and a note on what was merged into; ``print`` it."""

    layers: tuple[LayerMerge, ...]
    note: str = ""

    @property
    def max_error(self) -> float:
        """The largest distance of a merged weight from the exact sum."""
        return max((layer.max_error for layer in self.layers), default=0.0)

    @property
    def _dequantised(self) -> Counter[tuple[str, torch.dtype]]:
        """What quantised layers were merged into, such as ``"dequantised nf4"``, and in which dtype → their number."""
        return Counter((layer.into, layer.dtype) for layer in self.layers if layer.into)

    def __str__(self) -> str:
        dtypes = ", ".join(sorted({dtype_name(layer.dtype) for layer in self.layers}))
        lines = [
            f"{len(self.layers)} layers merged in {dtypes}: rounding lost at most {self.max_error:.3g} of a weight"
        ]
        for (into, dtype), count in self._dequantised.items():
            lines.append(
                f"  {count} into the {into} weight, in {dtype_name(dtype)}: not into the one that was quantised"
            )
        worst = sorted(self.layers, key=lambda layer: -layer.lost)[:_WORST]
        if len(worst) < len(self.layers):
            lines.append(f"  the {len(worst)} that lost the most:")
        for layer in worst:
            lines.append(
                f"  {layer.name}: update RMS {layer.rms_update:.3g}, rounding RMS {layer.rms_error:.3g} "
                f"({layer.lost:.2%}), at most {layer.max_error:.3g}"
            )
        return "\n".join(lines + ([self.note] if self.note else []))


@torch.no_grad()
def fold_and_measure(name: str, weight: Tensor, update: Update) -> tuple[Tensor, LayerMerge]:
    """Computes the merged weight and measures its rounding.

    Raises:
        ValueError: the sum is not finite: the adapter is not, or it overflows the dtype of the weight.
    """
    merged = folded(weight, update, name)
    return merged, _measure(name, weight, merged, update)


def _measure(name: str, weight: Tensor, merged: Tensor, update: Update) -> LayerMerge:
    """The distance of a merged weight from the exact sum, in float64 and a few rows at a time."""
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    right = update.right.to(exact)
    largest = error_squares = update_squares = 0.0
    height = max(1, _BLOCK // weight.shape[1])
    blocks = [slice(start, start + height) for start in range(0, weight.shape[0], height)]

    def added_to(rows: slice) -> Tensor:
        """What is added to these rows, before DoRA gives each its length."""
        return update.scale * (update.left[rows].to(exact) @ right)

    with torch.autocast(weight.device.type, enabled=False):
        gain = None
        if update.magnitude is not None:
            across = 0 if update.turned else 1
            squares = [(weight[rows].to(exact) + added_to(rows)).square().sum(across, True) for rows in blocks]
            gain = _gain(update, update.magnitude, torch.cat(squares))
        for rows in blocks:
            base, added = weight[rows].to(exact), added_to(rows)
            total = base + added
            if gain is not None:
                total *= gain if update.turned else gain[rows]
                added = total - base
            error = merged[rows].to(exact) - total
            largest = max(largest, error.abs().max().item())
            error_squares += error.square().sum().item()
            update_squares += added.square().sum().item()
    count = weight.numel()
    rms_error, rms_update = math.sqrt(error_squares / count), math.sqrt(update_squares / count)
    return LayerMerge(name, weight.dtype, largest, rms_error, rms_update)


def _gain(update: Update, magnitude: Tensor, squares: Tensor) -> Tensor:
    """What DoRA multiplies the rows of the sum by, [1, N] where the weight is turned, else [N, 1].

    ``squares`` are those of the sum's elements, summed: of each row, or of each column in each block of rows.
    """
    norm = (squares.sum(0, keepdim=True) if update.turned else squares).sqrt()
    return magnitude.to(norm.dtype).view_as(norm) / norm


def merge_adapter(model: nn.Module) -> MergeReport:
    """Folds the active adapter into the base weights: from then on each layer is one plain GEMM, and nothing trains.

    The base weights are set aside, so memory grows by them; :func:`unmerge_adapter` puts them back, bit for bit, and
    :func:`merge_and_unload` merges for good without the copy. A quantised weight stays packed, and the sum with what it
    is dequantised to, which the adapter was trained on, lies dense beside it, in the dtype in which the layer computes
    (float16 for one of 8 bits).

    Returns:
        The rounding, layer by layer.

    Raises:
        ValueError: the model has no adapters; a merged weight would not be finite; or a weight is tied to another
            module's, where the merge would show too.
        RuntimeError: no adapter is active, or all are switched off; or the adapter has a bias of its own for a layer
            that has none.
    """
    model, layers = _to_merge(model)
    report = _measured(layers)
    for _, layer in layers:
        layer.merge()
    return report


def unmerge_adapter(model: nn.Module) -> None:
    """Puts the base weights back, bit for bit. Not merged: no-op.

    Raises:
        ValueError: the model has no adapters.
    """
    for _, layer in adapted_layers(adapted_model(model)[0]):
        layer.unmerge()


@torch.inference_mode(False)
@torch.no_grad()
def merge_and_unload(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Folds the active adapter into the base weights for good, and takes all adapters away.

    The layers are plain ``nn.Linear`` (or ``Conv1D``) again: the model runs, saves and unpickles without fastlora.
    :func:`merge_adapter` reports beforehand how much the rounding loses. A quantised layer becomes an ``nn.Linear``
    too, dense. It is not quantised again, which would lose much of the update; a warning of
    ``logging.getLogger("fastlora")`` says so.

    Args:
        model: a model with adapters.
        dtype: of the layers that were quantised, where the model computes in another than they did; by default that in
            which they computed (float16 for those of 8 bits). Others keep theirs.

    Returns:
        The model, which is the one given, unwrapped.

    Raises:
        ValueError, RuntimeError: as :func:`merge_adapter` does; nothing is changed then.
    """
    model, layers = _to_merge(model)
    measured = _measured(layers)
    for _, layer in layers:
        # Base weights are freed layer by layer, so that at most one weight is in memory twice.
        update = layer._update()
        if not layer.merged and (bias := folded_bias(layer.bias, update)) is not None:
            layer.bias.data = bias
        if is_quantised(layer):
            dense = _dense_sum(layer, update, dtype)
            restore(layer)
            make_dense(layer, dense)
        else:
            if not layer.merged:
                layer.weight.data = folded(layer.weight, update)
            restore(layer)
    unload(model)
    for (into, own), count in measured._dequantised.items():
        _log.warning(
            "%d layers are dense now, nn.Linear in %s, with the sum of the adapter and the %s weight; dtype=... of "
            "merge_and_unload asks for another dtype%s",
            count, dtype_name(dtype or own), into, _FORGET if hasattr(model, "hf_quantizer") else "",
        )  # fmt: skip
    return model


def _dense_sum(layer: AdaptedLinear, update: Update, dtype: torch.dtype | None) -> Tensor:
    """The merged weight of a quantised layer, in the dtype asked for."""
    base = base_weight(layer)
    if dtype not in (None, base.dtype):
        return folded(base.to(wide_of(base.dtype)), update).to(dtype)
    return folded(base, update) if layer._merged_weight is None else layer._merged_weight


def _measured(layers: list[tuple[str, AdaptedLinear]]) -> MergeReport:
    """Measures all layers before the first is changed, so that an error leaves the model as it was."""
    reports = []
    for name, layer in layers:
        update = layer._update()
        folded_bias(layer._unmerged_bias, update, f"{name}.bias")
        base = base_weight(layer) if is_quantised(layer) else layer._unmerged_weight
        into = f"dequantised {quantised_as(layer)}" if is_quantised(layer) else ""
        reports.append(fold_and_measure(name, base, update)[1]._replace(into=into))
    return MergeReport(tuple(reports))


def _to_merge(model: nn.Module) -> tuple[nn.Module, list[tuple[str, AdaptedLinear]]]:
    model, state = adapted_model(model)
    active = state.active
    if active is None:
        raise RuntimeError("no adapter is active: call fastlora.set_adapter(model, name) first, or unload(model)")
    if any(state.disabled for _, state in injected_models(model)):
        raise RuntimeError("the adapters are switched off: call fastlora.enable(model) first, or unload(model)")
    layers = list(adapted_layers(model, active))
    check_untied(model, dict(layers))
    check_untied(model, {name: layer for name, layer in layers if layer._has("lora_bias", active)}, "bias")
    return model, layers
