"""The compile gate's own reading of the compiler's output; `make gate` runs the gate itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

GATE = Path(__file__).parent / "compile_gate.py"
KERNELS = Path(__file__).parents[2] / "kernels"
TRITON_WRITES_THE_FENCE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)

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


# A loop of a pipelined product as Triton writes it in PTX, {fence} standing just before the product.
PTX = """
	@%p1 bra 	$L__BB0_3;
$L__BB0_2:                              // =>This Inner Loop Header: Depth=1
	{first}
	bar.sync 	0;
	{fence}
	{product}
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	cp.async.commit_group;
	{last}
	@%p2 bra 	$L__BB0_2;
$L__BB0_3:
	ret;
"""
WAIT, FENCE = "cp.async.wait_group 2;", "fence.proxy.async.shared::cta;"
WGMMA = "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%r3}, %rd2, %rd3, %p3, 1, 1, 0, 0;"
TCGEN05 = "@%p4 tcgen05.mma.cta_group::1.kind::f16 [ %r4 + 0 ], %rd2, %rd3, %r5, %p5;"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r3 }, { %r4 }, { %r5 }, { %r6 };"

HGMMA = "        /*0a10*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;"
DEPBAR = "        /*0a20*/                   WARPGROUP.DEPBAR.LE gsb0, 0x{} ;"
BARRIER = "        /*0a30*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;"


def in_gate(expression: str, before: str = "", **variables: str) -> str:
    """Evaluates an expression in the gate, in a process where Triton compiles instead of interpreting.

    ``before`` is a statement to run first; ``variables`` go into the environment.
    """
    script = (
        f"import sys; sys.path.insert(0, {str(GATE.parent)!r}); import compile_gate as gate; {before}\n"
        f"print({expression})"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
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


def test_a_missing_fence_is_seen() -> None:
    loops = {
        "missing": (WAIT, "", ""),
        "there": (WAIT, FENCE, ""),
        "missing around the loop": ("", "", WAIT),
        "there around the loop": ("", FENCE, WAIT),
        "too early": (FENCE, WAIT, ""),
        "nothing to wait for": ("", "", ""),
    }
    texts = [
        PTX.format(first=first, fence=fence, last=last, product=product)
        for first, fence, last in loops.values()
        for product in (WGMMA, TCGEN05, MMA)
    ]
    found = in_gate(f"[gate._lacks_fence(ptx) for ptx in {texts}]")
    faulty = [name in ("missing", "missing around the loop", "too early") for name in loops]
    # Operands of mma.sync come from registers: no fence is needed.
    assert found == str([fault and product != MMA for fault in faulty for product in (WGMMA, TCGEN05, MMA)])


def test_serialised_wgmmas_are_counted() -> None:
    codes = {
        (HGMMA, HGMMA, DEPBAR.format(0)): 0,
        (HGMMA, DEPBAR.format(0), HGMMA, DEPBAR.format(0), HGMMA): 2,
        (HGMMA, DEPBAR.format(1), HGMMA): 0,
        (HGMMA, DEPBAR.format(0), BARRIER, HGMMA): 0,
        (HGMMA, DEPBAR.format(0), ".L_x_3:", HGMMA): 0,
    }
    texts = ["\n".join(lines) for lines in codes]
    assert in_gate(f"[gate._serialised(sass) for sass in {texts}]") == str(list(codes.values()))


AMDGCN = """
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
    .private_segment_fixed_size: {scratch}
    .vgpr_count:     126
    .vgpr_spill_count: {spills}
