"""Patching and unpatching PEFT models: the report, the states of an adapter's life, checkpoints, and bad input."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.backends import measured
from fastlora.backends.measured import Choice
from fastlora.peft import calls, count_calls
from fastlora.peft.layer import FusedLoraLinear, StrictLoraLinear
from fastlora.peft.patch import NEWEST, OLDEST
from tests.peft.peft_models import (
    HIDDEN,
    K,
    N,
    Net,
    adapted,
    assert_as_good_as,
    assert_same_bits,
    config,
    first,
    step,
    tokens,
    wake,
)
from tests.test_repository import ROOT, run_python

PEFT = tuple(map(int, peft.__version__.split(".")[:2]))
FIRST, SECOND = "base_model.model.first", "base_model.model.second"


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules() if isinstance(module, lora.LoraLayer)]


class Many(nn.Module):
    """A layer of each kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.first = nn.Linear(24, 36)
        self.quantised = QuantisedLinear(36, 36)
        self.conv = nn.Conv1d(36, 20, 1)


class QuantisedLinear(nn.Linear):
    """A subclass of nn.Linear, as bitsandbytes' layers are."""


class OtherLinear(lora.Linear):
    """A subclass of PEFT's layer, as that for torchao is."""


def test_report_names_every_layer_and_why() -> None:
    model = get_peft_model(Many(), config("embed", "first", "quantised", "conv"))
    report = fastlora.patch_peft(model)
    assert report.patched == (FIRST,)
    assert report.skipped == {
        "base_model.model.embed": "a peft.tuners.lora.layer.Embedding is not peft.tuners.lora.Linear itself",
        "base_model.model.quantised": (
            "base_layer is a QuantisedLinear, not nn.Linear or Conv1D itself (quantised, parametrised or wrapped)"
        ),
        "base_model.model.conv": "a peft.tuners.lora.layer.Conv1d is not peft.tuners.lora.Linear itself",
    }
    assert str(report).splitlines()[0] == "1 of 4 adapter layers patched"
    assert all(reason in str(report) and name in str(report) for name, reason in report.skipped.items())


def test_report_names_the_kernel_and_why() -> None:
    report = fastlora.patch_peft(adapted())
    assert str(report).splitlines()[1:] == ["  2 run library at 2048 tokens, by the rule: FASTLORA_TABLE=none"]
    with torch.device("meta"):
        model = get_peft_model(Net(), config("first"))
    assert str(fastlora.patch_peft(model)) == "1 of 1 adapter layers patched"


def test_report_is_printed_with_a_misspelt_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "triton-seral")
    line = str(fastlora.patch_peft(adapted())).splitlines()[1]
    assert line.startswith("  2 run nothing at 2048 tokens, FASTLORA_BACKEND='triton-seral' is unknown: expected ")


def test_report_names_what_a_table_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    report = fastlora.patch_peft(get_peft_model(Net(), config("first", "second")))
    monkeypatch.setattr(measured, "choice", lambda request: Choice("library:last", f"{request.k} -> {request.n}"))
    assert str(report).splitlines()[1:] == [
        f"  1 run library:last at 2048 tokens, {K} -> {HIDDEN}",
        f"  1 run library:last at 2048 tokens, {HIDDEN} -> {N}",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"alora_invocation_tokens": [1]}, "the adapter is a variant of LoRA (ALoraLinearVariant)")],
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_what_no_call_could_run_is_skipped_and_untouched(options: dict[str, Any], reason: str) -> None:
    model = adapted(**options)
    reference = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="patched no layer of model: 2 × ") as warned:
        report = fastlora.patch_peft(model)
    assert reason in str(warned[0].message)
    assert warned[0].filename == __file__
    assert report.skipped == {FIRST: reason, SECOND: reason}
    assert kinds(model) == [lora.Linear] * 2
    assert_same_bits(step(model, tokens()), step(reference, tokens()))


def test_subclasses_and_replaced_forwards_are_skipped() -> None:
    model = adapted()
    first(model).__class__ = OtherLinear
    second = model.base_model.model.second
    second.forward = second.forward  # what X-LoRA and accelerate's hooks do
    with pytest.warns(UserWarning, match="patched no layer"):
        report = fastlora.patch_peft(model)
    assert "OtherLinear is not peft.tuners.lora.Linear itself" in report.skipped[FIRST]
    assert "its forward was replaced on the instance" in report.skipped[SECOND]
    assert kinds(model) == [OtherLinear, lora.Linear]


