"""The CUDA kernels' own source against the fp64 oracle: on an sm_90 GPU where there is one, else on the host model.

The host model (host_model/) interleaves CTAs, warps, copies and matrix products at random under a seed. What it finds
is as good as the faults it can see, so the last part of this file plants them and expects each to show.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.accuracy import assert_close_to_oracle
from fastlora.backends import cuda, cuda_abi, reference
from fastlora.backends.dropout import Dropout, draw_seed
from tests.cases import DTYPES, LAYOUTS, Operands, check_against_reference, make
from tests.csrc import host_library

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MASKS = ("none", "input", "product")
HALVES = ("bf16", "fp16")

pytestmark = [
    pytest.mark.skipif(not ON_GPU and shutil.which("g++") is None, reason="no g++ on PATH to build the host model"),
    pytest.mark.skipif(
        ON_GPU and torch.cuda.get_device_capability() != (9, 0), reason="the CUDA kernels are for sm_90"
    ),
]


@pytest.fixture(scope="session")
def host_model() -> Path | None:
    """The kernels compiled for the host; None where a GPU runs the real ones."""
    return None if ON_GPU else host_library.build(ROOT / "build" / "host_model")


@pytest.fixture(autouse=True)
def library(host_model: Path | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend on that library, every new element NaN until somebody writes it."""
    if host_model is not None:
        monkeypatch.setenv("FASTLORA_CUDA_LIBRARY", str(host_model))
        interleave(host_model, seed=1)
    load = cuda_abi.find_library
    load.cache_clear()
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    yield
    load.cache_clear()


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)

    return made


def interleave(library: Path, seed: int, resident_clusters: int = 2, calls_between_yields: int = 8) -> None:
    """Sets how the host model runs what follows."""
    configure = ctypes.CDLL(str(library)).fastlora_model_configure
    configure.argtypes = (ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64)
    configure(seed, resident_clusters, calls_between_yields, 0)


def in_rows_of(row: int, matrix: Tensor) -> Tensor:
    """The same matrix in rows of so many elements, the rest of each NaN."""
    rows = matrix.new_full((matrix.shape[0], row), float("nan"))
    rows[:, : matrix.shape[1]] = matrix
    return rows[:, : matrix.shape[1]]


