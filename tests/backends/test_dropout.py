"""Dropout: the bits, pinned by an implementation of Philox that shares no line with the package, and their use."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import LoRALinear, lora_linear
from fastlora.backends import dropout_cpu, masks
from fastlora.backends.dropout import Dropout, draw_seed
from tests.cases import LAYOUTS, make, upcoming_dropout

CPU = torch.device("cpu")
MASK32 = 2**32 - 1


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...], rounds: int) -> tuple[int, ...]:
    """Philox4x32 as Salmon et al. (SC 2011) define it: two multiplications a round, the key bumped by Weyl steps."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def keeps(p: float, seed: tuple[int, int], row: int, column: int) -> bool:
    """One decision of the mask, from the definition in the package's docstring."""
    key, offset = (value % 2**64 for value in seed)
    counter = (column // 8, row, offset & MASK32, offset >> 32)
    words = philox4x32(counter, (key & MASK32, key >> 32), rounds=7)
    lane = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
    signed = lane - 65536 if lane >= 32768 else lane
    return signed >= round(65536 * p) - 32768


def mask_by_hand(p: float, seed: tuple[int, int], rows: int, columns: int) -> Tensor:
    return torch.tensor([[keeps(p, seed, i, j) for j in range(columns)] for i in range(rows)])


def dropout(p: float, key: int = 11, offset: int = 22) -> Dropout:
    return Dropout(p, torch.tensor([key, offset]))


SEEDS = {
    "zero": (0, 0),
    "small": (1, 2),
    "all_ones": (-1, -1),
    "lowest": (-(2**63), -(2**63)),
    "highest": (2**63 - 1, 2**63 - 1),
    "halves_differ": (0x0123456789ABCDEF, 0x76543210FEDCBA98),
}


# The 7-round known answers that Random123, the authors' library, ships as kat_vectors.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((MASK32,) * 4, (MASK32,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_tests_own_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key, rounds=7) == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_mask_is_philox_bit_for_bit(seed: tuple[int, int], p: float) -> None:
    mask = Dropout(p, torch.tensor(seed)).keep(9, 27)
    assert torch.equal(mask, mask_by_hand(p, seed, 9, 27))


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33])
def test_columns_need_not_fill_the_last_call(columns: int) -> None:
    mask = dropout(0.5).keep(3, columns)
    assert mask.shape == (3, columns)
    assert torch.equal(mask, dropout(0.5).keep(3, 40)[:, :columns])
    assert torch.equal(mask, mask_by_hand(0.5, (11, 22), 3, columns))


def test_golden_mask() -> None:
    """The bits of one seed, written down: no change of version may change them."""
    rows = ["".join("01"[bit] for bit in row) for row in dropout(0.5).keep(4, 24).tolist()]
    assert rows == [
        "010010011101110111001010",
        "100010101100000001001101",
        "101111000000010011101101",
        "111111111110000000010011",
    ]


@pytest.mark.parametrize("first", [0, 1, 5, 2**31 - 2, 2**31, 2**32 - 3])
def test_row_numbers_count_from_anywhere(first: int) -> None:
    mask = dropout(0.5).keep(3, 16, first)
    expected = [[keeps(0.5, (11, 22), first + i, j) for j in range(16)] for i in range(3)]
    assert torch.equal(mask, torch.tensor(expected))


