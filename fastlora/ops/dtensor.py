"""``lora_linear`` on weights that are sharded over ranks (DTensor), and what a sharded weight cannot do.

Two plans keep the fused product, each rank running it on its own shard; [M, K], [N, K], [R, K], [N, R], [N] -> [M, N]:

    columns   x, a whole; w, b, bias sharded on N      y is sharded on N
    rows      x, w, a sharded on K; b, bias whole      y is a partial sum

Any other sharding takes the formula in DTensor's own operators: right, not fused, and its reason is logged once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..backends.dropout import Dropout

_PLAIN = (Tensor, nn.Parameter)
_log = logging.getLogger("fastlora")

Product = Callable[
    [Tensor, Tensor, Tensor, Tensor, "Tensor | None", float, float, "Tensor | None"],
    Tensor,
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; nothing of ``torch.distributed`` is imported to say that a plain one is not."""
    if type(tensor) in _PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def check_together(tensors: dict[str, Tensor]) -> None:
    """Raises where some operands of one call are DTensors and others plain, or on another mesh.

    Raises:
        RuntimeError: names one of each kind and the remedy.
    """
    sharded: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
    if not sharded:
        return
    plain = [name for name in tensors if name not in sharded]
    first = next(iter(sharded))
    if plain:
        raise RuntimeError(
            f"{first} is a DTensor and {plain[0]} a plain tensor: expected all or none. Under FSDP2 call the module "
            "that fully_shard wrapped, whose forward gathers its weights; under tensor parallelism shard weight and "
            "adapters together, with fastlora.parallel.ColwiseParallel or RowwiseParallel"
        )
    mesh = sharded[first].device_mesh
    for name, tensor in sharded.items():
        if tensor.device_mesh != mesh:
            raise RuntimeError(
                f"{name} is on the device mesh {tensor.device_mesh} and {first} on {mesh}: expected one. Under FSDP2 "
                "with tensor parallelism call the module that fully_shard wrapped, whose forward gathers its weights"
            )


def why_not_mergeable(layer: nn.Module, name: str = "weight") -> str | None:
    """Why a sum cannot be stored in a parameter of ``layer``, with the remedy; None where it can.

    Such a layer would change an object that its owner does not read, and go on without the update, silently.
    """
    weight: Any = getattr(layer, name)
    if is_parametrized(layer, name):
        return f"{name} is parametrised: call torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first"
    owner = None
    if getattr(layer, "_is_fsdp_managed_module", False):  # FSDP's own mark, 1 and 2, gathered or not
        owner = "FSDP, which keeps the weights itself"
    elif is_sharded(weight):
        owner = "a device mesh: it is a DTensor"
    elif hasattr(weight, "ds_id"):
        owner = "DeepSpeed ZeRO-3"
    if owner is None:
        return None
    return f"{name} belongs to {owner}: gather the state dict, load it into an unsharded model and merge there"


