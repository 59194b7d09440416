"""``python -m benchmarks compare A B``: finds what became slower, faster, larger or broken from run A to run B.

A is before, B is after. Both are result files, or one is a git revision, which stands for the other's path as committed
there; what exists as a file is a file. A row regresses in one of three ways. Broken: it was ok and is not any more.
Slower: its median exceeds the one before by more than the band, the p20-p80 ranges do not overlap, and the machine did
not stall: the repeats of neither differ more than twofold. Larger: a
layer's kept or peak bytes, or a model's peak bytes, grew by more than 1 %: memory is counted, not timed. The reverse of
each is an improvement. The band is the largest of --threshold and twice the noise of either run, which is the row's own
or, if larger, the median over the run: two timings may agree by luck. Runs on different days drift as a whole: --by
ratio compares layers' times over the frozen floor of the same run, ranges scaled alike, and no band is then narrower
than the floor itself moved there: a shared processor slows a chain of small calls by another factor than one GEMM. Exit
status: 0 nothing regressed, 1 something did, 2 the two cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..cases import FLOOR, MODES, Case
from ..measure.runner import StopError, add_arm_option, number, positive
from ..names import suggestion
from ..records.environment import Environment, differences
from ..records.files import parse
from ..records.rows import LayerRow, Measured, Spread
from ..records.units import geometric_mean, readable_bytes
from ..records.verdict import STALLED, steady
from .states import states

HELP = "compare two result files, or one with what was committed; regressions end with exit status 1"

REGRESSION, IMPROVEMENT, NOTE = "regression", "improvement", "note"
_GROWTH = 0.01

# Parts of the environment that are printed where they differ; the commit is in the heading.
_MATTERS: tuple[str, ...] = ("command", "device", "device_name", "gpu", "cpu", "cpu_count", "threads")
_MATTERS += ("python", "packages", "flags", "variables")


class Side(NamedTuple):
    """One of the two runs: its rows by their keys, each with the name of its case, and the median of their noise."""

    name: str
    environment: Environment
    finished: int
    rows: dict[tuple[object, ...], tuple[str, Measured]]
    noise: float

    def without(self, other: Side) -> list[tuple[str, Measured]]:
        """The rows that the other run does not have."""
        return [named for key, named in self.rows.items() if key not in other.rows]


@dataclass
class Pair:
    """One row of both runs: its times, and the findings, each with its verdict."""

    case: str
    mode: str
    arm: str
    status: tuple[str, str]
    before: Spread | None
    after: Spread | None
    band: float
    found: list[tuple[str, str]] = field(default_factory=list)

    @property
    def speedup(self) -> float | None:
        """Before over after; None unless both were measured."""
        return self.before.p50 / self.after.p50 if self.before and self.after else None

    @property
    def shift(self) -> float:
        """The distance of the slower median from the faster one, relative; 0 unless both were measured."""
        return max(self.speedup, 1 / self.speedup) - 1 if self.speedup else 0.0

    @property
    def verdict(self) -> str | None:
        """REGRESSION where anything got worse, else IMPROVEMENT where anything got better."""
        verdicts = {verdict for verdict, _ in self.found}
        return next((verdict for verdict in (REGRESSION, IMPROVEMENT) if verdict in verdicts), None)

    @property
    def unmeasured(self) -> bool:
        """True where it had no numbers and still has none."""
        return self.status[0] == self.status[1] != "ok"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument("before", metavar="A", help="before: a result file, or a git revision where B is a file")
    parser.add_argument("after", metavar="B", help="after: a result file, or a git revision where A is a file")
    parser.add_argument("--by", choices=("time", "ratio"), default="time", help="ratio: times over the frozen floor's")
    parser.add_argument(
        "--threshold", type=_percent, default=0.05, metavar="PERCENT", help="the least change of time that counts (5)"
    )
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="only these, or these models")
    parser.add_argument("--rank", nargs="+", type=positive, metavar="R", help="only these")
    add_arm_option(parser, "only these")
    parser.add_argument("--mode", nargs="+", choices=MODES, help="only these; what a model does is a step")
    parser.add_argument("--only-changes", action="store_true", help="print regressions and improvements alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the comparison here (JSON Lines)")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status.

    Raises:
        StopError: the two cannot be compared.
    """
    whole = _side(args.before, args.after), _side(args.after, args.before)
    rows = [row for side in whole for _, row in side.rows.values()]
    for option, facet in _FACETS.items():
        known = dict.fromkeys(str(facet(row)) for row in rows)
        if unknown := [str(value) for value in getattr(args, option) or () if str(value) not in known]:
            expected = f"{suggestion(unknown[0], known)}expected of {', '.join(known)}"
            raise StopError(2, f"--{option} {' '.join(unknown)}: in neither run; {expected}")
    layers = all(isinstance(row, LayerRow) for row in rows)
    if args.by == "ratio" and not layers:
        raise StopError(2, "--by ratio: only layers have a frozen floor; leave it out to compare models by time")
    floor = [pair for pair in _pairs(*whole, "time", args.threshold) if layers and pair.arm == FLOOR]
    before, after = (_select(side, args) for side in whole)
    pairs = _pairs(before, after, args.by, args.threshold, floor if args.by == "ratio" else ())
    if not pairs:
        raise StopError(2, f"{before.name} and {after.name} have no row in common, or none that was asked for")
    if args.json:
        _write(args, before, after, pairs)
    shown = [pair for pair in pairs if pair.verdict or not (args.only_changes or pair.unmeasured)]
    lines = [_heading("before", before), _heading("after", after), *_table(shown, args.by)]
    if unmeasured := sum(pair.unmeasured for pair in pairs):
        lines.append(f"rows without numbers in either: {unmeasured}")
    lines += [*_alone("before", before, after), *_alone("after", after, before)]
    old, new = ({name: side.environment.get(name) for name in _MATTERS} for side in whole)
    if differing := differences(old, new):
        lines.append(f"environment: {_first(differing, 10)}")
    timed = ([row for _, row in side.rows.values() if row.ms is not None] for side in whole)
    lines += [
        *_drift(floor, args.by),
        *states(timed, [side.environment for side in whole], layers and args.by == "time"),
    ]
    print("\n".join([*lines, _summary(pairs)]))
    return 1 if any(pair.verdict == REGRESSION for pair in pairs) else 0


