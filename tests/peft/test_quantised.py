"""PEFT's layers on bitsandbytes' of 4 and 8 bits: as good as PEFT, with PEFT's dtypes, and else PEFT's own forward."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora.accuracy import assert_close_to_oracle
from fastlora.peft import count_calls
from fastlora.quantised import stored_weight
from fastlora.tune.layers import of_model
from tests.cases import Operands, assert_matches_reference, gradient_of, upcoming_dropout
from tests.peft.peft_models import assert_same_bits, config, first, step, tokens, wake
from tests.peft.quantised_models import HIDDEN, K, N, adapted, assert_as_good_as, dense_twin

pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True.", "ignore:Merge lora module", "ignore:Unmerge lora")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PACKS = pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU packs no weight anew")


def run(model: Any, x: Tensor, autocast: torch.dtype | None = None) -> tuple[dict[str, Tensor], Any]:
    """A step, and the calls in it."""
    with count_calls() as calls, torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        return step(model, x), calls


def pair(**options: Any) -> tuple[Any, Any]:
    """A patched model and its unpatched copy."""
    model = adapted(**options)
    reference = copy.deepcopy(model)
    assert len(fastlora.patch_peft(model).patched) == 2
    return model, reference


# What runs on fastlora, as good as PEFT: (options of the model, dtype of x, autocast).
FAST: dict[str, tuple[dict[str, Any], torch.dtype, torch.dtype | None]] = {
    "nf4": ({}, FP32, None),
    "fp4": ({"quant_type": "fp4"}, FP32, None),
    "no double quantisation": ({"compress_statistics": False}, FP32, None),
    "packed from bf16": ({"packed_from": BF16}, FP32, None),
    "no compute dtype, x bf16": ({"compute": None, "adapter_dtype": BF16}, BF16, None),
    "lora_bias": ({"lora_bias": True}, FP32, None),
    "compute fp32, adapters bf16, x bf16": ({"adapter_dtype": BF16}, BF16, None),
    "compute fp32, autocast": ({}, FP32, BF16),
    "QLoRA: compute bf16, autocast, x fp32": ({"compute": BF16}, FP32, BF16),
    "QLoRA: compute bf16, autocast, x bf16": ({"compute": BF16}, BF16, BF16),
    "QLoRA: compute bf16, autocast, adapters bf16": ({"compute": BF16, "adapter_dtype": BF16}, FP32, BF16),
    "compute bf16, adapters bf16, x fp32": ({"compute": BF16, "adapter_dtype": BF16}, FP32, None),
    "compute fp16, adapters fp16, x fp16": ({"compute": FP16, "adapter_dtype": FP16}, FP16, None),
    "compute fp16, autocast": ({"compute": FP16}, FP32, FP16),
    "8 bits": ({"bits": 8}, FP32, None),
    "8 bits, outliers": ({"bits": 8, "threshold": 1.5}, FP32, None),
    "8 bits, lora_bias": ({"bits": 8, "lora_bias": True}, FP32, None),
    "8 bits, adapters bf16": ({"bits": 8, "adapter_dtype": BF16}, FP32, None),
    "8 bits, bf16": ({"bits": 8, "adapter_dtype": BF16}, BF16, None),
    "8 bits, autocast": ({"bits": 8}, BF16, BF16),
}


@pytest.mark.parametrize("case", FAST)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_quantised_bases(case: str, training: bool) -> None:
    """In eval mode an 8-bit product rounds its input: there the oracle is as far from ours as from PEFT's."""
    options, dtype, autocast = FAST[case]
    model, reference = pair(**options)
    for each in (model, reference):
        each.train(training)
    x = tokens(16, 9, k=K, dtype=dtype)
    actual, calls = run(model, x, autocast)
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
    assert_as_good_as(actual, reference, x, autocast)
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = model(x)
    assert y.dtype is actual["y"].dtype
    assert not getattr(first(model).base_layer.weight, "quant_state", None) or not hasattr(
        first(model).base_layer.weight.quant_state, "packing_format_for_cpu"
    )


def layer_operands(layer: Any, x: Tensor, compute: torch.dtype) -> Operands:
    base = layer.base_layer
    weight = stored_weight(base)
    assert not isinstance(weight, str)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Operands(x.detach().to(compute), weight.dense(compute), a, b, base.bias.detach().to(compute))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_quantised_base_with_half_precision(bits: int, p: float) -> None:
    """What PEFT would compute in float32 is computed in the base's dtype, as on a dense base; dropout is replayed."""
    model = adapted("first", bits=bits, compute=BF16, lora_dropout=p)
    layer = first(model)
    strict = copy.deepcopy(model)
    fastlora.patch_peft(model)
    x = tokens(16, 9, k=K, dtype=BF16).requires_grad_()
    dropout = upcoming_dropout(p)
    with count_calls() as calls:
        y = layer(x)
    assert (calls.fast.total(), calls.fallback.total()) == (1, 0)
    dy = gradient_of(y)
    y.backward(dy)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    actual = {"y": y, "x": x.grad, "lora_a": a.grad, "lora_b": b.grad}
    assert_matches_reference(actual, layer_operands(layer, x, BF16), dy, scale=10 / 6, dropout=dropout)

    expected = step(strict, x)
    fastlora.patch_peft(strict, strict_dtype=True)
    actual, calls = run(strict, x)
    assert "strict_dtype" in str(calls)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_result_has_the_dtype_that_peft_gives_it(bits: int) -> None:
    x = tokens(3, k=K)
    reasons: set[str] = set()
    for compute, adapter in itertools.product((FP32, BF16, FP16) if bits == 4 else (None,), (FP32, BF16)):
        model = adapted("first", bits=bits, compute=compute, adapter_dtype=adapter)
        reference = copy.deepcopy(model)
        fastlora.patch_peft(model)
        for training, dtype, autocast in itertools.product((True, False), (FP32, BF16, FP16), (None, BF16, FP16)):
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None), count_calls() as calls:
                actual = first(model.train(training))(x.to(dtype).requires_grad_())
                expected = first(reference.train(training))(x.to(dtype).requires_grad_())
            assert actual.dtype is expected.dtype, (compute, adapter, training, dtype, autocast)
            reasons |= set(calls.reasons)
    expected_reasons = (
        ("and the adapter would not", "cannot hold", "without autocast")
        if bits == 4
        else ("an 8-bit base on a cpu in training gives that", "and the adapter would not", "cannot hold")
    )
    for words in expected_reasons:
        assert any(words in reason for reason in reasons), (words, reasons)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_with_several_adapters(bits: int) -> None:
    model = adapted(bits=bits, r=2, lora_alpha=3)
    model.add_adapter("other", config(r=6, lora_alpha=25))
    model.base_model.set_adapter(["default", "other"])
    wake(model)
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    x = tokens(16, 9, k=K)
    actual, calls = run(model, x)
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
    assert_as_good_as(actual, reference, x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("reentrant", [True, False])
def test_quantised_bases_under_checkpointing(bits: int, reentrant: bool) -> None:
    """With dropout: the masks and the weights are made anew in the backward."""
    model = adapted(bits=bits, lora_dropout=0.3)
    fastlora.patch_peft(model)
    x = tokens(16, 9, k=K)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=reentrant)

    expected = step(model, x)
    actual = {name.removeprefix("model."): t for name, t in step(Checkpointed(), x).items()}
    assert_same_bits(actual, expected)


# Falls back: name → (what changes a model, the reason).


def on_base(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: change(first(model).base_layer)


def without_state(base: Any) -> None:
    if hasattr(base, "quant_state"):
        base.weight.quant_state = None
    else:
        base.weight.CB = base.weight.SCB = base.state.CB = base.state.SCB = None


def replaced(base: Any) -> None:
    plain = base.forward
    base.forward = lambda x: 1.5 * plain(x)


def of_another_class(base: Any) -> None:
    base.__class__ = type("Another", (type(base),), {})


FALLBACK: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook on a quantised base": (
        on_base(lambda base: base.register_forward_hook(lambda module, args, y: 1.5 * y)),
        "base_layer has hooks",
    ),
    "replaced forward of a quantised base": (on_base(replaced), "base_layer has hooks"),
    "quantised, merged": (lambda model: first(model).merge(), "merged into the base"),
    "quantised, disabled": (lambda model: first(model).enable_adapters(False), "adapters are disabled"),
    "quantised base of another class": (
        on_base(of_another_class),
        "base_layer is a Another, not Linear4bit or Linear8bitLt of bitsandbytes itself",
    ),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", FALLBACK)
def test_quantised_layers_fall_back_bit_for_bit(case: str, bits: int) -> None:
    change, reason = FALLBACK[case]
    model = adapted("first", bits=bits)
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    for each in (model, reference):
        change(each)
    actual, calls = run(model, tokens(k=K))
    assert calls.fast.total() == 0
    assert reason in str(calls)
    assert_same_bits(actual, step(reference, tokens(k=K)))


def test_a_merge_is_undone_on_a_quantised_layer() -> None:
    """PEFT's merge makes another packed weight, and unmerge another again: each is the one that runs."""
    model, reference = pair()
    for each in (model, reference):
        each.merge_adapter()
        each.unmerge_adapter()
    actual, calls = run(model, tokens(16, 9, k=K))
    assert calls.fast.total() == 2
    assert_as_good_as(actual, reference, tokens(16, 9, k=K))


@PACKS
def test_a_weight_that_a_cpu_packed_anew_is_left_to_peft() -> None:
    """A base that computes by itself in eval mode without gradients packs its weight, which is not undone."""
    model = adapted("first")
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    x = tokens(k=K)
    y = first(model)(x.requires_grad_())  # what it keeps is as it was
    with torch.no_grad():
        for each in (model, reference):
            each.eval()
            with each.disable_adapter():
                each(x.detach())
            each.train()
    dy = gradient_of(y)
    y.backward(dy)
    oracle = dense_twin(adapted("first"))
    x64 = x.detach().double().requires_grad_()
    first(oracle)(x64).backward(dy.double())
    baseline = adapted("first")
    x32 = x.detach().requires_grad_()
    first(baseline)(x32).backward(dy)
    assert_close_to_oracle(x.grad, oracle=x64.grad, baseline=x32.grad, name="x")

    # bitsandbytes gives x no gradient from here on, or raises an error.
    with torch.no_grad(), count_calls() as calls:
        y = model(x)
        assert torch.equal(y, reference(x))
    assert calls.fast.total() == 0
    assert "packed anew for this CPU" in str(calls)
    with pytest.warns(UserWarning, match="packed anew for this CPU"):
        fastlora.patch_peft(reference)


# At patch time.


def test_layers_without_a_state_are_skipped_with_the_remedy() -> None:
    for bits in (4, 8):
        model = adapted(bits=bits)
        without_state(first(model).base_layer)
        report = fastlora.patch_peft(model)
        assert report.patched == ("base_model.model.second",)
        assert "no quantisation state: move the layer to a device" in report.skipped["base_model.model.first"]


def test_an_old_bitsandbytes_is_skipped_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setattr(bnb, "__version__", "0.46.1")
    with pytest.warns(UserWarning, match="bitsandbytes 0.46.1 is too old: pip install 'bitsandbytes>=0.49'"):
        assert fastlora.patch_peft(model).patched == ()


@pytest.mark.parametrize(
    "name", ["TorchaoLoraLinear", "HqqLoraLinear", "GPTQLoraLinear", "AwqLoraLinear", "Linear4bit"]
)
def test_layers_on_other_quantised_bases_are_skipped_by_name(name: str) -> None:
    """PEFT's layers for other libraries, and those on a base of another name, are not known."""
    model = adapted("first")
    layer = first(model)
    layer.__class__ = type(name, (type(layer),), {"__module__": "peft.tuners.lora.other"})
    with pytest.warns(UserWarning, match=f"a peft.tuners.lora.other.{name} is not peft.tuners.lora.Linear itself"):
        fastlora.patch_peft(model)


def test_the_report_says_what_the_base_is() -> None:
    lines = str(fastlora.patch_peft(adapted(quant_type="fp4", compute=BF16))).splitlines()
    assert "  2 with a 4-bit base (fp4), dequantised for each product" in lines
    report = fastlora.patch_peft(adapted(bits=8))
    assert "  2 with an 8-bit base, multiplied by bitsandbytes, dequantised in the backward" in str(report).splitlines()
    ((request, _), *_) = fastlora.patch_peft(adapted("first", compute=BF16)).requests.items()
    assert (request.k, request.n, request.dtype) == (K, HIDDEN, BF16)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_report_while_merged_is_of_the_dense_sum(bits: int) -> None:
    model = adapted("first", bits=bits, compute=BF16).eval()
    fastlora.patch_peft(model)
    with fastlora.merged(model):
        report = fastlora.patch_peft(model)
        (request,) = report.requests
        assert (request.k, request.n, request.dtype) == (K, HIDDEN, first(model).base_layer.weight.dtype)
    assert not report.bases


def test_the_tuner_takes_four_bits_for_the_dtype_in_which_they_compute() -> None:
    model, _ = pair(compute=BF16)
    assert [(layer.k, layer.n, layer.dtype) for layer in of_model(model)] == [(K, HIDDEN, BF16), (HIDDEN, N, BF16)]
    with pytest.raises(ValueError, match="2 × the product with an 8-bit base is bitsandbytes' own"):
        of_model(adapted(bits=8))


