"""A drop-in for microsoft/LoRA's ``loralib`` 0.1.2: ``import fastlora.loralib as lora``.

The names, constructors, state-dict keys and initial weights are loralib's; the linear layers run on
:func:`fastlora.lora_linear`. docs/loralib.md lists what is fixed and what differs.
"""

from .base import LoRALayer
from .checkpoint import lora_state_dict, mark_only_lora_as_trainable
from .conv import Conv1d, Conv2d, Conv3d, ConvLoRA
from .layers import Embedding, Linear, MergedLinear

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]
