"""The Triton kernels against the fp64 oracle: on the GPU where there is one, in Triton's interpreter elsewhere.

The interpreter multiplies bfloat16 wrongly, so bfloat16 is for the GPU alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastlora.accuracy import assert_close_to_oracle, oracle_step, reference_step
from fastlora.backends import dispatch, reference, triton_skinny
from fastlora.backends import triton as backend
from fastlora.backends.dropout import Dropout, draw_seed
from fastlora.backends.request import Kernel, Request, new_middle
from fastlora.kernels import lora_matmul_portable, lora_matmul_serial, tiles
from fastlora.kernels.indexing import tile_position
from fastlora.kernels.philox import keep_mask
from tests.cases import DTYPES, LAYOUTS, Operands, check_against_reference, gradient_of, kernel_named, make

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CAPABILITY = backend.capability_of(DEVICE)
TMA_HERE = CAPABILITY in tiles.TMA_CAPABILITIES
FUSED = tuple(kernel for kernel in backend.LORA_MATMUL if TMA_HERE or kernel.name != "triton-serial")
KERNELS = FUSED + triton_skinny.LORA_MATMUL
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


def on_device(operands: Operands) -> Operands:
    return operands.map(lambda t: t.to(DEVICE))


def check(
    kernel: Kernel,
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
    """One call of lora_matmul by one kernel against the oracle; ``backward`` turns the operands as backward does."""
    dtype, adapter_dtype = DTYPES[dtypes]
    x, w, a, b, bias = on_device(change(make(m, k, n, r, dtype=dtype, adapter_dtype=adapter_dtype)))
    if backward:
        w, a, b, bias = w.T.contiguous().T, a.T.contiguous().T, b.T.contiguous().T, None
    dropout = None if mask == "none" else Dropout(0.3, draw_seed(DEVICE))
    product = Operands(x, w, a, b, bias).product(dropout, on_product=mask == "product")._replace(x=layout(x))
    assert kernel.refuses(Request.of_lora_matmul(product)) is None
    actual, baseline = kernel.run(product), reference.lora_matmul(product)
    oracle = reference.lora_matmul(product.map(Tensor.double))
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


every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
PORTABLE, SERIAL, SKINNY = map(kernel_named, ("triton-portable", "triton-serial", "triton-skinny"))
needs_tma = pytest.mark.skipif(not TMA_HERE, reason="this GPU has no TMA")


@every_kernel
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_kernel_with_every_mask(kernel: Kernel, mask: str, backward: bool) -> None:
    check(kernel, mask=mask, backward=backward)


@every_kernel
@pytest.mark.parametrize("mask", MASKS)
def test_fp32_adapters_are_read_as_they_are(kernel: Kernel, mask: str) -> None:
    check(kernel, mask=mask, dtypes=f"{HALF}_fp32_adapters", backward=mask == "product")


@every_kernel
@pytest.mark.parametrize("r", [1, 8, 12, 24, 64, 128])
def test_any_rank(kernel: Kernel, r: int) -> None:
    check(kernel, m=70, k=64, n=144, r=r)


@needs_tma
@pytest.mark.parametrize("tile", tiles.TMA, ids=lambda tile: f"{tile.rows}x{tile.columns}")
@pytest.mark.parametrize("mask", MASKS)
def test_every_tile_row(mask: str, tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes would take the smallest row only."""
    monkeypatch.setattr(lora_matmul_serial, "matmul_tile", lambda rows, m, n, sms: tile)
    check(SERIAL, m=tile.rows + 1, k=72, n=tile.columns + 8, r=12, mask=mask, backward=mask == "product")


@pytest.mark.parametrize("tile", tiles.PORTABLE["large"] + tiles.PORTABLE["small"], ids=lambda tile: str(tile[:3]))
def test_every_tile_row_of_the_portable_kernel(tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_matmul_portable, "matmul_tile", lambda rows, m, n, sms: tile)
    check(PORTABLE, m=tile.rows + 1, k=72, n=tile.columns + 8, r=12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 40, 70), (70, 1, 40), (70, 40, 1), (63, 31, 65), (65, 33, 63), (129, 17, 257)]
)
@pytest.mark.parametrize("kernel", [PORTABLE, SKINNY], ids=lambda kernel: kernel.name)
def test_any_size(kernel: Kernel, m: int, k: int, n: int, mask: str) -> None:
    check(kernel, m=m, k=k, n=n, r=5, mask=mask)


@needs_tma
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 8), (127, 72, 264), (129, 56, 248), (64, 64, 128)])
def test_serial_off_the_tile(m: int, k: int, n: int) -> None:
    check(SERIAL, m=m, k=k, n=n, r=12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", [PORTABLE, SKINNY], ids=lambda kernel: kernel.name)
def test_fp32_operands(kernel: Kernel, mask: str) -> None:
    check(kernel, m=70, k=80, n=130, dtypes="fp32", mask=mask, backward=mask == "product")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [PORTABLE, SKINNY], ids=lambda kernel: kernel.name)
