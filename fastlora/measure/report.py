"""``Measurement``: what a model's steps take on fastlora and on PEFT's own forward, and whether that is a gain."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from ..peft import Calls

# Above this PEFT differs from itself by more than most gains.
NOISY = 0.1

Verdict = Literal["faster", "slower", "no difference", "too noisy", "not run"]


class Range(NamedTuple):
    """A median of turns, and the range in which it lies with a confidence of 95 %."""

    low: float
    median: float
    high: float


def range_of(values: Sequence[float]) -> Range:
    """The median of at least six values with its range, by the sign test: whatever their distribution is.

    The range goes from the k-th smallest to the k-th largest, the largest k with P(Binomial(n, 1/2) < k) ≤ 1/40.
    """
    n, below, k = len(values), 0, 0
    while (below := below + math.comb(n, k)) <= 2**n / 40:
        k += 1
    if k == 0:
        raise ValueError(f"values must be at least 6, got {n}")
    ordered = sorted(values)
    return Range(ordered[k - 1], statistics.median(ordered), ordered[n - k])


@dataclass(frozen=True)
class Arm:
    """One way of running the model.

    Attributes:
        milliseconds: of each timed step, in their order.
        peak_bytes: the most at a time that a step adds to what was there before it.
        kept_bytes: what the forward leaves for the backward; None without one.
    """

    milliseconds: tuple[float, ...]
    peak_bytes: int
    kept_bytes: int | None


@dataclass(frozen=True)
class Measurement:
    """What :func:`fastlora.measure` saw; ``print`` it.

    Attributes:
        subject: the model, its dtypes and what a step is, in words.
        machine: in words.
        tokens: of a step.
        peft: the model as PEFT runs it.
        again: the milliseconds of the same in other steps of the same turns, for the noise.
        fastlora: the model patched.
        calls: the layers' calls in one forward, on fastlora and on PEFT's own forward with the reasons.
        kernels: what runs the products, and why.
        mlps: how many gated MLPs run as one product; their layers are not called.
    """

    subject: str
    machine: str
    tokens: int
    peft: Arm
    again: tuple[float, ...]
    fastlora: Arm
    calls: Calls
    kernels: tuple[str, ...]
    mlps: int = 0

    @property
    def gain(self) -> Range:
        """PEFT's time over fastlora's, turn by turn: above 1 where fastlora is faster."""
        return range_of([a / b for a, b in zip(self.peft.milliseconds, self.fastlora.milliseconds, strict=True)])

    @property
    def noise(self) -> float:
        """How far from 1 the range of PEFT's time over its own second time reaches."""
        own = range_of([a / b for a, b in zip(self.peft.milliseconds, self.again, strict=True)])
        return max(abs(own.low - 1), abs(own.high - 1))

    @property
    def verdict(self) -> Verdict:
        """``faster`` and ``slower`` where the whole range is on one side of 1 and the median is beyond the noise."""
        if not self.calls.fast.total() and not self.mlps:
            return "not run"
        gain, noise = self.gain, self.noise
        if gain.low > 1 and gain.median > 1 + noise:
            return "faster"
        if gain.high < 1 and gain.median < 1 - noise:
            return "slower"
        return "too noisy" if noise > NOISY else "no difference"

    @property
    def sentence(self) -> str:
        """The verdict in a sentence, with what it rests on, and the memory that is kept where that differs."""
        gain, noise = self.gain, f"the noise of {_percent(self.noise)}"
        between = f"{gain.low:.2f} to {gain.high:.2f}"
        speed = {
            "faster": f"fastlora is faster for this model here: {gain.median:.2f} of PEFT's speed ({between}), beyond "
            f"{noise}",
            "slower": f"fastlora is slower for this model here: {gain.median:.2f} of PEFT's speed ({between}), beyond "
            f"{noise}: leave it unpatched",
            "no difference": f"fastlora is not faster for this model here: {between} of PEFT's speed, within {noise}",
            "too noisy": f"this run cannot say whether fastlora is faster for this model: {between} of PEFT's speed, "
            f"and PEFT's own steps differ by {_percent(self.noise)}. Measure again on a quiet machine, or with more "
            "steps",
            "not run": "fastlora is not faster for this model here: "
            + ("every call ran PEFT's own forward" if self.calls.fallback else "no layer with an adapter was called"),
        }[self.verdict]
        return speed + self._memory()

    def _memory(self) -> str:
        ours, theirs = self.fastlora.kept_bytes, self.peft.kept_bytes
        if not ours or not theirs or abs(ours / theirs - 1) < 0.01:
            return ""
        words = "less" if ours < theirs else "more"
        return f"; it keeps {_percent(abs(1 - ours / theirs))} {words} for the backward"

    def __str__(self) -> str:
        gain = self.gain
        rows = [("", "tokens/s", "ms a step", "peak", "kept for the backward")]
        for name, arm in (("PEFT's own forward", self.peft), ("fastlora", self.fastlora)):
            median = statistics.median(arm.milliseconds)
            rows.append(
                (
                    name,
                    f"{1e3 * self.tokens / median:,.0f}",
                    f"{median:.4g}",
                    _mib(arm.peak_bytes),
                    _mib(arm.kept_bytes),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.subject, self.machine, ""]
        for name, *cells in rows:
            padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append(f"{name:<{widths[0]}}  {'  '.join(padded)}")
        lines += [
            "",
            f"fastlora's speed over PEFT's: {gain.median:.3f}, between {gain.low:.3f} and {gain.high:.3f} with 95 % "
            f"confidence ({len(self.again)} turns)",
            f"noise, PEFT's own steps twice: {_percent(self.noise)}",
            *(f"kernel: {kernel}" for kernel in self.kernels),
            *str(self.calls).splitlines(),
            *([f"{self.mlps} gated MLPs as one product each"] if self.mlps else []),
            "",
            self.sentence,
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All of it for a file: plain numbers and words, the verdict and its sentence with them."""
        return {
            "subject": self.subject,
            "machine": self.machine,
            "tokens": self.tokens,
            "peft": asdict(self.peft),
            "again": list(self.again),
            "fastlora": asdict(self.fastlora),
            "calls": {"fastlora": self.calls.fast.total(), "peft": dict(self.calls.reasons)},
            "kernels": list(self.kernels),
            "mlps": self.mlps,
            "gain": self.gain._asdict(),
            "noise": self.noise,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"
