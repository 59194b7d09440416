"""docs/quantised.md and docs/dora.md: their Python blocks run, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.ops import dora

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"docs/{page}, block {number}", "exec"), names)
    return names


def test_the_page_on_quantised_bases_runs(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    names = run("quantised.md", {"torch": torch, "folder": tmp_path, "device": "cpu"})
    assert type(names["model"].base_model.model.model.layers[0].mlp.up_proj).__module__ == "fastlora.peft.quantised"
    assert isinstance(names["own"][0], fastlora.adapters.layer.AdaptedLinear)
    assert isinstance(names["layer"], fastlora.LoRALinear)
    weight = names["weight"]
    assert names["y"].shape == (8, 96)
    assert torch.equal(weight.dense(torch.float32), weight.rows * weight.factors.unsqueeze(1))


def test_the_page_on_dora_runs() -> None:
    model = nn.ModuleDict({name: nn.Linear(24, 20) for name in ("q_proj", "v_proj", "o_proj")})
    names = run("dora.md", {"model": model})
    assert names["layer"].lora_magnitude.requires_grad
    assert set(model["q_proj"].lora_magnitude) == {"default"}
    assert not hasattr(model["o_proj"], "lora_magnitude")


def test_what_the_pages_name_is_there() -> None:
    page = (DOCS / "dora.md").read_text(encoding="utf-8")
    assert "fastlora.ops.dora.forget_norms(weight)" in page
    assert callable(dora.forget_norms)
    text = (DOCS / "quantised.md").read_text(encoding="utf-8") + page
    for name in re.findall(r"`fastlora\.(\w+)", text):
        assert hasattr(fastlora, name), name
    results = DOCS.parent / "benchmarks" / "results" / "cpu" / "README.md"
    assert "## layers-variants" in results.read_text(encoding="utf-8")
