"""The gate on the CUDA kernels sees what is planted; `make gate` runs it on the kernels themselves."""

from __future__ import annotations

import pytest

from tests.csrc import cuda_gate as gate

NAME = "_ZN8fastlora12_GLOBAL__N_16kernelINS_4BF16ELi256EEEvNS0_10ParametersE"
PLANS = gate.read_plans("kernel<*, 256> 384 200000 1 1\n")

# What nvcc 13.0 and cuobjdump print.
LOG = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NAME}' for 'sm_90a'
ptxas info    : Function properties for {NAME}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 32 bytes smem
ptxas info    : Compile time = 908.622 ms
"""
SASS = f"""
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

	code for sm_90
		Function : {NAME}
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                 /* 0x00000a00ff017b82 */
                                                                                          /* 0x000fe20000000800 */
        /*0070*/                   HGMMA.64x256x16.F32 R24, gdesc[UR4], RZ, !UPT ;        /* 0x03e00000041879f0 */
                                                                                          /* 0x000fe2000c7008ff */
        /*0100*/                   HGMMA.64x256x16.F32 R24, gdesc[UR12], R24, gsb0 ;      /* 0x03e000000c1879f0 */
                                                                                          /* 0x000fe20008700818 */
        /*1a0b0*/              @P0 EXIT ;                                                 /* 0x000000000000794d */
"""
HGMMA = "HGMMA.64x256x16.F32 R24, gdesc[UR12], R24, gsb0 ;"


def faults(log: str = LOG, sass: str = SASS, plans: list[gate.Plan] = PLANS) -> list[str]:
    findings, others = gate.examine([log], sass, plans)
    return [fault for finding in findings for fault in finding.faults] + others


def test_a_clean_kernel_passes_and_is_read() -> None:
    findings, others = gate.examine([LOG], SASS, PLANS)
    assert others == []
    assert findings == [
        gate.Finding("kernel<BF16, 256>", gate.Usage(168, 0, 0, 32), gate.Code(4, 2, 0, 0), 200_032, ())
    ]
    assert gate.table(findings).splitlines()[1].split() == (
        ["kernel<BF16,", "256>", "168", "0", "0", "200032", "2", "4"]
    )


LOOP = """        /*0050*/                   {before} ;                                 /* 0x00000a00ff017b82 */
        /*0070*/                   HGMMA.64x256x16.F32 R24, gdesc[UR4], RZ, !UPT ;        /* 0x03e00000041879f0 */
        /*0080*/                   {inside} ;                                 /* 0x00000a00ff017b82 */
        /*0090*/              @P1 BRA 0x70 ;                                 /* 0x00000a00ff017b82 */
"""


@pytest.mark.parametrize(("before", "inside", "fences"), [("MEMBAR.ALL.GPU", "NOP", 0), ("NOP", "MEMBAR.ALL.GPU", 1)])
def test_a_fence_of_the_gpu_counts_in_the_loop_alone(before: str, inside: str, fences: int) -> None:
    sass = SASS.replace("        /*0070*/", LOOP.format(before=before, inside=inside) + "        /*00f0*/")
    expected = [f"{fences} fences of the whole GPU in a loop that multiplies"] if fences else []
    assert faults(sass=sass) == expected


SERIALISED = (
    "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    f"insufficient register resources for the wgmma pipeline in the function '{NAME}'"
)
IGNORED = (
    "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at "
    "entry."
)
DIAGNOSED = 'csrc/kernel.cu(12): warning #177-D: variable "n" was declared but never referenced'


@pytest.mark.parametrize("line", [SERIALISED, IGNORED, DIAGNOSED], ids=["serialised", "setmaxnreg", "nvcc"])
def test_a_warning_in_the_log(line: str) -> None:
    assert faults(log=f"{line}\n{LOG}") == [f"ptxas: {line}"]


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("0 bytes spill stores", "8 bytes spill stores", "8 B of spills, 0 B of stack, 0 LDL and STL"),
        ("0 bytes spill loads", "12 bytes spill loads", "12 B of spills, 0 B of stack, 0 LDL and STL"),
        ("0 bytes stack frame", "16 bytes stack frame", "0 B of spills, 16 B of stack, 0 LDL and STL"),
        ("Used 168 registers", "Used 169 registers", "169 registers, 384 threads can have 168"),
        ("32 bytes smem", "32449 bytes smem", "232449 B of shared memory, a CTA can have 232448"),
    ],
)
def test_too_much_of_something_in_the_log(before: str, after: str, fault: str) -> None:
    assert faults(log=LOG.replace(before, after)) == [fault]


@pytest.mark.parametrize("instruction", ["STL [R1+0xa8], R22 ;", "@!P1 LDL.64 R4, [R1] ;", "LDL.LU R4, [R1+0x4] ;"])
def test_local_memory_in_the_machine_code(instruction: str) -> None:
    assert faults(sass=SASS.replace(HGMMA, instruction)) == ["0 B of spills, 0 B of stack, 1 LDL and STL"]


def test_no_matrix_instruction_where_one_should_be() -> None:
    plain = SASS.replace("HGMMA.64x256x16.F32", "FFMA")
    assert faults(sass=plain) == ["no HGMMA"]
    assert faults(sass=plain, plans=gate.read_plans("kernel<*> 384 200000 0 1")) == []


def test_a_wgmma_that_reads_an_operand_from_registers() -> None:
    register = SASS.replace(HGMMA, "HGMMA.64x256x16.F32 R24, R4, gdesc[UR12], R24 ;")
    assert faults(sass=register) == ["1 HGMMA with an operand in registers"]


@pytest.mark.parametrize(
    ("instruction", "touched"),
    [
        ("FADD R30, R151, R2 ;", 1),
        ("LDS.128 R20, [R152] ;", 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1 ;\n        /*0091*/                   MOV R2, R24 ;", 1),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n        /*0091*/                   MOV R2, R24 ;", 0),
    ],
)
def test_a_sum_that_is_touched_while_its_wgmma_runs(instruction: str, touched: int) -> None:
    sass = SASS.replace("        /*1a0b0*/", f"        /*0190*/                   {instruction}\n        /*1a0b0*/")
    assert faults(sass=sass) == ([f"{touched} instructions that name a sum of a wgmma in flight"] if touched else [])


def test_an_asynchronous_store_into_a_cluster_of_one() -> None:
    remote = SASS.replace(HGMMA, "STAS [R6.64], R2 ;")
    assert faults(sass=remote) == ["1 STAS in a cluster of one CTA"]
    assert faults(sass=remote, plans=gate.read_plans("kernel<*> 384 200000 1 2")) == []


def test_another_architecture() -> None:
    assert faults(sass=SASS.replace("arch = sm_90a", "arch = sm_80")) == ["an architecture other than sm_90a: sm_80"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", ["0 lines of fastlora_kernels() match it, expected one"]),
        ("kernel<*> 384 0 1 1\nkernel<BF16, *> 384 0 1 1", ["2 lines of fastlora_kernels() match it, expected one"]),
        (
            "kernel<*> 384 0 1 1\nother<*, 2> 384 0 1 1",
            ["fastlora_kernels() tells of other<*, 2>, and there is no such kernel"],
        ),
    ],
    ids=["none", "two", "absent"],
)
def test_a_table_that_is_not_of_these_kernels(lines: str, expected: list[str]) -> None:
    assert faults(plans=gate.read_plans(lines)) == expected


def test_a_kernel_that_the_library_lacks() -> None:
    assert f"{NAME}: ptxas or the machine code does not have it" in faults(sass="")


@pytest.mark.parametrize(("threads", "registers"), [(384, 168), (256, 255), (1024, 64), (128, 255), (512, 128)])
def test_registers_that_threads_can_have_at_launch(threads: int, registers: int) -> None:
    assert gate.Plan("kernel", threads, 0, wgmma=False, cluster=1).registers == registers
