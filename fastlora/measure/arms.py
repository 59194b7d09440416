"""A PEFT model unpatched and patched by turns, and all that a step changes put back afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import siblings
from ..adapters.layer import AdaptedLinear
from ..module import LoRALinear
from ..peft import PatchReport, patch_peft, unpatch_peft
from ..sibling_names import Groups
from ..text import listed

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


class Arms:
    """The classes of a model's modules as PEFT has them and as ``patch_peft`` gives them.

    Patched layers have no state of their own, so that to change the classes is to patch and to unpatch.

    Attributes:
        report: what ``patch_peft`` said.
    """

    def __init__(self, model: nn.Module, strict_dtype: bool, groups: Groups, mlp: bool) -> None:
        with warnings.catch_warnings():
            # What they say is in the report, or an error here.
            warnings.simplefilter("ignore")
            unpatch_peft(model)
            own = {module: type(module) for module in model.modules()}
            self.report: PatchReport = patch_peft(model, strict_dtype=strict_dtype, groups=groups, mlp=mlp)
        if not self.report.patched or self.report.already_patched:
            raise ValueError(_why_not(model, self.report))
        self._both = [(module, kind, type(module)) for module, kind in own.items() if type(module) is not kind]

    def turn(self, patched: bool) -> None:
        """Lets the model run on fastlora, or as PEFT has it."""
        siblings.close()
        for module, own, ours in self._both:
            module.__class__ = ours if patched else own

    @property
    def drops(self) -> bool:
        """Whether an active adapter of a patched layer drops elements of its input in training."""
        layers: list[Any] = [module for module, _, _ in self._both if hasattr(module, "lora_dropout")]
        return any(
            getattr(layer.lora_dropout[name], "p", 0) > 0
            for layer in layers
            for name in layer.active_adapters
            if name in layer.lora_dropout
        )


@contextmanager
def both_ways(model: nn.Module, strict_dtype: bool, groups: Groups, mlp: bool) -> Iterator[Arms]:
    """The two arms of a model, for the length of a block; every module leaves it with its class and its group."""
    kinds = {module: type(module) for module in model.modules()}
    grouped = {layer: group for layer in model.modules() if (group := siblings.group_of(layer))}
    try:
        yield Arms(model, strict_dtype, groups, mlp)
    finally:
        siblings.close()
        for module, kind in kinds.items():
            if type(module) is not kind:
                module.__class__ = kind
        siblings.restore(model, grouped)


@contextmanager
def unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """A block with the model in training or in eval mode; modes, gradients, buffers and torch's random state come back.

    A model that is in that mode as a whole keeps the modes of its parts.
    """
    modes = [(module, module.training) for module in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, t, t.clone())
        for module in model.modules()
        for name, t in module._buffers.items()
        if t is not None
    ]
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=gpus):
        try:
            for p, _ in grads:
                p.grad = None
            if model.training is not training:
                for module, _ in modes:
                    module.training = training
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for p, grad in grads:
                p.grad = grad
            for module, name, t, copy in buffers:
                _put_back(module, name, t, copy)


def _put_back(module: nn.Module, name: str, t: Tensor, copy: Tensor) -> None:
    module._buffers[name] = t
    # By value: torch's batch norm writes its buffers behind their versions.
    if not torch.equal(t, copy):
        with torch.inference_mode(t.is_inference()), torch.no_grad():
            t.copy_(copy)


def check(model: nn.Module, backward: bool) -> None:
    """Raises TypeError or ValueError for a model that cannot be measured, or that a step would change."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass get_peft_model's result")
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _WRAPPERS or getattr(module, "_compiled_call_impl", None) is not None:
            what = f"a {kind}" if kind in _WRAPPERS else "compiled"
            raise ValueError(
                f"{name or 'model'} is {what}, and layers cannot be patched and unpatched by turns inside: pass the "
                "model before it is wrapped or compiled"
            )
        weight: Any = getattr(module, "weight", None)
        if not backward and type(weight).__name__ == "Params4bit" and weight.is_cpu:
            raise ValueError(
                f"{name} has a 4-bit weight on a CPU, which bitsandbytes may pack anew, for good, in a forward alone: "
                "measure training steps (backward=True)"
            )
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device, without data: load the model's weights first")
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a hook that runs after its gradient, such as an optimiser in the backward, which would "
                "change the model: remove it, and measure before you add it"
            )


def _why_not(model: nn.Module, report: PatchReport) -> str:
    if report.already_patched:
        return (
            f"{len(report.already_patched)} layers stay patched ({listed(report.already_patched)}): a wrapper such as "
            "fully_shard gave them a class of its own. Measure before wrapping"
        )
    if any(isinstance(module, (AdaptedLinear, LoRALinear)) for module in model.modules()):
        return (
            "model has fastlora's own adapters (fastlora.inject, LoRALinear), and nothing of PEFT to compare them "
            "with: build the model once more, give it adapters with peft.get_peft_model, and measure that one. It runs "
            "the same kernels"
        )
    if report.skipped:
        why = "; ".join(f"{count} × {reason}" for reason, count in report.reasons.most_common())
        return f"no layer of model would run on fastlora, so there is nothing to compare: {why}"
    return "model holds no adapter layers of peft: pass what get_peft_model returned, unmerged"
