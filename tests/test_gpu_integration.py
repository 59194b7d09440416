"""What runs around the kernels: autocast, checkpointing, torch.compile, graphs, PEFT; on a CPU with ``library``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlora
import fastlora.peft
from fastlora import LoRALinear, lora_linear
from fastlora.accuracy import Step, assert_close_to_oracle, oracle_step, reference_step
from fastlora.backends import dispatch, reference, triton
from fastlora.backends.dropout import Dropout, draw_seed
from fastlora.kernels import tiles
from tests.cases import DTYPES, SCALE, Operands, gradient_of, make

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
KERNELS = tuple(
    kernel.name
    for kernel in dispatch.KERNELS["lora_matmul"]
    if kernel.name == "library"
    or (ON_GPU and kernel.name in os.environ.get("FASTLORA_TEST_KERNELS", kernel.name).split())
    if kernel.name != "reference"
)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name.startswith("cuda") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CUDA kernels are for sm_90")
    if name == "triton-serial" and triton.capability_of(DEVICE) not in tiles.TMA_CAPABILITIES:
        pytest.skip("triton-serial is not for this architecture")
    monkeypatch.setenv("FASTLORA_BACKEND", name)
    return name


def layer(dropout_p: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> LoRALinear:
    torch.manual_seed(1)
    made = LoRALinear(256, 384, r=16, lora_alpha=27.2, lora_dropout=dropout_p, device=DEVICE, dtype=dtype)
    torch.nn.init.normal_(made.lora_B, std=0.1)
    return made


def inputs(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return make(m=256, k=256, n=8, dtype=dtype).x.view(4, 64, 256).to(DEVICE)


def step(call: Callable[[Tensor], Tensor], x: Tensor, made: LoRALinear) -> tuple[Tensor, ...]:
    """y and the gradients of x, a and b, with the same mask every time."""
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    y = call(x)
    return (y.detach(), *torch.autograd.grad(y, (x, made.lora_A, made.lora_B), gradient_of(y.cpu()).to(y)))


def check(actual: tuple[Tensor, ...], x: Tensor, made: LoRALinear, dropout: Dropout | None = None) -> None:
    """A step of the layer against the oracle."""
    operands = Operands(x.flatten(0, -2), made.weight, made.lora_A, made.lora_B, made.bias).map(Tensor.detach)
    product = operands.product(dropout, scale=made.scale)
    dy = gradient_of(actual[0].cpu()).to(actual[0]).flatten(0, -2)
    oracle, baseline = oracle_step(product, dy), reference_step(product, dy)
    for name, tensor in zip(Step._fields, actual, strict=True):
        want, plain = getattr(oracle, name), getattr(baseline, name)
        assert_close_to_oracle(tensor.reshape(want.shape), oracle=want, baseline=plain, name=name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES)
# The last takes several chunks of the mask on a GPU too.
@pytest.mark.parametrize("shape", [(300, 136, 264, 16), (130, 72, 40, 12), (9000 if ON_GPU else 600, 2048, 136, 8)])
def test_library_step(
    shape: tuple[int, int, int, int], dtypes: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "library")
    dtype, adapter_dtype = DTYPES[dtypes]
    operands = make(*shape, dtype=dtype, adapter_dtype=adapter_dtype).map(lambda t: t.to(DEVICE))
    torch.manual_seed(5)
    dropout = Dropout(dropout_p, draw_seed(DEVICE)) if dropout_p else None
    torch.manual_seed(5)
    x, w, a, b, bias = operands.leaves("x", "lora_a", "lora_b")
    y = lora_linear(x, w, a, b, scale=SCALE, bias=bias, dropout_p=dropout_p)
    dy = gradient_of(y.cpu()).to(y)
    actual = Step(y.detach(), *torch.autograd.grad(y, (x, a, b), dy))
    product = operands.product(dropout)
    oracle, baseline = oracle_step(product, dy), reference_step(product, dy)
    for name in Step._fields:
        assert_close_to_oracle(
            getattr(actual, name), oracle=getattr(oracle, name), baseline=getattr(baseline, name), name=name
        )


@pytest.mark.parametrize("seed", [(0, 0), (-1, 2**40 + 7), (2**62 + 3, -5)])
@pytest.mark.gpu
def test_the_mask_is_the_cpus(seed: tuple[int, int]) -> None:
    here, there = (Dropout(0.4, torch.tensor(seed, device=device)).keep(70, 333) for device in (DEVICE, "cpu"))
    assert torch.equal(here.cpu(), there)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids=["no_dropout", "dropout"])
def test_checkpointing_replays_the_mask(kernel: str, dropout_p: float) -> None:
    made, x = layer(dropout_p), inputs()
    plain = step(made, x, made)
    again = step(lambda x: checkpoint(made, x, use_reentrant=False), x, made)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast(kernel: str) -> None:
    """The layer of its own tensors rounded to bfloat16; gradients are of its parameters' dtype."""
    made, x = layer(dtype=torch.float32), inputs(torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = made(x)
    assert y.dtype is torch.bfloat16
    y.float().square().sum().backward()
    assert made.lora_A.grad is not None
    assert made.lora_A.grad.dtype is torch.float32
    tensors = (x.flatten(0, -2), made.weight, made.lora_A, made.lora_B, made.bias)
    product = Operands(*(None if t is None else t.detach().bfloat16() for t in tensors)).product(scale=made.scale)
    oracle, baseline = reference.lora_matmul(product.map(Tensor.double))[0], reference.lora_matmul(product)[0]
    assert_close_to_oracle(y.detach().flatten(0, -2), oracle=oracle, baseline=baseline, name="y")


@pytest.mark.parametrize(
    "mode", ["default", pytest.param("reduce-overhead", marks=pytest.mark.gpu)], ids=["default", "graphs"]
)
def test_compiled(kernel: str, mode: str) -> None:
    made, x = layer(), inputs()
    torch._dynamo.reset()
    options: dict[str, Any] = {"mode": mode} if ON_GPU else {"backend": "aot_eager"}
    compiled = torch.compile(made, fullgraph=True, **options)
    for _ in range(3):
        actual = tuple(t.clone() for t in step(compiled, x, made))
    check(actual, x, made)


@pytest.mark.gpu
def test_a_graph_of_a_forward_draws_a_new_mask(kernel: str) -> None:
    made, x = layer(0.3), inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        made(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = made(x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert first.isfinite().all()
    assert not torch.equal(first, y)


def test_a_gradient_expanded_from_one_number(kernel: str) -> None:
    made, x = layer(), inputs()
    made(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert made.lora_A.grad is not None
    assert x.grad.isfinite().all()
    assert made.lora_A.grad.isfinite().all()


def test_auto_runs_what_passed_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing forced: the default of this machine, held to the oracle."""
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    made, x = layer(), inputs()
    check(step(made, x, made), x, made)


def test_patched_peft_is_peft(kernel: str) -> None:
    """A patched model is no further from PEFT in float64 than PEFT in bfloat16 is, by the one rule."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    base = transformers.LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    lora = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    ids = torch.randint(256, (2, 64), device=DEVICE)

    def logits_and_gradients() -> dict[str, Tensor]:
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"logits": out.logits.detach()} | found

    baseline = logits_and_gradients()
    report = fastlora.patch_peft(model)
    assert not report.skipped
    with fastlora.peft.count_calls() as calls:
        actual = logits_and_gradients()
    assert not calls.fallback
    fastlora.unpatch_peft(model)
    model.double()
    oracle = logits_and_gradients()
    assert actual.keys() == baseline.keys() == oracle.keys()
    for name, tensor in actual.items():
        assert_close_to_oracle(tensor, oracle=oracle[name].double(), baseline=baseline[name], name=name)
