"""The weights of bitsandbytes' layers as stored weights: ``Linear4bit`` in 4 bits, ``Linear8bitLt`` in 8.

4 bits: W is made dense by bitsandbytes, bit for bit, in the dtype in which the layer computes, and the product is ours.
The layer's own forward is not called, so that a CPU's packing of its own, in calls without gradients, does not happen.
On a GPU, few tokens take bitsandbytes' own kernel, which reads the packed weight.

8 bits: the product is always bitsandbytes' own, which on GPUs, and on CPUs in evaluation, rounds the input to int8 too
and computes its outliers apart; the update is added to it. The gradient of x is made with the dense W, as bitsandbytes
makes it. Source: Dettmers et al., 2022, "LLM.int8()", https://arxiv.org/abs/2208.07339.

bitsandbytes is never imported here: where nobody has, no layer is of these kinds.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dtypes import HALF
from .ops.base import StoredWeight

Reason: TypeAlias = str

# The oldest bitsandbytes whose 4-bit kernels work on every device that fastlora does.
OLDEST = (0, 49)

# Up to so many tokens it has a GPU kernel that reads the packed weight; beyond, it makes it dense itself.
_FEW_TOKENS = 1536

# What it makes 4-bit weights dense in.
_DENSE_DTYPES = (torch.float32, *HALF)


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes' four, or one with adapters that was made of one (``base_kind``)."""
    return _kind_of(layer) in _kinds()


def stored_weight(layer: nn.Module, x: Tensor | None = None) -> StoredWeight | Reason:
    """The weight of a quantised layer for a call with x, or the reason why there is none, with the remedy.

    Args:
        layer: one for which :func:`is_quantised` holds. A 4-bit layer that has not settled the dtype in which it
            computes does so here, as its own first call would.
        x: the input; None to look at the layer alone.
    """
    if (reason := _too_old()) is not None:
        return reason
    return _four_bit(layer, x) if _kind_of(layer) in _kinds(four=True) else _eight_bit(layer)


def why_not_stored(layer: nn.Module) -> Reason | None:
    """The reason why a quantised layer has no stored weight, with the remedy; None where it has one."""
    stored = stored_weight(layer)
    return stored if isinstance(stored, str) else None


def dense_weight(layer: nn.Module) -> Tensor:
    """A new dense W [N, K] of a quantised layer, in :func:`dense_dtype`.

    Raises:
        RuntimeError: the layer has no quantisation state, or bitsandbytes is too old.
    """
    stored = stored_weight(layer)
    if isinstance(stored, str):
        raise RuntimeError(f"the weight of a {type(layer).__name__} cannot be made dense: {stored}")
    return stored.dense(dense_dtype(layer))


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a merged quantised layer computes: x Wᵀ + bias [..., N] in the dtype of W [N, K], given in that of x."""
    dtype = weight.dtype
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


def quantised_as(layer: Any) -> str:
    """What the numbers of a quantised layer's weight are: ``"nf4"``, ``"fp4"`` or ``"int8"``."""
    return str(layer.weight.quant_state.quant_type) if _kind_of(layer) in _kinds(four=True) else "int8"


def dense_dtype(layer: Any) -> torch.dtype:
    """The dtype of a dense layer in a quantised one's place: that in which the quantised one computes.

    An 8-bit layer computes in that of its input; float16 holds more than its weight has, and bitsandbytes itself rounds
    the input to it.
    """
    if _kind_of(layer) not in _kinds(four=True):
        return torch.float16
    quant_state = layer.weight.quant_state
    dtype: torch.dtype = layer.compute_dtype or quant_state.dtype
    return dtype


