"""Launches done again: which tensors stand in for which, what a call is remembered by, and what is not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastlora.backends import replay
from fastlora.backends.replay import replay as run
from fastlora.kernels.launch import Launch

CPU = torch.device("cpu")


class Descriptor(NamedTuple):
    """As Triton's TensorDescriptor."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]


class Kernel:
    """A kernel that torch computes; compiled it is called by position, as Triton's are."""

    def __init__(self, body: Callable[..., None], *arg_names: str, interpreted: bool = False) -> None:
        self.body, self.arg_names, self.interpreted = body, arg_names, interpreted
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **named: Any) -> Any:
            self.grids.append(grid)
            self.body(*args, *(named[name] for name in self.arg_names if name in named))
            return None if self.interpreted else self

        return launch


def partial_products(x: Tensor, a: Tensor, parts: Tensor, splits: int) -> None:
    for part, x_mk, a_rk in zip(parts, x.chunk(splits, 1), a.chunk(splits, 1), strict=True):
        part.copy_(x_mk @ a_rk.T)


def summed(parts: Tensor, z: Tensor, scale: float) -> None:
    z.copy_(scale * parts.sum(0))


class Counted:
    """z = scale · x aᵀ by two launches, and how often its launcher was asked."""

    def __init__(self, interpreted: bool = False) -> None:
        self.asked = 0
        self.first = Kernel(partial_products, "x_ptr", "a_ptr", "parts", "SPLITS", interpreted=interpreted)
        self.second = Kernel(summed, "parts", "z_ptr", "scale", interpreted=interpreted)

    def __call__(self, x: Tensor, a: Tensor, scale: float = 2.0) -> Tensor:
        def launcher() -> tuple[tuple[Tensor], list[Launch]]:
            self.asked += 1
            parts = torch.full((2, len(x), len(a)), torch.nan)
            z = torch.full((len(x), len(a) + 3), torch.nan)[:, : len(a)]
            arguments = {"x_ptr": x, "a_ptr": a, "parts": parts, "SPLITS": 2}
            return (z,), [
                Launch(self.first, (3, 2), arguments, {}),
                Launch(self.second, (5,), {"parts": parts, "z_ptr": z, "scale": scale}, {}),
            ]

        (z,) = run("counted", (x, a, None), (scale,), CPU, launcher)
        assert z is not None
        return z


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    replay.forget()
    yield
    replay.forget()


def operands(m: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(m, 8), torch.randn(4, 8)


def test_the_second_call_is_right_without_its_launcher() -> None:
    counted = Counted()
    for _ in range(3):
        x, a = operands()
        torch.testing.assert_close(counted(x, a), 2 * x @ a.T)
    assert counted.asked == 1
    assert counted.first.grids[:2] == [(3, 2), (3, 2, 1)]


def test_results_are_new_memory_of_the_same_layout() -> None:
    counted = Counted()
    first, second = counted(*operands()), counted(*operands())
    assert first.data_ptr() != second.data_ptr()
    assert second.stride() == first.stride() == (7, 1)
    assert second.untyped_storage().nbytes() == first.untyped_storage().nbytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, a: (torch.randn(6, 8), a, 2.0),
        lambda x, a: (x.T.contiguous().T, a, 2.0),
        lambda x, a: (torch.randn(42)[1:41].view(5, 8), a, 2.0),
        lambda x, a: (x, a, 3.0),
    ],
    ids=["shape", "strides", "alignment", "scale"],
)
def test_what_a_call_is_remembered_by(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, float]]) -> None:
    counted = Counted()
    x, a = operands()
    counted(x, a)
    x, a, scale = change(x, a)
    torch.testing.assert_close(counted(x, a, scale), scale * x @ a.T)
    assert counted.asked == 2


def test_operands_in_one_place_are_not_kept_apart_and_so_not_kept() -> None:
    counted = Counted()
    both = torch.randn(4, 8)
    torch.testing.assert_close(counted(both, both), 2 * both @ both.T)
    x, a = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(counted(x, a), 2 * x @ a.T)
    assert counted.asked == 2
    torch.testing.assert_close(counted(both, both), 2 * both @ both.T)


def test_the_interpreter_asks_every_time() -> None:
    counted = Counted(interpreted=True)
    for _ in range(2):
        x, a = operands()
        torch.testing.assert_close(counted(x, a), 2 * x @ a.T)
    assert counted.asked == 2


def test_descriptors_are_made_over_the_new_operand() -> None:
    def turned(x_desc: Descriptor, out: Tensor) -> None:
        out.copy_(x_desc.base.as_strided(x_desc.shape, x_desc.strides))

    kernel = Kernel(turned, "x_desc", "out")

    def launcher(x: Tensor) -> tuple[tuple[Tensor], list[Launch]]:
        out = torch.empty(8, 5)
        described = Descriptor(x.T, [8, 5], [1, 8], [4, 4])
        return (out,), [Launch(kernel, (1,), {"x_desc": described, "out": out}, {})]

    for _ in range(2):
        x = torch.randn(5, 8)
        (out,) = run("turned", (x,), (), CPU, lambda x=x: launcher(x))
        assert torch.equal(out, x.T)


def test_parts_of_one_memory_stay_parts_of_it() -> None:
    """The first is where the whole begins; the kernel writes the whole, the results are views."""

    def doubled(x: Tensor, whole: Tensor) -> None:
        torch.mul(x, 2, out=whole.as_strided((5, 8), (8, 1)))

    def negated(part: Tensor, out: Tensor) -> None:
        torch.neg(part.as_strided((5, 4), (8, 1), part.storage_offset()), out=out)

    kernels = Kernel(doubled, "x", "whole"), Kernel(negated, "part", "out")

    def launcher(x: Tensor) -> tuple[tuple[Tensor, ...], list[Launch]]:
        whole, out = torch.empty(5, 8), torch.empty(5, 4)
        first, second = whole[:, :3], whole[:, 4:]
        arguments = {"x": x, "whole": whole}, {"part": second, "out": out}
        return (first, second, out), [
            Launch(kernel, (1,), taken, {}) for kernel, taken in zip(kernels, arguments, strict=True)
        ]

    for _ in range(3):
        x = torch.randn(5, 8)
        first, second, out = run("parts", (x,), (), CPU, lambda x=x: launcher(x))
        assert torch.equal(first, 2 * x[:, :3])
        assert torch.equal(second, 2 * x[:, 4:])
        assert torch.equal(out, -2 * x[:, 4:])
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_it_keeps_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST_PLANS", 3)
    counted = Counted()
    for m in range(1, 10):
        counted(*operands(m))
        assert len(replay._plans) <= 3
