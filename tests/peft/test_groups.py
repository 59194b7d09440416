"""Siblings in PEFT models: q, k and v computed at once, each taken on proof in its own forward, or computed alone."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import siblings
from fastlora.peft import count_calls
from fastlora.peft.layer import FusedLoraLinear
from fastlora.siblings import Counts
from tests.peft.peft_models import assert_same_bits, step, tokens, wake

K, N, NKV = 24, 36, 20


class Attention(nn.Module):
    """Grouped queries: q is wider than k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, N), nn.Linear(K, NKV), nn.Linear(K, NKV, bias=False)
        self.o_proj = nn.Linear(NKV, K)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.tanh(k) * v + q[..., :NKV])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        return x + self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALONE = Counts(0, 0, 0)


def adapted(net: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(3)
    settings = {"target_modules": TARGETS, "r": 6, "lora_alpha": 10, "rank_pattern": {"k_proj": 4, "v_proj": 3}}
    model = get_peft_model(net or nn.Sequential(Block(), Block()), LoraConfig(**settings | options))
    wake(model)
    # In float64 everything that is not the same shows, whatever order sums have.
    return model.double().train()


def inputs() -> Tensor:
    return tokens(dtype=torch.float64)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def block(model: PeftModel, i: int = 0) -> Any:
    return model.base_model.model[i]


@pytest.fixture(autouse=True)
def none_open() -> Iterator[None]:
    siblings.close()
    siblings._warned.clear()
    yield
    siblings.close()


def counted(model: nn.Module, x: Tensor, **arguments: Any) -> tuple[dict[str, Tensor], Counts]:
    with count_calls() as calls:
        result = step(model, x, **arguments)
    return result, calls.groups


def check(model: PeftModel, groups: Counts, x: Tensor | None = None, patch: dict[str, Any] | None = None) -> None:
    """A step of the patched model is as good as PEFT's own, and so many groups were computed, taken and wasted."""
    x = inputs() if x is None else x
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model, **patch or {})
    result, found = counted(model, x)
    assert_same(result, step(plain, x))
    assert found == groups


def test_a_step_is_as_good_as_pefts() -> None:
    # Two blocks of q, k, v and gate, up.
    check(adapted(), Counts(4, 6, 0))


def test_groups_are_reported() -> None:
    report = fastlora.patch_peft(adapted())
    names = [
        tuple(f"base_model.model.{i}.{name}" for name in group)
        for i in range(2)
        for group in (("gate_proj", "up_proj"), tuple(f"self_attn.{name}" for name in TARGETS[:3]))
    ]
    assert sorted(report.groups) == sorted(names)
    assert report.ungrouped == {}
    assert "  4 groups: " in str(report)
    assert "*.self_attn.q_proj + base_model.model.*.self_attn.k_proj" in str(report)


def test_none_groups_nothing() -> None:
    check(adapted(), ALONE, patch={"groups": None})
    model = adapted()
    fastlora.patch_peft(model)
    assert fastlora.patch_peft(model, groups=None).groups == ()
    assert counted(model, inputs())[1] == ALONE


@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("self_attn.q_proj", "self_attn.v_proj")])
def test_groups_by_name(names: tuple[str, ...]) -> None:
    check(adapted(), Counts(2, 2, 0), patch={"groups": [names]})


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        ("q_proj", TypeError, "groups must be \"auto\", None, or tuples of names, got 'q_proj'"),
        (["q_proj", "k_proj"], TypeError, "tuples of names"),
        ([("q_proj",)], ValueError, "expected two or more names of layers under one parent"),
        (
            [("self_attn.q_proj", "mlp.up_proj")],
            ValueError,
            "('self_attn.q_proj', 'mlp.up_proj'): expected two or more",
        ),
        ([("wq", "wk")], ValueError, "that no two layers of one parent in model have: [('wq', 'wk')]; 'wk': there are"),
        (
            [("q_proj", "v_prj")],
            ValueError,
            "one parent in model have: [('q_proj', 'v_prj')]; 'v_prj': did you mean v_proj",
        ),
    ],
)
def test_groups_that_make_no_sense_are_refused_and_nothing_is_patched(
    groups: Any, error: type[Exception], words: str
) -> None:
    model = adapted()
    with pytest.raises(error) as caught:
        fastlora.patch_peft(model, groups=groups)
    assert words in str(caught.value)
    assert not any(isinstance(layer, FusedLoraLinear) for layer in model.modules())


