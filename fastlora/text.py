"""Writes values, names and dtypes into messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Writes a dtype without ``torch.``: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def shown(value: Any, most: int = 80) -> str:
    """Writes a value as Python does, cut after ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def starred(name: str) -> str:
    """Writes stars for the numbers in a name, so that all layers of a stack look alike: ``layers.*.q_proj``."""
    return re.sub(r"\d+", "*", name)


def listed(names: Iterable[str], most: int = 3) -> str:
    """Writes the first ``most`` names and the number of the others: ``q, k and 5 more``."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown_names(names: Iterable[str]) -> str:
    """Writes names of layers with stars, each once, at most twelve."""
    return listed(dict.fromkeys(map(starred, names)), most=12)
