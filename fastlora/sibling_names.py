"""Which layers of a model are siblings, to compute together: by known names, or by those that somebody asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import nn

from .text import suggestion

# The names of projections that read one input in known models.
KNOWN = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)

# Parents with such a word in their name take keys and values from elsewhere.
_CROSS = ("cross", "encoder_attn", "encdec")

# What patch_peft, inject and load_adapter take.
Groups = Literal["auto"] | None | Sequence[Sequence[str]]


class Chosen(NamedTuple):
    """Groups that were asked for: parent's name, parent and names of those formed; of the others the reason."""

    formed: list[tuple[str, nn.Module, tuple[str, ...]]]
    refused: dict[str, str]

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The full names of the siblings of each group."""
        return tuple(tuple(f"{parent}.{name}".lstrip(".") for name in names) for parent, _, names in self.formed)


def choose(
    model: nn.Module,
    groups: Groups,
    fit: Callable[[nn.Module], str | None],
) -> Chosen:
    """Finds the siblings in a model.

    Args:
        model: whose layers run on fastlora already.
        groups: ``"auto"`` for children of KNOWN names of which one fits, but those of cross attention; None for no
            groups; or tuples of names that children of one parent have.
        fit: gives the reason why a child can be in no group, or None.

    Raises:
        TypeError: ``groups`` is something else.
        ValueError: the names of a tuple are of different parents, fewer than two, or no layers' of the model.
    """
    if groups is None:
        return Chosen([], {})
    if groups == "auto":
        wanted: Sequence[Sequence[str]] = KNOWN
    elif isinstance(groups, str) or not all(isinstance(names, (tuple, list)) for names in groups):
        raise TypeError(f'groups must be "auto", None, or tuples of names, got {groups!r}')
    else:
        wanted = [_under_one_parent(names) for names in groups]
    formed: list[tuple[str, nn.Module, tuple[str, ...]]] = []
    refused: dict[str, str] = {}
    matched: set[tuple[str, ...]] = set()
    for parent_name, parent in model.named_modules():
        for names in wanted:
            prefix, children = _split(names)
            present = [name for name in children if parent._modules.get(name) is not None]
            if len(present) < 2 or (prefix and not f".{parent_name}".endswith(f".{prefix}")):
                continue
            matched.add(tuple(names))
            reasons = {name: fit(parent._modules[name]) for name in present}
            if groups == "auto" and None not in reasons.values():
                continue
            fitting = tuple(name for name in present if reasons[name] is None)
            if groups == "auto" and _is_cross(parent_name, parent):
                reasons = dict.fromkeys(
                    present, "the parent is cross attention by its name: pass groups=[...] to insist"
                )
                fitting = ()
            if len(fitting) > 1:
                formed.append((parent_name, parent, fitting))
            refused |= {
                f"{parent_name}.{name}".lstrip("."): reason for name, reason in reasons.items() if reason is not None
            }
    if groups != "auto" and (missing := [names for names in wanted if tuple(names) not in matched]):
        layers = [name for name, module in model.named_modules() if name and fit(module) is None]
        there = [f".{name}" for name, _ in model.named_modules()]
        unknown = {name for names in missing for name in names if not any(n.endswith(f".{name}") for n in there)}
        said = "".join(f"; {name!r}: {suggestion(name, layers)}" for name in sorted(unknown))
        raise ValueError(f"groups has names that no two layers of one parent in model have: {missing}{said}")
    return Chosen(formed, refused)


def _split(names: Sequence[str]) -> tuple[str, list[str]]:
    """The common beginning of dotted names, and their ends."""
    return names[0].rpartition(".")[0], [name.rpartition(".")[2] for name in names]


def _under_one_parent(names: Sequence[str]) -> Sequence[str]:
    if len(names) < 2 or len({name.rpartition(".")[0] for name in names}) > 1:
        raise ValueError(f"groups has {tuple(names)}: expected two or more names of layers under one parent")
    return names


def _is_cross(name: str, parent: nn.Module) -> bool:
    words = f"{name.rpartition('.')[2]} {type(parent).__name__}".lower()
    return any(word in words for word in _CROSS)
