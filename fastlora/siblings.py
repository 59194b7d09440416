"""Sibling layers of one input, such as q, k and v: the first that is called computes all, the others take their part.

Which layers are siblings is settled before a model runs (``sibling_names``, :func:`form`). A sibling takes its part in
its own forward, so that its hooks fire, and only on proof that it would compute the same: the same x, unchanged; the
same grad mode, autocast and hooks on saved tensors; the same branch, unchanged. Otherwise it computes alone. One group
at most is open at a time in each thread.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .backends import dispatch
from .backends.request import Product
from .eager import is_eager
from .ops import group as group_op
from .ops.group import Branch
from .ops.linear import is_plain, lora_linear

_log = logging.getLogger("fastlora")


class Group(NamedTuple):
    """Siblings: their names in their parent, which is not kept alive, and whether somebody asked for these names."""

    parent: ref[nn.Module]
    names: tuple[str, ...]
    asked: bool

    def members(self) -> dict[str, nn.Module]:
        """The siblings by name, as the parent has them now."""
        parent = self.parent()
        found = {} if parent is None else parent._modules
        return {name: layer for name in self.names if (layer := found.get(name)) is not None}


class Counts(NamedTuple):
    """How often a group was computed at once, and how many outputs its siblings took, and left."""

    grouped: int
    taken: int
    wasted: int


_groups: WeakKeyDictionary[nn.Module, Group] = WeakKeyDictionary()
# Whether there ever was a group: where not, no call looks for one.
formed = False
_counted: Counter[str] = Counter()
_warned: set[tuple[str, ...]] = set()


class _Waiting(NamedTuple):
    """An output that a sibling may take: the branch that made it, and what was the same then."""

    branch: Branch
    key: tuple[Any, ...]
    y: Tensor


class _Open(NamedTuple):
    """A group that was computed: for which x and in which state, by which siblings, and what was not taken yet."""

    group: Group
    x: Tensor
    version: int
    state: tuple[Any, ...]
    computed: frozenset[str]
    waiting: dict[str, _Waiting]


class _Here(threading.local):
    """What a thread has open: several may run one model."""

    opened: _Open | None = None


_here = _Here()


def form(parent: nn.Module, names: Sequence[str], *, asked: bool = False) -> None:
    """Makes children of one parent siblings."""
    global formed
    formed = True
    group = Group(ref(parent), tuple(names), asked)
    for layer in group.members().values():
        _groups[layer] = group


def dissolve(layer: nn.Module) -> None:
    """Lets a layer compute alone from now on, and its siblings without it."""
    _groups.pop(layer, None)


def restore(model: nn.Module, groups: Mapping[nn.Module, Group]) -> None:
    """Gives each layer of a model the group that it has in ``groups``, and no other."""
    for layer in model.modules():
        if layer in groups:
            _groups[layer] = groups[layer]
        else:
            dissolve(layer)


def group_of(layer: nn.Module) -> Group | None:
    """The group of a layer, or None."""
    return _groups.get(layer)


def counts() -> Counts:
    """The counts since the process began."""
    return Counts(*(_counted[name] for name in Counts._fields))


def close() -> None:
    """Drops the outputs of this thread's open group that nobody has taken yet."""
    if _here.opened is not None:
        _close(_here.opened)


def multiply(layer: nn.Module, x: Tensor, branch: Branch) -> Tensor:
    """``lora_linear`` of a layer: its part of what a sibling has computed, or together with its siblings, or alone.

    Siblings tell by a method ``lora_branch(x)`` what they would compute of x, or None where they would not run
    ``lora_linear``.

    Args:
        layer: the layer that is called.
        x: its input.
        branch: what it passes to ``lora_linear``.
    """
    # In this order: a compiler that looked into _groups would guard all that is in it.
    if is_eager() and layer in _groups:
        y = _together(layer, x, branch)
        if y is not None:
            return y
    weight, a, b, scale, bias, p = branch
    return lora_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=p)


