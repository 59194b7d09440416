"""Adapters that are sharded over ranks (DTensors): gathered tensor by tensor, and one error for all ranks.

All ranks of the mesh take part in every step, in the same order, whatever goes wrong on one of them: a rank that left
early would let the others wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.dtensor import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def reshard(model: nn.Module) -> None:
    """Lets FSDP2 free what it keeps gathered after a forward: copies, in a mixed-precision policy's dtype."""
    for module in model.modules():
        if isinstance(module, _fsdp()):
            module.reshard()  # type: ignore[operator]


def kind_of(model: nn.Module) -> type:
    """The class of a model, without the one that ``fully_shard`` puts before it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, _fsdp()))


def _fsdp() -> tuple[type, ...]:
    """FSDP2's class; none where nobody has imported it, so that no module is of it."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return () if kind is None else (kind,)


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """The mesh of the tensors that are sharded, the largest where there are several; None where none is."""
    sharded: list[Any] = [tensor for tensor in tensors if is_sharded(tensor)]
    return max((tensor.device_mesh for tensor in sharded), key=lambda mesh: mesh.size(), default=None)


def gathered(tensor: Any) -> Tensor:
    """The whole tensor, on every rank of its mesh; all of them call it."""
    if not is_sharded(tensor):
        whole: Tensor = tensor.detach()
        return whole
    tensor = tensor.detach()
    if tensor.device.type != tensor.device_mesh.device_type:  # offloaded, where its ranks cannot send it
        tensor = tensor.to(tensor.device_mesh.device_type)
    return tensor.full_tensor()  # type: ignore[no-any-return]


def is_first(mesh: DeviceMesh) -> bool:
    """Whether this rank is the first of the mesh, which writes."""
    return not any(mesh.get_coordinate() or (1,))


def agree(mesh: DeviceMesh, error: Exception | None) -> None:
    """Waits for all ranks of the mesh; an error that one of them has is raised there, and quoted on the others.

    Raises:
        RuntimeError: another rank has an error and this one has none.
    """
    distributed = torch.distributed
    said = None if error is None else f"rank {distributed.get_rank()}: {type(error).__name__}: {error}"
    for dim in range(mesh.ndim):
        heard: list[str | None] = [None] * mesh.size(dim)
        distributed.all_gather_object(heard, said, group=mesh.get_group(dim))
        said = next((text for text in heard if text is not None), None)
    if error is not None:
        raise error
    if said is not None:
        raise RuntimeError(f"the adapter was not saved, since another rank could not go on: {said}")
