"""The gated activation's kernels against the fp64 oracle: on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastlora.accuracy import assert_close_to_oracle
from fastlora.backends import first_use, reference
from fastlora.backends import swiglu as backend
from fastlora.backends.first_use_checks import Gated
from fastlora.kernels import swiglu
from tests.cases import DTYPES

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
NAN = float("nan")

every_activation = pytest.mark.parametrize("activation", reference.ACTIVATIONS)
every_dtype = pytest.mark.parametrize("dtypes", ["fp16", "fp32", *(["bf16"] if ON_GPU else [])])


def operands(rows: int, columns: int, dtypes: str = "fp32") -> tuple[Tensor, Tensor, Tensor]:
    """g, u, dh; g wide enough for both ends of the activations."""
    generator = torch.Generator().manual_seed(rows + columns)
    g, u, dh = (torch.randn(rows, columns, generator=generator) for _ in range(3))
    return tuple(t.to(DTYPES[dtypes][0]).to(DEVICE) for t in (3 * g, u, dh))  # type: ignore[return-value]


def check(g: Tensor, u: Tensor, dh: Tensor, activation: str) -> None:
    """Results are poisoned before, results of a second launch have the same bits."""
    exact = g.double(), u.double()
    kept = [t.clone() for t in (g, u)]
    h = torch.full_like(g, NAN)
    swiglu.forward_launch(g, u, h, activation).run()
    dg, du, again = dh.clone(), torch.full_like(g, NAN), torch.full_like(g, NAN)
    swiglu.backward_launch(g, u, dg, du, again, activation).run()
    oracles = [reference.swiglu(*exact, activation), *reference.swiglu_gradients(*exact, dh.double(), activation)]
    baselines = [reference.swiglu(g, u, activation), *reference.swiglu_gradients(g, u, dh, activation)]
    for name, one, oracle, baseline in zip(("h", "dg", "du"), (h, dg, du), oracles, baselines, strict=True):
        assert_close_to_oracle(one, oracle=oracle, baseline=baseline, name=name)
    assert torch.equal(h, again)
    without_h, du_again = dh.clone(), torch.full_like(g, NAN)
    swiglu.backward_launch(g, u, without_h, du_again, None, activation).run()
    assert torch.equal(without_h, dg)
    assert torch.equal(du_again, du)
    assert all(torch.equal(t, before) for t, before in zip((g, u), kept, strict=True))
    swiglu.forward_launch(g, u, g, activation).run()
    assert torch.equal(g, h)


@every_dtype
@every_activation
def test_swiglu(activation: str, dtypes: str) -> None:
    check(*operands(37, 211, dtypes), activation)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 1023), (8, 128), (5, 205)])
def test_swiglu_off_the_block(rows: int, columns: int) -> None:
    check(*operands(rows, columns), "gelu_tanh")


@every_activation
def test_swiglu_writes_nothing_outside(activation: str) -> None:
    g, u, dh = operands(3, 341)
    memory = torch.full((3, 2048), NAN, device=DEVICE)
    h, dg, du = (row[: g.numel()] for row in memory)
    dg.copy_(dh.flatten())
    swiglu.backward_launch(g, u, dg, du, h, activation).run()
    assert memory[:, : g.numel()].isfinite().all()
    assert memory[:, g.numel() :].isnan().all()


@every_activation
def test_swiglu_at_the_ends(activation: str) -> None:
    """Where exp overflows, act(g) is g or nothing, and the derivative one or nothing."""
    g = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4], device=DEVICE)
    u, dg, du, h = torch.full_like(g, 2), torch.ones_like(g), torch.empty_like(g), torch.empty_like(g)
    swiglu.backward_launch(g, u, dg, du, h, activation).run()
    above = (g > 0).float()
    for one, expected in ((h, 2 * g * above), (du, g * above), (dg, 2 * above)):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-30)


@every_activation
@pytest.mark.parametrize("with_h", [False, True], ids=["without_h", "with_h"])
def test_swiglu_as_it_is_called(activation: str, with_h: bool) -> None:
    """Once by the launcher, once by what is kept of it; dg lies where dh did, and h where g did if it may."""
    for seed in (1, 2):
        g, u, dh = operands(10 * seed, 48 // seed)
        expected = [*reference.swiglu_gradients(g, u, dh, activation), reference.swiglu(g, u, activation)]
        dg, du, h = backend.launch_backward(g, u, dh, activation, with_h)
        assert dg.data_ptr() == dh.data_ptr()
        assert (h is not None) is with_h
        for one, other in zip((dg, du, *([] if h is None else [h])), expected, strict=False):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(backend.launch_forward(g, u, activation, False), expected[2])
        in_place = backend.launch_forward(g, u, activation, True)
        assert in_place.data_ptr() == g.data_ptr()
        torch.testing.assert_close(in_place, expected[2])


@every_dtype
@every_activation
def test_swiglu_passes_its_check(activation: str, dtypes: str) -> None:
    assert list(first_use.swiglu_faults(Gated(DEVICE, DTYPES[dtypes][0], activation))) == []