def test_any_strides(kernel: Kernel, layout: str) -> None:
    check(kernel, m=70, k=48, n=80, layout=LAYOUTS[layout], mask="input")


@every_kernel
def test_the_base_alone_and_the_update_alone(kernel: Kernel) -> None:
    check(kernel, change=lambda o: o._replace(weight=torch.zeros_like(o.weight)))
    check(kernel, change=lambda o: o._replace(lora_b=torch.zeros_like(o.lora_b)))


@every_kernel
def test_a_bias_that_is_not_contiguous(kernel: Kernel) -> None:
    check(kernel, change=lambda o: o._replace(bias=o.bias.repeat_interleave(2)[::2]))


@every_kernel
def test_two_runs_give_the_same_bits(kernel: Kernel) -> None:
    product = on_device(make(150, 96, 272, 16, dtype=DTYPES[HALF][0])).product(Dropout(0.2, draw_seed(DEVICE)))
    first, second = (kernel.run(product) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@every_kernel
@pytest.mark.parametrize("r", [8, 12])
def test_without_w_only_z_is_made(kernel: Kernel, r: int) -> None:
    product = on_device(make(40, 48, 64, r, dtype=DTYPES[HALF][0])).product()
    y, z = kernel.run(product._replace(w=None))
    assert y is None
    assert torch.equal(z, kernel.run(product)[1])
    assert z.stride() == new_middle(product.x, r).stride()


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
@pytest.mark.parametrize("forced", ["triton", "triton-skinny"])
def test_a_whole_step_through_lora_linear(
    forced: str, dtypes: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", forced)
    dtype, adapter_dtype = DTYPES[dtypes]
    check_against_reference(make(lead=(3, 25), dtype=dtype, adapter_dtype=adapter_dtype), dropout_p)


@needs_tma
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda o: o._replace(x=LAYOUTS["transposed"](o.x)), "x has strides"),
        (lambda o: o._replace(x=o.x[:, :-1], weight=o.weight[:, :-1], lora_a=o.lora_a[:, :-1]), "x has strides"),
        (lambda o: o.map(Tensor.float), "float32: TMA tiles are for 16-bit operands"),
        (lambda o: make(8, 16, 12, dtype=DTYPES[HALF][0]), "N = 12"),
    ],
    ids=["transposed_x", "odd_rows", "fp32", "odd_n"],
)
def test_a_forced_kernel_that_cannot_run_says_why(
    change: Callable[[Operands], Operands], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = on_device(change(make(64, 65, 64, dtype=DTYPES[HALF][0])))
    monkeypatch.setenv("FASTLORA_BACKEND", "triton-serial")
    with pytest.raises(RuntimeError, match="FASTLORA_BACKEND=triton-serial cannot run this call") as caught:
        operands()
    assert reason in str(caught.value)


@needs_tma
@pytest.mark.parametrize("expanded", [False, True])
def test_forced_by_family_the_kernel_follows_the_strides(expanded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    operands = on_device(make(64, 64, 64, dtype=DTYPES[HALF][0]))
    product = operands.product()._replace(x=operands.x[:1].expand_as(operands.x) if expanded else operands.x)
    chosen = dispatch.explain(product)
    assert chosen.chosen == ("triton-portable" if expanded else "triton-serial")
    assert re.fullmatch(r"\d+x\d+x\d+, \d+ warps, \d+ stages", chosen.tile)
    assert f"-> {chosen.chosen} ({chosen.tile})" in str(chosen)
    y, _ = dispatch.lora_matmul(product)
    oracle, _ = reference.lora_matmul(product.map(Tensor.double))
    baseline, _ = reference.lora_matmul(product)
    assert_close_to_oracle(y, oracle=oracle, baseline=baseline, name="y")


@pytest.mark.parametrize("kernel", FUSED, ids=lambda kernel: kernel.name)
def test_a_tile_is_that_of_the_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = tiles.Tile(64, 64, 32, 4, 2)
    for module in (lora_matmul_portable, lora_matmul_serial):
        monkeypatch.setattr(module, "matmul_tile", lambda rows, m, n, sms: tile)
    product = on_device(make(64, 64, 64, dtype=DTYPES[HALF][0])).product()
    assert kernel.tile(product) == "64x64x32, 4 warps, 2 stages"


@pytest.mark.parametrize("forced", ["triton", "triton-skinny"])
def test_a_gradient_expanded_from_one_number(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", forced)
    operands = make(33, 64, 64, dtype=DTYPES[HALF][0], bias=False).map(lambda t: t.to(DEVICE)).leaves()
    y = operands()
    dy = gradient_of(y.cpu()).to(DEVICE)[:1, :1].expand_as(y)
    y.backward(dy)
    product = operands.product().map(Tensor.detach)
    oracle, baseline = oracle_step(product, dy), reference_step(product, dy)
    for name, tensor in (("dx", operands.x), ("da", operands.lora_a), ("db", operands.lora_b)):
        assert_close_to_oracle(tensor.grad, oracle=getattr(oracle, name), baseline=getattr(baseline, name), name=name)


@pytest.mark.parametrize(
    ("m", "n", "sms", "expected"),
    [
        (8192, 4096, 132, (128, 256)),
        (17 * 128, 8 * 256, 136, (128, 256)),
        (17 * 128, 8 * 256, 132, (64, 128)),
        (18 * 128, 10 * 256, 132, (128, 128)),
        (18 * 128, 10 * 256, 180, (128, 256)),
        (12 * 64, 9 * 128, 132, (64, 128)),
        (8, 8, 132, (64, 64)),
    ],
    ids=["large", "one_wave", "a_wave_and_a_bit", "a_wave_and_a_third", "a_larger_gpu", "small", "tiny"],
)
def test_the_tile_is_the_one_that_is_done_first(m: int, n: int, sms: int, expected: tuple[int, int]) -> None:
    tile = tiles.matmul_tile(tiles.PORTABLE["large"], m, n, sms)
    assert (tile.rows, tile.columns) == expected


def test_the_larger_of_two_tiles_that_are_done_together() -> None:
    first = tiles.Tile(128, 128, 64, 8, 3)
    second = first._replace(warps=4)
    assert tiles.matmul_tile((first, second), 512, 512) == first


@pytest.mark.parametrize(
    ("name", "capability", "warp"),
    [("gfx942:sramecc+:xnack-", 0x942, 64), ("gfx90a:sramecc+:xnack-", 0x90A, 64), ("gfx1100", 0x1100, 32)],
)
def test_amd_architectures_are_numbers_too(name: str, capability: int, warp: int) -> None:
    assert tiles.amd_capability(name) == capability
    assert tiles.architecture(capability) == name.partition(":")[0]
    assert tiles.is_amd(capability)
    assert tiles.warp_size(capability) == warp
    assert not any(map(tiles.is_amd, tiles.TMA_CAPABILITIES))


def test_without_a_gpu_to_ask_a_tile_is_chosen_for_132_multiprocessors() -> None:
    assert tiles.sms(torch.device("cpu")) == tiles.DEFAULT_SMS == 132


def test_an_unknown_architecture_gets_the_smallest_shared_memory() -> None:
    assert tiles.shared_memory(999) == min(tiles.SHARED_MEMORY.values())


@pytest.mark.parametrize("capability", sorted(tiles.SHARED_MEMORY))
def test_every_architecture_has_a_row_for_every_request(capability: int) -> None:
    for kind in (None, "ragged", "tf32", "ieee"):
        for masked in (False, True):
            assert tiles.portable_rows(capability, kind, masked)


REQUEST = Request("lora_matmul", torch.device("cpu"), torch.float32, torch.float32, 8, 8, 8, 2, False)


def test_each_refusal_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float64" in backend.refuses(REQUEST._replace(dtype=torch.float64))
    assert "nothing to compute: M=0 K=8 N=8" in backend.refuses(REQUEST._replace(m=0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.refuses(REQUEST) is None
    assert "interpreter multiplies bfloat16 wrongly" in backend.refuses(REQUEST._replace(dtype=torch.bfloat16))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "x is on cpu: the kernels need a CUDA GPU" in backend.refuses(REQUEST)
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert "pip install triton" in backend.refuses(REQUEST)


@pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx1100"])
def test_forced_the_portable_kernel_tries_on_amd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` never takes it: nothing is proven there."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend.capability_of.cache_clear()
    request = REQUEST._replace(device=torch.device("cuda", 0), dtype=torch.float16)
    assert backend.refuses(request) is None
    assert f"this is {name.partition(':')[0]}" in backend.refuses_serial(request)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert backend.precision() == "ieee"
    backend.capability_of.cache_clear()


def test_serial_refuses_where_tma_cannot_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "refuses", lambda request: None)
    monkeypatch.setattr(backend, "capability_of", lambda device: 120)
    half = REQUEST._replace(dtype=torch.float16)
    assert backend.refuses_serial(half) == "TMA tiles are for sm_90, sm_100, sm_103, this is sm_120"
    monkeypatch.setattr(backend, "capability_of", lambda device: 90)
    assert backend.refuses_serial(half) is None
    assert backend.refuses_serial(half._replace(unaligned="x is odd")) == "x is odd"
    assert backend.refuses_serial(half._replace(unaligned="x is odd", z_only=True)) is None
    assert "16-bit" in backend.refuses_serial(REQUEST)


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
    script = f"import torch; {switch}; from fastlora.backends import triton; print(triton.precision())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
