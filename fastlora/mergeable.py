"""``Mergeable``, the base of every layer with a low-rank update: it adds the update to the weight and takes it out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .dtypes import wide_of
from .ops.norms import forget_norms
from .ownership import why_not_mergeable
from .quantised import dense_weight, is_quantised
from .text import dtype_name, with_article

if TYPE_CHECKING:
    from typing_extensions import Self

_log = logging.getLogger("fastlora")

# The kinds of merged layers of which no more need be said when they train.
_told: set[type] = set()

# Where a base waits while its weight holds a sum: on its device, beside the sum, or in CPU memory.
Keep: TypeAlias = Literal["device", "cpu"]


class Update(NamedTuple):
    """What is folded into a layer: ``scale · left @ right`` into its weight, B A, or Aᵀ Bᵀ where that is stored [K, N].

    Attributes:
        left: B [N, R], or Aᵀ [K, R] where ``turned``.
        right: A [R, K], or Bᵀ [R, N].
        scale: factor on their product.
        turned: whether the weight is stored [K, N].
        magnitude: DoRA's length of each row of the sum [N]; None for LoRA.
        bias: what is added to the layer's bias [N], the factor in it; None for nothing.
    """

    left: Tensor
    right: Tensor
    scale: float
    turned: bool = False
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @staticmethod
    def of(
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        turned: bool = False,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Update:
        """Makes the update of A [R, K] and B [N, R] to a weight [N, K], or [K, N] where ``turned``."""
        left, right = (lora_a.T, lora_b.T) if turned else (lora_b, lora_a)
        return Update(left, right, scale, turned, magnitude, bias)


@torch.no_grad()
def folded(weight: Tensor, update: Update, name: str = "the weight") -> Tensor:
    """Computes W + scale · left @ right in float32 (float64 on a float64 weight) and rounds once.

    With a magnitude m, each row of that sum is given the length m: ``m ⊙ (W + scale · B A) / ‖W + scale · B A‖``.

    Args:
        weight: the base, of any shape with as many elements as ``left @ right``, which is reshaped to it.
        update: the product that is added.
        name: what a message calls the weight.

    Returns:
        A new tensor with the shape, dtype and strides of ``weight``.

    Raises:
        ValueError: the sum is not finite.
    """
    wide = wide_of(weight.dtype)
    left, right = update.left.to(wide), update.right.to(wide)
    matrix = weight.to(wide).reshape(left.shape[0], right.shape[1])
    with torch.autocast(weight.device.type, enabled=False):
        total = torch.addmm(matrix, left, right, alpha=update.scale)
        if update.magnitude is not None:
            across = 0 if update.turned else 1
            norm = torch.linalg.vector_norm(total, dim=across, keepdim=True)
            total *= update.magnitude.to(wide).view_as(norm) / norm
        total = total.to(weight.dtype).view(weight.shape)
    _check_finite(total, name)
    return total if total.stride() == weight.stride() else torch.empty_like(weight).copy_(total)


def scaled_bias(lora_bias: Tensor, scale: float) -> Tensor:
    """What an adapter's own bias [N] adds to the layer's: scale · lora_bias, in float32 or float64."""
    return scale * lora_bias.to(wide_of(lora_bias.dtype))


def joined_bias(bias: Tensor | None, scaled: Tensor) -> Tensor:
    """bias + what :func:`scaled_bias` gives [N], in the dtype of that, not rounded yet."""
    return scaled if bias is None else bias.to(scaled.dtype) + scaled


@torch.no_grad()
def folded_bias(bias: Tensor | None, update: Update, name: str = "the bias") -> Tensor | None:
    """Computes bias + the update's in float32 and rounds once; None where there is nothing to add.

    Raises:
        RuntimeError: there is something to add and no bias.
        ValueError: the sum is not finite.
    """
    if update.bias is None:
        return None
    if bias is None:
        raise RuntimeError(
            f"{name} is None, and the adapter has a bias of its own (lora_bias) to add to it: give the layer a bias of "
            "zeros before it gets its adapter"
        )
    wide = wide_of(bias.dtype)
    total = (bias.to(wide) + update.bias.to(wide)).to(bias.dtype)
    _check_finite(total, name)
    return total


def _check_finite(total: Tensor, name: str) -> None:
    if not total.isfinite().all():
        raise ValueError(
            f"{name} merged is not finite in {dtype_name(total.dtype)}: the adapter or the base is damaged, or their "
            "sum overflows; nothing was merged"
        )


def set_aside(parameter: Tensor, keep: Keep) -> Tensor:
    """What a parameter holds, to be given back: its own tensor, or a copy in CPU memory."""
    data = parameter.data
    if keep == "device":
        return data
    return torch.empty_like(data, device="cpu", pin_memory=data.is_cuda).copy_(data)


def fill(parameter: Tensor, values: Tensor, keep: Keep) -> None:
    """Makes a parameter hold these values: the tensor itself, or a copy in the memory that it has."""
    if keep == "device":
        parameter.data = values
    else:
        parameter.data.copy_(values)


def base_weight(layer: nn.Module) -> Tensor:
    """The base weight of a layer as a dense matrix: its own, or made of a quantised one.

    Raises:
        RuntimeError: the quantised weight has no quantisation state.
    """
    weight: Any = layer.weight
    return dense_weight(layer) if is_quantised(layer) else weight


def parameter_of(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` for a Parameter, eight times faster where it lies in the module itself."""
    try:
        return module._parameters[name]
    except KeyError:  # parametrised, or FSDP1's: a property, or a plain attribute
        return getattr(module, name)


