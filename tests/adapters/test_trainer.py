"""Injected models under transformers' Trainer: resumed bit for bit, their adapters in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.adapters.tiny_models import IDS, llama

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

trainer = pytest.importorskip("fastlora.adapters.trainer")


def injected(**options: Any) -> nn.Module:
    model = llama()
    fastlora.inject(model, "all-linear", r=3, lora_alpha=7, lora_dropout=0.1, **options)
    return model


def trainer_of(model: nn.Module, folder: Path, *callbacks: Any, steps: int = 4) -> Any:
    torch.manual_seed(5)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(96, (32, 12))]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("callback", [False, True], ids=["bare", "callback"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(callback: bool, tmp_path: Path) -> None:
    callbacks = [trainer.AdapterCallback()] if callback else []
    whole = trainer_of(injected(), tmp_path / "whole", *callbacks)
    whole.train()
    trainer_of(injected(), tmp_path / "part", *callbacks).train()
    second = trainer_of(injected(), tmp_path / "part", *callbacks)
    second.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert losses(second) == losses(whole)
    resumed = second.model.state_dict()
    assert all(torch.equal(t, resumed[name]) for name, t in whole.model.state_dict().items())


def test_every_checkpoint_holds_an_adapter_that_peft_and_we_load(tmp_path: Path) -> None:
    run = trainer_of(injected(), tmp_path, trainer.AdapterCallback())
    run.train()

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return model.eval()(IDS).logits

    expected = logits(run.model)
    folder = tmp_path / "checkpoint-4" / "adapter"
    ours = llama()
    fastlora.load_adapter(ours, folder)
    assert torch.equal(logits(ours), expected)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(llama(), folder)), expected)
    # What the Trainer writes by itself comes back without the adapter: hence the callback.
    bare = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(logits(bare), logits(llama()))


def test_the_adapter_of_the_checkpoint_counts(tmp_path: Path) -> None:
    callback = trainer.AdapterCallback()
    trainer_of(injected(), tmp_path, callback, steps=2).train()
    model = injected(groups=None)
    before = dict(model.named_parameters())
    state = transformers.TrainerState(global_step=2)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    callback.on_train_begin(arguments, state, None, model=model)
    saved = llama()
    fastlora.load_adapter(saved, tmp_path / "checkpoint-2" / "adapter")
    assert all(torch.equal(p, saved.get_parameter(name)) for name, p in model.named_parameters())
    assert all(p is before[name] for name, p in model.named_parameters())
    assert fastlora.siblings.group_of(model.model.layers[0].self_attn.q_proj) is None


def test_a_model_without_that_adapter_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_name 'french' is unknown: the model has default"):
        trainer_of(injected(), tmp_path, trainer.AdapterCallback("french")).train()
    with pytest.raises(ValueError, match="model has no adapters"):
        trainer_of(llama(), tmp_path, trainer.AdapterCallback()).train()
