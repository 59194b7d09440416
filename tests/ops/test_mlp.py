"""The gated MLP: as good as its three layers one by one, with half of what they keep for the backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import Branch
from fastlora.accuracy import MlpStep, assert_close_to_oracle, oracle_mlp_step, reference_mlp_step
from fastlora.backends import dispatch, reference, swiglu
from fastlora.backends.dropout import draw_seed
from fastlora.backends.request import Product
from tests.cases import DTYPES, LAYOUTS, OpLog, gradient_of, make

K, N, OUT = 48, 72, 40
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}
# Of gate, up and down: N, K, R, scale, dropout, bias.
SIZES = ((N, K, 6, 1.7, 0.1, True), (N, K, 8, 0.5, 0.3, False), (OUT, N, 4, 1.3, 0.2, True))


class Mlp(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    gate: Branch
    up: Branch
    down: Branch

    def __call__(self, **options: Any) -> Tensor:
        return fastlora.lora_swiglu_mlp(*self, **options)

    def alone(self, activation: str = "silu", training: bool = True) -> Tensor:
        """As a model writes it."""

        def layer(x: Tensor, branch: Branch) -> Tensor:
            w, a, b, scale, bias, p = branch
            return fastlora.lora_linear(x, w, a, b, scale=scale, bias=bias, dropout_p=p, training=training)

        return layer(TORCH[activation](layer(self.x, self.gate)) * layer(self.x, self.up), self.down)

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, *(t for branch in self[1:] for t in branch[1:3])]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x, *(t for branch in self[1:] for t in branch if isinstance(t, Tensor))]


def mlp(
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    dropout: bool = False,
    lead: tuple[int, ...] = (37,),
    sizes: Sequence[tuple[int, int, int, float, float, bool]] = SIZES,
) -> Mlp:
    """Leaves; the bases are frozen."""
    branches = []
    for i, (n, k, r, scale, p, bias) in enumerate(sizes):
        made = make(5, k, n, r, dtype=dtype, adapter_dtype=adapter_dtype, bias=bias, seed=i)
        a, b = made.lora_a.requires_grad_(), made.lora_b.requires_grad_()
        branches.append(Branch(made.weight, a, b, scale, made.bias, p if dropout else 0.0))
    return Mlp(make(k=sizes[0][1], lead=lead, dtype=dtype, seed=9).x.requires_grad_(), *branches)


def check_against_the_oracle(m: Mlp, activation: str = "silu") -> None:
    torch.manual_seed(3)
    y = m(activation=activation)
    torch.manual_seed(3)
    x = m.x.detach().reshape(-1, m.x.shape[-1])
    products = []
    for w, a, b, scale, bias, p in m[1:]:
        seed = draw_seed(x.device) if p else None
        products.append(Product(x, w, a.detach(), b.detach(), scale, bias, p, seed))
    dy = gradient_of(y)
    found = torch.autograd.grad(y, m.trained, dy)
    actual = MlpStep(y.detach(), found[0], tuple(found[1::2]), tuple(found[2::2]))
    arguments = (*products, dy.reshape(-1, dy.shape[-1]), activation)
    steps = (actual, oracle_mlp_step(*arguments), reference_mlp_step(*arguments))
    flat = ([step.y, step.dx, *step.das, *step.dbs] for step in steps)
    names = ("y", "dx", *(f"{what} of {name}" for what in ("da", "db") for name in ("gate", "up", "down")))
    for name, one, oracle, baseline in zip(names, *flat, strict=True):
        assert_close_to_oracle(one.reshape(baseline.shape), oracle=oracle, baseline=baseline, name=name)


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [False, True], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_tensor_meets_the_rule(dtypes: str, dropout: bool, activation: str) -> None:
    check_against_the_oracle(mlp(*DTYPES[dtypes], dropout=dropout), activation)


@pytest.mark.parametrize("r", [1, 8, 40])
@pytest.mark.parametrize(("k", "n", "out"), [(1, 1, 1), (16, 130, 7), (65, 8, 33)])
def test_widths_and_ranks(k: int, n: int, out: int, r: int) -> None:
    sizes = ((n, k, r, 1.7, 0.1, False), (n, k, r + 1, 0.6, 0.2, True), (out, n, r, 1.2, 0.3, False))
    check_against_the_oracle(mlp(torch.float64, dropout=True, sizes=sizes))


@pytest.mark.parametrize("which", list(itertools.product([False, True], repeat=3)), ids=str)
def test_any_of_the_layers_may_have_dropout(which: tuple[bool, ...]) -> None:
    sizes = tuple((*size[:4], 0.3 if on else 0.0, size[5]) for size, on in zip(SIZES, which, strict=True))
    check_against_the_oracle(mlp(dropout=True, sizes=sizes))


@pytest.mark.parametrize("backend", ["reference", "triton-skinny"])
def test_with_a_kernel_forced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "reference":
        pytest.importorskip("triton")
    monkeypatch.setenv("FASTLORA_BACKEND", backend)
    check_against_the_oracle(mlp(dropout=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtypes", ["fp32", "fp16_fp32_adapters"])
def test_with_the_activations_own_kernel(dtypes: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(swiglu, "_by_kernel", lambda g, activation: True)
    check_against_the_oracle(mlp(*DTYPES[dtypes], dropout=True), activation)
    m = mlp()
    with torch.no_grad():
        y = m()
    same([y], [m.alone()])


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 1, 5)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    m = mlp(lead=lead)
    y, other = m(), m.alone()
    assert y.shape == (*lead, OUT)
    dy = gradient_of(y)
    same([y, *torch.autograd.grad(y, m.trained, dy)], [other, *torch.autograd.grad(other, m.trained, dy)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_and_its_gradient_in_any_layout(layout: str) -> None:
    m = mlp()
    m = m._replace(x=LAYOUTS[layout](m.x.detach()).requires_grad_())
    y, other = m(), m.alone()
    dy = LAYOUTS[layout](gradient_of(y))
    same([y, *torch.autograd.grad(y, m.trained, dy)], [other, *torch.autograd.grad(other, m.trained, dy)])


def test_the_gradient_of_a_sum_has_no_strides() -> None:
    m, other = mlp(), mlp()
    m().sum().backward()
    other.alone().sum().backward()
    same([t.grad for t in m.trained], [t.grad for t in other.trained])


def test_masks_are_those_of_three_calls() -> None:
    m = mlp(dropout=True)
    torch.manual_seed(5)
    y = m()
    torch.manual_seed(5)
    same([y], [m.alone()])
    same([m(training=False)], [mlp()()])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    m = mlp(torch.float64, lead=(5,))
    leaves = [t.requires_grad_() for t in m.tensors]
    generator = torch.Generator().manual_seed(4)
    for t in leaves:
        t.data = torch.randn(t.shape, generator=generator, dtype=t.dtype) * 0.3
    assert torch.autograd.gradcheck(lambda *_: m(activation=activation), leaves, fast_mode=True)


# x, and w, a, b and bias of gate, up and down; up has no bias.
LEAVES = 1 + 4 + 3 + 4


@pytest.mark.parametrize("asked", [*range(1, 1 << LEAVES, 37), *(1 << i for i in range(LEAVES)), 2 ** (LEAVES) - 1])
def test_every_pattern_of_gradients(asked: int) -> None:
    def leaves(m: Mlp) -> list[Tensor]:
        order = [m.x, *(branch[field] for branch in m[1:] for field in (0, 1, 2, 4) if branch[field] is not None)]
        assert len(order) == LEAVES
        return [t for i, t in enumerate(order) if t.requires_grad_(bool(asked >> i & 1)).requires_grad]

    m, other = mlp(dropout=True), mlp(dropout=True)
    wanted, expected = leaves(m), leaves(other)
    torch.manual_seed(1)
    y = m()
    torch.manual_seed(1)
    y_other = other.alone()
    dy = gradient_of(y)
    same([y, *torch.autograd.grad(y, wanted, dy)], [y_other, *torch.autograd.grad(y_other, expected, dy)])


def saved(call: Callable[[], Tensor], but: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what a call keeps for the backward, each memory once, but for the operands' own."""
    seen, shapes = {t.untyped_storage().data_ptr() for t in but}, []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in seen:
            seen.add(t.untyped_storage().data_ptr())
            shapes.append(tuple(t.shape))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = call()
    assert y.requires_grad
    return shapes


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_wide_tensors_are_kept_where_four_were(activation: str) -> None:
    m = mlp(dropout=True)
    kept = saved(lambda: m(activation=activation), m.tensors)
    assert sorted(kept) == sorted([(37, N)] * 2 + [(37, 6), (37, 8), (37, 4)] + [(2,)] * 3)
    assert saved(lambda: m.alone(activation), m.tensors).count((37, N)) == 4


