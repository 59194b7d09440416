"""Who else has a weight, so that no sum can be stored in it, or would show elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .ops.dtensor import is_sharded


def owner_of(layer: nn.Module, tensor: Tensor) -> str | None:
    """Names who else keeps a tensor of a layer, and may put another in its place; None where nobody does."""
    if getattr(layer, "_is_fsdp_managed_module", False):  # FSDP's own mark, 1 and 2, gathered or not
        return "FSDP, which keeps the weights itself"
    if is_sharded(tensor):
        return "a device mesh: it is a DTensor"
    return "DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") else None


def why_not_mergeable(layer: nn.Module) -> str | None:
    """Gives the reason why no sum can be stored in the weight of ``layer``, with the remedy; None where it can.

    The sum would be stored in an object that is not read, and the layer would go on without the update, silently.
    """
    weight: Any = layer.weight
    if is_parametrized(layer, "weight"):
        return "weight is parametrised: call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
    owner = owner_of(layer, weight)
    if owner is None:
        return None
    return f"weight belongs to {owner}: gather the state dict, load it into an unsharded model and merge there"


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside the wrappers of torch.compile and data parallel, whose names the adapters have."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_untied(model: nn.Module, holders: Mapping[str, nn.Module], last: str = "weight") -> None:
    """Looks for the weights in which sums are to be stored in the rest of the model.

    Args:
        model: the model.
        holders: the name of each module whose weight is to hold a sum → the module.
        last: the name of the weight, or ``"bias"``.

    Raises:
        ValueError: another module has such a weight too.
    """
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(f"{name}.{own}")
    for name, holder in holders.items():
        others = [place for place in places.get(id(getattr(holder, last)), ()) if place != f"{name}.{last}"]
        if others:
            raise ValueError(
                f"{name}.{last} is tied to {others[0]}, where a merge would show too: untie it first (give {name} its "
                "own Parameter, and set tie_word_embeddings=False in a transformers config)"
            )
