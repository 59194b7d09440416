"""LoRALinear on bitsandbytes' layers: the packed base stays bitsandbytes', the update is ours."""

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

from fastlora import LoRALinear, LoRALinearGroup, lora_linear
from fastlora.accuracy import assert_close_to_oracle
from fastlora.module import QuantisedLoRALinear
from fastlora.quantised import dense_dtype, dense_weight, stored_weight
from tests.cases import gradient_of, make

bnb = pytest.importorskip("bitsandbytes")

K, N = 128, 40
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def quantised(kind: str, n: int = N, seed: int = 1, dtype: torch.dtype = F32, **options: Any) -> Any:
    options = ({"has_fp16_weights": False} if kind == "Linear8bitLt" else {}) | options
    empty = getattr(bnb.nn, kind)(K, n, **options).to(dtype)
    made = make(n=n, k=K, seed=seed, dtype=dtype)
    empty.load_state_dict({"weight": made.weight} | ({} if empty.bias is None else {"bias": made.bias}))
    return empty.to("cpu")


BASES: dict[str, Callable[..., Any]] = {
    "four": lambda **o: quantised("Linear4bit", **o),
    "nf4": lambda **o: quantised("LinearNF4", **({"compute_dtype": BF16} | o)),
    "fp4_no_bias": lambda **o: quantised("LinearFP4", bias=False, **o),
    "eight": lambda **o: quantised("Linear8bitLt", dtype=F16, **o),
    "eight_threshold": lambda **o: quantised("Linear8bitLt", threshold=6.0, dtype=F16, **o),
}
ALL_BASES = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def trained(base: Any, **options: Any) -> QuantisedLoRALinear:
    """A layer with an update that is not zero."""
    torch.manual_seed(2)
    layer = LoRALinear.from_linear(base, **({"r": 6, "lora_alpha": 10} | options))
    assert isinstance(layer, QuantisedLoRALinear)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def inputs(dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(5, 7, K, generator=torch.Generator().manual_seed(3)).to(dtype)


@ALL_BASES
def test_it_is_the_product_with_the_stored_weight_and_trains_its_adapter(base: Callable[..., Any]) -> None:
    layer = trained(base(), lora_dropout=0.3).train()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.dtype is layer.lora_B.dtype is F32
    x = inputs().requires_grad_()
    a, b, bias = layer.lora_A, layer.lora_B, layer.bias
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    expected = lora_linear(
        x, stored_weight(layer.base, x), a, b, scale=layer.scale, bias=bias, dropout_p=0.3, training=True
    )
    assert torch.equal(y, expected)
    dy = gradient_of(y)
    for found, other in zip(*(torch.autograd.grad(t, [x, a, b], dy) for t in (y, expected)), strict=True):
        assert torch.equal(found, other)


@ALL_BASES
def test_it_starts_as_the_base(base: Callable[..., Any]) -> None:
    own, layer = base().train(), LoRALinear.from_linear(base().train(), r=3)
    assert layer.training
    x = inputs().requires_grad_()
    computes_in = dense_dtype(own)
    if isinstance(own, bnb.nn.Linear8bitLt):
        assert torch.equal(layer(x), own(x))
        return
    weight, bias = dense_weight(own), own.bias
    oracle = F.linear(x.to(computes_in).double(), weight.double(), None if bias is None else bias.double())
    baseline = own(x)
    assert_close_to_oracle(layer(x), oracle=oracle, baseline=baseline, name="y")


@ALL_BASES
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_merged_is_one_product_with_the_sum_and_unmerged_is_bit_for_bit_as_before(
    base: Callable[..., Any], dtype: torch.dtype
) -> None:
    layer = trained(base()).eval()
    x = inputs(dtype)
    before = layer(x)
    packed = layer.base.weight.data
    kept, dense = packed.clone(), dense_weight(layer.base)
    layer.merge()
    assert layer.merged
    assert torch.equal(layer.weight.data, kept)
    a, b = layer.lora_A, layer.lora_B
    oracle = dense.double() + layer.scale * b.double() @ a.double()
    baseline = (dense.float() + layer.scale * b @ a).to(dense.dtype)
    assert_close_to_oracle(layer._merged_weight, oracle=oracle, baseline=baseline, name="sum")
    bias = None if layer.bias is None else layer.bias.to(dense.dtype)
    y = layer(x)
    assert y.dtype is dtype
    assert torch.equal(y, F.linear(x.to(dense.dtype), layer._merged_weight, bias).to(dtype))
    layer.unmerge()
    assert layer._merged_weight is None
    assert layer.weight.data.data_ptr() == packed.data_ptr()
    assert torch.equal(layer(x), before)


@ALL_BASES
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("used", [False, True], ids=["", "used"])
def test_a_state_dict_is_bitsandbytes_own_and_the_adapter_and_loads(
    base: Callable[..., Any], merged: bool, used: bool
) -> None:
    layer, other = trained(base()).eval(), trained(base(seed=7)).eval()
    x = inputs().requires_grad_()  # without a gradient, bitsandbytes packs anew in eval
    expected = layer(x)
    own = {f"base.{name}" for name in base().state_dict()}
    if merged:
        layer.merge()
        other.merge()
    state = layer.state_dict()
    assert set(state) == own | {"lora_A", "lora_B"}
    if used:
        other(x)
        other.base(x)
    other.load_state_dict(state)
    assert other.merged is merged
    if merged:
        assert torch.equal(other(x), layer(x))
    assert torch.equal(other.unmerge()(x), expected)
    model = nn.Sequential(nn.ReLU(), trained(base(seed=8)).eval())
    model.load_state_dict({f"1.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(model[1](x), expected)


def saved_and_loaded(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@ALL_BASES
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch_save"],
)
def test_copies_compute_the_same_and_load(
    base: Callable[..., Any], merged: bool, duplicate: Callable[[Any], Any]
) -> None:
    layer = trained(base()).eval()
    x = inputs().requires_grad_()
    expected = layer(x)
    if merged:
        layer.merge()
    other = duplicate(layer)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.unmerge()(x), expected)
    nn.init.normal_(other.lora_B)
    assert torch.equal(layer.unmerge()(x), expected)
    if duplicate is copy.deepcopy:
        another = trained(base(seed=9)).eval()
        other.load_state_dict(another.state_dict())
        assert torch.equal(other(x), another(x))


@ALL_BASES
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_to_dtype_casts_all_but_the_packed_weight(base: Callable[..., Any], merged: bool) -> None:
    layer = trained(base())
    if merged:
        layer.merge()
    packed = layer.weight.data.clone()
    layer.to(BF16)
    assert layer.lora_A.dtype is layer.lora_B.dtype is BF16
    assert torch.equal(layer.weight.data, packed)
    if merged:
        assert layer._merged_weight.dtype is BF16
    assert layer(inputs(BF16)).dtype is BF16


def test_a_checkpoint_of_other_4_bits_is_taken_with_its_state() -> None:
    """Torch alone would copy the packed weight and leave the state that says how."""
    plain, nested = (trained(quantised("LinearNF4", compress_statistics=compress)) for compress in (False, True))
    x = inputs().requires_grad_()
    plain.load_state_dict(nested.state_dict())
    assert plain.base.weight.quant_state.nested
    assert torch.equal(plain(x), nested(x))


def test_a_checkpoint_of_another_shape_is_refused_and_changes_no_base() -> None:
    layer, wider = trained(quantised("LinearNF4")), trained(quantised("LinearNF4", n=48))
    x = inputs().requires_grad_()
    expected = layer(x)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(wider.state_dict())
    assert torch.equal(layer(x), expected)


def transposed(layer: Any) -> dict[str, Any]:
    other = bnb.nn.LinearNF4(layer.out_features, layer.in_features, bias=False).to("cpu")
    return {f"base.{name}": tensor for name, tensor in other.state_dict().items()}


def without_factors(layer: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in layer.state_dict().items() if "absmax" not in name}


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize(
    ("state_of", "assign", "message"),
    [
        (transposed, False, r"packed \[128, 40\]: expected \[40, 128\]"),
        (without_factors, False, "cut short"),
        (lambda layer: layer.state_dict(), True, "assign=True"),
    ],
    ids=["transposed", "cut short", "assign"],
)
def test_a_state_dict_whose_state_cannot_be_taken_changes_nothing(
    state_of: Callable[[Any], dict[str, Any]], assign: bool, message: str, merged: bool
) -> None:
    layer = trained(quantised("LinearNF4"))
    x = inputs().requires_grad_()
    expected = layer(x)
    if merged:
        layer.merge()
    state = {name: torch.zeros_like(tensor) if name == "lora_A" else tensor for name, tensor in state_of(layer).items()}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, strict=False, assign=assign)
    assert layer.merged is merged
    assert torch.equal(layer.unmerge()(x), expected)


def test_hooks_of_the_layer_fire_and_those_of_the_base_do_not() -> None:
    layer = trained(quantised("LinearNF4"))
    seen: list[nn.Module] = []
    for module in (layer, layer.base):
        module.register_forward_hook(lambda module, args, y: seen.append(module))
    layer(inputs())
    assert seen == [layer]


def test_a_bias_is_frozen_and_prints_as_what_it_is() -> None:
    base = quantised("LinearNF4")
    assert base.bias.requires_grad
    layer = trained(base, lora_dropout=0.1, use_rslora=True)
    assert layer.base is base
    assert not base.bias.requires_grad
    assert repr(layer).startswith(
        "QuantisedLoRALinear(\n  in_features=128, out_features=40, bias=True, r=6, lora_alpha=10, lora_dropout=0.1, "
        "use_rslora=True\n  (base): LinearNF4("
    )


def test_the_options_are_passed_on() -> None:
    layer = trained(quantised("LinearNF4"), use_rslora=True, lora_dropout=0.2, adapter_dtype=BF16)
    assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.scale) == (6, 10, 0.2, 10 / 6**0.5)
    assert layer.lora_A.dtype is BF16
    assert layer(inputs(BF16)).dtype is BF16


