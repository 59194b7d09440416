"""The bases of loralib's layers: the options of an adapter, and merging by ``eval()`` and ``train()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..mergeable import Mergeable
from ..ownership import why_not_mergeable

if TYPE_CHECKING:
    from typing_extensions import Self


def unchanged(x: Tensor) -> Tensor:
    """Returns x: no dropout. A function of the module, so that layers are picklable."""
    return x


class LoRALayer:
    """Mixin with the options of a LoRA layer; a layer of your own may inherit from it beside ``nn.Module``.

    Args:
        r: rank; 0 makes the layer a plain one.
        lora_alpha: numerator of the scale lora_alpha / r.
        lora_dropout: probability of dropout on the adapter's input, 0 <= p < 1.
        merge_weights: True to add the update to the weight in ``eval()`` and to take it out in ``train()``.

    Raises:
        ValueError: r is negative or ``lora_dropout`` outside [0, 1).
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        if r < 0:
            raise ValueError(f"r must be at least 0, got {r}: 0 makes the layer a plain one")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {lora_dropout}")
        self.r = r
        self.lora_alpha = lora_alpha
        # Without dropout it is a function, as in loralib: torch's parallel styles do not allow a child module.
        self.lora_dropout: Callable[[Tensor], Tensor] = nn.Dropout(lora_dropout) if lora_dropout > 0 else unchanged
        self.merged = False
        self.merge_weights = merge_weights


class MergingLayer(LoRALayer, Mergeable):
    """A layer whose ``eval()`` merges and whose ``train()`` unmerges, bit for bit.

    Where a weight cannot hold the sum (parametrised, sharded over ranks), the layer stays unmerged and adds the update
    as it runs: the outputs are the same.
    """

    lora_A: nn.Parameter  # noqa: N815 - loralib's names
    lora_B: nn.Parameter  # noqa: N815
    scaling: float

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        # The layer's torch class has initialised nn.Module.
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self._become_mergeable()

    @property
    def _adapted(self) -> bool:
        """True if there is an adapter at all; False while the torch class underneath initialises itself."""
        return "lora_A" in self._parameters

    @property
    def _has_update(self) -> bool:
        return self._adapted

    @property
    def _dropout_p(self) -> float:
        """The dropout probability in force: 0 in eval mode."""
        dropout = self.lora_dropout
        if type(dropout) is nn.Dropout:
            return dropout.p if dropout.training else 0.0
        if dropout is unchanged or type(dropout) is nn.Identity:
            return 0.0
        raise TypeError(
            f"lora_dropout is {type(dropout).__name__}: expected the nn.Dropout that the layer was made with, or "
            "nn.Identity; the fused product draws its own mask and runs no other module"
        )

    def _add_adapter(self, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> None:
        weight = self._holder.weight
        self.lora_A = nn.Parameter(weight.new_empty(a_shape))
        self.lora_B = nn.Parameter(weight.new_empty(b_shape))
        self.scaling = self.lora_alpha / self.r
        weight.requires_grad = False

    def train(self, mode: bool = True) -> Self:
        """Switches the mode; with ``merge_weights`` unmerges for training and merges for evaluation. Returns self."""
        super().train(mode)
        if self.merge_weights:
            return self.unmerge() if mode else self.merge()
        return self

    def merge(self) -> Self:
        """Adds the update to the weight, where that can hold the sum; elsewhere the layer stays unmerged."""
        if not self._adapted:
            self.merged = True  # nothing to add, and loralib says so
        elif why_not_mergeable(self._holder) is None:
            super().merge()
        return self
