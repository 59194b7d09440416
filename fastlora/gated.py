"""Gated MLP modules run as one :func:`fastlora.lora_swiglu_mlp` where they are proven to compute nothing else.

A module is proven when it is swapped, by the source of its forward, ``down(act(gate(x)) * up(x))``, and by its
activation's values; and in each call by what its three layers would do. Otherwise its own forward runs. The module is
the object it was, with a class of its own until :func:`restore`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .eager import is_eager
from .ops.group import Branch
from .ops.mlp import lora_swiglu_mlp
from .siblings import branch_of
from .text import listed, shown_names

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class Parts(NamedTuple):
    """The names of a gated MLP's children: ``down(act(gate(x)) * up(x))``."""

    gate: str
    up: str
    down: str
    act: str


class GatedMLP(nn.Module):
    """What a swapped module's class has before its own: one product where the call is proven, else its own forward."""

    # A class; mypy takes that of a Module for nothing that can be hashed.
    _kind: Any

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → y [..., out_features]."""
        proof = _prove(self, x)
        if proof is None:
            y: Tensor = super().forward(x)
            return y
        gate, up, down, activation = proof
        return lora_swiglu_mlp(x, gate, up, down, activation=activation)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made as the program runs: a pickle names the one that it was made from.
        return _unpickled, (self._kind,), self.__dict__


def _unpickled(kind: Any) -> nn.Module:
    made = _class_of(kind)
    return made.__new__(made)


@functools.cache
def _class_of(kind: Any) -> type[GatedMLP]:
    names = {"_kind": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (GatedMLP, kind), names)


def swap(module: nn.Module) -> None:
    """Gives a module that :func:`find` has found the class that runs it as one product."""
    if not isinstance(module, GatedMLP):
        module.__class__ = _class_of(_kind_of(module))


def restore(module: nn.Module) -> None:
    """Gives a swapped module its own class back; others, and those that a wrapper gave a class since, stay."""
    if isinstance(module, GatedMLP) and type(module) is _class_of(module._kind):
        module.__class__ = module._kind


def find(model: nn.Module, fit: Callable[[nn.Module], str | None]) -> dict[str, nn.Module]:
    """The modules that are proven to be gated MLPs, swapped or not, by name.

    Args:
        model: any module.
        fit: gives the reason why a child is no LoRA layer that runs on fastlora, or None.
    """
    found = {}
    for name, module in model.named_modules():
        parts = parts_of(_kind_of(module))
        if parts is None or "forward" in module.__dict__ or _activation(module._modules.get(parts.act)) is None:
            continue
        layers = [module._modules.get(part) for part in parts[:3]]
        if all(layer is not None and fit(layer) is None for layer in layers):
            found[name] = module
    return found


def why_none(model: nn.Module) -> str:
    """What to say where :func:`find` finds nothing."""
    alike = [name or type(module).__name__ for name, module in model.named_modules() if parts_of(_kind_of(module))]
    if not alike:
        return "finds no module whose forward is down(act(gate(x)) * up(x)) by its source"
    return (
        f"finds no gated MLP to run: {shown_names(alike)} has a layer of its three that does not run on fastlora, an "
        "activation other than silu and gelu, or a replaced forward"
    )


def report(groups: Sequence[Sequence[str]], mlps: Sequence[str], ungrouped: Mapping[str, str]) -> list[str]:
    """The lines on what computes together: groups and gated MLPs, and the layers in no group by reason."""
    lines = []
    if groups:
        lines.append(f"  {len(groups)} groups: {shown_names(' + '.join(names) for names in groups)}")
    if mlps:
        lines.append(f"  {len(mlps)} gated MLPs: {shown_names(mlps)}")
    for reason, count in Counter(ungrouped.values()).most_common():
        lines.append(f"  {count} in no group: {reason} ({listed(n for n, r in ungrouped.items() if r == reason)})")
    return lines


def _kind_of(module: nn.Module) -> Any:
    return module._kind if isinstance(module, GatedMLP) else type(module)


@functools.cache
def parts_of(kind: Any) -> Parts | None:
    """The names of a class's children by the source of its forward; None where that is not a gated MLP's."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, SyntaxError, TypeError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list or len(function.args.args) != 2:
        return None
    if function.args.vararg or function.args.kwarg or function.args.kwonlyargs:
        return None
    me, x = (argument.arg for argument in function.args.args)
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    # One name for the whole result, or none.
    if len(body) == 2 and isinstance(body[0], ast.Assign) and isinstance(body[1], ast.Return):
        if not (len(body[0].targets) == 1 and isinstance(body[1].value, ast.Name)):
            return None
        target = body[0].targets[0]
        if not (isinstance(target, ast.Name) and target.id == body[1].value.id):
            return None
        result: ast.expr | None = body[0].value
    elif len(body) == 1 and isinstance(body[0], ast.Return):
        result = body[0].value
    else:
        return None
    return _gated(result, me, x)


