"""Real text as bytes: Python's own sources and reference by default, any file by choice."""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MOST_BYTES = 32 << 20
HELD_OUT = 0.1


class TextError(Exception):
    """A text that cannot be trained on; the message says why."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text split into a part to learn from and an end to be judged on, both uint8 [bytes]."""

    name: str
    train: Tensor
    held_out: Tensor
    sha256: str

    @classmethod
    def of(cls, name: str, content: bytes, context: int) -> Text:
        """Splits ``content``.

        Raises:
            TextError: too short to hold one window of ``context`` + 1 bytes on each side of the split.
        """
        needed = round((context + 1) / HELD_OUT) + 1
        if len(content) < needed:
            raise TextError(f"{name} holds {len(content):,} bytes: a context of {context} needs at least {needed:,}")
        content = content[:MOST_BYTES]
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        train, held_out = data.tensor_split([len(data) - int(len(data) * HELD_OUT)])
        return cls(name, train, held_out, hashlib.sha256(content).hexdigest())

    def to(self, device: torch.device) -> Text:
        """The same text on ``device``."""
        return Text(self.name, self.train.to(device), self.held_out.to(device), self.sha256)

    def batches(self, context: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
        """``steps`` batches of windows drawn at random: int64 [batch, context + 1], the same for the same seed."""
        windows = self.train.unfold(0, context + 1, 1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            first = torch.randint(len(windows), (batch,), generator=generator)
            yield windows[first.to(windows.device)].long()

    def held_out_batches(self, context: int, batch: int, count: int) -> Iterator[Tensor]:
        """Up to ``count`` batches of windows spread evenly over the held-out end."""
        windows = self.held_out.unfold(0, context + 1, context + 1)
        spread = windows[:: max(1, len(windows) // (count * batch))][: count * batch]
        for first in range(0, len(spread), batch):
            yield spread[first : first + batch].long()


def read(path: Path, context: int) -> Text:
    """The text of a file, whatever its encoding: bytes are what the model reads.

    Raises:
        TextError: the file is missing, unreadable or too short.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    return Text.of(str(path), content, context)


def python_sources(context: int) -> Text:
    """The standard library's top-level modules, in alphabetical order."""
    folder = Path(sysconfig.get_path("stdlib"))
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    try:
        return Text.of("Python sources", content, context)
    except TextError as error:
        raise TextError(f"no standard library sources in {folder} ({error}): name a file with --text") from None


def python_reference(context: int) -> Text:
    """The Python language reference, in English, as ``help()`` ships it.

    Raises:
        TextError: this Python comes without it.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise TextError("this Python comes without pydoc_data.topics: name a file with --adapt-text") from error
    return Text.of("Python reference", "\n".join(topics[name] for name in sorted(topics)).encode(), context)
