"""``fastlora.measure``: the model comes back as it was, verdicts follow from numbers, and errors name remedies."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model

import fastlora
from fastlora import siblings
from fastlora.clock import Work
from fastlora.measure import __main__ as command
from fastlora.measure import run as run_module
from fastlora.measure.batch import batch_of, loss_of
from fastlora.measure.report import Arm, Measurement, range_of
from fastlora.peft import Calls
from fastlora.peft.layer import Fused, FusedLoraLinear
from tests.peft.peft_models import K, adapted, config
from tests.test_repository import run_python


class Clock:
    """Runs the work and reports what a script says: so many milliseconds patched, and so many unpatched."""

    model: nn.Module
    patched, own = 2.0, 3.0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def wall(self, work: Work) -> float:
        work()
        return self.patched if any(isinstance(m, Fused) for m in self.model.modules()) else self.own


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Clock]]:
    monkeypatch.setattr(run_module, "Clock", Clock)
    return Clock


def x(rows: int = 70) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(5))


def measured(model: nn.Module, batch: Any, **options: Any) -> Measurement:
    Clock.model = model
    return fastlora.measure(model, batch, steps=6, **options)


def named(model: PeftModel, **options: Any) -> Measurement:
    return measured(model, x(), **options)


def test_the_function_is_no_module_whatever_is_imported() -> None:
    printed = run_python(
        "import fastlora.measure\n"
        "import fastlora.measure.report\n"
        "from fastlora.measure import measure\n"
        "import fastlora\n"
        "print(callable(fastlora.measure), fastlora.measure is measure)\n"
    )
    assert printed.split() == ["True", "True"]
    assert importlib.import_module("fastlora.measure").measure is fastlora.measure


def test_a_report(clock: type[Clock]) -> None:
    report = named(adapted(lora_dropout=0.1))
    assert (report.tokens, report.verdict) == (70, "faster")
    assert report.peft.milliseconds == report.again == (3.0,) * 6
    assert report.fastlora.milliseconds == (2.0,) * 6
    assert report.gain == (1.5, 1.5, 1.5)
    assert report.noise == 0
    assert report.calls.fast.total() == 2
    text = str(report)
    for words in (
        "Net: 70 tokens, forward and backward, float32 base, float32 adapters, dropout",
        "torch 2.",
        "PEFT's own forward    23,333          3",
        "fastlora              35,000          2",
        "between 1.500 and 1.500 with 95 % confidence (6 turns)",
        "kernel: library at 70 tokens",
        "2 calls ran on fastlora, 0 on PEFT's own forward",
        "fastlora is faster for this model here: 1.50 of PEFT's speed",
    ):
        assert words in text
    assert json.loads(json.dumps(report.as_dict()))["verdict"] == "faster"


class Buffered(nn.Module):
    """Adapters, a buffer that every forward writes, and parts in modes of their own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(K)
        self.inner = model
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.inner(self.norm(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("before", [None, {}, {"strict_dtype": True}])
def test_the_model_is_left_as_it_was(
    clock: type[Clock], training: bool, backward: bool, before: dict[str, Any] | None
) -> None:
    model = Buffered(adapted(lora_dropout=0.1)).train(training)
    model.norm.train(not training)
    if before is not None:
        fastlora.patch_peft(model, **before)
    model.requires_grad_(True)
    model.inner(x()).sum().backward()
    kept = copy.deepcopy({**dict(model.named_parameters()), **dict(model.named_buffers())})
    objects = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    kinds = [(type(m), m.training, siblings.group_of(m)) for m in model.modules()]
    state = torch.get_rng_state()
    measured(model, x(), backward=backward)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(type(m), m.training, siblings.group_of(m)) for m in model.modules()] == kinds
    for name, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert t is objects[name]
        assert torch.equal(t, kept[name])
    for name, p in model.named_parameters():
        grad, copied = grads[name]
        assert p.grad is grad
        assert grad is None or torch.equal(grad, copied)


def test_the_model_is_left_as_it_was_by_an_error(clock: type[Clock]) -> None:
    model = adapted()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measured(model, torch.randn(7, K + 1))
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.grad is None for p in model.parameters())


