"""Proves and measures the kernels on this machine, once, for ``auto`` to choose by: ``python -m fastlora.tune``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ..backends.measured import Table


def tune_model(
    model: nn.Module,
    tokens: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    kernels: Sequence[str] = (),
    quick: bool = False,
    again: bool = False,
) -> Table:
    """Proves the kernels on the device of a model and measures them for its LoRA layers; later calls choose by that.

    What was done before is kept and not done again. Kernels run in processes of their own: one that hangs or crashes
    fails, and nothing else. The result is in the user's cache directory, or in the file that ``FASTLORA_TABLE`` names.

    Args:
        model: a model with LoRA layers: of PEFT, ``fastlora.inject``, ``fastlora.LoRALinear`` or ``fastlora.loralib``.
        tokens: numbers of tokens in a call, such as batch size times sequence length; sizes between are near enough.
        dtype: dtype of autocast, where the model will run in it.
        kernels: names of kernels, or how they begin, to prove and measure beside the vendor's; all by default.
        quick: True for shorter timings.
        again: True to do everything once more.

    Returns:
        The table of this machine.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: it has no LoRA layer, a kernel's name is unknown, or a number of tokens is below 1.
        RuntimeError: the process that tries the kernels does not start; the message has its last words.
        OSError: the table cannot be written; the message names the file.
    """
    from ..backends import dispatch, measured
    from ..backends.machine import machine_of
    from .layers import of_model
    from .run import QUICK_SECONDS, SECONDS, Run

    layers = of_model(model, dtype)
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be numbers of at least 1, got {list(tokens)}")
    device = next(model.parameters()).device
    path = measured.table_path(machine_of(device))
    seconds = QUICK_SECONDS if quick else SECONDS
    run = Run(layers, tokens, device, kernels=kernels, seconds=seconds, again=again, path=path)
    run.run()
    dispatch.forget()
    if run.keeper.obstacle is not None:
        raise OSError(f"the table could not be kept: {run.keeper.obstacle}")
    return run.table
