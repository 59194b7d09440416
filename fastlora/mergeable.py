"""What every layer with a low-rank update shares: scale, start, folding it into the weight and out again."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .ops.dtensor import why_not_mergeable

_Layer = TypeVar("_Layer", bound="MergeableLinear")


class Update(NamedTuple):
    """``scale · left @ right``, in the orientation of the weight it belongs to: B A, or Aᵀ Bᵀ on a turned weight."""

    left: Tensor
    right: Tensor
    scale: float


def check_rank_and_dropout(r: int, lora_dropout: float) -> None:
    """Raises ValueError for a rank below 1 and for a dropout outside [0, 1)."""
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1, got {lora_dropout}")


def scale_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """The factor on the update: lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def start_adapter(lora_a: Tensor, lora_b: Tensor, init: bool | str = True) -> None:
    """Fills a fresh adapter as PEFT does.

    Args:
        lora_a: down projection [R, K], overwritten.
        lora_b: up projection [N, R], overwritten.
        init: True for A Kaiming-uniform and B zero; ``"gaussian"`` for A normal with deviation 1/R and B zero; False
            for both Kaiming-uniform: an update that is not zero, for tests.
    """
    if init == "gaussian":
        nn.init.normal_(lora_a, std=1 / lora_a.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    if init is False:
        nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_b)


@torch.no_grad()
def folded(weight: Tensor, update: Update) -> Tensor:
    """weight + scale · left @ right, computed in float32 (float64 on a float64 weight) and rounded once, contiguous."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = update.left.to(wide), update.right.to(wide)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.to(wide), left, right, alpha=update.scale).to(weight.dtype).contiguous()


class MergeableLinear(nn.Module):
    """A linear layer with a frozen ``weight`` and a low-rank update; a subclass says which, in ``_update``.

    Merged, ``weight`` holds both in one and ``_base_weight`` the base; a state dict holds the base either way.
    """

    weight: Tensor
    _base_weight: Tensor | None

    def _update(self) -> Update:
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds base and update in one."""
        return self._base_weight is not None

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self: _Layer) -> _Layer:
        """Adds the update to ``weight``: W + scale · B A, computed in float32 and rounded once. Merged already: no-op.

        The base weight is set aside, not overwritten: its storage may belong to somebody else.

        Raises:
            RuntimeError: ``weight`` is parametrised or sharded over ranks, so that no sum can be stored in it.
        """
        if not self.merged:
            if (reason := why_not_mergeable(self)) is not None:
                raise RuntimeError(f"no sum can be stored in the weight: {reason}")
            merged = folded(self.weight, self._update())
            self._base_weight = self.weight.data
            self.weight.data = merged
        return self

    def unmerge(self: _Layer) -> _Layer:
        """Puts the base weight back, bit for bit. Not merged: no-op."""
        if self._base_weight is not None:
            self.weight.data = self._base_weight
            self._base_weight = None
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A state dict always holds the base weight, so that loading it never applies the update twice.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base_weight is not None:
            destination[prefix + "weight"] = self._base_weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()
