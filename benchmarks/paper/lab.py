"""What the measured claims share: decoders with random weights, and contenders timed in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

import fastlora

from ..clocks import Clock, Work, no_garbage_collection, shuffled
from ..rows import Spread
from .claims import Lab
from .models import DECODERS, Decoder, adapt

# The paper's rank for GPT-2, and for the checkpoint of GPT-3.
RANK = 4

# However little time there is, so many rounds are run.
MIN_ROUNDS = 5


def decoder(lab: Lab, name: str, dtype: torch.dtype, r: int | None = None) -> Decoder:
    """A decoder of DECODERS; with a rank, LoRA on Wq and Wv, b not zero."""
    with lab.device:
        model = Decoder(DECODERS[name]).to(dtype)
    for layer in adapt(model, r) if r else ():
        nn.init.normal_(layer.lora_B, std=0.01)
    return model


def adapters(model: nn.Module) -> Iterator[fastlora.LoRALinear]:
    """Its LoRA layers."""
    return (module for module in model.modules() if isinstance(module, fastlora.LoRALinear))


def tokens_for(model: Decoder, batch: int, sequence: int) -> Tensor:
    """Random tokens [batch, sequence + 1]."""
    return torch.randint(model.shape.vocabulary, (batch, sequence + 1), device=model.embedding.weight.device)


def interleaved(contenders: Mapping[str, Work], lab: Lab) -> dict[str, Spread]:
    """Wall time of each contender."""
    clock, scale = Clock(lab.device), lab.scale
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for work in contenders.values():
        work()
    deadline = time.perf_counter() + scale.seconds
    with no_garbage_collection():
        for turn in range(scale.rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for name in shuffled(list(contenders), turn):
                samples[name].append(clock.wall(contenders[name]))
    return {name: Spread.of(times) for name, times in samples.items()}


def milliseconds(spread: Spread) -> str:
    """The median and what holds the middle 60 %."""
    digits = 0 if spread.p50 >= 100 else 2
    return f"{spread.p50:,.{digits}f} ({spread.p20:,.{digits}f}-{spread.p80:,.{digits}f}) ms"
