"""``State``: the adapters that one model has, which of them is active, and whether they are switched off."""

from __future__ import annotations

from dataclasses import dataclass, field

from .config import AdapterConfig


@dataclass
class State:
    """The switches of an injected model: one object, which the model keeps and its adapted layers read.

    Attributes:
        configs: the options of each adapter.
        active: the adapter that computes and trains, or None. One that is merged stays active, so no other field says
            which adapter the merged layers hold.
        disabled: True while all adapters are switched off.
        was_trainable: names of the parameters that trained before the first adapter.
    """

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    active: str | None = None
    disabled: bool = False
    was_trainable: list[str] = field(default_factory=list)
