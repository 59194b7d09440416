"""A user's batch: how the model is called with it, how many tokens it has, and the loss of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: nn.Module) -> Any:
        """Calls the model."""
        return model(*self.args, **self.kwargs)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names that messages give them."""
        named = {**{f"argument {i}": value for i, value in enumerate(self.args)}, **self.kwargs}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    @property
    def tokens(self) -> int:
        """All ids of ``input_ids``, or of the first tensor; of a floating-point one, its rows."""
        tensors = self.tensors
        named = (tensors[name] for name in ("input_ids", "inputs_embeds") if name in tensors)
        first = next(named, next(iter(tensors.values())))
        width = first.shape[-1] if first.is_floating_point() and first.dim() > 1 else 1
        return first.numel() // max(width, 1)


def batch_of(batch: object) -> Batch:
    """Makes the arguments of a call; tensors that ask for a gradient are put aside for others on the same data.

    Raises:
        TypeError: ``batch`` is no dict, tensor, tuple or list, or holds no tensor.
    """
    if isinstance(batch, Tensor):
        made = Batch((_own(batch),), {})
    elif isinstance(batch, Mapping):
        made = Batch((), {str(name): _own(value) for name, value in batch.items()})
    elif isinstance(batch, (tuple, list)):
        made = Batch(tuple(map(_own, batch)), {})
    else:
        raise TypeError(
            f"batch must be a dict of the model's keyword arguments, a tensor or a tuple of arguments, got "
            f"{type(batch).__name__}: pass what you would call the model with, such as "
            "{'input_ids': ids, 'labels': ids}"
        )
    if not made.tensors:
        raise TypeError("batch holds no tensor: pass what you would call the model with, such as {'input_ids': ids}")
    return made


def loss_of(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    """The loss of an output: by ``loss``, as its attribute, or the sum of its floating-point tensors.

    Raises:
        TypeError: it is no tensor of one element.
    """
    made = loss(output) if loss is not None else getattr(output, "loss", None)
    if made is None:
        parts = [t.sum() for t in _floating(output)]
        made = torch.stack([part.float() for part in parts]).sum() if parts else None
    if not isinstance(made, Tensor) or made.numel() != 1:
        came = f"a tensor of shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise TypeError(
            f"the loss must be a tensor of one element, got {came}: pass loss=, a function that makes it of the "
            "model's output"
        )
    return made


def _own(value: Any) -> Any:
    """A tensor whose gradient is nobody else's."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value.detach().requires_grad_()
    return value


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _floating(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _floating(part)
