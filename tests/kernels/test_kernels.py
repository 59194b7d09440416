"""The Triton kernels against the fp64 oracle: on the GPU where there is one, in Triton's interpreter elsewhere.

The interpreter runs the programs of a launch one after another, which is why one_launch takes its tiles from a counter;
and it multiplies bfloat16 wrongly, so bfloat16 is for the GPU alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastlora.accuracy import assert_close_to_oracle, oracle_step, reference_step
from fastlora.backends import dispatch, reference
from fastlora.backends import triton as backend
from fastlora.backends.dropout import Dropout, draw_seed
from fastlora.kernels import lora_matmul, lora_matmul_tma, tiles
from fastlora.kernels.indexing import tile_position
from fastlora.kernels.philox import keep_mask
from tests.cases import DTYPES, LAYOUTS, SCALE, Operands, check_against_reference, gradient_of, make

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CAPABILITY = backend._capability(DEVICE)
TMA_HERE = CAPABILITY in tiles.TMA_CAPABILITIES
DESIGNS = tuple(
    design
    for design in lora_matmul.DESIGNS
    if design == "portable" or (TMA_HERE and (design == "serial" or CAPABILITY == 90))
)
HALF = "bf16" if ON_GPU else "fp16"
MASKS = ("none", "input", "product")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN: an element that no kernel wrote shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def check(
    design: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    m: int = 150,
    k: int = 96,
    n: int = 272,
    r: int = 16,
    dtypes: str = HALF,
    mask: str = "none",
    backward: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    change: Callable[[Operands], Operands] = lambda operands: operands,
) -> None:
    """One call of lora_matmul in one design against the oracle; ``backward`` turns the operands as backward does."""
    monkeypatch.setenv("FASTLORA_TRITON_DESIGN", design)
    dtype, adapter_dtype = DTYPES[dtypes]
    x, w, a, b, bias = change(make(m, k, n, r, dtype=dtype, adapter_dtype=adapter_dtype)).map(lambda t: t.to(DEVICE))
    x = layout(x)
    if backward:
        w, a, b, bias = w.T.contiguous().T, a.T.contiguous().T, b.T.contiguous().T, None
    dropout = None if mask == "none" else Dropout(0.3, draw_seed(DEVICE))
    options = {"scale": SCALE, "dropout": dropout, "on_product": mask == "product"}
    actual = backend.lora_matmul(x, w, a, b, bias=bias, **options)
    baseline = reference.lora_matmul(x, w, a, b, bias=bias, **options)
    wide = None if bias is None else bias.double()
    oracle = reference.lora_matmul(x.double(), w.double(), a.double(), b.double(), bias=wide, **options)
    for name, i in (("y", 0), ("z", 1)):
        assert_close_to_oracle(actual[i], oracle=oracle[i], baseline=baseline[i], name=name)


@triton.jit
def _write_mask(seed_ptr, keep_ptr, threshold, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    first_row = tl.program_id(0) * BLOCK_ROWS
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    keep = keep_mask(seed_ptr, first_row, first_column, threshold, BLOCK_ROWS, BLOCK_COLUMNS)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    tl.store(keep_ptr + row[:, None] * stride + column[None, :], keep.to(tl.int8))


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 128), (128, 64)])
@pytest.mark.parametrize("seed", [(0, 0), (-1, 2**40 + 7), (2**62 + 3, -5)])
def test_mask_bits_are_those_of_plain_torch(rows: int, columns: int, seed: tuple[int, int]) -> None:
    dropout = Dropout(0.4, torch.tensor(seed, device=DEVICE))
    keep = torch.zeros(2 * rows, 3 * columns, dtype=torch.int8, device=DEVICE)
    _write_mask[(2, 3)](dropout.seed, keep, dropout.threshold, keep.stride(0), rows, columns)
    assert torch.equal(keep.bool(), dropout.keep(*keep.shape))


@triton.jit
def _count_visits(visits_ptr, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    block_m, block_n = tile_position(tl.program_id(0), blocks_m, blocks_n, GROUP_M)
    tl.atomic_add(visits_ptr + block_m * blocks_n + block_n, 1)


@pytest.mark.parametrize(("blocks_m", "blocks_n"), [(1, 1), (8, 3), (9, 2), (3, 7), (17, 5)])
def test_tile_order_visits_every_tile_once(blocks_m: int, blocks_n: int) -> None:
    visits = torch.zeros(blocks_m, blocks_n, dtype=torch.int32, device=DEVICE)
    _count_visits[(blocks_m * blocks_n,)](visits, blocks_m, blocks_n, tiles.GROUP_M)
    assert visits.eq(1).all()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_with_every_mask(design: str, mask: str, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(design, monkeypatch, mask=mask, backward=backward)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("design", DESIGNS)
def test_fp32_adapters_are_read_as_they_are(design: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if design == "one_launch" and mask == "input":
        design = "serial"  # one_launch refuses it
    check(design, monkeypatch, mask=mask, dtypes=f"{HALF}_fp32_adapters", backward=mask == "product")


@pytest.mark.parametrize("r", [1, 8, 12, 24, 64, 128])
@pytest.mark.parametrize("design", DESIGNS)
def test_any_rank(design: str, r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(design, monkeypatch, m=70, k=64, n=144, r=r)


@pytest.mark.skipif(not TMA_HERE, reason="this GPU has no TMA")
@pytest.mark.parametrize("tile", tiles.TMA, ids=lambda tile: f"{tile.rows}x{tile.columns}")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("design", [design for design in DESIGNS if design != "portable"])
def test_every_tile_row(design: str, mask: str, tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes would take the smallest row only."""
    monkeypatch.setattr(lora_matmul_tma, "matmul_tile", lambda rows, m, n: tile)
    check(design, monkeypatch, m=tile.rows + 1, k=72, n=tile.columns + 8, r=12, mask=mask, backward=mask == "product")


