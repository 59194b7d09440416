"""The skinny kernels one by one against the fp64 oracle: on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.predict import cost
from fastlora.accuracy import assert_close_to_oracle
from fastlora.backends import masks, reference, triton_skinny
from fastlora.backends import triton as backend
from fastlora.backends.dropout import Dropout, draw_seed
from fastlora.backends.request import Product, new_middle
from fastlora.kernels import middle, middle_and_grad, ordered_sum, rank_grad, rank_update
from fastlora.kernels.launch import Launch
from tests.cases import (
    DTYPES,
    LAYOUTS,
    SCALE,
    OpLog,
    assert_matches_reference,
    gradient_of,
    make,
    replace_kernel,
)
from tests.cases import run as run_step

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CAPABILITY = backend.capability_of(DEVICE)
HALF = "bf16" if ON_GPU else "fp16"
RANKS = (1, 8, 12, 16, 64, 128)
NAN = float("nan")


def run(*launches: Launch) -> None:
    """Runs launches whose memory holds NaN before."""
    for launch in launches:
        for name in ("partial_ptr", "partial_2_ptr"):
            if launch.arguments.get(name) is not None:
                launch.arguments[name].fill_(NAN)
    for launch in launches:
        launch.run()


def product(m: int, k: int, n: int, r: int, dtypes: str = HALF, mask: str = "none", bias: bool = True) -> Product:
    dtype, adapter_dtype = DTYPES[dtypes]
    operands = make(m, k, n, r, dtype=dtype, adapter_dtype=adapter_dtype, bias=bias).map(lambda t: t.to(DEVICE))
    dropout = None if mask == "none" else Dropout(0.3, draw_seed(DEVICE))
    return operands.product(dropout, on_product=mask == "product")


def poisoned_middle(x: Tensor, r: int) -> Tensor:
    z = new_middle(x, r)
    z.as_strided((z.shape[0], z.stride(0)), z.stride()).fill_(NAN)
    return z


def check_middle(p: Product, launches: int = 1) -> None:
    z = poisoned_middle(p.x, p.a.shape[0])
    steps = middle.launches(p, z, capability=CAPABILITY, precision="ieee")
    assert len(steps) == launches
    run(*steps)
    alone = p._replace(w=None)
    oracle, baseline = reference.lora_matmul(alone.map(Tensor.double))[1], reference.lora_matmul(alone)[1]
    assert_close_to_oracle(z, oracle=oracle, baseline=baseline, name="z")
    first = z.clone()
    run(*middle.launches(p, z, capability=CAPABILITY, precision="ieee"))
    assert torch.equal(z, first)


@pytest.mark.parametrize("mask", ["none", "input"])
@pytest.mark.parametrize("dtypes", [HALF, "fp32", f"{HALF}_fp32_adapters"])
@pytest.mark.parametrize("r", RANKS)
def test_middle(r: int, dtypes: str, mask: str) -> None:
    """At this K the sum is split among CTAs, and at a short one it is not."""
    check_middle(product(35, 1100, 24, r, dtypes, mask), launches=2)
    check_middle(product(35, 41, 24, r, dtypes, mask))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("field", ["x", "a"])
def test_middle_reads_any_strides(field: str, layout: str) -> None:
    p = product(37, 600, 24, 12, mask="input")
    check_middle(p._replace(**{field: LAYOUTS[layout](getattr(p, field))}), launches=2)


def check_rank_update(p: Product, z: Tensor) -> None:
    """y = D(z bᵀ) + bias: the whole product with a base of zero."""
    y, step = rank_update.launch(p, z, precision="ieee")
    y.fill_(NAN)
    run(step)

    def expected(p: Product, z: Tensor) -> Tensor:
        y = z @ p.b.T.to(z.dtype)
        if p.mask_product is not None:
            y = torch.where(p.mask_product.keep(*y.shape), y * p.mask_product.rescale, 0)
        return y if p.bias is None else y + p.bias

    assert_close_to_oracle(y, oracle=expected(p.map(Tensor.double), z.double()), baseline=expected(p, z), name="y")
    first = y.clone()
    y, step = rank_update.launch(p, z, precision="ieee")
    run(step)
    assert torch.equal(y, first)


@pytest.mark.parametrize("mask", ["none", "product"])
@pytest.mark.parametrize("dtypes", [HALF, "fp32", f"{HALF}_fp32_adapters"])
@pytest.mark.parametrize("r", RANKS)
def test_rank_update(r: int, dtypes: str, mask: str) -> None:
    p = product(70, 24, 141, r, dtypes, mask)
    check_rank_update(p, reference.lora_matmul(p)[1])


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 300), (300, 1), (31, 127), (33, 129), (32, 128)])
def test_rank_update_off_the_tile(m: int, n: int) -> None:
    p = product(m, 16, n, 12, mask="product", bias=False)
    check_rank_update(p, reference.lora_matmul(p)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_update_reads_b_in_any_strides(layout: str) -> None:
    p = product(37, 24, 70, 12)
    check_rank_update(p._replace(b=LAYOUTS[layout](p.b)), reference.lora_matmul(p)[1])


def check_middle_and_grad(dy: Tensor, b: Tensor, z: Tensor, launches: int | None = None) -> None:
    t = poisoned_middle(dy, b.shape[1])

    def steps() -> tuple[Tensor, list[Launch]]:
        return middle_and_grad.launches(dy, b, z, t, scale=SCALE, capability=CAPABILITY, precision="ieee")

    db, work = steps()
    db.fill_(NAN)
    run(*work)
    if launches is not None:
        assert len(work) == launches
    turned = Product(dy, None, b.T, b, SCALE)
    exact = Product(dy.double(), None, b.T.double(), b.double(), SCALE)
    assert_close_to_oracle(
        t, oracle=reference.lora_matmul(exact)[1], baseline=reference.lora_matmul(turned)[1], name="t"
    )
    assert_close_to_oracle(
        db,
        oracle=reference.rank_grad(dy.double(), z.double(), dtype=torch.float64),
        baseline=reference.rank_grad(dy, z, dtype=b.dtype),
        name="db",
    )
    first = t.clone()
    again, work = steps()
    run(*work)
    assert torch.equal(t, first)
    assert torch.equal(again, db)


def gradient(m: int, n: int, r: int, dtypes: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype, adapter_dtype = DTYPES[dtypes]
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype).to(DEVICE)

    return normal(m, n, dtype=dtype), normal(n, r, dtype=adapter_dtype), normal(m, r, dtype=dtype)


@pytest.mark.parametrize("dtypes", [HALF, "fp32", f"{HALF}_fp32_adapters"])
@pytest.mark.parametrize("r", [r for r in (*RANKS, 32) if r <= middle_and_grad.MAX_RANK])
def test_middle_and_grad(r: int, dtypes: str) -> None:
    check_middle_and_grad(*gradient(517, 300, r, dtypes), launches=2)


@pytest.mark.parametrize(
    ("m", "n", "launches"), [(1, 1, 1), (1, 600, 2), (600, 1, 2), (63, 255, 1), (65, 257, 2), (64, 256, 1)]
)
def test_middle_and_grad_off_the_tile(m: int, n: int, launches: int) -> None:
    check_middle_and_grad(*gradient(m, n, 12, HALF), launches=launches)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", [0, 1, 2], ids=["dy", "b", "z"])
def test_middle_and_grad_reads_any_strides(operand: int, layout: str) -> None:
    operands = list(gradient(70, 300, 12, HALF))
    operands[operand] = LAYOUTS[layout](operands[operand])
    check_middle_and_grad(*operands)


def test_a_rank_above_the_limit_is_left_to_the_verbs() -> None:
    assert middle_and_grad.pays(8192, 4096, 32, 2, 90)
    assert not middle_and_grad.pays(8192, 4096, 33, 2, 90)


@pytest.mark.parametrize("r", [40, 64, 100])
@pytest.mark.parametrize("p_dropout", [0.0, 0.3], ids=["no_mask", "mask"])
def test_rank_grad_in_two_halves(r: int, p_dropout: float) -> None:
    p = (torch.randn(300, r) / 17).to(DTYPES[HALF][0]).to(DEVICE)
    q = torch.randn(300, 130).to(p)
    dropout = Dropout(p_dropout, draw_seed(DEVICE)) if p_dropout else None
    grad, work = rank_grad.launches(p, q, dtype=torch.float32, capability=CAPABILITY, precision="ieee", dropout=dropout)
    grad.fill_(NAN)
    run(*work)
    oracle = reference.rank_grad(p.double(), q.double(), dtype=torch.float64, dropout=dropout)
    assert_close_to_oracle(
        grad,
        oracle=oracle,
        baseline=reference.rank_grad(p, q, dtype=torch.float32, dropout=dropout),
        name="grad",
    )


def test_sums_of_two_results_in_one_launch() -> None:
    first, second = torch.randn(3, 70, 12, device=DEVICE), torch.randn(9, 50, 30, device=DEVICE)
    rows = torch.full((70, 16), NAN, device=DEVICE)
    whole = torch.full((50, 30), NAN, device=DEVICE)
    ordered_sum.launch(ordered_sum.Partial(first, rows[:, :12], 2.0), ordered_sum.Partial(second, whole)).run()

    def in_order(partial: Tensor) -> Tensor:
        total = torch.zeros_like(partial[0])
        for part in partial:
            total += part
        return total

    assert torch.equal(rows[:, :12], in_order(first) * 2.0)
    assert rows[:, 12:].isnan().all()
    assert torch.equal(whole, in_order(second))


@pytest.mark.parametrize("first_row", [0, 5])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 300), (33, 128), (32, 129)])
def test_mask_bits_of_the_kernel_are_torchs(rows: int, columns: int, first_row: int) -> None:
    dropout = Dropout(0.3, torch.tensor((-3, 2**41 + 9), device=DEVICE))
    bits = masks.keep_bits(dropout, first_row, rows, columns)
    assert torch.equal(bits, -dropout.keep(rows, columns, first_row).to(torch.int16))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("r", [12, 40], ids=["one_read_of_dy", "two_reads_of_dy"])
def test_the_gradients_and_the_verbs_both_meet_the_rule(
    r: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager code makes the gradients in one call; a dispatch mode sees the two verbs."""
    monkeypatch.setenv("FASTLORA_BACKEND", "triton-skinny")
    calls: list[str] = []
    kernel = triton_skinny.LORA_MATMUL[0]

    def noted(p: Product, dy: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        calls.append("gradients")
        return kernel.gradients(p, dy, z)

    replace_kernel(monkeypatch, kernel.name, gradients=noted)

    def step() -> None:
        operands = make(70, 64, 300, r, dtype=DTYPES[HALF][0]).map(lambda t: t.to(DEVICE))
        operands = operands.leaves("x", "lora_a", "lora_b")
        dy = gradient_of(torch.empty(70, 300, dtype=operands.x.dtype)).to(DEVICE)
        torch.manual_seed(0)
        dropout = Dropout(dropout_p, draw_seed(DEVICE)) if dropout_p else None
        torch.manual_seed(0)
        assert_matches_reference(run_step(operands, dy, dropout_p=dropout_p), operands, dy, dropout=dropout)

    step()
    assert calls == ["gradients"]
    with OpLog() as log:
        step()
    assert calls == ["gradients"]
    assert log.count(["fastlora::lora_matmul", "fastlora::rank_grad"]) == {
        "fastlora::lora_matmul": 2,
        "fastlora::rank_grad": 2,
    }


def moved(launches: list[Launch]) -> int:
    """Bytes of the operands and results of some launches, each moved once in each of them."""
    tensors = [t for launch in launches for t in launch.arguments.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


# M, K, N, R and, in a step, the launches of ours (the vendor's GEMMs are two more) and the bytes they move.
STEPS = [
    (8192, 4096, 4096, 16, 7, 361),
    (8192, 4096, 4096, 64, 8, 429),
    (8192, 4096, 4096, 128, 8, 438),
    (8192, 8192, 28672, 16, 7, 1467),
    (8192, 4096, 1024, 16, 7, 247),
    (2048, 4096, 4096, 16, 8, 97),
    (256, 4096, 4096, 8, 7, 11),
]


@pytest.mark.parametrize(("m", "k", "n", "r", "launches", "megabytes"), STEPS)
def test_launches_and_bytes_of_a_step(m: int, k: int, n: int, r: int, launches: int, megabytes: int) -> None:
    """Counted from the launches themselves, and held to what the predictions add up."""
    bf16 = torch.bfloat16
    x, dy, w, a, b = (torch.empty(size, dtype=bf16, device="meta") for size in ((m, k), (m, n), (n, k), (r, k), (n, r)))
    p = Product(x, w, a, b, SCALE)
    _, z, steps = triton_skinny.launches(p, 90, "ieee")
    steps += triton_skinny.gradient_launches(p, dy, z, 90, "ieee")[3]
    assert len(steps) == launches
    assert round(moved(steps) / 1e6) == megabytes
    problem = cost.Problem(m, k, n, r, itemsize=2, sms=132)
    work = cost.kernels("triton-skinny", problem)["step"]
    assert len(work) == launches + 2
    gemms = problem.moved(x=1, w=1, y=2) + problem.turned.moved(x=1, w=1, y=2)
    assert sum(kernel.bytes for kernel in work) == moved(steps) + gemms
