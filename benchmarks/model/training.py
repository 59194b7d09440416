"""One arm in training: its model, optimiser and batches; a whole step, and where its bytes are."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.layer import AdaptedConv1D, AdaptedLinear
from fastlora.clock import Work
from fastlora.memory import allocation, stored_bytes

from ..cases import COPIES, ModelCase
from ..layers.arm import choice
from .architectures import architecture_named, build, parameter_count, random_batch
from .arms import FULL, ModelArm

# The optimiser's state exists after one step, a gradient of every a after two: b starts at zero.
WARM_UP = 2

_LEARNING_RATE = 1e-4


class Memory(NamedTuple):
    """Bytes of a steady step, under the names that the rows give them."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    peak_bytes: int

    @property
    def held(self) -> int:
        """Between two steps."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def step(self) -> int:
        """The most that a step adds to weights and optimiser state."""
        return self.peak_bytes - self.weight_bytes - self.optimizer_bytes


class Training:
    """An arm of one case, resident on the device and warmed up."""

    def __init__(self, case: ModelCase, arm: ModelArm, device: torch.device) -> None:
        architecture = architecture_named(case.model)
        base = build(architecture, case.torch_dtype, device, case.checkpointing)
        self.subject = arm.adapt(base, architecture, case)
        self.device = device
        self._dropout = case.dropout
        self._tokens = case.batch * case.sequence
        self._batches = [random_batch(architecture, case.batch, case.sequence, device, i) for i in range(COPIES)]
        self._optimizer = torch.optim.AdamW(self.subject.trained, lr=_LEARNING_RATE, fused=True)
        for turn in range(WARM_UP):
            self.prepare(turn)()

    def loss(self, turn: int) -> Tensor:
        """The forward, loss included; ``turn`` picks the batch."""
        loss: Tensor = self.subject.model(**self._batches[turn % COPIES]).loss
        return loss

    def step(self, turn: int) -> Tensor:
        """zero_grad, forward, loss, backward and AdamW's step; returns the loss."""
        self._optimizer.zero_grad()
        loss = self.loss(turn)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def prepare(self, turn: int) -> Work:
        """The step to be timed; its dropout is drawn from the turn's own seed."""
        torch.manual_seed(turn)
        return lambda: self.step(turn)

    def broken(self) -> str | None:
        """Names a gradient that the last step left missing, not finite or all zero; None where all are sound."""
        # Vectors aside: a key's bias has no gradient but rounding noise.
        for name, parameter in self.subject.model.named_parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                if parameter.grad is None:
                    return f"no gradient arrived at {name}"
                if not parameter.grad.isfinite().all():
                    return f"the gradient of {name} is not finite"
                if not parameter.grad.any():
                    return f"the gradient of {name} is zero"
        return None

    def memory(self) -> Memory:
        """The bytes of a step by kind, every storage once."""
        model, trained = self.subject.model, self.subject.trained
        states = [t for state in self._optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        weights, optimizer = stored_bytes([*model.parameters(), *model.buffers()]), stored_bytes(states)
        self._optimizer.zero_grad()
        activations = allocation(lambda: self.loss(0), self.device).live
        step = allocation(self.prepare(0), self.device).peak
        gradients = stored_bytes(p.grad for p in trained if p.grad is not None)
        return Memory(weights, gradients, optimizer, activations, weights + optimizer + step)

    @property
    def kernel(self) -> str | None:
        """The kernels that fastlora runs in its layers, such as ``library``; None where it has no layer."""
        chosen = set()
        for layer in self.subject.model.modules():
            if isinstance(layer, AdaptedLinear):
                a, b = layer.lora_A["default"], layer.lora_B["default"]
                w = layer.weight.T if isinstance(layer, AdaptedConv1D) else layer.weight
                x = w.new_empty(self._tokens, w.shape[1])
                chosen.add(choice(x, w, a, b, bias=layer.bias, dropout_p=self._dropout).kernel or "none")
        return "+".join(sorted(chosen)) or None


def require_room(case: ModelCase, arm: ModelArm, device: torch.device) -> None:
    """Raises MemoryError where weights, gradients and states alone are more than a CPU has.

    A GPU's allocator says so itself; Linux hands out memory that it lacks, and then kills.
    """
    least = parameter_count(case.model) * case.torch_dtype.itemsize * (4 if arm.name == FULL else 1)
    if device.type == "cpu" and least > capacity(device):
        raise MemoryError(f"holds {least / 2**30:.0f} GiB of {capacity(device) / 2**30:.0f} even between steps")


def keep_imports(models: Iterable[str]) -> None:
    """Imports what the models need and hides it from the garbage collector, which :func:`release` calls often."""
    for name in models:
        parameter_count(name)
    if importlib.util.find_spec("peft") is not None:
        importlib.import_module("peft")
    gc.collect()
    gc.freeze()


def release(device: torch.device) -> None:
    """Frees memory that nobody refers to any more; models and their hooks are cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def capacity(device: torch.device) -> int:
    """The device's whole memory; on a CPU the machine's, or the part that a container may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return min(whole, int(allowed)) if allowed.isdigit() else whole
