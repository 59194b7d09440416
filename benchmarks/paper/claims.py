"""A claim of the LoRA paper, and how looking into it becomes a row.

The paper is Hu et al., 2021, in its second version: https://arxiv.org/abs/2106.09685v2. Its figures are typed where a
claim is made, with their table or section; ours are always computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..records.rows import ClaimRow

COMPUTED, MEASURED = "computed", "measured"
HOLDS, DIFFERS, NOT_MEASURED, ERROR = "holds", "differs", "not measured", "error"

_UNITS = {"": 1.0, "M": 1e6, "MB": 1e6, "GB": 1e9, "TB": 1e12}


class NotMeasuredError(Exception):
    """A claim that is not looked into here; the message says why."""


class Scale(NamedTuple):
    """How large the measured claims are.

    Attributes:
        model: the decoder that is stored, loaded, switched and given an optimiser; a name of DECODERS.
        trained: the decoder whose training is timed.
        batch, sequence: tokens of a training step.
        rounds: how often each contender is timed, ``seconds`` after how long that may stop short.
        inputs: (batch, sequence) of the layers whose latency is measured, ``width`` their width.
    """

    model: str
    trained: str
    batch: int
    sequence: int
    rounds: int
    seconds: float
    inputs: tuple[tuple[int, int], ...] = ((32, 512), (16, 256), (1, 128))
    width: int = 1024


class Lab(NamedTuple):
    """Where claims are measured, and how large."""

    device: torch.device
    scale: Scale

    @property
    def dtype(self) -> torch.dtype:
        """What timed models compute in: bfloat16 on CUDA, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def dtype_name(self) -> str:
        """Its name alone."""
        return str(self.dtype).removeprefix("torch.")


class Finding(NamedTuple):
    """What came of a claim: our figure with its unit, whether it bears the claim out, and the arithmetic."""

    ours: str
    holds: bool
    note: str


@dataclass(frozen=True)
class Claim:
    """One claim: the fields of its row that the paper fills, and the function that finds the others.

    ``find`` raises :class:`NotMeasuredError` where it cannot be looked into here.
    """

    name: str
    claim: str
    source: str
    stated: str
    how: str
    find: Callable[[Lab], Finding]

    def examine(self, lab: Lab) -> ClaimRow:
        """The row; an exception other than Ctrl-C becomes one, too."""
        try:
            ours, holds, note = self.find(lab)
            verdict = HOLDS if holds else DIFFERS
        except NotMeasuredError as reason:
            ours, verdict, note = "-", NOT_MEASURED, str(reason)
        except Exception as error:
            ours, verdict, note = "-", ERROR, f"{type(error).__name__}: {error}"
        return ClaimRow(self.claim, self.source, self.stated, ours, self.how, verdict, note)


def printed(value: float, stated: str) -> str:
    """``value`` in the unit of ``stated`` and with as many decimals: equal to it where the paper rounded this value."""
    figure = re.fullmatch(r"([\d,]+)(?:\.(\d+))?( ?)(\D*)", stated)
    if figure is None or figure[4] not in _UNITS:
        raise ValueError(f"expected a number and one of {', '.join(filter(None, _UNITS))}, got {stated!r}")
    return f"{value / _UNITS[figure[4]]:,.{len(figure[2] or '')}f}{figure[3]}{figure[4]}"
