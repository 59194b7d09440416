"""Groups in whole models of transformers, in float64: what is grouped, and gradients that are PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import fastlora
from fastlora.peft import count_calls
from fastlora.siblings import Counts
from tests.peft.peft_models import wake

WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QKV = [("q", "k", "v")]


def model(kind: str, targets: list[str], **options: Any) -> PeftModel:
    torch.manual_seed(3)
    widths = T5 if kind == "t5" else WIDTHS
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    base = auto.from_config(transformers.AutoConfig.for_model(kind, **widths))
    ranks = {"v": 3} if kind == "t5" else {"k_proj": 4}
    made = get_peft_model(base, LoraConfig(target_modules=targets, r=6, lora_alpha=10, rank_pattern=ranks, **options))
    wake(made)
    return made.double().train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_decoders(kind: str) -> None:
    plain = model(kind, PROJECTIONS)
    patched = copy.deepcopy(plain)
    report = fastlora.patch_peft(patched)
    assert sorted(len(group) for group in report.groups) == [2, 2, 3, 3]
    with count_calls() as calls:
        found = gradients(patched)
    assert calls.groups == Counts(4, 6, 0)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-8, msg=name)


def test_t5_where_the_decoder_reads_keys_and_values_of_the_encoder() -> None:
    """Grouped by name, cross attention makes work that nobody takes, and is right."""
    targets = ["q", "k", "v", "wi_0", "wi_1"]
    plain = model("t5", targets)
    patched = copy.deepcopy(plain)
    fastlora.patch_peft(patched)
    with count_calls() as calls:
        alone = gradients(patched)
    assert calls.groups == Counts(0, 0, 0)
    report = fastlora.patch_peft(patched, groups=[*QKV, ("wi_0", "wi_1")])
    assert len(report.groups) == 2 * 2 + 2 * 3
    with count_calls() as calls:
        found = gradients(patched)
    # Per block: the encoder's q, k, v and wi; the decoder's own; and cross attention, led by q and then by k.
    assert calls.groups.grouped == 2 * 2 + 2 * (2 + 2)
    assert calls.groups.wasted > 0
    for name, gradient in gradients(plain).items():
        for others in (alone, found):
            torch.testing.assert_close(others[name], gradient, rtol=1e-8, atol=1e-8, msg=name)


def test_generation() -> None:
    plain = model("llama", PROJECTIONS).eval()
    patched = copy.deepcopy(plain)
    fastlora.patch_peft(patched)
    ids = torch.arange(1, 6).unsqueeze(0)
    made = [each.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for each in (plain, patched)]
    assert torch.equal(*made)
