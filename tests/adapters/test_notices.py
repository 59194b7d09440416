"""What would go wrong in silence is said: training while merged, ranks too high, wrappers; and what is active."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import loralib, mergeable, start
from fastlora.accuracy import assert_close_to_oracle
from fastlora.adapters.config import AdapterConfig
from fastlora.merge import merge_folders
from fastlora.text import with_article
from tests.adapters.tiny_models import IDS, adapted, run, toy

K, N = 12, 10


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    mergeable._told.clear()
    start.warn_of_rank.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return messages


def an_injected_layer() -> Any:
    model = nn.Sequential(nn.Linear(K, N))
    fastlora.inject(model, ["0"], r=3, lora_alpha=5, init_lora_weights=False)
    return model[0]


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "LoRALinear": (lambda: fastlora.LoRALinear(K, N, r=3), (4, K)),
    "injected": (an_injected_layer, (4, K)),
    "loralib.Linear": (lambda: loralib.Linear(K, N, r=3), (4, K)),
    "loralib.Conv1d": (lambda: loralib.Conv1d(K, N, 2, r=3), (4, K, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_training_while_merged_is_said_once_for_each_merge(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, shape = LAYERS[kind]
    layers = [make().train().merge() for _ in range(2)]
    for layer in (layers[0], *layers):
        layer(torch.randn(shape))
    (message,) = said(caplog)
    assert message.startswith(f"{with_article(type(layers[0]).__name__)} [")
    assert "was called in training mode with gradients enabled while its adapter is merged" in message
    layers[0].unmerge()(torch.randn(shape))
    assert said(caplog) == []
    layers[0].merge()(torch.randn(shape))
    assert len(said(caplog)) == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_right_while_merged_is_not_warned_of(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().train().merge(), torch.randn(shape)
    with torch.no_grad():
        layer(x)
    layer.eval()
    layer(x)
    layer.train().merge().requires_grad_(False)
    layer(x)
    assert said(caplog) == []


def test_an_embedding_and_a_layer_without_an_update(caplog: pytest.LogCaptureFixture) -> None:
    loralib.Linear(K, N, r=0).train().merge()(torch.randn(4, K))
    assert said(caplog) == []
    loralib.Embedding(K, N, r=3).train().merge()(torch.arange(5))
    assert len(said(caplog)) == 1


def test_a_block_that_warns_itself_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(toy(), ["up", "down"]).train()
    with fastlora.merged(model), pytest.warns(UserWarning, match=r"inside of fastlora\.merged"):
        model(IDS)
    assert said(caplog) == []


def test_a_merged_layer_compiles_in_one_graph() -> None:
    layer = LAYERS["LoRALinear"][0]().train().merge()
    x = torch.randn(4, K)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_a_rank_above_the_layer_s_is_said(caplog: pytest.LogCaptureFixture) -> None:
    fastlora.inject(toy(), ["up", "down"], r=24, rank_pattern={"2.up": 25})
    (message,) = said(caplog)
    assert message.startswith("adapter 'default': the rank is above min(in_features, out_features) in blocks.2.up: no")
    for _ in range(2):
        fastlora.LoRALinear(K, N, r=11)
    fastlora.LoRALinear.from_linear(nn.Linear(K, N), r=10)
    (message,) = said(caplog)
    assert message.startswith("r=11 is above min(in_features, out_features) = 10: no update of a layer of this shape")
    loralib.MergedLinear(K, 3 * N, r=11, enable_lora=[True, False, True])
    loralib.Linear(30, 20, r=21)
    assert [message.split(": ")[0] for message in said(caplog)] == ["r=21 is above min(in_features, out_features) = 20"]
    loralib.MergedLinear(K, 3 * 7, r=8, enable_lora=[True, False, True])
    assert len(said(caplog)) == 1


def test_adapter_status() -> None:
    model = adapted(toy(), ["up", "down"])
    fastlora.inject(model, ["up"], r=5, adapter_name="other")
    assert fastlora.adapter_status(model) == fastlora.AdapterStatus(("default", "other"), "default", False, None)
    assert str(fastlora.adapter_status(model)) == "adapters: 'default' (active), 'other'"
    fastlora.set_adapter(model, "other")
    fastlora.merge_adapter(model)
    assert fastlora.adapter_status(model) == fastlora.AdapterStatus(("default", "other"), "other", False, "other")
    with fastlora.disable(model):
        words = str(fastlora.adapter_status(torch.compile(model)))
    assert words == "adapters: 'default', 'other' (active, merged); all are switched off"
    fastlora.unmerge_adapter(model)
    fastlora.set_adapter(model, None)
    assert str(fastlora.adapter_status(model)) == "adapters: 'default', 'other'"


def test_a_compiled_model_is_injected_and_compiles_anew(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = toy()
    compiled = torch.compile(model, backend="eager")
    base = compiled(IDS)
    report = fastlora.inject(compiled, ["up", "down"], r=3, lora_alpha=5, init_lora_weights=False)
    assert report.layers[0].name == "blocks.0.up"
    y, eager = compiled(IDS), run(model)
    assert not torch.allclose(y, base)
    assert_close_to_oracle(y.double(), oracle=eager.double(), baseline=eager.double() * (1 + 2**-22), name="logits")
    fastlora.save_adapter(compiled, tmp_path)
    kept = model.blocks[0]["up"].lora_A["default"]
    with torch.no_grad():
        kept.zero_()
    fastlora.load_adapter(compiled, tmp_path)
    assert kept is model.blocks[0]["up"].lora_A["default"]
    assert torch.equal(run(model), eager)


def test_layers_put_in_by_hand_have_no_named_adapters(tmp_path: Path) -> None:
    for layer in (fastlora.LoRALinear(K, N, r=3), loralib.Linear(K, N, r=3)):
        model = nn.Sequential(layer)
        for act in (fastlora.merge_adapter, lambda model: fastlora.save_adapter(model, tmp_path / "adapter")):
            with pytest.raises(ValueError, match=rf"no named adapters: its {type(layer).__name__} layers keep theirs"):
                act(model)


@pytest.mark.parametrize(
    ("option", "pattern", "remedy"),
    [
        ("target_modules", "*.q", r": a star repeats what is before it, write r'.*\.q' or the list ['q']"),
        ("target_modules", "*q_*", r": a star repeats what is before it, write r'.*q_.*'"),
        ("exclude_modules", "*.0.up", r": a star repeats what is before it, write r'.*\.0\.up' or the list ['0.up']"),
        ("rank_pattern", "*.up", r": a star repeats what is before it, write r'.*\.up'"),
        ("target_modules", "(up", ""),
        ("target_modules", r"*\.(up", ""),
    ],
)  # fmt: skip
def test_a_pattern_of_file_names_is_told_from_a_regular_expression(option: str, pattern: str, remedy: str) -> None:
    options: dict[str, Any] = {"target_modules": ["up"], option: {pattern: 3} if "rank" in option else pattern}
    with pytest.raises(ValueError, match=f"^{option}: .* is no regular expression") as caught:
        AdapterConfig(**options)
    assert str(caught.value).rpartition(")")[2] == remedy or (not remedy and str(caught.value).endswith(")"))


def test_a_whole_config_as_one_option() -> None:
    config = SimpleNamespace(target_modules={"up"}, more="x" * 300)
    with pytest.raises(TypeError, match=r"\.\.\.: pass its fields, target_modules=config\.target_modules") as caught:
        fastlora.inject(toy(), config)
    assert len(str(caught.value)) < 300


def test_folders_are_quoted_and_a_name_of_the_hub_gets_the_remedy(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    adapter = tmp_path / "adapter"
    fastlora.save_adapter(adapted(toy(), ["up"]), adapter)
    remedy = r"does not exist or is no folder: .*\(huggingface_hub's snapshot_download brings one\)"
    with pytest.raises(FileNotFoundError, match=f"^base 'meta-llama/Llama-3.2-1B' {remedy}$"):
        merge_folders("meta-llama/Llama-3.2-1B", adapter, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=f"^folder 'me/adapter' {remedy}$"):
        merge_folders(tmp_path, "me/adapter", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"^folder '.*' has no adapter_config\.json"):
        merge_folders(tmp_path, tmp_path, tmp_path / "out")
