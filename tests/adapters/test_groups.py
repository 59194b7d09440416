"""Siblings among injected layers: computed at once, each taken on proof in its own forward, through every switch."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import siblings
from fastlora.adapters.layer import AdaptedConv1D, AdaptedLinear
from fastlora.siblings import Counts
from tests.adapters.tiny_models import fill

K, N, NKV = 24, 36, 20
QKV = ("q_proj", "k_proj", "v_proj")
TARGETS = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]
ALONE = Counts(0, 0, 0)


def conv1d(k: int, n: int, bias: bool = True) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(n, k)


class Attention(nn.Module):
    """Grouped queries: q is wider than k and v."""

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = linear(K, N), linear(K, NKV), linear(K, NKV, bias=False)
        self.o_proj = linear(NKV, K)
        self.between: Callable[[], object] = int

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        self.between()
        return self.o_proj(torch.tanh(self.k_proj(x)) * self.v_proj(x) + q[..., :NKV])


class Block(nn.Module):
    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.attn = Attention(linear)
        self.gate_proj, self.up_proj, self.down_proj = linear(K, N), linear(K, N), linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    """Two blocks, recomputed where ``reentrant`` says how."""

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(linear) for _ in range(2))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def base(linear: Callable[..., nn.Module] = nn.Linear) -> Any:
    torch.manual_seed(3)
    # In float64 everything that is not the same shows, whatever order sums have.
    return Model(linear).double()


def inject(model: Any, target_modules: Any = TARGETS, **options: Any) -> fastlora.adapters.inject.InjectionReport:
    settings = {"r": 6, "lora_alpha": 10, "rank_pattern": {"k_proj": 4, "o_proj": 3}}
    report = fastlora.inject(model, target_modules, **(settings | options))
    fill(model)
    return report


def adapted(linear: Callable[..., nn.Module] = nn.Linear, **options: Any) -> Any:
    model = base(linear)
    inject(model, **options)
    return model


def two() -> Any:
    """Two adapters, of which the second has no part in keys."""
    model = adapted()
    inject(model, ["q_proj", "v_proj", "up_proj"], adapter_name="other", r=2, rank_pattern={})
    return model


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(5, 7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module) -> dict[str, Tensor]:
    """y, dx and the gradient of every parameter that got one."""
    model.zero_grad()
    torch.manual_seed(5)
    x = inputs().requires_grad_()
    y = model(x)
    (y * inputs(2)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def counted(model: nn.Module) -> tuple[dict[str, Tensor], Counts]:
    siblings.close()
    before = siblings.counts()
    result = step(model)
    siblings.close()
    return result, Counts(*(now - then for now, then in zip(siblings.counts(), before, strict=True)))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def alone(model: nn.Module) -> Any:
    """A copy, which has no groups."""
    return copy.deepcopy(model)


def check(model: nn.Module, groups: Counts) -> None:
    """A step is that of the layers one by one, and so many groups were computed, taken and wasted."""
    result, found = counted(model)
    expected, none = counted(alone(model))
    assert none == ALONE
    assert_same(result, expected)
    assert found == groups


@pytest.fixture(autouse=True)
def none_open() -> Iterator[None]:
    siblings.close()
    siblings._warned.clear()
    yield
    siblings.close()


@pytest.mark.parametrize("linear", [nn.Linear, conv1d])
def test_a_step_is_that_of_the_layers_one_by_one(linear: Any) -> None:
    model = adapted(linear)
    assert isinstance(model.blocks[0].attn.q_proj, AdaptedConv1D if linear is conv1d else AdaptedLinear)
    # Two blocks of q, k, v and gate, up.
    check(model, Counts(4, 6, 0))


def test_groups_are_reported() -> None:
    report = inject(base())
    qkv = {tuple(f"blocks.{i}.attn.{name}" for name in QKV) for i in range(2)}
    assert set(report.groups) == qkv | {
        tuple(f"blocks.{i}.{name}" for name in ("gate_proj", "up_proj")) for i in (0, 1)
    }
    assert report.ungrouped == {}
    line = "  4 groups: blocks.*.attn.q_proj + blocks.*.attn.k_proj + blocks.*.attn.v_proj, blocks.*.gate_proj + "
    assert line in str(report)


def test_a_sibling_without_an_adapter_is_reported_and_computes_alone() -> None:
    model = base()
    report = inject(model, ["q_proj", "v_proj", "down_proj"], rank_pattern={})
    assert report.ungrouped == {f"blocks.{i}.attn.k_proj": "it has no adapter" for i in range(2)}
    assert "  2 in no group: it has no adapter (blocks.0.attn.k_proj, blocks.1.attn.k_proj)" in str(report)
    check(model, Counts(2, 2, 0))


def test_none_groups_nothing() -> None:
    model = base()
    report = inject(model, groups=None)
    assert (report.groups, report.ungrouped) == ((), {})
    assert "group" not in str(report)
    check(model, ALONE)


@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("attn.q_proj", "attn.v_proj")])
def test_groups_by_name(names: tuple[str, ...]) -> None:
    check(adapted(groups=[names]), Counts(2, 2, 0))


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        ("q_proj", TypeError, 'groups must be "auto", None, or tuples of names'),
        ([("wq", "wk")], ValueError, "that no two layers of one parent in model have"),
        ([("q_proj", "v_prj")], ValueError, "'v_prj': did you mean v_proj"),
        ([("attn.q_proj", "mlp.up_proj")], ValueError, "two or more names of layers under one parent"),
    ],
)
def test_groups_that_make_no_sense_are_refused_and_nothing_is_changed(
    groups: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    model = base()
    fastlora.save_adapter(adapted(), tmp_path / "adapter")
    for act in (
        lambda: inject(model, groups=groups),
        lambda: fastlora.load_adapter(model, tmp_path / "adapter", groups=groups),
    ):
        with pytest.raises(error, match=words):
            act()
        assert "_fastlora" not in model.__dict__
        assert not any(isinstance(layer, AdaptedLinear) for layer in model.modules())
    model = adapted()
    before = step(model)
    fill(model, seed=9)
    changed = step(model)
    with pytest.raises(error, match=words):
        fastlora.load_adapter(model, tmp_path / "adapter", groups=groups)
    result, found = counted(model)
    assert_same(result, changed)
    assert not torch.equal(result["y"], before["y"])
    assert found == Counts(4, 6, 0)


def test_a_later_adapter_groups_anew_and_leaves_what_was_asked_for_by_names() -> None:
    model = base()
    inject(model, ["q_proj", "v_proj"], rank_pattern={})
    assert [len(group) for group in inject(model, QKV, adapter_name="three", rank_pattern={}).groups] == [3, 3]
    fastlora.set_adapter(model, "three")
    check(model, Counts(2, 4, 0))

    model = adapted(groups=[("q_proj", "v_proj")])
    report = inject(model, ["up_proj", "gate_proj"], adapter_name="mlp", rank_pattern={})
    assert sorted(len(group) for group in report.groups) == [2, 2, 2, 2]
    assert report.ungrouped == {}
    check(model, Counts(4, 4, 0))
    assert len(inject(model, ["o_proj"], adapter_name="o", rank_pattern={}, groups=[QKV]).groups) == 2
    check(model, Counts(2, 4, 0))
    assert inject(model, ["o_proj"], adapter_name="none", rank_pattern={}, groups=None).groups == ()
    check(model, ALONE)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_and_checkpoints(dropout: float, reentrant: bool | None) -> None:
    model = adapted(lora_dropout=dropout)
    model.reentrant = reentrant
    check(model, Counts(4, 6, 0) if reentrant is None else Counts(8, 12, 0))
    if dropout:
        assert not torch.equal(step(model)["y"], step(model.eval())["y"])
        check(model, Counts(4, 6, 0) if reentrant is None else Counts(8, 12, 0))


SWITCHES: dict[str, tuple[Callable[[Any], object], Counts]] = {
    # k, and gate, have no part of the other adapter.
    "set": (lambda model: fastlora.set_adapter(model, "other"), Counts(2, 2, 0)),
    "none": (lambda model: fastlora.set_adapter(model, None), ALONE),
    "disable": (lambda model: fastlora.disable(model), ALONE),
    "disable_enable": (lambda model: (fastlora.disable(model), fastlora.enable(model)), Counts(4, 6, 0)),
    "merge": (lambda model: fastlora.merge_adapter(model), ALONE),
    "unmerge": (lambda model: (fastlora.merge_adapter(model), fastlora.unmerge_adapter(model)), Counts(4, 6, 0)),
    "delete": (lambda model: fastlora.delete_adapter(model, "other"), Counts(4, 6, 0)),
    "delete_active": (
        lambda model: (fastlora.delete_adapter(model, "default"), fastlora.set_adapter(model, "other")),
        Counts(2, 2, 0),
    ),
    "merge_one": (lambda model: model.blocks[0].attn.k_proj.merge(), Counts(4, 5, 0)),
    "fill": (lambda model: fill(model, seed=9), Counts(4, 6, 0)),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_between_calls(switch: str) -> None:
    act, groups = SWITCHES[switch]
    model = two()
    other = alone(model)
    assert counted(model)[1] == Counts(4, 6, 0)
    for each in (model, other):
        act(each)
    result, found = counted(model)
    assert_same(result, step(other))
    assert found == groups


@pytest.mark.parametrize(
    ("switch", "grad"),
    [
        *((switch, True) for switch in ("set", "none", "disable", "merge", "merge_one", "delete")),
        # The backward of what was overwritten is an error, grouped or not.
        *((switch, False) for switch in SWITCHES if switch != "delete_active"),
    ],
)
def test_switches_between_siblings(switch: str, grad: bool) -> None:
    """In the first block, once its queries are computed."""
    act, _ = SWITCHES[switch]
    model = two()
    other = alone(model)
    results = []
    for each in (model, other):
        attention = each.blocks[0].attn

        def between(each: Any = each, attention: Any = attention) -> None:
            attention.between = int
            act(each)

        attention.between = between
        if grad:
            results.append(step(each))
        else:
            with torch.no_grad():
                results.append({"y": each(inputs())})
    assert_same(*results)


@pytest.mark.parametrize("name", QKV)
def test_a_sibling_of_another_class_or_with_hooks_before_it_computes_alone(name: str) -> None:
    class Doubled(AdaptedLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = adapted()
    layer = getattr(model.blocks[0].attn, name)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    check(model, Counts(4, 5, 0))
    layer._forward_pre_hooks.clear()
    layer.__class__ = Doubled
    check(model, Counts(4, 5, 0))


def test_a_parametrised_sibling_computes_alone() -> None:
    model = adapted()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].attn.k_proj)
    check(model, Counts(4, 5, 0))


def test_hooks_on_a_sibling_fire() -> None:
    model, seen = adapted(), []
    for name in QKV:
        getattr(model.blocks[0].attn, name).register_forward_hook(lambda module, args, y: seen.append(module) or 2 * y)
    result, found = counted(model)
    assert found == Counts(4, 6, 0)
    assert seen == [getattr(model.blocks[0].attn, name) for name in QKV]
    assert_same(result, step(alone(model)))


@pytest.mark.parametrize(
    "leave",
    [fastlora.unload, fastlora.merge_and_unload, lambda model: fastlora.delete_adapter(model, "default")],
    ids=["unload", "merge_and_unload", "delete"],
)
def test_plain_layers_are_in_no_group(leave: Callable[[nn.Module], object]) -> None:
    model = adapted(groups=[QKV])
    leave(model)
    assert [layer for layer in model.modules() if siblings.group_of(layer) is not None] == []
    # What was asked for of layers that are plain again is forgotten.
    assert len(inject(model).groups) == 4
    check(model, Counts(4, 6, 0))


def test_a_layer_that_loses_its_last_adapter_leaves_its_group() -> None:
    model = two()
    fastlora.set_adapter(model, "other")
    fastlora.delete_adapter(model, "default")
    assert siblings.group_of(model.blocks[0].attn.k_proj) is None
    check(model, Counts(2, 2, 0))


def test_loading_groups_as_injecting_does(tmp_path: Path) -> None:
    fastlora.save_adapter(adapted(), tmp_path / "adapter")
    model = base()
    assert len(fastlora.load_adapter(model, tmp_path / "adapter").groups) == 4
    check(model, Counts(4, 6, 0))
    assert fastlora.load_adapter(base(), tmp_path / "adapter", groups=None).groups == ()
    # Values of an adapter that is there: what was asked for by names stays.
    assert len(fastlora.load_adapter(model, tmp_path / "adapter", groups=[QKV]).groups) == 2
    assert len(fastlora.load_adapter(model, tmp_path / "adapter", "other").groups) == 4
    assert len(fastlora.load_adapter(alone(model), tmp_path / "adapter").groups) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_alone_until_they_are_injected_into(copied: Callable[[Any], Any]) -> None:
    model = adapted()
    expected = step(model)
    other = copied(model)
    result, found = counted(other)
    assert found == ALONE
    assert_same(result, expected)
    inject(other, ["o_proj"], adapter_name="other", rank_pattern={})
    assert counted(other)[1] == counted(model)[1] == Counts(4, 6, 0)


def test_groups_are_in_nothing_that_is_saved(tmp_path: Path) -> None:
    plain, model = adapted(groups=None), adapted()
    assert counted(model)[1] == Counts(4, 6, 0)
    step(plain)
    for each in (plain, model):
        each.zero_grad()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert str(model) == str(plain)
    for (name, one), other in zip(model.named_modules(), plain.modules(), strict=True):
        assert one.__dict__.keys() == other.__dict__.keys(), name
    assert model._fastlora == plain._fastlora
    assert b"siblings" not in pickle.dumps(model)
    for name, each in (("plain", plain), ("model", model)):
        fastlora.save_adapter(each, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_compiled_code_sees_the_layers_one_by_one() -> None:
    model = adapted()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result, found = counted(compiled)
    assert found == ALONE
    assert_same({name.removeprefix("_orig_mod."): tensor for name, tensor in result.items()}, step(model))


def test_without_gradients() -> None:
    model = adapted().eval()
    other = alone(model)
    before = siblings.counts()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), other(inputs()))
    assert siblings.counts().taken - before.taken == 6
    with torch.inference_mode():
        torch.testing.assert_close(model(inputs()), other(inputs()))
    assert siblings.counts().taken - before.taken == 6


@pytest.mark.small_calls
def test_small_calls_are_alone_where_nothing_is_saved() -> None:
    check(adapted(), Counts(0, 0, 0))


def test_a_part_that_is_injected_on_its_own_has_its_own_groups() -> None:
    model = base()
    inject(model.blocks[1], groups=[("gate_proj", "up_proj")])
    check(model, Counts(1, 1, 0))
    # The whole speaks for its parts.
    assert len(inject(model, r"blocks\.0\..*_proj").groups) == 4
    check(model, Counts(4, 6, 0))


def test_nothing_is_kept_alive() -> None:
    model = adapted()
    x = inputs().requires_grad_()
    model(x).sum().backward()
    gone, moved = ref(model.blocks[0].attn.q_proj), ref(x)
    del model, x
    gc.collect()
    assert gone() is None
    assert moved() is None
