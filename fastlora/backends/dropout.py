"""The dropout mask: a pure function of (seed, row, column), never stored, the same bits on every backend and device.

One Philox4x32-7 call (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") decides eight
neighbouring columns. With seed = (key, offset), two 64-bit integers:

    words[0..3] = philox(key, counter=(column // 8, row, offset low, offset high))
    lane        = the signed 16-bit half (column % 8) of the words, low half first
    keep        = lane >= threshold,  threshold = round(65536 p) - 32768

so p is realised to 1/65536, and D(x) = keep ⊙ x / (1 - realised p).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLUMNS_PER_CALL = 8
ROUNDS = 7
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


# Elements whose bits are made at a time: on a CPU about what a core's caches hold, on a GPU enough to fill it.
_CHUNK = {"cpu": 1 << 18}
_CHUNK_DEFAULT = 1 << 24


def draw_seed(device: torch.device) -> Tensor:
    """Draws (key, offset) int64 [2], 63 bits each, from the device's generator: ``manual_seed`` replays it."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Dropout:
    """One layer's dropout in one step.

    Args:
        p: probability of dropping, 0 <= p < 1.
        seed: int64 [2] on the device of the masked tensor, from :func:`draw_seed`.
    """

    p: float
    seed: Tensor

    @property
    def drop_lanes(self) -> int:
        """How many of the 65536 lane values drop."""
        return min(round(self.p * 65536), 65535)

    @property
    def threshold(self) -> int:
        """The smallest signed 16-bit lane that keeps."""
        return self.drop_lanes - 32768

    @property
    def rescale(self) -> float:
        """1 / (1 - p), with p as realised."""
        return 65536 / (65536 - self.drop_lanes)

    def keep(self, rows: int, columns: int, first_row: int = 0) -> Tensor:
        """The mask itself: bool [rows, columns] for the rows from ``first_row`` on."""
        return self.bits(first_row, rows, columns).bool()

    def at_once(self, x: Tensor) -> bool:
        """True where all of x [M, C] is one chunk."""
        return x.numel() <= _chunk(x.device.type)

    def chunks(self, x: Tensor) -> Iterator[slice]:
        """The rows of x [M, C], a few at a time, so that no masked copy of all of x need exist."""
        m, columns = x.shape
        step = max(1, _chunk(x.device.type) // max(columns, 1))
        for first in range(0, m, step):
            yield slice(first, min(first + step, m))

    def bits(self, first_row: int, rows: int, columns: int) -> Tensor:
        """int16 [rows, columns]: all bits set where kept, none where dropped."""
        if self.seed.is_cpu:
            key, offset = self.seed.tolist()
            return _bits_on_cpu(key, offset, self.threshold, first_row, rows, columns)
        return _bits(self.seed[0], self.seed[1], self.threshold, first_row, rows, columns, self.seed.device)


def _chunk(device_type: str) -> int:
    return _CHUNK[device_type] * torch.get_num_threads() if device_type == "cpu" else _CHUNK_DEFAULT


def _bits(
    key: Tensor | int,
    offset: Tensor | int,
    threshold: int,
    first_row: int,
    rows: int,
    columns: int,
    device: torch.device,
) -> Tensor:
    calls = -(-columns // COLUMNS_PER_CALL)
    row = torch.arange(first_row, first_row + rows, device=device).unsqueeze(1)
    call = torch.arange(calls, device=device).unsqueeze(0)
    words = _philox(call, row, offset & _LOW, (offset >> 32) & _LOW, key & _LOW, (key >> 32) & _LOW)
    low = words[0] | (words[1] << 32)
    high = words[2] | (words[3] << 32)
    lanes = torch.stack((low, high), dim=-1).view(torch.int16).flatten(1)
    return lanes.ge_(threshold).neg_()[:, :columns]


@functools.lru_cache(maxsize=8)
def _bits_on_cpu(key: int, offset: int, threshold: int, first_row: int, rows: int, columns: int) -> Tensor:
    # A pure function of numbers, so the backward, which masks both dx and x, may find the last few chunks here.
    return _bits(key, offset, threshold, first_row, rows, columns, torch.device("cpu"))


def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Tensor, ...]:
    """Philox4x32 on 32-bit values in int64 tensors or plain ints; broadcasting keeps the first rounds narrow."""
    for _ in range(ROUNDS):
        product0 = c0 * _MULTIPLIER[0]
        product1 = c2 * _MULTIPLIER[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & _LOW
        c1 = product1 & _LOW
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _LOW
        c3 = product0 & _LOW
        k0 = (k0 + _KEY_STEP[0]) & _LOW
        k1 = (k1 + _KEY_STEP[1]) & _LOW
    return c0, c1, c2, c3
