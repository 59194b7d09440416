"""Gated MLP modules: which classes are proven to be one by their source, and which activations by their values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.gated import Parts, activation_of, parts_of


class OneLine(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        """A docstring is no statement."""
        return self.w2(self.act(self.w1(hidden)) * self.w3(hidden))


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        down = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down  # noqa: RET504 - as transformers has it


class Derived(Named):
    pass


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x)) * 2


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.act(self.gate(x)))


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(y))


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        return self.down(self.act(self.gate(x)) * self.up(y))


class Added(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) + self.up(x))


class Replaced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        _ = self.down(self.act(self.gate(x)) * self.up(x))
        return x


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Wrapped(nn.Module):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (OneLine, Parts("w1", "w3", "w2", "act")),
        (Named, Parts("gate_proj", "up_proj", "down_proj", "act_fn")),
        (Derived, Parts("gate_proj", "up_proj", "down_proj", "act_fn")),
    ],
)
def test_what_is_one_by_its_source(kind: type[nn.Module], parts: Parts) -> None:
    assert parts_of(kind) == parts


@pytest.mark.parametrize(
    "kind", [Scaled, Turned, Dropped, TwoInputs, Other, Added, Replaced, Functional, Wrapped, nn.Linear, nn.Sequential]
)
def test_what_is_not(kind: type[nn.Module]) -> None:
    assert parts_of(kind) is None


def test_a_class_without_a_source_is_not() -> None:
    made = type("Made", (nn.Module,), {})
    exec("def forward(self, x):\n    return self.down(self.act(self.gate(x)) * self.up(x))", names := {})
    made.forward = names["forward"]
    assert parts_of(made) is None


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.SiLU(), "silu"),
        (F.silu, "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), None),
        (nn.Identity(), None),
        (nn.PReLU(), None),
        (lambda x: F.silu(x) + 1e-6, None),
        (lambda x: F.silu(1.702 * x) / 1.702, None),
        (lambda x: F.silu(x)[:3], None),
        (None, None),
    ],
)
def test_an_activation_is_told_by_its_values(act: object, name: str | None) -> None:
    assert activation_of(act) == name
