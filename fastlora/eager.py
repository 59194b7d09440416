"""Plain eager calls, in which the operators' Python bodies may run without torch's dispatcher."""

from __future__ import annotations

import torch

_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


def is_eager() -> bool:
    """True where nobody around the call would see an operator: no compiler, dispatch mode, functorch or jit trace.

    Going through the dispatcher costs an operator five microseconds of the host's time.
    """
    return not (torch.compiler.is_compiling() or _modes() or _functorch() or _tracing() is not None)
