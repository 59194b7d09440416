"""``LoRALinear``: a frozen linear layer with a trainable low-rank update, DoRA too; the same on a quantised base."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import quantised
from .dtypes import wide_of
from .mergeable import (
    Mergeable,
    Update,
    base_weight,
    parameter_of,
    parameters_of,
)
from .ops import dtensor
from .ops.dora import dora_linear
from .ops.linear import lora_linear
from .ops.norms import zero_row
from .start import check_rank_and_dropout, scale_of, start_adapter, start_linear, warn_of_rank
from .text import class_name

_OPERANDS = ("weight", "lora_A", "lora_B", "bias")


class LoRALinear(Mergeable):
    """A drop-in for ``nn.Linear`` whose weight is frozen and whose update has rank r.

    ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias``, scale = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``. The
    update starts at zero: A is Kaiming-uniform and B zero.

    With ``use_dora`` each row of W + scale · B A has a length that trains, ``lora_magnitude`` m [N], starting as
    that of W: ``y = x Wᵀ + bias + (g - 1) ⊙ D(x) Wᵀ + g · scale ⊙ D(x) Aᵀ Bᵀ``, g = m / ‖W + scale · B A‖ by rows
    (:func:`fastlora.dora_linear`). Where a new base is loaded without a magnitude, ``reset_adapter`` starts it anew.

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
        use_dora: weight-decomposed adaptation.

    Raises:
        ValueError: r is below 1 or ``lora_dropout`` outside [0, 1).

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685; DoRA: Liu et al., 2024, https://arxiv.org/abs/2402.09353.
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
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        self._set_options(in_features, out_features, r, lora_alpha, lora_dropout, use_rslora, use_dora)
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        adapter_dtype = weight.dtype if adapter_dtype is None else adapter_dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(weight.new_empty(out_features), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self._make_adapter(weight.device, adapter_dtype)
        self._become_mergeable()
        self.reset_parameters()

    def _set_options(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        use_dora: bool,
    ) -> None:
        check_rank_and_dropout(r, lora_dropout)
        warn_of_rank(r, in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.use_dora = use_dora

    def _make_adapter(self, device: torch.device, dtype: torch.dtype) -> None:
        """Adds the adapter's parameters, or puts others in their place; :meth:`reset_adapter` fills them."""
        n, k, r = self.out_features, self.in_features, self.r
        self.lora_A = nn.Parameter(torch.empty(r, k, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(n, r, device=device, dtype=dtype))
        if self.use_dora:
            self.lora_magnitude = nn.Parameter(torch.empty(n, device=device, dtype=dtype))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> LoRALinear:
        """Wraps an ``nn.Linear``: shares the storage of its weight and bias, and leaves the layer itself untouched.

        Hooks on the layer stay with it. A ``Linear4bit`` or ``Linear8bitLt`` of bitsandbytes becomes a part of a
        :class:`QuantisedLoRALinear`, whose adapter is float32 by default.

        Raises:
            ValueError: as the constructor; or, with ``use_dora``, a row of the weight is zero.
            TypeError: ``linear`` is no ``nn.Linear`` (another subclass stores something else as its weight).
            RuntimeError: its weight is a DTensor; or it is quantised, and its weight cannot be used: it has no
                quantisation state yet, is trained in 16 bits, or is of a bitsandbytes that is too old.
        """
        if quantised.is_quantised(linear) and not hasattr(linear, "base_kind"):
            return QuantisedLoRALinear(linear, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, use_dora)
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"linear must be an nn.Linear itself, got {class_name(linear)}: dequantise it or remove its "
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
            use_dora=use_dora,
        )
        layer.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        layer._make_adapter(linear.weight.device, layer.lora_A.dtype)
        layer.reset_adapter()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialises the base as ``nn.Linear`` does, and the adapter; a merged layer is unmerged first."""
        self.unmerge()
        start_linear(self.weight, self.bias)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Starts the adapter anew: A Kaiming-uniform, B zero, DoRA's magnitude ‖W‖; a merged layer is unmerged first.

        Raises:
            ValueError: with ``use_dora``, a row of the weight is zero; the adapter is then as it was.
        """
        self.unmerge()
        magnitude = self._start_of_magnitude() if self.use_dora else None
        start_adapter(self.lora_A, self.lora_B)
        if magnitude is not None:
            with torch.no_grad():
                self.lora_magnitude.copy_(magnitude)

    @property
    def scale(self) -> float:
        """The factor on the update: lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``."""
        return scale_of(self.lora_alpha, self.r, self.use_rslora)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]; merged, exactly one GEMM and no gradient to A and B."""
        if self.merged:
            if self.training:
                self._note_training()
            return F.linear(x, self.weight, self.bias)
        # Not through _multiply: with few tokens a call of a function shows.
        weight, a, b, bias = parameters_of(self, _OPERANDS)
        if self.use_dora:
            return self._multiply(x, weight, a, b, bias)
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

    def _operands(self, x: Tensor) -> tuple[Any, ...]:
        """Weight, A, B and bias for a product with x."""
        return parameters_of(self, _OPERANDS)

    def _multiply(self, x: Tensor, weight: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """The product of these operands, DoRA's or LoRA's."""
        options: Any = dict(scale=self.scale, bias=bias, dropout_p=self.lora_dropout, training=self.training)
        if self.use_dora:
            return dora_linear(x, weight, a, b, parameter_of(self, "lora_magnitude"), **options)
        return lora_linear(x, weight, a, b, **options)

    def _update(self) -> Update:
        magnitude = self.lora_magnitude if self.use_dora else None
        return Update.of(self.lora_A, self.lora_B, self.scale, magnitude=magnitude)

    @torch.no_grad()
    def _start_of_magnitude(self) -> Tensor:
        """‖W‖ of each row [N]."""
        self._forget_norms()
        weight = base_weight(self._holder)
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide_of(weight.dtype))
        if (row := zero_row(norms)) is not None:
            raise ValueError(
                f"row {row} of the weight of a {type(self).__name__} is zero: DoRA divides by the length of each row, "
                "so leave use_dora out for this layer"
            )
        # As the product makes it of its square: m / ‖W‖ starts at 1 in every bit.
        return norms.square().sqrt()

    @property
    def _has_dora(self) -> bool:
        return self.use_dora

    def extra_repr(self) -> str:
        """The line inside ``LoRALinear(...)`` when printed."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        )
        flags = [name for name in ("use_rslora", "use_dora", "merged") if getattr(self, name)]
        return text + "".join(f", {name}=True" for name in flags)


class QuantisedLoRALinear(LoRALinear):
    """A :class:`LoRALinear` whose base is a quantised layer of bitsandbytes, as ``LoRALinear.from_linear`` makes it.

    ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias``, as :func:`fastlora.lora_linear` computes it of a stored weight: in the
    compute dtype of a 4-bit layer, and with bitsandbytes' own product of an 8-bit one. The layer is kept as the child
    ``base``, so that what bitsandbytes does when it is moved, saved and loaded still happens; its own forward is not
    called, nor are hooks on it. ``weight`` and ``bias`` are those of ``base``: ``weight`` is the packed one.

    Merged, the sum lies dense beside the packed weight, in the dtype in which the layer computes (float16 with 8 bits),
    and is what x is multiplied by; ``unmerge`` frees it.

    Args:
        base: a ``Linear4bit``, ``LinearNF4``, ``LinearFP4`` or ``Linear8bitLt`` that has been quantised; its bias is
            frozen.
        r: rank, at least 1.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of dropout on the adapter's input, 0 <= p < 1.
        use_rslora: as in LoRALinear.
        adapter_dtype: dtype of A and B: float32 by default, in which optimisers lose nothing, and since a 4-bit layer
            may settle its compute dtype only at its first call.
        use_dora: as in LoRALinear, with the norms of the dequantised W.

    Raises:
        ValueError: as ``LoRALinear.from_linear``.
        RuntimeError: the weight has no quantisation state or is trained in 16 bits; or bitsandbytes is too old.

    Source: Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, equation (5).
    """

    _holder_name = "base"

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        layer: Any = base
        n, k = layer.out_features, layer.in_features
        self._set_options(k, n, r, lora_alpha, lora_dropout, use_rslora, use_dora)
        _stored(layer, None)
        self.base = base
        self._make_adapter(layer.weight.device, adapter_dtype or torch.float32)
        self._become_mergeable()
        self.reset_adapter()
        base.requires_grad_(False)
        self.train(base.training)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The packed weight of ``base``; ``fastlora.quantised.dense_weight(layer.base)`` makes it dense."""
        return self.base.weight

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The bias of ``base``, or None."""
        return self.base.bias

    def reset_parameters(self) -> None:
        """Raises RuntimeError: a quantised base cannot be started anew; :meth:`reset_adapter` starts the adapter."""
        raise RuntimeError("the base is quantised and cannot be started anew: reset_adapter starts the adapter alone")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]; merged, exactly one GEMM and no gradient to A and B."""
        if not self.merged:
            return self._multiply(x, *self._operands(x))
        if self.training:
            self._note_training()
        weight: Any = self._merged_weight
        return quantised.dense_linear(x, weight, self.bias)

    def _operands(self, x: Tensor) -> tuple[Any, ...]:
        return _stored(self.base, x), *parameters_of(self, ("lora_A", "lora_B")), self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        quantised.before_loading(self.base, state_dict, prefix + "base.", metadata)
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def _stored(layer: nn.Module, x: Any) -> Any:
    """The stored weight of a quantised layer, for a call with x where that is a tensor of floats."""
    floats = isinstance(x, Tensor) and x.is_floating_point()
    stored = quantised.stored_weight(layer, x if floats else None)
    if isinstance(stored, str):
        raise RuntimeError(f"the {type(layer).__name__} cannot be the base of an adapter: {stored}")
    return stored
