"""A claim of the LoRA paper, and the row that examining it gives.

The paper is Hu et al., 2021, in its second version: https://arxiv.org/abs/2106.09685v2. Its figures are typed where a
claim is made, with their table or section; ours are always computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..records.rows import ClaimRow

COMPUTED, MEASURED = "computed", "measured"
HOLDS, DIFFERS, NOT_MEASURED, ERROR = "holds", "differs", "not measured", "error"

# Section 4.2, footnote 5 of the paper: tokens/s per V100 of full fine-tuning and of LoRA.
FOOTNOTE_5 = (32.5, 43.1)

_UNITS = {"": 1.0, "M": 1e6, "MB": 1e6, "GB": 1e9, "TB": 1e12}


class NotMeasuredError(Exception):
    """A claim that cannot be examined here; the message gives the reason."""


class Lab(NamedTuple):
    """The device on which claims are measured, and the sizes.

    Attributes:
        model: the decoder that is stored, loaded, switched and given an optimiser; a name of DECODERS.
        trained: the decoder whose training is timed.
        batch, sequence: tokens of a training step.
        rounds, seconds: timings of each contender, and when they may stop short.
        inputs: (batch, sequence) of the layers whose latency is measured, ``width`` their width.
    """

    device: torch.device
    model: str
    trained: str
    batch: int
    sequence: int
    rounds: int
    seconds: float
    inputs: tuple[tuple[int, int], ...] = ((32, 512), (16, 256), (1, 128))
    width: int = 1024

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of timed models: bfloat16 on CUDA, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


class Finding(NamedTuple):
    """The outcome of a claim: our figure with its unit, whether it bears the claim out, and the arithmetic."""

    ours: str
    holds: bool
    note: str


class Claim(NamedTuple):
    """One claim: the fields of its row that the paper fills, and the function that finds the others.

    ``find`` raises :class:`NotMeasuredError` where it cannot be examined here.
    """

    name: str
    claim: str
    source: str
    stated: str
    how: str
    find: Callable[[Lab], Finding]

    def examine(self, lab: Lab) -> ClaimRow:
        """Makes the row, of an exception as well."""
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