def _percent(text: str) -> float:
    value = number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value / 100


def _side(name: str, other: str) -> Side:
    label, content = _content(name, other)
    try:
        results = parse(content, label)
    except ValueError as error:
        expected = "expected what `python -m benchmarks layers --json` writes at this version"
        raise StopError(2, f"{error}; {expected}") from None
    rows = {row.key: (case, row) for case, rows in results.cases.items() for row in rows if isinstance(row, Measured)}
    if not rows:
        raise StopError(2, f"{label} has no finished case of a layer or a model: there is nothing to compare")
    noise = statistics.median([row.noise for _, row in rows.values() if row.noise is not None] or [0.0])
    return Side(label, results.environment, len(results.cases), rows, noise)


def _content(name: str, other: str) -> tuple[str, bytes]:
    """A file's name and bytes; where there is no such file, those of ``other`` as committed at that revision."""
    twin = Path(other)
    try:
        if Path(name).is_file():
            return name, Path(name).read_bytes()
        if not twin.is_file():
            raise StopError(2, f"neither {name} nor {other} is a file: expected two of them, or one and a revision")
        neither = f"{name} is neither a file nor a git revision where {other} lies"
        commit = _git(twin, neither, "rev-parse", "--verify", f"{name}^{{commit}}").decode().strip()
        missing = f"{other} is not committed at {name}, as local results never are: give the file of an earlier run"
        return f"{other} at {name}", _git(twin, missing, "show", f"{commit}:./{twin.name}")
    except OSError as error:
        raise StopError(2, f"{name} cannot be read: {error}") from None


def _git(file: Path, otherwise: str, *arguments: str) -> bytes:
    """Standard output of git in the file's folder; where it fails, its words after ours."""
    done = subprocess.run(["git", *arguments], capture_output=True, cwd=file.parent, check=False)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        # What git says of a path that it has not is longer, and of its own terms.
        raise StopError(2, otherwise if arguments[0] == "show" else f"{otherwise} (git: {words})")
    return done.stdout


