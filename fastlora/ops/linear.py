"""``lora_linear``: the border of the package, where arguments are checked and autocast has its say."""

from __future__ import annotations

import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..backends import dispatch
from ..backends.dispatch import Explanation
from ..backends.dropout import draw_seed
from ..backends.request import Product
from ..dtypes import FLOATING
from ..eager import is_eager
from ..text import dtype_name
from . import autograd, base, dtensor, plain, small
from .base import StoredWeight


def lora_linear(
    x: Tensor,
    weight: Tensor | StoredWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """A linear layer with a low-rank update: ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias``.

    D is dropout on the adapter's input alone, recomputed in the backward and not stored. x and the rank-R middle are
    all that is kept for backward, but of few tokens on a CPU (README, "Limits"). Gradients flow to every argument that
    asks for one, ``weight`` and ``bias`` included.

    Args:
        x: input [..., K], bfloat16, float16, float32 or float64. On DTensors see :mod:`fastlora.ops.dtensor`.
        weight: base weight [N, K], as ``nn.Linear`` stores it, in the dtype of x; or a :class:`StoredWeight`, which is
            made dense for each use of it, in the dtype that it says.
        lora_a: down projection [R, K], in the dtype of x, or float32 on a half-precision base.
        lora_b: up projection [N, R], in the dtype of ``lora_a``.
        scale: factor on the update, lora_alpha / r (or lora_alpha / sqrt(r) for rsLoRA).
        bias: base bias [N] or None.
        dropout_p: probability of dropping an element of x on its way into ``lora_a``, 0 <= p < 1, realised to 1/65536.
        training: False switches dropout off.

    Returns:
        y [..., N] in the dtype of x (of autocast where that is on, but with a stored weight).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: ``dropout_p`` is outside [0, 1).
        RuntimeError: shapes, dtypes or devices do not fit together, or some arguments are DTensors and others not; or
            ``FASTLORA_BACKEND`` forces a kernel that refuses this call.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685, equation (3).
    """
    eager = is_eager()
    product = None
    if (
        eager
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and type(lora_a) in _PLAIN
        and type(lora_b) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
    ):
        y = small.multiply(Product(x, weight, lora_a, lora_b, scale, bias, dropout_p), training)  # type: ignore[arg-type]
        if y is not None:
            return y
        product = _known(x, weight, lora_a, lora_b, scale, bias, dropout_p)
    elif eager and isinstance(weight, StoredWeight):
        product = product_of(x, weight, lora_a, lora_b, scale, bias, dropout_p)
        if training and dropout_p > 0:
            product = product._replace(seed=draw_seed(product.x.device))
        return base.multiply(product, eager, x.dtype)
    elif not eager and plain.is_traced():
        return plain.multiply(Product(x, weight, lora_a, lora_b, scale, bias, dropout_p), training)  # type: ignore[arg-type]
    known = product is not None
    if product is None:
        product = _checked(x, weight, lora_a, lora_b, scale, bias, dropout_p)
    if training and dropout_p > 0:
        product = product._replace(seed=draw_seed(product.x.device))
    if not known:
        if isinstance(product.w, StoredWeight):
            return base.multiply(product, eager, x.dtype)
        if dtensor.is_sharded(product.x):
            return dtensor.multiply(product)
    return autograd.multiply(product, eager)


def explain(
    x: Tensor,
    weight: Tensor | StoredWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Explanation:
    """Tells which kernel :func:`fastlora.lora_linear` would run for the same arguments, and why no other.

    Returns:
        An :class:`Explanation`; ``print`` it, or read ``chosen``, ``tile`` and ``verdicts``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``lora_linear`` does.
    """
    product = _checked(x, weight, lora_a, lora_b, scale, bias, dropout_p)
    if dtensor.is_sharded(product.x):
        raise RuntimeError(
            "x is a DTensor: explain looks at one rank's share, so pass the to_local() of every argument"
        )
    seed = torch.zeros(2, dtype=torch.int64, device=x.device) if training and dropout_p > 0 else None
    dense = base.opened(product.w, product.x.dtype)
    return dispatch.explain(product._replace(x=autograd.rows_of(product.x), w=dense, seed=seed))


# Signatures of calls of plain tensors that have passed the checks.
_passed: set[tuple[object, ...]] = set()
_MOST_PASSED = 4096
_PLAIN = frozenset({Tensor, nn.Parameter})


def is_plain(x: Tensor, weight: Tensor | StoredWeight, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> bool:
    """Whether these are torch's own tensors, no subclass that would see what is done with them; or a stored weight."""
    plain = all(type(t) in _PLAIN for t in (x, lora_a, lora_b)) and (bias is None or type(bias) in _PLAIN)
    return plain and (type(weight) in _PLAIN or isinstance(weight, StoredWeight))


def product_of(
    x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, scale: float, bias: Tensor | None, dropout_p: float
) -> Product:
    """The call as a value, checked and cast as autocast asks; dropout is still without a seed.

    Eager calls of plain tensors are checked once for each of their signatures.
    """
    operands = (x, weight, lora_a, lora_b, scale, bias, dropout_p)
    known = None
    if is_eager() and is_plain(x, weight, lora_a, lora_b, bias):
        known = _known_stored(*operands) if isinstance(weight, StoredWeight) else _known(*operands)
    return known or _checked(*operands)


def _known_stored(
    x: Tensor, weight: StoredWeight, lora_a: Tensor, lora_b: Tensor, scale: float, bias: Tensor | None, dropout_p: float
) -> Product | None:
    """:func:`_known` of a call with a stored weight."""
    if type(scale) is not float or type(dropout_p) is not float or not 0 <= dropout_p < 1 or not x.is_floating_point():
        return None
    signature = (
        x.shape, x.dtype, x.device,
        type(weight), weight.shape, weight.device, weight.compute_dtype(x),
        lora_a.shape, lora_a.dtype, lora_a.device,
        lora_b.shape, lora_b.dtype, lora_b.device,
        None if bias is None else (bias.shape, bias.dtype, bias.device),
    )  # fmt: skip
    if signature not in _passed:
        _checked(x, weight, lora_a, lora_b, scale, bias, dropout_p)
        _remember(signature)
    return _for_stored(Product(x, weight, lora_a, lora_b, scale, bias, dropout_p), weight)  # type: ignore[arg-type]


def _remember(signature: tuple[object, ...]) -> None:
    if len(_passed) >= _MOST_PASSED:
        _passed.clear()
    _passed.add(signature)


def _known(
    x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, scale: float, bias: Tensor | None, dropout_p: float
) -> Product | None:
    """The call as a value where one of its signature has passed the checks before, else None."""
    if type(scale) is not float or type(dropout_p) is not float or not 0 <= dropout_p < 1:
        return None
    try:
        device_type = "cpu" if x.is_cpu else x.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        # Everything that the checks of plain tensors depend on.
        signature = (
            x.shape, x.dtype, x.device,
            weight.shape, weight.dtype, weight.device,
            lora_a.shape, lora_a.dtype, lora_a.device,
            lora_b.shape, lora_b.dtype, lora_b.device,
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            autocast,
        )  # fmt: skip
    except RuntimeError:  # of a tensor without a shape
        return None
    if signature not in _passed:
        _checked(x, weight, lora_a, lora_b, scale, bias, dropout_p)
        _remember(signature)
    product = Product(x, weight, lora_a, lora_b, scale, bias, dropout_p)
    return product if autocast is None else _autocast(product)


def _checked(
    x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, scale: float, bias: Tensor | None, dropout_p: float
) -> Product:
    """The call as a value, its arguments checked and cast as autocast asks; dropout is still without a seed."""
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    if bias is not None:
        tensors["bias"] = bias
    stored = isinstance(weight, StoredWeight)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (stored and tensor is weight):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    dtensor.check_together(tensors)
    if type(scale) is not float or type(dropout_p) is not float:
        scale, dropout_p = _as_float("scale", scale), _as_float("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    _check_shapes(tensors)
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise RuntimeError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
    if x.device.type == "meta":
        raise RuntimeError("x is on the meta device, which holds no data: create the inputs on a real device")
    product = Product(x, weight, lora_a, lora_b, scale, bias, dropout_p)
    if stored:
        product = _for_stored(product, weight)
    elif torch.is_autocast_enabled(x.device.type):
        product = _autocast(product)
    _check_dtypes(product, x.dtype)
    return product


def _as_float(name: str, number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        remedy = ": for a tensor pass scale.item()" if name == "scale" else ""
        raise TypeError(f"{name} must be a float, got {type(number).__name__}{remedy}")
    return float(number)


def _check_shapes(tensors: dict[str, Any]) -> None:
    x, weight, lora_a, lora_b = (tensors[name] for name in ("x", "weight", "lora_a", "lora_b"))
    bias = tensors.get("bias")
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.dim() != 2:
            _wrong_shape(name, "two dimensions", tensors)
    n, k = weight.shape
    r = lora_a.shape[0]
    if x.dim() < 1 or x.shape[-1] != k:
        _wrong_shape("x", f"[..., {k}], the in_features of weight [out_features, in_features]", tensors)
    if r < 1 or lora_a.shape[1] != k:
        _wrong_shape("lora_a", f"[rank >= 1, {k}], the in_features of weight", tensors)
    if lora_b.shape != (n, r):
        _wrong_shape("lora_b", f"[{n}, {r}], the out_features of weight and the rank of lora_a", tensors)
    if bias is not None and bias.shape != (n,):
        _wrong_shape("bias", f"[{n}], the out_features of weight", tensors)


def _wrong_shape(name: str, expected: str, tensors: dict[str, Any]) -> NoReturn:
    tensor = tensors[name]
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items())
    if hasattr(tensor, "ds_id") or hasattr(tensor, "_fsdp_flattened"):
        expected += (
            ". This is what one rank keeps of it under FSDP1 or DeepSpeed ZeRO-3: it is whole only inside the forward "
            "of the wrapped module, so call that one"
        )
    raise RuntimeError(f"{name} has shape {list(tensor.shape)}: expected {expected} (got {shapes})")


def _autocast(p: Product) -> Product:
    """The product as ``torch.autocast`` has it: the base in its dtype, float32 adapters as they are."""
    if not _castable(p.x):
        return p
    dtype = torch.get_autocast_dtype(p.x.device.type)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if _castable(t) else t

    a, b = (t if t.dtype is torch.float32 else cast(t) for t in (p.a, p.b))
    return p._replace(x=cast(p.x), w=cast(p.w), a=a, b=b, bias=None if p.bias is None else cast(p.bias))  # type: ignore[arg-type]


def _for_stored(p: Product, weight: StoredWeight) -> Product:
    """The product in the dtype that a stored weight computes in; adapters that are narrower are widened to it."""
    dtype = weight.compute_dtype(p.x)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    a, b = (cast(t) if torch.promote_types(t.dtype, dtype) is dtype else t for t in (p.a, p.b))
    return p._replace(x=cast(p.x), a=a, b=b, bias=None if p.bias is None else cast(p.bias))


def _castable(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype is not torch.float64


def _check_dtypes(p: Product, given: torch.dtype) -> None:
    """Raises for dtypes that do not fit together; runs after autocast. ``given`` is the dtype that x came in."""
    x, lora_a, lora_b, bias = p.x.dtype, p.a.dtype, p.b.dtype, p.bias
    weight = x if isinstance(p.w, StoredWeight) else p.w.dtype  # type: ignore[union-attr]
    if x not in FLOATING:
        raise RuntimeError(f"x is {dtype_name(x)}: expected one of {', '.join(map(dtype_name, FLOATING))}")
    if weight != x:
        raise RuntimeError(
            f"weight is {dtype_name(weight)} and x {dtype_name(x)}: cast one of them, or use torch.autocast"
        )
    if bias is not None and bias.dtype != x:
        raise RuntimeError(f"bias is {dtype_name(bias.dtype)} and x {dtype_name(x)}: cast bias to the dtype of x")
    if lora_a != lora_b:
        raise RuntimeError(f"lora_a is {dtype_name(lora_a)} and lora_b {dtype_name(lora_b)}: expected one dtype")
    if lora_a != x and (lora_a is not torch.float32 or x is torch.float64):
        if isinstance(p.w, StoredWeight) and x is not given:
            fitting = dtype_name(x) if x is torch.float32 else f"{dtype_name(x)} or float32"
            raise RuntimeError(
                f"lora_a and lora_b are {dtype_name(lora_a)}, and the stored weight computes in {dtype_name(x)}, which "
                f"cannot hold them: make the adapters {fitting}, or load the base with another compute dtype"
            )
        raise RuntimeError(
            f"lora_a and lora_b are {dtype_name(lora_a)} and x {dtype_name(x)}: adapters are the dtype of x, or "
            "float32 on a bfloat16 or float16 base"
        )
