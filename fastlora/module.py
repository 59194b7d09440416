"""``LoRALinear``: a frozen linear layer with a trainable low-rank update; ``LoRALinearGroup``: several of one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .gated import is_watched
from .mergeable import Mergeable, Update, check_rank_and_dropout, parameters_of, scale_of, start_adapter, start_linear
from .ops import dtensor
from .ops.group import lora_linear_group
from .ops.linear import lora_linear


class LoRALinear(Mergeable):
    """A drop-in for ``nn.Linear`` whose weight is frozen and whose update has rank r.

    ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias``, scale = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``. The
    update starts at zero: A is Kaiming-uniform and B zero.

    Args:
        in_features: width of the input, K.
        out_features: width of the output, N.
        r: rank, at least 1.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of dropout on the adapter's input, 0 <= p < 1.
        bias: True for a base with a bias, which is frozen.
        use_rslora: rank-stabilised scale (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732).
        device: device of the parameters.
        dtype: dtype of the base.
        adapter_dtype: dtype of A and B: that of the base (default), or float32 on a half-precision base.

    Raises:
        ValueError: r is below 1 or ``lora_dropout`` outside [0, 1).

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank_and_dropout(r, lora_dropout)
        self.in_features = in_features
        self.out_features = out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        adapter_dtype = weight.dtype if adapter_dtype is None else adapter_dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(weight.new_empty(out_features), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self.lora_A = nn.Parameter(weight.new_empty(r, in_features, dtype=adapter_dtype))
        self.lora_B = nn.Parameter(weight.new_empty(out_features, r, dtype=adapter_dtype))
        self._become_mergeable()
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """Wraps an ``nn.Linear``: shares the storage of its weight and bias, and leaves the layer itself untouched.

        Hooks on the layer stay with it.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear`` (a quantised subclass stores something else as its weight).
            RuntimeError: its weight is a DTensor.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"linear must be an nn.Linear itself, got {type(linear).__name__}: dequantise it or remove its "
                "parametrizations first"
            )
        if dtensor.is_sharded(linear.weight):
            raise RuntimeError(
                "linear.weight is a DTensor, sharded over ranks already: wrap the plain layer first, then shard both "
                "with fully_shard, or with ColwiseParallel or RowwiseParallel of fastlora.parallel"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=linear.bias is not None,
            use_rslora=use_rslora,
            device="meta",
            dtype=linear.weight.dtype,
            adapter_dtype=adapter_dtype,
        )
        layer.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        device = linear.weight.device
        layer.lora_A = nn.Parameter(torch.empty_like(layer.lora_A, device=device))
        layer.lora_B = nn.Parameter(torch.empty_like(layer.lora_B, device=device))
        layer.reset_adapter()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialises the base as ``nn.Linear`` does, and the adapter; a merged layer is unmerged first."""
        self.unmerge()
        start_linear(self.weight, self.bias)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Starts the adapter anew: A Kaiming-uniform, B zero; a merged layer is unmerged first."""
        self.unmerge()
        start_adapter(self.lora_A, self.lora_B)

    @property
    def scale(self) -> float:
        """The factor on the update: lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``."""
        return scale_of(self.lora_alpha, self.r, self.use_rslora)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]; merged, exactly one GEMM and no gradient to A and B."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        weight, a, b, bias = parameters_of(self, ("weight", "lora_A", "lora_B", "bias"))
        return lora_linear(
            x,
            weight,
            a,
            b,
            scale=self.scale,
            bias=bias,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def _update(self) -> Update:
        return Update.of(self.lora_A, self.lora_B, self.scale)

    def extra_repr(self) -> str:
        """The line inside ``LoRALinear(...)`` when printed."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        )
        return text + (", use_rslora=True" if self.use_rslora else "") + (", merged=True" if self.merged else "")


class LoRALinearGroup(nn.Module):
    """Several :class:`LoRALinear` of one input, such as q, k and v, or gate and up, computed together.

    ``yᵢ = x Wᵢᵀ + scaleᵢ · Dᵢ(x) Aᵢᵀ Bᵢᵀ + biasᵢ``, by :func:`fastlora.lora_linear_group`: fewer passes over x and over
    its gradient. A branch is a layer as any other: ``group.layers[0].merge()``, its state dict under ``layers.0``. One
    that is merged is one plain GEMM; one that has hooks, or a class or forward of its own, is called by itself.

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
        """Wraps each ``nn.Linear`` as :meth:`LoRALinear.from_linear` does; nothing is copied.

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
            weights, lora_as, lora_bs, biases = zip(
                *(parameters_of(layer, ("weight", "lora_A", "lora_B", "bias")) for layer in layers), strict=True
            )
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
    return type(layer) is LoRALinear and not layer.merged and not is_watched(layer)


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