@ALL_BASES
def test_a_reset_starts_the_adapter_and_never_the_base(base: Callable[..., Any]) -> None:
    layer = trained(base()).merge()
    packed = layer.weight.data.clone()
    layer.reset_adapter()
    assert not layer.merged
    assert not layer.lora_B.any()
    with pytest.raises(RuntimeError, match="reset_adapter"):
        layer.reset_parameters()
    assert torch.equal(layer.weight.data, packed)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no_state": (
        lambda: LoRALinear.from_linear(bnb.nn.LinearNF4(K, N)),
        RuntimeError,
        "the LinearNF4 cannot be the base of an adapter: its 4-bit weight has no quantisation state",
    ),
    "no_state_eight": (
        lambda: LoRALinear.from_linear(bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)),
        RuntimeError,
        "the Linear8bitLt cannot be the base of an adapter: its 8-bit weight has no quantisation state",
    ),
    "trained": (
        lambda: LoRALinear.from_linear(quantised("Linear8bitLt", has_fp16_weights=True)),
        RuntimeError,
        "has_fp16_weights=True",
    ),
    "subclass": (
        lambda: LoRALinear.from_linear(type("Mine", (bnb.nn.Linear4bit,), {})(K, N)),
        TypeError,
        "linear must be an nn.Linear itself, got Mine",
    ),
    "twice": (lambda: LoRALinear.from_linear(trained(quantised("LinearNF4"))), TypeError, "got QuantisedLoRALinear"),
    "rank": (lambda: LoRALinear.from_linear(quantised("LinearNF4"), r=0), ValueError, "r must be at least 1"),
    "compute_dtype": (
        lambda: LoRALinear.from_linear(quantised("LinearNF4", compute_dtype=F16), adapter_dtype=BF16)(inputs()),
        RuntimeError,
        "are bfloat16, and the stored weight computes in float16, .*: make the adapters float16 or float32, or load",
    ),
    "branch": (
        lambda: LoRALinearGroup.from_linears([quantised("LinearNF4"), bnb.nn.LinearNF4(K, N)]),
        RuntimeError,
        "branch 1: the LinearNF4 cannot be the base",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    make_layer, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        make_layer()


def test_a_refused_base_is_left_as_it_was() -> None:
    base = quantised("LinearNF4")
    with pytest.raises(ValueError, match="lora_dropout"):
        LoRALinear.from_linear(base, lora_dropout=1.0)
    assert base.bias.requires_grad


def test_an_old_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", "0.45.0")
    with pytest.raises(RuntimeError, match=r"bitsandbytes 0\.45\.0 is too old: pip install"):
        LoRALinear.from_linear(quantised("LinearNF4"))


@pytest.mark.parametrize(
    "x", [[1.0], torch.ones(3, K, dtype=torch.int64), torch.ones(3, 7)], ids=["list", "int", "width"]
)
def test_wrong_inputs_are_refused_in_words(x: Any) -> None:
    layer = trained(quantised("Linear4bit"))
    with pytest.raises((TypeError, RuntimeError), match=r"^x "):
        layer(x)


@pytest.mark.parametrize("kinds", [("four", "four", "four"), ("eight", "eight"), ("four", "dense", "eight")], ids=str)
def test_groups_are_their_layers_one_by_one(kinds: tuple[str, ...]) -> None:
    linears = [nn.Linear(K, 24) if kind == "dense" else BASES[kind](n=24 + 8 * i) for i, kind in enumerate(kinds)]
    group = LoRALinearGroup.from_linears(linears, r=3)
    for layer in group.layers:
        nn.init.normal_(layer.lora_B, std=0.3)
    x = inputs().requires_grad_()
    adapters = [p for layer in group.layers for p in (layer.lora_A, layer.lora_B)]
    ys, others = group(x), tuple(layer(x) for layer in group.layers)
    found, expected = (
        torch.autograd.grad(sum((y * gradient_of(y, i)).sum() for i, y in enumerate(outputs)), [x, *adapters])
        for outputs in (ys, others)
    )
    for one, other in zip((*ys, *found), (*others, *expected), strict=True):
        torch.testing.assert_close(one, other)
    group.layers[0].merge()
    assert torch.equal(group(x)[0], group.layers[0](x))


@pytest.mark.parametrize("style", ["ColwiseParallel", "RowwiseParallel"])
def test_tensor_parallel_styles_refuse_it(style: str) -> None:
    parallel: Any = pytest.importorskip("fastlora.parallel")
    with pytest.raises(RuntimeError, match="the base of the QuantisedLoRALinear is quantised: packed weights cannot"):
        getattr(parallel, style)()._apply(trained(quantised("LinearNF4")), None)


def test_a_step_moves_the_adapter_alone() -> None:
    layer = trained(quantised("LinearNF4", compute_dtype=BF16))
    packed, before = layer.weight.data.clone(), layer.lora_A.detach().clone()
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    with torch.autocast("cpu", dtype=BF16):
        loss = layer(inputs()).square().mean()
    loss.backward()
    optimiser.step()
    assert torch.equal(layer.weight.data, packed)
    assert not torch.equal(layer.lora_A, before)
    with torch.no_grad():
        assert layer(inputs()).square().mean() < loss
