"""``fastlora.merged``: every adapter of a model folded into its base weight for the length of a block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from .adapters.model import share_states
from .mergeable import Keep, Mergeable, tell_no_more
from .ops.dtensor import is_sharded
from .ownership import check_untied, why_not_mergeable
from .peft import merging as peft_merging
from .quantised import is_quantised, why_not_stored
from .text import with_article


class _Part(Protocol):
    """A layer that is merged for a while."""

    name: str
    layer: Any

    @property
    def holder(self) -> Any:
        """The module whose weight gets the sum."""

    @property
    def holder_name(self) -> str:
        """Its name in the model."""

    @property
    def why_not(self) -> str | None:
        """Why the layer cannot be merged, with the remedy; None where it can."""

    def merge(self, keep: Keep) -> None:
        """Folds the update in."""

    def unmerge(self) -> object:
        """Gives the base back; not merged: no-op."""


class _OwnPart:
    """A layer of this package."""

    def __init__(self, name: str, layer: Mergeable) -> None:
        self.name, self.layer = name, layer
        self.holder = layer._holder
        self.holder_name = f"{name}.{layer._holder_name}".strip(".")

    @property
    def why_not(self) -> str | None:
        return None if is_quantised(self.holder) else why_not_mergeable(self.holder)

    def merge(self, keep: Keep) -> None:
        self.layer._fold_in(self.name or with_article(type(self.layer).__name__), keep)

    def unmerge(self) -> object:
        # Unloaded in the block, it is a plain layer again.
        return self.layer.unmerge() if isinstance(self.layer, Mergeable) else None


@contextmanager
def merged(model: nn.Module, *, keep: Keep = "device") -> Iterator[None]:
    """Folds every active adapter into its base weight for the length of a block: each layer is then one plain GEMM.

    ``W + Σ scale · B A`` (DoRA: each row given its length), computed in float32 and rounded once. At the end of the
    block, and after any exception in it, every base weight and bias is what it was, bit for bit, in the same Parameter
    and the same memory, however often this is done. For generation and evaluation between training steps::

        with fastlora.merged(model):
            model.generate(...)

    Layers: those of ``fastlora.inject``, ``LoRALinear`` and ``fastlora.loralib``, and PEFT's ``lora.Linear``,
    ``Linear4bit`` and ``Linear8bitLt``, patched or not, with plain LoRA, ``lora_bias`` or DoRA. What was merged before
    stays merged, so that an inner block does nothing; where adapters are disabled or none is active, nothing is done.

    In the block the adapters have no dropout and get no gradients: a call of ``model`` in training mode with gradients
    enabled warns once. No backward may cross the borders of the block. ``model.parameters()`` has the sums;
    ``model.state_dict()`` has the base weights, and loading one unmerges PEFT's layers. PEFT's ``disable_adapter`` and
    ``set_adapter`` in the block unmerge too; the layers then run as they do outside.

    Args:
        model: a model, or a part of one.
        keep: ``"device"``: the base weights wait where they are and the sums are new tensors, so that memory grows by
            the adapted weights. ``"cpu"``: the base weights wait in CPU memory (pinned, those of a GPU), and the sums
            are written in their place: two copies over the bus, and no memory of the device but for one layer's sum at
            a time. A quantised base stays packed on the device either way, and the dense sum comes to it.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: ``keep`` is something else; the model has no adapters; a weight is tied to another module's, or with
            ``"cpu"`` shares its memory with another tensor of the model, where the sum would show too; or a sum is not
            finite.
        RuntimeError: a weight cannot hold a sum (parametrised, sharded, offloaded), or an adapter is none of the kinds
            above. After an error of any kind, no memory included, every weight is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if keep not in get_args(Keep):
        raise ValueError(f"keep must be 'device' or 'cpu', got {keep!r}")
    parts = _to_merge(model, keep)
    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.unmerge)
            part.merge(keep)
        if parts:
            stack.callback(_NoTraining(model).remove)
        yield


def _to_merge(model: nn.Module, keep: Keep) -> list[_Part]:
    """The layers that are not merged and have an update, checked as far as can be without computing the sums."""
    share_states(model)
    found = False
    parts: list[_Part] = []
    for name, module in model.named_modules():
        if isinstance(module, Mergeable):
            found = True
            if not module.merged and module._has_update:
                parts.append(_OwnPart(name, module))
        elif peft_merging.is_lora(module):
            found = True
            if peft_merging.active_adapters(module):
                parts.append(peft_merging.Folding(name, module))
    if not found:
        raise ValueError(
            "model has no adapters: expected layers of PEFT's LoRA, of fastlora.inject, LoRALinear or fastlora.loralib"
        )
    for part in parts:
        if (reason := _why_not(part)) is not None:
            raise RuntimeError(f"{part.name or 'model'} cannot be merged: {reason}")
    written = {part.holder_name: part.holder for part in parts if not is_quantised(part.holder)}
    check_untied(model, written)
    if keep == "cpu":
        _check_memory(model, written)
    return parts


def _why_not(part: _Part) -> str | None:
    if part.why_not is not None:
        return part.why_not
    if any(is_sharded(parameter) or hasattr(parameter, "ds_id") for parameter in part.layer.parameters()):
        return (
            "its adapter is sharded over ranks: gather the state dict, load it into an unsharded model and merge there"
        )
    if part.holder.weight.is_meta:
        return "its weight is on the meta device, without data: offloaded, or not loaded yet"
    return why_not_stored(part.holder) if is_quantised(part.holder) else None


def _check_memory(model: nn.Module, holders: dict[str, Any]) -> None:
    """Raises ValueError where a weight shares its memory with another tensor of the model."""
    places: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel() and not tensor.is_meta:
            places.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for name, holder in holders.items():
        start, end = _span(holder.weight)
        for other_name, other in places.get(holder.weight.untyped_storage().data_ptr(), ()):
            other_start, other_end = _span(other)
            if other is not holder.weight and start < other_end and other_start < end:
                raise ValueError(
                    f"{name}.weight shares its memory with {other_name}, where a sum would show too: use "
                    f"keep='device', or give {name} a weight of its own"
                )


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after its last."""
    first = int(tensor.storage_offset())
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first * tensor.element_size(), (first + length) * tensor.element_size()


class _NoTraining:
    """A hook on the model that warns, once, of a call that trains nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._handle = model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: Sequence[Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.remove()
            tell_no_more(model.modules())
            warnings.warn(
                "the model was called in training mode with gradients enabled inside of fastlora.merged: its adapters "
                "are folded into the base weights and get no gradients. Train outside of the block; to evaluate, call "
                "model.eval() or use torch.no_grad()",
                stacklevel=2,
            )

    def remove(self) -> None:
        self._handle.remove()
