"""What torch lets one do around a linear layer: autocast, compile, checkpoint, data parallelism, operator checks."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastlora import LoRALinear
from fastlora.ops.autograd import lora_matmul_op, rank_grad_op
from tests.cases import Operands, assert_matches_reference, gradient_of, make, run, upcoming_dropout

DROPOUT = pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])


@pytest.fixture
def counter() -> Iterator[Any]:
    """A compiler that counts its calls; dynamo starts and ends empty."""
    # Imported here: the spawned processes below import this file too, and need no compiler.
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def layer_with_update(p: float = 0.0, **options: Any) -> LoRALinear:
    layer = LoRALinear(48, 29, r=6, lora_alpha=10, lora_dropout=p, **options)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def seeded(function: Any, *args: Any) -> Any:
    torch.manual_seed(5)
    return function(*args)


@DROPOUT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_the_rounded_base_with_full_adapters(dtype: torch.dtype, p: float) -> None:
    dropout = upcoming_dropout(p)
    operands = make().leaves()
    with torch.autocast("cpu", dtype=dtype):
        y = operands(dropout_p=p)
    dy = gradient_of(y)
    y.backward(dy)
    x, weight, a, b, bias = operands
    rounded = Operands(x.to(dtype), weight.to(dtype), a, b, bias.to(dtype))
    actual = {name: t.grad.to(getattr(rounded, name).dtype) for name, t in operands.named().items()} | {"y": y}
    assert_matches_reference(actual, rounded, dy, dropout=dropout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_autocast_gives_the_dtypes_of_linear(dtype: torch.dtype) -> None:
    adapter_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    operands = make(dtype=dtype, adapter_dtype=adapter_dtype).leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operands()
        expected = F.linear(operands.x, operands.weight, operands.bias)
    assert y.dtype is expected.dtype
    y.sum().backward()
    assert all(t.grad.dtype is t.dtype for t in operands)


def test_autocast_switched_off_inside_changes_nothing() -> None:
    operands = make()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        y = operands()
    assert torch.equal(y, operands())


def test_autocast_refuses_what_linear_refuses() -> None:
    operands = make()
    operands = operands._replace(weight=operands.weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError):
            F.linear(operands.x, operands.weight)
        with pytest.raises(RuntimeError, match="weight is float64"):
            operands()


@pytest.mark.parametrize("backend", ["library", "reference"])
@DROPOUT
def test_backward_under_autocast(p: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward outside, backward inside, as torch's own layers allow: gradients to the precision of autocast's dtype."""
    monkeypatch.setenv("FASTLORA_BACKEND", backend)
    expected = seeded(lambda: run(make().leaves(), dropout_p=p))
    operands = make().leaves()
    y = seeded(lambda: operands(dropout_p=p))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(gradient_of(y))
    for name, tensor in operands.named().items():
        assert (tensor.grad - expected[name]).norm() < 2**-7 * expected[name].norm(), name


def test_autocast_layer_trains() -> None:
    layer, x = layer_with_update(), torch.randn(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x).square().mean()
    loss.backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert layer.lora_A.grad.dtype is torch.float32
    assert layer.lora_A.grad.abs().max() > 0


