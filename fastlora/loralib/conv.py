"""``Conv1d``, ``Conv2d`` and ``Conv3d`` with loralib's constructors, keys and initial weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..mergeable import Update
from ..start import start_adapter
from .base import MergingLayer


class ConvLoRA(MergingLayer):
    """A convolution with a low-rank update: ``conv(x, W) + lora_alpha / r · conv(D(x), B A viewed as W)``.

    Args:
        conv_module: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: width k of the kernel in every dimension.
        r: rank; 0 makes the layer a plain convolution. Above 0 the weight is frozen; a bias still trains.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of dropout on the update's input, 0 <= p < 1; loralib ignores it here.
        merge_weights: True to merge the update into ``conv.weight`` in ``eval()``.
        kwargs: keyword arguments of the convolution: stride, padding, groups and the rest.

    In d dimensions ``lora_A`` is [r k, in_channels k] and ``lora_B`` [out_channels / groups · k^(d - 1), r k]: B A has
    as many elements as the weight. In two dimensions these are loralib's shapes, which fit no other.

    Raises:
        TypeError: ``kernel_size`` is no int.
        ValueError: r is negative or ``lora_dropout`` outside [0, 1).
    """

    conv: nn.Module
    _holder_name = "conv"

    def __init__(
        self,
        conv_module: Callable[..., nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(kernel_size, int):
            raise TypeError(
                f"kernel_size must be an int, the width in every dimension, got {kernel_size!r}: the factors of the "
                "update have no other shape"
            )
        nn.Module.__init__(self)
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        MergingLayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            conv: Any = self.conv
            repeats = kernel_size ** (conv.weight.dim() - 3)
            self._add_adapter(
                (r * kernel_size, in_channels * kernel_size),
                (out_channels // conv.groups * repeats, r * kernel_size),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts anew: the base as torch does, A Kaiming-uniform, B zero; a merged layer is unmerged first."""
        self.unmerge()
        conv: Any = self.conv
        conv.reset_parameters()
        if self._adapted:
            start_adapter(self.lora_A, self.lora_B)

    def _update(self) -> Update:
        return Update.of(self.lora_A, self.lora_B, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in_channels, ...] -> y [batch, out_channels, ...]; one convolution unless dropout is on."""
        conv: Any = self.conv
        y: Tensor
        if self.merged or not self._adapted:
            if self.merged and self.training:
                self._note_training()
            y = conv(x)
            return y
        update = (self.lora_B @ self.lora_A).view(conv.weight.shape)
        if self._dropout_p > 0:
            y = conv(x) + conv._conv_forward(self.lora_dropout(x), self.scaling * update, None)
        else:
            y = conv._conv_forward(x, torch.add(conv.weight, update, alpha=self.scaling), conv.bias)
        return y


class Conv1d(ConvLoRA):
    """:class:`ConvLoRA` on ``nn.Conv1d``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """:class:`ConvLoRA` on ``nn.Conv2d``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """:class:`ConvLoRA` on ``nn.Conv3d``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
