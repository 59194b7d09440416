"""bitsandbytes' layers as stored weights: their own products and gradients, with the update added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import StoredWeight, lora_linear, lora_linear_group, lora_swiglu_mlp
from fastlora.accuracy import assert_close_to_oracle
from fastlora.backends import reference
from fastlora.ops import base
from fastlora.quantised import dense_dtype, dense_weight, is_quantised, stored_weight
from tests.cases import SCALE, Operands, assert_matches_reference, gradient_of, make, upcoming_dropout

bnb = pytest.importorskip("bitsandbytes")

K, N = 128, 40
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
FLOATS = {"fp32": F32, "bf16": BF16, "fp16": F16}
ALL_FLOATS = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)


def quantised(empty: nn.Linear, dtype: torch.dtype = F32, n: int = N, k: int = K, seed: int = 1) -> Any:
    """The layer with weights of ``dtype``, quantised as by a move to a device."""
    weight = make(n=n, k=k, seed=seed).weight.to(dtype)
    state = {"weight": weight} | ({} if empty.bias is None else {"bias": make(n=n, seed=seed).bias.to(dtype)})
    empty = empty.to(dtype)
    empty.load_state_dict(state)
    return empty.to("cpu")


def four_bit(kind: str = "Linear4bit", n: int = N, k: int = K, dtype: torch.dtype = F32, **options: Any) -> Any:
    return quantised(getattr(bnb.nn, kind)(k, n, **options), dtype, n, k)


def eight_bit(n: int = N, k: int = K, dtype: torch.dtype = F16, **options: Any) -> Any:
    return quantised(bnb.nn.Linear8bitLt(k, n, **({"has_fp16_weights": False} | options)), dtype, n, k)


FOUR: dict[str, Callable[..., Any]] = {
    "nf4": lambda **o: four_bit("LinearNF4", **o),
    "fp4": lambda **o: four_bit("LinearFP4", **o),
    "plain": lambda **o: four_bit(quant_type="nf4", compress_statistics=False, **o),
    "no_bias": lambda **o: four_bit(bias=False, **o),
    "storage_bf16": lambda **o: four_bit(quant_storage=BF16, **o),
    "storage_fp32": lambda **o: four_bit(quant_storage=F32, **o),
    "compute_bf16": lambda **o: four_bit("LinearNF4", compute_dtype=BF16, **o),
    "compute_fp32": lambda **o: four_bit("LinearNF4", compute_dtype=F32, **o),
}
EIGHT: dict[str, Callable[..., Any]] = {
    "plain": eight_bit,
    "no_bias": lambda **o: eight_bit(bias=False, **o),
    "threshold": lambda **o: eight_bit(threshold=6.0, **o),
}


def stored_of(layer: Any, x: Tensor | None = None) -> StoredWeight:
    stored = stored_weight(layer, x)
    assert isinstance(stored, StoredWeight), stored
    return stored


def operands_for(layer: Any, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None) -> Operands:
    made = make(k=layer.in_features, n=layer.out_features, dtype=dtype, adapter_dtype=adapter_dtype, seed=4)
    return made._replace(bias=layer.bias).leaves("x", "lora_a", "lora_b")


def call(operands: Operands, layer: Any, **options: Any) -> Tensor:
    x, _, a, b, _ = operands
    return lora_linear(x, stored_of(layer, x), a, b, scale=SCALE, bias=layer.bias, **options)


def weight_of_gradient(layer: Any, dtype: torch.dtype) -> Tensor:
    """The W of the layer's own gradient: dx of dy = 1."""
    x = torch.randn(layer.out_features, layer.in_features).to(dtype).requires_grad_()
    one = torch.eye(layer.out_features, dtype=dtype)
    return torch.autograd.grad(layer(x), x, one)[0]


def weight_of_product(layer: Any, dtype: torch.dtype) -> Tensor:
    """The W of the layer's own product: y of x = 1, without a bias."""
    bias, layer.bias = layer.bias, None
    one = torch.eye(layer.in_features, dtype=dtype, requires_grad=True)
    weight: Tensor = layer(one).detach().T
    layer.bias = bias
    return weight


@pytest.mark.parametrize("make_layer", FOUR.values(), ids=FOUR)
@ALL_FLOATS
def test_a_4_bit_weight_is_what_the_layers_own_product_is_made_of(
    make_layer: Callable[..., Any], dtype: torch.dtype
) -> None:
    layer = make_layer(dtype=dtype).train()
    x = torch.randn(5, K).to(dtype)
    stored = stored_of(layer, x)
    computes_in = stored.compute_dtype(x)
    assert computes_in is (layer.compute_dtype or dtype)
    assert stored.shape == (N, K)
    assert torch.equal(stored.dense(computes_in), weight_of_product(layer, computes_in))


