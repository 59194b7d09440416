"""Mistyped names: which of the known ones may have been meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# Of letters in common: "bfloat16" is as near to "bf16" as "peft" to "peft-same".
_NEAR, _MOST = 0.6, 3


def suggestion(wanted: str, names: Iterable[str]) -> str:
    """Writes ``did you mean A or B? ``, of names that hold the wanted one, else of those spelt alike; else nothing."""
    known = list(names)
    holding = [name for name in known if wanted and wanted in name]
    near = holding[:_MOST] or get_close_matches(wanted, known, _MOST, _NEAR)
    return f"did you mean {' or '.join(near)}? " if near else ""
