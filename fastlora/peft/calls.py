"""Logs each reason why a patched PEFT layer falls back, once, and counts its calls on request.

Nothing is stored on a layer, so that its state dict, pickle and copies stay what PEFT made them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from .. import siblings
from ..siblings import Counts

logger = logging.getLogger("fastlora")


@dataclass
class Calls:
    """The counted forwards of patched layers.

    ``fast`` counts by layer the calls that ran on fastlora, ``fallback`` by layer and reason those that ran PEFT's own
    forward. A layer that activation checkpointing recomputes is counted again; a compiled forward is not counted.
    ``groups`` counts the calls that computed siblings too, and the outputs that these took and left.
    """

    fast: Counter[str] = field(default_factory=Counter)
    fallback: Counter[tuple[str, str]] = field(default_factory=Counter)
    groups: Counts = field(default_factory=lambda: Counts(0, 0, 0))

    @property
    def reasons(self) -> Counter[str]:
        """The calls that fell back, by reason."""
        reasons: Counter[str] = Counter()
        for (_, reason), count in self.fallback.items():
            reasons[reason] += count
        return reasons

    def __str__(self) -> str:
        lines = [f"{self.fast.total()} calls ran on fastlora, {self.fallback.total()} on PEFT's own forward"]
        if self.groups.grouped:
            grouped, taken, wasted = self.groups
            lines.append(f"  {grouped} of them computed their siblings: {taken} outputs were taken, {wasted} were not")
        lines += [f"  {count} × {reason}" for reason, count in self.reasons.most_common()]
        return "\n".join(lines)


# Read in every call: empty unless somebody counts.
counters: list[Calls] = []

_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_logged: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_warned: set[str] = set()


@contextmanager
def count_calls() -> Iterator[Calls]:
    """Counts the calls of patched layers inside the block: ``with count_calls() as calls: ...; print(calls)``.

    Outside of it nothing is counted, because counting costs about a microsecond per call.
    """
    calls = Calls()
    siblings.close()
    before = siblings.counts()
    counters.append(calls)
    try:
        yield calls
    finally:
        siblings.close()
        calls.groups = Counts(*(now - then for now, then in zip(siblings.counts(), before, strict=True)))
        # By identity: two counters that saw the same are equal.
        counters[:] = [other for other in counters if other is not calls]


def name_layer(layer: nn.Module, name: str) -> None:
    """Sets the name of a layer in messages, and lets its fallbacks be logged again."""
    _names[layer] = name
    _logged.pop(layer, None)


def forget_warnings() -> None:
    """Lets every reason be warned of again, for a newly patched model."""
    _warned.clear()


def count_fast(layer: nn.Module) -> None:
    """Counts a call on fastlora."""
    for calls in counters:
        calls.fast[_name(layer)] += 1


def count_fallback(layer: nn.Module, reason: str, *, asked_for: bool) -> None:
    """Counts a call on PEFT's forward, and logs the first one per layer and reason."""
    for calls in counters:
        calls.fallback[_name(layer), reason] += 1
    logged = _logged.setdefault(layer, set())
    if reason not in logged:
        logged.add(reason)
        log_reason(_name(layer), reason, asked_for=asked_for)


def log_reason(name: str, reason: str, *, asked_for: bool) -> None:
    """Logs that a layer runs PEFT's forward, and the reason.

    The first layer per reason is a warning and further ones are info, because a model has hundreds of layers; states
    that the user asked for (``asked_for``: merging, disabling) are info.
    """
    if asked_for or reason in _warned:
        logger.info("%s runs PEFT's own forward: %s", name, reason)
        return
    _warned.add(reason)
    logger.warning("%s runs PEFT's own forward: %s (logged once per reason; further layers at INFO)", name, reason)


def _name(layer: nn.Module) -> str:
    # A copy or an unpickled layer was never named.
    return _names.get(layer) or f"a {type(layer).__name__}"