def test_a_layer_without_an_attribute_that_is_read_is_skipped() -> None:
    model = adapted()
    del first(model).cast_input_dtype_enabled
    report = fastlora.patch_peft(model)
    assert report.patched == (SECOND,)
    assert "this version of peft has no cast_input_dtype_enabled" in report.skipped[FIRST]


def test_a_version_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.variants", None)
    for name in ("layer", "adapter", "dora"):
        monkeypatch.delitem(sys.modules, f"fastlora.peft.{name}")
        monkeypatch.delattr(f"fastlora.peft.{name}")
    message = r"this version of peft has no peft\.tuners\.lora\.variants: install peft 0\.18\.0 or later"
    with pytest.raises(ImportError, match=message):
        fastlora.patch_peft(model)
    assert kinds(model) == [lora.Linear] * 2


@pytest.mark.parametrize("file", ["docs/peft.md", "pyproject.toml", "requirements.txt", "Makefile", "patch_peft"])
def test_the_versions_of_peft_are_the_same_everywhere(file: str) -> None:
    text = fastlora.patch_peft.__doc__ if file == "patch_peft" else (ROOT / file).read_text(encoding="utf-8")
    named = set(re.findall(r"(?i)peft(?:>=|==| :?= ?| )(\d+\.\d+\.\d+)", text))
    assert named == {NEWEST if file == "requirements.txt" else OLDEST}


def test_patching_twice_changes_nothing_and_says_so(recwarn: pytest.WarningsRecorder) -> None:
    model = adapted()
    assert fastlora.patch_peft(model).patched == (FIRST, SECOND)
    again = fastlora.patch_peft(model)
    assert (again.patched, again.already_patched) == ((), (FIRST, SECOND))
    assert "0 of 2 adapter layers patched, 2 patched already" in str(again)
    assert kinds(model) == [FusedLoraLinear] * 2
    fastlora.patch_peft(model, strict_dtype=True)
    assert kinds(model) == [StrictLoraLinear] * 2
    assert [str(w.message) for w in recwarn if "patch" in str(w.message)] == []


def test_no_adapter_layers_is_a_warning_with_the_remedy() -> None:
    with pytest.warns(UserWarning, match="holds no adapter layers of peft: pass what get_peft_model returned"):
        report = fastlora.patch_peft(Net())
    assert (report.patched, report.skipped) == ((), {})
    injected = Net()
    fastlora.inject(injected, ["first"], r=6)
    with pytest.warns(UserWarning, match="no layer of model: its AdaptedLinear layers run on fastlora already"):
        fastlora.patch_peft(injected)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["compile", "ddp", "both"])
def test_a_wrapped_model_is_patched_inside(wrap: str, process_group: None) -> None:
    model = adapted()
    reference = copy.deepcopy(model)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    wrapped: Any = model
    if wrap != "compile":
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    if wrap != "ddp":
        wrapped = torch.compile(wrapped, backend=backend)
    step(wrapped, tokens())
    before = len(graphs)
    assert fastlora.patch_peft(wrapped).patched == (FIRST, SECOND)
    actual = step(wrapped, tokens())
    assert (len(graphs) > before) == (wrap != "ddp")
    bare = {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in actual.items()}
    assert_as_good_as(bare, reference, tokens())
    assert fastlora.unpatch_peft(wrapped) == 2


def test_warnings_are_about_the_callers_line(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Linear(2, 3)
    line = inspect.currentframe().f_lineno
    fastlora.patch_peft(model)
    fastlora.unpatch_peft(model)
    with fastlora.patched_peft(model):
        pass
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastlora.patched_peft(model))
    places = [(w.filename, w.lineno - line) for w in recwarn if "patch" in str(w.message)]
    assert places == [(__file__, 1), (__file__, 2), (__file__, 3), (__file__, 6)]


