"""``PatchedLayer``: a patched layer prints the name that PEFT's class has, and a mark of ours behind it.

PEFT takes a layer's kind from what it prints (``get_layer_status``), so a name of ours would be a new kind.
"""

from __future__ import annotations

from torch import nn


class PatchedLayer(nn.Module):
    """The first base of each class that a patched layer gets, PEFT's own class being the next one.

    It prints as ``lora.Linear(`` with the line ``forward=fastlora``, for a class whose next base is PEFT's ``Linear``.
    """

    def _get_name(self) -> str:
        kinds = type(self).__mro__
        ours = next(kind for kind in kinds if kind.__module__.startswith(f"{__package__}."))
        theirs = kinds[kinds.index(PatchedLayer) + 1]
        # A wrapper such as fully_shard writes a word before the name.
        return type(self).__name__.replace(ours.__name__, theirs.__name__)

    def extra_repr(self) -> str:
        """The line inside ``lora.Linear(...)`` when printed."""
        return ", ".join(filter(None, (super().extra_repr(), "forward=fastlora")))