def _select(side: Side, args: argparse.Namespace) -> Side:
    asked = [(facet, getattr(args, option)) for option, facet in {**_FACETS, "mode": _mode}.items()]

    def wanted(row: Measured) -> bool:
        return all(facet(row) in values for facet, values in asked if values)

    return side._replace(rows={key: named for key, named in side.rows.items() if wanted(named[1])})


def _mode(row: Measured) -> str:
    return row.mode if isinstance(row, LayerRow) else "step"


# The options that select rows, and the value of each in a row.
_FACETS: dict[str, Callable[[Measured], Any]] = {
    "layer": lambda row: row.case.layer if isinstance(row.case, Case) else row.case.model,
    "rank": lambda row: row.case.r,
    "arm": lambda row: row.arm,
}


def _pairs(before: Side, after: Side, by: str, threshold: float, floor: Sequence[Pair] = ()) -> list[Pair]:
    """Every row that both have, judged, in the order of ``after``."""
    drift = {(pair.case, pair.mode): pair.shift for pair in floor}
    pairs = []
    for key, (case, new) in after.rows.items():
        if key in before.rows:
            _, old = before.rows[key]
            noise = max(before.noise, after.noise, old.noise or 0.0, new.noise or 0.0)
            band = max(threshold, 2 * noise, drift.get((case, _mode(new)), 0.0))
            spreads = _spread(old, new, by), _spread(new, old, by)
            pairs.append(Pair(case, _mode(new), new.arm, (old.status, new.status), *spreads, band))
            _judge(pairs[-1], old, new)
    return pairs


def _spread(row: Measured, other: Measured, by: str) -> Spread | None:
    """The time of a row to compare: the device's only where the other row has it, too."""
    if row.ms is None or not (isinstance(row, LayerRow) and isinstance(other, LayerRow)):
        return row.ms
    if by == "ratio":
        return None if row.ratio is None else Spread(*(row.ratio * ms / row.ms.p50 for ms in row.ms))
    return row.wall_ms if other.wall_ms and not other.device_ms else row.ms


def _judge(pair: Pair, old: Measured, new: Measured) -> None:
    """Compares status, time and memory, and keeps the findings."""
    if old.status != new.status:
        verdict = REGRESSION if old.status == "ok" else IMPROVEMENT if new.status == "ok" else NOTE
        pair.found.append((verdict, f"{old.status} → {new.status}" + (f": {new.reason}" if new.reason else "")))
        return
    if pair.shift > pair.band and pair.before and pair.after:
        slower = pair.after.p50 > pair.before.p50
        low, high = (pair.before, pair.after) if slower else (pair.after, pair.before)
        what = "slower" if slower else "faster"
        if not (steady(old) and steady(new)):
            pair.found.append((NOTE, f"{what}, but {STALLED}"))
        elif high.p20 > low.p80:
            pair.found.append((REGRESSION if slower else IMPROVEMENT, what))
        else:
            pair.found.append((NOTE, f"{what}, but the ranges overlap"))
    for name in ("kept_bytes", "peak_bytes"):
        was, now = getattr(old, name, None), getattr(new, name, None)
        if was is not None and now is not None and max(was, now) > (1 + _GROWTH) * min(was, now):
            verdict = REGRESSION if now > was else IMPROVEMENT
            pair.found.append((verdict, f"{name} {readable_bytes(was)} → {readable_bytes(now)}"))


def _speedups(pairs: Sequence[Pair]) -> dict[str, float]:
    """Each arm's geometric mean, of the rows that were measured in both."""
    groups: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.speedup is not None:
            groups.setdefault(pair.arm, []).append(pair.speedup)
    return {name: geometric_mean(group) for name, group in groups.items()}


