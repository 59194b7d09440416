"""``torch.jit.trace``, ``torch.export`` and others that record a call: what they replay is right at other sizes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fastlora
from fastlora import Branch, LoRALinear, LoRALinearGroup, StoredWeight, loralib
from fastlora.ops import plain
from tests.adapters.tiny_models import fill

K, N, R = 8, 4, 3
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated:DeprecationWarning")


class Halved(StoredWeight):
    """A weight that is stored as twice itself."""

    def __init__(self, doubled: Tensor) -> None:
        self.doubled = doubled
        self.shape, self.device = doubled.shape, doubled.device

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return (self.doubled / 2).to(dtype)

    def state(self) -> int:
        return self.doubled.data_ptr()


class Call(nn.Module):
    """A module around one of the functions, with operands of its own."""

    def __init__(self, call: Callable[..., Any], n: int = N, stored: bool = False) -> None:
        super().__init__()
        self.call, self.stored = call, stored
        self.weight, self.bias = nn.Parameter(torch.randn(n, K)), nn.Parameter(torch.randn(n))
        self.a, self.b = nn.Parameter(torch.randn(R, K)), nn.Parameter(torch.randn(n, R))
        self.magnitude = nn.Parameter(torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def linear(of: Call, x: Tensor) -> Tensor:
    weight = Halved(2 * of.weight.detach()) if of.stored else of.weight
    return fastlora.lora_linear(x, weight, of.a, of.b, scale=0.7, bias=of.bias)


def dora(of: Call, x: Tensor) -> Tensor:
    weight = Halved(2 * of.weight.detach()) if of.stored else of.weight
    return fastlora.dora_linear(x, weight, of.a, of.b, of.magnitude, scale=0.7, bias=of.bias)


def mlp(of: Call, x: Tensor) -> Tensor:
    wide = Branch(of.weight, of.a, of.b, 0.7, of.bias)
    return fastlora.lora_swiglu_mlp(x, wide, wide, Branch(of.weight.T, of.b.T, of.a.T, 0.3))


def injected() -> nn.Module:
    model = nn.Sequential(nn.Linear(K, N))
    fastlora.inject(model, ["0"], r=R)
    return model


ENTRIES: dict[str, Callable[[], nn.Module]] = {
    "lora_linear": lambda: Call(linear),
    "stored weight": lambda: Call(linear, stored=True),
    "dora_linear": lambda: Call(dora),
    "dora_linear of a stored weight": lambda: Call(dora, stored=True),
    "lora_swiglu_mlp": lambda: Call(mlp, n=12),
    "LoRALinear": lambda: LoRALinear(K, N, r=R),
    "LoRALinearGroup": lambda: LoRALinearGroup.from_linears([nn.Linear(K, N), nn.Linear(K, 6)], r=R),
    "injected": injected,
    "loralib.Linear": lambda: loralib.Linear(K, N, r=R),
    "loralib.MergedLinear": lambda: loralib.MergedLinear(K, N, r=R, enable_lora=[True, False]),
}
each_entry = pytest.mark.parametrize("entry", ENTRIES)


def made(entry: str) -> nn.Module:
    torch.manual_seed(1)
    module = ENTRIES[entry]()
    fill(module, 1)
    # In float64 two orders of the same sums are alike.
    return module.double()


def trace(module: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        return torch.jit.trace(module, x)


@each_entry
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("lead", [(), (7,), (2, 7), (2, 3, 7)], ids=str)
def test_a_trace_is_right_at_other_sizes(entry: str, gradients: bool, lead: tuple[int, ...]) -> None:
    module = made(entry)
    with torch.set_grad_enabled(gradients):
        traced = trace(module, torch.randn(*lead, K, dtype=torch.float64))
        for sizes in (lead, lead[::-1], tuple(size + 1 for size in lead)):
            x = torch.randn(*sizes, K, dtype=torch.float64)
            torch.testing.assert_close(traced(x), module(x))


@each_entry
def test_a_trace_has_gradients(entry: str) -> None:
    module = made(entry)
    traced = trace(module, torch.randn(2, 7, K, dtype=torch.float64))
    x = torch.randn(5, 3, K, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(p for p in module.parameters() if p.requires_grad)]

    def gradients(call: Any) -> list[Any]:
        y = call(x)
        loss = sum(part.square().sum() for part in (y if isinstance(y, tuple) else (y,)))
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    for found, expected in zip(gradients(traced), gradients(module), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected)


def test_dropout_of_a_trace_drops() -> None:
    layer = LoRALinear(K, N, r=R, lora_dropout=0.5)
    fill(layer, 1)
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(2, K), check_trace=False)
        x = torch.randn(64, K)
        assert not torch.equal(traced(x), traced(x))


@each_entry
@pytest.mark.parametrize("strict", [True, False])
def test_an_export_is_right_at_other_sizes(entry: str, strict: bool) -> None:
    if strict and entry in ("stored weight", "dora_linear of a stored weight"):
        pytest.skip("a class of the test's own, which dynamo cannot make")
    module = made(entry).eval()
    with torch.no_grad():
        sizes = ({0: Dim("batch"), 1: Dim("tokens")},)
        x = torch.randn(2, 7, K, dtype=torch.float64)
        exported = torch.export.export(module, (x,), dynamic_shapes=sizes, strict=strict).module()
        for lead in ((2, 7), (7, 2), (3, 9)):
            x = torch.randn(*lead, K, dtype=torch.float64)
            torch.testing.assert_close(exported(x), module(x))


@each_entry
def test_functional_call_takes_other_parameters(entry: str) -> None:
    module = made(entry).eval()
    other = {name: p.detach() + 0.25 for name, p in module.named_parameters()}
    x = torch.randn(5, K, dtype=torch.float64)
    with torch.no_grad():
        called = torch.func.functional_call(module, other, (x,))
        for name, p in module.named_parameters():
            p.copy_(other[name])
        torch.testing.assert_close(called, module(x))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_what_was_exported_needs_the_package_and_runs_in_a_new_process(tmp_path: Path) -> None:
    module, x = made("LoRALinear").eval(), torch.randn(5, K, dtype=torch.float64)
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (x,)), tmp_path / "layer.pt2")
        torch.save((x, module(x)), tmp_path / "expected.pt")
    code = (
        "import torch, fastlora\n"
        f"x, y = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"assert torch.equal(torch.export.load({str(tmp_path / 'layer.pt2')!r}).module()(x), y)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    lost = subprocess.run(
        [sys.executable, "-c", code.replace(", fastlora", "")], capture_output=True, text=True, cwd=ROOT
    )
    assert lost.returncode != 0
    assert "fastlora" in lost.stderr


def test_a_trace_needs_nothing_of_the_package(tmp_path: Path) -> None:
    module, x = made("LoRALinear"), torch.randn(5, K, dtype=torch.float64)
    torch.jit.save(trace(module, torch.randn(2, K, dtype=torch.float64)), tmp_path / "layer.pt")
    torch.save((x, module(x).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        f"x, y = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"torch.testing.assert_close(torch.jit.load({str(tmp_path / 'layer.pt')!r})(x).detach(), y)\n"
        "assert 'fastlora' not in sys.modules\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_nothing_is_traced_outside_of_a_trace() -> None:
    assert not plain.is_traced()
