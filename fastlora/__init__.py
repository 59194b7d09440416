"""LoRA fine-tuning at the speed of the frozen layer: ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias`` in one pass."""

from .dispatch import explain
from .functional import lora_linear
from .module import LoRALinear

__version__ = "0.1.0"

__all__ = ["LoRALinear", "__version__", "explain", "lora_linear"]
