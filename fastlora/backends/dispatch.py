"""Checks a call once, asks each backend whether it refuses, picks one, and can explain the choice.

A backend is a module with the two verbs and ``refuses(request) -> str | None``. ``auto`` takes the first backend of
``AUTO`` that neither refuses nor is unproven on the device; ``FASTLORA_BACKEND`` forces one, and then a refusal is an
error.
"""

from __future__ import annotations

import functools
import importlib
import numbers
import os
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..ops import dtensor
from .request import Request

BACKENDS = ("reference", "library", "triton", "cuda")
AUTO = ("cuda", "triton", "library")

# Backends proven and measured to win on a compute capability; each entry has its line in benchmarks/HARDWARE.md.
PROVEN: dict[str, frozenset[tuple[int, int]]] = {"triton": frozenset(), "cuda": frozenset()}

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Verdict(NamedTuple):
    """One backend's answer to a request: it runs, or the reason why not."""

    backend: str
    reason: str | None


class Explanation(NamedTuple):
    """What would run for a request, and what each backend answered."""

    request: Request
    chosen: str | None
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        r = self.request
        lines = [
            f"{r.verb} on {r.device}: M={r.m} K={r.k} N={r.n} R={r.r} {_name(r.dtype)}, "
            f"adapters {_name(r.adapter_dtype)}, {'with' if r.dropout else 'no'} dropout -> {self.chosen or 'nothing'}"
        ]
        lines += [f"  {v.backend:<10} {'can run' if v.reason is None else v.reason}" for v in self.verdicts]
        return "\n".join(lines)


def backend_for(request: Request) -> Any:
    """The module that runs this request.

    Raises:
        RuntimeError: ``FASTLORA_BACKEND`` names an unknown backend, or one that refuses.
    """
    return _choose(request, os.environ.get("FASTLORA_BACKEND", "auto"))


@functools.lru_cache(maxsize=4096)
def _choose(request: Request, forced: str) -> Any:
    explanation = _explain(request, forced)
    if explanation.chosen is None:
        raise RuntimeError(f"FASTLORA_BACKEND={forced} cannot run this call\n{explanation}")
    return _module(explanation.chosen)


def _explain(request: Request, forced: str) -> Explanation:
    if forced not in (*BACKENDS, "auto"):
        raise RuntimeError(f"FASTLORA_BACKEND={forced!r} is unknown: expected auto, {', '.join(BACKENDS)}")
    if 0 in (request.m, request.k, request.n):
        # Nothing to multiply, so nothing to force: an empty batch must not break a training loop.
        forced = "library"
    verdicts = tuple(Verdict(name, _module(name).refuses(request)) for name in BACKENDS)
    refusal = dict(verdicts)
    if forced != "auto":
        return Explanation(request, forced if refusal[forced] is None else None, verdicts)
    refusal |= {name: refusal[name] or unproven(name, request.device) for name in AUTO}
    chosen = next(name for name in AUTO if refusal[name] is None)
    return Explanation(request, chosen, tuple(Verdict(*item) for item in refusal.items()))


def unproven(backend: str, device: torch.device) -> str | None:
    """Why ``auto`` passes over a backend that could run here: no hardware line for this GPU. None where proven."""
    if backend not in PROVEN:
        return None
    if device.type != "cuda":
        return f"can run without a GPU, but auto keeps it for GPUs; FASTLORA_BACKEND={backend} forces it"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in PROVEN[backend]:
        return None
    return (
        f"can run, but auto passes it over: not yet proven on sm_{major}{minor} (benchmarks/HARDWARE.md); "
        f"FASTLORA_BACKEND={backend} forces it"
    )