def test_groups_of_a_patched_model_come_back(clock: type[Clock]) -> None:
    model = get_peft_model(Attention(), config("q_proj", "k_proj"))
    fastlora.patch_peft(model)
    groups = [siblings.group_of(m) for m in model.modules()]
    assert sum(group is not None for group in groups) == 2
    report = measured(model, x(), groups=None)
    assert report.calls.groups.grouped == 0
    assert [siblings.group_of(m) for m in model.modules()] == groups
    assert measured(model, x(300)).calls.groups.taken == 1


class Attention(nn.Module):
    """Two layers that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(K, 40), nn.Linear(K, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(x)


def test_why_calls_fall_back_is_said(clock: type[Clock]) -> None:
    model = adapted()
    model.disable_adapter_layers()
    model.requires_grad_(True)
    report = named(model)
    assert report.verdict == "not run"
    assert "0 calls ran on fastlora, 2 on PEFT's own forward\n  2 × " in str(report)
    assert report.sentence == "fastlora is not faster for this model here: every call ran PEFT's own forward"
    assert report.as_dict()["calls"]["peft"] == dict(report.calls.reasons)


def made(
    ours: list[float],
    own: list[float],
    again: list[float] | None = None,
    kept: tuple[int | None, int | None] = (None, None),
) -> Measurement:
    return Measurement(
        "a model",
        "a machine",
        512,
        Arm(tuple(own), 3 << 20, kept[1]),
        tuple(again or own),
        Arm(tuple(ours), 3 << 20, kept[0]),
        Calls(Counter({"layer": 4})),
        ("library",),
    )


@pytest.mark.parametrize(
    ("ours", "own", "again", "verdict", "sentence"),
    [
        (
            [10.0] * 8,
            [12.0] * 8,
            [12.1] * 8,
            "faster",
            "fastlora is faster for this model here: 1.20 of PEFT's speed (1.20 to 1.20), beyond the noise of 0.83 %",
        ),
        (
            [12.0] * 8,
            [10.0] * 8,
            None,
            "slower",
            "fastlora is slower for this model here: 0.83 of PEFT's speed (0.83 to 0.83), beyond the noise of 0 %: "
            "leave it unpatched",
        ),
        (
            [10.0] * 8,
            [9.7, 9.7, 9.9, 10.0, 10.0, 10.0, 10.1, 10.1],
            [9.9, 9.9, 9.9, 10.0, 10.0, 10.1, 10.1, 10.1],
            "no difference",
            "fastlora is not faster for this model here: 0.97 to 1.01 of PEFT's speed, within the noise of 2 %",
        ),
        # Beyond 1 as a whole, and yet no more than PEFT differs from itself.
        ([10.0] * 8, [10.2] * 8, [10.5] * 8, "no difference", None),
        # One stalled step is no gain, and two ranges that meet are none.
        ([10.0] * 8, [10.0] * 7 + [90.0], None, "no difference", None),
        (
            [10.0] * 8,
            [9.0, 14.0] * 4,
            [14.0, 9.0] * 4,
            "too noisy",
            "this run cannot say whether fastlora is faster for this model: 0.90 to 1.40 of PEFT's speed, and PEFT's "
            "own steps differ by 56 %. Measure again on a quiet machine, or with more steps",
        ),
    ],
)
def test_the_verdict(
    ours: list[float], own: list[float], again: list[float] | None, verdict: str, sentence: str | None
) -> None:
    report = made(ours, own, again)
    assert report.verdict == verdict
    assert sentence is None or report.sentence == sentence
    assert str(report).endswith(report.sentence)


def test_the_memory_that_is_kept_is_in_the_verdict() -> None:
    assert made([1.0] * 6, [1.0] * 6, kept=(150, 200)).sentence.endswith("; it keeps 25 % less for the backward")
    assert made([1.0] * 6, [1.0] * 6, kept=(220, 200)).sentence.endswith("; it keeps 10 % more for the backward")
    assert "keeps" not in made([1.0] * 6, [1.0] * 6, kept=(200, 200)).sentence


def test_a_range_is_that_of_the_sign_test() -> None:
    assert range_of([6, 1, 5, 2, 4, 3]) == (1, 3.5, 6)
    # Tables of the binomial distribution: the 6th and the 15th of 20.
    assert range_of(list(range(1, 21))) == (6, 10.5, 15)
    with pytest.raises(ValueError, match="at least 6, got 5"):
        range_of([1.0] * 5)


def test_batches_and_losses() -> None:
    ids = torch.zeros(3, 5, dtype=torch.int64)
    assert batch_of({"attention_mask": ids.new_ones(3), "input_ids": ids}).tokens == 15
    assert batch_of(torch.zeros(2, 5, 7)).tokens == 10
    assert batch_of((torch.zeros(7), 1)).tokens == 7
    leaf = torch.ones(2, 3, requires_grad=True)
    batch = batch_of(leaf)
    batch.run(nn.Identity()).sum().backward()
    assert leaf.grad is None
    t = torch.ones(2, 3)
    assert loss_of((t, {"deeper": [t, ids]}), None) == 12
    assert loss_of(t, lambda output: output.mean()) == 1
    with pytest.raises(TypeError, match=r"one element, got a tensor of shape \(2, 3\): pass loss="):
        loss_of(t, lambda output: output)
    with pytest.raises(TypeError, match="one element, got NoneType"):
        loss_of(ids, None)


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def hooked(model: nn.Module) -> nn.Module:
    next(p for p in model.parameters() if p.requires_grad).register_post_accumulate_grad_hook(lambda p: None)
    return model


class Params4bit(nn.Parameter):
    """Named as bitsandbytes' own."""