def lora_linear(
    product: Product,
    x: Any,
    w: Any,
    a: Any,
    b: Any,
    bias: Any | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The layer on DTensors of one mesh: ``product`` on every rank's shard where a plan allows, else the formula."""
    # On the way back this brings each gradient to the placement of its tensor: partial sums are reduced.
    w, a, b, bias = (None if t is None else t.redistribute(placements=t.placements) for t in (w, a, b, bias))
    placements = tuple(None if t is None else t.placements for t in (x, w, a, b, bias))
    if x.device_mesh.ndim == 1:
        if _is(placements, (None, 0, None, 0, 0), x.dim()):
            return _by_columns(product, x, w, a, b, bias, scale, dropout_p, seed)
        if _is(placements, (x.dim() - 1, 1, 1, None, None), x.dim()):
            return _by_rows(product, x, w, a, b, bias, scale, dropout_p, seed)
    _say_once(
        "lora_linear runs in plain DTensor operators, not fused: x, weight, lora_a, lora_b, bias are placed "
        f"{', '.join(map(str, placements))} over {x.device_mesh.ndim} mesh dimension(s), neither by columns nor by "
        "rows; fastlora.parallel.ColwiseParallel and RowwiseParallel place a LoRALinear so that its product is fused"
    )
    return _formula(x, w, a, b, bias, scale, dropout_p, seed)


def _is(placements: tuple[Any, ...], plan: tuple[int | None, ...], x_dim: int) -> bool:
    """Whether tensors on a mesh of one dimension are sharded on the dimensions of the plan; None: whole."""

    def matches(placement: Any, dim: int | None, ndim: int) -> bool:
        if dim is None:
            return bool(placement.is_replicate())
        return type(placement).__name__ == "Shard" and placement.dim % ndim == dim

    return all(
        found is None or matches(found[0], dim, ndim)
        for found, dim, ndim in zip(placements, plan, (x_dim, 2, 2, 2, 1), strict=True)
    )


def _by_columns(
    product: Product,
    x: Any,
    w: Any,
    a: Any,
    b: Any,
    bias: Any | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    from torch.distributed.tensor import Partial, Shard

    # Every rank sees all of x and a but its own columns of dy alone: its dx and da are partial sums.
    y = product(
        x.to_local(grad_placements=[Partial()]),
        w.to_local(grad_placements=[Shard(0)]),
        a.to_local(grad_placements=[Partial()]),
        b.to_local(grad_placements=[Shard(0)]),
        None if bias is None else bias.to_local(grad_placements=[Shard(0)]),
        scale,
        dropout_p,
        seed,
    )
    return _from_local(y, x, w, Shard(x.dim() - 1))


def _by_rows(
    product: Product,
    x: Any,
    w: Any,
    a: Any,
    b: Any,
    bias: Any | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    from torch.distributed.tensor import Partial, Shard

    mesh = x.device_mesh
    if seed is not None:
        # Ranks that draw alike must still drop differently: their columns of x are not each other's.
        seed = torch.stack((seed[0], seed[1] + mesh.get_local_rank()))
    if bias is not None:
        # A share on every rank, so that the sum over ranks holds it once.
        bias = bias.to_local(grad_placements=[Partial()]) / mesh.size()
    # Every rank sees all of dy: what it makes of it is whole, but db, made of its partial z, is a partial sum.
    y = product(
        x.to_local(grad_placements=[Shard(x.dim() - 1)]),
        w.to_local(grad_placements=[Shard(1)]),
        a.to_local(grad_placements=[Shard(1)]),
        b.to_local(grad_placements=[Partial()]),
        bias,
        scale,
        dropout_p,
        seed,
    )
    # Changes nothing forward, and makes dy whole on the way back whatever the consumer did with the partial sum.
    result: Any = _from_local(y, x, w, Partial())
    whole: Tensor = result.redistribute(placements=[Partial()])
    return whole


def _from_local(y: Tensor, x: Any, w: Any, placement: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    # Shape and strides are said, not guessed from the shard: shards may differ in size.
    shape = torch.Size((*x.shape[:-1], w.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    result: Tensor = DTensor.from_local(y, x.device_mesh, [placement], run_check=False, shape=shape, stride=stride)
    return result


def _formula(
    x: Any, w: Any, a: Any, b: Any, bias: Any | None, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    if x.dim() == 1:  # DTensor's own linear takes no single row
        return _formula(x.unsqueeze(0), w, a, b, bias, scale, dropout_p, seed).squeeze(0)
    dropped = x
    if seed is not None:
        from torch.distributed.tensor import DTensor, Replicate

        # The mask of the whole x, made on every rank from the seed, and of it the part that lies here.
        if any(placement.is_partial() for placement in x.placements):
            x = x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])
        dropout = Dropout(dropout_p, seed)
        mask = dropout.keep(x.numel() // max(x.shape[-1], 1), x.shape[-1]).view(x.shape).to(x.dtype)
        whole: Any = DTensor.from_local(mask, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)
        dropped = x * whole.redistribute(placements=x.placements) * dropout.rescale
    z = scale * F.linear(dropped, a.to(x.dtype))
    return F.linear(x, w, bias) + F.linear(z, b.to(x.dtype))


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning(reason)