def _write(args: argparse.Namespace, before: Side, after: Side, pairs: Sequence[Pair]) -> None:
    """Writes the comparison as JSON Lines: its settings, a record per row, and the speed-up of each arm."""
    if args.json.resolve() in (Path(args.before).resolve(), Path(args.after).resolve()):
        raise StopError(2, f"--json {args.json} is one of the two that are compared: expected another path")
    header = {"before": before.name, "after": after.name, "by": args.by, "threshold": args.threshold}
    records = [{"record": "comparison", **header, "environment": differences(before.environment, after.environment)}]
    for pair in pairs:
        spreads = {"before": pair.before and pair.before._asdict(), "after": pair.after and pair.after._asdict()}
        derived = {"speedup": pair.speedup, "verdict": pair.verdict}
        records.append({"record": "pair", **vars(pair), **spreads, **derived})
    for which, side, other in (("before", before, after), ("after", after, before)):
        for case, row in side.without(other):
            only = {"case": case, "mode": _mode(row), "arm": row.arm, "status": row.status}
            records.append({"record": "only", "in": which, **only})
    records.append({"record": "speedups", **_speedups(pairs)})
    try:
        args.json.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    except OSError as error:
        raise StopError(2, f"--json {args.json} cannot be written: {error}") from None


def _heading(which: str, side: Side) -> str:
    commit, total = str(side.environment.get("commit"))[:7], side.environment.get("cases")
    dirty = " and uncommitted changes" if side.environment.get("dirty") else ""
    cases = f"{side.finished} of {total} cases{'' if side.finished == total else ': it was cut short'}"
    return f"{which:<6}  {side.name}, {side.environment.get('time')}, commit {commit}{dirty}, {cases}"


def _table(pairs: Sequence[Pair], by: str) -> list[str]:
    unit = "ms" if by == "time" else "× floor"
    lines: list[tuple[str, ...]] = [("case", "mode", "arm", f"before {unit}", f"after {unit}", "speed-up", "band", "")]
    for pair in pairs:
        spreads = ("-" if spread is None else f"{spread.p50:.4f}" for spread in (pair.before, pair.after))
        speedup = "-" if pair.speedup is None else f"{pair.speedup:.2f}"
        found = "; ".join(what for _, what in sorted(pair.found, key=lambda item: item[0] == NOTE))
        mark = f"{pair.verdict.upper()}: {found}" if pair.verdict else found
        lines.append((pair.case, pair.mode, pair.arm, *spreads, speedup, f"±{pair.band:.1%}", mark))
    formats = [f"{a}{max(map(len, cells))}" for a, cells in zip("<<<>>>><", zip(*lines, strict=True), strict=True)]
    return ["", *("  ".join(map(format, line, formats)).rstrip() for line in lines), ""] if pairs else []


def _alone(which: str, side: Side, other: Side) -> list[str]:
    """Counts the rows of one run alone: by case where the other has nothing of it, else by arm."""
    common = {case for case, _ in other.rows.values()}
    names = Counter(row.arm if case in common else case for case, row in side.without(other))
    named = [f"{name} ({count})" for name, count in names.items()]
    return [f"rows only {which}: {names.total()}: {_first(named, 5)}"] if names else []


def _first(names: Sequence[str], most: int) -> str:
    return "; ".join([*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])])


def _drift(floor: Sequence[Pair], by: str) -> list[str]:
    """A remark where the floor moved: it has no kernel of ours, so the machine changed, or torch."""
    moved = sum(pair.shift > pair.band for pair in floor)
    if not moved:
        return []
    where = f"{moved} of {len(floor)} cases and modes (speed-up {_speedups(floor)[FLOOR]:.2f} over all)"
    remedy = "--by ratio is the fair comparison" if by == "time" else "the bands there are as wide as it moved"
    return [f"the frozen floor itself moved by more than noise in {where}: {remedy}"]


def _summary(pairs: Sequence[Pair]) -> str:
    verdicts = Counter(pair.verdict for pair in pairs)
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in _speedups(pairs).items())
    counts = f"regressions: {verdicts[REGRESSION]}, improvements: {verdicts[IMPROVEMENT]}, rows: {len(pairs)}"
    return f"{counts}; geometric mean of speed-ups: {means or 'no row was measured in both'}"
