"""FLOPs of the operators for ``torch.utils.flop_counter``, which imports Triton: never imported from here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]


def lora_matmul_flops(x: Shape, w: Shape | None, a: Shape, *_: Any, **__: Any) -> int:
    """2 M K R for z, and with w [N, K] 2 M N (K + R) for y; x [M, K], a [R, K]."""
    (m, k), r = x, a[0]
    return 2 * m * k * r + (0 if w is None else 2 * m * w[0] * (k + r))


def rank_grad_flops(p: Shape, q: Shape, *_: Any, **__: Any) -> int:
    """2 M P Q; p [M, P], q [M, Q]."""
    return 2 * p[0] * p[1] * q[1]


def row_norms_flops(w: Shape, a: Shape, *_: Any, **__: Any) -> int:
    """2 N K R for w aᵀ, 2 K R² for a aᵀ, 2 N R² for b (a aᵀ); w [N, K], a [R, K]."""
    (n, k), r = w, a[0]
    return 2 * r * (n * k + k * r + n * r)


def register() -> None:
    """Adds the formulas to the counter's registry, and to counters that are active and have copied it before."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    formulas = {
        torch.ops.fastlora.lora_matmul: lora_matmul_flops,
        torch.ops.fastlora.rank_grad: rank_grad_flops,
        torch.ops.fastlora.row_norms: row_norms_flops,
    }
    for operator, formula in formulas.items():
        if operator not in module.flop_registry:
            module.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for operator in formulas:
                counter.flop_registry.setdefault(operator, module.flop_registry[operator])