def explain(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Explanation:
    """What :func:`fastlora.lora_linear` would run for the same arguments, and why each other backend would not.

    Returns:
        An :class:`Explanation`; ``print`` it, or read ``chosen`` and ``verdicts``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``lora_linear`` does.
    """
    check(x, weight, lora_a, lora_b, scale, bias, dropout_p)
    if dtensor.is_sharded(x):
        raise RuntimeError(
            "x is a DTensor: explain looks at one rank's share, so pass the to_local() of every argument"
        )
    x, weight, lora_a, lora_b, bias = autocast(x, weight, lora_a, lora_b, bias)
    check_dtypes(x, weight, lora_a, lora_b, bias)
    request = Request.of_lora_matmul(rows_of(x), weight, lora_a, lora_b, training and dropout_p > 0)
    return _explain(request, os.environ.get("FASTLORA_BACKEND", "auto"))


def rows_of(x: Tensor) -> Tensor:
    """All leading dimensions as one: [..., C] -> [M, C], a view wherever the strides allow."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def check(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, bias: Tensor | None, dropout_p: float
) -> None:
    """Raises for arguments that :func:`fastlora.lora_linear` cannot take; says nothing otherwise.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: ``dropout_p`` is outside [0, 1).
        RuntimeError: shapes, dtypes or devices do not fit together, or some arguments are DTensors and others not.
    """
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    dtensor.check_together(tensors)
    if isinstance(scale, bool) or not isinstance(scale, (float, numbers.Real)):
        raise TypeError(f"scale must be a float, got {type(scale).__name__}: for a tensor pass scale.item()")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (float, numbers.Real)):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")

    for name in ("weight", "lora_a", "lora_b"):
        if tensors[name].dim() != 2:
            _wrong_shape(name, tensors[name], "two dimensions", tensors)
    n, k = weight.shape
    r = lora_a.shape[0]
    if x.dim() < 1 or x.shape[-1] != k:
        _wrong_shape("x", x, f"[..., {k}], the in_features of weight [out_features, in_features]", tensors)
    if r < 1 or lora_a.shape[1] != k:
        _wrong_shape("lora_a", lora_a, f"[rank >= 1, {k}], the in_features of weight", tensors)
    if tuple(lora_b.shape) != (n, r):
        _wrong_shape("lora_b", lora_b, f"[{n}, {r}], the out_features of weight and the rank of lora_a", tensors)
    if bias is not None and tuple(bias.shape) != (n,):
        _wrong_shape("bias", bias, f"[{n}], the out_features of weight", tensors)

    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise RuntimeError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
    if x.device.type == "meta":
        raise RuntimeError("x is on the meta device, which holds no data: create the inputs on a real device")


def autocast(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The operands as ``torch.autocast`` has them: the base in its dtype, float32 adapters as they are."""
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type) or not _castable(x):
        return x, weight, lora_a, lora_b, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if _castable(t) else t

    lora_a = lora_a if lora_a.dtype is torch.float32 else cast(lora_a)
    lora_b = lora_b if lora_b.dtype is torch.float32 else cast(lora_b)
    return cast(x), cast(weight), lora_a, lora_b, None if bias is None else cast(bias)


def _castable(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype is not torch.float64


def check_dtypes(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> None:
    """Raises for dtypes that do not fit together; runs after autocast has had its say.

    Raises:
        RuntimeError: x is no supported floating type, the base differs from it, or an adapter is neither its type nor
            float32.
    """
    if x.dtype not in _DTYPES:
        raise RuntimeError(f"x is {_name(x.dtype)}: expected one of {', '.join(map(_name, _DTYPES))}")
    if weight.dtype != x.dtype:
        raise RuntimeError(
            f"weight is {_name(weight.dtype)} and x {_name(x.dtype)}: cast one of them, or use torch.autocast"
        )
    if bias is not None and bias.dtype != x.dtype:
        raise RuntimeError(f"bias is {_name(bias.dtype)} and x {_name(x.dtype)}: cast bias to the dtype of x")
    if lora_a.dtype != lora_b.dtype:
        raise RuntimeError(f"lora_a is {_name(lora_a.dtype)} and lora_b {_name(lora_b.dtype)}: expected one dtype")
    if lora_a.dtype != x.dtype and (lora_a.dtype is not torch.float32 or x.dtype is torch.float64):
        raise RuntimeError(
            f"lora_a and lora_b are {_name(lora_a.dtype)} and x {_name(x.dtype)}: adapters are the dtype of x, or "
            "float32 on a bfloat16 or float16 base"
        )


def _wrong_shape(name: str, tensor: Tensor, expected: str, tensors: dict[str, Tensor]) -> NoReturn:
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items())
    if hasattr(tensor, "ds_id") or hasattr(tensor, "_fsdp_flattened"):
        expected += (
            ". This is what one rank keeps of it under FSDP1 or DeepSpeed ZeRO-3: it is whole only inside the forward "
            "of the wrapped module, so call that one"
        )
    raise RuntimeError(f"{name} has shape {list(tensor.shape)}: expected {expected} (got {shapes})")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _module(backend: str) -> Any:
    return importlib.import_module(f".{backend}", __package__)