@pytest.mark.parametrize("make_layer", FOUR.values(), ids=FOUR)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@ALL_FLOATS
def test_a_4_bit_product_meets_the_rule(make_layer: Callable[..., Any], p: float, dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype).train()
    operands = operands_for(layer, dtype, F32)
    dropout = upcoming_dropout(p)
    y = call(operands, layer, dropout_p=p)
    computes_in = stored_of(layer).compute_dtype(operands.x)
    dy = gradient_of(y.detach().to(computes_in)).to(dtype)
    y.backward(dy)
    x, _, a, b, bias = operands
    assert y.dtype is x.grad.dtype is dtype
    rounded = Operands(
        x.to(computes_in), stored_of(layer).dense(computes_in), a, b, None if bias is None else bias.to(computes_in)
    )
    actual = {"lora_a": a.grad, "lora_b": b.grad}
    if dtype is computes_in or dtype is F32:
        actual |= {"y": y.to(computes_in), "x": x.grad.to(computes_in)}
    assert_matches_reference(actual, rounded, dy.to(computes_in), dropout=dropout)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_layer_settles_its_dtype_as_by_its_own_first_call(dtype: torch.dtype) -> None:
    layer, own = four_bit(), four_bit()
    x = torch.randn(5, K).to(dtype)
    stored_of(layer)
    assert not layer.compute_type_is_set
    stored_of(layer, x)
    own.train()(x.requires_grad_())
    assert layer.compute_type_is_set
    assert layer.compute_dtype is own.compute_dtype is dtype


@pytest.mark.parametrize("make_layer", EIGHT.values(), ids=EIGHT)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@ALL_FLOATS
def test_an_8_bit_product_is_the_layers_own(make_layer: Callable[..., Any], training: bool, dtype: torch.dtype) -> None:
    layer, own = make_layer().train(training), make_layer().train(training)
    x = outliers(torch.randn(37, K)).to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    stored = stored_of(layer, x)
    assert stored.multiplies(37)
    assert torch.equal(stored.product(x, bias), own(x))
    assert torch.equal(stored.dense(dtype), weight_of_gradient(own, dtype))
    memory = torch.full((N, K), torch.nan, dtype=dtype)
    assert stored.dense(dtype, memory) is memory
    assert torch.equal(memory, stored.dense(dtype))


def outliers(x: Tensor) -> Tensor:
    x[:, 3] *= 20
    x[4, 7] = -30
    return x


@pytest.mark.parametrize("make_layer", EIGHT.values(), ids=EIGHT)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@ALL_FLOATS
def test_an_8_bit_layer_with_an_update_meets_the_rule(
    make_layer: Callable[..., Any], training: bool, p: float, dtype: torch.dtype
) -> None:
    layer, own = make_layer().train(training), make_layer().train(training)
    operands = operands_for(layer, dtype, F32)
    outliers(operands.x.data)
    dropout = upcoming_dropout(p)
    y = call(operands, layer, dropout_p=p)
    dy = gradient_of(y)
    y.backward(dy)
    x, _, a, b, _ = operands
    actual = {"x": x.grad, "lora_a": a.grad, "lora_b": b.grad}
    assert_matches_reference(actual, operands._replace(weight=stored_of(layer).dense(dtype)), dy, dropout=dropout)
    base_y = own(x.detach())
    alone = operands._replace(weight=torch.zeros(N, K, dtype=dtype), bias=None).map(Tensor.detach).product(dropout)
    oracle = base_y.double() + reference.lora_matmul(alone.map(Tensor.double))[0]
    baseline = base_y + reference.lora_matmul(alone)[0]
    assert_close_to_oracle(y, oracle=oracle, baseline=baseline, name="y")


@pytest.mark.parametrize("make_layer", [FOUR["nf4"], eight_bit], ids=["four", "eight"])
@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0), (2, 1, 5)], ids=str)
def test_leading_dimensions(make_layer: Callable[..., Any], lead: tuple[int, ...]) -> None:
    layer = make_layer().train()
    operands = operands_for(layer, F32)
    operands = operands._replace(x=make(k=K, lead=lead).x.requires_grad_())
    y = call(operands, layer)
    assert y.shape == (*lead, N)
    y.sum().backward()
    assert operands.x.grad.shape == operands.x.shape


@pytest.mark.parametrize("make_layer", [FOUR["nf4"], eight_bit], ids=["four", "eight"])
def test_groups_and_mlps_are_their_layers(make_layer: Callable[..., Any]) -> None:
    layers = [make_layer(n=n, dtype=F16).train() for n in (40, 40, 24)]
    down = make_layer(n=64, k=40, dtype=F16).train()
    made = [operands_for(layer, F32) for layer in (*layers, down)]
    x = made[0].x

    def branch(i: int) -> Any:
        from fastlora import Branch

        layer = [*layers, down][i]
        return Branch(stored_of(layer, x), made[i].lora_a, made[i].lora_b, SCALE, layer.bias)

    def alone(i: int, x: Tensor) -> Tensor:
        b = branch(i)
        return lora_linear(x, *b[:3], scale=SCALE, bias=b.bias)

    ws, a_s, bs, scales, biases, _ = zip(*map(branch, range(3)), strict=True)
    ys = lora_linear_group(x, ws, a_s, bs, scales=scales, biases=biases)
    for i, y in enumerate(ys):
        torch.testing.assert_close(y, alone(i, x))
    found = lora_swiglu_mlp(x, branch(0), branch(1), branch(3))
    expected = alone(3, nn.functional.silu(alone(0, x)) * alone(1, x))
    torch.testing.assert_close(found, expected)
    trained = [x, *(t for i in (0, 1, 3) for t in (made[i].lora_a, made[i].lora_b))]
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), trained) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    base.forget_workspaces()


@pytest.mark.parametrize("kind", ["Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt"])
def test_the_layers_are_known(kind: str) -> None:
    assert is_quantised(getattr(bnb.nn, kind)(K, N))
    assert not is_quantised(nn.Linear(K, N))
    assert not is_quantised(type("Other", (bnb.nn.Linear4bit,), {})(K, N))


@pytest.mark.parametrize("make_layer", [FOUR["nf4"], eight_bit], ids=["four", "eight"])
def test_state_says_whether_two_give_the_same(make_layer: Callable[..., Any]) -> None:
    layer, other = make_layer(), make_layer()
    first = stored_of(layer).state()
    assert first == stored_of(layer).state()
    assert first != stored_of(other).state()
    layer.weight.mul_(0) if layer.weight.dtype is torch.int8 else layer.weight.zero_()
    assert first != stored_of(layer).state()


def test_a_look_leaves_an_8_bit_layer_loadable() -> None:
    layer = eight_bit()
    state = layer.state_dict()
    dense_weight(layer)
    layer.load_state_dict(state)


def test_dense_weights_and_dtypes() -> None:
    assert dense_dtype(four_bit("LinearNF4", dtype=BF16)) is BF16
    assert dense_dtype(four_bit("LinearNF4", compute_dtype=F32, dtype=BF16)) is F32
    assert dense_dtype(eight_bit()) is F16
    layer = four_bit("LinearNF4", dtype=BF16)
    weight = dense_weight(layer)
    assert torch.equal(weight, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    assert weight.data_ptr() != dense_weight(layer).data_ptr()


def repacked() -> Any:
    layer = four_bit("LinearNF4", n=64)
    functional = bnb.functional
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    return layer


def turned() -> Any:
    layer = four_bit("LinearNF4")
    layer.weight.quant_state.shape = torch.Size((K, N))
    return layer


REASONS: dict[str, tuple[Callable[[], Any], str]] = {
    "four_without_state": (lambda: bnb.nn.LinearNF4(K, N), "4-bit weight has no quantisation state: move the layer"),
    "repacked": (repacked, "4-bit weight was packed anew for this CPU"),
    "turned": (turned, r"4-bit weight was packed as \[128, 40\], not \[out_features, in_features\]"),
    "eight_without_state": (
        lambda: bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False),
        "8-bit weight has no quantisation state: move the layer",
    ),
    "trained_in_16_bits": (
        lambda: eight_bit(has_fp16_weights=True),
        r"keeps 16-bit weights and trains them \(has_fp16_weights=True\)",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case: str) -> None:
    make_layer, message = REASONS[case]
    layer = make_layer()
    said = stored_weight(layer)
    assert isinstance(said, str)
    with pytest.raises(RuntimeError, match=f"the weight of a {type(layer).__name__} cannot be made dense: .*{message}"):
        dense_weight(layer)


@pytest.mark.parametrize("make_layer", [FOUR["nf4"], eight_bit], ids=["four", "eight"])
def test_an_old_bitsandbytes_is_a_reason(make_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    monkeypatch.setattr(bnb, "__version__", "0.48.2")
    assert stored_weight(layer) == "bitsandbytes 0.48.2 is too old: pip install 'bitsandbytes>=0.49'"
    monkeypatch.setattr(bnb, "__version__", "1.0.0.dev0")
    assert isinstance(stored_weight(layer), StoredWeight)


@pytest.mark.parametrize("make_layer", [*FOUR.values(), *EIGHT.values()], ids=[*FOUR, *EIGHT])
def test_a_weight_that_changes_before_the_backward_is_an_error(make_layer: Callable[..., Any]) -> None:
    layer = make_layer(dtype=F32).train()
    operands = operands_for(layer, F32, F32)
    y = call(operands, layer)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
    with pytest.raises(RuntimeError, match="weight were changed in place between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("make_layer", [*FOUR.values(), *EIGHT.values()], ids=[*FOUR, *EIGHT])
def test_a_weight_of_inference_mode_multiplies(make_layer: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    layer = make_layer(dtype=F32).eval()
    torch.manual_seed(1)
    with torch.inference_mode():
        inferred = make_layer(dtype=F32).eval()
        x = torch.randn(5, K)
        a, b = torch.randn(3, K), torch.randn(N, 3)
        expected = lora_linear(x, stored_of(layer, x), a, b, scale=SCALE, bias=layer.bias)
        assert torch.equal(lora_linear(x, stored_of(inferred, x), a, b, scale=SCALE, bias=inferred.bias), expected)
