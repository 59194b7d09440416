"""Properties that hold for every shape, stride, rank, dtype and mask, on examples that hypothesis picks."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fastlora import LoRALinear
from fastlora.backends.dropout import Dropout
from tests.backends.test_dropout import keeps
from tests.cases import DTYPES, LAYOUTS, Operands, check_against_reference, make, run

SIZES = st.integers(1, 70)
RANKS = st.integers(1, 20)
INT64 = st.integers(-(2**63), 2**63 - 1)
LEADS = st.lists(st.integers(1, 3), max_size=2).map(tuple)
RATES = st.sampled_from([0.0, 0.1, 0.5, 0.93])
HELD = st.sampled_from([lambda x: x, *(LAYOUTS[name] for name in ("transposed", "sliced", "every_second"))])


@st.composite
def operands(draw: st.DrawFn, dtype: torch.dtype, adapter_dtype: torch.dtype, least: int = 1) -> Operands:
    """Any operands the package promises to take, each held in some layout of its own."""
    sizes = st.integers(least, 70)
    made = make(
        k=draw(sizes),
        n=draw(sizes),
        r=draw(st.integers(least, 20)),
        lead=(*draw(LEADS), draw(sizes)),
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    return made.map(lambda t: draw(HELD)(t))


@given(operands(torch.float64, torch.float64), RATES)
def test_indexing_at_any_size(made: Operands, p: float) -> None:
    check_against_reference(made, p)


# From eight up: the error rule compares errors in the mean, and one rounding has none.
@given(st.sampled_from(list(DTYPES.values())).flatmap(lambda dtypes: operands(*dtypes, least=8)), RATES)
def test_rounding_in_any_dtype(made: Operands, p: float) -> None:
    check_against_reference(made, p)


@given(operands(torch.float32, torch.float32))
def test_tokens_are_independent(made: Operands) -> None:
    x = made.x.reshape(-1, made.x.shape[-1])
    y = made().reshape(len(x), -1)
    for row in {0, len(x) - 1}:
        alone = made._replace(x=x[row])()
        torch.testing.assert_close(alone, y[row], rtol=1e-4, atol=1e-5)


@given(operands(torch.float32, torch.float32), RATES, st.integers(0, 2**31))
def test_a_seed_fixes_every_bit(made: Operands, p: float, seed: int) -> None:
    def once() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return run(made.leaves(), dropout_p=p)

    first, second = once(), once()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@given(
    st.floats(0, 1, exclude_max=True),
    st.tuples(INT64, INT64),
    st.integers(0, 2**32 - 5),
    st.integers(1, 30),
)
@example(0.5, (-1, -1), 2**32 - 5, 9)
def test_mask_is_a_pure_function_of_seed_row_and_column(
    p: float, seed: tuple[int, int], first: int, columns: int
) -> None:
    p = min(p, 65535 / 65536)
    mask = Dropout(p, torch.tensor(seed)).keep(4, columns, first)
    expected = [[keeps(p, seed, first + i, j) for j in range(columns)] for i in range(4)]
    assert torch.equal(mask, torch.tensor(expected))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 60), st.integers(1, 600))
def test_mask_is_the_same_in_any_chunks(rows: int, columns: int, cut: int, seed: int) -> None:
    dropout = Dropout(0.3, torch.tensor([seed, -seed]))
    cut = min(cut, rows)
    parts = [dropout.keep(last - first, columns, first) for first, last in ((0, cut), (cut, rows)) if last > first]
    assert torch.equal(torch.cat(parts), dropout.keep(rows, columns))


@given(SIZES, SIZES, RANKS, st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 2**31))
def test_unmerge_restores_every_bit(k: int, n: int, r: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    layer = LoRALinear(k, n, r=r, dtype=dtype)
    torch.nn.init.normal_(layer.lora_B, std=100)
    base = layer.weight.detach().clone()
    layer.merge().unmerge()
    assert torch.equal(layer.weight, base)


@given(SIZES, SIZES, RANKS, st.booleans(), st.integers(0, 2**31))
def test_merged_layer_is_the_layer(k: int, n: int, r: int, use_rslora: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = LoRALinear(k, n, r=r, lora_alpha=3, use_rslora=use_rslora, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(4, k, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.merge()(x))
