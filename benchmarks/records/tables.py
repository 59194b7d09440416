"""Parts that several tables share: speed-ups, times with their spread, reasons of absence."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from .rows import Measured, Spread
from .units import geometric_mean
from .verdict import STALLED, stalled

M = TypeVar("M", bound=Measured)

# Columns of the screen.
WIDTH = 120

# Widths of a time with its spread, and of a number of bytes.
TIME, BYTES = 13, 11

# Adapters in the base's dtype; each as it comes (ours in the base's dtype, theirs in float32); float32 on both sides;
# layers together and one after the other; DoRA beside LoRA.
PAIRS = (
    ("fastlora", "peft-same"),
    ("fastlora", "peft-fp32"),
    ("fastlora-fp32", "peft-fp32"),
    ("fastlora", "fastlora-alone"),
    ("fastlora-lora", "fastlora"),
)


# Arms that leave the choice of the kernel to fastlora.
_CHOOSING = ("fastlora", "fastlora-alone", "fastlora-fp32", "fastlora-lora")


def quotients(rows: Sequence[M], over: str, under: str, value: Callable[[M], float | None]) -> list[float]:
    """A value of one arm over that of another, for each case that has both."""
    known = {(row.case, row.arm): number for row in rows if row.status == "ok" and (number := value(row))}
    return [
        number / known[case, under] for (case, arm), number in known.items() if arm == over and (case, under) in known
    ]


def milliseconds(value: float) -> str:
    """At least three digits, and no more than a tenth of a microsecond."""
    return f"{value:.{4 if value < 0.1 else 3 if value < 10 else 1}f}"


def timing(ms: Spread) -> str:
    """The median, and half of the range p20 to p80 relative to it."""
    half = (ms.p80 - ms.p20) / (2 * ms.p50)
    return f"{milliseconds(ms.p50):>{TIME - 5}}{f'±{half:.0%}' if half < 9.995 else '>999%':>5}"


def two_digits(value: float | None) -> str:
    """A ratio; a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def kernels(rows: Sequence[Measured]) -> list[str]:
    """Names the kernels that fastlora chose, with the arms that leave the choice to it."""
    chosen = {row.arm: row.kernel for row in rows if row.kernel and row.arm in _CHOOSING}
    return [f"kernel {kernel} ({', '.join(arms)})" for kernel, arms in _turned(chosen.items()).items()]


def opening(legend: str, absent: Mapping[str, str]) -> str:
    """The text before the first case: the columns, and the arms that take part in none, with the reason of each."""
    return "\n".join([legend, *_absences("absent", absent.items()), ""])


def closing(summary: str, rows: Sequence[Measured], absent: Mapping[str, str]) -> str:
    """The text behind the last case: the arms that were absent from some cases alone, then the verdict."""
    others = [(row.arm, row.reason) for row in rows if row.status == "absent" and row.arm not in absent]
    return "\n".join([*_absences("absent from some cases", others), *filter(None, [summary])])


def memory(rows: Sequence[M], ours: str, theirs: str, what: str, value: Callable[[M], float | None]) -> list[str]:
    """A number of bytes of ``ours`` over that of ``theirs``: mean and worst case; nothing where neither has it."""
    found = quotients(rows, ours, theirs, value)
    return [f"{what} {geometric_mean(found):.2f} (worst {max(found):.2f})"] if found else []


def warning(rows: Sequence[Measured]) -> list[str]:
    """A line where the machine stalled, to stand beside the verdict."""
    found = stalled(rows)
    if not found:
        return []
    return [
        wrapped(
            f"  {STALLED} in {len(found)} of {len({row.case for row in rows})} cases (repeats of one arm differ more "
            f"than twofold; they are in no verdict): {'; '.join(found)}. Measure them again while nothing else runs."
        )
    ]


def _absences(title: str, reasons: Iterable[tuple[str, str | None]]) -> list[str]:
    return [wrapped(f"{title}: {', '.join(arms)} ({reason})") for reason, arms in _turned(reasons).items()]


def _turned(pairs: Iterable[tuple[str, str | None]]) -> dict[str | None, list[str]]:
    """The firsts of all pairs that share a second, without repeats."""
    firsts: dict[str | None, list[str]] = {}
    for first, second in dict.fromkeys(pairs):
        firsts.setdefault(second, []).append(first)
    return firsts


def wrapped(line: str) -> str:
    """A line of any length in those of the screen, the later ones indented."""
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False))
