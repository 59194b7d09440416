"""triton-skinny's launches for several layers of one input: each alone, then whole steps, against the fp64 oracle.

On the GPU where there is one, else in the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import fastlora
from fastlora.accuracy import assert_close_to_oracle, oracle_step, reference_step
from fastlora.backends import reference, triton_skinny
from fastlora.backends import triton as backend
from fastlora.backends.dropout import Dropout, draw_seed
from fastlora.backends.request import Product
from fastlora.kernels import branches, group_grad, group_middle, group_update
from fastlora.kernels.launch import Launch
from tests.cases import DTYPES, LAYOUTS, make

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CAPABILITY = backend.capability_of(DEVICE)
HALF = "bf16" if ON_GPU else "fp16"
NAN = float("nan")
SCALES, PS, NS = (1.7, 0.5, 3.0, 1.1, 0.8), (0.1, 0.4, 0.0, 0.7, 0.2), (29, 52, 40, 24, 33)
# One block and several, whole and ragged, up to what one launch takes.
RANKS = [(16, 16, 16), (8, 12), (1, 5, 64, 3), (128, 8), (64, 64, 64, 16)]
MASKS = ["none", "input"]


def words(ranks: Sequence[int]) -> str:
    return "x".join(map(str, ranks))


def products(
    ranks: Sequence[int], dtypes: str = HALF, mask: str = "none", m: int = 35, k: int = 140, x: Tensor | None = None
) -> list[Product]:
    """Branches of one x, each with its own width, scale and, where ``mask`` says so, dropout; the third has none."""
    dtype, adapter_dtype = DTYPES[dtypes]
    made = []
    for i, r in enumerate(ranks):
        operands = make(m, k, NS[i], r, dtype=dtype, adapter_dtype=adapter_dtype, bias=i != 1, seed=i)
        operands = operands.map(lambda t: t.to(DEVICE))
        x = operands.x if x is None else x
        dropout = Dropout(PS[i], draw_seed(DEVICE)) if mask == "input" and PS[i] else None
        made.append(operands._replace(x=x).product(dropout, scale=SCALES[i]))
    return made


def filled_middle(p: Product, seed: int, columns: Tensor) -> None:
    """Normal numbers of z's size in a branch's columns."""
    generator = torch.Generator().manual_seed(seed)
    columns.copy_(torch.randn(columns.shape, generator=generator) / columns.shape[1] ** 0.5)


def middles(group: Sequence[Product], filled: bool) -> Tensor:
    """[M, C] for z or t, NaN between the branches and, where not filled, in them."""
    ranks = branches.ranks_of(group)
    x = group[0].x
    columns = torch.full((x.shape[0], branches.begins(ranks)[1]), NAN, dtype=x.dtype, device=DEVICE)
    if filled:
        for i, (p, own) in enumerate(zip(group, branches.views(columns, ranks), strict=True)):
            filled_middle(p, 30 + i, own)
    return columns


def run(*launches: Launch) -> None:
    """Runs launches whose memory holds NaN before."""
    for launch in launches:
        for name in ("partial_ptr", "partial_2_ptr"):
            if launch.arguments.get(name) is not None:
                launch.arguments[name].fill_(NAN)
    for launch in launches:
        launch.run()


def check_middle(group: Sequence[Product], launches: int | None = None, capability: int = CAPABILITY) -> None:
    z, again = middles(group, filled=False), middles(group, filled=False)
    for out in (z, again):
        steps = group_middle.launches(group, out, capability=capability, precision="ieee")
        assert launches in (None, len(steps))
        run(*steps)
    ranks = branches.ranks_of(group)
    for i, (p, own, same) in enumerate(zip(group, branches.views(z, ranks), branches.views(again, ranks), strict=True)):
        alone = p._replace(w=None)
        oracle, baseline = reference.lora_matmul(alone.map(Tensor.double))[1], reference.lora_matmul(alone)[1]
        assert_close_to_oracle(own, oracle=oracle, baseline=baseline, name=f"z of branch {i}")
        assert torch.equal(own, same)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtypes", [HALF, "fp32", f"{HALF}_fp32_adapters"])
@pytest.mark.parametrize("ranks", RANKS, ids=words)
def test_group_middle(ranks: tuple[int, ...], dtypes: str, mask: str) -> None:
    """At the longer K the sum is split among CTAs."""
    check_middle(products(ranks, dtypes, mask, k=41), launches=1)
    check_middle(products(ranks, dtypes, mask, k=300 if dtypes == "fp32" else 600), launches=2)


@pytest.mark.skipif(ON_GPU, reason="tiles of another architecture")
@pytest.mark.parametrize("ranks", RANKS, ids=words)
def test_group_middle_as_amd_has_it(ranks: tuple[int, ...]) -> None:
    """A block is one branch's without masks, too."""
    check_middle(products(ranks, k=300), capability=0x942)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_middle_reads_x_in_any_strides(layout: str, mask: str) -> None:
    x = LAYOUTS[layout](make(37, 140, dtype=DTYPES[HALF][0]).x.to(DEVICE))
    check_middle(products((12, 16), mask=mask, m=37, x=x))