@pytest.mark.parametrize("tile", tiles.PORTABLE["large"] + tiles.PORTABLE["small"], ids=lambda tile: str(tile[:3]))
def test_every_tile_row_of_the_portable_kernel(tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_matmul, "matmul_tile", lambda rows, m, n: tile)
    check("portable", monkeypatch, m=tile.rows + 1, k=72, n=tile.columns + 8, r=12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 40, 70), (70, 1, 40), (70, 40, 1), (63, 31, 65), (65, 33, 63), (129, 17, 257)]
)
def test_portable_at_any_size(m: int, k: int, n: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check("portable", monkeypatch, m=m, k=k, n=n, r=5, mask=mask)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 8), (127, 72, 264), (129, 56, 248), (64, 64, 128)])
@pytest.mark.parametrize("design", [design for design in DESIGNS if design != "portable"])
def test_tma_designs_off_the_tile(design: str, m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(design, monkeypatch, m=m, k=k, n=n, r=12)


@pytest.mark.parametrize("mask", MASKS)
def test_fp32_operands(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check("portable", monkeypatch, m=70, k=80, n=130, dtypes="fp32", mask=mask, backward=mask == "product")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_portable_reads_any_strides(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check("portable", monkeypatch, m=70, k=48, n=80, layout=LAYOUTS[layout], mask="input")


@pytest.mark.parametrize("design", DESIGNS)
def test_the_base_alone_and_the_update_alone(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(design, monkeypatch, change=lambda o: o._replace(weight=torch.zeros_like(o.weight)))
    check(design, monkeypatch, change=lambda o: o._replace(lora_b=torch.zeros_like(o.lora_b)))


@pytest.mark.parametrize("design", DESIGNS)
def test_two_runs_give_the_same_bits(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_TRITON_DESIGN", design)
    x, w, a, b, bias = make(150, 96, 272, 16, dtype=DTYPES[HALF][0]).map(lambda t: t.to(DEVICE))
    dropout = Dropout(0.2, draw_seed(DEVICE))
    first, second = (backend.lora_matmul(x, w, a, b, scale=SCALE, bias=bias, dropout=dropout) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_without_w_only_z_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, a, b, _ = make(40, 48, 64, 8, dtype=DTYPES[HALF][0]).map(lambda t: t.to(DEVICE))
    y, z = backend.lora_matmul(x, None, a, b, scale=SCALE)
    assert y is None
    assert torch.equal(z, backend.lora_matmul(x, w, a, b, scale=SCALE)[1])


@pytest.mark.parametrize("p_dropout", [0.0, 0.3], ids=["no_mask", "mask"])
@pytest.mark.parametrize(
    ("m", "p_columns", "q_columns"), [(3, 5, 90), (520, 5, 90), (520, 90, 5), (200, 24, 40), (200, 70, 40), (50, 1, 33)]
)
@pytest.mark.parametrize("dtypes", [HALF, "fp32", f"{HALF}_fp32_adapters"])
def test_rank_grad(dtypes: str, m: int, p_columns: int, q_columns: int, p_dropout: float) -> None:
    dtype, grad_dtype = DTYPES[dtypes]
    p = (torch.randn(m, p_columns) / m**0.5).to(dtype).to(DEVICE)
    q = torch.randn(m, q_columns).to(dtype).to(DEVICE)
    dropout = Dropout(p_dropout, draw_seed(DEVICE)) if p_dropout else None
    actual = backend.rank_grad(p, q, dtype=grad_dtype, dropout=dropout)
    assert_close_to_oracle(
        actual,
        oracle=reference.rank_grad(p.double(), q.double(), dtype=torch.float64, dropout=dropout),
        baseline=reference.rank_grad(p, q, dtype=grad_dtype, dropout=dropout),
        name="grad",
    )
    assert torch.equal(actual, backend.rank_grad(p, q, dtype=grad_dtype, dropout=dropout))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", [HALF, "fp32", f"{HALF}_fp32_adapters"])
@pytest.mark.skipif(ON_GPU, reason="the shared inputs are on the CPU; test_gpu.py runs whole steps on the GPU")
def test_a_whole_step_through_lora_linear(dtypes: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    dtype, adapter_dtype = DTYPES[dtypes]
    check_against_reference(make(lead=(3, 25), dtype=dtype, adapter_dtype=adapter_dtype), dropout_p)


@pytest.mark.skipif(not TMA_HERE, reason="this GPU has no TMA")
@pytest.mark.parametrize(
    ("change", "design", "reason"),
    [
        (lambda o: o._replace(x=LAYOUTS["transposed"](o.x)), "serial", "x has strides"),
        (
            lambda o: o._replace(x=o.x[:, :-1], weight=o.weight[:, :-1], lora_a=o.lora_a[:, :-1]),
            "serial",
            "w has|x has",
        ),
        (lambda o: o.map(Tensor.float), "serial", "16-bit operands"),
        (lambda o: make(8, 16, 12, dtype=DTYPES[HALF][0]), "serial", "N = 12"),
        (lambda o: make(64, 64, 64, 256, dtype=DTYPES[HALF][0]), "one_launch", "rank 256: z would crowd y out"),
        (
            lambda o: make(64, 64, 64, 32, dtype=DTYPES[HALF][0], adapter_dtype=torch.float32),
            "one_launch",
            "fp32 adapters of rank 32",
        ),
    ],
    ids=["transposed_x", "odd_rows", "fp32", "odd_n", "large_rank", "fp32_adapters"],
)
def test_a_forced_design_that_cannot_run_says_why(
    change: Callable[[Operands], Operands], design: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, a, b, _ = change(make(64, 65, 64, dtype=DTYPES[HALF][0])).map(lambda t: t.to(DEVICE))
    monkeypatch.setenv("FASTLORA_TRITON_DESIGN", design)
    with pytest.raises(RuntimeError, match=f"FASTLORA_TRITON_DESIGN={design} cannot run this call: .*{reason}"):
        backend.lora_matmul(x, w, a, b, scale=SCALE)


def test_an_unknown_design_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, a, b, _ = make(8, 16, 16, dtype=DTYPES[HALF][0]).map(lambda t: t.to(DEVICE))
    monkeypatch.setenv("FASTLORA_TRITON_DESIGN", "fused")
    with pytest.raises(RuntimeError, match="'fused' is unknown: expected portable, serial, one_launch"):
        backend.lora_matmul(x, w, a, b, scale=SCALE)


@pytest.mark.skipif(not TMA_HERE, reason="this GPU has no TMA")
@pytest.mark.parametrize("expanded", [False, True])
def test_unforced_the_design_follows_the_strides(expanded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLORA_TRITON_DESIGN", raising=False)
    x, w, a, b, _ = make(64, 64, 64, dtype=DTYPES[HALF][0]).map(lambda t: t.to(DEVICE))
    x = x[:1].expand_as(x) if expanded else x
    assert backend._design(x, w, a, CAPABILITY, masked=False) == ("portable" if expanded else "serial")
    y, _ = backend.lora_matmul(x, w, a, b, scale=SCALE)
    oracle, _ = reference.lora_matmul(x.double(), w.double(), a.double(), b.double(), scale=SCALE)
    baseline, _ = reference.lora_matmul(x, w, a, b, scale=SCALE)
    assert_close_to_oracle(y, oracle=oracle, baseline=baseline, name="y")


@pytest.mark.parametrize("design", ["portable", "serial", "one_launch"])
def test_a_plan_names_design_and_tile(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if design != "portable" and not TMA_HERE:
        pytest.skip("this GPU has no TMA")
    x, w, a, b, _ = make(64, 64, 64, dtype=DTYPES[HALF][0]).map(lambda t: t.to(DEVICE))
    monkeypatch.setenv("FASTLORA_TRITON_DESIGN", design)
    assert re.fullmatch(rf"{design} \d+x\d+x\d+, \d+ warps, \d+ stages", backend.plan(x, w, a, b))


def test_a_gradient_expanded_from_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    operands = make(33, 64, 64, dtype=DTYPES[HALF][0], bias=False).map(lambda t: t.to(DEVICE)).leaves()
    y = operands()
    dy = gradient_of(y.cpu()).to(DEVICE)[:1, :1].expand_as(y)
    y.backward(dy)
    x, w, a, b = (tensor.detach() for tensor in operands[:4])
    oracle = oracle_step(x, w, a, b, dy, scale=SCALE)
    baseline = reference_step(x, w, a, b, dy, scale=SCALE)
    for name, tensor in (("dx", operands.x), ("da", operands.lora_a), ("db", operands.lora_b)):
        assert_close_to_oracle(tensor.grad, oracle=getattr(oracle, name), baseline=getattr(baseline, name), name=name)


def test_an_unknown_architecture_gets_the_smallest_shared_memory() -> None:
    assert tiles.shared_memory(999) == min(tiles.SHARED_MEMORY.values())


@pytest.mark.parametrize("capability", sorted(tiles.SHARED_MEMORY))
def test_every_architecture_has_a_row_for_every_request(capability: int) -> None:
    for kind in (None, "ragged", "tf32", "ieee"):
        for masked in (False, True):
            assert tiles.portable_rows(capability, kind, masked)


def test_each_refusal_of_the_backend_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    request = dispatch.Request("lora_matmul", torch.device("cpu"), torch.float32, torch.float32, 8, 8, 8, 2, False)
    assert "float64" in backend.refuses(request._replace(dtype=torch.float64))
    assert "nothing to compute: M=0 K=8 N=8" in backend.refuses(request._replace(m=0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.refuses(request) is None
    assert "interpreter multiplies bfloat16 wrongly" in backend.refuses(request._replace(dtype=torch.bfloat16))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "x is on cpu: the kernels need a CUDA GPU" in backend.refuses(request)
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert "pip install triton" in backend.refuses(request)


def test_a_tma_row_is_refused_off_its_architectures() -> None:
    x = torch.zeros(8, 8, dtype=torch.float16)
    assert "this is sm_120" in lora_matmul_tma.refuses(x, x, 120)
    assert "one_launch is for sm_90" in lora_matmul_tma.refuses_one_launch(x, 100, masked=False)
    assert "fp32 adapters" in lora_matmul_tma.refuses_one_launch(x.float(), 90, masked=True)


def test_an_empty_batch_runs_even_where_triton_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    operands = make(0, 16, 24, dtype=DTYPES[HALF][0]).map(lambda t: t.to(DEVICE)).leaves()
    y = operands(dropout_p=0.3)
    y.sum().backward()
    assert y.shape == (0, 24)
    assert operands.lora_a.grad.eq(0).all()
    assert operands.lora_b.grad.eq(0).all()


@pytest.mark.parametrize(
    ("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("tf32", "tf32"), ("ieee", "ieee")]
)
def test_fp32_products_follow_torchs_own_switches(setting: str, expected: str) -> None:
    """In a process of its own: torch refuses to read the old switch once the new one is set."""
    old = f"torch.set_float32_matmul_precision('{setting}')"
    new = f"torch.backends.cuda.matmul.fp32_precision = '{setting}'"
    switch = old if setting.startswith("high") else new
    script = f"import torch; {switch}; from fastlora.backends import triton; print(triton._precision())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
