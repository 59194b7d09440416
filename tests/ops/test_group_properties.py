"""Groups of any branches: what holds for a layer alone holds for it among others, whatever these are."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.test_group import check_against_the_oracle, dys_of, group


def branches(least: int) -> st.SearchStrategy[list[tuple[int, int, float, float, bool]]]:
    """N, R, scale, dropout and bias of each."""
    sizes = st.integers(least, 40)
    rates = st.sampled_from((0.0, 0.1, 0.5))
    return st.lists(
        st.tuples(sizes, st.integers(least, 20), st.sampled_from((0.5, 1.0, 1.7)), rates, st.booleans()),
        min_size=1,
        max_size=5,
    )


# From eight up: the error rule compares errors in the mean, and one rounding has none.
@given(branches(8), st.integers(64, 150), st.booleans())
def test_every_branch_is_as_good_as_alone(
    made: list[tuple[int, int, float, float, bool]], m: int, dropout: bool
) -> None:
    check_against_the_oracle(group(branches=made, lead=(m,), dropout=dropout))


@given(branches(1), st.lists(st.integers(1, 4), min_size=0, max_size=2), st.booleans(), st.integers(0, 31))
def test_every_branch_is_what_it_is_alone(
    made: list[tuple[int, int, float, float, bool]], lead: list[int], dropout: bool, unused: int
) -> None:
    g = group(torch.float64, branches=made, lead=tuple(lead), dropout=dropout)
    steps = []
    for run in (g, g.alone):
        torch.manual_seed(1)
        ys = run()
        used = [i for i in range(len(ys)) if not unused >> i & 1] or [0]
        dys = dys_of(ys)
        found = torch.autograd.grad(
            [ys[i] for i in used], g.trained, [dys[i] for i in used], allow_unused=True, materialize_grads=True
        )
        steps.append([*ys, *found])
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
