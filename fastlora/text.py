"""Writes values, names and dtypes into messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Writes a dtype without ``torch.``: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


# Names that several libraries give to classes of their own.
_COMMON = frozenset({"Conv1D", "Linear", "Linear4bit", "Linear8bitLt", "Parameter", "Tensor"})


def class_name(value: object) -> str:
    """Writes the class of a value; with its module, where the bare name is that of another class too."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ in _COMMON else kind.__name__


def with_article(name: str) -> str:
    """Writes ``a`` or ``an`` before the name of a class."""
    return f"{'an' if name[:1] in 'AEIO' else 'a'} {name}"


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


def nearest(wanted: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The ends of names that come nearest to a mistyped one, best first; none where all are far.

    Ends of as many parts as it has, with stars for their numbers where these are not what differs; else last parts.
    """
    names = list(names)
    wanted = re.sub(r"\\(.)", r"\1", wanted)  # of a regular expression, the letters
    if "." in wanted:
        depth = wanted.count(".") + 1
        ends = list(dict.fromkeys(".".join(name.split(".")[-depth:]) for name in names))
        stars = list(dict.fromkeys(map(starred, ends)))
        found = difflib.get_close_matches(starred(wanted), stars, most)
        if found[:1] == [starred(wanted)]:
            found = difflib.get_close_matches(wanted, ends, most)
        if found:
            return found
    lasts = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return difflib.get_close_matches(wanted.rpartition(".")[2], lasts, most)


def suggestion(wanted: str, names: Iterable[str]) -> str:
    """Writes which names may have been meant: ``did you mean q_proj or k_proj?``, or which there are."""
    names = list(names)
    if found := nearest(wanted, names):
        return f"did you mean {' or '.join(found)}?"
    return f"there are {shown_names(names) or 'none'}"
