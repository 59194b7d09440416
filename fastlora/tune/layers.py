"""The LoRA layers that matter to a user: those of a model, or those that a model of a config.json would have."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.config import AdapterConfig
from ..adapters.layer import AdaptedLinear, features, parts_of
from ..adapters.matching import ALL_LINEAR
from ..adapters.plan import plan
from ..described import read_described
from ..dtypes import FLOATING, HALF
from ..loralib import Linear, MergedLinear
from ..mergeable import Mergeable
from ..module import LoRALinear
from ..quantised import dense_dtype, is_quantised, quantised_as
from ..text import dtype_name

_SHAPE = "the layers themselves, with --layer K N"
_DORA = "it has use_dora"
_MERGED = "the adapter is merged into the base weight: unmerge it, in fastlora.loralib with train()"


class Layer(NamedTuple):
    """One kind of LoRA layer: what a kernel is chosen by, but for the number of tokens.

    Attributes:
        k: width of the input.
        n: width of the output.
        r: rank of the one product that is run.
        dtype: of input, base and output.
        adapter_dtype: of A and B.
        dropout: True where training drops elements of the adapter's input.
        bias: True where the base has a bias.
    """

    k: int
    n: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool
    bias: bool

    def __str__(self) -> str:
        text = f"{self.k} -> {self.n} R={self.r} {dtype_name(self.dtype)}"
        if self.adapter_dtype is not self.dtype:
            text += f", {dtype_name(self.adapter_dtype)} adapters"
        return text + (", dropout" if self.dropout else "") + (", bias" if self.bias else "")


def of_model(model: nn.Module, dtype: torch.dtype | None = None) -> list[Layer]:
    """Lists the LoRA layers of a model that run on :func:`fastlora.lora_linear`, each kind once, as they come.

    They are ``LoRALinear``, layers that ``fastlora.inject`` adapted, ``Linear`` and ``MergedLinear`` of
    ``fastlora.loralib``, and PEFT's LoRA layers that ``patch_peft`` has patched or would.

    A layer counts with its active adapter, switched off or not, and not at all where that has no part in it; while an
    injected model has none active, each of its adapters counts. Several active adapters of PEFT are one product of the
    summed rank, as they run where none drops. Left out is what runs no such product: merged layers, embeddings,
    convolutions, DoRA, quantised bases.

    Args:
        model: any module, in any mode; wrappers such as DDP and torch.compile's are looked through. Widths are those of
            the whole layer, not of a tensor-parallel rank's share.
        dtype: dtype of autocast, where the model will run in it: bases and adapters count as cast, float32 adapters
            and float64 layers stay.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: it has no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[Layer, None] = {}
    left_out: Counter[str] = Counter()
    for module in model.modules():
        for layer in _layers(module):
            fit = layer if isinstance(layer, str) else _cast(layer, dtype)
            if isinstance(fit, str):
                left_out[fit] += 1
            else:
                found[fit] = None
    if not found:
        why = "; ".join(f"{count} × {reason}" for reason, count in left_out.most_common())
        raise ValueError(
            f"model has no LoRA layer that runs on fastlora{f' ({why})' if why else ''}: give it adapters first, with "
            "peft.get_peft_model or fastlora.inject, and pass the model that has them"
        )
    return list(found)


def _layers(module: nn.Module) -> Iterator[Layer | str]:
    """Yields what a module counts as, one of each product that it may run, or the reason why it runs none."""
    lora: Any = sys.modules.get("peft.tuners.lora")  # where nobody has imported it, no layer is PEFT's
    if lora is not None and isinstance(module, lora.LoraLayer):
        yield _of_peft(module)
    elif isinstance(module, LoRALinear):
        yield (
            _DORA if module.use_dora else _layer(module, module.out_features, [module.lora_A], module.lora_dropout > 0)
        )
    elif isinstance(module, AdaptedLinear):
        active = module.active_adapter
        for name, a in module.lora_A.items():
            if "lora_magnitude" in parts_of(module, name):
                yield _DORA
            elif active is None or name == active:
                yield _layer(module, module.lora_B[name].shape[0], [a], module.lora_dropout[name] > 0)
    elif isinstance(module, (Linear, MergedLinear)) and "lora_A" in module._parameters:
        yield _layer(module, module.out_features, [module.lora_A], _drops(module.lora_dropout))


