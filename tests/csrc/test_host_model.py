"""The host model itself, on small kernels: what the hardware would compute it computes, what would go wrong it reports.

Tensor copies against slices, wgmma against torch, waiting and its faults by the words of the report. A fault that shows
only at some times must show under one of a few seeds.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc import host_library

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(__file__).with_name("host_model")
KERNELS = (MODEL / "unit_kernels.cu", MODEL / "unit_threads.cu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEEDS = range(12)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH to build the host model")


class Library:
    """The kernels' launchers: a number goes as 64 bits, a tensor as its address; what went wrong comes back."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fastlora_model_configure.argtypes = (
            (ctypes.c_uint64,) + (ctypes.c_uint32,) * 2 + (ctypes.c_uint64,)
        )
        self.library.fastlora_model_statistic.restype = ctypes.c_int64

    def configure(self, seed: int = 0, resident: int = 0, calls_between_yields: int = 0, most_steps: int = 0) -> None:
        self.library.fastlora_model_configure(seed, resident, calls_between_yields, most_steps)

    def statistic(self, name: str) -> int:
        return self.library.fastlora_model_statistic(name.encode())

    def __call__(self, name: str, *arguments: Tensor | int | str) -> str | None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p if name not in ("unit_round", "unit_widen") else None
        error = function(*(self.value(argument) for argument in arguments))
        return None if error is None else error.decode()

    @staticmethod
    def value(argument: Tensor | int | str) -> object:
        if isinstance(argument, Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        return argument.encode() if isinstance(argument, str) else ctypes.c_int64(argument)


@pytest.fixture(scope="session")
def built() -> Library:
    return Library(host_library.build(ROOT / "build" / "host_model" / "unit", sources=KERNELS))


@pytest.fixture
def library(built: Library) -> Library:
    built.configure()
    return built


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def padded(rows: int, columns: int) -> Tensor:
    """Rows of whole 16 bytes, with NaN in between."""
    matrix = torch.full((rows, (columns + 7) // 8 * 8 + 8), float("nan"), dtype=torch.bfloat16)
    matrix[:, :columns] = random(rows, columns)
    return matrix[:, :columns]


def copy(
    library: Library,
    source: Tensor,
    target: Tensor,
    *,
    box_rows: int = 64,
    start: tuple[int, int] = (0, 0),
    end: tuple[int, int] | None = None,
    fault: str = "",
) -> tuple[str | None, Tensor]:
    """Copies the box at ``start`` (row, column) to ``end`` and gives what lay in shared memory, row by row."""
    assert source.stride() == target.stride()
    raw = torch.zeros(box_rows, 64, dtype=torch.bfloat16)
    (c1, c0), (to_c1, to_c0) = start, start if end is None else end
    rows, columns = source.shape
    sizes = (rows, columns, source.stride(0) * 2, box_rows)
    error = library("unit_copy", source, target, *sizes, c0, c1, to_c0, to_c1, raw, fault)
    return error, raw


def box_of(source: Tensor, start: tuple[int, int], box_rows: int) -> Tensor:
    """The box, with zeros outside the matrix."""
    box = torch.zeros(box_rows, 64, dtype=source.dtype)
    for row in range(box_rows):
        for column in range(64):
            r, c = start[0] + row, start[1] + column
            if 0 <= r < source.shape[0] and 0 <= c < source.shape[1]:
                box[row, column] = source[r, c]
    return box


PLACES = [(0, 0), (3, 5), (40, 100), (-7, -9), (36, 136), (-64, 0), (100, 0), (0, 200), (-100, -1000)]


@pytest.mark.parametrize("start", PLACES)
def test_a_copy_fills_with_zeros_outside_and_writes_whole_chunks(library: Library, start: tuple[int, int]) -> None:
    """Of rows of 150 elements a store writes 152: hardware writes 16 bytes or none."""
    source, target = padded(60, 150), padded(60, 150)
    whole = target.as_strided((60, target.stride(0)), target.stride())
    expected = whole.clone()
    error, _ = copy(library, source, target, start=start, end=(start[0] + 2, start[1] - 3))
    assert error is None
    box = box_of(source, start, 64)
    for row in range(64):
        for column in range(64):
            r, c = start[0] + 2 + row, start[1] - 3 + column
            if 0 <= r < 60 and 0 <= c < 152:
                expected[r, c] = box[row, column]
    assert torch.equal(whole.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("box_rows", [8, 64, 256])
def test_a_copy_swizzles_chunks_of_16_bytes_by_the_row(library: Library, box_rows: int) -> None:
    source = padded(300, 70)
    error, raw = copy(library, source, padded(300, 70), box_rows=box_rows, start=(1, 2))
    assert error is None
    chunks = box_of(source, (1, 2), box_rows).view(box_rows, 8, 8)
    for row in range(box_rows):
        for chunk in range(8):
            assert torch.equal(raw.view(box_rows, 8, 8)[row, chunk ^ (row % 8)], chunks[row, chunk])


def test_a_copy_lands_whatever_the_order(library: Library) -> None:
    source, target = padded(64, 64), padded(64, 64)
    for seed in SEEDS:
        library.configure(seed, calls_between_yields=1 + seed)
        assert copy(library, source, target.zero_())[0] is None
        assert torch.equal(source, target)


def test_a_map_of_misaligned_rows_is_refused(library: Library) -> None:
    matrix = torch.zeros(64, 68, dtype=torch.bfloat16)
    assert "16 bytes" in copy(library, matrix, matrix)[0]
    shifted = matrix.view(-1)[4:4100].view(64, 64)
    assert "16 bytes" in copy(library, shifted, shifted)[0]
    assert "256" in copy(library, padded(300, 64), padded(300, 64), box_rows=257)[0]


COPY_FAULTS = {
    "not waited for": r"load_shared at \d+ while a tma_load to \d+ for barrier landed\[7\] is in flight",
    "wrong parity": r"while a tma_load .* for barrier landed\[7\] is in flight",
    "too few bytes": r"(?s)deadlock.*waits for barrier landed\[7\] phase parity 0 .*-\d+ bytes|is in flight|bytes more",
    "too many bytes": r"(?s)deadlock.*waits for barrier landed\[7\] phase parity 0 .*pending 0 of 1 arrivals, 128 b",
    "too many arrivals": r"(?s)deadlock.*CTA 0 warp 0.*landed\[7\] .*pending 1 of 2 arrivals, 0 bytes",
    "box not aligned": "not a multiple of 1024",
    "barrier not initialised": "no barrier was initialised",
    "barrier initialised twice": r"where barrier landed\[7\] lives",
    "barrier not fenced": r"barrier landed\[7\] is used before a fence_barrier_init",
    "loaded twice": r"tma_load at \d+ while a tma_load to \d+ .* is in flight|expects|the CTA ends",
    "arrives twice": r"arrives on barrier landed\[7\] more often than the 1 times|the CTA ends|deadlock",
    "writes over the barrier": r"writes over barrier landed\[7\]",
    "written before the store has read": "nobody has waited for the tma_store",
    "store not waited for": "before the tma_store .* was waited for",
    "store not committed": "before the tma_store .* was waited for",
}


def reports(library: Library, run: object, *, resident: int = 0) -> list[str | None]:
    """What a launch says under each seed."""
    said = []
    for seed in SEEDS:
        library.configure(seed, resident)
        said.append(run())
    return said


@pytest.mark.parametrize("fault", COPY_FAULTS)
def test_a_fault_in_a_copy_is_reported(library: Library, fault: str) -> None:
    source = padded(64, 64)
    said = reports(library, lambda: copy(library, source, padded(64, 64), fault=fault)[0])
    assert any(said)
    assert all(words is None or re.search(COPY_FAULTS[fault], words) for words in said), said
    if fault not in ("not waited for", "wrong parity"):
        assert all(said)
    # The launch that failed leaves nothing behind.
    target = padded(64, 64)
    assert copy(library, source, target)[0] is None
    assert torch.equal(source, target)


# Leading and stride offset of each descriptor in bytes. The leading one counts where MN-major, from panel to panel.
def offsets(**changed: int) -> Tensor:
    values = {"a_leading": 0, "a_stride": 1024, "b_leading": 8192, "b_stride": 1024, "swizzle": 1} | changed
    return torch.tensor(list(values.values()), dtype=torch.int32)


def product(
    library: Library,
    *,
    n: int = 128,
    a_mn: bool = False,
    b_mn: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    doubled: bool = False,
    fault: str = "",
    **changed: int,
) -> tuple[str | None, Tensor, Tensor]:
    """What went wrong, the product and what it should be."""
    a, b = random(64, 64, dtype=dtype), random(n, 64, dtype=dtype)
    out = torch.full((64, n), float("nan"))
    stored_a, stored_b = (a.T.contiguous() if a_mn else a), (b.T.contiguous() if b_mn else b)
    flags = (n, a_mn, b_mn, dtype == torch.float16, doubled)
    error = library("unit_product", stored_a, stored_b, out, *flags, offsets(**changed), fault)
    return error, out, (2 if doubled else 1) * (a.double() @ b.double().T)


def is_right(out: Tensor, expected: Tensor) -> bool:
    return torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b_mn", [False, True])
@pytest.mark.parametrize("a_mn", [False, True])
@pytest.mark.parametrize("n", [64, 128, 256])
def test_wgmma_multiplies_both_majors(library: Library, n: int, a_mn: bool, b_mn: bool, dtype: str) -> None:
    for seed in range(4):
        library.configure(seed)
        error, out, expected = product(library, n=n, a_mn=a_mn, b_mn=b_mn, dtype=DTYPES[dtype])
        assert error is None
        assert is_right(out, expected)
    assert library.statistic("wgmmas") == 4


def test_wgmma_sees_what_threads_wrote_and_fenced(library: Library) -> None:
    for seed in SEEDS:
        library.configure(seed)
        error, out, expected = product(library, doubled=True)
        assert error is None
        assert is_right(out, expected)


@pytest.mark.parametrize(
    ("major", "changed"),
    [
        ("K", {"a_stride": 512}),
        ("K", {"b_stride": 2048}),
        ("MN", {"a_stride": 2048}),
        ("MN", {"b_stride": 0}),
        ("MN", {"b_leading": 4096}),
        ("MN", {"b_leading": 0}),
    ],
)
def test_a_wrong_offset_in_a_descriptor_gives_a_wrong_product(library: Library, major: str, changed: dict) -> None:
    error, out, expected = product(library, a_mn=major == "MN", b_mn=major == "MN", **changed)
    assert error is not None or not is_right(out, expected)


@pytest.mark.parametrize("offset", ["a_leading", "b_leading"])
def test_the_leading_offset_of_a_k_major_operand_is_not_used(library: Library, offset: str) -> None:
    error, out, expected = product(library, **{offset: 48})
    assert error is None
    assert is_right(out, expected)


@pytest.mark.parametrize("swizzle", [0, 2, 3])
def test_another_swizzle_is_reported(library: Library, swizzle: int) -> None:
    assert re.search(rf"descriptor of A: swizzle mode {swizzle}", product(library, swizzle=swizzle)[0])


PRODUCT_FAULTS = {
    "no fence_async_shared": r"wgmma touches .* which thread \d+ \(warp \d\) wrote without a fence_async_shared",
    "no wgmma_fence": "wgmma without a wgmma_fence",
    "descriptors differ": "warpgroup disagree",
    "sums written before the wait": "writes to the sums of a wgmma that is in flight",
    "operand written before the wait": "an operand of a wgmma of warpgroup 0 that nobody has waited for",
    "no wgmma_wait": "ends before its wgmma was waited for",
}


@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_a_fault_around_wgmma_is_reported(library: Library, fault: str) -> None:
    for words in reports(library, lambda: product(library, doubled=True, fault=fault)[0]):
        assert words is not None
        assert re.search(PRODUCT_FAULTS[fault], words)


def test_sums_read_before_the_wait_are_nan(library: Library) -> None:
    for seed in SEEDS:
        library.configure(seed)
        error, out, _ = product(library, fault="sums read before the wait")
        assert error is None
        assert out.isnan().all()


def ring(library: Library, trips: int, fault: str = "") -> tuple[str | None, Tensor, Tensor]:
    a, b = random(64, 64 * trips), random(64, 64 * trips)
    out = torch.full((64, 64), float("nan"))
    error = library("unit_ring", a, b, out, trips, fault)
    return error, out, a.double() @ b.double().T


@pytest.mark.parametrize("trips", [1, 2, 5, 8])
def test_a_ring_of_two_slots_sums_its_trips(library: Library, trips: int) -> None:
    for seed in SEEDS:
        library.configure(seed)
        error, out, expected = ring(library, trips)
        assert error is None
        assert is_right(out, expected)


RING_FAULTS = {
    "slot never released": r"(?s)deadlock:.*CTA 0 warp 0 .*waits for barrier empty\[1\] phase parity . .*pending 1 of",
    "slot released twice": "",
    "slot released before the wait": "an operand of a wgmma of warpgroup 1 that nobody has waited for",
    "slot not waited for": "while a tma_load|an operand of a wgmma|arrives on barrier",
    "wrong parity": "",
}


@pytest.mark.parametrize("fault", RING_FAULTS)
def test_a_fault_in_a_ring_shows(library: Library, fault: str) -> None:
    shown = []
    for seed in SEEDS:
        library.configure(seed)
        error, out, expected = ring(library, 8, fault)
        assert error is None or re.search(RING_FAULTS[fault], error), error
        shown.append(error is not None or not is_right(out, expected))
    assert any(shown)


def pair(library: Library, clusters: int, fault: str = "") -> tuple[str | None, Tensor, Tensor]:
    source = random(64 * clusters, 64)
    raw = torch.zeros(clusters, 2, 64, 8, 8, dtype=torch.bfloat16)
    error = library("unit_pair", source, raw, clusters, fault)
    rows = torch.arange(64)[:, None]
    return error, raw[:, :, rows, torch.arange(8) ^ (rows % 8)], source.view(clusters, 1, 64, 8, 8)


@pytest.mark.parametrize("resident", [1, 2, 5])
def test_a_multicast_lands_in_both_ctas_of_a_cluster(library: Library, resident: int) -> None:
    for seed in SEEDS:
        library.configure(seed, resident)
        error, raw, source = pair(library, 3)
        assert error is None
        assert torch.equal(raw, source.expand_as(raw))


PAIR_FAULTS = {
    "no cluster_sync before": "no barrier was initialised|before a fence_barrier_init",
    "barrier not fenced": r"cluster_sync_initialised before a fence_barrier_init of barrier landed",
    "ends before its peer": "CTA 1 of the cluster has ended|the CTA ends while",
    "arrives at one that has ended": "CTA 1 of the cluster has ended",
}


@pytest.mark.parametrize("fault", PAIR_FAULTS)
def test_a_fault_between_the_ctas_of_a_cluster_is_reported(library: Library, fault: str) -> None:
    said = reports(library, lambda: pair(library, 2, fault)[0])
    assert any(said)
    assert all(words is None or re.search(PAIR_FAULTS[fault], words) for words in said), said


def flag(
    library: Library, blocks: int = 6, *, dependent: bool = False, fault: str = ""
) -> tuple[str | None, list[int]]:
    words = torch.zeros(2 + blocks, dtype=torch.int32)
    return library("unit_flag", words, blocks, dependent, fault), words[2:].tolist()


def test_a_cta_may_wait_for_one_that_runs(library: Library) -> None:
    for fault in ("", "no back_off"):
        assert reports(library, lambda fault=fault: flag(library, fault=fault)[0], resident=6) == [None] * len(SEEDS)


def test_ctas_start_in_any_order_and_a_seed_fixes_it(library: Library) -> None:
    orders = []
    for seed in (*SEEDS, *SEEDS):
        library.configure(seed, 6)
        orders.append(tuple(flag(library)[1]))
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(6))}
    assert orders[: len(SEEDS)] == orders[len(SEEDS) :]
    assert len(set(orders)) > len(SEEDS) // 2


@pytest.mark.parametrize("fault", ["", "no back_off"])
def test_a_cta_that_waits_for_one_that_cannot_start_is_a_deadlock(library: Library, fault: str) -> None:
    """With one CTA at a time: where the waiting one comes before the one that it waits for."""
    said = reports(library, lambda: flag(library, fault=fault)[0], resident=1)
    assert None in said
    words = next(filter(None, said))
    assert re.search(
        r"(?s)deadlock:.*CTA 0 warp 0 \(1 lane\) is spinning on global memory.*clusters have not started", words
    )


FLAG_FAULTS = {
    "flag never set": r"(?s)deadlock:.*CTA 0 warp 0 \(1 lane\) is spinning on global memory",
    "lanes part": "calls .* while other lanes of its warp are at",
    "a lane ends": r"(?s)deadlock.*waits at warp_sync \(31 of 32 lanes are there, 1 have exited\)",
    "named barrier for more threads": "named_barrier_sync 3 for 64 threads of 32",
    "more registers than there are": r"(?s)deadlock.*waits for 256 registers a thread \(0 of the CTA's are free\)",
}


@pytest.mark.parametrize("fault", FLAG_FAULTS)
def test_a_fault_among_threads_is_reported(library: Library, fault: str) -> None:
    for words in reports(library, lambda: flag(library, fault=fault)[0]):
        assert re.search(FLAG_FAULTS[fault], words or "")


def test_a_dependent_launch_must_wait_for_the_one_before(library: Library) -> None:
    assert flag(library, dependent=True)[0] is None
    assert "grid_dependency_wait" in flag(library, dependent=True, fault="no grid_dependency_wait")[0]


def test_a_launch_that_does_not_end_is_stopped(library: Library) -> None:
    library.configure(most_steps=3)
    assert "no end after the most steps" in flag(library)[0]


def test_stmatrix_scatters_four_matrices(library: Library) -> None:
    raw = torch.zeros(4, 8, 4, dtype=torch.int32)
    assert library("unit_matrices", raw) is None
    matrix, row, word = torch.meshgrid(torch.arange(4), torch.arange(8), torch.arange(4), indexing="ij")
    assert torch.equal(raw, (100 * matrix + 4 * row + word).int())


def test_threads_meet_and_exchange(library: Library) -> None:
    other = torch.arange(127, -1, -1).view(4, 32).sum(1)
    expected = (other + other[[1, 0, 3, 2]]).repeat_interleave(32).int()
    for seed in SEEDS:
        library.configure(seed)
        sums = torch.zeros(128, dtype=torch.int32)
        assert library("unit_sync", sums) is None
        assert torch.equal(sums, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_round_as_torch_does(library: Library, dtype: str) -> None:
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(65536)
    library("unit_widen", halves, wide, 65536, dtype == "fp16")
    exact = halves.view(DTYPES[dtype]).float()
    assert torch.equal(wide.nan_to_num(nan=1e30), exact.nan_to_num(nan=1e30))
    assert torch.equal(wide.isnan(), exact.isnan())
    # Every half's float and those around it, those halfway to the next and around it, and any bits.
    finite = exact[exact.isfinite()]
    halfway = ((finite.double() + finite.double().nextafter(torch.tensor(torch.inf).double())) / 2).float()
    gap = torch.nextafter(
        halves.view(DTYPES[dtype])[exact.isfinite()], torch.tensor(torch.inf, dtype=DTYPES[dtype])
    ).float()
    halfway = ((finite.double() + gap.double()) / 2).float()
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    values = torch.cat([finite, halfway, bits])
    values = torch.cat([values, values.nextafter(torch.tensor(torch.inf)), values.nextafter(torch.tensor(-torch.inf))])
    rounded = torch.empty(len(values), dtype=torch.int16)
    library("unit_round", values, rounded, len(values), dtype == "fp16")
    number = ~values.isnan()
    assert torch.equal(rounded[number], values.to(DTYPES[dtype]).view(torch.int16)[number])
    assert rounded[~number].view(DTYPES[dtype]).isnan().all()


def test_the_portable_fibers_do_the_same() -> None:
    folder = ROOT / "build" / "host_model" / "unit-portable"
    library = Library(host_library.build(folder, sources=KERNELS, flags=["-DFASTLORA_MODEL_UCONTEXT"]))
    library.configure(seed=3)
    error, out, expected = ring(library, 5)
    assert error is None
    assert is_right(out, expected)
    assert "deadlock" in ring(library, 5, "slot never released")[0]