def _gated(result: ast.expr | None, me: str, x: str) -> Parts | None:
    """The children in ``me.down(me.act(me.gate(x)) * me.up(x))``."""
    down, product = _call(result, me)
    if down is None or not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
        return None
    act, inner = _call(product.left, me)
    gate, first = _call(inner, me)
    up, second = _call(product.right, me)
    arguments = all(isinstance(node, ast.Name) and node.id == x for node in (first, second))
    if act is None or gate is None or up is None or not arguments:
        return None
    return Parts(gate, up, down, act)


def _call(node: ast.expr | None, me: str) -> tuple[str | None, ast.expr | None]:
    """The child that is called and its one argument, in ``me.child(argument)``."""
    if (
        isinstance(node, ast.Call)
        and len(node.args) == 1
        and not node.keywords
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == me
    ):
        return node.func.attr, node.args[0]
    return None, None


def activation_of(act: Any) -> str | None:
    """The name of an activation for ``lora_swiglu_mlp``, told by its values; None for another, or one with state."""
    if isinstance(act, nn.Module) and act.state_dict():
        return None
    x = torch.linspace(-9, 9, 257, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            found = act(x.clone())
    except Exception:
        return None
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return None
    for name, known in _ACTIVATIONS.items():
        if torch.allclose(found, known(x), rtol=1e-12, atol=1e-12):
            return name
    return None


class _Proven(NamedTuple):
    """The arguments of ``lora_swiglu_mlp``."""

    gate: Branch
    up: Branch
    down: Branch
    activation: str


def _prove(module: GatedMLP, x: Tensor) -> _Proven | None:
    """The branches of a call that would compute nothing but a gated MLP of LoRA layers, or None."""
    # A compiler looks no further: it fuses by itself.
    if not is_eager() or _has_any_global_hook() or type(x) not in (Tensor, nn.Parameter):
        return None
    parts = parts_of(module._kind)
    if parts is None:
        return None
    activation = _activation(module._modules.get(parts.act))
    gate = _branch(module, parts.gate, x)
    up = _branch(module, parts.up, x)
    if activation is None or gate is None or up is None:
        return None
    # What down gets is as wide as gate's output, and of the dtype of x.
    h = x.new_empty(()).expand(*x.shape[:-1], gate.weight.shape[0])
    down = _branch(module, parts.down, h)
    return None if down is None else _Proven(gate, up, down, activation)


def _branch(module: nn.Module, name: str, x: Tensor) -> Branch | None:
    layer = module._modules.get(name)
    return None if layer is None or is_watched(layer) else branch_of(layer, x)


def _activation(act: nn.Module | None) -> str | None:
    """The name of an activation whose class says which it is: no values are looked at in each call."""
    if act is None or is_watched(act):
        return None
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    kind: Any = type(act)
    return _activation_of_class(kind)


@functools.cache
def _activation_of_class(kind: Any) -> str | None:
    """The same of a class that has no options: torch's SiLU, and those of transformers."""
    if kind is not nn.SiLU and kind.__module__ != "transformers.activations":
        return None
    try:
        return activation_of(kind())
    except Exception:
        return None


def is_watched(layer: Any) -> bool:
    """Whether somebody would see, or change, that a layer is not called."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )
