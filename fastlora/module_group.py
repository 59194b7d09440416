"""``LoRALinearGroup``: several :class:`fastlora.LoRALinear` of one input, computed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .gated import is_watched
from .module import LoRALinear, QuantisedLoRALinear
from .ops.group import lora_linear_group


class LoRALinearGroup(nn.Module):
    """Several :class:`LoRALinear` of one input, such as q, k and v, or gate and up, computed together.

    ``yᵢ = x Wᵢᵀ + scaleᵢ · Dᵢ(x) Aᵢᵀ Bᵢᵀ + biasᵢ``, by :func:`fastlora.lora_linear_group`: fewer passes over x and over
    its gradient. A branch is a layer as any other: ``group.layers[0].merge()``, its state dict under ``layers.0``. One
    that is merged is one plain GEMM; one with DoRA, hooks, or a class or forward of its own is called by itself.

    Args:
        layers: the branches, in order, of one in_features; held as ``layers``, an ``nn.ModuleList``.

    Raises:
        TypeError: a branch is no LoRALinear.
        ValueError: there is no branch, or their in_features differ.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685, equation (3).
    """

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            if not isinstance(layer, LoRALinear):
                raise TypeError(
                    f"branch {i} must be a LoRALinear, got {type(layer).__name__}: LoRALinearGroup.from_linears wraps "
                    "nn.Linear"
                )
        _check_one_input(layers)
        self.layers = nn.ModuleList(layers)

    @classmethod
    def from_linears(
        cls,
        linears: Sequence[nn.Linear],
        r: int | Sequence[int] = 8,
        lora_alpha: float | Sequence[float] = 8,
        lora_dropout: float | Sequence[float] = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinearGroup:
        """Wraps each ``nn.Linear``, or bitsandbytes' layer, as :meth:`LoRALinear.from_linear` does; nothing is copied.

        Args:
            linears: layers of one in_features.
            r: rank of all branches, or of each.
            lora_alpha: numerator of the scale of all branches, or of each.
            lora_dropout: probability of dropout on the input of all adapters, or of each; each has its own mask.
            use_rslora: as in LoRALinear.
            adapter_dtype: as in LoRALinear.

        Raises:
            ValueError: there is no layer, their in_features differ, or an option has another number of values; or as
                ``from_linear``.
            TypeError, RuntimeError: as ``from_linear``; the message begins with the number of the branch.
        """
        linears = list(linears)
        for i, linear in enumerate(linears):
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"branch {i}: linear must be an nn.Linear itself, got {type(linear).__name__}")
        _check_one_input(linears)
        count = len(linears)
        options = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
        rs, alphas, dropouts = (_one_each(name, value, count) for name, value in options.items())
        layers = []
        for i, linear in enumerate(linears):
            try:
                layers.append(LoRALinear.from_linear(linear, rs[i], alphas[i], dropouts[i], use_rslora, adapter_dtype))
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"branch {i}: {error}") from error
        return cls(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., in_features] -> y [..., out_features] of each branch, in order."""
        # A global hook would miss the calls of layers that are only read.
        together = [] if _has_any_global_hook() else [i for i, layer in enumerate(self.layers) if _is_read(layer)]
        ys = {}
        if len(together) > 1:
            layers: list[Any] = [self.layers[i] for i in together]
            weights, lora_as, lora_bs, biases = zip(*(layer._operands(x) for layer in layers), strict=True)
            found = lora_linear_group(
                x,
                weights,
                lora_as,
                lora_bs,
                scales=[layer.scale for layer in layers],
                biases=biases,
                dropout_ps=[layer.lora_dropout if layer.training else 0.0 for layer in layers],
            )
            ys = dict(zip(together, found, strict=True))
        return tuple(ys[i] if i in ys else layer(x) for i, layer in enumerate(self.layers))


def _is_read(layer: nn.Module) -> bool:
    """Whether a branch's parameters are all that its call needs: nobody else would see that it was called."""
    if type(layer) not in (LoRALinear, QuantisedLoRALinear):
        return False
    return not (layer.merged or layer.use_dora or is_watched(layer))


def _check_one_input(layers: Sequence[LoRALinear | nn.Linear]) -> None:
    """Raises ValueError where there is no layer, or one of another in_features than the first."""
    if not layers:
        raise ValueError("expected at least one branch, got none")
    k = layers[0].in_features
    for i, layer in enumerate(layers):
        if layer.in_features != k:
            raise ValueError(
                f"branch {i} has in_features {layer.in_features} and branch 0 {k}: all branches read one input"
            )


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """An option's value for each branch."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} branches: pass one each, or one for all")
    return list(value)