def check(
    design: int = 0,
    *,
    m: int = 150,
    k: int = 96,
    n: int = 272,
    r: int = 16,
    dtypes: str = "bf16",
    mask: str = "none",
    backward: bool = False,
    layout: str | None = None,
    row: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One call of lora_matmul against the oracle; ``backward`` turns the operands as backward does.

    ``row``: x and w lie in rows of so many elements, NaN beyond their K.
    """
    dtype, adapter_dtype = DTYPES[dtypes]
    x, w, a, b, bias = make(m, k, n, r, dtype=dtype, adapter_dtype=adapter_dtype).map(lambda t: t.to(DEVICE))
    if backward:
        w, a, b, bias = w.T.contiguous().T, a.T.contiguous().T, b.T.contiguous().T, None
    if layout is not None:
        a, b = LAYOUTS[layout](a), LAYOUTS[layout](b)
    if row is not None:
        x, w = in_rows_of(row, x), in_rows_of(row, w)
    dropout = None if mask == "none" else Dropout(0.3, draw_seed(DEVICE))
    product = Operands(x, w, a, b, bias).product(dropout, on_product=mask == "product")
    y, z = cuda.lora_matmul(product, design)
    baseline, oracle = reference.lora_matmul(product), reference.lora_matmul(product.map(Tensor.double))
    assert_close_to_oracle(y, oracle=oracle[0], baseline=baseline[0], name="y")
    assert_close_to_oracle(z, oracle=oracle[1], baseline=baseline[1], name="z")
    return y, z


def check_padding_of_y() -> None:
    """N = 250 in rows of 256 is refused: the copy engine stores whole chunks of 16 bytes, and six more elements."""
    x, w, _, b, _ = make(64, 96, 250, 16, dtype=torch.bfloat16).map(lambda t: t.to(DEVICE))
    a, y, z = x[:16].contiguous(), x.new_ones(64, 256), x.new_empty(64, 16)
    matrices = {n: (t.data_ptr(), *t.stride()) for n, t in dict(x=x, w=w, a=a, b=b, y=y, z=z).items()}
    call = bytes(cuda_abi.LoraMatmul(m=64, k=96, n=250, r=16, scale=1.7, dtype=0, adapter_dtype=0, **matrices))
    verb = cuda_abi.require_library().lora_matmul
    workspace = x.new_empty(verb.workspace(call), dtype=torch.uint8)
    error = verb.run(call, workspace.data_ptr(), x.get_device(), None)
    if ON_GPU:
        torch.cuda.synchronize()
    assert (y[:, 250:] == 1).all(), "what lies beyond N in the rows of y was overwritten"
    assert error is not None
    assert b"n must be a multiple of 8" in error


def check_rank_grad(
    *,
    m: int = 300,
    c: int = 200,
    r: int = 16,
    dtypes: str = "bf16",
    masked: bool = False,
    wide_first: bool = False,
    row: int | None = None,
) -> Tensor:
    """One call of rank_grad against the oracle; the gradient is in the adapters' dtype.

    ``row``: wide lies in rows of so many elements, NaN beyond C.
    """
    dtype, grad_dtype = DTYPES[dtypes]
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(m, c, generator=generator).to(dtype).to(DEVICE)
    narrow = torch.randn(m, math.ceil(r / 8) * 8, generator=generator).to(dtype).to(DEVICE)[:, :r]
    if row is not None:
        wide = in_rows_of(row, wide)
    p, q = (wide, narrow) if wide_first else (narrow, wide)
    dropout = Dropout(0.3, draw_seed(DEVICE)) if masked else None
    grad = cuda.rank_grad(p, q, dtype=grad_dtype, dropout=dropout)
    baseline = reference.rank_grad(p, q, dtype=grad_dtype, dropout=dropout)
    oracle = reference.rank_grad(p.double(), q.double(), dtype=torch.float64, dropout=dropout)
    assert_close_to_oracle(grad, oracle=oracle, baseline=baseline, name="grad")
    return grad


@pytest.fixture(params=range(len(cuda.DESIGNS)), ids=cuda.DESIGNS)
def design(request: pytest.FixtureRequest) -> int:
    """Who makes z."""
    return int(request.param)


@pytest.fixture(params=[(128, 150), (256, 100), (256, 300)], ids=["128", "256", "256_in_pairs"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every kernel of lora_matmul: the columns of a tile, and an M at which it runs alone or in a cluster of two."""
    columns, m = request.param
    pack = cuda_abi.pack_lora_matmul
    monkeypatch.setattr(cuda_abi, "pack_lora_matmul", lambda *numbers: pack(*numbers[:-1], columns))
    return int(m)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtypes", HALVES)
def test_every_tile_design_and_mask(tile: int, design: int, dtypes: str, mask: str, backward: bool) -> None:
    check(design, m=tile, n=280, dtypes=dtypes, mask=mask, backward=backward)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("r", [1, 8, 12, 16, 24, 64, 72, 128, 200, 256])
def test_any_rank(design: int, r: int, mask: str) -> None:
    check(design, m=140, k=72, n=264, r=r, mask=mask, backward=mask == "product")


@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 8), (127, 64, 256), (129, 72, 264), (257, 200, 520), (64, 520, 136)])
def test_sizes_off_the_tile(design: int, m: int, k: int, n: int) -> None:
    check(design, m=m, k=k, n=n)
    check(design, m=m, k=k, n=n, backward=True, mask="product")


@pytest.mark.parametrize("mask", ["none", "input"])
def test_rows_that_end_inside_16_bytes(tile: int, design: int, mask: str) -> None:
    """K = 100 in rows of 104: tensor copies must fill by the element, not by the chunk, or NaN gets into the sums."""
    check(design, m=tile, k=100, mask=mask, row=104)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_rank_grad_of_rows_that_end_inside_16_bytes(masked: bool) -> None:
    check_rank_grad(c=100, row=104, masked=masked)


