"""The clock: wall time and device time of a call, and the order in which arms take turns.

Wall time is one call on a quiet device, until the device is done. Device time, on CUDA alone, lies between two events:
L2 is flushed before, and the stream is held back until the host has queued the whole call, so that gaps between
launches do not count.
"""

from __future__ import annotations

import functools
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Work = Callable[[], object]

# How long the stream is held at first, about three milliseconds at 1.8 GHz, and at most.
_HOLD_CYCLES, _LONGEST_HOLD = 5_000_000, 40_000_000


@dataclass
class Hold:
    """For how many cycles the stream is held before the calls of one subject.

    Each subject has its own: a call of a thousand launches needs a long one, and every sample waits for its hold.
    """

    cycles: int = _HOLD_CYCLES


class Clock:
    """The two times of a call on one device, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"

    @functools.cached_property
    def _flush(self) -> Tensor:
        """Larger than L2: writing it leaves nothing else there. Made on first use, since it takes memory."""
        l2_bytes = torch.cuda.get_device_properties(self._device).L2_cache_size
        return torch.empty(max(4 * l2_bytes, 1 << 28), dtype=torch.int8, device=self._device)

    def wall(self, work: Work) -> float:
        """Times one call, from its start until the device is done. Its result is freed after the clock stops."""
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        if self._cuda:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        del result
        return 1e3 * elapsed

    def device(self, work: Work, hold: Hold) -> float | None:
        """Times one call on the GPU; None on a CPU, and where the host queued it too late: the hold is longer then.

        A call that waits for the GPU itself is always late; once the hold is longest, its time counts with its gaps.
        """
        if not self._cuda:
            return None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(hold.cycles)
        start.record()
        result = work()
        late = start.query()
        end.record()
        torch.cuda.synchronize()
        del result
        if late and hold.cycles < _LONGEST_HOLD:
            hold.cycles *= 2
            return None
        return float(start.elapsed_time(end))


def shuffled(arms: Sequence[T], turn: int) -> list[T]:
    """Every arm once, in an order of the turn's own: none always first, and none always behind the same neighbour.

    Caches hold the data of the arm before: behind full fine-tuning and its weight gradient the same code was seen up to
    6 % slower.
    """
    return random.Random(turn).sample(arms, len(arms))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps Python's collector out of the clock."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
