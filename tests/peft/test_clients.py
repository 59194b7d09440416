"""What other people's programs do with PEFT models, done with patched and with injected ones.

Trainers, resume, generation, transformers' own adapters. The unpatched float32 model is the baseline and its float64
copy the oracle, as in ``test_real_models.py``, which has Trainer and SFTTrainer of patched models.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft
import transformers
from peft.tuners import lora
from transformers import DynamicCache

import fastlora
from fastlora.accuracy import assert_close_to_oracle
from fastlora.peft import count_calls
from tests.peft.test_real_models import (
    EPSILON,
    MODELS,
    PARAGRAPHS,
    PROJECTIONS,
    adapted,
    adapters,
    batches,
    bpe_tokenizer,
    flat,
)
from tests.peft.test_real_models import quiet as quiet

CONFIG: dict[str, Any] = {"r": 6, "lora_alpha": 10, "target_modules": PROJECTIONS}
ARGUMENTS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "adam_epsilon": EPSILON,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def base() -> Any:
    """The model that ``adapted("Llama")`` has inside."""
    torch.manual_seed(3)
    return MODELS["Llama"][0]()


def fill(model: nn.Module) -> Any:
    """The same adapters in every model and dtype, neither half zero."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def in_peft(dtype: torch.dtype = torch.float32) -> Any:
    return fill(peft.get_peft_model(base().to(dtype), peft.LoraConfig(**CONFIG)))


def patched() -> Any:
    model = in_peft()
    assert len(fastlora.patch_peft(model).patched) == 14
    return model


def injected() -> Any:
    """What PEFT saves, loaded into the bare model."""
    model = base()
    with tempfile.TemporaryDirectory() as folder:
        in_peft().save_pretrained(folder)
        fastlora.load_adapter(model, folder)
    return model


OURS: dict[str, Callable[[], Any]] = {"patched": patched, "injected": injected}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(trainer: Any) -> dict[str, Tensor]:
    """What a run leaves: the adapters, which it must have moved, and what the model says then."""
    trained_ones = {name for name, p in trainer.model.named_parameters() if "lora_" in name and p.requires_grad}
    start = adapters(trainer.model)
    trainer.train()
    found = {name: p for name, p in adapters(trainer.model).items() if name in trained_ones}
    assert not any(torch.equal(p, start[name]) for name, p in found.items())
    with torch.no_grad():
        logits = trainer.model.eval()(**batches(1)[0]).logits
    return {"logits": logits} | {part: flat(found, part) for part in ("lora_A", "lora_B")}


def assert_agree(run: Callable[[Any], dict[str, Tensor]], model: Any) -> None:
    baseline, oracle, actual = run(in_peft()), run(in_peft(torch.float64)), run(model)
    assert actual.keys() == baseline.keys()
    for name, tensor in actual.items():
        assert_close_to_oracle(tensor, oracle=oracle[name].double(), baseline=baseline[name], name=name)


def test_a_resumed_patched_run_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    rows = [{key: t[row] for key, t in batch.items()} for batch in batches(8, batch=2) for row in range(2)]

    def trainer(folder: str) -> Any:
        model = adapted("Llama", lora_dropout=0.1)
        fastlora.patch_peft(model)
        saving = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path / folder), **(ARGUMENTS | saving))
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    with count_calls() as calls:
        whole = trainer("whole")
        whole.train()
        resumed = trainer("part")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert calls.fallback.total() == 0
    assert resumed.state.global_step == 4
    assert losses(resumed) == losses(whole)
    state = resumed.model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in whole.model.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_sft_trainer_of_an_injected_model(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows, tokenizer = Dataset.from_list([{"text": text} for text in PARAGRAPHS[:16]]), bpe_tokenizer()

    def run(model: Any) -> dict[str, Tensor]:
        arguments = trl.SFTConfig(output_dir=str(tmp_path), max_length=24, bf16=False, **ARGUMENTS)
        return trained(trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer))

    assert_agree(run, injected())