def step(function: Any, layer: LoRALinear, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one seeded step."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = seeded(function, x)
    y.backward(gradient_of(y))
    return {"y": y.detach(), "x": x.grad, "lora_A": layer.lora_A.grad, "lora_B": layer.lora_B.grad}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@DROPOUT
def test_compiled_once_for_every_batch_and_equal_to_eager(p: float, counter: Any) -> None:
    layer = layer_with_update(p)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for rows in (5, 12, 31):
        x = torch.randn(rows, 48)
        assert_same_bits(step(compiled, layer, x), step(layer, layer, x))
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_new_masks_do_not_recompile(counter: Any) -> None:
    layer = layer_with_update(0.5)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(5, 48)
    outputs = [compiled(x) for _ in range(4)]
    assert not any(torch.equal(first, second) for first, second in itertools.combinations(outputs, 2))
    assert counter.frame_count == 1


def test_compiled_eval_and_merged_layers(counter: Any) -> None:
    layer = layer_with_update(0.5).eval()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(2, 5, 48)
    assert torch.equal(compiled(x), layer(x))
    layer.merge()
    assert torch.equal(compiled(x), layer(x))
    layer.unmerge()
    assert torch.equal(compiled(x), layer(x))


def test_compiled_under_autocast(counter: Any) -> None:
    layer = layer_with_update()

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = torch.randn(5, 48)
    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    assert_same_bits(step(compiled, layer, x), step(forward, layer, x))


def test_compiled_in_a_model_between_other_layers(counter: Any) -> None:
    model = nn.Sequential(nn.Linear(20, 48), nn.GELU(), layer_with_update(), nn.ReLU(inplace=True), nn.Linear(29, 3))
    x = torch.randn(5, 20)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_same_bits(step(compiled, model[2], x), step(model, model[2], x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.usefixtures("counter")
def test_compiled_by_inductor() -> None:
    layer = layer_with_update()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (5, 12):
        x = torch.randn(rows, 48)
        torch.testing.assert_close(step(compiled, layer, x), step(layer, layer, x))


def test_compiled_dropout_uses_one_mask_in_both_directions() -> None:
    """y is linear in x for a given mask, so its gradient must give it back: dx · x + sum of bias = sum of y."""
    layer = layer_with_update(0.3).double()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x = torch.randn(9, 48, dtype=torch.float64, requires_grad=True)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    for y in (first, second):
        (dx,) = torch.autograd.grad(y.sum(), x)
        bias = 0 if layer.bias is None else 9 * layer.bias.sum()
        torch.testing.assert_close((dx * x).sum() + bias, y.sum())


@DROPOUT
def test_checkpoint_replays_the_mask(p: float) -> None:
    layer, x = layer_with_update(p), torch.randn(5, 48)

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=False)

    assert_same_bits(step(recomputed, layer, x), step(lambda x: layer(x).tanh(), layer, x))


def test_activations_may_wait_elsewhere() -> None:
    layer, x = layer_with_update(0.3), torch.randn(5, 48)

    def offloaded(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return layer(x)

    assert_same_bits(step(offloaded, layer, x), step(layer, layer, x))


def test_inference_mode() -> None:
    layer, x = layer_with_update(), torch.randn(5, 48)
    with torch.inference_mode():
        y = layer(x)
    assert torch.equal(y, layer(x))


def test_functional_call_takes_other_adapters() -> None:
    layer, x = layer_with_update(), torch.randn(5, 48)
    other = layer_with_update()
    adapter = {name: getattr(other, name) for name in ("lora_A", "lora_B")}
    y = torch.func.functional_call(layer, adapter, (x,))
    other.weight, other.bias = layer.weight, layer.bias
    assert torch.equal(y, other(x))


def _train_one_of_two(rank: int, folder: Path, layer: LoRALinear, x: Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        parallel = DistributedDataParallel(layer)
        parallel(x.chunk(2)[rank]).square().mean().backward()
        torch.save({name: p.grad for name, p in layer.named_parameters()}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_average_to_the_gradient_of_one(tmp_path: Path) -> None:
    layer, x = layer_with_update(), torch.randn(8, 48)
    torch.multiprocessing.spawn(_train_one_of_two, (tmp_path, layer, x), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    layer.zero_grad()
    layer(x).square().mean().backward()
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            assert first[name] is second[name] is None
            continue
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.grad)


def matmul_arguments(**changes: Any) -> tuple[Any, ...]:
    x, w, a, b, bias = make()
    arguments = {"x": x, "w": w, "a": a, "b": b, "scale": 1.7, "bias": bias, "p": 0.0, "seed": None, "product": False}
    return tuple((arguments | changes).values())


SEED = torch.tensor([11, 22])
MATMUL_CALLS = {
    "plain": {},
    "no_bias": {"bias": None},
    "dropout_on_input": {"p": 0.3, "seed": SEED},
    "dropout_on_product": {"p": 0.3, "seed": SEED, "product": True, "bias": None},
    "z_alone": {"w": None, "bias": None},
    "strided": {"w": torch.randn(48, 29).T, "a": torch.randn(48, 6).T},
    "no_tokens": {"x": torch.empty(0, 48)},
}


@pytest.mark.parametrize("changes", MATMUL_CALLS.values(), ids=MATMUL_CALLS)
def test_opcheck_lora_matmul(changes: dict[str, Any]) -> None:
    torch.library.opcheck(lora_matmul_op, matmul_arguments(**changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("p", "seed"), [(0.0, None), (0.3, SEED)], ids=["no_dropout", "dropout"])
def test_opcheck_rank_grad(p: float, seed: Tensor | None, dtype: torch.dtype) -> None:
    left, right = torch.randn(37, 6, dtype=dtype), torch.randn(37, 48, dtype=dtype)
    torch.library.opcheck(rank_grad_op, (left, right, torch.float32, p, seed))


@pytest.mark.small_calls
@DROPOUT
def test_flops_are_those_of_the_formula(p: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(3, 7, 48, requires_grad=True)
    layer = layer_with_update(p, bias=False)

    def formula(x: Tensor) -> Tensor:
        masked = F.dropout(x, p).flatten(0, 1)
        return torch.mm(x.flatten(0, 1), layer.weight.T) + torch.mm(torch.mm(masked, layer.lora_A.T), layer.lora_B.T)

    def counted(function: Any, grad: bool) -> int:
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as flops:
            y = function(x)
            if grad:
                y.sum().backward()
        return flops.get_total_flops()

    forward = 2 * 21 * (48 * 29 + 48 * 6 + 6 * 29)
    assert counted(layer, False) == counted(formula, False) == forward
    step = forward + 2 * 21 * (48 * 29 + 2 * 48 * 6 + 2 * 6 * 29)
    assert counted(layer, True) == counted(formula, True) == step


def test_nothing_imports_triton_for_the_flops() -> None:
    code = "import sys, torch, fastlora as f; f.LoRALinear(4, 4, r=2)(torch.ones(2, 4)); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