def four_bit(model: nn.Module) -> nn.Module:
    model.base_model.model.second.base_layer.weight = Params4bit(torch.zeros(3), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("model", "batch", "options", "error", "words"),
    [
        (lambda: 3, x, {}, TypeError, "model must be a torch.nn.Module, got int"),
        (adapted, lambda: 3, {}, TypeError, "batch must be a dict .* got int"),
        (adapted, dict, {}, TypeError, "batch holds no tensor"),
        (adapted, x, {"steps": 5}, ValueError, "steps must be at least 6"),
        (lambda: nn.Linear(K, 5), x, {}, ValueError, "pass what get_peft_model returned"),
        (lambda: wrapped(adapted()), x, {}, ValueError, "model is a OptimizedModule.* before it is wrapped"),
        (lambda: four_bit(adapted()), x, {"backward": False}, ValueError, r"second has a 4-bit .* anew"),
        (lambda: hooked(adapted()), x, {}, ValueError, "lora_A.* has a hook that runs after its gradient"),
        (lambda: adapted().to("meta"), x, {}, ValueError, "on the meta device"),
        (adapted, lambda: x().to("meta"), {}, ValueError, r"argument 0 of batch is on meta .* \.to\('cpu'\)"),
        (lambda: adapted().requires_grad_(False), x, {}, ValueError, r"nothing trains: .* \(backward=False\)"),
    ],
)
def test_errors(
    clock: type[Clock],
    model: Callable[[], Any],
    batch: Callable[[], Any],
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    made, given = model(), batch()
    Clock.model = made
    with pytest.raises(error, match=words):
        fastlora.measure(made, given, **options)


def test_an_injected_model_has_nothing_to_compare_with(clock: type[Clock]) -> None:
    model = nn.Sequential(nn.Linear(K, 5))
    fastlora.inject(model, ["0"], r=3, lora_alpha=7)
    with pytest.raises(ValueError, match=r"fastlora's own adapters .* peft\.get_peft_model, and measure that one"):
        measured(model, x())


def test_a_patched_model_is_compared_with_peft_and_warns_of_nothing(clock: type[Clock]) -> None:
    model = adapted()
    fastlora.patch_peft(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = named(model, loss=lambda output: output.square().mean())
    assert set(report.peft.milliseconds) == {3.0}
    assert any(type(m) is FusedLoraLinear for m in model.modules())


LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
SMALL = ("--tokens", "24", "--rank", "3", "--dtype", "fp32", "--steps", "6", "--layers", "1")


class Always(Clock):
    """A clock that sees no model: all steps take the same."""

    def wall(self, work: Work) -> float:
        work()
        return 2.0


def config_file(folder: Path, described: dict[str, Any]) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(described))
    return str(file)


def test_the_command_measures_a_model_of_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "Clock", Always)
    file = config_file(tmp_path, LLAMA)
    numbers, page = tmp_path / "numbers.json", tmp_path / "page.md"
    arguments = ["--model", file, *SMALL, "--json", str(numbers), "--markdown", str(page)]
    assert command.main(arguments) == 0
    assert command.main([*arguments, "--forward", "--mlp"]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 24 tokens, forward and backward, float32 base, float32 adapters, dropout" in printed
    assert "LlamaForCausalLM: 24 tokens, forward alone, float32 base, float32 adapters, no dropout" in printed
    assert "7 calls ran on fastlora, 0 on PEFT's own forward" in printed
    assert "4 calls ran on fastlora, 0 on PEFT's own forward" in printed
    assert "1 gated MLPs as one product each" in printed
    assert (
        "fastlora is not faster for this model here: 1.00 to 1.00 of PEFT's speed, within the noise of 0 %" in printed
    )
    assert json.loads(numbers.read_text())["tokens"] == 24
    assert page.read_text().count("dropout 0.05: no difference\n\n```\n$ python -m fastlora.measure --model ") == 2


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_models_of_other_kinds(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "Clock", Always)
    widths = {
        "gpt2": {"n_embd": 48, "n_head": 4, "n_layer": 2, "vocab_size": 61},
        "bert": {**LLAMA, "architectures": ["BertForMaskedLM"]},
        "t5": {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 1, "num_heads": 4, "vocab_size": 61},
    }[kind]
    file = config_file(tmp_path, {**widths, "model_type": kind})
    assert command.main(["--model", file, *SMALL]) == 0


@pytest.mark.parametrize(
    ("described", "more", "words"),
    [
        (None, [], "cannot be read (No such file or directory): expected the config.json of a model"),
        ({"hidden_size": 8}, [], "has no model_type"),
        ({**LLAMA, "model_type": "lama"}, [], "such as llama"),
        ({**LLAMA, "hidden_size": "wide"}, [], "builds no llama with linear layers"),
        (LLAMA, ["--tokens", "65"], "--tokens must be at most the 64 that the model takes in a sequence, got 65"),
        (LLAMA, ["--layers", "3"], "--layers must be at most the 2 layers of"),
        (LLAMA, ["--steps", "2"], "steps must be at least 6"),
        ({**LLAMA, "hidden_size": 2**21, "num_attention_heads": 2}, [], "cut the stack with --layers"),
    ],
)
def test_what_the_command_cannot_do(
    described: dict[str, Any] | None,
    more: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(tmp_path / "config.json") if described is None else config_file(tmp_path, described)
    assert command.main(["--model", file, *SMALL, *more]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("package", ["peft", "transformers"])
def test_what_is_missing_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file(tmp_path, LLAMA)
    monkeypatch.setitem(importlib.import_module("sys").modules, package, None)
    assert command.main(["--model", file, *SMALL]) == 2
    assert f"pip install {package}" in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "words"), [("--dropout=1", "from 0 up to"), ("--tokens=0", "at least 1")])
def test_bad_arguments(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--model", "config.json", argument])
    assert words in capsys.readouterr().err


def test_the_command_leaves_out_a_warning_of_bitsandbytes() -> None:
    printed = run_python(
        "import logging, runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n"
        "    runpy.run_module('fastlora.measure', run_name='__main__')\n"
        "except SystemExit:\n"
        "    print(logging.getLogger('bitsandbytes.backends.cpu.ops').level)\n"
    )
    assert printed.splitlines()[-1] == str(logging.ERROR)
