"""The model's accuracy gate: logits and gradients of an arm at a reduced size, held to ``fastlora.accuracy``.

Two layers of the case's own widths, in its dtype and rank, with or without checkpointing. The oracle is plain LoRA in
the same architecture in float64 on the same rounded weights, the baseline the same in the tested dtype. Biases and b
are random, for zeros hide errors. Backward starts from a random gradient of the logits instead of a loss: the loss is
the same code in every arm, and transformers computes it in float32 whatever it is given, the oracle's float64 included.

The gradients of all layers are compared as one tensor a kind, each scaled by the power of two next to its oracle's RMS:
exact, and no layer drowns another.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.accuracy import Errors, compare

from ..cases import ModelCase
from .architectures import Architecture, architecture_named, build, random_batch
from .arms import FULL, Adapted, ModelArm, plain

_BATCH, _SEQUENCE, _SEED = 3, 24, 20

# Times 1/R. With 1 the update is as large as the layer and the stack so ill conditioned that an arm's error is what
# rounding does to one token: at a width of 64 a sound arm's was 0.2 to 2.8 times the baseline's, and is 0.8 to 1.2 now.
_B_VARIANCE = 0.01

# By name of the layer or weight; None where nothing arrived.
Gradients = dict[str, Tensor | None]

# Logits, and the gradients of each kind.
Products = tuple[Tensor, dict[str, Gradients]]


class ModelGate:
    """Checks each arm once for all cases that differ in batch, sequence or dropout alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._expected: dict[ModelCase, tuple[Products, Products]] = {}
        self._errors: dict[tuple[ModelCase, str], dict[str, Errors]] = {}

    def check(self, arm: ModelArm, case: ModelCase) -> dict[str, Errors]:
        """The errors of logits and gradients: da and db of all adapters, or dw of all weights where there are none."""
        small = case._replace(batch=_BATCH, sequence=_SEQUENCE, dropout=0.0)
        if (small, arm.name) not in self._errors:
            self._errors[small, arm.name] = self._check(arm, small)
        return self._errors[small, arm.name]

    def _check(self, arm: ModelArm, case: ModelCase) -> dict[str, Errors]:
        if arm.name == FULL:
            # Gradients of all weights, and one arm alone that wants them: not kept.
            (oracle, wanted), (baseline, rounded) = self._references(case, adapted=False)
        else:
            if case not in self._expected:
                self._expected[case] = self._references(case, adapted=True)
            (oracle, wanted), (baseline, rounded) = self._expected[case]
        architecture = architecture_named(case.model).reduced()
        subject = arm.adapt(self._base(architecture, case), architecture, case)
        logits, gradients = self._step(subject, architecture, case)
        errors = {"logits": compare(logits, oracle=oracle, baseline=baseline)}
        for kind, group in wanted.items():
            errors[kind] = _compare_all(gradients.get(kind, {}), group, rounded[kind])
        return errors

    def _base(self, architecture: Architecture, case: ModelCase) -> nn.Module:
        model = build(architecture, case.torch_dtype, self._device, case.checkpointing)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
        return model

    def _references(self, case: ModelCase, adapted: bool) -> tuple[Products, Products]:
        """Oracle and baseline: of plain LoRA, or of the base itself."""
        architecture = architecture_named(case.model).reduced()
        base = self._base(architecture, case)
        exact = _float64(copy.deepcopy(base))
        models = [plain(model, architecture, case) if adapted else Adapted(model) for model in (exact, base)]
        oracle, baseline = (self._step(model, architecture, case) for model in models)
        return oracle, baseline

    def _step(self, subject: Adapted, architecture: Architecture, case: ModelCase) -> Products:
        """Forward and backward; the adapters first get the case's own values."""
        generator = torch.Generator(self._device).manual_seed(_SEED)

        def normal(shape: Sequence[int], variance: float) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=self._device).mul_(variance**0.5)
            return values.to(case.torch_dtype)

        with torch.no_grad():
            for a, b in subject.adapters.values():
                a.copy_(normal(a.shape, 1 / (3 * a.shape[1])))
                b.copy_(normal(b.shape, _B_VARIANCE / b.shape[1]))
        ids = random_batch(architecture, case.batch, case.sequence, self._device, _SEED)["input_ids"]
        logits: Tensor = subject.model(input_ids=ids).logits
        if logits.requires_grad:
            logits.backward(normal(logits.shape, 1.0).to(logits.dtype))
        if subject.adapters:
            kinds = {
                kind: {name: pair[i].grad for name, pair in subject.adapters.items()}
                for i, kind in enumerate(("da", "db"))
            }
        else:
            # Of matrices: a key's bias has no gradient but rounding noise, for softmax cancels it.
            kinds = {"dw": {name: p.grad for name, p in subject.model.named_parameters() if p.dim() == 2}}
        return logits.detach(), kinds


class _RMSNorm(nn.Module):
    """``x / rms(x) · weight`` in the dtype of x: transformers' own computes it in float32 even for float64."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.eps: float = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def _float64(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, _RMSNorm(module))
    return model.double()


def _compare_all(got: Gradients, oracle: Gradients, baseline: Gradients) -> Errors:
    """Compares all tensors of a kind as one. A gradient that is missing or unexpected is an error with a message."""
    if unexpected := set(got) - set(oracle):
        return Errors.mismatched(f"a gradient that nobody expected, of {min(unexpected)}")
    columns: tuple[list[Tensor], ...] = ([], [], [])
    for name, exact in oracle.items():
        actual, expected = got.get(name), baseline[name]
        if actual is None:
            return Errors.mismatched(f"no gradient arrived at {name}")
        assert exact is not None
        assert expected is not None
        scale = 2.0 ** -round(math.log2(exact.square().mean().sqrt().item()))
        # Adapters in float32 hold the same rounded values, so their gradients have the same oracle.
        for column, tensor in zip(columns, (actual, exact, expected.to(actual.dtype)), strict=True):
            column.append(scale * tensor.flatten())
    together, exact_together, expected_together = map(torch.cat, columns)
    return compare(together, oracle=exact_together, baseline=expected_together)