@pytest.mark.parametrize("mask", MASKS)
def test_float32_adapters_are_read_as_they_are(design: int, mask: str) -> None:
    check(design, dtypes="bf16_fp32_adapters", mask=mask, backward=mask == "product", r=20)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_adapters_of_any_strides(layout: str, backward: bool) -> None:
    check(layout=layout, backward=backward)


@pytest.mark.parametrize("dtypes", HALVES)
@pytest.mark.parametrize("on_product", [False, True], ids=["forward", "backward"])
def test_z_alone(dtypes: str, on_product: bool) -> None:
    dtype = DTYPES[dtypes][0]
    x, w, a, b, _ = make(300, 136, 64, 40, dtype=dtype).map(lambda t: t.to(DEVICE))
    a = a.T.contiguous().T if on_product else a
    product = Operands(x, w, a, b).product(on_product=on_product)._replace(w=None)
    y, z = cuda.lora_matmul(product)
    assert y is None
    baseline, oracle = (reference.lora_matmul(p)[1] for p in (product, product.map(Tensor.double)))
    assert_close_to_oracle(z, oracle=oracle, baseline=baseline, name="z")


@pytest.mark.parametrize("dtypes", sorted(set(DTYPES) - {"fp32"}))
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("r", [1, 16, 72, 200])
def test_rank_grad(r: int, masked: bool, dtypes: str) -> None:
    check_rank_grad(r=r, c=264, masked=masked, dtypes=dtypes)


@pytest.mark.parametrize("dtypes", sorted(set(DTYPES) - {"fp32"}))
@pytest.mark.parametrize("r", [4, 12, 16, 70])
def test_rank_grad_along_its_rows(r: int, dtypes: str) -> None:
    """db: 8 neighbouring r lie side by side, in whole 16 bytes or not, and the last of them may be beyond R."""
    check_rank_grad(m=600, c=136, r=r, dtypes=dtypes, wide_first=True)


@pytest.mark.parametrize(("m", "c"), [(1, 8), (64, 128), (65, 136), (700, 72), (1100, 392)])
def test_rank_grad_off_the_tile_and_split(m: int, c: int) -> None:
    check_rank_grad(m=m, c=c, r=8)
    check_rank_grad(m=m, c=c, r=8, wide_first=True)


def test_rank_grad_goes_round_its_ring() -> None:
    """Enough columns that one split takes all tokens: more trips than stages."""
    check_rank_grad(m=700, c=8504)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", sorted(set(DTYPES) - {"fp32"}))
