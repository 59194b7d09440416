"""LoRA fine-tuning at the speed of the frozen layer: ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias`` in one pass."""

from .adapters.inject import inject
from .adapters.merging import merge_adapter, merge_and_unload, unmerge_adapter
from .adapters.model import AdapterStatus, adapter_status, delete_adapter, disable, enable, set_adapter, unload
from .adapters.saving import load_adapter, save_adapter
from .measure import measure
from .module import LoRALinear
from .module_group import LoRALinearGroup
from .ops.base import StoredWeight
from .ops.dora import dora_linear
from .ops.group import Branch, lora_linear_group
from .ops.linear import explain, lora_linear
from .ops.mlp import lora_swiglu_mlp
from .peft import PatchReport, patch_peft, patched_peft, unpatch_peft
from .tune import tune_model
from .while_merged import merged

__version__ = "0.1.0"

__all__ = [
    "AdapterStatus",
    "Branch",
    "LoRALinear",
    "LoRALinearGroup",
    "PatchReport",
    "StoredWeight",
    "__version__",
    "adapter_status",
    "delete_adapter",
    "disable",
    "dora_linear",
    "enable",
    "explain",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linear_group",
    "lora_swiglu_mlp",
    "measure",
    "merge_adapter",
    "merge_and_unload",
    "merged",
    "patch_peft",
    "patched_peft",
    "save_adapter",
    "set_adapter",
    "tune_model",
    "unload",
    "unmerge_adapter",
    "unpatch_peft",
]