PAIRS = [
    {"prompt": f"The value of {word} is", "chosen": f" {word} itself", "rejected": f" not {word[::-1]}"}
    for word in ("object", "module", "class", "generator", "iterable", "keyword", "statement", "exception")
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("reference", ["adapters disabled", "adapter ref", "model"])
def test_dpo_trainer(reference: str, tmp_path: Path) -> None:
    """TRL's reference model is the model without adapters, a frozen copy of them, or for an injected model its base."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows, tokenizer = Dataset.from_list(PAIRS), bpe_tokenizer()

    def trainer(model: Any, **options: Any) -> Any:
        arguments = trl.DPOConfig(output_dir=str(tmp_path), max_length=32, bf16=False, **ARGUMENTS)
        return trl.DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, **options)

    def of_base(model: Any) -> Any:
        made = trainer(model, peft_config=peft.LoraConfig(**CONFIG))
        fill(made.model)
        return made

    if reference == "adapter ref":
        model = patched()
        with count_calls() as calls:
            assert_agree(lambda model: trained(trainer(model)), model)
        # Four steps of the policy, again for its checkpoints, and of the reference; then the logits.
        assert (calls.fast.total(), calls.fallback.total()) == ((4 * 3 + 1) * 14, 0)
        return
    expected, oracle = (trained(of_base(base().to(dtype))) for dtype in (torch.float32, torch.float64))
    if reference == "model":
        actual = trained(trainer(injected(), ref_model=base()))
    else:
        ours = of_base(base())
        assert len(fastlora.patch_peft(ours.model).patched) == 14
        with count_calls() as calls:
            actual = trained(ours)
        assert dict(calls.reasons) == {"the adapters are disabled": 4 * 14}
        assert calls.fast.total() == (4 * 2 + 1) * 14
    for name, tensor in actual.items():
        assert_close_to_oracle(tensor, oracle=oracle[name].double(), baseline=expected[name], name=name)


GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "no cache": GREEDY | {"use_cache": False},
    "static cache": GREEDY | {"cache_implementation": "static"},
    "beams": GREEDY | {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"max_new_tokens": 12, "do_sample": True, "top_k": 20, "temperature": 0.9},
}


def prompts(batch: int = 2, length: int = 8) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = batches(1, batch=batch, length=length)[0]["input_ids"]
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def assisted(model: Any) -> Tensor:
    """A merged and blurred copy proposes tokens, of which the model takes some and not all."""
    assistant = in_peft().merge_and_unload().eval()
    generator = torch.Generator().manual_seed(9)
    for parameter in assistant.parameters():
        parameter.data += 0.006 * torch.randn(parameter.shape, generator=generator)
    # By default it proposes nothing of which it is as unsure as a model without training is.
    assistant.generation_config.assistant_confidence_threshold = 0.0
    passes: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *_: passes.append(1))
    found = model.generate(**prompts(batch=1), assistant_model=assistant, **GREEDY)
    handle.remove()
    assert 1 < len(passes) < 12
    return found


def after_a_prefix(model: Any) -> list[Tensor]:
    """Two batches that go on from one cache of the tokens they begin with."""
    prefix = prompts(batch=1)["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=cache, use_cache=True)
    found = []
    for tail in batches(2, batch=2, length=5):
        whole = torch.cat([prefix.expand(2, -1), tail["input_ids"]], dim=1)
        used = copy.deepcopy(cache)
        used.batch_repeat_interleave(2)
        mask = torch.ones_like(whole)
        found.append(model.generate(input_ids=whole, attention_mask=mask, past_key_values=used, **GREEDY))
        assert torch.equal(found[-1], model.generate(input_ids=whole, attention_mask=mask, **GREEDY))
    return found


def generated(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, options in MODES.items():
        torch.manual_seed(8)
        found[name] = model.generate(**prompts(), **options)
    found["assisted"] = assisted(model)
    return found | {f"prefix {i}": tokens for i, tokens in enumerate(after_a_prefix(model))}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """What PEFT's own model says in each mode."""
    return generated(in_peft().eval())


@pytest.mark.parametrize(
    "kind", [*OURS, *(pytest.param(kind, id=f"{kind}, small", marks=pytest.mark.small_calls) for kind in OURS)]
)
def test_every_mode_of_generation_says_the_same(kind: str, expected: dict[str, Tensor]) -> None:
    with count_calls() as calls:
        found = generated(OURS[kind]().eval())
    assert calls.fallback.total() == 0
    different = [name for name, tokens in found.items() if not torch.equal(tokens, expected[name])]
    assert different == []
    bare = base().eval().generate(**prompts(), **GREEDY)
    assert not torch.equal(bare, found["greedy"])
    for same in ("no cache", "static cache"):
        assert torch.equal(found[same], found["greedy"])


def step(model: Any) -> dict[str, Tensor]:
    """Logits, and the gradients of the adapters that have one."""
    model.zero_grad()
    output = model(**batches(1)[0])
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "lora_" in name}
    return {"logits": output.logits.detach()} | {f"d{part}": flat(grads, part) for part in ("lora_A", "lora_B")}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("way", ["load_adapter", "add_adapter"])
def test_the_adapters_of_transformers_itself(way: str, tmp_path: Path) -> None:
    """``PeftAdapterMixin``: PEFT's layers without a PeftModel around them."""

    def build() -> Any:
        model = base()
        if way == "load_adapter":
            in_peft().save_pretrained(tmp_path)
            model.load_adapter(str(tmp_path), is_trainable=True)
        else:
            model.add_adapter(peft.LoraConfig(**CONFIG))
        return fill(model)

    model = build()
    report = fastlora.patch_peft(model)
    assert (len(report.patched), report.skipped) == (14, {})
    with count_calls() as calls:
        actual = step(model)
    assert (calls.fast.total(), calls.fallback.total()) == (14, 0)
    baseline, oracle = step(build()), step(build().double())
    for name, tensor in actual.items():
        assert_close_to_oracle(tensor, oracle=oracle[name], baseline=baseline[name], name=name)

    # A second adapter joins the patched layers, and transformers' own methods rule them.
    model.add_adapter(peft.LoraConfig(**(CONFIG | {"r": 3})), "other")
    assert model.active_adapters() == ["other"]
    with count_calls() as calls:
        model(**batches(1)[0])
        model.disable_adapters()
        off = model(**batches(1)[0]).logits
        model.enable_adapters()
        model.set_adapter("default")
        assert torch.equal(model(**batches(1)[0]).logits, actual["logits"])
    assert (calls.fast.total(), dict(calls.reasons)) == (28, {"the adapters are disabled": 14})
    assert torch.equal(off, base()(**batches(1)[0]).logits)
    model.delete_adapter("other")
    model.save_pretrained(tmp_path / "again")
    again = base()
    again.load_adapter(str(tmp_path / "again"))
    assert adapters(again).keys() == adapters(model).keys()
    assert all(torch.equal(p, adapters(model)[name]) for name, p in adapters(again).items())
    assert fastlora.unpatch_peft(model) == sum(isinstance(layer, lora.Linear) for layer in model.modules())