def test_a_training_step_through_autograd(
    design: int, dtypes: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ON_GPU:
        pytest.skip("tests/test_gpu.py does this on the GPU")
    monkeypatch.setenv("FASTLORA_BACKEND", f"cuda-{cuda.DESIGNS[design]}")
    dtype, adapter_dtype = DTYPES[dtypes]
    operands = make(k=72, n=136, r=12, lead=(2, 3, 25), dtype=dtype, adapter_dtype=adapter_dtype)
    check_against_reference(operands, dropout_p=dropout_p)


@pytest.mark.skipif(ON_GPU, reason="needs the host model's seeds; tests/test_gpu.py repeats on the GPU")
def test_the_same_bits_however_the_hardware_interleaves(host_model: Path, design: int) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    results = []
    for seed in range(12):
        interleave(host_model, seed, resident_clusters=1 + seed % 4, calls_between_yields=(0, 1, 5, 40)[seed % 4])
        torch.set_rng_state(state)
        results.append(
            (*check(design, m=400, n=520, mask="product", backward=True), check_rank_grad(m=600, masked=True))
        )
    for other in results[1:]:
        assert all(torch.equal(first, again) for first, again in zip(results[0], other, strict=True))


@pytest.mark.skipif(ON_GPU, reason="the host model counts launches")
@pytest.mark.parametrize("dtypes", ["bf16", "bf16_fp32_adapters"])
def test_launches_of_a_call(host_model: Path, dtypes: str) -> None:
    """One that clears and packs in front of one that computes, or two; none where one split needs no count."""
    statistic = ctypes.CDLL(str(host_model)).fastlora_model_statistic

    def launches(call: Callable[[], object]) -> int:
        interleave(host_model, seed=1)
        call()
        return int(statistic(b"launches"))

    counts = {name: launches(lambda d=d: check(d, dtypes=dtypes)) for d, name in enumerate(cuda.DESIGNS)}
    assert counts == {"z_jobs": 2, "serial": 3}
    assert launches(lambda: check_rank_grad(m=600, dtypes=dtypes)) == 2
    assert launches(lambda: check_rank_grad(m=200, dtypes=dtypes)) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 257}, "r must be at most 256"),
        ({"n": 250}, "n must be a multiple of 8"),
        ({"x": (16, 100, 1)}, "rows of x must be contiguous and start on 16 bytes"),
        ({"x": (16, 96, 2)}, "rows of x must be contiguous and start on 16 bytes"),
        ({"w": (16, 100, 1)}, "rows of w, or of its transpose, must be contiguous and start on 16 bytes"),
        ({"w": (16, 1, 100)}, "rows of w, or of its transpose, must be contiguous and start on 16 bytes"),
        ({"y": (24, 256, 1)}, "rows of y must be contiguous and start on 16 bytes"),
        ({"z": (16, 8, 1)}, "rows of z must be contiguous and start on 16 bytes"),
        ({"dtype": 2}, "dtype must be BF16 or FP16"),
        ({"m": 0}, "must be at least 1"),
        ({"tile_columns": 64}, "tile_columns must be 0, 128 or 256"),
        ({"tile_columns": 128, "r": 200, "z": (16, 200, 1)}, "tiles of 128 columns take r up to 128"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_library_refuses_in_words_before_it_launches(change: dict[str, Any], words: str) -> None:
    good = dict(m=128, k=96, n=256, r=16, dtype=0, adapter_dtype=0)
    good |= dict(x=(16, 96, 1), w=(16, 96, 1), a=(16, 96, 1), b=(16, 16, 1), y=(16, 256, 1), z=(16, 16, 1))
    call = cuda_abi.LoraMatmul(**(good | change))
    answer = cuda_abi.require_library().lora_matmul.run(bytes(call), 0, 0, None)
    assert answer is not None
    assert words in answer.decode()


def test_the_padding_of_y_stays() -> None:
    check_padding_of_y()


SHAPES = [
    (m, n, tile_n, cluster, sms)
    for m in (1, 128, 129, 1000, 2048, 8192, 20000)
    for n in (8, 256, 1024, 4096, 28672)
    for tile_n, cluster in ((128, 1), (256, 1), (256, 2))
    for sms in (2, 7, 114, 132)
]


@pytest.mark.skipif(ON_GPU, reason="plain arithmetic, checked where the host model is built")
def test_every_producer_of_z_comes_before_all_that_wait_for_it(tmp_path: Path) -> None:
    probe_path = host_library.build(tmp_path, sources=[Path(__file__).with_name("schedule_probe.cpp")])
    probe = ctypes.CDLL(str(probe_path)).schedule_probe
    for m, n, tile_n, cluster, sms in SHAPES:
        sizes = (ctypes.c_uint64(m), ctypes.c_uint64(n), tile_n, cluster)
        count = probe(*sizes, 1, 1, sms, None, 0)
        jobs = (ctypes.c_uint32 * (3 * count))()
        assert probe(*sizes, 1, 1, sms, jobs, count) == count
        row_units, columns = math.ceil(m / (128 * cluster)), math.ceil(n / tile_n)
        made: set[int] = set()
        tiles: set[tuple[int, int]] = set()
        for units, first, column in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
            if units:
                assert not tiles, "a producer after a tile would be waited for"
                assert made.isdisjoint(range(first, first + units))
                made |= set(range(first, first + units))
            else:
                assert first in made
                tiles.add((first, column))
        assert made == set(range(row_units))
        assert tiles == {(row, column) for row in range(row_units) for column in range(columns)}
        assert count - row_units * columns <= row_units


# A fault planted in csrc/: in which file what is replaced by what, and the words of the report where it must be one.
FAULTS: dict[str, tuple[list[tuple[str, str, str]], str | None]] = {
    "stride_in_the_descriptor": (
        [("layout.cuh", "uint64_t(SWIZZLE_BYTES >> 4) << 32", "uint64_t(SWIZZLE_BYTES >> 5) << 32")],
        None,
    ),
    "leading_offset_in_the_descriptor": (
        [
            (
                "layout.cuh",
                "uint64_t((panel_bytes & 0x3FFFF) >> 4) << 16",
                "uint64_t((panel_bytes & 0x3FFFF) >> 5) << 16",
            )
        ],
        None,
    ),
    "swizzle_in_the_descriptor": ([("layout.cuh", "uint64_t(1) << 62", "uint64_t(2) << 62")], None),
    "step_along_k": ([("layout.cuh", "16 * PANEL_ROW_BYTES : 32", "16 * PANEL_ROW_BYTES : 64")], None),
    "step_along_k_of_a_transposed_operand": (
        [("layout.cuh", "16 * PANEL_ROW_BYTES : 32", "8 * PANEL_ROW_BYTES : 32")],
        None,
    ),
    "swizzle_of_what_threads_write": ([("layout.cuh", "((chunk ^ (row & 7)) << 4)", "(chunk << 4)")], None),
    "row_of_a_fragment": ([("layout.cuh", "return 16 * warp + lane / 4;", "return 16 * warp + lane % 8;")], None),
    "phase_waited_for": (
        [
            (
                "pipeline.cuh",
                "barrier_wait(full(), trip.parity);",
                "barrier_wait(full(), trip.parity ^ 1);",
            )
        ],
        None,
    ),
    "coordinate_of_x": (
        [
            (
                "lora_matmul_producer.cuh",
                "tma_load(to, &p.x, ring.full(), k, first_m);",
                "tma_load(to, &p.x, ring.full(), k, first_m + 1);",
            )
        ],
        None,
    ),
    "place_of_a_share_of_w": (
        [
            (
                "lora_matmul_producer.cuh",
                "to + rank * ROWS * PANEL_ROW_BYTES, first_k",
                "to + (rank ^ 1) * ROWS * PANEL_ROW_BYTES, first_k",
            )
        ],
        None,
    ),
    "too_few_bytes_expected": (
        [
            (
                "pipeline.cuh",
                "barrier_arrive_expect(full(), bytes);",
                "barrier_arrive_expect(full(), bytes - 8192);",
            )
        ],
        None,
    ),
    "too_many_bytes_expected": (
        [
            (
                "pipeline.cuh",
                "barrier_arrive_expect(full(), bytes);",
                "barrier_arrive_expect(full(), bytes + 128);",
            )
        ],
        "deadlock.*full\\[",
    ),
    "slot_given_back_before_the_wait": (
        [
            (
                "pipeline.cuh",
                "wgmma_wait<1>();\n    release(previous);",
                "release(previous);\n    wgmma_wait<1>();",
            )
        ],
        None,
    ),
    "slot_given_back_by_one_cta_of_two": (
        [
            ("pipeline.cuh", 'CONSUMERS * CLUSTER, "empty"', 'CONSUMERS, "empty"'),
            ("pipeline.cuh", "if (thread < CLUSTER) {", "if (thread == (CLUSTER > 1 ? cluster_rank() : 0)) {"),
        ],
        None,
    ),
    "y_without_its_fence": ([("lora_matmul_consumer.cuh", "fence_async_shared();\n      sync();", "sync();")], "fence"),
    "masked_x_without_its_fence": (
        [("lora_matmul_consumer.cuh", "fence_async_shared();\n    sync();", "sync();")],
        "fence",
    ),
    "bias_of_another_lane": (
        [("lora_matmul_consumer.cuh", "4 * group + fragment.lane % 4)", "4 * group + fragment.lane / 8)")],
        "y",
    ),
    "bias_of_the_next_columns": (
        [("lora_matmul_consumer.cuh", "first_n + chunk * PANEL + 2 * fragment.lane;", "first_n + 2 * fragment.lane;")],
        "y",
    ),
    "barriers_not_made_known_to_the_cluster": (
        [("lora_matmul_sm90.cu", "fence_barrier_init();\n    prefetch_map(&p.x);", "prefetch_map(&p.x);")],
        "cluster_sync_initialised before a fence_barrier_init",
    ),
    "y_buffer_taken_too_early": (
        [("lora_matmul_consumer.cuh", "if (thread == 0) tma_store_wait_read<L::Y_BUFFERS - 1>();", "")],
        None,
    ),
    "z_not_waited_for": (
        [("lora_matmul_producer.cuh", "while (load_acquire(p.flags + block) < CONSUMERS) back_off();", "")],
        None,
    ),
    "half_of_z_waited_for": (
        [
            (
                "lora_matmul_producer.cuh",
                "(load_acquire(p.flags + block) < CONSUMERS)",
                "(load_acquire(p.flags + block) < 1)",
            )
        ],
        None,
    ),
    "n_of_any_size": ([("lora_matmul_sm90.cu", "if (c.n % 8 != 0) return", "if (c.n < 0) return")], "beyond N"),
    "tiles_before_their_z": (
        [
            ("schedule.cuh", "return job < z_jobs;", "return job >= row_units * columns;"),
            ("schedule.cuh", "return job * z_run;", "return (job - row_units * columns) * z_run;"),
            ("schedule.cuh", "const uint32_t tile = job - z_jobs;", "const uint32_t tile = job;"),
        ],
        "deadlock.*global memory",
    ),
    "job_taken_before_the_counter_is_clear": (
        [
            ("lora_matmul_producer.cuh", "      await_launch_before();\n      if (p.s", "      if (p.s"),
            (
                "lora_matmul_producer.cuh",
                "load_z_job(row_block(unit));\n",
                "load_z_job(row_block(unit));\nawait_z(0);\n",
            ),
        ],
        "atomic_add of what a launch before hands over",
    ),
    "no_wait_for_the_launch_before": (
        [("lora_matmul_producer.cuh", "    grid_dependency_wait();\n", "")],
        "hands over|never called grid_dependency_wait",
    ),
    "tiles_let_go_before_their_counter_is_clear": (
        [
            (
                "lora_matmul_producer.cuh",
                "await_launch_before();\n      if (p.schedule.columns == 0) grid_dependency_launch();",
                "grid_dependency_launch();\n      await_launch_before();",
            )
        ],
        "atomic_add of what a launch before hands over",
    ),
    "z_of_the_launch_before_taken_too_early": (
        [
            ("lora_matmul_producer.cuh", "    await_z(block);\n    for", "    for"),
            ("lora_matmul_producer.cuh", "r, first_m);\n", "r, first_m);\nawait_z(block);\n"),
        ],
        "tma_load of what a launch before hands over",
    ),
    "splits_counted_before_the_count_is_clear": (
        [("rank_grad_sm90.cu", "grid_dependency_wait();  // for the zeros\n", "")],
        "hands over",
    ),
    "job_never_acknowledged": (
        [("lora_matmul_shared.cuh", "if (lane == 0) acknowledge();", "")],
        "deadlock.*job_empty\\[",
    ),
    "job_word_not_expected": (
        [("lora_matmul_shared.cuh", "barrier_arrive_expect(full(), 4);", "")],
        r"deadlock.*job_full\[",
    ),
    "job_word_over_one_that_is_not_read": (
        [("lora_matmul_shared.cuh", "barrier_wait(empty(), at.parity ^ 1);", "")],
        None,
    ),
    "job_word_announced_before_it_is_there": (
        [
            (
                "lora_matmul_shared.cuh",
                "store_shared(word(), job);\n      barrier_arrive(full());",
                "barrier_arrive(full());\n      store_shared(word(), job);",
            )
        ],
        None,
    ),
    "job_word_by_an_asynchronous_store_in_a_cluster_of_one": (
        [
            (
                "lora_matmul_shared.cuh",
                "store_shared(word(), job);\n      barrier_arrive(full());",
                "barrier_arrive_expect(full(), 4);\n      store_async(word(), 0, job, full());",
            )
        ],
        "store_async in a cluster of one CTA",
    ),
    "cta_gone_before_its_pair": ([("lora_matmul_sm90.cu", "if (CLUSTER > 1) cluster_sync();\n}", "}")], None),
    "partial_sums_announced_too_early": (
        [
            (
                "rank_grad_sm90.cu",
                "is_last() const {\n    named_barrier_sync(1 + CONSUMERS, CONSUMERS * WARPGROUP);",
                "is_last() const {",
            )
        ],
        None,
    ),
    "last_split_left_out": (
        [("rank_grad_sm90.cu", "split = 0; split < grid_blocks_y();", "split = 0; split + 1 < grid_blocks_y();")],
        "grad",
    ),
    "r_of_the_next_piece": ([("rank_grad_sm90.cu", "quads[0], high = quads[1]", "quads[1], high = quads[0]")], "grad"),
    "tokens_of_the_next_split": (
        [
            (
                "rank_grad_sm90.cu",
                "p.tokens_per_split ? p.m : first_m + p.tokens_per_split",
                "p.tokens_per_split ? p.m : p.m",
            )
        ],
        None,
    ),
}

# Those in the ring that both verbs hold: each verb must notice.
IN_BOTH_VERBS = {
    "phase_waited_for",
    "too_few_bytes_expected",
    "too_many_bytes_expected",
    "slot_given_back_before_the_wait",
}


def with_fault(folder: Path, name: str) -> Path:
    """A copy of csrc/ with the fault in it, and float16 left out, which halves the time to compile."""
    replacements = list(FAULTS[name][0])
    shutil.copytree(ROOT / "csrc", folder)
    for verb in ("lora_matmul", "rank_grad"):
        replacements.append((f"{verb}_sm90.cu", f": run_{verb}<FP16>(", ": nullptr; (void)("))
    for path, old, new in replacements:
        text = (folder / path).read_text(encoding="utf-8")
        assert old in text, f"csrc/{path} no longer has {old!r}: plant the fault where it went"
        (folder / path).write_text(text.replace(old, new), encoding="utf-8")
    return folder


@pytest.mark.skipif(ON_GPU, reason="on the host model alone")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = host_library.build(tmp_path / "library", csrc=with_fault(tmp_path / "csrc", name))
    monkeypatch.setattr(cuda_abi, "find_library", lambda: cuda_abi.load(str(library)))
    seen: dict[str, list[str]] = {}
    for seed in range(12):
        interleave(library, seed, resident_clusters=1 + seed % 3, calls_between_yields=(8, 0, 1, 40)[seed % 4])
        for verb, attempt in (
            ("lora_matmul", lambda: check(m=400, k=520, n=520, r=72)),
            ("lora_matmul", lambda: check(m=400, k=520, n=520, mask="product", backward=True)),
            ("lora_matmul", lambda: check(m=150, k=520, n=264, mask="input")),
            # So few trips a tile that the producer is two tiles ahead.
            ("lora_matmul", lambda: check(m=400, k=96, n=520)),
            ("lora_matmul", check_padding_of_y),
            # Two launches that depend on one before.
            ("lora_matmul", lambda: check(1, m=400, k=96, n=520, dtypes="bf16_fp32_adapters")),
            # Clusters of one.
            ("lora_matmul", lambda: check(m=100, k=96, n=520)),
            ("rank_grad", lambda: check_rank_grad(m=1100, c=200, masked=True)),
            ("rank_grad", lambda: check_rank_grad(m=700, c=8504)),
        ):
            try:
                attempt()
            except (AssertionError, RuntimeError) as error:
                seen.setdefault(verb, []).append(str(error))
        if len(seen) >= (2 if name in IN_BOTH_VERBS else 1):
            break
    assert seen, "nothing noticed"
    if name in IN_BOTH_VERBS:
        assert seen.keys() == {"lora_matmul", "rank_grad"}, "one verb alone noticed"
    reports = [report for verb in seen.values() for report in verb]
    words = FAULTS[name][1]
    assert words is None or any(re.search(words, report, re.DOTALL) for report in reports), reports[0]
