"""What patched PEFT layers did at run time: each reason for falling back logged once, and counts on request.

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

logger = logging.getLogger("fastlora")


@dataclass
class Calls:
    """How often the forwards of patched layers ran, and where.

    ``fast`` counts by layer the calls that ran on fastlora, ``fallback`` by layer and reason those that ran PEFT's own
    forward. A layer that activation checkpointing recomputes is counted again; a compiled forward is not counted.
    """

    fast: Counter[str] = field(default_factory=Counter)
    fallback: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def reasons(self) -> Counter[str]:
        """The calls that fell back, by reason."""
        reasons: Counter[str] = Counter()
        for (_, reason), count in self.fallback.items():
            reasons[reason] += count
        return reasons

    def __str__(self) -> str:
        lines = [f"{self.fast.total()} calls ran on fastlora, {self.fallback.total()} on PEFT's own forward"]
        lines += [f"  {count} × {reason}" for reason, count in self.reasons.most_common()]
        return "\n".join(lines)


# Read on the way of every call: empty unless somebody counts.
counters: list[Calls] = []

_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_logged: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_warned: set[str] = set()


@contextmanager
def count_calls() -> Iterator[Calls]:
    """Counts what patched layers do inside the block: ``with count_calls() as calls: ...; print(calls)``.

    Only there, because counting costs each call about a microsecond.
    """
    calls = Calls()
    counters.append(calls)
    try:
        yield calls
    finally:
        # By identity: two counters that saw the same are equal.
        counters[:] = [other for other in counters if other is not calls]


def name_layer(layer: nn.Module, name: str) -> None:
    """Remembers what messages call a layer, and lets its fallbacks be logged anew."""
    _names[layer] = name
    _logged.pop(layer, None)


def forget_warnings() -> None:
    """Lets every reason be warned of anew: a newly patched model has news of its own."""
    _warned.clear()


def count_fast(layer: nn.Module) -> None:
    """Notes a call on fastlora."""
    for calls in counters:
        calls.fast[_name(layer)] += 1


def count_fallback(layer: nn.Module, reason: str, *, asked_for: bool) -> None:
    """Notes a call on PEFT's forward, and logs the first of each layer and reason."""
    for calls in counters:
        calls.fallback[_name(layer), reason] += 1
    logged = _logged.setdefault(layer, set())
    if reason not in logged:
        logged.add(reason)
        log_reason(_name(layer), reason, asked_for=asked_for)


def log_reason(name: str, reason: str, *, asked_for: bool) -> None:
    """Says that a layer runs PEFT's forward, and why.

    The first layer of a reason is a warning and the others are info, because a model has hundreds of layers; what the
    user asked for (``asked_for``: merging, disabling) is info.
    """
    if asked_for or reason in _warned:
        logger.info("%s runs PEFT's own forward: %s", name, reason)
        return
    _warned.add(reason)
    logger.warning(
        "%s runs PEFT's own forward: %s (said once a reason; other layers with it are logged at INFO)", name, reason
    )


def _name(layer: nn.Module) -> str:
    # A copy or an unpickled layer was never named.
    return _names.get(layer) or f"a {type(layer).__name__}"
