"""The accuracy gate: holds an arm's results to ``fastlora.accuracy`` before its speed is printed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.accuracy import Errors, compare, oracle_step, reference_step
from fastlora.backends.dropout import draw_seed
from fastlora.backends.request import Product

from ..cases import Case
from .arm import Built, LayerArm
from .operands import Operands, make_operands

_SEED = 20
_LEAST_TOKENS = 64

Products = dict[str, Tensor]


class Gate:
    """Oracle and baseline of one case, made on first use.

    A foreign arm's dropout mask cannot be known, so it is checked with dropout off; fastlora's own is replayed
    from the generator.
    """

    def __init__(self, case: Case, operands: Operands) -> None:
        self.case = case
        # At a few tokens the baseline is no yardstick: it may be exact by chance (fastlora/accuracy.py).
        enough = case.m >= _LEAST_TOKENS
        self._operands = operands if enough else make_operands(case._replace(m=_LEAST_TOKENS), operands.w.device)
        self._expected: dict[tuple[bool, float], tuple[Products, Products]] = {}

    def dropout_of(self, arm: LayerArm) -> float:
        """The probability the arm is checked at: the case's own, or 0."""
        return self.case.dropout if arm.own_mask else 0.0

    def check(self, arm: LayerArm) -> dict[str, Errors]:
        """Runs one step of the arm and measures y, dx and every gradient it trains against the oracle.

        A gradient that never arrives is an error in words.
        """
        p = self.dropout_of(arm)
        o = self._operands
        built = arm.build(self.case, o, p)
        torch.manual_seed(_SEED)
        y = built.layer(o.xs[0])
        got: dict[str, Tensor | None] = {"y": y}
        names = ("dx", *built.trained)
        gradients = torch.autograd.grad(y, (o.xs[0], *built.trained.values()), o.dys[0], allow_unused=True)
        got |= dict(zip(names, gradients, strict=True))
        oracle, baseline = self._products(built, p)
        errors = {}
        for name, tensor in got.items():
            if tensor is None:
                errors[name] = Errors.mismatched("no gradient arrived")
                continue
            # Adapters in float32 hold the same rounded values, so their gradients have the same oracle.
            expected = baseline[name].to(built.trained[name].dtype if name in built.trained else y.dtype)
            errors[name] = compare(tensor, oracle=oracle[name], baseline=expected)
        return errors

    def _products(self, built: Built, p: float) -> tuple[Products, Products]:
        key = (built.base, p)
        if key not in self._expected:
            self._expected[key] = self._make(built.base, p)
        return self._expected[key]

    @torch.no_grad()
    def _make(self, base: bool, p: float) -> tuple[Products, Products]:
        o = self._operands
        x, dy = o.xs[0], o.dys[0]
        if base:
            return _base_products(x.double(), dy.double(), o), _base_products(x, dy, o)
        seed = None
        if p > 0:
            torch.manual_seed(_SEED)
            seed = draw_seed(x.device)
        product = Product(x, o.w, o.a, o.b, o.scale, o.bias, p, seed)
        return oracle_step(product, dy)._asdict(), reference_step(product, dy)._asdict()


def _base_products(x: Tensor, dy: Tensor, o: Operands) -> Products:
    """y, dx, dw and dbias of the base layer alone, in the dtype of x."""
    y = x @ o.w.to(x.dtype).T
    return {
        "y": y if o.bias is None else y + o.bias.to(x.dtype),
        "dx": dy @ o.w.to(x.dtype),
        "dw": dy.T @ x,
        "dbias": dy.sum(0),
    }