@pytest.mark.parametrize("function", [fastlora.patch_peft, fastlora.unpatch_peft])
def test_no_module_is_a_type_error(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict: pass get_peft_model's result"):
        function({})


def test_unpatching_what_was_never_patched_is_a_warning_with_the_remedy() -> None:
    with pytest.warns(UserWarning, match=r"no layer of model is patched.*call fastlora.patch_peft\(model\) first"):
        assert fastlora.unpatch_peft(adapted()) == 0


def test_without_peft_one_line_says_what_to_install() -> None:
    printed = run_python(
        "import sys, torch, warnings; sys.modules['peft'] = None; import fastlora\n"
        "try: fastlora.patch_peft(torch.nn.Linear(2, 3))\n"
        "except ImportError as error: print(error)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always'); print(fastlora.unpatch_peft(torch.nn.Linear(2, 3)), said[0].message)\n"
    )
    assert "patch_peft needs peft, which is not installed: pip install peft" in printed
    assert "0 no layer of model is patched" in printed


def test_unpatching_gives_peft_back() -> None:
    model = adapted()
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    assert fastlora.unpatch_peft(model) == 2
    assert kinds(model) == [lora.Linear] * 2
    assert_same_bits(step(model, tokens()), step(reference, tokens()))


def test_context_manager_restores_what_was_there() -> None:
    model = adapted()
    with fastlora.patched_peft(model) as report:
        assert report.patched == (FIRST, SECOND)
        assert kinds(model) == [FusedLoraLinear] * 2
    assert kinds(model) == [lora.Linear] * 2
    with pytest.raises(KeyError), fastlora.patched_peft(model):
        raise KeyError
    assert kinds(model) == [lora.Linear] * 2

    fastlora.patch_peft(model)
    with fastlora.patched_peft(model, strict_dtype=True):
        assert kinds(model) == [StrictLoraLinear] * 2
    assert kinds(model) == [FusedLoraLinear] * 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("patch", [fastlora.patch_peft, lambda model: fastlora.patched_peft(model).__enter__()])
def test_an_exception_leaves_nothing_half_patched(patch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    first(model).base_layer.weight.requires_grad_()
    with pytest.raises(UserWarning, match="trainable base"):
        patch(model)
    assert kinds(model) == [lora.Linear] * 2

    names: list[str] = []

    def fail_on_the_second(layer: nn.Module, name: str) -> None:
        names.append(name)
        if len(names) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(calls, "name_layer", fail_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        patch(model)
    assert kinds(model) == [lora.Linear] * 2


def test_each_reason_is_logged_once_a_layer(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    fastlora.patch_peft(model)
    for layer in (first(model), model.base_model.model.second):
        layer.scaling["default"] = torch.tensor(0.9)
    with caplog.at_level(logging.INFO, "fastlora"):
        for _ in range(3):
            model(tokens())
        with model.disable_adapter():
            model(tokens())
    said = [(record.levelname, record.getMessage().split(" runs")[0]) for record in caplog.records]
    assert said == [("WARNING", FIRST), ("INFO", SECOND), ("INFO", FIRST), ("INFO", SECOND)]
    assert "the scaling is a Tensor" in caplog.records[0].getMessage()
    assert "the adapters are disabled" in caplog.records[2].getMessage()


def test_import_sets_up_no_logging() -> None:
    printed = run_python(
        "import logging, fastlora; log = logging.getLogger('fastlora'); print(log.handlers, log.level)"
    )
    assert printed.split() == ["[]", "0"]


def test_state_dict_isinstance_pickle_and_copies_are_unchanged() -> None:
    model = adapted(lora_dropout=0.2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(first(model)))
    parameters = [id(parameter) for parameter in model.parameters()]
    fastlora.patch_peft(model)
    model(tokens())
    assert_same_bits(model.state_dict(), before)
    assert set(vars(first(model))) == attributes
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert isinstance(first(model), lora.Linear)
    assert "Linear" in type(first(model)).__name__
    expected = model.eval()(tokens())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(twin) == [FusedLoraLinear] * 2
        with count_calls() as calls:
            assert torch.equal(twin(tokens()), expected)
        assert calls.fast.total() == 2


@pytest.mark.parametrize("strict_dtype", [False, True])
def test_peft_s_own_tools_see_its_own_layers(strict_dtype: bool) -> None:
    model = adapted()
    layers, whole, printed = model.get_layer_status(), model.get_model_status(), str(model)
    fastlora.patch_peft(model, strict_dtype=strict_dtype)
    assert (model.get_layer_status(), model.get_model_status()) == (layers, whole)
    assert {layer.module_type for layer in model.get_layer_status()} == {"lora.Linear"}
    assert [line for line in str(model).splitlines() if "forward=fastlora" not in line] == printed.splitlines()
    assert repr(first(model)).splitlines()[:2] == ["lora.Linear(", "  forward=fastlora"]
    fastlora.unpatch_peft(model)
    assert str(model) == printed


def test_what_a_wrapper_writes_before_the_name_stays() -> None:
    """fully_shard gives each module a class of its own, whose name is FSDP and the old one."""
    model = adapted()
    fastlora.patch_peft(model)
    layer = first(model)
    layer.__class__ = type(f"FSDP{type(layer).__name__}", (Wrapper, type(layer)), {})
    assert repr(layer).startswith("lora.FSDPLinear(\n  forward=fastlora\n")


class Wrapper:
    """As torch's FSDPModule: the first base of the class that it makes."""


@pytest.mark.small_calls
def test_a_pickle_opens_in_a_new_process(tmp_path: Path) -> None:
    model = adapted("first")
    fastlora.patch_peft(model)
    layer = first(model)
    torch.save((layer, tokens(), layer(tokens())), tmp_path / "layer.pt")
    code = (
        f"import torch; layer, x, y = torch.load({str(tmp_path / 'layer.pt')!r}, weights_only=False)\n"
        "print(type(layer).__name__, torch.equal(layer(x), y))"
    )
    assert run_python(code).split() == ["FusedLoraLinear", "True"]


def test_saved_adapters_are_those_of_peft(tmp_path: Path) -> None:
    model = adapted(use_rslora=True)
    model.save_pretrained(tmp_path / "unpatched")
    fastlora.patch_peft(model)
    model.save_pretrained(tmp_path / "patched")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "unpatched" / name).read_bytes()

    torch.manual_seed(3)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "patched", is_trainable=True)
    reference = copy.deepcopy(loaded)
    fastlora.patch_peft(loaded)
    assert_as_good_as(step(loaded, tokens(16, 9)), reference, tokens(16, 9))
    # And into a model that is patched already.
    wake(loaded)
    loaded.load_adapter(tmp_path / "patched", "default", is_trainable=True)
    assert torch.equal(loaded(tokens()), model(tokens()))


def test_an_adapters_life_after_patching(tmp_path: Path) -> None:
    """Every state of an adapter is as in PEFT, and on fastlora where it may be."""
    model = adapted()
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    x = tokens(16, 9)

    def check(fast: int) -> None:
        with count_calls() as calls:
            actual = step(model, x)
        assert (calls.fast.total(), calls.fallback.total()) == (fast, 2 - fast)
        if fast:
            assert_as_good_as(actual, reference, x)
        else:
            assert_same_bits(actual, step(reference, x))

    def both(change: Any) -> None:
        for each in (model, reference):
            torch.manual_seed(7)
            change(each)

    check(fast=2)
    both(lambda m: (m.add_adapter("other", config(r=3, lora_alpha=7)), m.set_adapter("other"), wake(m)))
    assert kinds(model) == [FusedLoraLinear] * 2
    check(fast=2)
    for each in (model, reference):
        each.eval()
    with model.disable_adapter(), reference.disable_adapter():
        check(fast=0)
    check(fast=2)
    both(lambda m: m.merge_adapter())
    check(fast=0)
    both(lambda m: m.unmerge_adapter())
    check(fast=2)

    saved = adapted()
    saved.save_pretrained(tmp_path)
    both(lambda m: hotswap_adapter(m, str(tmp_path), "default", torch_device="cpu"))
    both(lambda m: (m.set_adapter("default"), m.delete_adapter("other")))
    # PEFT before 0.20 leaves tensors that are no parameters.
    check(fast=2 if PEFT >= (0, 20) else 0)
    assert torch.equal(first(model).lora_B["default"].weight, first(saved).lora_B["default"].weight)

    merged, expected = model.merge_and_unload(), reference.merge_and_unload()
    assert kinds(merged) == []
    assert torch.equal(merged(x), expected(x))


def test_layers_that_are_adapted_later_need_another_call() -> None:
    model = adapted("first")
    fastlora.patch_peft(model)
    model.add_adapter("other", config("first", "second"))
    model.set_adapter("other")
    assert kinds(model) == [FusedLoraLinear, lora.Linear]
    report = fastlora.patch_peft(model)
    assert (report.patched, report.already_patched) == ((SECOND,), (FIRST,))


def test_all_linear_still_finds_the_layers() -> None:
    model = adapted("first", "second")
    fastlora.patch_peft(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    assert set(first(model).lora_A) == {"default", "other"}


def test_xlora_works_before_and_after(tmp_path: Path) -> None:
    """X-LoRA replaces the forward of each layer's instance and calls the old one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=2, use_cache=False, **sizes))
    for seed, name in enumerate(("0", "1")):
        torch.manual_seed(seed)
        expert = get_peft_model(copy.deepcopy(base), config("q_proj", "down_proj"))
        wake(expert)
        expert.save_pretrained(tmp_path / name)
    options = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=24, adapters={name: str(tmp_path / name) for name in ("0", "1")}
    )
    model = get_peft_model(base, options).eval()
    ids = torch.arange(14).view(2, 7)
    expected = model(input_ids=ids).logits
    with pytest.warns(UserWarning, match="2 × its forward was replaced on the instance"):
        fastlora.patch_peft(model)
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_replays_the_masks(p: float, reentrant: bool) -> None:
    model = adapted(lora_dropout=p)
    fastlora.patch_peft(model)
    plain = step(model, tokens())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(model, x, use_reentrant=reentrant)

    with count_calls() as calls:
        actual = step(Checkpointed(), tokens())
    assert (calls.fast.total(), calls.fallback.total()) == (4, 0)
    assert_same_bits({name.removeprefix("model."): t for name, t in actual.items()}, plain)


def test_gradients_accumulate() -> None:
    model = adapted()
    fastlora.patch_peft(model)
    weight = first(model).lora_A["default"].weight
    total = torch.zeros_like(weight)
    for seed in (1, 2, 3):
        step(model, tokens(seed=seed))
        total += weight.grad
    model.zero_grad()
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(2)
        y = model(tokens(seed=seed))
        (y * torch.randn(y.shape, generator=generator)).sum().backward()
    assert torch.equal(weight.grad, total)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_compiles_into_one_graph_with_the_operator_in_it(p: float) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = adapted(lora_dropout=p)
    fastlora.patch_peft(model)
    eager = step(model, tokens())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same_bits({name.removeprefix("_orig_mod."): t for name, t in step(compiled, tokens()).items()}, eager)
    assert len(graphs) == 1
    code = graphs[0].print_readable(print_output=False)
    assert code.count("fastlora.lora_matmul.default") >= 2
    # A state that a compiled call must notice.
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(compiled(tokens()), model(tokens()))
    first(model).set_scale("default", 3)
    assert_same_bits(
        {n.removeprefix("_orig_mod."): t for n, t in step(compiled, tokens()).items()}, step(model, tokens())
    )
    model.merge_adapter()
    assert torch.equal(compiled(tokens()), model(tokens()))
    torch._dynamo.reset()


def test_a_compiled_fallback_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = adapted("first")
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    for each in (model, reference):
        first(each).cast_input_dtype_enabled = False
    with caplog.at_level(logging.WARNING, "fastlora"):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(compiled(tokens()), reference(tokens()))
    assert [record.getMessage() for record in caplog.records if record.name == "fastlora"] == [
        "a layer that torch.compile traces runs PEFT's own forward: casting of the input is switched off "
        "(disable_input_dtype_casting) (logged once per reason; further layers at INFO)"
    ]
    torch._dynamo.reset()


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    model = adapted()
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    compiled = torch.compile(model, fullgraph=True)
    actual = {name.removeprefix("_orig_mod."): t for name, t in step(compiled, tokens(16, 9)).items()}
    assert_as_good_as(actual, reference, tokens(16, 9))
    torch._dynamo.reset()


def test_an_export_that_is_not_strict_says_so(caplog: pytest.LogCaptureFixture) -> None:
    options = LoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), options).eval()
    fastlora.patch_peft(model)
    with torch.no_grad():
        torch.export.export(model.base_model.model, (torch.randn(3, 8),), strict=False)
    said = "a layer that torch.export traces runs PEFT's own forward: torch.export with strict=False"
    assert any(record.getMessage().startswith(said) for record in caplog.records)