def before_loading(layer: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Prepares a quantised layer for torch to load its part of a state dict into it, which bitsandbytes does half.

    Torch copies the packed weight alone. Of 4 bits, its state is taken out of ``state_dict`` and put in the old one's
    place; a packed weight of another size is left for torch to refuse. Of 8 bits, the factors are laid where
    bitsandbytes looks for them, also after the layer's first call.

    Raises:
        RuntimeError: ``assign=True``, which would leave the state behind; or the state in ``state_dict`` is of another
            layer or cut short. The layer is then as it was.
    """
    held: Any = layer
    weight = held._parameters["weight"]
    if metadata.get("assign_to_params_buffers") and prefix + "weight" in state_dict:
        raise RuntimeError(
            f"assign=True would put the packed {prefix}weight in the place of one that has its state of quantisation: "
            "call load_state_dict without it, which copies"
        )
    if _kind_of(layer) not in _kinds(four=True):
        factors = held.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        if weight.dtype is torch.int8 and factors is not None and prefix + "SCB" in state_dict:
            weight.CB, weight.SCB = weight.data, factors
            held.state.CB = held.state.SCB = None
        return
    packed = state_dict.get(prefix + "weight")
    names = [name for name in state_dict if name.startswith(prefix + "weight.")]
    if packed is None or not names or (packed.shape, packed.dtype) != (weight.shape, weight.dtype):
        return
    found = {name.removeprefix(prefix + "weight."): state_dict[name] for name in names}
    try:
        quant_state = sys.modules["bitsandbytes"].functional.QuantState.from_dict(found, device=weight.device)
    except (KeyError, ValueError) as error:
        raise RuntimeError(
            f"the state of quantisation of {prefix}weight in the state dict is cut short ({error}): expected all that "
            "state_dict() of such a layer has"
        ) from error
    if tuple(quant_state.shape) != (held.out_features, held.in_features):
        raise RuntimeError(
            f"{prefix}weight in the state dict is a packed {list(quant_state.shape)}: expected "
            f"{[held.out_features, held.in_features]}, so the state dict is another model's"
        )
    for name in names:
        del state_dict[name]
    weight.quant_state = held.quant_state = quant_state


class FourBit(StoredWeight):
    """The weight of a ``Linear4bit``: packed, with the state that says how."""

    def __init__(self, weight: Tensor, quant_state: Any, dtype: torch.dtype | None) -> None:
        # bitsandbytes' Parameter would send each look at it through Python.
        with torch._C.DisableTorchFunctionSubclass():
            self.source, self._packed, self._version = weight, weight.data, _version_of(weight)
        self._state_id, self._dtype = id(quant_state), dtype
        # On a CPU a later call without gradients may pack the weight anew, and changes its state in place.
        self._quant_state = _copied(quant_state) if self._packed.is_cpu else quant_state
        self.shape, self.device = torch.Size(quant_state.shape), self._packed.device
        # On a CPU bitsandbytes has no way to write into given memory.
        self.fills = self._packed.is_cuda

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """W [N, K], as bitsandbytes makes it."""
        quant_state = self._quant_state
        wanted = dtype if dtype in _DENSE_DTYPES else torch.float32
        if quant_state.dtype is not wanted:
            # That in which it was packed, which may be coarser than that in which the layer computes.
            quant_state = _copied(quant_state)
            quant_state.dtype = wanted
        into = out if out is not None and out.dtype is wanted else None
        made: Tensor = sys.modules["bitsandbytes"].functional.dequantize_4bit(self._packed, quant_state, out=into)
        if wanted is dtype:
            return made
        return made.to(dtype) if out is None else out.copy_(made)

    def is_changed(self) -> bool:
        """Whether the packed tensor was written into since."""
        assert self.source is not None
        with torch._C.DisableTorchFunctionSubclass():
            return self._version != _version_of(self.source)

    def state(self) -> Hashable:
        """The packed tensor and its version, and the state that says how."""
        return self._packed.data_ptr(), self._version, self._state_id

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The layer's own, whatever autocast says; that of x where the layer has none."""
        return x.dtype if self._dtype is None else self._dtype

    def multiplies(self, m: int) -> bool:
        """Few tokens on a GPU."""
        return self.device.type == "cuda" and 0 < m <= _FEW_TOKENS

    def product(self, x_mk: Tensor, bias: Tensor | None) -> Tensor:
        """bitsandbytes' own product."""
        with torch.no_grad():
            y: Tensor = sys.modules["bitsandbytes"].matmul_4bit(x_mk, self._packed, self._quant_state, bias=bias)
        return y


def _version_of(tensor: Tensor) -> int:
    """How often a tensor was written into; one of inference mode does not count, and compilers do not ask."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _copied(quant_state: Any) -> Any:
    """A shallow copy, in a tenth of the time that ``copy.copy`` takes."""
    copied = object.__new__(type(quant_state))
    copied.__dict__.update(quant_state.__dict__)
    return copied


def _four_bit(layer: Any, x: Tensor | None) -> FourBit | Reason:
    weight = layer._parameters.get("weight")
    quant_state = getattr(weight, "quant_state", None)
    if hasattr(weight, "ds_id"):
        return "its 4-bit weight is partitioned by DeepSpeed's ZeRO-3"
    if quant_state is None:
        return "its 4-bit weight has no quantisation state: move the layer to a device, or load it, first"
    if getattr(quant_state, "packing_format_for_cpu", False):
        return (
            "its 4-bit weight was packed anew for this CPU, with other factors, by a call of its own in eval mode "
            "without gradients: load it again, and give it its adapter before it is called"
        )
    if tuple(quant_state.shape) != (layer.out_features, layer.in_features):
        return f"its 4-bit weight was packed as {list(quant_state.shape)}, not [out_features, in_features]"
    if x is not None and not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return FourBit(weight, quant_state, layer.compute_dtype)


class EightBit(StoredWeight):
    """The weight of a ``Linear8bitLt``: int8, with a factor for each row."""

    def __init__(self, layer: Any, rows: Tensor, factors: Tensor) -> None:
        self._layer, self._rows, self._factors = layer, rows, factors
        self.source: Tensor = layer.weight
        # The parameter shares the memory of the rows, but not their version.
        self._state = tuple((t.data_ptr(), _version_of(t)) for t in (layer.weight, rows, factors))
        self.shape, self.device = rows.shape, rows.device
        self.fills = True

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """W [N, K] = rows · factors / 127."""
        memory = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        return torch.mul(self._rows, (self._factors * (1.0 / 127.0)).unsqueeze(1), out=memory)

    def is_changed(self) -> bool:
        """Whether the rows or their factors were written into since."""
        made_of: tuple[Any, ...] = (self.source, self._rows, self._factors)
        return any(version != _version_of(t) for (_, version), t in zip(self._state, made_of, strict=True))

    def state(self) -> Hashable:
        """The int8 tensor and its factors, with their versions."""
        return self._state

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """That of x, whatever autocast says, as bitsandbytes' product has it."""
        return x.dtype

    def multiplies(self, m: int) -> bool:
        """Always: another product would be another layer."""
        return m > 0

    def product(self, x_mk: Tensor, bias: Tensor | None) -> Tensor:
        """bitsandbytes' own product, with its treatment of outliers."""
        layer = self._layer
        state = layer.state
        state.is_training, state.CB, state.SCB = layer.training, self._rows, self._factors
        with torch.no_grad():
            y: Tensor = sys.modules["bitsandbytes"].matmul(x_mk, layer.weight, bias=bias, state=state)
        return y


def _eight_bit(layer: Any) -> EightBit | Reason:
    if layer.state.has_fp16_weights:
        return "its 8-bit layer keeps 16-bit weights and trains them (has_fp16_weights=True): quantise it, with False"
    weight, state = layer._parameters.get("weight"), layer.state
    # Until its first call the layer has both on its weight; a weight that was moved since has no factors. They stay
    # there: once bitsandbytes has moved them into its state, it can no longer load a state dict.
    rows, factors = (
        here if (here := getattr(weight, name, None)) is not None else getattr(state, name) for name in ("CB", "SCB")
    )
    if rows is None or factors is None or rows.dtype is not torch.int8:
        return "its 8-bit weight has no quantisation state: move the layer to a device, or load it, first"
    if rows.device != factors.device:
        return f"its 8-bit weight is on {rows.device} and the factors on {factors.device}: move the layer to one"
    return EightBit(layer, rows, factors)


def _kind_of(layer: nn.Module) -> type:
    # Of the class: a Module is slow to say that it has no such attribute.
    kind: type = getattr(type(layer), "base_kind", type(layer))
    return kind


def _kinds(*, four: bool = False) -> tuple[type, ...]:
    """bitsandbytes' layers, or those of 4 bits alone; none where it was never imported."""
    library = sys.modules.get("bitsandbytes")
    if library is None:
        return ()
    kinds = library.nn
    of_four = (kinds.Linear4bit, kinds.LinearNF4, kinds.LinearFP4)
    return of_four if four else (*of_four, kinds.Linear8bitLt)


def _too_old() -> Reason | None:
    version: str = sys.modules["bitsandbytes"].__version__
    parts = tuple(int(part) for part in version.split(".")[:2])
    if parts < OLDEST:
        return f"bitsandbytes {version} is too old: pip install 'bitsandbytes>={'.'.join(map(str, OLDEST))}'"
    return None
