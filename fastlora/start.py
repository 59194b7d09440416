"""How a layer and its adapter start: the options checked, the factor on the update, and the first values."""

from __future__ import annotations

import functools
import logging
import math

from torch import Tensor, nn

_log = logging.getLogger("fastlora")


def check_rank_and_dropout(r: int, lora_dropout: float) -> None:
    """Raises ValueError for a rank below 1 and for a dropout outside [0, 1)."""
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1, got {lora_dropout}")


def is_above_full(r: int, k: int, n: int) -> bool:
    """Whether a rank is above the highest that a weight [n, k] can have, and so buys nothing."""
    return r > min(k, n)


# Once for each shape: a model has many layers of one.
@functools.cache
def warn_of_rank(r: int, k: int, n: int) -> None:
    """Logs a warning where a rank is above the highest that a weight [n, k] can have."""
    if is_above_full(r, k, n):
        _log.warning(
            "r=%d is above min(in_features, out_features) = %d: no update of a layer of this shape has a higher rank, "
            "and the adapter is larger than the layer",
            r, min(k, n),
        )  # fmt: skip


def scale_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """Computes the factor on the update: lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def start_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Fills a weight [N, K] and a bias [N] as ``nn.Linear`` does."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        k = weight.shape[1]
        bound = 1 / math.sqrt(k) if k > 0 else 0
        nn.init.uniform_(bias, -bound, bound)


def start_adapter(lora_a: Tensor, lora_b: Tensor, init: bool | str = True) -> None:
    """Fills an adapter as PEFT does.

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


def start_bias(lora_bias: Tensor, r: int, init: bool | str = True) -> None:
    """Fills the bias of an adapter of rank r: zeros, or with ``init`` False uniform as ``nn.Linear(r, N)`` has it."""
    if init is False:
        nn.init.uniform_(lora_bias, -1 / math.sqrt(r), 1 / math.sqrt(r))
    else:
        nn.init.zeros_(lora_bias)
