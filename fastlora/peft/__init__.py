"""PEFT models on fastlora in one line: ``fastlora.patch_peft(model)``.

Nothing here imports peft as it loads.
"""

from .calls import Calls, count_calls
from .patch import patch_peft, patched_peft, unpatch_peft
from .report import PatchReport

__all__ = ["Calls", "PatchReport", "count_calls", "patch_peft", "patched_peft", "unpatch_peft"]
