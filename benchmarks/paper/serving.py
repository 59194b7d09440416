"""Claims about what a merged adapter costs at inference, and what it costs to switch tasks."""

from __future__ import annotations

import copy
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fastlora
from fastlora.accuracy import compare

from ..measure.clocks import Work
from .claims import MEASURED, Claim, Finding, Lab
from .lab import RANK, adapters, decoder, interleaved, milliseconds, require_accurate, require_ok
from .models import Decoder

# Table 1 of the paper, milliseconds of a whole GPT-2 M by (batch, sequence): merged LoRA, Adapter-L, Adapter-H.
TABLE_1 = {(32, 512): (1449.4, 1482.0, 1492.2), (16, 256): (338.0, 354.8, 366.3), (1, 128): (19.8, 23.9, 25.8)}


def _latency(lab: Lab) -> Finding:
    linear = nn.Linear(lab.scale.width, lab.scale.width, device=lab.device, dtype=lab.dtype)
    # Each has a weight of its own: one that several share would lie warmer in the caches.
    again, *bases = (copy.deepcopy(linear) for _ in range(3))
    merged, unmerged = (fastlora.LoRALinear.from_linear(base, r=RANK) for base in bases)
    nn.init.normal_(merged.lora_B)
    require_accurate(lab, lab.scale.width, 64)
    _require_merged(merged)
    contenders = {"bare": linear, "again": again, "merged": merged, "unmerged": unmerged}
    ours, notes, holds = [], [], True
    with torch.inference_mode():
        for batch, sequence in lab.scale.inputs:
            x = torch.randn(batch, sequence, lab.scale.width, device=lab.device, dtype=lab.dtype)
            times = interleaved({name: _call(layer, x) for name, layer in contenders.items()}, lab)
            over = {name: spread.p50 / times["bare"].p50 - 1 for name, spread in times.items()}
            holds &= times["merged"].p50 <= max(times["bare"].p80, times["again"].p80)
            ours.append(f"{over['merged']:+.1%} at {batch} × {sequence} (another bare layer {over['again']:+.1%})")
            notes.append(
                f"{batch} × {sequence}: bare {milliseconds(times['bare'])}, merged {milliseconds(times['merged'])}, "
                f"unmerged {over['unmerged']:+.1%}{_adapter_layers(batch, sequence)}"
            )
    return Finding(
        ", ".join(ours),
        holds,
        f"One layer of width {lab.scale.width:,}, {lab.dtype_name}, by batch × sequence; median and p20-p80. It holds "
        f"where the merged median is within the p80 of either bare layer. {'; '.join(notes)}.",
    )


@torch.no_grad()
def _require_merged(layer: fastlora.LoRALinear) -> None:
    """Merges, and holds the layer to the product with W + scale · B A in float64, rounded once."""
    w, a, b = layer.weight.double(), layer.lora_A.double(), layer.lora_B.double()
    x = torch.randn(64, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    whole = w + layer.scale * b @ a
    bias = None if layer.bias is None else layer.bias.double()
    oracle = F.linear(x.double(), whole, bias)
    baseline = F.linear(x, whole.to(x.dtype), layer.bias)
    require_ok({"y of the merged layer": compare(layer.merge()(x), oracle=oracle, baseline=baseline)})


def _adapter_layers(batch: int, sequence: int) -> str:
    if (batch, sequence) not in TABLE_1:
        return ""
    plain, *adapted = TABLE_1[batch, sequence]
    return f"; the paper's adapter layers {' and '.join(f'{ms / plain - 1:+.1%}' for ms in adapted)} of a whole GPT-2 M"


def _call(layer: nn.Module, x: Tensor) -> Work:
    return lambda: layer(x)


class _Recorder(TorchDispatchMode):
    """Keeps what operators run, views and all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def operators(layer: nn.Module, x: Tensor) -> list[Any]:
    """The operators of one inference, in order."""
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        layer(x)
    return recorder.seen


def products(seen: list[Any]) -> int:
    """How many of the operators multiply matrices: those whose FLOPs torch can count."""
    return sum(operator.overloadpacket in flop_registry for operator in seen)


def _one_product(lab: Lab) -> Finding:
    linear = nn.Linear(64, 96, device=lab.device, dtype=lab.dtype)
    layer = fastlora.LoRALinear.from_linear(linear, r=RANK)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 24, 64, device=lab.device, dtype=lab.dtype)
    bare, merged = operators(linear, x), operators(layer.merge(), x)
    return Finding(
        f"{products(merged)} matrix product",
        products(merged) == 1 and merged == bare,
        f"The bare layer runs {', '.join(map(str, bare))}; the merged one {'the same' if merged == bare else merged}.",
    )


def _switching(lab: Lab) -> Finding:
    name = lab.scale.model
    whole = decoder(lab, name, torch.float16)
    merged, unmerged = (decoder(lab, name, torch.float16, RANK) for _ in range(2))
    for layer in adapters(merged):
        layer.merge()
    with tempfile.TemporaryDirectory() as folder:
        a, b, full = (Path(folder, f"{kind}.pt") for kind in ("a", "b", "full"))
        for model, file in ((merged, a), (unmerged, b)):
            torch.save({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, file)
        torch.save(whole.state_dict(), full)
        sizes = [file.stat().st_size for file in (b, full)]
        contenders = {
            "merged": switch(merged, [a, b]),
            "unmerged": switch(unmerged, [a, b]),
            "whole": switch(whole, [full]),
        }
        times = interleaved(contenders, lab)
    aside = sum(layer.weight.nbytes for layer in adapters(merged))
    ms = {kind: spread.p50 for kind, spread in times.items()}
    return Finding(
        f"{ms['merged']:,.1f} ms merged, {ms['unmerged']:,.1f} ms unmerged, {ms['whole']:,.1f} ms the whole model",
        max(ms["merged"], ms["unmerged"]) < ms["whole"],
        f"{name} in fp16, r = {RANK}: {ms['whole'] / ms['merged']:.1f}× and {ms['whole'] / ms['unmerged']:.1f}× faster "
        f"than the whole model. Read from files of {sizes[0] / 1e6:.2f} and {sizes[1] / 1e6:,.1f} MB that the system "
        "holds in memory; a cold disk costs the larger more. Merged: the base put back, a and b loaded, merged again; "
        f"unmerged: a and b loaded. Merged layers keep their base aside ({aside / 1e6:.1f} MB): the paper subtracts "
        "B A instead, which leaves rounding behind.",
    )


def switch(model: Decoder, files: list[Path]) -> Work:
    """A call that loads the next of the files; merged layers stay merged."""
    turns, device = itertools.cycle(files), model.embedding.weight.device

    def work() -> None:
        model.load_state_dict(torch.load(next(turns), map_location=device), strict=False)

    return work


CLAIMS = (
    Claim("latency", "no latency added once merged", "section 4.1, Table 1", "none", MEASURED, _latency),
    Claim("one-product", "once merged, one matrix product", "section 4.1", "W = W0 + BA", MEASURED, _one_product),
    Claim("switching", "tasks switched at a lower cost", "section 4.2", "much lower", MEASURED, _switching),
)
