"""Fine-tunes a PEFT model with the Hugging Face Trainer on fastlora: one line more than without.

    python examples/peft_trainer.py [--steps 30] [--bits 4] [--plain]

Offline and in under a minute on a CPU: a small Llama with random weights reads Python's reference manual byte by byte,
with dropout, gradient checkpointing and gradient accumulation. The adapter is saved, and compared with what PEFT loads.
Needs peft, transformers and accelerate. ``--bits 4`` stores the base in 4 bits (QLoRA), by bitsandbytes; ``--plain``
leaves fastlora out, to compare.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence

import torch
from corpus import python_reference
from torch import nn

import fastlora
from fastlora.peft import count_calls

# bitsandbytes, which the Trainer imports, warns of a kernel for CPUs that is not installed; nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from transformers import (  # noqa: E402
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

CONTEXT = 127


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and prints what was patched, the loss, what ran where, and how far the loaded adapter is from the own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--bits", type=int, choices=(4,), help="bits of a base weight; by default float32")
    parser.add_argument("--plain", action="store_true", help="PEFT without fastlora")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        _new_llama().save_pretrained(f"{folder}/base")
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(_base(folder, options.bits), lora)
        if not options.plain:
            print(fastlora.patch_peft(model))  # the one line

        with count_calls() as calls:
            _train(model, options.steps, folder, bf16=options.bits is not None)
        if not options.plain:
            print(calls)

        model.save_pretrained(f"{folder}/adapter")
        loaded = PeftModel.from_pretrained(_base(folder, options.bits), f"{folder}/adapter")
        print(f"loaded by PEFT: logits differ by at most {_distance(model, loaded):.2g} of their largest")


def _new_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,  # bytes
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT + 1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _base(folder: str, bits: int | None) -> LlamaForCausalLM:
    """The base model, as it is loaded: in float32, or in 4 bits and prepared for training."""
    if bits is None:
        return LlamaForCausalLM.from_pretrained(f"{folder}/base")
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM.from_pretrained(f"{folder}/base", quantization_config=packed)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[no-untyped-call]
    return model


def _train(model: nn.Module, steps: int, folder: str, *, bf16: bool) -> None:
    batches = python_reference(CONTEXT).batches(CONTEXT, 1, 16 * steps, seed=0)
    rows = [{"input_ids": window, "labels": window} for (window,) in batches]
    training = TrainingArguments(
        output_dir=f"{folder}/training",
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=5e-3,
        logging_steps=max(1, steps // 6),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=model, args=training, train_dataset=rows).train()


@torch.no_grad()
def _distance(model: nn.Module, loaded: nn.Module) -> float:
    """The largest difference of two models' logits over the largest logit."""
    x = torch.arange(CONTEXT).unsqueeze(0)
    ours, theirs = (each.eval()(input_ids=x).logits.float() for each in (model, loaded))
    return float((ours - theirs).abs().max() / theirs.abs().max())


if __name__ == "__main__":
    main()
