"""Merges the active adapter into the base of a whole model and takes it out again; reports the rounding.

A merged weight is ``W + scale · B A``, computed in float32 and rounded once to the dtype of W. Taken out, the base is
what it was, bit for bit: it is set aside, not computed back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..mergeable import Update, check_untied, folded
from ..text import dtype_name
from .layer import AdaptedLinear, restore
from .model import adapted_layers, adapted_model, injected_models, unload

# Elements measured at a time: float64 copies of a whole weight would take several times its memory.
_BLOCK = 1 << 18


class LayerMerge(NamedTuple):
    """One merged weight: its distance from the exact sum (float64), and the size of the update."""

    name: str
    dtype: torch.dtype
    max_error: float
    rms_error: float
    rms_update: float

    @property
    def lost(self) -> float:
        """RMS of the rounding over RMS of the update: 0 is exact, 1 is an update lost in rounding."""
        return self.rms_error / self.rms_update if self.rms_update else 0.0


@dataclass(frozen=True)
class MergeReport:
    """The rounding of a merge, layer by layer; ``print`` it."""

    layers: tuple[LayerMerge, ...]

    @property
    def max_error(self) -> float:
        """The largest distance of a merged weight from the exact sum."""
        return max((layer.max_error for layer in self.layers), default=0.0)

    def __str__(self) -> str:
        dtypes = ", ".join(sorted({dtype_name(layer.dtype) for layer in self.layers}))
        lines = [
            f"{len(self.layers)} layers merged in {dtypes}: rounding lost at most {self.max_error:.3g} of a weight"
        ]
        for layer in sorted(self.layers, key=lambda layer: -layer.lost)[:3]:
            lines.append(
                f"  {layer.name}: update RMS {layer.rms_update:.3g}, rounding RMS {layer.rms_error:.3g} "
                f"({layer.lost:.2%}), at most {layer.max_error:.3g}"
            )
        return "\n".join(lines)


@torch.no_grad()
def fold_and_measure(name: str, weight: Tensor, update: Update) -> tuple[Tensor, LayerMerge]:
    """Computes the merged weight and measures its rounding.

    Raises:
        ValueError: the sum is not finite: the adapter is not, or it overflows the dtype of the weight.
    """
    merged = folded(weight, update, name)
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    right = update.right.to(exact)
    largest = error_squares = update_squares = 0.0
    height = max(1, _BLOCK // weight.shape[1])
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, weight.shape[0], height):
            rows = slice(start, start + height)
            added = update.scale * (update.left[rows].to(exact) @ right)
            error = merged[rows].to(exact) - (weight[rows].to(exact) + added)
            largest = max(largest, error.abs().max().item())
            error_squares += error.square().sum().item()
            update_squares += added.square().sum().item()
    count = weight.numel()
    rms_error, rms_update = math.sqrt(error_squares / count), math.sqrt(update_squares / count)
    return merged, LayerMerge(name, weight.dtype, largest, rms_error, rms_update)


def merge_adapter(model: nn.Module) -> MergeReport:
    """Folds the active adapter into the base weights: from then on each layer is one plain GEMM, and nothing trains.

    The base weights are set aside, so memory grows by them; :func:`unmerge_adapter` puts them back, bit for bit, and
    :func:`merge_and_unload` merges for good without the copy.

    Returns:
        The rounding, layer by layer.

    Raises:
        ValueError: the model has no adapters; a merged weight would not be finite; or a weight is tied to another
            module's, where the merge would show too.
        RuntimeError: no adapter is active, or all are switched off.
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
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Folds the active adapter into the base weights for good, and takes all adapters away.

    The layers are plain ``nn.Linear`` (or ``Conv1D``) again: the model runs, saves and unpickles without fastlora.
    :func:`merge_adapter` reports beforehand how much the rounding loses.

    Returns:
        The model, which is the one given, unwrapped.

    Raises:
        ValueError, RuntimeError: as :func:`merge_adapter` does; nothing is changed then.
    """
    model, layers = _to_merge(model)
    _measured(layers)
    for _, layer in layers:
        # Base weights are freed layer by layer, so that at most one weight is in memory twice.
        if not layer.merged:
            layer.weight.data = folded(layer.weight, layer._update())
        restore(layer)
    return unload(model)


def _measured(layers: list[tuple[str, AdaptedLinear]]) -> MergeReport:
    """Measures all layers before the first is changed, so that an error leaves the model as it was."""
    reports = []
    for name, layer in layers:
        reports.append(fold_and_measure(name, layer._unmerged_weight, layer._update())[1])
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
    return model, layers