@pytest.mark.parametrize("elements", [1, 40, 100, 1000])
def test_mask_does_not_depend_on_the_chunk(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.backends.dropout._CHUNK", {"cpu": elements})
    x = torch.ones(23, 40)
    chunks = list(dropout(0.5).chunks(x))
    assert len(chunks) == math.ceil(23 / max(1, elements // 40))
    assert [i for rows in chunks for i in range(23)[rows]] == list(range(23))
    kept = torch.cat([masks.kept(dropout(0.5), x[rows], rows.start) for rows in chunks])
    assert torch.equal(kept, dropout(0.5).keep(23, 40).float())


@pytest.mark.parametrize("built", [True, False], ids=["library", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "columns", "first"), [(1, 1, 0), (5, 127, 3), (3, 128, 2**31), (4, 1000, 2**32 - 2)])
def test_kept_is_the_mask_applied(
    built: bool,
    dtype: torch.dtype,
    layout: str,
    rows: int,
    columns: int,
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if built and not dropout_cpu.is_built():
        pytest.skip("no library of CPU code is built here: python csrc/build.py")
    if not built:
        monkeypatch.setattr(dropout_cpu, "masked", lambda *_: None)
    x = LAYOUTS[layout](torch.randn(rows, columns).to(dtype))
    expected = torch.where(dropout(0.3).keep(rows, columns, first), x, 0)
    before = x.clone()
    assert torch.equal(masks.kept(dropout(0.3), x, first), expected)
    product = torch.randn(rows, columns).to(dtype)
    expected_product = torch.where(dropout(0.3).keep(rows, columns, first), product, 0)
    assert torch.equal(masks.kept_both(dropout(0.3), x, product, first), expected)
    assert torch.equal(product, expected_product)
    assert torch.equal(x, before)
    x = x.contiguous()
    assert masks.kept_(dropout(0.3), x, first).data_ptr() == x.data_ptr()
    assert torch.equal(x, expected)


@pytest.mark.parametrize("built", [True, False], ids=["library", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 40), (5, 127), (3, 128), (0, 40), (4, 0)])
def test_factors_are_the_mask_over_what_is_kept(
    built: bool, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if built and not dropout_cpu.is_built():
        pytest.skip("no library of CPU code is built here: python csrc/build.py")
    if not built:
        monkeypatch.setattr(dropout_cpu, "masked", lambda *_: None)
        monkeypatch.setattr(dropout_cpu, "masked_row", lambda *_: None)
    x = torch.randn(shape).to(dtype)
    for _ in range(2):
        mask = upcoming_dropout(0.3)
        assert mask is not None
        expected = torch.where(mask.keep(*shape), torch.tensor(mask.rescale, dtype=dtype), 0)
        made = masks.factors(0.3, x)
        assert torch.equal(made, expected)
        assert made.dtype is dtype


def test_factors_first_made_in_inference_mode_serve_training() -> None:
    masks._factor_row.cache_clear()
    with torch.inference_mode():
        masks.factors(0.3, torch.ones(1, 56))
    x = torch.ones(1, 56, requires_grad=True)
    (x * masks.factors(0.3, x)).sum().backward()
    assert x.grad is not None
    assert set(x.grad.unique().tolist()) <= {0.0, torch.tensor(dropout(0.3).rescale).item()}


def test_kept_zeroes_what_is_not_finite() -> None:
    x = torch.full((3, 200), torch.nan)
    assert torch.equal(masks.kept(dropout(0.5), x).isnan(), dropout(0.5).keep(3, 200))


def test_kept_in_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, expected = torch.ones(1000, 801), dropout(0.3).keep(1000, 801, 7).float()
    assert torch.equal(masks.kept(dropout(0.3), x, 7), expected)
    product = x.clone()
    assert torch.equal(masks.kept_both(dropout(0.3), x, product, 7), expected)
    assert torch.equal(product, expected)


def test_a_library_of_another_abi_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_cpu, "ABI", dropout_cpu.ABI + 1)
    dropout_cpu.forget()
    try:
        assert not dropout_cpu.is_built()
        assert torch.equal(masks.kept(dropout(0.3), torch.ones(3, 40)), dropout(0.3).keep(3, 40).float())
    finally:
        dropout_cpu.forget()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_realised_rate_is_within_binomial_bounds(p: float) -> None:
    """Five standard deviations: over all elements, over each of the eight lanes of a call, and over row parity."""
    mask = dropout(p).keep(500, 800).double()
    keep = 1 - dropout(p).drop_lanes / 65536
    for part in (mask, *(mask[:, lane::8] for lane in range(8)), mask[::2], mask[1::2]):
        assert abs(part.mean().item() - keep) < 5 * math.sqrt(keep * (1 - keep) / part.numel())


@pytest.mark.parametrize("shift", [(0, 1), (0, 2), (0, 8), (1, 0), (1, 1)], ids=str)
def test_neighbours_are_independent(shift: tuple[int, int]) -> None:
    mask = dropout(0.5).keep(500, 800).double()
    down, right = shift
    agree = (mask[down:, right:] == mask[: 500 - down, : 800 - right]).double()
    assert abs(agree.mean().item() - 0.5) < 5 * 0.5 / math.sqrt(agree.numel())


@pytest.mark.parametrize("seed", [(12, 22), (11, 23), (11 + 2**32, 22), (11, 22 + 2**32)], ids=str)
def test_every_part_of_the_seed_matters(seed: tuple[int, int]) -> None:
    changed = dropout(0.5).keep(200, 200) ^ dropout(0.5, *seed).keep(200, 200)
    assert abs(changed.double().mean().item() - 0.5) < 5 * 0.5 / 200


@pytest.mark.parametrize(
    ("p", "dropped"),
    [(0.5, 32768), (0.1, 6554), (1 / 65536, 1), (1e-9, 0), (1 - 1 / 65536, 65535), (1 - 1e-9, 65535)],
)
def test_p_is_realised_to_a_65536th_and_rescaled_by_what_was_realised(p: float, dropped: int) -> None:
    mask = dropout(p)
    assert mask.drop_lanes == dropped
    kept_lanes = sum(lane >= mask.threshold for lane in range(-32768, 32768))
    assert kept_lanes == 65536 - dropped
    assert mask.rescale * kept_lanes == pytest.approx(65536, rel=1e-15)


def test_seed_comes_from_torchs_generator_alone() -> None:
    torch.manual_seed(3)
    random.seed(1)
    first = draw_seed(CPU)
    torch.manual_seed(3)
    random.seed(2)
    assert torch.equal(draw_seed(CPU), first)
    assert first.dtype is torch.int64
    assert not torch.equal(draw_seed(CPU), first)


def test_seeds_use_63_bits_twice() -> None:
    """Not the sign: torch.compile's own randint subtracts the bounds in int64, and the full range would overflow."""
    seeds = torch.stack([draw_seed(CPU) for _ in range(200)])
    for bit in range(63):
        share = ((seeds >> bit) & 1).double().mean().item()
        assert 0.35 < share < 0.65, bit


def revealed(p: float, **options: bool) -> tuple[Tensor, Tensor]:
    """The masks of forward and backward, as they act: base zero, adapters the identity, x and dy one."""
    x = torch.ones(40, 24, requires_grad=True)
    eye = torch.eye(24)
    y = lora_linear(x, torch.zeros(24, 24), eye, eye, scale=1.7, dropout_p=p, **options)
    y.sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("backend", ["library", "reference"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_forward_and_backward_apply_the_one_mask(p: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", backend)
    mask = upcoming_dropout(p)
    forward, backward = revealed(p)
    expected = mask.keep(40, 24) * (1.7 * mask.rescale)
    torch.testing.assert_close(forward, expected)
    torch.testing.assert_close(backward, expected)


def test_gradients_of_the_adapter_see_the_mask() -> None:
    """Where a column of x is dropped in every row, its column of lora_a learns nothing."""
    operands = make(2, 40, 29, 6).leaves("lora_a")
    keep = upcoming_dropout(0.5).keep(2, 40)
    operands(dropout_p=0.5).sum().backward()
    learns = operands.lora_a.grad.abs().sum(0) > 0
    assert torch.equal(learns, keep.any(0))
    assert not learns.all()


def test_base_path_is_not_dropped() -> None:
    operands = make()
    base = F.linear(operands.x, operands.weight, operands.bias)
    keep = upcoming_dropout(0.5)
    update = operands(dropout_p=0.5) - base
    masked = operands.x * keep.keep(37, 48) * keep.rescale
    torch.testing.assert_close(update, 1.7 * masked @ operands.lora_a.T @ operands.lora_b.T, rtol=1e-4, atol=1e-5)


def test_same_manual_seed_same_bits() -> None:
    operands = make()
    torch.manual_seed(8)
    first = operands(dropout_p=0.3)
    torch.manual_seed(8)
    assert torch.equal(operands(dropout_p=0.3), first)


def test_every_call_draws_a_new_mask() -> None:
    first, second, third = (revealed(0.5)[0] for _ in range(3))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_layers_of_one_model_draw_different_masks() -> None:
    layer = LoRALinear(24, 29, r=6, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    twin, x = copy.deepcopy(layer), torch.randn(40, 24)
    assert not torch.equal(layer(x), twin(x))
    assert torch.equal(layer.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0.5, "training": False}], ids=["p_zero", "eval"])
def test_without_dropout_no_random_number_is_drawn(options: dict[str, float]) -> None:
    before = torch.get_rng_state()
    forward, backward = revealed(**options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(forward, torch.full((40, 24), 1.7))
    torch.testing.assert_close(backward, torch.full((40, 24), 1.7))


def test_backward_draws_no_random_number() -> None:
    y = make().leaves()(dropout_p=0.5)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_output_is_right_on_average() -> None:
    """The mean over many masks tends to the output without dropout."""
    operands = make(8, 12, 5, 3, dtype=torch.float64)
    mean = torch.stack([operands(dropout_p=0.5) for _ in range(1000)]).mean(0)
    torch.testing.assert_close(mean, operands(), rtol=0, atol=0.3)