def _of_peft(layer: Any) -> Layer | str:
    from ..peft.layer import Fused
    from ..peft.patch import kinds, refusal
    from ..peft.reasons import NO_ADAPTER, variant

    if not isinstance(layer, Fused) and (reason := refusal(layer)) is not None:
        return reason
    if layer.merged:
        return _MERGED
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return NO_ADAPTER
    for name in names:
        if name in layer.lora_variant:
            return variant(layer, name)
    # Active ones that drop have a mask each, and PEFT runs those itself: what is ours is one product without dropout.
    drops = len(names) == 1 and _drops(layer.lora_dropout[names[0]])
    base = layer.base_layer
    found = _layer(base, layer.out_features, [layer.lora_A[name].weight for name in names], drops)
    if isinstance(found, str):
        return found
    kind = type(layer) if isinstance(layer, Fused) else kinds()[type(layer)][0]
    biased = any(layer.lora_B[name].bias is not None for name in names)
    return found._replace(dtype=kind.base_dtype(base), bias=found.bias or biased)


def _drops(dropout: object) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.p > 0


def _layer(base: Any, n: int, downs: list[Tensor], dropout: bool) -> Layer | str:
    """Makes the layer of a base [N, K] and the A [R, K] of the adapters that run as one."""
    if isinstance(base, Mergeable) and base.merged:
        return _MERGED
    holder = base._holder if isinstance(base, Mergeable) else base
    if is_quantised(holder) and quantised_as(holder) == "int8":
        return "the product with an 8-bit base is bitsandbytes' own"
    first = downs[0]
    if any(a.dim() != 2 or 0 in a.shape for a in downs):
        return "the adapter is one rank's share: pass the model before FSDP1 or DeepSpeed ZeRO-3 wraps it"
    if any(a.dtype is not first.dtype for a in downs):
        return "the active adapters differ in dtype"
    r = sum(a.shape[0] for a in downs)
    dtype = dense_dtype(holder) if is_quantised(holder) else base.weight.dtype
    return Layer(first.shape[1], n, r, dtype, first.dtype, dropout, holder.bias is not None)


def _cast(layer: Layer, dtype: torch.dtype | None) -> Layer | str:
    """Casts a layer as autocast in this dtype does, and gives the reason where its dtypes do not fit together."""
    if dtype is not None and layer.dtype in (*HALF, torch.float32):
        wide = layer.adapter_dtype is torch.float32
        layer = layer._replace(dtype=dtype, adapter_dtype=torch.float32 if wide else dtype)
    base, adapter = layer.dtype, layer.adapter_dtype
    if base in FLOATING and (adapter is base or (adapter is torch.float32 and base in HALF)):
        return layer
    return f"the adapter is {dtype_name(adapter)} on a {dtype_name(base)} base"


def of_config(
    path: str | Path, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool = False
) -> list[Layer]:
    """Lists the LoRA layers that a model of transformers would have, each kind once, as they come.

    They are those that ``fastlora.inject`` adapts with ``"all-linear"``: every linear layer but the head. The model is
    built on the meta device: nothing is downloaded and no weight takes memory. Code and quantisation that the file
    names are not looked at.

    Args:
        path: a ``config.json``, or the folder that holds one.
        r: rank of every layer.
        dtype: dtype of the base.
        adapter_dtype: dtype of A and B.
        dropout: True for adapters with dropout.

    Raises:
        ValueError: r is below 1; there is no such file; it describes no model with linear layers that the installed
            transformers builds; or transformers is missing.
    """
    options = AdapterConfig(ALL_LINEAR, r)
    described = read_described(path, f", or give {_SHAPE}")
    import transformers

    try:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(
                described.config(), attn_implementation="eager", trust_remote_code=False
            )
        planned = plan(model, options, "default")
    except Exception as error:  # a value of the file may break anything in there
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"transformers {transformers.__version__} builds no {described.model_type} with linear layers from "
            f"{described.file} ({why}): mend the file, or give {_SHAPE}"
        ) from error
    layers = (
        Layer(*features(layer.module), r, dtype, adapter_dtype, dropout, layer.module.bias is not None)
        for layer in planned.layers
    )
    return list(dict.fromkeys(layers))
