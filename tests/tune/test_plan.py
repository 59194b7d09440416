"""What is proven and timed: every case differs from the usual in something, every size is asked for by a layer."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends import dispatch
from fastlora.backends.request import Product, Request
from fastlora.tune import plan
from fastlora.tune.layers import Layer
from fastlora.tune.plan import Size

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
LAYER = Layer(64, 48, 8, BF16, FP32, True, False)


def names(*wanted: str) -> set[tuple[str, str]]:
    return {(verb, kernel.name) for verb, kernel in plan.kernels(wanted)}


def test_every_kernel_but_the_vendors_is_proven() -> None:
    everything = {(verb, kernel.name) for verb, kernels in dispatch.KERNELS.items() for kernel in kernels}
    assert names() == {(verb, name) for verb, name in everything if name not in ("library", "reference")}


RULE = {("lora_matmul", "triton-skinny"), ("rank_grad", "triton")}


@pytest.mark.parametrize(
    ("wanted", "more"),
    [
        ("cuda", {("lora_matmul", "cuda-z_jobs"), ("lora_matmul", "cuda-serial"), ("rank_grad", "cuda")}),
        ("cuda-serial", {("lora_matmul", "cuda-serial"), ("rank_grad", "cuda")}),
        ("triton-serial", {("lora_matmul", "triton-serial")}),
        ("library", set()),
    ],
)
def test_a_name_narrows_to_its_kernels_and_those_of_the_rule(wanted: str, more: set[tuple[str, str]]) -> None:
    assert names(wanted) == RULE | more


@pytest.mark.parametrize("name", ["tritn", "cuda-", "reference", "trit"])
def test_an_unknown_kernel_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown kernel '{name}': expected cuda, cuda-serial, .*triton-skinny"):
        names(name)


def test_cases_have_every_edge() -> None:
    cases = plan.cases("bfloat16", [16], large=True)
    assert {case.r for case in cases} >= {1, 8, 12, 16, 64, 128}
    assert 1 in {case.m for case in cases}
    assert any(case.m % 8 and case.k % 8 and case.n % 8 for case in cases)
    for r in (16, 64):
        assert {case.dropout for case in cases if case.r == r} == {False, True}
    assert {(case.dropout, case.adapter_dtype) for case in cases} == {
        (dropout, dtype) for dropout in (False, True) for dtype in ("bfloat16", "float32")
    }
    assert {case.repeats for case in cases} == {plan.REPEATS}
    assert all(len({case.m, case.k, case.n}) == 3 for case in cases)


def test_without_a_gpu_cases_are_small_and_one_is_repeated() -> None:
    cases = plan.cases("float32", [], large=False)
    assert max(case.m * case.k * case.n for case in cases) < 1e8
    assert sorted({case.repeats for case in cases}) == [1, plan.REPEATS]


def test_other_ranks_are_proven_too() -> None:
    before, after = (plan.cases("float16", ranks, large=True) for ranks in ([16], [16, 24]))
    assert [(case.r, case.dropout) for case in after if case not in before] == [(24, False), (24, True)]


def test_the_sizes_of_a_layer_are_the_requests_of_its_step() -> None:
    m, k, n, r = 32, LAYER.k, LAYER.n, LAYER.r
    seed = torch.zeros(2, dtype=torch.int64)
    x, w, dy = (torch.empty(*shape, dtype=BF16) for shape in ((m, k), (n, k), (m, n)))
    a, b = torch.empty(r, k), torch.empty(n, r)
    z = torch.empty(m, r, dtype=BF16)
    asked = {
        "forward": Request.of_lora_matmul(Product(x, w, a, b, 1.0, None, 0.1, seed)),
        "backward": Request.of_lora_matmul(Product(dy, w.T, b.T, a.T, 1.0, None, 0.1, seed, on_product=True)),
        "da": Request.of_rank_grad(z, x, FP32, True),
        "db": Request.of_rank_grad(dy, z, FP32, False),
    }
    sizes = plan.sizes_of(LAYER, m, dropout=True)
    assert {name: size.request(CPU) for name, size in sizes.items()} == asked
    assert all(request.direction == name for name, request in asked.items())
    assert sizes["backward"].grads == {name: sizes[name] for name in ("da", "db")}


def test_each_size_once_and_rank_grad_first() -> None:
    again = LAYER._replace(bias=True)
    sizes = plan.sizes([LAYER, again], [32, 64])
    assert len(sizes) == len(set(sizes)) == 2 * 5
    assert [size.verb for size in sizes] == sorted((size.verb for size in sizes), reverse=True)
    forward = [size.dropout for size in sizes if size.direction == "forward"]
    assert sorted(forward) == [False, False, True, True]


def test_usual_layers() -> None:
    gpu = torch.device("cuda", 0)
    assert {layer.dtype for layer in plan.usual_layers(gpu, False, [], [], [])} == {BF16}
    assert len(plan.usual_layers(gpu, True, [], [], [])) == 2
    layers = plan.usual_layers(CPU, False, [4, 8], ["bf16"], [(24, 40)])
    assert {(layer.k, layer.n) for layer in layers} == {(24, 40)}
    assert len(layers) == 2 * 2 * 2  # ranks, adapter dtypes, dropout
    assert len(plan.usual_layers(CPU, False, [], ["fp32"], [(24, 40)])) == 2


def test_a_size_is_written_in_one_line() -> None:
    size = Size("lora_matmul", "backward", 32, 48, 64, 8, "bfloat16", "float32", True)
    assert str(size) == "backward M=32 K=48 N=64 R=8 bfloat16, float32 adapters, dropout"
