"""Models of transformers at tiny size, patched and not: outputs, gradients, ten steps, trainers, generation.

The unpatched float32 model is the baseline and its float64 copy the oracle, as everywhere (fastlora/accuracy.py).
"""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import tokenizers
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import fastlora
from examples.corpus import python_reference
from fastlora.accuracy import assert_close_to_oracle
from fastlora.peft import count_calls
from tests.cases import count_runs
from tests.peft.peft_models import wake

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore::FutureWarning")

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 256  # bytes
# Adam divides a gradient by its own size: where that is all rounding error, so is the step, in PEFT as here.
EPSILON = 1e-3
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = DECODER | {"num_key_value_heads": 2}
ENCODER = DECODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "type_vocab_size": 0}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DENSE = ["query", "key", "value", "dense"]

# name → (builder, target modules, layers patched)
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)), PROJECTIONS, 14),
    "Qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)), PROJECTIONS, 14),
    "Mistral": (lambda: MistralForCausalLM(MistralConfig(sliding_window=16, **GROUPED)), PROJECTIONS, 14),
    "GPT-2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), ["c_attn", "c_proj", "c_fc"], 8),
    "RoBERTa": (lambda: RobertaForMaskedLM(RobertaConfig(**ENCODER)), DENSE, 13),
    "DeBERTa-v2": (
        lambda: DebertaV2ForMaskedLM(DebertaV2Config(**ENCODER, **DISENTANGLED)),
        ["query_proj", "key_proj", "value_proj", "dense"],
        13,
    ),
}
PARAGRAPHS = [text for text in python_reference(24).train.numpy().tobytes().decode().split("\n\n") if len(text) > 200]
DECODERS = ["Llama", "Qwen2", "Mistral", "GPT-2"]


def adapted(name: str, **options: Any) -> PeftModel:
    build, targets, _ = MODELS[name]
    torch.manual_seed(3)
    model = get_peft_model(build(), LoraConfig(target_modules=targets, r=6, lora_alpha=10, **options))
    wake(model)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def batches(steps: int, batch: int = 4, length: int = 24) -> list[dict[str, Tensor]]:
    """Real text, byte by byte: Python's reference manual."""
    text = python_reference(length)
    windows = list(text.batches(length - 1, batch, steps, seed=0))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in windows]


def bpe_tokenizer() -> Any:
    """A tokenizer of 256 tokens, trained on the same text: no network needed."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(PARAGRAPHS, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def flat(tensors: dict[str, Tensor], part: str) -> Tensor:
    """One vector of all adapters' A or B: single tensors of a tiny model are too few numbers for a statistic."""
    return torch.cat([t.detach().flatten() for name, t in tensors.items() if part in name])


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}


def assert_agree(
    run: Callable[[nn.Module], dict[str, Tensor]], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Holds what ``run`` finds on the patched model to what it finds on the unpatched, with float64 as the truth.

    Returns how often the library backend made a layer's output or input gradient: compiled calls count too.
    """
    baseline = run(copy.deepcopy(model))
    oracle = run(copy.deepcopy(model).double())
    patched = copy.deepcopy(model)
    layers = len(fastlora.patch_peft(patched).patched)
    with monkeypatch.context() as patch, count_calls() as calls:
        products = count_runs(patch, "library")
        actual = run(patched)
    assert calls.fallback.total() == 0
    assert len(products) >= 2 * layers
    for name, tensor in actual.items():
        assert_close_to_oracle(tensor, oracle=oracle[name].double(), baseline=baseline[name], name=name)
    return len(products)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Trainers and loaders report to a terminal; tests have none."""
    level = logging.getLogger("transformers").level
    transformers.utils.logging.set_verbosity_error()
    yield
    logging.getLogger("transformers").setLevel(level)


@pytest.mark.parametrize("name", MODELS)
def test_every_target_is_patched(name: str) -> None:
    model = adapted(name)
    report = fastlora.patch_peft(model)
    assert (len(report.patched), report.skipped, report.trainable_base) == (MODELS[name][2], {}, ())


@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_ten_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = batches(10)

    def train(model: nn.Module) -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=EPSILON)
        found: dict[str, Tensor] = {}
        for batch in text:
            optimizer.zero_grad()
            output = model(**batch)
            output.loss.backward()
            if not found:
                found = {"logits": output.logits.detach()}
                found |= {f"d{part}": flat(gradients(model), part) for part in ("lora_A", "lora_B")}
            optimizer.step()
        return found | {part: flat(adapters(model), part) for part in ("lora_A", "lora_B")}

    # Forward and backward of every layer in every step.
    assert assert_agree(train, adapted(name), monkeypatch) == 2 * 10 * MODELS[name][2]


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_dropout_trains(name: str) -> None:
    """The masks are not PEFT's, so the numbers are not either: the loss must fall about as far."""
    model = adapted(name, lora_dropout=0.1)
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    (batch,) = batches(1)

    def fall(model: nn.Module) -> float:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0] - losses[-1]

    with count_calls() as calls:
        ours = fall(model)
    assert calls.fallback.total() == 0
    theirs = fall(reference)
    assert theirs > 0.05
    assert abs(ours - theirs) < 0.3 * theirs


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_nothing(p: float, reentrant: bool) -> None:
    (batch,) = batches(1)

    def grads(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model(**batch).loss.backward()
        return {name: g.clone() for name, g in gradients(model).items()}

    model = adapted("Llama", lora_dropout=p).train()
    fastlora.patch_peft(model)
    plain = grads(model)
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with count_calls() as calls:
        checkpointed = grads(model)
    assert (calls.fast.total(), calls.fallback.total()) == (28, 0)
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = batches(2)

    def train(model: nn.Module) -> dict[str, Tensor]:
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        for batch in text:
            # The loss outside: that of transformers logs for some models, which is no part of one graph.
            targets = batch.pop("labels")
            nn.functional.cross_entropy(run(**batch).logits.flatten(0, 1), targets.flatten()).backward()
            batch["labels"] = targets
        return {f"d{part}": flat(gradients(model), part) for part in ("lora_A", "lora_B")}

    assert assert_agree(train, adapted(name), monkeypatch) == 2 * 2 * MODELS[name][2]
    torch._dynamo.reset()


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_the_adapter_on_off_and_merged(name: str) -> None:
    model = adapted(name).eval()
    prompt = batches(1, batch=2, length=8)[0]["input_ids"]

    def generate(model: Any) -> Tensor:
        mask = torch.ones_like(prompt)
        return model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)

    def three(model: Any) -> list[Tensor]:
        on = generate(model)
        with model.disable_adapter():
            off = generate(model)
        model.merge_adapter()
        merged = generate(model)
        model.unmerge_adapter()
        return [on, off, merged, generate(model)]

    expected = three(copy.deepcopy(model))
    fastlora.patch_peft(model)
    with count_calls() as calls:
        actual = three(model)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert not torch.equal(actual[0], actual[1])
    assert torch.equal(actual[0], actual[2])
    assert calls.fast.total() > 0
    assert set(calls.reasons) == {"the adapters are disabled", "the adapter is merged into the base weight"}
    assert torch.equal(generate(model.merge_and_unload()), expected[2])


