"""Parts of the measured claims: decoders with random weights, the accuracy gate, and contenders timed in turns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from fastlora.accuracy import Errors
from fastlora.clock import Clock, Work

from ..cases import DTYPES, Case
from ..layers.arms import arms
from ..layers.gate import Gate
from ..layers.operands import make_operands
from ..measure.contest import Subject, compete
from ..records.rows import Spread
from .claims import Lab
from .models import DECODERS, Decoder, adapt

# The paper's rank for GPT-2, and for the checkpoint of GPT-3.
RANK = 4


def decoder(lab: Lab, name: str, dtype: torch.dtype, r: int | None = None) -> Decoder:
    """A decoder of DECODERS; with a rank, LoRA on Wq and Wv, b not zero."""
    with lab.device:
        model = Decoder(DECODERS[name]).to(dtype)
    for layer in adapt(model, r) if r else ():
        nn.init.normal_(layer.lora_B, std=0.01)
    return model


def require_accurate(lab: Lab, width: int, tokens: int) -> None:
    """Holds a step of fastlora's layer of this width to the oracle: a wrong one gets no speed.

    Raises:
        ArithmeticError: an output or a gradient is out of bounds, not finite, or never arrives.
    """
    dtype = next(name for name, dtype in DTYPES.items() if dtype is lab.dtype)
    case = Case(f"{width}x{width}", tokens, RANK, dtype, 0.0)
    ours = arms()["fastlora"]
    with ours.turn():
        require_ok(Gate(case, make_operands(case, lab.device)).check(ours))


def require_ok(errors: Mapping[str, Errors]) -> None:
    """Raises ArithmeticError that names every error out of bounds."""
    wrong = [f"{name}: {error}" for name, error in errors.items() if not error.ok]
    if wrong:
        raise ArithmeticError(f"inaccurate, so no speed: {'; '.join(wrong)}")


def interleaved(contenders: Mapping[str, Work], lab: Lab) -> dict[str, Spread]:
    """Wall time of each contender."""
    subjects = {name: Subject(partial(_same, work)) for name, work in contenders.items()}
    compete(list(subjects.values()), Clock(lab.device), lab.rounds, lab.seconds, warm_up=1)
    return {name: Spread.of(subject.wall) for name, subject in subjects.items()}


def _same(work: Work, number: int) -> Work:
    return work


def milliseconds(spread: Spread) -> str:
    """The median and the range of the middle 60 %."""
    digits = 0 if spread.p50 >= 100 else 2
    return f"{spread.p50:,.{digits}f} ({spread.p20:,.{digits}f}-{spread.p80:,.{digits}f}) ms"
