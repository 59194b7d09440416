"""Which kernel wins at a size: by rounds in which each was timed, beyond the noise that the run itself shows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Of its rounds a winner is ahead in so many; of twenty, equal code is in 18 or more once in five thousand times.
_ROUNDS = 0.9

# And by so much at least, whatever the noise was.
_LEAST = 0.02


class Winner(NamedTuple):
    """The kernel that is faster than the rule's, or None; ``ahead`` is the next one's median over its own, else 1."""

    kernel: str | None
    ahead: float


def winner(samples: Mapping[str, Sequence[float]], rule: str, again: Sequence[float]) -> Winner:
    """The fastest kernel, where it beats the rule's in nine of ten rounds and by more than the noise.

    The noise is how far the rule's kernel, timed twice a round, is from itself.

    Args:
        samples: times of each kernel, one a round, the rule's among them.
        rule: the kernel to beat.
        again: the other times of that one.
    """
    medians = {kernel: statistics.median(times) for kernel, times in samples.items()}
    noise = abs(statistics.median(b / a for a, b in zip(samples[rule], again, strict=True)) - 1)
    # The fastest by its median may be a fitful one, and the next one steady.
    for kernel in sorted(medians, key=lambda kernel: medians[kernel]):
        if kernel == rule:
            break
        ratios = [slow / fast for slow, fast in zip(samples[rule], samples[kernel], strict=True)]
        often = sum(ratio > 1 for ratio in ratios) >= _ROUNDS * len(ratios)
        if often and statistics.median(ratios) - 1 > max(noise, _LEAST):
            following = min(m for other, m in medians.items() if other != kernel and m >= medians[kernel])
            return Winner(kernel, round(following / medians[kernel], 4))
    return Winner(None, 1.0)
