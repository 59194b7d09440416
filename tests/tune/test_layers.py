"""Which layers of a model are measured, and which a config.json would give."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRALinear, loralib
from fastlora.tune.layers import Layer, of_config, of_model
from tests.adapters.tiny_models import adapted, gpt2, llama, toy

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
UP, DOWN = Layer(24, 40, 3, FP32, FP32, False, True), Layer(40, 24, 3, FP32, FP32, False, False)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Layer(4096, 1024, 16, BF16, BF16, False, False), "4096 -> 1024 R=16 bfloat16"),
        (Layer(64, 48, 8, FP16, FP32, True, True), "64 -> 48 R=8 float16, float32 adapters, dropout, bias"),
    ],
)
def test_a_layer_is_written_in_one_line(layer: Layer, text: str) -> None:
    assert str(layer) == text


def test_each_kind_once_as_they_come() -> None:
    model = nn.Sequential(
        LoRALinear(24, 40, r=3, lora_dropout=0.1),
        LoRALinear(40, 24, r=3, bias=False, dtype=BF16, adapter_dtype=FP32),
        nn.Linear(24, 24),
        LoRALinear(24, 40, r=3, lora_alpha=5, lora_dropout=0.2),
    )
    assert of_model(model) == [UP._replace(dropout=True), DOWN._replace(dtype=BF16)]


def test_the_mode_does_not_matter() -> None:
    model = LoRALinear(24, 40, r=3, lora_dropout=0.1)
    assert of_model(model.eval()) == of_model(model.train()) == [UP._replace(dropout=True)]


@pytest.mark.parametrize(
    ("base", "adapter", "cast_base", "cast_adapter"),
    [(FP32, FP32, BF16, FP32), (FP16, FP16, BF16, BF16), (FP16, FP32, BF16, FP32), (FP64, FP64, FP64, FP64)],
)
def test_dtypes_are_those_of_autocast(
    base: torch.dtype, adapter: torch.dtype, cast_base: torch.dtype, cast_adapter: torch.dtype
) -> None:
    model = LoRALinear(24, 40, r=3, dtype=base, adapter_dtype=adapter)
    assert of_model(model) == [UP._replace(dtype=base, adapter_dtype=adapter)]
    assert of_model(model, dtype=BF16) == [UP._replace(dtype=cast_base, adapter_dtype=cast_adapter)]


def test_injected_layers() -> None:
    assert of_model(adapted(toy(), ["up", "down"])) == [UP, DOWN]
    assert of_model(adapted(toy(), ["up"], lora_dropout=0.1)) == [UP._replace(dropout=True)]


def test_the_active_adapter_counts() -> None:
    model = adapted(toy(), ["up", "down"])
    fastlora.inject(model, ["up"], 5, adapter_name="other", lora_dropout=0.1)
    other = UP._replace(r=5, dropout=True)
    assert of_model(model) == [UP, DOWN]
    with fastlora.disable(model):
        assert of_model(model) == [UP, DOWN]
    fastlora.set_adapter(model, "other")
    assert of_model(model) == [other]
    fastlora.set_adapter(model, None)
    assert of_model(model) == [UP, other, DOWN]


def test_layers_of_loralib() -> None:
    model = nn.Sequential(
        loralib.Embedding(31, 24, r=3),
        loralib.Linear(24, 40, r=3, lora_dropout=0.1),
        loralib.Linear(24, 40),
        loralib.MergedLinear(40, 72, r=4, enable_lora=[True, False, True], fan_in_fan_out=True, bias=False),
        loralib.MergedLinear(40, 72, r=4, enable_lora=[False, False, False]),
        loralib.Conv2d(5, 6, 3, r=2),
    )
    merged = Layer(40, 72, 8, FP32, FP32, False, False)
    assert of_model(model) == [UP._replace(dropout=True), merged]
    with pytest.raises(ValueError, match=r"\(2 × the adapter is merged .* with train\(\)\)"):
        of_model(model.eval())


def test_wrappers_are_looked_through() -> None:
    model = adapted(toy(), ["up", "down"])
    assert of_model(torch.compile(model)) == of_model(nn.DataParallel(model)) == [UP, DOWN]


@pytest.mark.parametrize("model", [None, "llama", [LoRALinear(24, 40)]])
def test_no_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got (NoneType|str|list)"):
        of_model(model)


@pytest.mark.parametrize("model", [nn.Linear(3, 4), loralib.Linear(3, 4).eval(), loralib.Embedding(5, 6, r=2)])
def test_no_lora_layer(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"runs on fastlora: give it adapters first, with peft\.get_peft_model or "):
        of_model(model)


def test_dtypes_that_do_not_fit_are_left_out() -> None:
    model = LoRALinear(24, 40, r=3)
    model.lora_A.data, model.lora_B.data = model.lora_A.data.half(), model.lora_B.data.half()
    with pytest.raises(ValueError, match="1 × the adapter is float16 on a float32 base"):
        of_model(model)
    assert of_model(model, dtype=FP16) == [UP._replace(dtype=FP16, adapter_dtype=FP16)]


def test_a_share_of_an_adapter_is_left_out() -> None:
    model = LoRALinear(24, 40, r=3)
    model.lora_A.data = torch.empty(0)
    with pytest.raises(ValueError, match="before FSDP1 or DeepSpeed ZeRO-3 wraps it"):
        of_model(model)


def test_without_peft_it_is_not_imported() -> None:
    code = (
        "import sys; from fastlora import LoRALinear; from fastlora.tune.layers import of_model\n"
        "print(of_model(LoRALinear(24, 40, r=3))[0], 'peft' in sys.modules, 'transformers' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "24 -> 40 R=3 float32, bias False False\n"


def peft_net(**options: Any) -> nn.Module:
    """24 -> 36 with bias and 36 -> 20 with bias, of rank 6."""
    pytest.importorskip("peft")
    from tests.peft.peft_models import adapted as adapted_by_peft

    return adapted_by_peft(**options)


FIRST, SECOND = Layer(24, 36, 6, FP32, FP32, False, True), Layer(36, 20, 6, FP32, FP32, False, True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [FIRST, SECOND]),
        ({"conv1d": True}, [FIRST, SECOND]),
        ({"bias": False}, [FIRST._replace(bias=False), SECOND]),
        ({"lora_dropout": 0.1}, [FIRST._replace(dropout=True), SECOND._replace(dropout=True)]),
        ({"dtype": BF16}, [FIRST._replace(dtype=BF16), SECOND._replace(dtype=BF16)]),
        ({"rank_pattern": {"second": 4}}, [FIRST, SECOND._replace(r=4)]),
    ],
    ids=["plain", "Conv1D", "no base bias", "dropout", "bf16 base, fp32 adapters", "rank_pattern"],
)
def test_layers_of_peft_patched_or_not(options: dict[str, Any], expected: list[Layer]) -> None:
    model = peft_net(**options)
    assert of_model(model) == expected
    fastlora.patch_peft(model)
    assert of_model(model) == expected


def test_active_adapters_of_peft() -> None:
    model = peft_net()
    from tests.peft.peft_models import config

    model.add_adapter("other", config("first", r=4, lora_dropout=0.1))
    fastlora.patch_peft(model)
    assert of_model(model) == [FIRST, SECOND]
    with model.disable_adapter():
        assert of_model(model) == [FIRST, SECOND]
    model.set_adapter("other")
    assert of_model(model) == [FIRST._replace(r=4, dropout=True)]
    model.base_model.set_adapter(["default", "other"])
    assert of_model(model) == [FIRST._replace(r=10), SECOND]


@pytest.mark.parametrize("patch", [False, True])
def test_merged_layers_of_peft_are_left_out(patch: bool) -> None:
    model = peft_net()
    if patch:
        fastlora.patch_peft(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\(2 × the adapter is merged into the base weight"):
        of_model(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, r"2 × the adapter is a variant of LoRA \(DoraLinearVariant\)")],
)
def test_what_peft_runs_itself_is_left_out(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        of_model(peft_net(**options))


def test_dora_that_is_added_to_a_patched_layer_is_left_out() -> None:
    model = peft_net()
    from tests.peft.peft_models import config

    fastlora.patch_peft(model)
    model.add_adapter("dora", config("first", use_dora=True))
    model.set_adapter("dora")
    with pytest.raises(ValueError, match=r"1 × the adapter is a variant of LoRA .*; 1 × none of the active adapters"):
        of_model(model)


def test_a_quantised_base_is_left_out() -> None:
    class Linear4bit(nn.Linear):
        pass

    model = peft_net()
    model.base_model.model.first.base_layer.__class__ = Linear4bit
    assert of_model(model) == [SECOND]
    model.base_model.model.second.base_layer.__class__ = Linear4bit
    said = r"2 × base_layer is a tests\.tune\.test_layers\.Linear4bit, not nn\.Linear or Conv1D itself"
    with pytest.raises(ValueError, match=said):
        of_model(model)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_config_gives_the_layers_of_its_model(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model: Any = make()
    model.config.save_pretrained(tmp_path)
    injected = of_model(adapted(model, lora_dropout=0.1))
    assert of_config(tmp_path, 3, FP32, FP32, dropout=True) == injected
    cast = [layer._replace(r=5, dtype=BF16, dropout=False) for layer in injected]
    assert of_config(tmp_path / "config.json", 5, BF16, FP32) == cast


def test_the_head_is_no_layer_of_a_config(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    llama().config.save_pretrained(tmp_path)
    assert [layer[:2] for layer in of_config(tmp_path, 3, BF16, BF16)] == [(48, 48), (48, 24), (48, 80), (80, 48)]


def test_a_large_model_of_a_config_takes_no_memory(tmp_path: Path) -> None:
    """Four hundred thousand million parameters; code and a kind of weights that are not looked at."""
    pytest.importorskip("transformers")
    described = {
        "model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "dtype": "bfloat16",
        "auto_map": {"AutoConfig": "nobody/nothing--config.Config", "AutoModel": "nobody/nothing--model.Model"},
        "quantization_config": {"quant_method": "gptq", "bits": 4},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert list(map(str, of_config(tmp_path, 16, BF16, BF16))) == [
        "16384 -> 16384 R=16 bfloat16",
        "16384 -> 1024 R=16 bfloat16",
        "16384 -> 53248 R=16 bfloat16",
        "53248 -> 16384 R=16 bfloat16",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, r"cannot be read \(No such file or directory\): expected the config\.json of .* --layer K N"),
        ("", r"is not JSON \(.*\): expected the config\.json of .* --layer K N"),
        ("\0", "is not JSON"),
        ("[]", "has no model_type: expected"),
        ('{"hidden_size": 8}', "has no model_type: expected"),
        (
            '{"model_type": "lama"}',
            r"model_type 'lama': expected one that transformers \d.* knows, such as .*llama",
        ),
        (
            '{"model_type": ["a"]}',
            r"such as llama, gpt2, bert\. Install a newer transformers .* --layer K N",
        ),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"builds no llama .* \(.+\): mend the file, or give"),
        ('{"model_type": "resnet"}', "builds no resnet with linear layers from .* the model has no linear layer"),
    ],
)
def test_a_file_that_describes_no_model(text: str | None, reason: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        of_config(tmp_path, 3, BF16, BF16)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x80\xff")
    with pytest.raises(ValueError, match="is not JSON"):
        of_config(tmp_path / "model.safetensors", 3, BF16, BF16)


def test_a_config_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install transformers, or give the layers themselves, with --layer K N"):
        of_config(tmp_path, 3, BF16, BF16)


def test_a_rank_below_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="r must be"):
        of_config(tmp_path, 0, BF16, BF16)
