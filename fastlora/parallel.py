"""Tensor-parallel styles that shard a layer together with its adapters; torch's own for every other module.

The layers are ``LoRALinear``, what :func:`fastlora.inject` makes, and ``fastlora.loralib.Linear``.

    ColwiseParallel   weight, bias, lora_B sharded on N; lora_A whole       x whole -> y sharded on N
    RowwiseParallel   weight, lora_A sharded on K; lora_B, bias whole       x sharded on K -> y whole

Both are what :mod:`fastlora.ops.dtensor` runs fused, a shard a rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel

from .adapters.layer import AdaptedConv1D, AdaptedLinear
from .loralib import Linear
from .module import LoRALinear

__all__ = ["ColwiseParallel", "RowwiseParallel"]

_LAYERS = (LoRALinear, AdaptedLinear, Linear)


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """:class:`torch.distributed.tensor.parallel.ColwiseParallel`, its arguments and all, for layers with adapters too.

    Args:
        input_layouts: placement of the input, whole by default.
        output_layouts: placement of the output, sharded on the last dimension by default.
        use_local_output: whether the output is a plain tensor, True by default.

    Raises:
        RuntimeError: the layer is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, _LAYERS) or not hasattr(module, "lora_A"):
            return super()._apply(module, device_mesh)
        plan = {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
        return _sharded(self, module, device_mesh, plan)


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """:class:`torch.distributed.tensor.parallel.RowwiseParallel`, its arguments and all, for layers with adapters too.

    Args:
        input_layouts: placement of the input, sharded on the last dimension by default.
        output_layouts: placement of the output, whole by default.
        use_local_output: whether the output is a plain tensor, True by default.

    Raises:
        RuntimeError: the layer is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, _LAYERS) or not hasattr(module, "lora_A"):
            return super()._apply(module, device_mesh)
        self.desired_input_layouts = (Shard(-1),)
        plan = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}
        return _sharded(self, module, device_mesh, plan)


def _sharded(
    style: Any, layer: LoRALinear | AdaptedLinear | Linear, mesh: DeviceMesh, plan: dict[str, Any]
) -> nn.Module:
    if layer.merged:
        raise RuntimeError(f"the {type(layer).__name__} is merged: unmerge it before it is sharded")
    if isinstance(layer, AdaptedConv1D) or getattr(layer, "fan_in_fan_out", False):  # stored [K, N]
        plan["weight"] = Shard(1 - plan["weight"].dim)

    def partition(inside: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = plan[inside or name]  # injected adapters are inside, in lora_A and lora_B by their names
            placed = distribute_tensor(parameter, mesh, [placement], src_data_rank=style.src_data_rank)
            module.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))

    return distribute_module(
        layer,
        mesh,
        partition,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )
