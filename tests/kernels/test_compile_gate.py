"""The compile gate's own reading of the compiler's output; `make gate` runs the gate itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

GATE = Path(__file__).parent / "compile_gate.py"

# A loop whose ring of x has {ring} buffers, all of them filled before it starts, as Triton writes such loops.
LOOP = """
%x = ttg.local_alloc : () -> !ttg.memdesc<{ring}x128x64xbf16, #shared, #smem, mutable>
%x_0 = ttg.memdesc_index %x[%c0_i32] : !ttg.memdesc<{ring}x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
ttng.async_tma_copy_global_to_local %x_desc[%m, %k] %x_0, %bar, %true
%x_1 = ttg.memdesc_index %x[%c1_i32] : !ttg.memdesc<{ring}x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
ttng.async_tma_copy_global_to_local %x_desc[%m, %k1] %x_1, %bar, %true
%acc = scf.for %i = %c0 to %n step %c1 {{
  %x_i = ttg.memdesc_index %x[%i] : !ttg.memdesc<{ring}x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
  %d = ttng.warp_group_dot %x_i, %w_i, %c {{isAsync = true}}
  %e = ttng.warp_group_dot_wait %d {{pendings = {pendings} : i32}}
  %x_n = ttg.memdesc_index %x[%next] : !ttg.memdesc<{ring}x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
  ttng.async_tma_copy_global_to_local %x_desc[%m, %k2] %x_n, %bar, %true
}}
"""


def in_gate(expression: str) -> str:
    """Evaluates an expression in the gate, in a process where Triton compiles instead of interpreting."""
    script = f"import sys; sys.path.insert(0, {str(GATE.parent)!r}); import compile_gate as gate; print({expression})"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("ring", "pendings", "expected"),
    [(2, 1, "True"), (2, 0, "False"), (3, 1, "False")],
    ids=["race", "waits", "deeper"],
)
def test_a_refill_under_a_running_wgmma_is_seen(ring: int, pendings: int, expected: str) -> None:
    loop = LOOP.format(ring=ring, pendings=pendings)
    assert in_gate(f"gate._refills_under_wgmma({loop!r})") == expected


def test_the_gate_compiles_and_passes_the_ordered_sum() -> None:
    """One small kernel, end to end: compiled for sm_90 without a GPU, and read back."""
    case = "gate.Case('rank_grad', 90, 8192, 0, 1024, 16, gate.torch.bfloat16, gate.torch.float32, 'none', False)"
    findings = in_gate(f"[(f.kernel, f.spills, f.registers > 0, f.faults) for f in gate.examine({case})]")
    assert re.fullmatch(r"\[\('rank_grad_kernel', 0, True, \(\)\), \('sum_splits_kernel', 0, True, \(\)\)\]", findings)
