"""The measurement: calls counted, memory metered, then steps of all arms in shuffled turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import dispatch, dropout_cpu
from ..backends.machine import machine_of
from ..clock import Clock, no_garbage_collection, shuffled
from ..memory import Allocation, allocation
from ..peft import Calls, PatchReport, count_calls
from ..sibling_names import Groups
from ..text import dtype_name, listed
from .arms import Arms, both_ways, check, unchanged
from .batch import Batch, batch_of, loss_of
from .report import Arm, Measurement

FEWEST = 6
_WARM_UP = 2
_PEFT, _AGAIN, _FASTLORA = "peft", "again", "fastlora"


class _Subject:
    """A model with its batch, and the work of one step."""

    def __init__(self, model: nn.Module, batch: Batch, backward: bool, loss: Callable[[Any], Tensor] | None) -> None:
        self.model, self.batch, self.backward, self._loss = model, batch, backward, loss
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = next(model.parameters()).device

    def forward(self) -> object:
        """The forward; with its loss, where a backward follows."""
        if not self.backward:
            with torch.no_grad():
                return self.batch.run(self.model)
        loss = loss_of(self.batch.run(self.model), self._loss)
        if not loss.requires_grad:
            raise ValueError(
                "nothing trains: the loss asks for no gradient. Let the adapters train (PeftModel.from_pretrained "
                "takes is_trainable=True), or measure the forward alone (backward=False)"
            )
        return loss

    def step(self) -> None:
        """A whole step; gradients of the one before are gone."""
        made = self.forward()
        if isinstance(made, Tensor) and self.backward:
            made.backward()

    def prepare(self, turn: int) -> None:
        """Lets a step of this turn begin: no gradients, and masks from the turn's own seed."""
        for p in self.trained:
            p.grad = None
        torch.manual_seed(turn)


def run(
    model: nn.Module,
    batch: object,
    *,
    steps: int,
    backward: bool,
    loss: Callable[[Any], Tensor] | None,
    strict_dtype: bool,
    groups: Groups,
    mlp: bool,
) -> Measurement:
    """What :func:`fastlora.measure` does."""
    check(model, backward)
    if steps < FEWEST:
        raise ValueError(f"steps must be at least {FEWEST}, for medians with a range, got {steps}")
    subject = _Subject(model, batch_of(batch), backward, loss)
    _check_devices(subject)
    with both_ways(model, strict_dtype, groups, mlp) as arms, unchanged(model, training=backward):
        calls = _calls(subject, arms)
        memory = {name: _memory(subject, arms, name == _FASTLORA) for name in (_PEFT, _FASTLORA)}
        times = _times(subject, arms, steps)
        kernels = _kernels(arms.report, subject, arms.drops and model.training)
        words = _words(subject, arms)
    (peft, peft_kept), (ours, ours_kept) = memory[_PEFT], memory[_FASTLORA]
    return Measurement(
        words,
        _machine(subject.device),
        subject.batch.tokens,
        Arm(times[_PEFT], peft.peak, peft_kept),
        times[_AGAIN],
        Arm(times[_FASTLORA], ours.peak, ours_kept),
        calls,
        kernels,
        len(arms.report.mlps),
    )


def _calls(subject: _Subject, arms: Arms) -> Calls:
    """Runs a first step of each arm, so that what they build is built, and counts the patched forward's calls."""
    for patched in (False, True):
        arms.turn(patched)
        subject.prepare(0)
        subject.step()
    with count_calls() as calls:
        subject.forward()
    return calls


def _memory(subject: _Subject, arms: Arms, patched: bool) -> tuple[Allocation, int | None]:
    arms.turn(patched)
    subject.prepare(0)
    kept = allocation(subject.forward, subject.device).live if subject.backward else None
    subject.prepare(0)
    return allocation(subject.step, subject.device), kept


def _times(subject: _Subject, arms: Arms, steps: int) -> dict[str, tuple[float, ...]]:
    clock = Clock(subject.device)
    times: dict[str, list[float]] = {_PEFT: [], _AGAIN: [], _FASTLORA: []}
    with no_garbage_collection():
        for turn in range(_WARM_UP + steps):
            for name in shuffled(list(times), turn):
                arms.turn(name == _FASTLORA)
                subject.prepare(turn)
                times[name].append(clock.wall(subject.step))
    return {name: tuple(taken[_WARM_UP:]) for name, taken in times.items()}


def _kernels(report: PatchReport, subject: _Subject, drops: bool) -> tuple[str, ...]:
    """The kernel of the layers' forward at this number of tokens, and why."""
    tokens, counted = subject.batch.tokens, Counter[str]()
    for request, count in report.requests.items():
        chosen = dispatch.explain_request(request._replace(m=tokens, dropout=drops))
        counted[f"{chosen.chosen or 'none'} at {tokens} tokens, {chosen.why}"] += count
    kernels = [f"{kernel} ({count} layers)" for kernel, count in counted.most_common()]
    if drops and subject.device.type == "cpu":
        built = dropout_cpu.is_built()
        kernels.append(
            "dropout by " + ("the CPU code" if built else "torch's operators, slower: the CPU code is not built")
        )
    return tuple(kernels)


def _check_devices(subject: _Subject) -> None:
    devices = {p.device for p in subject.model.parameters()}
    for name, t in subject.batch.tensors.items():
        if len(devices) == 1 and t.device != subject.device:
            raise ValueError(
                f"{name} of batch is on {t.device} and the model on {subject.device}: move it with "
                f".to({str(subject.device)!r})"
            )


def _words(subject: _Subject, arms: Arms) -> str:
    """What was measured, in a line."""
    bases = {dtype_name(request.dtype) for request in arms.report.requests}
    adapters = {dtype_name(request.adapter_dtype) for request in arms.report.requests}
    device = subject.device.type
    parts = [
        f"{subject.batch.tokens} tokens",
        "forward and backward" if subject.backward else "forward alone",
        f"{listed(sorted(bases))} base, {listed(sorted(adapters))} adapters",
        "dropout" if arms.drops and subject.model.training else "no dropout",
    ]
    if torch.is_autocast_enabled(device):
        parts.append(f"autocast in {dtype_name(torch.get_autocast_dtype(device))}")
    base = getattr(subject.model, "get_base_model", lambda: subject.model)()
    return f"{type(base).__name__}: {', '.join(parts)}"


def _machine(device: torch.device) -> str:
    machine = machine_of(device)
    threads = f", {machine.threads} thread{'s' * (machine.threads != '1')}" if machine.threads else ""
    return f"{machine.device} ({machine.capability}{threads}), torch {machine.torch}"