def parameters_of(module: nn.Module, names: Sequence[str]) -> tuple[Any, ...]:
    """Each of the names' :func:`parameter_of`, in one look."""
    try:
        return tuple(map(module._parameters.__getitem__, names))
    except KeyError:
        return tuple(parameter_of(module, name) for name in names)


class Mergeable(nn.Module):
    """A layer with a frozen weight and a low-rank update, which a subclass gives in ``_update``.

    While ``merged``, the weight holds the sum of both, and the base weight is set aside in ``_base_weight``; so is the
    bias, where the update has a part in it. A quantised base keeps its packed weight, and the sum with the dequantised
    one lies dense beside it, in ``_merged_weight``. A state dict holds the base either way, and loading one leaves the
    layer merged or not, as it was.
    """

    weight: Tensor
    # In the class too, because the constructors of torch's layers call reset_parameters early.
    merged = False

    # True where the weight of a linear layer is stored as [K, N].
    fan_in_fan_out = False
    # The child that has the weight, or "" for the layer itself.
    _holder_name = ""
    # Where the base waits while merged.
    _keep: Keep = "device"
    _base_weight: Tensor | None
    _base_bias: Tensor | None
    _merged_weight: Tensor | None

    def _update(self) -> Update:
        """Returns the update in the layout of the weight."""
        raise NotImplementedError

    def _become_mergeable(self) -> None:
        """Adds the buffers and the hooks that merging needs; ``_become_plain`` removes them."""
        self.merged = False
        self.register_buffer("_base_weight", None, persistent=False)
        self.register_buffer("_base_bias", None, persistent=False)
        self.register_buffer("_merged_weight", None, persistent=False)
        # Functions of the module, not closures: the layer stays picklable.
        self.register_state_dict_post_hook(_save_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_merge_loaded)  # type: ignore[no-untyped-call]

    def _become_plain(self) -> None:
        """Takes buffers and hooks away again; weight and bias stay as they are."""
        del self.merged, self._base_weight, self._base_bias, self._merged_weight
        self.__dict__.pop("_keep", None)
        _remove_hook(self._state_dict_hooks, _save_base)
        _remove_hook(self._load_state_dict_post_hooks, _merge_loaded)

    @property
    def _holder(self) -> Any:
        return self.get_submodule(self._holder_name)

    @property
    def _has_update(self) -> bool:
        """Whether the layer, unmerged, adds an update to its base."""
        return True

    @property
    def _has_dora(self) -> bool:
        """Whether the layer is DoRA, or some adapter of it, which keeps norms of the base."""
        return False

    @property
    def _unmerged_weight(self) -> Tensor:
        """The weight without the update, merged or not, on the device of the layer."""
        weight: Tensor = self._holder.weight
        return weight if self._base_weight is None else self._base_weight.to(weight.device)

    @property
    def _unmerged_bias(self) -> Any:
        """The bias without the update's part in it, as :attr:`_unmerged_weight`."""
        bias = self._holder.bias
        return bias if self._base_bias is None else self._base_bias.to(bias.device)

    def merge(self) -> Self:
        """Adds the update to ``weight``: W + scale · B A, computed in float32 and rounded once. Merged already: no-op.

        The base weight is set aside, not overwritten: its storage may belong to somebody else.

        Raises:
            RuntimeError: ``weight`` is parametrised or sharded over ranks, so that no sum can be stored in it; or the
                update has a bias and the layer has none.
            ValueError: the sum is not finite; the layer is then as it was.
        """
        if not self.merged:
            if (reason := why_not_mergeable(self._holder)) is not None:
                raise RuntimeError(f"no sum can be stored in the weight: {reason}")
            self._fold_in(self._called(), "device")
        return self

    def _note_training(self) -> None:
        """Logs, once for each kind of layer and merge, that a merged layer is called as if its adapter trained."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or type(self) in _told:
            return
        if any(p.requires_grad for name, p in self.named_parameters() if "lora_" in name):
            tell_no_more([self])
            _log.warning(
                "%s was called in training mode with gradients enabled while its adapter is merged, so that this gets "
                "none: unmerge before you train (fastlora.unmerge_adapter(model) or layer.unmerge()); to evaluate, "
                "call model.eval() or use torch.no_grad()",
                self._called(),
            )

    def _called(self) -> str:
        """What a message calls the layer, which does not know its name in a model: class and shape."""
        holder = self._holder
        shape = (holder.out_features, holder.in_features) if is_quantised(holder) else holder.weight.shape
        return f"{with_article(type(self).__name__)} {list(shape)}"

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fold_in(self, name: str, keep: Keep) -> None:
        """Merges a layer that is not merged and whose weight can hold the sum.

        Args:
            name: what a message calls the layer.
            keep: where the base waits; ``"cpu"`` writes the sum into the storage of the weight.
        """
        holder, update = self._holder, self._update()
        weight = folded(base_weight(holder), update, f"the weight of {name}")
        bias = folded_bias(holder.bias, update, f"the bias of {name}") if update.bias is not None else None
        self.merged, self._keep = True, keep
        try:
            if is_quantised(holder):
                self._merged_weight = weight
            else:
                self._base_weight = set_aside(holder.weight, keep)
                fill(holder.weight, weight, keep)
            if bias is not None:
                self._base_bias = set_aside(holder.bias, keep)
                fill(holder.bias, bias, keep)
        except BaseException:  # no memory for a copy, or interrupted
            self.unmerge()
            raise

    def unmerge(self) -> Self:
        """Puts the base weight and bias back, bit for bit. Not merged: no-op."""
        if self.merged:
            if self._base_weight is not None:
                fill(self._holder.weight, self._base_weight, self._keep)
            if self._base_bias is not None:
                fill(self._holder.bias, self._base_bias, self._keep)
            self._base_weight = self._base_bias = self._merged_weight = None
            self.merged = False
            _told.discard(type(self))
        return self

    def _forget_norms(self) -> None:
        if self._has_dora:
            forget_norms(self._holder.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A new memory of the weight may lie where an older one did, and wears the same version.
        self._forget_norms()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_norms()
        # The state dict holds a base weight. Children are loaded after this call, so the hook merges again.
        if self.merged:
            self._merge_after_load = self._keep
            self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)


def tell_no_more(layers: Iterable[nn.Module]) -> None:
    """Of layers of these kinds it has been said that they are merged and do not train."""
    _told.update(type(layer) for layer in layers if isinstance(layer, Mergeable))


def _save_base(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    assert isinstance(layer, Mergeable)
    for name, base in (("weight", layer._base_weight), ("bias", layer._base_bias)):
        if base is not None:
            state_dict[prefix + f"{layer._holder_name}.{name}".lstrip(".")] = base


def _merge_loaded(layer: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(layer, Mergeable)
    keep = layer.__dict__.pop("_merge_after_load", None)
    if keep == "device":
        layer.merge()
    elif keep is not None:
        layer._fold_in(layer._called(), keep)


def _remove_hook(hooks: dict[int, Any], hook: Any) -> None:
    # By value, because the handle from registering does not follow copies of the layer.
    for key in [key for key, each in hooks.items() if each is hook]:
        del hooks[key]
