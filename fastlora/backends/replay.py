"""Triton launches, done again for other tensors of the same shapes, strides, dtypes and alignment.

A launcher takes the host 30 to 40 µs: tile, grid, arguments by name, Triton's binder and its key. All of that follows
from what :func:`replay` remembers a call by; what is left is to make the results' memory and to call the compiled
kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = tuple["Tensor | None", ...]
Launcher = Callable[[], tuple[Tensors, list[Any]]]


class _Memory(NamedTuple):
    """Memory that a launcher makes: for a result, or for sums that another launch adds up.

    ``within`` is the number of the tensor that has this one's memory, None where it has its own.
    """

    elements: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    within: int | None

    @classmethod
    def of(cls, tensor: Tensor, within: int | None) -> _Memory:
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        offset = int(tensor.storage_offset())
        return cls(elements, tuple(tensor.shape), tensor.stride(), offset, tensor.dtype, within)

    def make(self, tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
        if self.within is None:
            whole = torch.empty(self.elements, dtype=self.dtype, device=device)
        else:
            whole = tensors[self.within]  # type: ignore[assignment]
        return whole.as_strided(self.shape, self.stride, self.offset)


class _Descriptor(NamedTuple):
    """A tensor descriptor over one of the call's tensors."""

    kind: Any
    tensor: int
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: Sequence[int]

    def make(self, tensors: Sequence[Tensor | None]) -> Any:
        return self.kind(tensors[self.tensor], self.shape, self.strides, self.block_shape)


class _Step(NamedTuple):
    """One launch: the compiled kernel on its grid, its arguments in order, and those to fill in."""

    run: Callable[..., object]
    arguments: list[Any]
    tensors: tuple[tuple[int, int], ...]
    descriptors: tuple[tuple[int, _Descriptor], ...]


class _Plan(NamedTuple):
    """What a call launches. Tensors are numbered: operands first, then results, then what is between launches."""

    memory: tuple[_Memory, ...]
    results: tuple[int | None, ...]
    steps: tuple[_Step, ...]

    def __call__(self, operands: Tensors, device: torch.device) -> Tensors:
        tensors = list(operands)
        for memory in self.memory:
            tensors.append(memory.make(tensors, device))
        for step in self.steps:
            arguments = step.arguments.copy()
            for place, number in step.tensors:
                arguments[place] = tensors[number]
            for place, descriptor in step.descriptors:
                arguments[place] = descriptor.make(tensors)
            step.run(*arguments)
        return tuple(None if number is None else tensors[number] for number in self.results)


_plans: dict[tuple[Any, ...], _Plan | None] = {}
_MOST_PLANS = 4096


def replay(
    kind: str, operands: Tensors, constants: tuple[object, ...], device: torch.device, launcher: Launcher
) -> Tensors:
    """What ``launcher`` makes, launched: by the launcher the first time, by what was kept of it from then on.

    Args:
        kind: names the launcher.
        operands: every tensor that the launches read; the launcher copies none of them and makes no other values.
        constants: all else that the launches follow from.
        device: where they run; the current one.
        launcher: gives the results' memory and the launches that fill it.
    """
    key = (
        kind,
        device,
        constants,
        *(None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in operands),
    )
    plan = _plans.get(key)
    if plan is not None:
        return plan(operands, device)
    results, launches = launcher()
    compiled = [launch.run() for launch in launches]
    if key not in _plans:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = _plan(operands, results, launches, compiled)
    return results


def forget() -> None:
    """Asks the launchers again."""
    _plans.clear()


def _plan(operands: Tensors, results: Tensors, launches: Sequence[Any], compiled: Sequence[Any]) -> _Plan | None:
    """What is to be kept of a call, or None where it cannot be done again without its launcher."""
    if any(kernel is None for kernel in compiled):  # the interpreter's
        return None
    numbers: dict[int, int] = {}
    for number, tensor in enumerate(operands):
        if tensor is not None and numbers.setdefault(tensor.data_ptr(), number) != number:
            return None  # two operands in one place: which of them a launch reads cannot be told
    memory: list[_Memory] = []
    storages: dict[int, int] = {}

    def number_of(tensor: Tensor) -> int:
        address = tensor.data_ptr()
        if address not in numbers:
            number = numbers[address] = len(operands) + len(memory)
            storage = tensor.untyped_storage().data_ptr()
            memory.append(_Memory.of(tensor, storages.get(storage)))
            storages.setdefault(storage, number)
        return numbers[address]

    result_numbers = tuple(None if tensor is None else number_of(tensor) for tensor in results)
    steps = [_step(launch, kernel, number_of) for launch, kernel in zip(launches, compiled, strict=True)]
    return _Plan(tuple(memory), result_numbers, tuple(steps))


def _step(launch: Any, kernel: Any, number_of: Callable[[Tensor], int]) -> _Step:
    arguments = [launch.arguments[name] for name in launch.kernel.arg_names]
    tensors, descriptors = [], []
    for place, value in enumerate(arguments):
        if isinstance(value, Tensor):
            tensors.append((place, number_of(value)))
        elif hasattr(value, "block_shape"):
            described = _Descriptor(type(value), number_of(value.base), value.shape, value.strides, value.block_shape)
            descriptors.append((place, described))
        else:
            continue
        arguments[place] = None
    grid = (*launch.grid, 1, 1)[:3]
    return _Step(kernel[grid], arguments, tuple(tensors), tuple(descriptors))
