"""Groups: several LoRA layers of one input, each as good as alone, x read once forward and once backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.accuracy import Step, assert_close_to_oracle, oracle_step, reference_step
from fastlora.backends import dispatch, dropout, masks
from fastlora.backends.dropout import draw_seed
from fastlora.backends.request import Product
from tests.cases import DTYPES, make, replace_kernel

K = 48
# N, R, scale, dropout, bias of each branch, as in grouped-query attention with a rank of its own.
BRANCHES = ((40, 6, 1.7, 0.1, True), (24, 4, 0.5, 0.3, False), (24, 8, 1.7, 0.0, True))


class Group(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    ws: list[Tensor]
    a_s: list[Tensor]
    bs: list[Tensor]
    scales: list[float]
    biases: list[Tensor | None]
    ps: list[float]

    def __call__(self, **options: Any) -> tuple[Tensor, ...]:
        arguments = {"scales": self.scales, "biases": self.biases, "dropout_ps": self.ps} | options
        return fastlora.lora_linear_group(self.x, self.ws, self.a_s, self.bs, **arguments)

    def alone(self, **options: Any) -> tuple[Tensor, ...]:
        return tuple(
            fastlora.lora_linear(self.x, w, a, b, scale=scale, bias=bias, dropout_p=p, **options)
            for w, a, b, scale, bias, p in zip(
                self.ws, self.a_s, self.bs, self.scales, self.biases, self.ps, strict=True
            )
        )

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, *self.a_s, *self.bs]


def group(
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    dropout: bool = False,
    branches: Sequence[tuple[int, int, float, float, bool]] = BRANCHES,
    lead: tuple[int, ...] = (37,),
) -> Group:
    """Leaves; the bases are frozen."""
    made = [
        make(5, K, n, r, dtype=dtype, adapter_dtype=adapter_dtype, bias=bias, seed=i)
        for i, (n, r, _, _, bias) in enumerate(branches)
    ]
    x = make(k=K, lead=lead, dtype=dtype, seed=9).x.requires_grad_()
    for operands in made:
        operands.lora_a.requires_grad_()
        operands.lora_b.requires_grad_()
    return Group(
        x,
        [o.weight for o in made],
        [o.lora_a for o in made],
        [o.lora_b for o in made],
        [branch[2] for branch in branches],
        [o.bias for o in made],
        [branch[3] if dropout else 0.0 for branch in branches],
    )


def steps(g: Group, dys: Sequence[Tensor], seeds: Sequence[Tensor | None], of: Any) -> list[Step]:
    """Each branch's step alone, by the reference."""
    x = g.x.detach().reshape(-1, K)
    return [
        of(Product(x, w, a.detach(), b.detach(), scale, bias, p, seed), dy.reshape(x.shape[0], -1))
        for w, a, b, scale, bias, p, seed, dy in zip(
            g.ws, g.a_s, g.bs, g.scales, g.biases, g.ps, seeds, dys, strict=True
        )
    ]


def dys_of(ys: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]


def check_against_the_oracle(g: Group) -> None:
    torch.manual_seed(3)
    ys = g()
    torch.manual_seed(3)
    seeds = [draw_seed(g.x.device) if p else None for p in g.ps]
    dys = dys_of(ys)
    found = torch.autograd.grad(ys, g.trained, dys)
    oracles, baselines = (steps(g, dys, seeds, of) for of in (oracle_step, reference_step))
    n = len(ys)
    for i in range(n):
        named = {"y": ys[i], "da": found[1 + i], "db": found[1 + n + i]}
        for name, tensor in named.items():
            oracle, baseline = (getattr(step[i], name) for step in (oracles, baselines))
            assert_close_to_oracle(
                tensor.detach().reshape(baseline.shape), oracle=oracle, baseline=baseline, name=f"{name} of branch {i}"
            )
    dx = [torch.stack([step.dx for step in all_steps]).sum(0) for all_steps in (oracles, baselines)]
    assert_close_to_oracle(found[0].reshape(-1, K), oracle=dx[0], baseline=dx[1], name="dx")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dropout", [False, True])
