"""Tensor-parallel styles that shard a layer together with its adapters, and every other module as torch's do.

The layers are ``LoRALinear``, those of :func:`fastlora.inject`, and ``Linear`` and ``MergedLinear`` of
``fastlora.loralib``.

    ColwiseParallel   weight, bias, lora_B sharded on N; lora_A whole       x whole -> y sharded on N
    RowwiseParallel   weight, lora_A sharded on K; lora_B, bias whole       x sharded on K -> y whole

:mod:`fastlora.ops.dtensor` runs both fused, one shard per rank; by columns, a ``MergedLinear`` is not fused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel

from .mergeable import Mergeable
from .module import LoRALinear
from .quantised import is_quantised

__all__ = ["ColwiseParallel", "RowwiseParallel"]

# The tensors that share a dimension of the weight [N, K]: N is dimension 0 of each, K dimension 1.
_WITH = {0: ("weight", "lora_B", "lora_bias", "bias"), 1: ("weight", "lora_A")}


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """``ColwiseParallel`` of :mod:`torch.distributed.tensor.parallel`, for layers with adapters too.

    Args:
        input_layouts: placement of the input, whole by default.
        output_layouts: placement of the output, sharded on the last dimension by default.
        use_local_output: True (default) for a plain tensor as output.

    Raises:
        RuntimeError: the layer is merged or has DoRA, or its base is quantised.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not _is_linear_with_adapters(module):
            return super()._apply(module, device_mesh)
        return _sharded(self, module, device_mesh, dim=0)


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """``RowwiseParallel`` of :mod:`torch.distributed.tensor.parallel`, for layers with adapters too.

    Args:
        input_layouts: placement of the input, sharded on the last dimension by default.
        output_layouts: placement of the output, whole by default.
        use_local_output: True (default) for a plain tensor as output.

    Raises:
        RuntimeError: the layer is merged or has DoRA, or its base is quantised.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not _is_linear_with_adapters(module):
            return super()._apply(module, device_mesh)
        self.desired_input_layouts = (Shard(-1),)
        return _sharded(self, module, device_mesh, dim=1)


def _is_linear_with_adapters(module: nn.Module) -> bool:
    return isinstance(module, Mergeable) and isinstance(module, (LoRALinear, nn.Linear)) and hasattr(module, "lora_A")


def _sharded(style: Any, layer: Any, mesh: DeviceMesh, dim: int) -> nn.Module:
    """Shards the weight [N, K] on ``dim``, and with it the tensors that have this dimension; the others stay whole."""
    if layer.merged:
        raise RuntimeError(f"the {type(layer).__name__} is merged: unmerge it before it is sharded")
    if layer._has_dora:
        raise RuntimeError(f"the {type(layer).__name__} has use_dora: the norms of DoRA are of whole rows on one rank")
    if is_quantised(layer._holder):
        raise RuntimeError(f"the base of the {type(layer).__name__} is quantised: packed weights cannot be sharded")

    def placement(name: str) -> Placement:
        if name not in _WITH[dim]:
            return Replicate()
        return Shard(1 - dim) if name == "weight" and layer.fan_in_fan_out else Shard(dim)

    def partition(inside: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            placements = [placement(inside or name)]  # injected adapters are inside, in lora_A and lora_B
            placed = distribute_tensor(parameter, mesh, placements, src_data_rank=style.src_data_rank)
            module.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))

    return distribute_module(
        layer,
        mesh,
        partition,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )
