"""``lora_linear`` on weights that are sharded over ranks (DTensor).

Two plans keep the fused product, each rank running it on its own shard; [M, K], [N, K], [R, K], [N, R], [N] -> [M, N]:

    columns   x, a whole; w, b, bias sharded on N      y is sharded on N
    rows      x, w, a sharded on K; b, bias whole      y is a partial sum

Any other sharding takes the formula in DTensor's own operators: right, not fused, and its reason is logged once.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.request import Product
from . import autograd

_PLAIN = (Tensor, nn.Parameter)
_TENSORS = ("x", "w", "a", "b", "bias")
_log = logging.getLogger("fastlora")


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


def multiply(p: Any) -> Tensor:
    """y of a product of DTensors on one mesh: on every rank's shard where a plan allows, else the formula."""
    # On the way back this brings each gradient to the placement of its tensor: partial sums are reduced.
    p = p._replace(**{name: t.redistribute(placements=t.placements) for name, t in _parameters(p).items()})
    placements = {name: t.placements for name, t in {"x": p.x, **_parameters(p)}.items()}
    if p.x.device_mesh.ndim == 1:
        last = p.x.dim() - 1
        if _is(placements, p, x=None, w=0, a=None, b=0, bias=0):
            return _by_columns(p)
        if _is(placements, p, x=last, w=1, a=1, b=None, bias=None):
            return _by_rows(p)
    _say_once(
        "lora_linear runs in plain DTensor operators, not fused: x, weight, lora_a, lora_b, bias are placed "
        f"{', '.join(str(placements.get(name)) for name in _TENSORS)} over {p.x.device_mesh.ndim} mesh dimension(s), "
        "neither by columns nor by rows; fastlora.parallel.ColwiseParallel and RowwiseParallel place a LoRALinear so "
        "that its product is fused"
    )
    return _formula(p)


def _parameters(p: Any) -> dict[str, Any]:
    """The operands that a layer holds."""
    return {name: t for name in _TENSORS[1:] if (t := getattr(p, name)) is not None}


def _is(placements: dict[str, Any], p: Any, **plan: int | None) -> bool:
    """Whether operands on a mesh of one dimension are sharded on the dimensions of the plan; None: whole."""

    def matches(name: str, dim: int | None) -> bool:
        placement = placements[name][0]
        if dim is None:
            return bool(placement.is_replicate())
        return type(placement).__name__ == "Shard" and placement.dim % getattr(p, name).dim() == dim

    return all(matches(name, dim) for name, dim in plan.items() if name in placements)


def _by_columns(p: Any) -> Tensor:
    from torch.distributed.tensor import Partial, Shard

    # Every rank sees all of x and a but its own columns of dy alone: its dx and da are partial sums.
    shard = _shard_of(p, x=Partial(), w=Shard(0), a=Partial(), b=Shard(0), bias=Shard(0))
    return _from_local(autograd.multiply(shard), p, Shard(p.x.dim() - 1))


def _by_rows(p: Any) -> Tensor:
    from torch.distributed.tensor import Partial, Shard

    # Every rank sees all of dy: what it makes of it is whole, but db, made of its partial z, is a partial sum.
    shard = _shard_of(p, x=Shard(p.x.dim() - 1), w=Shard(1), a=Shard(1), b=Partial(), bias=Partial())
    if shard.seed is not None:
        # Ranks that draw alike must still drop differently: their columns of x are not each other's.
        shard = shard._replace(seed=torch.stack((p.seed[0], p.seed[1] + p.x.device_mesh.get_local_rank())))
    if shard.bias is not None:
        # A share on every rank, so that the sum over ranks holds it once.
        shard = shard._replace(bias=shard.bias / p.x.device_mesh.size())
    # Changes nothing forward, and makes dy whole on the way back whatever the consumer did with the partial sum.
    result: Any = _from_local(autograd.multiply(shard), p, Partial())
    whole: Tensor = result.redistribute(placements=[Partial()])
    return whole


def _shard_of(p: Product, **gradients: Any) -> Product:
    """This rank's shard of every operand, each with the placement of its gradient."""
    operands: dict[str, Any] = {name: getattr(p, name) for name in gradients}
    return p._replace(
        **{name: t.to_local(grad_placements=[gradients[name]]) for name, t in operands.items() if t is not None}
    )


def _from_local(y: Tensor, p: Any, placement: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    # Shape and strides are said, not guessed from the shard: shards may differ in size.
    shape = torch.Size((*p.x.shape[:-1], p.w.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    result: Tensor = DTensor.from_local(y, p.x.device_mesh, [placement], run_check=False, shape=shape, stride=stride)
    return result


def _formula(p: Any) -> Tensor:
    x = p.x
    if x.dim() == 1:  # DTensor's own linear takes no single row
        return _formula(p._replace(x=x.unsqueeze(0))).squeeze(0)
    dropped = x
    if (dropout := p.mask_x) is not None:
        from torch.distributed.tensor import DTensor, Replicate

        # The mask of the whole x, made on every rank from the seed, and of it the part that lies here.
        if any(each.is_partial() for each in x.placements):
            x = x.redistribute(placements=[Replicate() if each.is_partial() else each for each in x.placements])
        mask = dropout.keep(x.numel() // max(x.shape[-1], 1), x.shape[-1]).view(x.shape).to(x.dtype)
        whole: Any = DTensor.from_local(mask, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)
        dropped = x * whole.redistribute(placements=x.placements) * dropout.rescale
    z = p.scale * F.linear(dropped, p.a.to(x.dtype))
    return F.linear(x, p.w, p.bias) + F.linear(z, p.b.to(x.dtype))


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning(reason)
