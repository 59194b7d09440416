"""The eager path: the same as the operators' whatever changes between two calls of a layer, and few Python calls."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import loralib, siblings
from fastlora.backends import dispatch
from fastlora.ops import autograd, linear
from tests.cases import gradient_of
from tests.ops.test_properties import HELD, LEADS

pytest.importorskip("peft")

from peft import LoraConfig
from peft.tuners import lora

from fastlora.peft import layer as peft_layer

K, N = 24, 20
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def lora_linear_layer(p: float, r: int) -> nn.Module:
    return fastlora.LoRALinear(K, N, r=r, lora_alpha=10, lora_dropout=p)


def injected(p: float, r: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(K, N))
    fastlora.inject(model, ["0"], r=r, lora_alpha=10, lora_dropout=p)
    return model[0]


def from_loralib(p: float, r: int) -> nn.Module:
    return loralib.Linear(K, N, r=r, lora_alpha=10, lora_dropout=p, merge_weights=False)


def patched(p: float, r: int) -> nn.Module:
    base = nn.Linear(K, N).requires_grad_(False)
    config = LoraConfig(r=r, lora_alpha=10, lora_dropout=p)
    layer = lora.Linear(base, "default", config=config, r=r, lora_alpha=10, lora_dropout=p)
    fastlora.patch_peft(nn.ModuleList([layer]))
    return layer


LAYERS: dict[str, Callable[[float, int], nn.Module]] = {
    "LoRALinear": lora_linear_layer,
    "injected": injected,
    "loralib": from_loralib,
    "patched": patched,
}


class Look(TorchDispatchMode):
    """Changes nothing, but sees every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def slow_path() -> Iterator[None]:
    """Every call is checked and proven anew, asks which kernel runs, and goes through torch's dispatcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_environment", {dispatch._NAME: None})
        for module in (autograd, linear, peft_layer):
            patch.setattr(module, "is_eager", lambda: False)
        yield


class Call(NamedTuple):
    """What one call of a layer meets."""

    lead: tuple[int, ...]
    hold: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    x_dtype: torch.dtype
    autocast: torch.dtype | None
    autocast_backward: bool
    grad: str
    trained: frozenset[str]
    training: bool
    kernel: str | None
    look_forward: bool
    look_backward: bool
    scale: float
    state: str
    seed: int


DTYPES = [(FP32, FP32), (FP64, FP64), (BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, BF16)]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    dtype, adapter_dtype = draw(st.sampled_from(DTYPES))
    return Call(
        lead=draw(LEADS),
        hold=draw(HELD),
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        x_dtype=draw(st.sampled_from([dtype, dtype, dtype, dtype, FP32])),
        autocast=draw(st.sampled_from([None, None, None, BF16, FP16])),
        autocast_backward=draw(st.booleans()),
        grad=draw(st.sampled_from(["enabled", "enabled", "disabled", "inference"])),
        trained=draw(
            st.sampled_from([frozenset("xab"), frozenset("ab"), frozenset("b"), frozenset("xabw"), frozenset()])
        ),
        training=draw(st.booleans()),
        kernel=draw(st.sampled_from([None, None, "auto", "library", "reference", "nonsense"])),
        look_forward=draw(st.sampled_from([False, False, True])),
        look_backward=draw(st.sampled_from([False, False, True])),
        scale=draw(st.sampled_from([1.0, 1.7, 2])),
        state=draw(st.sampled_from(["", "", "", "merged", "disabled", "hooked"])),
        seed=draw(st.integers(0, 2**31)),
    )


def adapters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The layer's parameters as x, w, a, b, bias name them."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in layer.named_parameters():
        found["a" if "lora_A" in name else "b" if "lora_B" in name else "bias" if "bias" in name else "w"] = parameter
    return found


def set_scale(layer: Any, scale: float) -> None:
    if isinstance(layer, peft_layer.FusedLoraLinear):
        layer.scaling["default"] = scale
    elif isinstance(layer, fastlora.LoRALinear):
        layer.lora_alpha = scale * layer.r
    elif isinstance(layer, loralib.Linear):
        layer.scaling = scale
    else:
        layer.scale["default"] = scale


@contextmanager
def in_state(layer: Any, state: str) -> Iterator[None]:
    """The layer merged, disabled or with a hook that doubles what its base layer gives, as far as it knows these."""
    with ExitStack() as stack:
        is_patched = isinstance(layer, peft_layer.FusedLoraLinear)
        if state == "merged":
            layer.merge()
            stack.callback(layer.unmerge)
        elif state == "disabled" and is_patched:
            layer.enable_adapters(False)
            stack.callback(layer.enable_adapters, True)
        elif state == "hooked" and is_patched:
            handle = layer.base_layer.register_forward_hook(lambda module, inputs, y: 2 * y)
            stack.callback(handle.remove)
        yield


def outcome(layer: nn.Module, call: Call) -> dict[str, Any]:
    """y and all gradients, or the error; and whether a mode saw the operators."""
    torch.manual_seed(call.seed)
    x = call.hold(torch.randn(*call.lead, K).to(call.x_dtype))
    look_forward, look_backward = Look(), Look()
    result: dict[str, Any] = {}
    try:
        with ExitStack() as stack:
            if call.grad != "enabled":
                stack.enter_context(torch.no_grad() if call.grad == "disabled" else torch.inference_mode())
            x = x.detach().requires_grad_("x" in call.trained and call.grad == "enabled")
            if call.autocast is not None:
                stack.enter_context(torch.autocast("cpu", dtype=call.autocast))
            if call.look_forward:
                stack.enter_context(look_forward)
            y = layer(x)
        result["y"] = y
        if y.requires_grad:
            dy = gradient_of(y)
            with ExitStack() as stack:
                stack.enter_context(torch.autocast("cpu", dtype=call.autocast or BF16, enabled=call.autocast_backward))
                if call.look_backward:
                    stack.enter_context(look_backward)
                y.backward(dy)
            result |= {name: parameter.grad for name, parameter in adapters(layer).items()} | {"x": x.grad}
    except (TypeError, RuntimeError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    if call.look_forward:  # what was made before a mode began may be plain nodes
        result["seen"] = {name for look in (look_forward, look_backward) for name in look.seen if "fastlora" in name}
    return result


def assert_same(fast: Tensor, slow: Tensor, call: Call, name: str) -> None:
    """The same bits, or for a small call, which other operators make, what rounding may change."""
    assert fast.dtype is slow.dtype
    if fast.equal(slow):
        return
    dtypes = [call.dtype, call.adapter_dtype, fast.dtype]
    # In a backward under autocast torch's own nodes are cast, as F.linear's are.
    dtypes += [call.autocast or BF16] if call.autocast_backward else []
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    assert (fast - slow).abs().max() <= 8 * eps * slow.abs().max(), (name, call)


@pytest.mark.small_calls
@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=100)
@given(made=st.data())
def test_any_change_between_two_calls_is_seen(kind: str, made: st.DataObject) -> None:
    layer = LAYERS[kind](made.draw(st.sampled_from([0.0, 0.3])), made.draw(st.sampled_from([6, 8])))
    named = adapters(layer)
    nn.init.normal_(named["b"])
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    for call in made.draw(st.lists(calls(), min_size=3, max_size=10)):
        for name, parameter in named.items():
            parameter.data = start[name].to(call.adapter_dtype if name in ("a", "b") else call.dtype)
            parameter.requires_grad_(name in call.trained)
            parameter.grad = None
        layer.train(call.training)
        set_scale(layer, call.scale)
        with pytest.MonkeyPatch.context() as environment, in_state(layer, call.state):
            if call.kernel is None:
                environment.delenv("FASTLORA_BACKEND", raising=False)
            else:
                environment.setenv("FASTLORA_BACKEND", call.kernel)
            fast = outcome(layer, call)
            for parameter in named.values():
                parameter.grad = None
            with slow_path():
                slow = outcome(layer, call)
        assert fast.keys() == slow.keys()
        for name, value in fast.items():
            if isinstance(value, Tensor):
                assert_same(value, slow[name], call, name)
            else:
                assert value == slow[name], (name, call)


PACKAGE = str(Path(fastlora.__file__).parent) + os.sep


def package_calls(work: Callable[[], object]) -> int:
    """How many Python functions of the package a second run calls."""
    work()
    count = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


# What the host pays for, in figures that no machine changes; without the eager path a step made 44, 44, 45 and 55.
# An injected layer's operands are a call of their own, for its siblings to ask. float32 adapters beside a bfloat16 base
# cost one more, to ask whether their products stay float32, and dropout draws a seed and makes its factors.
@pytest.mark.small_calls
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16_fp32_adapters"])
@pytest.mark.parametrize(
    ("kind", "calls"), [("LoRALinear", 9), ("injected", 11), ("loralib", 14), ("patched", 8)], ids=LAYERS
)
def test_python_calls_of_a_step(
    kind: str, calls: int, dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LAYERS[kind](p, 8)
    for name, parameter in adapters(layer).items():
        parameter.data = parameter.data.to(FP32 if name in ("a", "b") else dtype)
    # As in a process in which no layers are grouped.
    monkeypatch.setattr(siblings, "formed", False)
    x = torch.randn(3, K, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, N, dtype=dtype)

    def without_gradients() -> None:
        with torch.no_grad():
            layer(x)

    calls += (dtype is not FP32) + (3 if p else 0)
    assert package_calls(without_gradients) <= calls
    assert package_calls(lambda: torch.autograd.grad(layer(x), x, dy)) <= calls