"""


@pytest.mark.parametrize(("spills", "scratch"), [(0, 0), (3, 16), (0, 8)])
def test_amds_assembly_is_read(spills: int, scratch: int) -> None:
    code = in_gate(f"tuple(gate._amd_code({AMDGCN.format(spills=spills, scratch=scratch)!r}))[:4]")
    spilled = f"{spills} registers, {scratch} B of scratch memory" if scratch else ""
    assert code == str((126, spilled, spills, ("mfma",)))


def planted(tmp_path: Path, module: str, case: str, *changes: tuple[str, str]) -> str:
    """The faults that the gate finds in a case's last kernel, once the source of a module is changed."""
    source = (KERNELS / f"{module}.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in source, "the planted fault no longer fits the source"
        source = source.replace(old, new)
    path = tmp_path / f"{module}.py"
    path.write_text(source, encoding="utf-8")
    before = (
        f"import importlib.util, fastlora.kernels; name = 'fastlora.kernels.{module}'; "
        f"spec = importlib.util.spec_from_file_location(name, {str(path)!r}); "
        "sys.modules[name] = importlib.util.module_from_spec(spec); spec.loader.exec_module(sys.modules[name]); "
        f"fastlora.kernels.{module} = sys.modules[name]"
    )
    cache = str(tmp_path / "cache")
    return in_gate(f"'\\n'.join(gate.examine({case})[-1].faults)", before, TRITON_CACHE_DIR=cache)


def portable(capability: int, dtype: str = "bfloat16", backward: bool = False) -> str:
    dtype = f"gate.torch.{dtype}"
    return f"gate.Case('triton-portable', {capability}, 768, 512, 1152, 16, {dtype}, {dtype}, 'none', {backward})"


@pytest.mark.skipif(TRITON_WRITES_THE_FENCE, reason="this Triton writes the fence itself")
@pytest.mark.parametrize(
    ("capability", "change"),
    [
        (90, ("        fence_async_proxy(first_k)\n", "")),
        (100, ("tl.range(0, K, BLOCK_K, num_stages=copy_stages())", "range(0, K, BLOCK_K)")),
    ],
    ids=["sm_90", "sm_100"],
)
def test_the_portable_kernel_fails_without_its_fence(capability: int, change: tuple[str, str], tmp_path: Path) -> None:
    faults = planted(tmp_path, "lora_matmul_portable", portable(capability), change)
    assert faults == "no fence.proxy.async between cp.async's data and the tensor cores"


def test_the_portable_kernel_fails_with_the_low_rank_product_before_the_loop(tmp_path: Path) -> None:
    first = "    acc_mn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)\n"
    last = "    if not MASK_PRODUCT:\n"
    product = """        acc_mn = low_rank_product(
            acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_zm, stride_bn, stride_br, BLOCK_R, PRECISION
        )
"""
    changes = (last, "    if False:\n"), (first, first + last + product)
    faults = planted(tmp_path, "lora_matmul_portable", portable(90, backward=True), *changes)
    assert re.fullmatch(r"[1-9]\d* wgmmas wait for the one before; ptxas: C75\d\d", faults)


def test_a_tile_beyond_amds_shared_memory_fails(tmp_path: Path) -> None:
    row = 'PORTABLE[kind or ("large" if capability in TMA_CAPABILITIES else "small")]'
    faults = planted(tmp_path, "tiles", portable(0x942), (row, "(Tile(128, 256, 128, 8, 2),)"))
    assert re.fullmatch(r"shared memory \d+ B, limit 65536 B", faults)


def test_fp32_in_the_tile_of_other_architectures_spills_on_gfx11(tmp_path: Path) -> None:
    change = ('kind = "ieee_wave32"', "pass")
    faults = planted(tmp_path, "tiles", portable(0x1100, dtype="float32"), change)
    assert re.fullmatch(r"spills: \d+ registers, \d+ B of scratch memory", faults)


@pytest.mark.parametrize("kernel", ["triton-portable", "triton-serial"])
def test_both_directions_are_compiled_with_and_without_a_bias(kernel: str) -> None:
    pairs = f"{{(c.backward, c.bias) for c in gate.cases((90,)) if c.kernel == {kernel!r} and c.dtype.itemsize == 2}}"
    assert in_gate(f"sorted({pairs})") == "[(False, False), (False, True), (True, False), (True, True)]"


def test_progress_shows_in_a_pipe_a_line_for_each_tenth() -> None:
    before = "sys.stderr = sys.stdout; [gate._tell(done, 37) for done in range(1, 38)]"
    lines = in_gate("'end'", before).splitlines()
    assert lines == [*(f"{-(-37 * tenth // 10)}/37 compiled" for tenth in range(1, 11)), "end"]
