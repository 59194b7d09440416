"""Fine-tunes a PEFT model with the Hugging Face Trainer on fastlora: one line more than without.

    python examples/peft_trainer.py [--steps 30] [--plain]

Offline and in under a minute on a CPU: a small Llama with random weights reads Python's reference manual byte by byte,
with dropout, gradient checkpointing and gradient accumulation. Needs peft, transformers and accelerate. ``--plain``
leaves fastlora out, to compare.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
from corpus import python_reference
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastlora
from fastlora.peft import count_calls

CONTEXT = 127


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and prints what was patched, the loss, and what ran where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--plain", action="store_true", help="PEFT without fastlora")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,  # bytes
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT + 1,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)

    if not options.plain:
        print(fastlora.patch_peft(model))  # the one line

    batches = python_reference(CONTEXT).batches(CONTEXT, 1, 16 * options.steps, seed=0)
    rows = [{"input_ids": window, "labels": window} for (window,) in batches]
    with tempfile.TemporaryDirectory() as folder, count_calls() as calls:
        training = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            learning_rate=5e-3,
            logging_steps=max(1, options.steps // 6),
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=training, train_dataset=rows).train()
    if not options.plain:
        print(calls)


if __name__ == "__main__":
    main()
