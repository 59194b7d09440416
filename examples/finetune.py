"""Fine-tunes a Transformer on real text three ways from one start: plain LoRA, fastlora, and all weights.

    python examples/finetune.py                  two CPU cores, under two minutes
    python examples/finetune.py --preset gpu     Llama-3.2-1B's widths in bfloat16, one GPU of 80 GB

A byte-level decoder learns Python from the standard library's sources, then adapts to English, Python's own reference.
The variants take the same batches in turn, step by step, so that a noisy machine slows all alike. A control, plain LoRA
with its start moved by one rounding, shows how far apart two equal computations drift in training.

Exit status: 0 every check passed, 1 a check failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import operator
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpus
import report
import torch
from decoder import Decoder, Shape
from torch import Tensor, nn
from training import WARMUP_STEPS, Run, held_out_loss, logits_of, train

from fastlora import LoRALinear, explain

Wrap = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True)
class Preset:
    """The size of everything: the model, its batches, how long and how fast it learns."""

    shape: Shape
    context: int
    batch: int
    pretrain_steps: int
    steps: int
    pretrain_lr: float
    lora_lr: float
    full_lr: float
    dtype: torch.dtype = torch.float32


PRESETS = {
    "tiny": Preset(Shape(64, 2, 4, 2, 176), 32, 8, 60, 30, 1e-2, 5e-3, 2e-3),
    "cpu": Preset(Shape(256, 4, 4, 2, 704), 128, 8, 150, 50, 3e-3, 5e-3, 1e-3),
    "gpu": Preset(Shape(2048, 16, 32, 8, 8192), 2048, 4, 300, 200, 3e-4, 5e-4, 5e-5, torch.bfloat16),
}


# How far merging may move the logits, relative to the largest: the merged weights are rounded once more.
MERGED_BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
# Training amplifies rounding, so no constant bounds how far two equal computations drift apart: a control measures it,
# plain LoRA started one rounding away from plain LoRA. The floor is for a control still equal to the last digits.
CONTROL_FACTOR = 10
CURVE_FLOOR = 1e-5


class PlainLoRA(nn.Module):
    """LoRA as one writes it in a few lines of torch."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]."""
        y: Tensor = self.linear(x) + self.scale * (self.dropout(x) @ self.lora_A.T) @ self.lora_B.T
        return y


def adapted(base: Decoder, dtype: torch.dtype, wrap: Wrap) -> Decoder:
    """A copy of ``base`` in ``dtype``, frozen, with every projection of its blocks wrapped."""
    model = copy.deepcopy(base).to(dtype).requires_grad_(False)
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, wrap(child))
    return model


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """What LoRA has trained, by name: all that is worth saving beside the base."""
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


