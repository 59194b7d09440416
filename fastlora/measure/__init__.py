"""Is it faster for my model? ``fastlora.measure(model, batch)``, or ``python -m fastlora.measure --model CONFIG.json``.

``fastlora/__init__`` imports this package and binds the function over its name. A later ``import fastlora.measure``
finds the package in ``sys.modules`` and binds nothing: ``fastlora.measure`` is always the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..sibling_names import Groups

if TYPE_CHECKING:
    from .report import Measurement

__all__ = ["measure"]

STEPS = 20


def measure(
    model: nn.Module,
    batch: Any,
    *,
    steps: int = STEPS,
    backward: bool = True,
    loss: Callable[[Any], Tensor] | None = None,
    strict_dtype: bool = False,
    groups: Groups = "auto",
    mlp: bool = False,
) -> Measurement:
    """Measures whether a PEFT model is faster on fastlora, here and with this batch; ``print`` what it returns.

    Training steps (forward, loss and backward; no optimiser) of the model as PEFT runs it, the same once more for the
    noise, and of the model as :func:`fastlora.patch_peft` patches it, in turns whose order is shuffled. The model comes
    back as it was: weights, gradients, buffers, modes, patched or not; torch's random state too. Wrap the call in
    ``torch.autocast`` where the model trains in it.

    Args:
        model: what ``get_peft_model`` returned, patched or not, before DDP or ``torch.compile`` wraps it.
        batch: keyword arguments of the model as a dict, or its one tensor, or its arguments as a tuple; on its device.
        steps: timed steps of each, at least 6. Two more come before.
        backward: False for the forward alone, in eval mode and without gradients.
        loss: makes the loss, one number, of the model's output; by default ``output.loss``, else the sum of the
            output's floating-point tensors.
        strict_dtype: as in ``patch_peft``.
        groups: as in ``patch_peft``.
        mlp: as in ``patch_peft``.

    Returns:
        A :class:`fastlora.measure.report.Measurement`: tokens/s, their ratio with its range, the noise, memory, the
        kernel, the calls that ran on fastlora and those that did not with the reasons, and a verdict, which may be no.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``batch`` or the loss is something else.
        ValueError: the model has no PEFT layer that runs on fastlora, is wrapped or compiled, or would be changed by a
            step; ``batch`` is on another device; ``steps`` is below 6; or nothing trains.
        ImportError: peft is not installed, or too old.
    """
    from .run import run

    return run(
        model,
        batch,
        steps=steps,
        backward=backward,
        loss=loss,
        strict_dtype=strict_dtype,
        groups=groups,
        mlp=mlp,
    )
