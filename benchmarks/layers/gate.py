"""The accuracy gate: holds an arm's results to ``fastlora.accuracy`` before its speed is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.accuracy import Errors, compare, reference_dora_step, reference_step
from fastlora.backends import reference
from fastlora.backends.dropout import draw_seed
from fastlora.backends.request import Product

from ..cases import Case
from .arm import Built, Formula, LayerArm, outputs
from .operands import Operands, Together, make_operands

_SEED = 20
_LEAST_TOKENS = 64

Products = dict[str, Tensor]
Step = Callable[[Product, Tensor | None], Products]


class Gate:
    """Oracle and baseline of one case, made on first use.

    A foreign arm's dropout mask cannot be known, so it is checked with dropout off; fastlora's own is replayed
    from the generator.
    """

    def __init__(self, case: Case, operands: Operands | Together) -> None:
        self.case = case
        # At a few tokens the baseline is no yardstick: it may be exact by chance (fastlora/accuracy.py).
        enough = case.m >= _LEAST_TOKENS
        self._operands = operands if enough else make_operands(case._replace(m=_LEAST_TOKENS), operands.xs[0].device)
        self._expected: dict[tuple[Formula, float], tuple[Products, Products]] = {}

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
        got: dict[str, Tensor | None] = {**outputs(y)}
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
            expected = baseline[name].to(built.trained[name].dtype if name in built.trained else o.xs[0].dtype)
            errors[name] = compare(tensor, oracle=oracle[name], baseline=expected)
        return errors

    def _products(self, built: Built, p: float) -> tuple[Products, Products]:
        key = (built.formula, p)
        if key not in self._expected:
            self._expected[key] = self._make(built.formula, p)
        return self._expected[key]

    @torch.no_grad()
    def _make(self, formula: Formula, p: float) -> tuple[Products, Products]:
        o = self._operands
        torch.manual_seed(_SEED)
        # Each layer draws its own, in order.
        seeds = [draw_seed(o.xs[0].device) if p > 0 else None for _ in o.branches]
        products = [
            Product(o.xs[0], each.w, each.a, each.b, each.scale, each.bias, p, seed)
            for each, seed in zip(o.branches, seeds, strict=True)
        ]
        dys = [each.dys[0] for each in o.branches if each.dys]
        if formula == "dora":
            (product,), (dy,), magnitude = products, dys, o.branches[0].magnitude
            assert magnitude is not None
            return (
                _dora_step(product.map(Tensor.double), magnitude.double(), dy.double()),
                _dora_step(product, magnitude, dy),
            )
        step = _base_step if formula == "base" else _lora_step
        exact, exact_dys = [product.map(Tensor.double) for product in products], [dy.double() for dy in dys]
        if self.case.is_mlp:
            return _mlp(step, exact, *exact_dys), _mlp(step, products, *dys)
        return _together(step, exact, exact_dys), _together(step, products, dys)


def _mlp(step: Step, products: Sequence[Product], dy: Tensor) -> Products:
    """What an MLP of gate, up and down gives, with the layer's number behind the name of what is its own."""
    gate, up, down = products
    g, u = (step(p, None)["y"].requires_grad_() for p in (gate, up))
    with torch.enable_grad():
        h = F.silu(g) * u
    last = step(down._replace(x=h.detach()), dy)
    dg, du = torch.autograd.grad(h, (g, u), last["dx"])
    steps = [step(gate, dg), step(up, du), last]
    own = {f"{name}{i}": t for i, made in enumerate(steps) for name, t in made.items() if name not in ("y", "dx")}
    return own | {"y": last["y"], "dx": steps[0]["dx"] + steps[1]["dx"]}


def _together(step: Step, products: Sequence[Product], dys: Sequence[Tensor]) -> Products:
    """What every layer gives, with its number behind the name where there are several, and the sum of their dx."""
    steps = [step(product, dy) for product, dy in zip(products, dys, strict=True)]
    if len(steps) == 1:
        return steps[0]
    found = {f"{name}{i}": tensor for i, made in enumerate(steps) for name, tensor in made.items()}
    return found | {"dx": torch.stack([made["dx"] for made in steps]).sum(0)}


def _lora_step(product: Product, dy: Tensor | None) -> Products:
    """y, dx, da and db of a LoRA layer, in the dtype of x; without dy y alone."""
    if dy is not None:
        return reference_step(product, dy)._asdict()
    y = reference.lora_matmul(product)[0]
    assert y is not None
    return {"y": y}


def _dora_step(product: Product, magnitude: Tensor, dy: Tensor) -> Products:
    """y, dx, da, db and dm of a DoRA layer, in the dtype of x."""
    step = reference_dora_step(product, magnitude, dy)
    return {"y": step.y, "dx": step.dx, "da": step.da, "db": step.db, "dm": step.dmagnitude}


def _base_step(product: Product, dy: Tensor | None) -> Products:
    """y, dx, dw and dbias of the base layer alone, in the dtype of x; without dy y alone."""
    x, w, bias = product.x, product.w, product.bias
    assert w is not None
    y = x @ w.T if bias is None else x @ w.T + bias
    return {"y": y} if dy is None else {"y": y, "dx": dy @ w, "dw": dy.T @ x, "dbias": dy.sum(0)}
