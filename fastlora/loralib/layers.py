"""``Linear``, ``MergedLinear`` and ``Embedding`` with loralib's constructors, keys and initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mergeable import Update, parameter_of
from ..ops.linear import lora_linear
from ..start import start_adapter, start_linear, warn_of_rank
from ..text import shown
from .base import MergingLayer


class _LinearLayer(MergingLayer, nn.Linear):
    """The base of ``Linear`` and ``MergedLinear``: a weight that may be stored as [K, N], and the product."""

    def _start(self, a_shape: tuple[int, int], b_shape: tuple[int, int], fan_in_fan_out: bool) -> None:
        """Ends a constructor: adds the adapter, draws the initial values, turns the weight."""
        if self.r > 0 and 0 not in a_shape:
            warn_of_rank(b_shape[1], a_shape[1], b_shape[0] * self.r // a_shape[0])
            self._add_adapter(a_shape, b_shape)
        # loralib draws the base twice, in nn.Linear's constructor and here, and a seed must give its numbers.
        self.reset_parameters()
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T

    @property
    def _weight_nk(self) -> Tensor:
        weight: Tensor = parameter_of(self, "weight")
        return weight.T if self.fan_in_fan_out else weight

    def _b(self) -> Tensor:
        """The up projection as one matrix [N, R]."""
        b: Tensor = parameter_of(self, "lora_B")
        return b

    def reset_parameters(self) -> None:
        """Starts anew: the base as ``nn.Linear`` does, A Kaiming-uniform, B zero; a merged layer is unmerged first."""
        self.unmerge()
        start_linear(self._weight_nk, self.bias)
        if self._adapted:
            start_adapter(self.lora_A, self.lora_B)

    def _update(self) -> Update:
        return Update.of(self.lora_A, self._b(), self.scaling, self.fan_in_fan_out)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]; merged or without an adapter, exactly one GEMM."""
        if self.merged or not self._adapted:
            if self.merged and self.training:
                self._note_training()
            return F.linear(x, self._weight_nk, self.bias)
        return lora_linear(
            x,
            self._weight_nk,
            parameter_of(self, "lora_A"),
            self._b(),
            scale=self.scaling,
            bias=parameter_of(self, "bias"),
            dropout_p=self._dropout_p,
        )

    def extra_repr(self) -> str:
        """The line inside the brackets when printed."""
        text = super().extra_repr()
        if self._adapted:
            text += f", r={self.r}, lora_alpha={self.lora_alpha}"
        return text + (", fan_in_fan_out=True" if self.fan_in_fan_out else "")