def test_unpatched_layers_and_those_of_a_block_leave_their_groups() -> None:
    model = adapted()
    with fastlora.patched_peft(model):
        assert siblings.group_of(block(model).gate_proj) is not None
    assert siblings.group_of(block(model).gate_proj) is None
    fastlora.patch_peft(model)
    fastlora.unpatch_peft(model)
    assert siblings.group_of(block(model).gate_proj) is None
    fastlora.patch_peft(model, groups=[("gate_proj", "up_proj")])
    with fastlora.patched_peft(model):
        assert counted(model, inputs())[1] == Counts(4, 6, 0)
    assert counted(model, inputs())[1] == Counts(2, 2, 0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(dropout: float, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                y: Tensor = checkpoint(self.block, x, use_reentrant=reentrant)
                return y
            return self.block(x)

    model = adapted(Checkpointed(), lora_dropout=dropout)
    fastlora.patch_peft(model)
    result, groups = counted(model, inputs())
    assert groups == Counts(4, 6, 0)
    for module in model.modules():
        if not isinstance(module, nn.Dropout):
            module.training = False
    assert_same_bits(result, step(model, inputs()))


def test_dropout_draws_a_mask_each() -> None:
    model = adapted(lora_dropout=0.3)
    alone = copy.deepcopy(model)
    fastlora.patch_peft(model)
    fastlora.patch_peft(alone, groups=None)
    result, groups = counted(model, inputs())
    assert groups == Counts(4, 6, 0)
    assert_same(result, step(alone, inputs()))


def test_without_gradients() -> None:
    model = adapted()
    plain = copy.deepcopy(model).eval()
    fastlora.patch_peft(model.eval())
    with torch.no_grad(), count_calls() as calls:
        y = model(inputs())
        torch.testing.assert_close(y, plain(inputs()))
    assert calls.groups == Counts(4, 6, 0)
    # Nobody counts the changes of tensors there.
    with torch.inference_mode(), count_calls() as calls:
        torch.testing.assert_close(model(inputs()), y)
    assert calls.groups == ALONE


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.disable_adapter_layers(),
        lambda model: model.merge_adapter(),
    ],
    ids=["disabled", "merged"],
)
def test_where_peft_runs_itself_nothing_is_grouped(change: Callable[[Any], object]) -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    change(model.base_model if hasattr(model.base_model, "disable_adapter_layers") else model)
    change(plain.base_model if hasattr(plain.base_model, "disable_adapter_layers") else plain)
    x = inputs()
    with count_calls() as calls, torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert calls.groups == ALONE


def sibling(name: str) -> Callable[[PeftModel], Any]:
    return lambda model: getattr(block(model).self_attn, name)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_merged_sibling_computes_alone(name: str) -> None:
    model = adapted()
    sibling(name)(model).merge()
    # The other two are still a group, and so are the second block's, and gate and up.
    check(model, Counts(4, 5, 0))


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_a_sibling_with_several_adapters_computes_alone(name: str) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=[f"0.self_attn.{name}"], r=2))
    wake(model)
    sibling(name)(model).set_adapter(["default", "other"])
    model.double()
    check(model, Counts(4, 5, 0))


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_hook_on_a_sibling_fires(name: str) -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    seen = []
    for copied in (model, plain):
        sibling(name)(copied).register_forward_hook(lambda module, args, y: seen.append(module) or 2 * y)
    result, groups = counted(model, inputs())
    assert groups == Counts(4, 6, 0)
    assert seen == [sibling(name)(model)]
    assert_same(result, step(plain, inputs()))


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_hook_before_a_sibling_lets_it_compute_alone(name: str, kind: str) -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    fired = []
    hooks = {
        "forward_pre": lambda module, args: (fired.append(1), (2 * args[0],))[1],
        "full_backward": lambda module, grad_input, grad_output: fired.append(1),
        "full_backward_pre": lambda module, grad_output: fired.append(1),
    }
    for copied in (model, plain):
        getattr(sibling(name)(copied), f"register_{kind}_hook")(hooks[kind])
    result, groups = counted(model, inputs())
    assert groups == Counts(4, 5, 0)
    assert fired == [1]
    assert_same(result, step(plain, inputs()))


