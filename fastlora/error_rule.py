"""The one error rule, shared by the tests, the benchmarks and the check of kernels at their first use.

The oracle is :mod:`fastlora.backends.reference` in float64 on the same rounded inputs, the baseline the same in the
tested dtype. A result passes when, with ulp = one unit in the last place of its dtype at the oracle's largest value,

    RMS error <= 1.5 × the baseline's + ulp / √(elements)
    max error <= 2 × the baseline's + ulp

and its shape, dtype and device are the baseline's and it is finite exactly where the oracle is. One global number alone
misses a wrong corner tile; both together do not. The ulp lets one element round the other way: it matters in tensors of
a few elements and vanishes in the RMS of any other. In float32 at M = 1 the baseline is no yardstick: da and dx hang on
R sums alone, and where these happen to come out exact nothing is left to be relative to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .text import dtype_name

RMS_FACTOR = 1.5
MAX_FACTOR = 2.0

# What float64 itself may lose on the way to the oracle, relative to its largest value: invisible from float32 down.
_ORACLE_LOSS = 2.0**-46


class Errors(NamedTuple):
    """The distance of one tensor from its oracle, with the bounds it is held to.

    ``rms`` and ``max`` are absolute; ``mismatch`` says in words what made the numbers moot (shape, dtype, device,
    finiteness), and they are then NaN.
    """

    rms: float
    max: float
    rms_bound: float
    max_bound: float
    worst: tuple[int, ...] = ()
    actual_at_worst: float = math.nan
    oracle_at_worst: float = math.nan
    mismatch: str | None = None

    @staticmethod
    def mismatched(reason: str) -> Errors:
        """What cannot be compared, and why."""
        return Errors(math.nan, math.nan, math.nan, math.nan, mismatch=reason)

    @property
    def ok(self) -> bool:
        """Whether the rule is met."""
        return self.mismatch is None and self.rms <= self.rms_bound and self.max <= self.max_bound

    def __str__(self) -> str:
        if self.mismatch is not None:
            return self.mismatch
        return (
            f"rms error {self.rms:.3g} (bound {self.rms_bound:.3g}), max error {self.max:.3g} (bound "
            f"{self.max_bound:.3g}), worst at {self.worst}: {self.actual_at_worst:.9g}, oracle "
            f"{self.oracle_at_worst:.9g}"
        )


def compare(actual: Tensor, *, oracle: Tensor, baseline: Tensor) -> Errors:
    """Measures ``actual`` by the rule in the module docstring; ``ok`` of the answer is the verdict.

    Args:
        actual: the tensor under test.
        oracle: what it should be, float64.
        baseline: the reference's result in the tested dtype; says which shape, dtype and device ``actual`` must have.

    Raises:
        ValueError: the baseline cannot judge: its shape is not the oracle's, the oracle is not float64, or the baseline
            is not finite where the oracle is (the data overflow the tested dtype).
    """
    if oracle.dtype is not torch.float64 or baseline.shape != oracle.shape:
        raise ValueError(
            f"expected a float64 oracle of the baseline's shape, got {oracle.dtype} {list(oracle.shape)} and a "
            f"baseline {list(baseline.shape)}"
        )
    actual, oracle, baseline = actual.detach(), oracle.detach(), baseline.detach()
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(actual, what), getattr(baseline, what)
        if got != expected:
            return Errors.mismatched(f"{what} is {_plain(got)}, expected {_plain(expected)}")
    if actual.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0)

    finite = oracle.isfinite()
    if not (baseline.isfinite() | ~finite).all():
        raise ValueError(
            f"the baseline overflows {dtype_name(baseline.dtype)} where the oracle is finite: scale the data"
        )
    if not torch.equal(actual.isfinite(), finite):
        at = _coordinate((actual.isfinite() != finite).int())
        return Errors.mismatched(f"is {actual[at].item()} at {at}, oracle {oracle[at].item():.9g}")

    error = (actual.double() - oracle).abs().where(finite, 0)
    allowed = (baseline.double() - oracle).abs().where(finite, 0)
    largest = oracle.abs().where(finite, 0).max().item()
    ulp = torch.finfo(actual.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    slack = _ORACLE_LOSS * largest
    worst = _coordinate(error)
    return Errors(
        rms=_rms(error),
        max=error[worst].item(),
        rms_bound=RMS_FACTOR * _rms(allowed) + ulp / math.sqrt(error.numel()) + slack,
        max_bound=MAX_FACTOR * allowed.max().item() + ulp + slack,
        worst=worst,
        actual_at_worst=actual[worst].item(),
        oracle_at_worst=oracle[worst].item(),
    )


def assert_close_to_oracle(actual: Tensor, *, oracle: Tensor, baseline: Tensor, name: str) -> None:
    """Raises AssertionError, naming the tensor, both errors with their bounds and the worst coordinate.

    Args:
        actual: the tensor under test.
        oracle: what it should be, float64.
        baseline: the reference's result in the tested dtype.
        name: what the message calls the tensor, such as ``"dx"``.
    """
    errors = compare(actual, oracle=oracle, baseline=baseline)
    if not errors.ok:
        raise AssertionError(f"{name}: {errors}")


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def _coordinate(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))


def _plain(value: object) -> str:
    if isinstance(value, torch.Size):
        return str(list(value))
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value)