class Linear(_LinearLayer):
    """``nn.Linear`` with a low-rank update: ``y = x Wᵀ + lora_alpha / r · D(x) Aᵀ Bᵀ + bias``.

    Args:
        in_features: width of the input, K.
        out_features: width of the output, N.
        r: rank; 0 makes the layer a plain ``nn.Linear``. Above 0 the weight is frozen; a bias still trains.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of dropout on the adapter's input, 0 <= p < 1.
        fan_in_fan_out: True to store ``weight`` as [K, N], as GPT-2 does.
        merge_weights: True to merge the update into ``weight`` in ``eval()``.
        kwargs: keyword arguments of ``nn.Linear``: bias, device, dtype.

    Parameters ``lora_A`` [r, K] and ``lora_B`` [N, r] exist where r is above 0.

    Raises:
        ValueError: r is negative or ``lora_dropout`` outside [0, 1).

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        MergingLayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self._start((r, in_features), (out_features, r), fan_in_fan_out)


class MergedLinear(_LinearLayer):
    """Several projections of one input stored as one matrix, some of them with an update of their own.

    The output is ``len(enable_lora)`` equal blocks. With k blocks enabled, ``lora_A`` is [k r, K] and ``lora_B``
    [N / len(enable_lora) · k, r]: group g is rows g r to (g + 1) r of A and the g-th of k equal parts of B, in the
    order of the enabled blocks. Enabling none makes a plain ``nn.Linear``. All blocks are one product of
    ``fastlora.lora_linear``, so x is read once for all of them, and there is nothing left to group.

    Args:
        in_features: width of the input, K.
        out_features: width of the output, N.
        r: rank of one block's update; 0 makes the layer a plain ``nn.Linear``.
        lora_alpha: numerator of the scale lora_alpha / r.
        lora_dropout: probability of dropout on the adapters' input, 0 <= p < 1.
        enable_lora: True for each block that gets an update.
        fan_in_fan_out: True to store ``weight`` as [K, N], as GPT-2 does.
        merge_weights: True to merge the updates into ``weight`` in ``eval()``.
        kwargs: keyword arguments of ``nn.Linear``: bias, device, dtype.

    Raises:
        TypeError: ``enable_lora`` is no list of bools.
        ValueError: ``enable_lora`` is empty or its length does not divide ``out_features``; r is negative; or
            ``lora_dropout`` is outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(enable_lora, (list, tuple)) or not all(isinstance(each, int) for each in enable_lora):
            raise TypeError(f"enable_lora must be a list of bools, one for each block, got {shown(enable_lora)}")
        if not enable_lora or out_features % len(enable_lora):
            raise ValueError(
                f"enable_lora has {len(enable_lora)} entries: expected one for each equal block of the {out_features} "
                "out_features, a number that divides them"
            )
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        MergingLayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = list(enable_lora)
        groups = sum(map(bool, enable_lora))
        self._start((r * groups, in_features), (out_features // len(enable_lora) * groups, r), fan_in_fan_out)

    def _b(self) -> Tensor:
        # One product over a B with zeros off its blocks, [N, k r], rather than one per block or the dense update: x is
        # read once for the base and once for z, all blocks share one dropout mask, and y needs no assembling. The zeros
        # cost (k - 1) r / K of the base product, 0.5 % for GPT-2's queries and values at r = 4; one product per block
        # would read x and sum dx k times, and loralib's dense update costs a second base product.
        groups = sum(map(bool, self.enable_lora))
        parts = iter(self.lora_B.chunk(groups))
        blocks = []
        group = 0
        for enabled in self.enable_lora:
            if enabled:
                blocks.append(F.pad(next(parts), (group * self.r, (groups - 1 - group) * self.r)))
                group += 1
            else:
                blocks.append(self.lora_B.new_zeros(self.out_features // len(self.enable_lora), groups * self.r))
        return torch.cat(blocks)

    def merge_AB(self) -> Tensor:  # noqa: N802 - loralib's name
        """The dense update, not scaled, in the shape and layout of ``weight``; zero in the blocks without one."""
        update = self._b() @ self.lora_A
        return update.T if self.fan_in_fan_out else update

    def extra_repr(self) -> str:
        """The line inside ``MergedLinear(...)`` when printed."""
        return super().extra_repr() + f", enable_lora={self.enable_lora}"


class Embedding(MergingLayer, nn.Embedding):
    """``nn.Embedding`` with a low-rank update: row i is ``weight[i] + lora_alpha / r · B A[:, i]``.

    Args:
        num_embeddings: number of rows.
        embedding_dim: width of a row.
        r: rank; 0 makes the layer a plain ``nn.Embedding``. Above 0 the weight is frozen.
        lora_alpha: numerator of the scale.
        merge_weights: True to merge the update into ``weight`` in ``eval()``.
        kwargs: keyword arguments of ``nn.Embedding``. All but ``sparse`` hold for the look-up in A too; the gradient of
            A is dense.

    Parameters ``lora_A`` [r, num_embeddings] starts at zero, ``lora_B`` [embedding_dim, r] normal.

    Raises:
        ValueError: r is negative.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        MergingLayer.__init__(self, r, lora_alpha, 0, merge_weights)
        if r > 0:
            self._add_adapter((r, num_embeddings), (embedding_dim, r))
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:  # given rows, by from_pretrained
            self._reset_adapter()

    def reset_parameters(self) -> None:
        """Starts anew: the base as ``nn.Embedding`` does, A zero, B normal; a merged layer is unmerged first."""
        self.unmerge()
        nn.Embedding.reset_parameters(self)
        self._reset_adapter()

    def _reset_adapter(self) -> None:
        if self._adapted:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def _update(self) -> Update:
        return Update.of(self.lora_A, self.lora_B, self.scaling, turned=True)

    def forward(self, x: Tensor) -> Tensor:
        """x, integers of any shape -> [..., embedding_dim]."""
        rows = nn.Embedding.forward(self, x)
        if self.merged or not self._adapted:
            if self.merged and self.training:
                self._note_training()
            return rows
        # Never sparse: the rows that are looked up are columns of A, and no sparse gradient has columns.
        z = F.embedding(x, self.lora_A.T, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)
        return torch.add(rows, z @ self.lora_B.T, alpha=self.scaling)