def low_rank(p: Product, t: Tensor) -> Tensor:
    """D'(t a)."""
    found = t @ p.a.to(t.dtype)
    return found if p.mask_x is None else torch.where(p.mask_x.keep(*found.shape), found * p.mask_x.rescale, 0)


def check_update(group: Sequence[Product]) -> None:
    t = middles(group, filled=True)
    made = []
    for _ in range(2):
        dx, step = group_update.launch(group, t, precision="ieee")
        dx.fill_(NAN)
        run(step)
        made.append(dx)
    ts = branches.views(t, branches.ranks_of(group))
    oracle = sum(low_rank(p.map(Tensor.double), own.double()) for p, own in zip(group, ts, strict=True))
    baseline = sum(low_rank(p, own) for p, own in zip(group, ts, strict=True))
    assert_close_to_oracle(made[0], oracle=oracle, baseline=baseline, name="dx")
    assert torch.equal(*made)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtypes", [HALF, "fp32", f"{HALF}_fp32_adapters"])
@pytest.mark.parametrize("ranks", RANKS, ids=words)
def test_group_update(ranks: tuple[int, ...], dtypes: str, mask: str) -> None:
    check_update(products(ranks, dtypes, mask))


@pytest.mark.parametrize(("m", "k"), [(1, 1), (1, 300), (300, 1), (31, 127), (33, 129), (32, 128)])
def test_group_off_the_tile(m: int, k: int) -> None:
    group = products((12, 5, 16), mask="input", m=m, k=k)
    check_middle(group)
    check_update(group)
    check_grad(group)


def check_grad(group: Sequence[Product]) -> None:
    t, dtype = middles(group, filled=True), group[0].a.dtype
    made = []
    for _ in range(2):
        grad, steps = group_grad.launches(group, t, dtype=dtype, capability=CAPABILITY, precision="ieee")
        grad.fill_(NAN)
        run(*steps)
        made.append(grad)
    ranks = branches.ranks_of(group)
    found = zip(group, branches.views(t, ranks), branches.begins(ranks)[0], strict=True)
    for i, (p, own, begin) in enumerate(found):
        rows = slice(begin, begin + p.a.shape[0])
        oracle = reference.rank_grad(own.double(), p.x.double(), dtype=torch.float64, dropout=p.mask_x)
        baseline = reference.rank_grad(own, p.x, dtype=dtype, dropout=p.mask_x)
        assert_close_to_oracle(made[0][rows], oracle=oracle, baseline=baseline, name=f"da of branch {i}")
        assert torch.equal(made[0][rows], made[1][rows])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtypes", [HALF, "fp32", f"{HALF}_fp32_adapters"])
@pytest.mark.parametrize("ranks", RANKS, ids=words)
def test_group_grad(ranks: tuple[int, ...], dtypes: str, mask: str) -> None:
    check_grad(products(ranks, dtypes, mask, m=270, k=70))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_grad_reads_x_in_any_strides(layout: str) -> None:
    x = LAYOUTS[layout](make(37, 140, dtype=DTYPES[HALF][0]).x.to(DEVICE))
    check_grad(products((12, 16), mask="input", m=37, x=x))


def test_the_masks_are_those_of_calls_one_by_one_bit_for_bit() -> None:
    """x of ones, and an a that takes one column each: z is what was kept of it, and so is dx where t is one."""
    m, k = 40, 64
    x = torch.ones(m, k, dtype=DTYPES[HALF][0], device=DEVICE)
    group = [p._replace(scale=1.0) for p in products((64, 64), mask="input", m=m, k=k, x=x)]
    group = [p._replace(a=torch.eye(k, dtype=x.dtype, device=DEVICE)) for p in group]
    z, t = middles(group, filled=False), torch.ones(m, 2 * k, dtype=x.dtype, device=DEVICE)
    run(*group_middle.launches(group, z, capability=CAPABILITY, precision="ieee"))
    dx, step = group_update.launch(group, t, precision="ieee")
    run(step)
    keeps = [p.mask_x.keep(m, k) for p in group]
    assert not torch.equal(*keeps)
    for p, own, keep in zip(group, branches.views(z, (k, k)), keeps, strict=True):
        alone = triton_skinny.launch(p)[1]
        assert torch.equal(own.ne(0), keep)
        assert torch.equal(own, alone)
    assert torch.equal(dx.ne(0), keeps[0] | keeps[1])