def _together(layer: nn.Module, x: Tensor, branch: Branch) -> Tensor | None:
    group = _groups.get(layer)
    if group is None:
        return None
    members = group.members()
    called = next((name for name, member in members.items() if member is layer), None)
    if called is None:
        return None  # moved elsewhere
    opened = _here.opened
    if opened is not None:
        if group is opened.group and called not in opened.computed:
            return None
        if group is opened.group and (y := _taken(opened, called, x, branch)) is not None:
            return y
        _close(opened)
    # Of few tokens on a CPU nothing is to be saved but the host's time.
    if not _is_free(layer) or not _fits(x, branch) or dispatch.is_small(Product(x, *branch)):  # type: ignore[arg-type]
        return None
    parts = {}
    for name, member in members.items():
        if name == called:
            parts[name] = branch
        elif _groups.get(member) is group and _is_free(member):
            part = branch_of(member, x)
            if part is not None and _fits(x, part):
                parts[name] = part
    if len(parts) < 2:
        return None
    ys = group_op.multiply(x, list(parts.values()))
    made = dict(zip(parts, ys, strict=True))
    y = made.pop(called)
    waiting = {name: _Waiting(parts[name], _key(parts[name]), part) for name, part in made.items()}
    _here.opened = _Open(group, x, x._version, _state(x), frozenset(parts), waiting)
    _counted["grouped"] += 1
    return y


def _taken(opened: _Open, name: str, x: Tensor, branch: Branch) -> Tensor | None:
    """A sibling's output out of an open group, where it would compute the same now."""
    if x is not opened.x or x._version != opened.version or _state(x) != opened.state:
        return None
    waiting = opened.waiting.get(name)
    if waiting is None or waiting.key != _key(branch):
        return None
    del opened.waiting[name]
    _counted["taken"] += 1
    if not opened.waiting:
        _here.opened = None
    return waiting.y


def _close(opened: _Open) -> None:
    """Drops what nobody took, and warns of it once for each kind of group."""
    _here.opened = None
    _counted["wasted"] += len(opened.waiting)
    kind, parent = opened.group.names, opened.group.parent()
    if kind not in _warned and parent is not None:
        _warned.add(kind)
        _log.warning(
            "%s of a %s were computed with their siblings and not taken: they do not share an input there, and each "
            "such call costs time. Leave them out of groups=... (warned once)",
            " and ".join(opened.waiting),
            type(parent).__name__,
        )


def branch_of(layer: Any, x: Tensor) -> Branch | None:
    """What a layer would pass to ``lora_linear`` in a call with x; None where it would do something else."""
    tell = getattr(layer, "lora_branch", None)
    branch: Branch | None = None if tell is None else tell(x)
    return branch


def _is_free(layer: Any) -> bool:
    """Whether nothing changes x on its way into a layer's forward: hooks before it, or a forward of its own."""
    return not (
        layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks or "forward" in layer.__dict__
    )


def _fits(x: Tensor, branch: Branch) -> bool:
    """Whether lora_linear takes x with these branch, so that no sibling's error is another's, and all count changes.

    Tensors of inference mode do not.
    """
    weight, a, b, _, bias, _ = branch
    if not is_plain(x, weight, a, b, bias) or x.shape[-1:] != weight.shape[1:] or a.dtype is not b.dtype:
        return False
    if weight.device != x.device:
        return False
    tensors = (x, a, b) if bias is None else (x, a, b, bias)
    if isinstance(weight, Tensor):
        if weight.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
            return False
        tensors = (weight, *tensors)
    return all(t.device == x.device and not t.is_inference() for t in tensors)


def _key(branch: Branch) -> tuple[Any, ...]:
    """What is the same while branch are: an open group holds them, so that no other tensor gets their memory."""
    weight, a, b, scale, bias, p = branch
    tensors = [a, b] if bias is None else [a, b, bias]
    if isinstance(weight, Tensor):
        tensors.append(weight)
        stored = None
    else:
        stored = weight.state()
    return (scale, p, stored, *((t.data_ptr(), t._version, t.shape, t.stride(), t.requires_grad) for t in tensors))


def _state(x: Tensor) -> tuple[Any, ...]:
    """All around a call that its result and its graph depend on."""
    device_type = x.device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), x.requires_grad, autocast, hooks
