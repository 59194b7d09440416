"""LoRALinear with DoRA: its magnitude, its start, merging, and norms that are never those of an older weight."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import LoRALinear, LoRALinearGroup, dora_linear
from fastlora.accuracy import assert_close_to_oracle, oracle_dora_step, reference_dora_step
from fastlora.backends.request import Product
from fastlora.module import QuantisedLoRALinear
from fastlora.ops.norms import row_norms
from fastlora.quantised import dense_weight, stored_weight
from tests.cases import gradient_of, upcoming_dropout

K, N = 128, 40
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def linear(seed: int = 1, dtype: torch.dtype = F32, n: int = N) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, n, dtype=dtype)


def four_bit(seed: int = 1, **options: Any) -> Any:
    return _moved("LinearNF4", seed, **options)


def eight_bit(seed: int = 1, **options: Any) -> Any:
    return _moved("Linear8bitLt", seed, has_fp16_weights=False, **options)


def _moved(kind: str, seed: int, **options: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    empty = getattr(bnb.nn, kind)(K, N, **options)
    empty.load_state_dict(linear(seed).state_dict())
    return empty.to("cpu")


BASES: dict[str, Callable[..., Any]] = {"dense": linear, "four": four_bit, "eight": eight_bit}
ALL_BASES = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def trained(base: Any = None, **options: Any) -> LoRALinear:
    """A layer whose update and magnitude are not those of the start."""
    base = linear() if base is None else base
    torch.manual_seed(2)
    layer = LoRALinear.from_linear(base, **({"r": 6, "lora_alpha": 10, "use_dora": True} | options))
    nn.init.normal_(layer.lora_B, std=0.3)
    if layer.use_dora:
        with torch.no_grad():
            layer.lora_magnitude.mul_(torch.rand(layer.out_features) + 0.5)
    return layer


def inputs(dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(5, 7, K, generator=torch.Generator().manual_seed(3)).to(dtype)


def dense_of(layer: LoRALinear) -> Tensor:
    return dense_weight(layer.base) if isinstance(layer, QuantisedLoRALinear) else layer.weight


@ALL_BASES
def test_it_starts_as_lora_does_with_the_lengths_of_the_rows(base: Callable[..., Any]) -> None:
    torch.manual_seed(4)
    layer = LoRALinear.from_linear(base(), r=3, use_dora=True)
    torch.manual_seed(4)
    plain = LoRALinear.from_linear(base(), r=3)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B", "lora_magnitude"]
    assert layer.lora_magnitude.dtype is layer.lora_A.dtype
    norms = dense_of(layer).double().norm(dim=1)
    baseline = torch.linalg.vector_norm(dense_of(layer).float(), dim=1)
    assert_close_to_oracle(layer.lora_magnitude, oracle=norms, baseline=baseline, name="magnitude")
    assert torch.equal(layer.lora_A, plain.lora_A)
    if base is not eight_bit:  # whose norms are of W in the dtype of x, and start as those in float16
        of_product = row_norms(dense_of(layer), layer.lora_A, layer.lora_B, layer.scale)
        assert torch.equal(layer.lora_magnitude, of_product)
        torch.testing.assert_close(layer(inputs()), plain(inputs()))


def test_the_constructor_makes_the_same() -> None:
    torch.manual_seed(4)
    layer = LoRALinear(K, N, r=3, use_dora=True, dtype=BF16, adapter_dtype=F32)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "lora_magnitude"}
    assert layer.lora_magnitude.dtype is F32
    assert torch.equal(layer.lora_magnitude, row_norms(layer.weight, layer.lora_A, layer.lora_B, layer.scale))
    assert "lora_magnitude" not in LoRALinear(K, N).state_dict()


@ALL_BASES
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_it_is_dora_linear_and_trains_all_three(base: Callable[..., Any], p: float) -> None:
    layer = trained(base(), lora_dropout=p).train()
    x = inputs().requires_grad_()
    trains = [x, layer.lora_A, layer.lora_B, layer.lora_magnitude]
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    weight = layer.weight if base is linear else stored_weight(layer.base, x)
    expected = dora_linear(x, weight, *trains[1:], scale=layer.scale, bias=layer.bias, dropout_p=p, training=True)
    assert torch.equal(y, expected)
    dy = gradient_of(y)
    for found, other in zip(*(torch.autograd.grad(t, trains, dy) for t in (y, expected)), strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize("base", [linear, four_bit], ids=["dense", "four"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_it_meets_the_rule(base: Callable[..., Any], p: float) -> None:
    layer = trained(base(), lora_dropout=p).train()
    x = inputs().flatten(0, 1).requires_grad_()
    dropout = upcoming_dropout(p)
    y = layer(x)
    dy = gradient_of(y)
    y.backward(dy)
    mask = (0.0, None) if dropout is None else (dropout.p, dropout.seed)
    a, b, m = (t.detach() for t in (layer.lora_A, layer.lora_B, layer.lora_magnitude))
    bias = layer.bias.detach()
    product = Product(x.detach(), dense_of(layer).detach(), a, b, layer.scale, bias, *mask)
    oracle, baseline = (of(product, m, dy) for of in (oracle_dora_step, reference_dora_step))
    found = {
        "y": y,
        "dx": x.grad,
        "da": layer.lora_A.grad,
        "db": layer.lora_B.grad,
        "dmagnitude": layer.lora_magnitude.grad,
    }
    for name, tensor in found.items():
        assert_close_to_oracle(tensor, oracle=getattr(oracle, name), baseline=getattr(baseline, name), name=name)


@ALL_BASES
def test_merged_is_the_sum_with_the_lengths_of_its_rows(base: Callable[..., Any]) -> None:
    layer = trained(base()).eval()
    before = layer(inputs())
    dense = dense_of(layer).detach()
    a, b, m = (t.detach() for t in (layer.lora_A, layer.lora_B, layer.lora_magnitude))

    def sum_of(wide: torch.dtype) -> Tensor:
        total = dense.to(wide) + layer.scale * b.to(wide) @ a.to(wide)
        return total * (m.to(wide) / total.norm(dim=1)).unsqueeze(1)

    kept = layer.weight.data.clone()
    layer.merge()
    merged = layer.weight.detach() if base is linear else layer._merged_weight
    assert_close_to_oracle(merged, oracle=sum_of(F64), baseline=sum_of(F32).to(dense.dtype), name="sum")
    bias = layer.bias.to(merged.dtype)
    assert torch.equal(layer(inputs()), F.linear(inputs().to(merged.dtype), merged, bias).to(F32))
    layer.unmerge()
    assert torch.equal(layer.weight.data, kept)
    assert torch.equal(layer(inputs()), before)


def test_merged_and_not_compute_the_same() -> None:
    layer = trained(linear(dtype=F64)).eval()
    before = layer(inputs(F64))
    torch.testing.assert_close(layer.merge()(inputs(F64)), before, rtol=1e-9, atol=1e-9)


@ALL_BASES
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_a_state_dict_loads_into_a_layer_that_has_run(base: Callable[..., Any], merged: bool) -> None:
    """Which has the norms of its old weight."""
    layer, other = trained(base()).eval(), trained(base(seed=7)).eval()
    expected = layer(inputs())
    other(inputs())
    if merged:
        layer.merge()
        other.merge()
    other.load_state_dict(layer.state_dict())
    assert other.merged is merged
    assert torch.equal(other.unmerge()(inputs()), expected)


def saved_and_loaded(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@ALL_BASES
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch_save"],
)
def test_copies_compute_the_same(base: Callable[..., Any], duplicate: Callable[[Any], Any]) -> None:
    layer = trained(base()).eval()
    expected = layer(inputs())
    other = duplicate(layer)
    assert torch.equal(other(inputs()), expected)
    with torch.no_grad():
        other.lora_magnitude.zero_()
    assert torch.equal(layer(inputs()), expected)


def test_norms_are_never_those_of_an_older_weight() -> None:
    layer = trained()
    fresh = lambda: copy.deepcopy(layer)(inputs(layer.weight.dtype))  # noqa: E731  a copy has no norms yet
    layer(inputs())
    for change in (
        lambda: layer.to(BF16).to(F32),
        lambda: layer._apply(lambda t: t.data.mul_(1.5)),  # the same memory and version, as after freeing
        lambda: layer.merge().to(BF16).unmerge().to(F32),
        layer.reset_parameters,
    ):
        change()
        assert torch.equal(layer(inputs()), fresh())


@ALL_BASES
def test_a_reset_starts_the_magnitude_anew(base: Callable[..., Any]) -> None:
    layer = trained(base()).merge()
    layer.reset_adapter()
    assert not layer.merged
    assert not layer.lora_B.any()
    start = LoRALinear.from_linear(base(), use_dora=True).lora_magnitude
    assert torch.equal(layer.lora_magnitude, start)


def test_a_reset_of_all_takes_the_new_weight() -> None:
    layer = trained()
    old = layer.lora_magnitude.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.lora_magnitude, old)
    torch.testing.assert_close(layer.lora_magnitude.detach(), layer.weight.norm(dim=1))


def test_starts_on_meta_and_is_loaded_later() -> None:
    source = trained()
    layer = LoRALinear(K, N, r=6, lora_alpha=10, use_dora=True, device="meta")
    assert layer.lora_magnitude.is_meta
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer(inputs()), source(inputs()))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_to_dtype_casts_the_magnitude_with_the_adapter(dtype: torch.dtype) -> None:
    layer = trained().to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(inputs(dtype)).dtype is dtype


def test_a_branch_with_dora_is_called_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [
        trained(linear(dtype=F64)),
        *(trained(linear(seed, F64, n), use_dora=False) for seed, n in ((5, 24), (6, 32))),
    ]
    group = LoRALinearGroup(layers)
    called: list[nn.Module] = []
    monkeypatch.setattr(LoRALinear, "forward", _noting(LoRALinear.forward, called))
    ys = group(inputs(F64))
    assert called == [layers[0]]
    for y, layer in zip(ys, layers, strict=True):
        torch.testing.assert_close(y, layer(inputs(F64)), rtol=1e-9, atol=1e-9)


def _noting(forward: Any, called: list[nn.Module]) -> Any:
    def noted(self: nn.Module, x: Tensor) -> Tensor:
        called.append(self)
        y: Tensor = forward(self, x)
        return y

    return noted


@ALL_BASES
def test_a_row_of_zeros_is_refused_before_anything_is_changed(base: Callable[..., Any]) -> None:
    dense = linear()
    with torch.no_grad():
        dense.weight[3] = 0
    layer = base()
    if base is not linear:
        empty = type(layer)(K, N, **({"has_fp16_weights": False} if base is eight_bit else {}))
        empty.load_state_dict(dense.state_dict())
        dense = empty.to("cpu")
    with pytest.raises(ValueError, match=r"row 3 of the weight of a \w+ is zero: DoRA divides by"):
        LoRALinear.from_linear(dense, use_dora=True)
    assert dense.bias.requires_grad
    LoRALinear.from_linear(dense)


def test_a_sum_without_length_refuses_to_merge() -> None:
    layer = trained()
    with torch.no_grad():
        layer.weight[2] = 0
        layer.lora_B[2] = 0
    with pytest.raises(ValueError, match=r"the weight of a LoRALinear \[40, 128\] merged is not finite"):
        layer.merge()
    assert not layer.merged


def test_it_prints_what_it_is() -> None:
    layer = trained(use_rslora=True).merge()
    assert repr(layer).endswith("lora_dropout=0.0, use_rslora=True, use_dora=True, merged=True)")


@pytest.mark.parametrize("style", ["ColwiseParallel", "RowwiseParallel"])
def test_tensor_parallel_styles_refuse_it(style: str) -> None:
    parallel: Any = pytest.importorskip("fastlora.parallel")
    with pytest.raises(RuntimeError, match="the LoRALinear has use_dora"):
        getattr(parallel, style)()._apply(trained(), None)


def test_the_tuner_leaves_it_out() -> None:
    from fastlora.tune.layers import of_model

    with pytest.raises(ValueError, match=r"no LoRA layer that runs on fastlora \(1 × it has use_dora\)"):
        of_model(nn.Sequential(trained()))


@ALL_BASES
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_compiled_is_eager_code(base: Callable[..., Any], use_dora: bool) -> None:
    torch._dynamo.reset()
    layer = trained(base(), lora_dropout=0.3, use_dora=use_dora)
    trains = [p for p in layer.parameters() if p.requires_grad]
    layer(inputs())  # a 4-bit layer settles its dtype
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    steps = []
    for function in (compiled, layer):
        torch.manual_seed(5)
        y = function(inputs())
        steps.append([y, *torch.autograd.grad(y, trains, gradient_of(y))])
    for found, expected in zip(*steps, strict=True):
        torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_a_step_moves_adapter_and_magnitude_alone() -> None:
    layer = trained()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    loss = layer(inputs()).square().mean()
    loss.backward()
    optimiser.step()
    moved = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lora_A", "lora_B", "lora_magnitude"}
    assert layer(inputs()).square().mean() < loss