@pytest.mark.parametrize("part", ["lora_A", "base_layer"])
def test_a_hook_inside_a_sibling_leaves_it_to_peft(part: str) -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    for copied in (model, plain):
        inner = getattr(sibling("k_proj")(copied), part)
        (inner if part == "base_layer" else inner["default"]).register_forward_hook(lambda module, args, y: 2 * y)
    result, groups = counted(model, inputs())
    assert groups == Counts(4, 5, 0)
    assert_same(result, step(plain, inputs()))


class Between(nn.Module):
    """Siblings, with something done between their calls."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.attn = Attention()
        self.other = Attention()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = 1.0 * x
        q = self.attn.q_proj(x)
        x = self.between(self, x)
        return self.attn.k_proj(x) * self.attn.v_proj(x) + q[..., :NKV]


def in_place(net: Any, x: Tensor) -> Tensor:
    return x.mul_(2)


def another_group(net: Any, x: Tensor) -> Tensor:
    net.other(x)
    return x


def equal_but_another(net: Any, x: Tensor) -> Tensor:
    return x.clone()


def scaled(net: Any, x: Tensor) -> Tensor:
    net.attn.k_proj.scaling["default"] *= 2
    return x


def weight_changed(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.attn.k_proj.base_layer.weight.mul_(1.5)
    return x


@pytest.mark.parametrize(
    ("between", "groups"),
    [
        # k and v are left, and k leads q and v then: q is left.
        (in_place, Counts(2, 1, 3)),
        (equal_but_another, Counts(2, 1, 3)),
        (another_group, Counts(3, 3, 3)),
        # k's part is left, and all three are made again for k: v takes its part, q is left.
        (scaled, Counts(2, 1, 3)),
        (weight_changed, Counts(2, 1, 3)),
    ],
)
def test_what_happens_between_siblings_is_seen(between: Any, groups: Counts) -> None:
    model = adapted(Between(between), target_modules=["q_proj", "k_proj", "v_proj"])
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    with torch.no_grad(), count_calls() as calls:
        y = model(inputs())
        torch.testing.assert_close(y, plain(inputs()))
    assert calls.groups == groups


def test_grad_mode_and_autocast_between_siblings() -> None:
    def forward(net: Any, x: Tensor) -> tuple[Tensor, ...]:
        q = net.q_proj(x)
        with torch.no_grad():
            k = net.k_proj(x)
        with torch.autocast("cpu", torch.bfloat16):
            v = net.v_proj(x)
        return q, k, v

    model = adapted(nn.Sequential(Attention()), target_modules=["q_proj", "k_proj", "v_proj"])
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    # Autocast leaves float64 alone.
    model, plain = model.float(), plain.float()
    x = tokens().requires_grad_()
    ours, theirs = forward(block(model), x), forward(block(plain), x)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad)
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 if one.dtype is torch.bfloat16 else 1e-9)


def test_a_sibling_of_another_width_computes_alone() -> None:
    class Asymmetric(nn.Module):
        """Keys and values of a narrower input, in a parent whose name does not say so."""

        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, NKV), nn.Linear(K - 4, NKV), nn.Linear(K - 4, NKV)

        def forward(self, x: Tensor) -> Tensor:
            narrow = x[..., 4:]
            return self.q_proj(x) + torch.tanh(self.k_proj(narrow)) * self.v_proj(narrow)

    check(adapted(Asymmetric(), target_modules=TARGETS[:3]), Counts(1, 1, 0))


@pytest.mark.parametrize("kind", [torch.bfloat16, "meta"])
def test_a_sibling_of_another_dtype_or_device_computes_alone(kind: Any) -> None:
    model = adapted(nn.Sequential(Attention()), target_modules=TARGETS[:3])
    fastlora.patch_peft(model)
    block(model).k_proj.to(kind)
    with torch.no_grad(), count_calls() as calls:
        block(model).q_proj(inputs())
        block(model).v_proj(inputs())
    assert calls.groups == Counts(2, 0, 2)


@pytest.mark.parametrize("name", TARGETS[:3])
def test_errors_are_those_of_the_layer_that_is_called(name: str) -> None:
    model = adapted(nn.Sequential(Attention()), target_modules=TARGETS[:3])
    fastlora.patch_peft(model)
    with pytest.raises(RuntimeError, match=rf"^x has shape \[5, {K - 1}\]: expected "):
        getattr(block(model), name)(inputs()[0, :5, 1:])


def test_weights_of_inference_mode_are_in_no_group() -> None:
    with torch.inference_mode():
        model = adapted(nn.Sequential(Attention()), target_modules=TARGETS[:3])
    fastlora.patch_peft(model)
    with torch.no_grad(), count_calls() as calls:
        model(inputs())
    assert calls.groups == ALONE


def test_an_output_of_inference_mode_is_not_taken_outside_of_it() -> None:
    model = adapted(nn.Sequential(Attention()), target_modules=TARGETS[:3])
    fastlora.patch_peft(model)
    x = inputs()
    with torch.inference_mode():
        assert block(model).q_proj(x).is_inference()
    with torch.no_grad():
        assert not block(model).k_proj(x).is_inference()


def test_threads_take_their_own_outputs() -> None:
    model = adapted(nn.Sequential(Attention()), target_modules=TARGETS[:3])
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    barriers = [threading.Barrier(2) for _ in range(3)]
    found: dict[int, list[Tensor]] = {1: [], 2: []}

    def work(seed: int) -> None:
        x = tokens(dtype=torch.float64, seed=seed)
        for name, barrier in zip(TARGETS, barriers, strict=False):
            barrier.wait(10)
            found[seed].append(getattr(block(model), name)(x))

    before = siblings.counts()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counts(*(now - then for now, then in zip(siblings.counts(), before, strict=True))) == Counts(2, 4, 0)
    for seed, ys in found.items():
        for name, y in zip(TARGETS, ys, strict=False):
            torch.testing.assert_close(y, getattr(block(plain), name)(tokens(dtype=torch.float64, seed=seed)))


@pytest.mark.parametrize("early_stop", [False, True])
def test_a_leader_outside_of_a_checkpoint_and_siblings_inside(early_stop: bool) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def inside(self, x: Tensor) -> Tensor:
            return torch.tanh(self.attn.k_proj(x)) * self.attn.v_proj(x)

        def forward(self, x: Tensor) -> Tensor:
            q = self.attn.q_proj(x)
            with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
                kv: Tensor = checkpoint(self.inside, x, use_reentrant=False)
            return kv + q[..., :NKV]

    model = adapted(Mixed(), target_modules=["q_proj", "k_proj", "v_proj"])
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    assert_same(step(model, inputs()), step(plain, inputs()))


def test_work_that_nobody_takes_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attn.q_proj(x)[..., :NKV] + self.attn.k_proj(x + 1) * self.attn.v_proj(x + 2)

    model = adapted(Cross(), target_modules=["q_proj", "k_proj", "v_proj"])
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    with caplog.at_level(logging.WARNING, logger="fastlora"):
        for _ in range(2):
            result, groups = counted(model, inputs())
    assert groups == Counts(3, 0, 6)
    assert caplog.text.count("were computed with their siblings and not taken") == 1
    assert "k_proj and v_proj of a Attention" in caplog.text
    assert_same(result, step(plain, inputs()))


def test_what_a_model_that_is_gone_left_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    fastlora.patch_peft(model)
    block(model).self_attn.q_proj(inputs())
    del model
    gc.collect()
    with caplog.at_level(logging.WARNING, logger="fastlora"):
        siblings.close()
    assert caplog.text == ""


def test_cross_attention_is_in_no_group_unless_it_is_named() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder_attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder_attn(x)

    model = adapted(Decoder())
    report = fastlora.patch_peft(model)
    assert report.groups == ()
    assert set(report.ungrouped.values()) == {"the parent is cross attention by its name: pass groups=[...] to insist"}
    assert "3 in no group: the parent is cross attention" in str(report)
    assert len(fastlora.patch_peft(model, groups=[("q_proj", "k_proj", "v_proj")]).groups) == 1


def test_a_sibling_without_an_adapter_is_reported() -> None:
    model = adapted(target_modules=["q_proj", "v_proj", "gate_proj"])
    report = fastlora.patch_peft(model)
    assert [len(group) for group in report.groups] == [2, 2]
    assert set(report.ungrouped.values()) == {"it does not run on fastlora"}
    assert {name.rpartition(".")[2] for name in report.ungrouped} == {"k_proj", "up_proj"}
    plain = copy.deepcopy(model)
    fastlora.unpatch_peft(plain)
    result, groups = counted(model, inputs())
    assert groups == Counts(2, 2, 0)
    assert_same(result, step(plain, inputs()))


def test_siblings_without_any_adapter_are_not_reported_unless_they_are_named() -> None:
    model = adapted(target_modules=TARGETS[:3])
    assert fastlora.patch_peft(model).ungrouped == {}
    report = fastlora.patch_peft(model, groups=[("gate_proj", "up_proj")])
    assert report.groups == ()
    assert {name.rpartition(".")[2] for name in report.ungrouped} == {"gate_proj", "up_proj"}


def test_compiled_code_sees_the_layers_one_by_one() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    with count_calls() as calls:
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(inputs())
    assert calls.groups == ALONE
    torch.testing.assert_close(y, plain(inputs()))


def test_compiled_code_does_not_depend_on_the_groups_of_other_models() -> None:
    model, graphs = adapted(), []
    fastlora.patch_peft(model)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        y = compiled(inputs())
        fastlora.patch_peft(adapted())
        gc.collect()
        other = adapted()
        fastlora.patch_peft(other)
        assert torch.equal(compiled(inputs()), y)
    assert len(graphs) == 1


def test_copies_and_pickles_compute_alone() -> None:
    model = adapted()
    fastlora.patch_peft(model)
    expected = step(model, inputs())
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        result, groups = counted(made, inputs())
        assert groups == ALONE
        assert_same(result, expected)
    assert counted(model, inputs())[1] == Counts(4, 6, 0)


def test_a_layer_that_moved_computes_alone() -> None:
    model = adapted()
    fastlora.patch_peft(model)
    attention = block(model).self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    assert counted(model, inputs())[1] == Counts(4, 6, 0)
    attention.k_proj = nn.Linear(K, NKV, dtype=torch.float64)
    assert counted(model, inputs())[1] == Counts(4, 5, 0)


def test_nothing_is_kept_alive_by_a_group() -> None:
    model = adapted()
    fastlora.patch_peft(model)
    x = inputs().requires_grad_()
    model(x).sum().backward()
    assert siblings._here.opened is None
    gone, moved = ref(block(model).self_attn), ref(x)
    del model, x
    gc.collect()
    assert gone() is None
    assert moved() is None


@pytest.mark.small_calls
def test_small_calls_are_alone_where_nothing_is_saved() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    result, groups = counted(model, inputs())
    assert groups == ALONE
    assert_same(result, step(plain, inputs()))


def test_accumulation_and_a_second_backward() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    for each in (model, plain):
        each.zero_grad()
        for seed in (1, 2):
            y = each(tokens(dtype=torch.float64, seed=seed)).sum()
            y.backward(retain_graph=True)
            y.backward()
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_a_sibling_whose_forward_was_replaced_computes_alone(name: str) -> None:
    """As accelerate's hooks do, which load weights in it."""
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model)
    for each in (model, plain):
        layer = sibling(name)(each)
        layer.forward = lambda x, own=layer.forward: 2 * own(x)
    result, groups = counted(model, inputs())
    # Its siblings are still a group, and it leads none.
    assert groups == Counts(4, 5, 0)
    assert_same(result, step(plain, inputs()))


def test_replicas_of_data_parallel_compute_alone() -> None:
    """They share everything of a layer but the place in its parent."""
    model = adapted()
    fastlora.patch_peft(model)
    attention = block(model).self_attn
    replica = attention._replicate_for_data_parallel()
    replica._modules = {name: child._replicate_for_data_parallel() for name, child in attention._modules.items()}
    for name, child in replica._modules.items():
        for key, parameter in attention._modules[name]._parameters.items():
            child._parameters[key] = parameter
    x = inputs()
    with count_calls() as calls:
        found = replica(x)
    assert calls.groups == ALONE
    torch.testing.assert_close(found, attention(x))
