"""What only a GPU can show: whole steps at real sizes, the same bits every time, graphs, streams."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import lora_linear
from fastlora.accuracy import Step, assert_close_to_oracle, oracle_step, reference_step
from fastlora.backends import dispatch, reference, triton
from fastlora.backends.dropout import Dropout, draw_seed
from fastlora.kernels import tiles
from tests.cases import SCALE, Operands, kernel_named

pytestmark = pytest.mark.gpu

# Every kernel, or those that FASTLORA_TEST_KERNELS names.
KERNELS = tuple(
    kernel.name
    for kernel in dispatch.KERNELS["lora_matmul"]
    if kernel.name in os.environ.get("FASTLORA_TEST_KERNELS", kernel.name).split() and kernel.name != "reference"
)
# M, K, N, R: square, a key projection, wide, tall, few tokens, and nothing a multiple of its tile.
SHAPES = (
    (8192, 4096, 4096, 16),
    (8192, 4096, 1024, 64),
    (2048, 4096, 14336, 16),
    (2048, 14336, 4096, 128),
    (130, 1024, 2048, 8),
    (4000, 1032, 3080, 12),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STEPS = [(shape, dtype) for shape in SHAPES for dtype in ("bf16", "fp16")] + [(SHAPES[1], "fp32"), (SHAPES[5], "fp32")]
# Pointer loads and the vendor's GEMM: no dtype that they refuse.
ANY_DTYPE = ("library", "triton-skinny", "triton-portable")


class Layer:
    """The operands of one layer and one step of it through ``lora_linear``."""

    def __init__(self, m: int, k: int, n: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
        def normal(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
            return (torch.randn(shape, device="cuda") * std).to(dtype)

        self.x = normal(m, k, std=1.0, dtype=dtype).requires_grad_()
        self.w = normal(n, k, std=k**-0.5, dtype=dtype)
        self.bias = normal(n, std=0.5, dtype=dtype)
        self.a = normal(r, k, std=k**-0.5, dtype=adapter_dtype).requires_grad_()
        self.b = normal(n, r, std=r**-0.5, dtype=adapter_dtype).requires_grad_()
        self.dy = normal(m, n, std=1.0, dtype=dtype)

    def step(self, dropout_p: float = 0.0) -> Step:
        y = lora_linear(self.x, self.w, self.a, self.b, scale=SCALE, bias=self.bias, dropout_p=dropout_p)
        return Step(y.detach(), *torch.autograd.grad(y, (self.x, self.a, self.b), self.dy))

    def check(self, actual: Step, dropout: Dropout | None = None) -> None:
        operands = Operands(self.x, self.w, self.a, self.b, self.bias).map(Tensor.detach)
        product = operands.product(dropout)
        oracle, baseline = oracle_step(product, self.dy), reference_step(product, self.dy)
        for name in Step._fields:
            assert_close_to_oracle(
                getattr(actual, name), oracle=getattr(oracle, name), baseline=getattr(baseline, name), name=name
            )


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    capability = triton.capability_of(torch.device("cuda", torch.cuda.current_device()))
    if request.param.startswith("cuda") and capability != 90:
        pytest.skip("the CUDA kernels are for sm_90")
    if request.param == "triton-serial" and capability not in tiles.TMA_CAPABILITIES:
        pytest.skip("triton-serial is not for this architecture")
    monkeypatch.setenv("FASTLORA_BACKEND", request.param)
    return str(request.param)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize(("shape", "dtype"), STEPS, ids=[f"{'x'.join(map(str, shape))}-{d}" for shape, d in STEPS])
def test_step_against_the_oracle(kernel: str, shape: tuple[int, int, int, int], dtype: str, dropout_p: float) -> None:
    if dtype == "fp32" and kernel not in ANY_DTYPE:
        pytest.skip(f"{kernel} multiplies 16-bit operands alone")
    layer = Layer(*shape, DTYPES[dtype], DTYPES[dtype])
    state = torch.cuda.get_rng_state()
    dropout = Dropout(dropout_p, draw_seed(torch.device("cuda"))) if dropout_p else None
    torch.cuda.set_rng_state(state)
    actual = layer.step(dropout_p)
    layer.check(actual, dropout)


# q, k and v with grouped queries, gate and up, and five ragged branches, which is more than one launch takes.
GROUPS = {
    "qkv": (8192, 4096, ((4096, 16), (1024, 16), (1024, 16))),
    "gate_up": (2048, 4096, ((14336, 64), (14336, 64))),
    "ragged": (1000, 1032, ((520, 12), (264, 5), (1032, 64), (40, 1), (264, 8))),
}


class Branches:
    """Layers of one input, each with its own width, rank, scale and dropout, and a step of them together."""

    def __init__(
        self, m: int, k: int, sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, dropout_p: float
    ) -> None:
        self.layers = [Layer(m, k, n, r, dtype, dtype) for n, r in sizes]
        self.x = self.layers[0].x
        for layer in self.layers:
            layer.x = self.x
        self.scales = [SCALE - 0.2 * i for i in range(len(sizes))]
        self.ps = [dropout_p * (1 - i / 4) for i in range(len(sizes))]

    def step(self) -> list[tuple[Tensor, ...]]:
        """dx, then y, da and db of each branch."""
        layers = self.layers
        ys = fastlora.lora_linear_group(
            self.x,
            [layer.w for layer in layers],
            [layer.a for layer in layers],
            [layer.b for layer in layers],
            scales=self.scales,
            biases=[layer.bias for layer in layers],
            dropout_ps=self.ps,
        )
        trained = [self.x, *(layer.a for layer in layers), *(layer.b for layer in layers)]
        dx, *grads = torch.autograd.grad(ys, trained, [layer.dy for layer in layers])
        count = len(layers)
        return [(dx,), *((y.detach(), grads[i], grads[count + i]) for i, y in enumerate(ys))]

    def check(self, actual: list[tuple[Tensor, ...]], seeds: list[Tensor | None]) -> None:
        (dx,), *of_branches = actual
        total: dict[str, Tensor] = {}
        for i, (layer, seed, found) in enumerate(zip(self.layers, seeds, of_branches, strict=True)):
            operands = Operands(layer.x, layer.w, layer.a, layer.b, layer.bias).map(Tensor.detach)
            product = operands.product(None if seed is None else Dropout(self.ps[i], seed), scale=self.scales[i])
            steps = {"oracle": oracle_step(product, layer.dy), "baseline": reference_step(product, layer.dy)}
            for name, tensor in zip(("y", "da", "db"), found, strict=True):
                right = {kind: getattr(step, name) for kind, step in steps.items()}
                assert_close_to_oracle(tensor, **right, name=f"{name} of branch {i}")
            total = {kind: step.dx if kind not in total else total[kind] + step.dx for kind, step in steps.items()}
        assert_close_to_oracle(dx, **total, name="dx")


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("sizes", GROUPS)
def test_group_step_against_the_oracle(kernel: str, sizes: str, dtype: str, dropout_p: float) -> None:
    """Twice, the second time what is kept of the first call: the same bits."""
    if kernel_named(kernel).together is None:
        pytest.skip(f"{kernel} runs the branches one by one")
    branches = Branches(*GROUPS[sizes], DTYPES[dtype], dropout_p)
    state = torch.cuda.get_rng_state()
    seeds = [draw_seed(torch.device("cuda")) if p else None for p in branches.ps]
    torch.cuda.set_rng_state(state)
    actual = branches.step()
    branches.check(actual, seeds)
    torch.cuda.set_rng_state(state)
    for expected, again in zip(actual, branches.step(), strict=True):
        assert all(torch.equal(want, got) for want, got in zip(expected, again, strict=True))


def test_rows_that_end_inside_16_bytes(kernel: str) -> None:
    """K = 100 in rows of 104, NaN beyond: tensor copies must fill with zeros by the element, not by 16 bytes."""
    layer = Layer(300, 100, 1024, 16, torch.bfloat16, torch.bfloat16)
    x, w = (torch.full((t.shape[0], 104), float("nan"), device="cuda", dtype=t.dtype) for t in (layer.x, layer.w))
    x[:, :100], w[:, :100] = layer.x.detach(), layer.w
    operands = Operands(x[:, :100], w[:, :100], layer.a.detach(), layer.b.detach(), layer.bias)
    product = operands.product()
    baseline = reference.lora_matmul(product)
    oracle = reference.lora_matmul(product.map(Tensor.double))
    for actual, b, o, name in zip(kernel_named(kernel).run(product), baseline, oracle, ("y", "z"), strict=True):
        assert_close_to_oracle(actual, oracle=o, baseline=b, name=name)


def test_fp32_adapters(kernel: str) -> None:
    layer = Layer(2048, 1024, 2048, 16, torch.bfloat16, torch.float32)
    layer.check(layer.step())


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no_dropout", "dropout"])
def test_the_same_bits_a_hundred_times(kernel: str, dropout_p: float) -> None:
    layer = Layer(4096, 2048, 2048, 16, torch.bfloat16, torch.bfloat16)
    state = torch.cuda.get_rng_state()
    first = layer.step(dropout_p)
    for _ in range(100):
        torch.cuda.set_rng_state(state)
        for expected, actual in zip(first, layer.step(dropout_p), strict=True):
            assert torch.equal(expected, actual)


def test_a_captured_graph_replays_the_step(kernel: str) -> None:
    layer = Layer(1024, 1024, 1024, 16, torch.bfloat16, torch.bfloat16)
    expected = layer.step()
    graph, captured = _capture(layer, 0.0)
    for _ in range(3):
        graph.replay()
        for want, got in zip(expected, captured, strict=True):
            assert torch.equal(want, got)


def test_a_captured_graph_replays_a_group(kernel: str) -> None:
    branches = Branches(1024, 1024, ((1024, 16), (520, 8), (264, 12)), torch.bfloat16, 0.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected, *_ = (branches.step() for _ in range(3))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = branches.step()
    for _ in range(3):
        graph.replay()
        for want, got in zip(expected, captured, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_a_captured_graph_draws_a_new_mask_each_time(kernel: str) -> None:
    layer = Layer(1024, 1024, 1024, 16, torch.bfloat16, torch.bfloat16)
    graph, captured = _capture(layer, 0.3)
    graph.replay()
    first = captured.y.clone()
    graph.replay()
    assert not torch.equal(first, captured.y)


def test_two_streams_and_other_work_at_once(kernel: str) -> None:
    layer = Layer(4096, 2048, 2048, 16, torch.bfloat16, torch.bfloat16)
    expected = layer.step()
    other = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    # What waits inside a launch must get on although the other stream's launch and the products hold the SMs.
    for _ in range(20):
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                results.append(layer.step())
        with torch.cuda.stream(streams[2]):
            other = (other @ other).clamp(-1, 1)
    torch.cuda.synchronize()
    for result in results:
        for want, got in zip(expected, result, strict=True):
            assert torch.equal(want, got)


def _capture(layer: Layer, dropout_p: float) -> tuple[torch.cuda.CUDAGraph, Step]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer.step(dropout_p)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.step(dropout_p)
    return graph, captured