def load_adapter(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    """Puts an adapter into a wrapped base.

    Raises:
        ValueError: a tensor of the adapter or of the model is left over.
    """
    missing, unexpected = model.load_state_dict(adapter, strict=False)
    if left_over := unexpected + [name for name in missing if "lora_" in name]:
        raise ValueError(f"the adapter does not fit this model: {', '.join(left_over)}")


@torch.no_grad()
def check_adapter(base: Decoder, trained: Decoder, wrap: Wrap, tokens: Tensor, preset: Preset) -> dict[str, Any]:
    """Saves the adapter of a trained model, loads it over a fresh copy of the base, merges and unmerges it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.pt"
        torch.save(adapter_of(trained), file)
        adapter_bytes = file.stat().st_size
        adapter = torch.load(file, weights_only=True)
    dtype, bound = preset.dtype, MERGED_BOUND[preset.dtype]
    fresh = adapted(base, dtype, wrap)
    load_adapter(fresh, adapter)
    for model in (trained, fresh):
        model.eval()

    expected = logits_of(trained, tokens, dtype)
    loaded_equal = torch.equal(logits_of(fresh, tokens, dtype), expected)
    layers = [module for module in fresh.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.merge()
    difference = (logits_of(fresh, tokens, dtype).float() - expected.float()).abs().max() / expected.abs().max()
    for layer in layers:
        layer.unmerge()
    before, after = trained.state_dict(), fresh.state_dict()
    return {
        "adapter_bytes": adapter_bytes,
        "model_bytes": sum(p.numel() for p in base.parameters()) * dtype.itemsize,
        "loaded_equal": loaded_equal,
        "merged_relative_difference": difference.item(),
        "merged_bound": bound,
        "merged_equal": difference.item() <= bound,
        "unmerged_equal": all(torch.equal(before[name], after[name]) for name in before),
    }


def row(run: Run, plain: Run, before: float, after: float) -> dict[str, Any]:
    """One line of the table. Speed over plain is paired step by step, so it holds on a machine that is not quiet."""
    return {
        "variant": run.name,
        "trainable": run.trainable,
        "train_loss": statistics.fmean(run.losses[-10:]),
        "held_out_before": before,
        "held_out_after": after,
        "tokens_per_second": run.throughput(),
        "speed_over_plain": statistics.median(map(operator.truediv, plain.timed, run.timed)),
        "peak_bytes": run.peak_bytes,
        "memory_over_plain": run.peak_bytes and plain.peak_bytes and run.peak_bytes / plain.peak_bytes,
    }


def nudge(model: nn.Module, dtype: torch.dtype) -> None:
    """Moves each element of every lora_A up or down by about one rounding of ``dtype``."""
    for name, tensor in adapter_of(model).items():
        if name.endswith("lora_A"):
            tensor.mul_(1 + torch.finfo(dtype).eps * torch.randn_like(tensor).sign())


def compared(fast: Run, plain: Run, control: Run) -> dict[str, Any]:
    """How far fastlora's loss curve lies from plain LoRA's, beside how far the control lies from it."""
    apart = [abs(ours - theirs) for ours, theirs in zip(fast.losses, plain.losses, strict=True)]
    relative = list(map(operator.truediv, apart, plain.losses))
    drift = [abs(nudged - loss) / loss for nudged, loss in zip(control.losses, plain.losses, strict=True)]
    bound = max(CONTROL_FACTOR * max(drift), CURVE_FLOOR)
    return {
        "max_difference": max(apart),
        "max_relative_difference": max(relative),
        "max_control_difference": max(drift),
        "bound": bound,
        "coincide": all(distance <= bound for distance in relative),
        "relative_differences": relative,
        "control_differences": drift,
    }


def backend_of(model: Decoder, preset: Preset) -> str | None:
    """The backend that fastlora picks for the first projection at the sizes of training."""
    layer = next(module for module in model.modules() if isinstance(module, LoRALinear))
    x = layer.weight.new_empty(preset.batch * preset.context, layer.in_features)
    return explain(x, layer.weight, layer.lora_A, layer.lora_B, dropout_p=layer.lora_dropout).chosen


def finetune(args: argparse.Namespace) -> dict[str, Any]:
    """The whole job: pretrain, adapt three ways, check the adapter. Returns all there is to report."""
    preset, device = PRESETS[args.preset], args.device
    steps = args.steps or preset.steps
    pretrain_steps = args.pretrain_steps or preset.pretrain_steps
    read = functools.partial(corpus.read, context=preset.context)
    first = (read(args.text) if args.text else corpus.python_sources(preset.context)).to(device)
    second = (read(args.adapt_text) if args.adapt_text else corpus.python_reference(preset.context)).to(device)

    torch.manual_seed(args.seed)
    with device:  # a thousand million weights take one CPU thread eight seconds
        base = Decoder(preset.shape)
    pretraining = Run("base", base, preset.pretrain_lr, pretrain_steps, preset.dtype)
    print(f"Pretraining {pretraining.trainable:,} weights on {first.name} (loss, tokens/s)", flush=True)
    train([pretraining], first.batches(preset.context, preset.batch, pretrain_steps, args.seed))
    del pretraining

    with_plain = functools.partial(PlainLoRA, rank=args.rank, alpha=args.alpha, dropout=args.dropout)
    with_fast = functools.partial(
        LoRALinear.from_linear,
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        adapter_dtype=torch.float32,
    )
    plain = Run("plain", adapted(base, preset.dtype, with_plain), preset.lora_lr, steps, preset.dtype)
    fast = Run("fastlora", adapted(base, preset.dtype, with_fast), preset.lora_lr, steps, preset.dtype)
    control = Run("control", adapted(base, preset.dtype, with_plain), preset.lora_lr, steps, preset.dtype)
    full = Run("full", copy.deepcopy(base), preset.full_lr, steps, preset.dtype)
    for run in (fast, control):
        load_adapter(run.model, adapter_of(plain.model))
    nudge(control.model, preset.dtype)
    runs = [plain, fast, full]
    backend = backend_of(fast.model, preset)
    held_out = list(second.held_out_batches(preset.context, preset.batch, count=8))
    before = [held_out_loss(run.model, held_out, preset.dtype) for run in runs]
    print(f"Adapting to {second.name}, rank {args.rank}; fastlora on its {backend} backend", flush=True)
    train([*runs, control], second.batches(preset.context, preset.batch, steps, args.seed + 1))
    after = [held_out_loss(run.model, held_out, preset.dtype) for run in runs]

    return {
        "title": f"Rank-{args.rank} LoRA from {first.name} to {second.name}, {args.preset} preset",
        "environment": report.environment(device),
        "settings": {
            **{name: getattr(args, name) for name in ("preset", "rank", "alpha", "dropout", "seed")},
            "pretrain_steps": pretrain_steps,
            "steps": steps,
            "context": preset.context,
            "batch": preset.batch,
            "dtype": str(preset.dtype).removeprefix("torch."),
            "shape": asdict(preset.shape),
            "texts": {text.name: text.sha256 for text in (first, second)},
            "backend": backend,
        },
        "rows": [row(run, plain, *losses) for run, *losses in zip(runs, before, after, strict=True)],
        "curves": compared(fast, plain, control) | {"compared": args.dropout == 0},
        "adapter": check_adapter(base, fast.model, with_fast, held_out[0][:, :-1], preset),
        "losses": {run.name: run.losses for run in (*runs, control)},
    }


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="size of model and run (default: cpu)")
    parser.add_argument("--text", type=Path, help="file to pretrain on (default: the standard library's sources)")
    parser.add_argument("--adapt-text", type=Path, help="file to adapt to (default: Python's language reference)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (default: 16)")
    parser.add_argument("--alpha", type=float, default=32, help="the update is scaled by alpha / rank (default: 32)")
    parser.add_argument("--dropout", type=float, default=0, help="on the adapters' input; the curves then differ")
    parser.add_argument("--pretrain-steps", type=int, help="steps of pretraining (default: the preset's)")
    parser.add_argument("--steps", type=int, help="steps of adaptation (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout (default: 0)")
    parser.add_argument("--device", help="as torch names it (default: cuda for the gpu preset, else cpu)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out", type=Path, default=report.LOCAL, help="folder of plot and JSON (default: benchmarks/results/local)"
    )
    place.add_argument("--publish", action="store_true", help="write to this device's folder in benchmarks/results")
    args = parser.parse_args(argv)

    if args.rank < 1:
        parser.error(f"--rank must be at least 1, got {args.rank}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout must be at least 0 and below 1, got {args.dropout}")
    for name in ("pretrain_steps", "steps"):
        value = getattr(args, name)
        if value is not None and value <= WARMUP_STEPS:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be above the {WARMUP_STEPS} of the warm-up, got {value}")
    try:
        args.device = torch.empty(0, device=args.device or ("cuda" if args.preset == "gpu" else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"no such device here: {str(error).splitlines()[0]}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the job, prints and writes its report; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    args = parsed(parser, argv)
    try:
        results = finetune(args)
    except corpus.TextError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    passed = report.show(results)
    for file in report.write(report.published(args.device) if args.publish else args.out, results):
        print(f"wrote {file}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