@pytest.mark.parametrize("bits", [4, 8])
def test_patched_quantised_layers_are_undone_and_copied(bits: int) -> None:
    model = adapted(bits=bits)
    kind = type(first(model))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = tokens(k=K)
    with fastlora.patched_peft(model):
        assert isinstance(first(model), kind)
        assert type(first(model)) is not kind
        assert model.state_dict().keys() == before.keys()
        y = run(model, x)[0]["y"]
        printed = repr(first(model))
        assert printed.startswith(f"lora.{kind.__name__}(")
        twin = copy.deepcopy(model)
        actual, calls = run(twin, x)
        assert calls.fast.total() == 2
        assert torch.equal(actual["y"], y)
    assert type(first(model)) is kind
    fastlora.patch_peft(model, strict_dtype=True)
    assert fastlora.patch_peft(model, strict_dtype=True).already_patched
    assert fastlora.unpatch_peft(model) == 2
    assert type(first(model)) is kind
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_patched_quantised_model_is_pickled(tmp_path: Any) -> None:
    model, _ = pair()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    actual, calls = run(loaded, tokens(k=K))
    assert calls.fast.total() == 2
    assert_same_bits(actual, step(model, tokens(k=K)))


# What computes together.


class Block(nn.Module):
    """A gated MLP by its source."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(K, HIDDEN), nn.Linear(K, HIDDEN, bias=False)
        self.down_proj, self.act_fn = nn.Linear(HIDDEN, N), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("autocast", [None, BF16], ids=["", "autocast"])
@pytest.mark.parametrize("mlp", [True, False], ids=["mlp", "groups"])
@pytest.mark.parametrize(
    "options",
    [{}, {"only": ("gate_proj", "down_proj")}, {"only": ("up_proj",)}, {"bits": 8}],
    ids=["4 bits", "up dense", "gate and down dense", "8 bits"],
)
def test_quantised_siblings(options: dict[str, Any], mlp: bool, autocast: torch.dtype | None) -> None:
    eight = options.get("bits") == 8
    compute = BF16 if autocast and not eight else FP32
    names = ("gate_proj", "up_proj", "down_proj")
    model = adapted(*names, net=Block(), compute=compute, **options)
    reference = copy.deepcopy(model)
    report = fastlora.patch_peft(model, mlp=mlp)
    assert len(report.mlps) == mlp
    assert len(report.groups) == 1
    x = tokens(64, 5, k=K, dtype=BF16 if autocast and eight else FP32)
    actual, calls = run(model, x, autocast)
    assert calls.fallback.total() == 0
    assert calls.fast.total() == (0 if mlp else 3)
    assert calls.groups.grouped == (0 if mlp else 1)
    assert calls.groups.wasted == 0
    assert_as_good_as(actual, reference, x, autocast)


# What is kept, and compiled.


@pytest.mark.parametrize("bits", [4, 8])
def test_no_dense_weight_is_kept_for_the_backward(bits: int) -> None:
    model, _ = pair(bits=bits, lora_dropout=0.2)
    x = tokens(16, 9, k=K).requires_grad_()
    kept: list[torch.Size] = []
    wide = {HIDDEN * K, N * HIDDEN}

    def pack(t: Tensor) -> Tensor:
        kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum().backward()
    assert kept
    assert not any(shape.numel() in wide for shape in kept)

    def dense() -> int:
        gc.collect()
        found = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.numel() in wide]
        return sum(t.is_floating_point() for t in found)

    # A workspace is one for all layers of a shape, however many there are.
    before = dense()
    y = model(x)
    assert dense() == before
    del y


@pytest.mark.parametrize("bits", [4, 8])
def test_a_patched_quantised_model_compiles_into_one_graph(bits: int) -> None:
    model, reference = pair(bits=bits)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = tokens(16, 9, k=K)
    actual = {name.removeprefix("_orig_mod."): t for name, t in step(compiled, x).items()}
    assert_as_good_as(actual, reference, x)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_loads_quantised(bits: int, tmp_path: Any) -> None:
    """QLoRA as it is done: loaded in 4 bits, prepared, adapted, patched, under autocast."""
    sizes = dict(vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).to(BF16).save_pretrained(tmp_path)
    options: Any = {"load_in_8bit": True}
    if bits == 4:
        options = dict(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=BF16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    model = get_peft_model(prepare_model_for_kbit_training(model), config("q_proj", "v_proj", "up_proj", "gate_proj"))
    wake(model)
    reference = copy.deepcopy(model)
    assert len(fastlora.patch_peft(model).patched) == 4
    ids = torch.arange(96).view(4, 24) % 47

    def of(model: Any, autocast: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            y = model(input_ids=ids).logits
        y.backward(gradient_of(y))
        return {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    oracle = {name: t.double() for name, t in of(dense_twin(reference), False).items()}
    with count_calls() as calls:
        actual = of(model, True)
    assert (calls.fast.total(), calls.fallback.total()) == (4, 0)
    baseline = of(reference, True)
    assert actual.keys() == baseline.keys() == oracle.keys()
    for name in actual:
        assert_close_to_oracle(actual[name], oracle=oracle[name], baseline=baseline[name], name=name)