TRAINING: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


def trained_by(trainer: Callable[[nn.Module], Any]) -> Callable[[nn.Module], dict[str, Tensor]]:
    """The adapters after a trainer's run, which must have moved them."""

    def run(model: nn.Module) -> dict[str, Tensor]:
        torch._dynamo.reset()
        start = adapters(model)
        trainer(model).train()
        trained = adapters(model)
        assert not any(torch.equal(trained[name], start[name]) for name in trained)
        return {part: flat(trained, part) for part in ("lora_A", "lora_B")}

    return run


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "case"), [*(("Llama", case) for case in TRAINING), ("RoBERTa", "plain"), ("RoBERTa", "accumulation")]
)
def test_trainer(name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{key: t[row] for key, t in batch.items()} for batch in batches(8, batch=2) for row in range(2)]

    def trainer(model: nn.Module) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            adam_epsilon=EPSILON,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **TRAINING[case],
        )
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    assert_agree(trained_by(trainer), adapted(name), monkeypatch)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["plain", "checkpointing", "bf16"])
def test_sft_trainer(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = bpe_tokenizer()
    paragraphs = Dataset.from_list([{"text": text} for text in PARAGRAPHS[:16]])

    def trainer(model: nn.Module) -> Any:
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            adam_epsilon=EPSILON,
            max_length=24,
            use_cpu=True,
            bf16=case == "bf16",
            gradient_checkpointing=case == "checkpointing",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        return trl.SFTTrainer(model=model, args=arguments, train_dataset=paragraphs, processing_class=tokenizer)

    if case == "bf16":
        # Ten roundings of Adam's steps under autocast are no statistic: that the layers ran is what is asked.
        model = adapted("Llama", lora_dropout=0.1)
        fastlora.patch_peft(model)
        with count_calls() as calls:
            trained_by(trainer)(model)
        assert (calls.fast.total(), calls.fallback.total()) == (4 * 14, 0)
        return
    assert_agree(trained_by(trainer), adapted("Llama"), monkeypatch)


@pytest.mark.parametrize("base", ["float32", "4 bits"])
def test_the_example_runs_and_says_what_ran_where(base: str) -> None:
    command = [
        sys.executable,
        "examples/peft_trainer.py",
        "--steps",
        "1",
        *(["--bits", "4"] if base != "float32" else []),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "28 of 28 adapter layers patched" in done.stdout
    assert "gemm_4bit_forward" not in done.stderr
    # 28 layers, a step of 2 accumulated batches, each forward run again for its checkpoint.
    assert "112 calls ran on fastlora, 0 on PEFT's own forward" in done.stdout
    distance = float(re.search(r"logits differ by at most (\S+) of their largest", done.stdout).group(1))
    # In 4 bits both compute in bfloat16, and bitsandbytes packs anew for some CPUs what it alone multiplies.
    assert distance < (1e-5 if base == "float32" else 2**-6)