def test_every_branch_is_as_good_as_alone(dtypes: str, dropout: bool) -> None:
    check_against_the_oracle(group(*DTYPES[dtypes], dropout=dropout))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 1, 5)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    g = group(lead=lead)
    ys = g()
    assert [y.shape for y in ys] == [(*lead, n) for n, *_ in BRANCHES]
    others, dys = g.alone(), dys_of(ys)
    found, expected = (torch.autograd.grad(outputs, g.trained, dys) for outputs in (ys, others))
    for one, other in zip((*ys, *found), (*others, *expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_branches(count: int) -> None:
    check_against_the_oracle(group(branches=(BRANCHES * 2)[:count]))


@pytest.mark.parametrize("dropout", [False, True])
def test_a_kernel_without_a_way_is_looped(dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_kernel(monkeypatch, "library", together=None)
    check_against_the_oracle(group(dropout=dropout))


def test_the_reference_is_looped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    check_against_the_oracle(group(dropout=True))


def test_masks_are_those_of_calls_one_by_one() -> None:
    g = group(dropout=True)
    torch.manual_seed(5)
    together = g()
    torch.manual_seed(5)
    for y, alone in zip(together, g.alone(), strict=True):
        torch.testing.assert_close(y, alone)
    assert all(torch.equal(one, other) for one, other in zip(g(training=False), group()(), strict=True))


def test_adapters_of_two_dtypes_have_gradients_of_their_own() -> None:
    g = group(torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (g.a_s[0], g.bs[0])]
    g.a_s[0], g.bs[0] = wide
    check_against_the_oracle(g)
    assert {t.dtype for t in torch.autograd.grad(g(), wide, dys_of(g()))} == {torch.float32}


def test_every_output_nobody_used_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    g = group()
    counted: list[int] = []
    gradients = dispatch.group_gradients_of

    def noted(products: Sequence[Product], dys: Sequence[Tensor]) -> Any:
        counted.append(len(products))
        return gradients(products, dys)

    monkeypatch.setattr(dispatch, "group_gradients_of", noted)
    ys = g()
    ys[1].sum().backward()
    assert counted == [1]
    assert [a.grad is None for a in g.a_s] == [True, False, True]
    alone = group()
    alone.alone()[1].sum().backward()
    torch.testing.assert_close(g.x.grad, alone.x.grad)


@pytest.mark.parametrize("asked", range(1, 32))
def test_every_pattern_of_gradients(asked: int) -> None:
    """Bits: x, the first branch's w and bias, its a, the second's b."""

    def leaves(g: Group) -> list[Tensor]:
        chosen = [g.x, g.ws[0], g.biases[0], g.a_s[0], g.bs[1]]
        for t in (*g.trained, *g.ws):
            t.requires_grad_(False)
        return [t.requires_grad_() for i, t in enumerate(chosen) if t is not None and asked >> i & 1]

    together, alone = group(), group()
    wanted, expected = leaves(together), leaves(alone)
    ys, others = together(), alone.alone()
    needed = [i for i, y in enumerate(ys) if y.requires_grad]
    dys = dys_of(ys)
    found = torch.autograd.grad([ys[i] for i in needed], wanted, [dys[i] for i in needed])
    alone_needed = [i for i, y in enumerate(others) if y.requires_grad]
    right = torch.autograd.grad([others[i] for i in alone_needed], expected, [dys[i] for i in alone_needed])
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


def test_without_gradients() -> None:
    g = group()
    with torch.no_grad():
        ys = g()
    assert not any(y.requires_grad for y in ys)
    for y, alone in zip(ys, g.alone(), strict=True):
        torch.testing.assert_close(y, alone)


def test_under_autocast_x_is_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    xs: set[int] = set()
    run = dispatch.lora_matmul_group

    def noted(products: Sequence[Product]) -> Any:
        xs.update(p.x.data_ptr() for p in products)
        return run(products)

    monkeypatch.setattr(dispatch, "lora_matmul_group", noted)
    g = group()
    with torch.autocast("cpu", torch.bfloat16):
        ys = g()
    assert {y.dtype for y in ys} == {torch.bfloat16}
    assert len(xs) == 1
    found = torch.autograd.grad(ys, g.trained, dys_of(ys))
    assert {t.dtype for t in found} == {torch.float32}


class Reads(TorchDispatchMode):
    """The operators that read some of x, by name; a view of it is x too."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._storage = x.untyped_storage().data_ptr()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [t for value in args for t in (value if isinstance(value, (list, tuple)) else [value])]
        reads = any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == self._storage for t in flat)
        if reads and not func.is_view:
            self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_x_is_read_once_by_the_adapters_in_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode is no eager call, so the operators are noted where the kernels run."""
    counts = {}
    for together in (True, False):
        g = group()
        noted: list[str] = []
        library = next(k for k in dispatch.KERNELS["lora_matmul"] if k.name == "library")

        def watched(function: Any, noted: list[str] = noted, x: Tensor = g.x) -> Any:
            def run(*arguments: Any, **options: Any) -> Any:
                with Reads(x) as reads:
                    made = function(*arguments, **options)
                noted.extend(reads.names)
                return made

            return run

        way = library.together
        assert way is not None
        with monkeypatch.context() as patch:
            replace_kernel(
                patch,
                "library",
                run=watched(library.run),
                gradients=watched(library.gradients),
                together=type(way)(watched(way.run), watched(way.gradients)),
            )
            ys = g() if together else g.alone()
            torch.autograd.grad(ys, g.trained, dys_of(ys))
            counts[together] = len(noted) - 3  # three base products
    assert counts == {True: 2, False: 6}


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp16_fp32_adapters"])
def test_masks_of_a_few_rows_at_a_time(dtypes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dropout._CHUNK, "cpu", 10 * K)
    rows: list[int] = []
    kept, kept_both = masks.kept, masks.kept_both

    def noted(mask: dropout.Dropout, x: Tensor, first_row: int = 0) -> Tensor:
        rows.append(first_row)
        return kept(mask, x, first_row)

    def noted_both(mask: dropout.Dropout, x: Tensor, product: Tensor, first_row: int = 0) -> Tensor:
        rows.append(first_row)
        return kept_both(mask, x, product, first_row)

    monkeypatch.setattr(masks, "kept", noted)
    monkeypatch.setattr(masks, "kept_both", noted_both)
    check_against_the_oracle(group(*DTYPES[dtypes], dropout=True))
    # Both masks of some rows before those of the next, forward and backward.
    assert rows == 2 * [0, 0, 10, 10, 20, 20, 30, 30]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_with_dropout_adapters_have_the_same_bits_whether_x_asks_or_not(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """As under gradient checkpointing, where the first layer's x begins to ask."""

    def gradients(x_asks: bool) -> list[Tensor]:
        torch.manual_seed(4)
        g = group(*dtypes, dropout=True)
        g.x.requires_grad_(x_asks)
        ys = g()
        return list(torch.autograd.grad(ys, [*g.a_s, *g.bs], dys_of(ys)))

    assert all(torch.equal(*pair) for pair in zip(gradients(True), gradients(False), strict=True))


def test_tracing_runs_the_branches_one_by_one() -> None:
    g = group()
    with Reads(g.x):
        ys = g()
    for y, alone in zip(ys, g.alone(), strict=True):
        torch.testing.assert_close(y, alone)


def test_compiled() -> None:
    g = group()
    compiled = torch.compile(lambda: g(), backend="aot_eager", fullgraph=True)
    for y, alone in zip(compiled(), g.alone(), strict=True):
        torch.testing.assert_close(y, alone)


def test_a_second_differentiation_is_refused() -> None:
    g = group()
    (dx,) = torch.autograd.grad(sum(y.square().sum() for y in g()), g.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.small_calls
@pytest.mark.parametrize("dropout", [False, True])
def test_small_calls(dropout: bool) -> None:
    g = group(dropout=dropout)
    torch.manual_seed(2)
    ys = g()
    torch.manual_seed(2)
    for y, alone in zip(ys, g.alone(), strict=True):
        assert torch.equal(y, alone)


ODD = ((6, torch.float32), (4, torch.float32), (8, torch.float64))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ws": []}, ValueError, "as many of each as there are branches, at least one, got weights 0, lora_as 3"),
        ({"scales": [1.0]}, ValueError, "scales 1"),
        ({"biases": [None]}, ValueError, "biases 1"),
        ({"ps": [0.1, 0.1]}, ValueError, "dropout_ps 2"),
        ({"ps": [0.1, 0.1, 1.0]}, ValueError, "branch 2: dropout_p must be at least 0 and below 1, got 1.0"),
        ({"ws": [torch.empty(n, k) for n, k in ((40, K), (24, 49), (24, K))]}, RuntimeError, "branch 1: x has shape"),
        ({"scales": [1.0, "2", 1.0]}, TypeError, "branch 1: scale must be a float, got str"),
        ({"a_s": [torch.empty(r, K).to(d) for r, d in ODD]}, RuntimeError, "branch 2: lora_a is float64 and lora_b"),
        ({"x": torch.empty(5, K, dtype=torch.float64)}, RuntimeError, "branch 0: weight is float32 and x float64"),
    ],
)  # fmt: skip
def test_bad_input_names_the_branch(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        group()._replace(**change)()
    assert words in str(caught.value)
