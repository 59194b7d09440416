"""Whether two runs saw their machines in one state: by how repeats spread, where they stalled, and the loads."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from ..records.environment import Environment
from ..records.rows import Measured
from ..records.verdict import STALLED, steady

# One state: repeats spread alike, or narrowly, and loads differ by less than this part of the cores.
_WIDE, _LOAD = 0.1, 0.5


def states(timed: Iterable[Sequence[Measured]], environments: Sequence[Environment], has_floor: bool) -> list[str]:
    """A remark where the states differ; none where they do not.

    Args:
        timed: the rows with times, of the run before and of the one after.
        environments: of both.
        has_floor: whether times over the frozen floor are another way to compare them.
    """
    rows = list(timed)
    stalls = [sum(not steady(row) for row in group) for group in rows]
    spreads = [_typical_spread(group) for group in rows]
    loads = [_load(environment) for environment in environments]
    said = []
    if any(stalls):
        said.append(f"rows in which {STALLED} {stalls[0]} → {stalls[1]}")
    if max(spreads) > max(_WIDE, 2 * min(spreads)):
        said.append(f"repeats spread by {spreads[0]:.0%} → {spreads[1]:.0%}")
    parts = [load / cores for load, cores in loads if load is not None]
    if len(parts) == len(loads) and abs(parts[0] - parts[1]) > _LOAD:
        said.append("load " + " → ".join(f"{load:.1f} on {cores} cores" for load, cores in loads))
    if not said:
        return []
    remedy = "measure again while nothing else runs" + (", or compare --by ratio" if has_floor else "")
    return [f"the machines were in different states ({', '.join(said)}): {remedy}"]


def _load(environment: Environment) -> tuple[float | None, int]:
    """The load when the run began, and the number of cores."""
    return environment.get("load_average"), environment.get("cpu_count") or 1


def _typical_spread(rows: Sequence[Measured]) -> float:
    """The median over the rows of p20 to p80, relative to the median time."""
    return statistics.median([(row.ms.p80 - row.ms.p20) / row.ms.p50 for row in rows if row.ms] or [0.0])