def check_steps(group: Sequence[Product], calls: list[int], expected: list[int]) -> None:
    """A step through ``lora_linear_group``, in which so many branches went together forward and backward."""
    x = group[0].x.detach().requires_grad_()
    adapters = [(p.a.detach().requires_grad_(), p.b.detach().requires_grad_()) for p in group]
    a_s, bs = map(list, zip(*adapters, strict=True))
    ps = [p.dropout_p for p in group]
    torch.manual_seed(3)
    seeds = [draw_seed(DEVICE) if p else None for p in ps]
    group = [p._replace(seed=seed) for p, seed in zip(group, seeds, strict=True)]

    def step() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        torch.manual_seed(3)
        ys = fastlora.lora_linear_group(
            x,
            [p.w for p in group],
            a_s,
            bs,
            scales=[p.scale for p in group],
            biases=[p.bias for p in group],
            dropout_ps=ps,
        )
        generator = torch.Generator().manual_seed(7)
        dys = [torch.randn(y.shape, generator=generator).to(y) for y in ys]
        found = torch.autograd.grad(ys, [x, *a_s, *bs], dys)
        return (*ys, *found), tuple(dys)

    made, dys = step()
    assert calls == expected
    n = len(group)
    oracles, baselines = ([of(p, dy) for p, dy in zip(group, dys, strict=True)] for of in (oracle_step, reference_step))
    for i in range(n):
        named = {"y": made[i].detach(), "da": made[n + 1 + i], "db": made[2 * n + 1 + i]}
        for name, tensor in named.items():
            oracle, baseline = (getattr(steps[i], name) for steps in (oracles, baselines))
            assert_close_to_oracle(tensor, oracle=oracle, baseline=baseline, name=f"{name} of branch {i}")
    oracle, baseline = (torch.stack([s.dx for s in steps]).sum(0) for steps in (oracles, baselines))
    assert_close_to_oracle(made[n], oracle=oracle, baseline=baseline, name="dx")
    again, _ = step()
    assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many branches each part has that triton-skinny, forced, runs forward or backward."""
    monkeypatch.setenv("FASTLORA_BACKEND", "triton-skinny")
    made: list[int] = []
    for name in ("launch_group", "launch_group_gradients"):
        function = getattr(triton_skinny, name)

        def noted(part: Sequence[Product], *rest: object, function: object = function) -> object:
            made.append(len(part))
            return function(part, *rest)

        monkeypatch.setattr(triton_skinny, name, noted)
    return made


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtypes", [HALF, "fp32", f"{HALF}_fp32_adapters"])
@pytest.mark.parametrize("ranks", [(16, 8, 16), (12, 40), (5, 8, 1, 16, 12)], ids=words)
def test_group_step(ranks: tuple[int, ...], dtypes: str, mask: str, calls: list[int]) -> None:
    """More than four go in parts."""
    expected = [3, 3] if len(ranks) == 3 else [2, 2] if len(ranks) == 2 else [4, 1, 4, 1]
    check_steps(products(ranks, dtypes, mask), calls, expected)


def test_group_step_of_one_token(calls: list[int]) -> None:
    check_steps(products((16, 16), mask="input", m=1), calls, [2, 2])


def test_adapters_of_two_dtypes_go_apart() -> None:
    half, whole = torch.float16, torch.float32
    assert list(branches.parts([half, half, whole, whole])) == [slice(0, 2), slice(2, 4)]
    assert list(branches.parts([half, whole, half])) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(branches.parts([half] * 9)) == [slice(0, 4), slice(4, 8), slice(8, 9)]


@pytest.mark.parametrize("operand", ["a", "bias"])
def test_adapters_in_any_strides(operand: str) -> None:
    group = products((8, 12), mask="input")
    expected = triton_skinny.launch_group(group)
    field = getattr(group[0], operand)
    strided = torch.full((*field.shape[:-1], 2 * field.shape[-1]), NAN, dtype=field.dtype, device=DEVICE)[..., ::2]
    group[0] = group[0]._replace(**{operand: strided.copy_(field)})
    for one, other in zip(triton_skinny.launch_group(group), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
