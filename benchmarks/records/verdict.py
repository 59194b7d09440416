"""Whether one arm beats another, judged by what the run itself saw: the spread of repeats, the overlap of ranges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .rows import LayerRow, Measured
from .units import geometric_mean

# Quiet runs spread by a tenth to two fifths between p20 and p80, one that shares its processors by several times.
_STALLED = 2.0

STALLED = "the machine stalled"


def steady(row: Measured) -> bool:
    """False where the repeats of one arm differ more than twofold: no code does that, a busy machine does."""
    return row.ms is None or row.ms.p80 <= _STALLED * row.ms.p20


def stalled(rows: Iterable[Measured]) -> list[str]:
    """The cases of which a step was not steady, in the order of the rows."""
    return list(dict.fromkeys(str(row.case) for row in steps(rows) if not steady(row)))


def steps(rows: Iterable[Measured]) -> list[Measured]:
    """The rows of whole steps: a layer has other modes beside it."""
    return [row for row in rows if not isinstance(row, LayerRow) or row.mode == "step"]


class Duel(NamedTuple):
    """Two arms in one case, both measured."""

    ours: Measured
    theirs: Measured

    @property
    def gain(self) -> float:
        """Their median over ours."""
        return self.theirs.median / self.ours.median

    @property
    def steady(self) -> bool:
        """True where the repeats of both agree."""
        return steady(self.ours) and steady(self.theirs)

    @property
    def apart(self) -> bool:
        """True where the ranges p20 to p80 do not overlap, and the medians differ by more than one arm from itself."""
        slow, fast = (self.theirs, self.ours) if self.gain > 1 else (self.ours, self.theirs)
        assert slow.ms is not None
        assert fast.ms is not None
        noise = max(slow.noise or 0.0, fast.noise or 0.0)
        return slow.ms.p20 > fast.ms.p80 and max(self.gain, 1 / self.gain) - 1 > noise


def duels(rows: Iterable[Measured], ours: str, theirs: str) -> list[Duel]:
    """The steps of two arms, for each case that has both."""
    timed = {(row.case, row.arm): row for row in steps(rows) if row.status == "ok" and row.ms is not None}
    return [
        Duel(row, timed[case, theirs]) for (case, arm), row in timed.items() if arm == ours and (case, theirs) in timed
    ]


def verdict(found: Sequence[Duel]) -> str:
    """The mean gain over the steady cases, in how many ours is faster, slower or neither, and the worst one.

    Without a steady case there is none, and it says why.
    """
    judged = [duel for duel in found if duel.steady]
    if not judged:
        return f"no verdict: {STALLED} in all of {len(found)}"
    faster = sum(duel.apart and duel.gain > 1 for duel in judged)
    slower = sum(duel.apart and duel.gain < 1 for duel in judged)
    worst = min(judged, key=lambda duel: duel.gain)
    counts = f"faster in {faster}, slower in {slower}, within noise in {len(judged) - faster - slower}"
    left_out = f"; {STALLED} in {len(found) - len(judged)} more" if len(found) > len(judged) else ""
    mean = geometric_mean([duel.gain for duel in judged])
    return f"{mean:.2f} ({counts}; worst {worst.gain:.2f}{'' if worst.apart else ', within noise'}{left_out})"