@pytest.mark.parametrize(
    ("leaf", "wide"),
    [("gate.1", 2), ("up.2", 2), ("down.1", 2), ("down.2", 0), ("down.4", 0)],
)
def test_nothing_is_kept_for_what_asks_for_no_gradient(leaf: str, wide: int) -> None:
    m = mlp()
    for t in m.trained:
        t.requires_grad_(False)
    name, field = leaf.split(".")
    getattr(m, name)[int(field)].requires_grad_()
    assert saved(m, m.tensors).count((37, N)) == wide


def test_without_gradients_nothing_is_kept() -> None:
    m = mlp()
    for t in m.trained:
        t.requires_grad_(False)
    assert not m().requires_grad
    same([m()], [m.alone()])
    m.x.requires_grad_()
    with torch.no_grad():
        y = m()
    assert not y.requires_grad
    same([y], [m.alone()])


def memory_of(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """What a call returns, the most bytes it holds at once, and those it leaves, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return result, max(held), held[-1]


def test_the_peak_of_a_step_is_five_wide_tensors_where_it_was_six() -> None:
    wide = 512 * 2000 * 4
    sizes = ((2000, 32, 6, 1.7, 0.0, True), (2000, 32, 8, 0.5, 0.0, False), (32, 2000, 4, 1.3, 0.0, True))
    found = []
    for alone in (False, True):
        m = mlp(sizes=sizes, lead=(512,))
        y, most, kept = memory_of(m.alone if alone else m)
        _, more, _ = memory_of(lambda y=y: y.backward(torch.ones_like(y)))
        found.append([size / wide for size in (most, kept, kept + more)])
    assert found == [pytest.approx([3, 2, 5], abs=0.1), pytest.approx([4, 4, 6], abs=0.1)]


def test_the_activations_gradients_overwrite_nothing_but_that_of_h() -> None:
    g, u, dh = torch.randn(3, 37, N).unbind()
    before = g.clone(), u.clone()
    dg, _, _ = swiglu.backward(g, u, dh, "silu", with_h=True)
    assert dg.data_ptr() == dh.data_ptr()
    assert torch.equal(g, before[0])
    assert torch.equal(u, before[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_is_what_torch_makes_of_it(activation: str) -> None:
    g, u, dh = (3 * torch.randn(3, 37, N)).unbind()
    assert torch.equal(swiglu.forward(g, u, activation), TORCH[activation](g) * u)
    expected = reference.swiglu_gradients(g, u, dh, activation)
    dg, du, h = swiglu.backward(g, u, dh.clone(), activation, with_h=True)
    assert h is not None
    for one, other in zip((dg, du, h), (*expected, TORCH[activation](g) * u), strict=True):
        assert torch.equal(one, other)
    assert swiglu.backward(g, u, dh.clone(), activation, with_h=False)[2] is None
    overwritten = g.clone()
    assert swiglu.forward(overwritten, u, activation, overwrite=True).data_ptr() == overwritten.data_ptr()


@pytest.mark.parametrize("dropout", [False, True], ids=["no_dropout", "dropout"])
def test_two_backwards_through_one_graph(dropout: bool) -> None:
    m = mlp(dropout=dropout)
    y = m()
    dy = gradient_of(y)
    first = torch.autograd.grad(y, m.trained, dy, retain_graph=True)
    second = torch.autograd.grad(y, m.trained, dy)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_callers_tensors_stay_as_they_are() -> None:
    m = mlp(dropout=True)
    before = [t.detach().clone() for t in m.tensors]
    y = m()
    dy = gradient_of(y)
    y.backward(dy)
    assert torch.equal(dy, gradient_of(y))
    assert all(torch.equal(t, old) for t, old in zip(m.tensors, before, strict=True))


def test_a_second_differentiation_is_refused() -> None:
    m = mlp()
    (dx,) = torch.autograd.grad(m().square().sum(), m.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_checkpointing(reentrant: bool) -> None:
    found = []
    for wrap in (False, True):
        m = mlp(dropout=True)
        torch.manual_seed(6)
        y = checkpoint(lambda x, m=m: m._replace(x=x)(), m.x, use_reentrant=reentrant) if wrap else m()
        y.backward(gradient_of(y))
        found.append([y, *(t.grad for t in m.trained)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_activations_may_wait_elsewhere() -> None:
    found = []
    for wrap in (False, True):
        m = mlp(dropout=True)
        torch.manual_seed(6)
        with torch.autograd.graph.save_on_cpu() if wrap else torch.enable_grad():
            y = m()
        y.backward(gradient_of(y))
        found.append([y, *(t.grad for t in m.trained)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_under_autocast_x_is_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    xs: set[int] = set()
    run = dispatch.lora_matmul_group

    def noted(products: Sequence[Product]) -> Any:
        xs.update(p.x.data_ptr() for p in products)
        return run(products)

    monkeypatch.setattr(dispatch, "lora_matmul_group", noted)
    m = mlp()
    with torch.autocast("cpu", torch.bfloat16):
        y = m()
        other = m.alone()
    assert y.dtype is other.dtype is torch.bfloat16
    assert len(xs) == 1
    torch.testing.assert_close(y, other, rtol=2**-6, atol=0.05)
    dy = gradient_of(y)
    found, expected = (torch.autograd.grad(output, m.trained, dy) for output in (y, other))
    assert {t.dtype for t in found} == {torch.float32}
    for one, right in zip(found, expected, strict=True):
        assert (one - right).norm() < 2**-6 * right.norm()


def test_the_backward_may_run_under_autocast() -> None:
    m = mlp()
    y = m()
    dy = gradient_of(y)
    expected = torch.autograd.grad(y, m.trained, dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, m.trained, dy)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_dispatch_mode_sees_three_layers() -> None:
    m = mlp()
    with OpLog() as log:
        y = m()
        torch.autograd.grad(y, m.trained, gradient_of(y))
    assert log.count(["fastlora::lora_matmul"]) == {"fastlora::lora_matmul": 6}
    same([y], [m()])


def test_a_mode_that_is_entered_for_the_backward_alone_sees_the_verbs() -> None:
    m = mlp(dropout=True)
    y = m()
    dy = gradient_of(y)
    expected = torch.autograd.grad(y, m.trained, dy, retain_graph=True)
    with OpLog() as log:
        found = torch.autograd.grad(y, m.trained, dy)
    assert log.count(["fastlora::lora_matmul", "fastlora::rank_grad"]) == {
        "fastlora::lora_matmul": 3,
        "fastlora::rank_grad": 6,
    }
    same(found, expected)


def test_compiled() -> None:
    m = mlp()
    compiled = torch.compile(lambda: m(activation="gelu"), backend="aot_eager", fullgraph=True)
    y, other = compiled(), m.alone("gelu")
    dy = gradient_of(y)
    same([y, *torch.autograd.grad(y, m.trained, dy)], [other, *torch.autograd.grad(other, m.trained, dy)])


def test_functorch_is_answered_as_by_a_layer() -> None:
    m = mlp()
    with pytest.raises(RuntimeError, match=r"gate: .*setup_context"):
        torch.func.grad(lambda x: m._replace(x=x)().sum())(m.x.detach())


def test_parameters_and_subclasses() -> None:
    class Tagged(Tensor):
        pass

    m = mlp()
    same([m._replace(x=torch.nn.Parameter(m.x.detach()))()], [m()])
    y = m._replace(x=m.x.detach().as_subclass(Tagged))()
    same([y.as_subclass(Tensor)], [m()])


@pytest.mark.small_calls
@pytest.mark.parametrize("dropout", [False, True], ids=["no_dropout", "dropout"])
def test_small_calls_are_three_layers(dropout: bool) -> None:
    check_against_the_oracle(mlp(dropout=dropout))
    few = mlp()
    assert saved(few, few.tensors).count((37, N)) == 4
    many = mlp(lead=((1 << 18) // N + 1,))
    assert [shape[1:] for shape in saved(many, many.tensors)].count((N,)) == 2


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {name: getattr(mlp(), name)._replace(**fields)}


# Not the sizes of any call above: a weight, and adapters that fit it.
def other_sizes(name: str, n: int, k: int) -> dict[str, Any]:
    return changed(name, weight=torch.empty(n, k), lora_a=torch.empty(4, k), lora_b=torch.empty(n, 4), bias=None)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activation": "relu"}, ValueError, "activation 'relu' is unknown: expected one of silu, gelu, gelu_tanh"),
        ({"activation": F.silu}, ValueError, "is unknown: expected one of silu, gelu, gelu_tanh"),
        ({"up": tuple(mlp().up)}, TypeError, "up: expected a fastlora.Branch(weight, lora_a, lora_b, scale, bias, "),
        ({"down": None}, TypeError, "down: expected a fastlora.Branch"),
        ({"x": None}, TypeError, "gate: x must be a torch.Tensor, got NoneType"),
        ({"x": torch.empty(5, 49)}, RuntimeError, "gate: x has shape [5, 49]: expected [..., 48]"),
        ({"x": torch.empty(5, K).double()}, RuntimeError, "gate: weight is float32 and x float64"),
        ({"x": torch.tensor(1.0)}, RuntimeError, "gate: x has shape []"),
        (changed("gate", weight=torch.tensor(1.0)), RuntimeError, "gate: weight has shape []"),
        (changed("gate", scale="2"), TypeError, "gate: scale must be a float, got str"),
        (other_sizes("up", N, 49), RuntimeError, f"up: weight has shape [{N}, 49]: expected [{N}, 48], as gate's"),
        (other_sizes("up", 71, K), RuntimeError, f"up: weight has shape [71, 48]: expected [{N}, 48], as gate's"),
        (other_sizes("down", OUT, 71), RuntimeError, f"down: weight has shape [40, 71]: expected [out_features, {N}]"),
        (changed("up", weight=torch.empty(9)), RuntimeError, "up: weight has shape [9]: expected two dimensions"),
        (changed("up", lora_a=torch.empty(6, 9)), RuntimeError, "up: lora_a has shape [6, 9]"),
        (changed("up", dropout_p=1.0), ValueError, "up: dropout_p must be at least 0 and below 1, got 1.0"),
        (changed("down", lora_b=None), TypeError, "down: lora_b must be a torch.Tensor, got NoneType"),
        (changed("down", bias=torch.empty(7)), RuntimeError, "down: bias has shape [7]"),
        (changed("down", lora_a=torch.empty(4, N).half()), RuntimeError, "down: lora_a is float16 and lora_b float32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.small_calls)], ids=["verbs", "small"])
def test_bad_input_names_the_branch(change: dict[str, Any], error: type[Exception], words: str, small: bool) -> None:
    del small
    activation = change.get("activation", "silu")
    fields = {name: value for name, value in change.items() if name != "activation"}
    with pytest.raises(error) as caught:
        mlp()._replace(**fields)(activation=activation)
    assert words in str(caught.value)
