"""``AdaptedQuantised``: a layer of bitsandbytes with adapters, whose packed weight stays as it is."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ..ops.base import StoredWeight
from ..ops.group import Branch
from ..quantised import before_loading, dense_linear, stored_weight, why_not_stored
from .layer import KINDS, AdaptedLinear


class AdaptedQuantised(AdaptedLinear):
    """A layer of bitsandbytes with adapters; its class is made from this one and from that, which is ``base_kind``.

    The packed weight stays as it is, also while merged: the sum with the dequantised one lies beside it.
    """

    base_kind: Any
    _is_packed = True

    # bitsandbytes would pack the weight anew for some CPUs, in a call in eval mode without gradients, and rounds the
    # factors of its blocks then: there is no way back to the same bits. Of a class, this comes before the attribute.
    support_avx512bf16_for_cpu = property(lambda self: False)

    def lora_branch(self, x: Tensor) -> Branch | None:
        """As an :class:`AdaptedLinear`'s; None too where the packed weight cannot be read."""
        return super().lora_branch(x) if why_not_stored(self) is None else None

    def _stored(self, x: Tensor) -> StoredWeight:
        stored = stored_weight(self, x)
        if isinstance(stored, str):
            raise RuntimeError(f"an adapted {self.base_kind.__name__} cannot compute: {stored}")
        return stored

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        before_loading(self, state_dict, prefix, metadata)
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def _base(self, x: Tensor) -> Tensor:
        layer: Any = self
        if self._base_bias is not None:
            # Merged: the same layer with the bias that it had.
            layer = self.base_kind.__new__(self.base_kind)
            bias = nn.Parameter(self._unmerged_bias, requires_grad=False)
            layer.__dict__ = self.__dict__ | {"_parameters": self._parameters | {"bias": bias}}
            layer.__dict__["support_avx512bf16_for_cpu"] = False
        y: Tensor = self.base_kind.forward(layer, x)
        return y

    def _rounded(self, bias: Tensor) -> Tensor:
        return bias  # rounded where the call is: to the dtype in which the layer computes

    def _merged(self, x: Tensor) -> Tensor:
        weight: Any = self._merged_weight
        return dense_linear(x, weight, self.bias)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made as the program runs: a pickle names the one that it was made from.
        return _unpickled, (self.base_kind,), *super().__reduce_ex__(protocol)[2:]


def class_of(layer: nn.Module) -> type[AdaptedQuantised]:
    """The class of a quantised layer with adapters."""
    kind: Any = type(layer)
    return _class_of(kind)


@functools.cache
def _class_of(kind: Any) -> type[AdaptedQuantised]:
    names = {"base_kind": kind, "__module__": __name__, "__doc__": AdaptedQuantised.__doc__}
    made = type(f"Adapted{kind.__name__}", (AdaptedQuantised, kind), names)
    KINDS.add(made)
    return made


def _unpickled(kind: Any) -> AdaptedQuantised:
    made = _class_of(kind)
    return made.__new__(made)
