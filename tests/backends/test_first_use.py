"""The check at first use: what passes, what fails and how that is said, and when nothing may be checked."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastlora.backends import dispatch, first_use, library, masks, swiglu, triton, triton_skinny
from fastlora.backends.dropout import Dropout
from fastlora.backends.first_use_checks import Gated, GroupVariant, Variant
from fastlora.backends.request import Product, Request
from fastlora.kernels import (
    group_grad,
    group_middle,
    group_update,
    middle,
    middle_and_grad,
    philox,
    rank_grad,
    rank_update,
    tiles,
)
from fastlora.kernels import swiglu as swiglu_kernel
from fastlora.kernels.launch import Launch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FP16, FP32 = torch.float16, torch.float32
REQUEST = Request("lora_matmul", GPU, FP16, FP32, 64, 64, 64, 8, False)
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


def variant(r: int = 16, dropout: bool = True, dtype: torch.dtype = FP16, adapter_dtype: torch.dtype = FP16) -> Variant:
    return Variant(CPU, dtype, adapter_dtype, r, dropout, "ieee")


@ON_CPU
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no_dropout"])
@pytest.mark.parametrize(("r", "dtype", "adapter_dtype"), [(8, FP16, FP32), (40, FP16, FP16), (16, FP32, FP32)])
def test_the_kernels_pass(r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool) -> None:
    before = torch.get_rng_state()
    assert list(first_use.faults(variant(r, dropout, dtype, adapter_dtype))) == []
    assert torch.equal(torch.get_rng_state(), before)


def broken(module: Any, of: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Changes arguments of the first launch that a launcher makes."""
    launcher = getattr(module, of)

    def changed(*args: Any, **kwargs: Any) -> Any:
        made = launcher(*args, **kwargs)
        *rest, steps = made if isinstance(made, tuple) and not isinstance(made, Launch) else (made,)
        alone = isinstance(steps, Launch)
        first, *others = [steps] if alone else steps
        first = first._replace(arguments=first.arguments | changes)
        steps = first if alone else [first, *others]
        return (*rest, steps) if rest else steps

    monkeypatch.setattr(module, of, changed)


@ON_CPU
@pytest.mark.parametrize(
    ("module", "of", "changes", "named"),
    [
        (middle, "launches", {"scale": 1.01}, "middle: rms error"),
        (middle, "launches", {"K": 1000}, "middle: rms error"),
        (rank_update, "launch", {"bias_ptr": None}, "rank_update: rms error"),
        (rank_update, "launch", {"N": 319}, "rank_update: rms error|rank_update: is"),
        (middle_and_grad, "launches", {"tokens_per_split": 192}, "middle_and_grad, t: is nan"),
        (rank_grad, "launches", {"rescale": 1.0}, "rank_grad, da: rms error"),
        (philox, "launch", {"threshold": 0}, "keep_mask: .* bits are wrong"),
    ],
)
def test_a_wrong_kernel_is_named_with_its_figures(
    module: Any, of: str, changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(module, of, monkeypatch, **changes)
    assert (fault := next(first_use.faults(variant()), None)) is not None
    assert re.match(named, fault), fault


def group_variant(*ranks: int, dropout: bool = True, adapter_dtype: torch.dtype = FP16) -> GroupVariant:
    return GroupVariant(CPU, FP16, adapter_dtype, ranks, dropout, "ieee")


@ON_CPU
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no_dropout"])
@pytest.mark.parametrize(("ranks", "adapter_dtype"), [((16, 16, 16), FP16), ((8, 12), FP32)], ids=str)
def test_the_launches_of_a_group_pass(ranks: tuple[int, ...], adapter_dtype: torch.dtype, dropout: bool) -> None:
    found = first_use.group_faults(group_variant(*ranks, dropout=dropout, adapter_dtype=adapter_dtype))
    assert list(found) == []


@ON_CPU
@pytest.mark.parametrize(
    ("module", "of", "changes", "named"),
    [
        (group_middle, "launches", {"factor_1": 1.0}, "group, y of branch 1: rms error"),
        (group_middle, "launches", {"begin_1": 0}, "group, y of branch"),
        (group_update, "launch", {"count": 1}, "group, dx: rms error"),
        (group_update, "launch", {"threshold_1": 0}, "group, dx: "),
        (group_grad, "launches", {"rank_1": 8}, "group, da of branch 1: is nan"),
        (rank_update, "launch", {"N": 263}, "group, y of branch 0: is"),
    ],
)
def test_a_wrong_launch_of_a_group_is_named(
    module: Any, of: str, changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(module, of, monkeypatch, **changes)
    assert (fault := next(first_use.group_faults(group_variant(16, 16)), None)) is not None
    assert re.match(named, fault), fault


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """The variants that are checked from now on; all pass."""
    made: list[Variant] = []

    def passes(variant: Variant) -> Iterator[str]:
        made.append(variant)
        return iter(())

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(first_use, "faults", passes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return made


def chosen(request: Request = REQUEST) -> str:
    return dispatch._choose(request, "auto").name


def test_auto_takes_what_passed_and_checks_once(checks: list[Variant]) -> None:
    assert [chosen(), chosen(), chosen(REQUEST._replace(m=128))] == ["triton-skinny"] * 3
    assert len(checks) == 1
    assert chosen(REQUEST._replace(verb="rank_grad")) == "triton"
    assert len(checks) == 1
    assert chosen(REQUEST._replace(dropout=True)) == "triton-skinny"
    assert [v.dropout for v in checks] == [False, True]


def fails(variant: Variant) -> Iterator[str]:
    yield "middle: rms error 0.3 (bound 0.001)"


def raises(variant: Variant) -> Iterator[str]:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("check", "why"),
    [
        (fails, "middle: rms error 0.3 (bound 0.001)"),
        (raises, "RuntimeError: Failed to find C compiler. Please specify via CC"),
    ],
)
def test_a_failure_is_said_once_and_the_library_runs(
    check: Any, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert chosen(REQUEST._replace(r=4)) == "triton-skinny"
    monkeypatch.setattr(first_use, "faults", check)
    with caplog.at_level(logging.WARNING, "fastlora"):
        names = [chosen(), chosen(REQUEST._replace(dropout=True)), chosen(REQUEST._replace(verb="rank_grad"))]
    assert names == ["library"] * 3
    assert chosen(REQUEST._replace(r=4)) == "library"
    (record,) = caplog.records
    line = record.getMessage()
    assert line.count("\n") == 0
    assert line.startswith(
        "Triton's skinny kernels: failed its check at first use on cuda:0 (float16 with float32 adapters, rank 8, "
        f"without dropout): {why}; library runs in its place"
    )
    assert why in str(dispatch._explain(REQUEST, "auto"))


def test_nothing_is_checked_while_a_graph_is_captured(checks: list[Variant], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen() == "library"
    assert "triton-skinny    not yet checked" in str(dispatch._explain(REQUEST, "auto"))
    assert checks == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert chosen() == "triton-skinny"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen() == "triton-skinny"


def test_nothing_is_checked_while_code_is_traced(checks: list[Variant], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as traced:
        traced.setattr(torch.compiler, "is_compiling", lambda: True)
        assert chosen() == "library"
    with torch._subclasses.FakeTensorMode():
        assert chosen() == "library"
    assert checks == []
    assert chosen() == "triton-skinny"


@pytest.mark.usefixtures("checks")
def test_too_little_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(variant: Variant) -> Iterator[str]:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as crowded:
        crowded.setattr(first_use, "faults", full)
        assert chosen() == "library"
    assert chosen() == "triton-skinny"


def test_the_check_can_be_skipped(checks: list[Variant], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CHECK", "0")
    assert chosen() == "triton-skinny"
    assert checks == []
    assert "can run: not checked, as FASTLORA_CHECK=0 asks" in str(dispatch._explain(REQUEST, "auto"))


def test_a_forced_kernel_is_not_checked(checks: list[Variant]) -> None:
    assert dispatch._choose(REQUEST, "triton-skinny").name == "triton-skinny"
    assert "can run: not yet checked at first use" in str(dispatch._explain(REQUEST, "triton-skinny"))
    assert checks == []
    assert "can run: passed its check at first use" in str(dispatch._explain(REQUEST, "auto"))


def group_of(*ranks: int, adapter_dtypes: tuple[torch.dtype, ...] = (FP32,) * 9) -> list[Product]:
    """On a stand-in for a GPU's tensors."""
    x, w = torch.empty(64, 64, dtype=FP16, device="meta"), torch.empty(72, 64, dtype=FP16, device="meta")
    adapters = [
        (torch.empty(r, 64, dtype=dtype, device="meta"), torch.empty(72, r, dtype=dtype, device="meta"))
        for r, dtype in zip(ranks, adapter_dtypes, strict=False)
    ]
    return [Product(x, w, a, b, 1.7) for a, b in adapters]


@pytest.fixture
def group_checks(checks: list[Variant], monkeypatch: pytest.MonkeyPatch) -> list[GroupVariant]:
    """The same for groups, whose requests are taken for those of a GPU."""
    made: list[GroupVariant] = []

    def passes(variant: GroupVariant) -> Iterator[str]:
        made.append(variant)
        return iter(())

    of = Request.of_lora_matmul
    monkeypatch.setattr(first_use, "group_faults", passes)
    monkeypatch.setattr(Request, "of_lora_matmul", staticmethod(lambda p: of(p)._replace(device=GPU)))
    monkeypatch.setattr(triton, "capability_of", lambda device: 90)
    return made


def test_branches_go_together_once_their_launches_passed(
    checks: list[Variant], group_checks: list[GroupVariant], monkeypatch: pytest.MonkeyPatch
) -> None:
    skinny = triton_skinny.LORA_MATMUL[0].together
    with monkeypatch.context() as capturing:
        assert chosen(Request.of_lora_matmul(group_of(8)[0])) == "triton-skinny"
        capturing.setattr(torch.cuda, "is_initialized", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert dispatch._together(group_of(8, 8)) is None
    assert group_checks == []
    for _ in range(2):
        assert dispatch._together(group_of(8, 16)) is skinny
    assert [v.ranks for v in group_checks] == [(8, 16)]
    assert dispatch._together(group_of(8)) is skinny
    assert dispatch._together(group_of(8, 8, 8, 8, 8, 8)) is skinny
    assert dispatch._together(group_of(8, 8, 4, adapter_dtypes=(FP32, FP16, FP16))) is skinny
    assert [v.ranks for v in group_checks] == [(8, 16), (8, 8, 8, 8), (8, 8), (8, 4)]
    assert {v.r for v in checks} == {4, 8, 16}


@pytest.mark.usefixtures("group_checks")
def test_branches_whose_launches_fail_run_on_the_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(first_use, "group_faults", fails)
    with monkeypatch.context() as forced:
        forced.setenv("FASTLORA_BACKEND", "triton-skinny")
        assert dispatch._together(group_of(8, 16)) is triton_skinny.LORA_MATMUL[0].together
    with caplog.at_level(logging.WARNING, "fastlora"):
        assert dispatch._together(group_of(8, 16)) is None
    (record,) = caplog.records
    assert "(float16 with float32 adapters, ranks 8, 16 together, without dropout): middle: rms" in record.getMessage()
    assert chosen(Request.of_lora_matmul(group_of(8)[0])) == "library"
    assert dispatch._together(group_of(8, 16)) is library.LORA_MATMUL[0].together


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx1100"])
def test_on_amd_gpus_the_check_alone_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(triton, "capability_of", lambda device: tiles.amd_capability(name))
    assert chosen() == "triton-skinny"
    assert dispatch._choose(REQUEST, "triton-portable").name == "triton-portable"
    assert f"is not proven on {name.partition(':')[0]} in" in str(dispatch._explain(REQUEST, "auto"))
    assert first_use.objection_to_masks(CPU) is None
    first_use.forget()
    dispatch.forget()
    monkeypatch.setattr(first_use, "faults", fails)
    assert chosen() == "library"


@pytest.mark.parametrize(("hip", "stages"), [(None, [3, 1]), ("7.0", [2, 1])])
def test_on_amd_gpus_an_operand_has_one_buffer(
    hip: str | None, stages: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compile gate takes the same launches."""
    monkeypatch.setattr(torch.version, "hip", hip)
    ran: list[int] = []
    monkeypatch.setattr(Launch, "run", lambda launch: ran.append(launch.options["num_stages"]))
    triton.run_all([Launch(None, (1,), {}, {"num_stages": n}) for n in (3, 1)])
    assert ran == stages


@pytest.mark.usefixtures("checks")
def test_old_gpus_run_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(triton, "capability_of", lambda device: 75)
    assert chosen() == "library"
    assert "sm_75: the kernels need sm_80 or newer" in str(first_use.objection_to_masks(GPU))


@ON_CPU
def test_masks_come_from_the_kernel_once_it_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU's tensor: the meta device holds no bits, and none are asked for."""
    dropout, made = Dropout(0.3, torch.tensor([1, 2])), []

    def noted(dropout: Dropout, first_row: int, rows: int, columns: int) -> torch.Tensor:
        made.append((first_row, rows, columns))
        return torch.empty(rows, columns, dtype=torch.int16, device="meta")

    monkeypatch.setattr(masks, "keep_bits", noted)
    x = torch.empty(70, 1 << 18, device="meta")
    assert list(first_use.mask_faults(CPU)) == []
    monkeypatch.setattr(first_use, "mask_faults", lambda device: iter(()))
    chunks = list(dropout.chunks(x))
    for rows in chunks:
        masks.kept(dropout, x[rows], rows.start)
    assert [(rows.start, rows.stop - rows.start, 1 << 18) for rows in chunks] == made
    assert len(made) == 2
    monkeypatch.setattr(first_use, "mask_faults", fails)
    first_use.forget()
    assert "torch operators" not in str(first_use.objection_to_masks(CPU))
    monkeypatch.setattr(Dropout, "bits", lambda *_: torch.empty(4, 8, dtype=torch.int16, device="meta"))
    masks.kept(dropout, torch.empty(4, 8, device="meta"))
    assert len(made) == 2


SILU = Gated(GPU, FP16, "silu")


@ON_CPU
@pytest.mark.parametrize(
    ("of", "changes", "named"),
    [
        ("forward_launch", {"SIZE": 65 * 1040 - 1}, "silu, h: is nan"),
        ("forward_launch", {"ACTIVATION": "gelu"}, "silu, h: rms error"),
        ("backward_launch", {"ACTIVATION": "gelu"}, "silu, h of the backward: rms error"),
        ("backward_launch", {"SIZE": 65 * 1040 - 1}, "silu, h of the backward: is nan"),
    ],
)
def test_a_wrong_activation_is_named_with_its_figures(
    of: str, changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(swiglu_kernel, of, monkeypatch, **changes)
    assert str(next(first_use.swiglu_faults(SILU._replace(device=CPU)), None)).startswith(named)


@pytest.mark.usefixtures("checks")
def test_an_activation_fails_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(gated: Gated) -> Iterator[str]:
        if gated.activation == "silu":
            yield "silu, dg: rms error 0.3 (bound 0.001)"

    monkeypatch.setattr(first_use, "swiglu_faults", wrong)
    with caplog.at_level(logging.WARNING, "fastlora"):
        why = [first_use.objection_to_swiglu(SILU) for _ in range(2)]
    assert (
        why == ["failed its check at first use on cuda:0 (silu in float16): silu, dg: rms error 0.3 (bound 0.001)"] * 2
    )
    (record,) = caplog.records
    assert record.getMessage() == f"Triton's gated activation: {why[0]}; torch operators make it"
    assert first_use.objection_to_swiglu(SILU._replace(activation="gelu")) is None
    assert chosen() == "triton-skinny"
    assert "float64" in str(first_use.objection_to_swiglu(SILU._replace(dtype=torch.float64)))


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("backend", "by_kernel"),
    [("auto", True), ("triton-skinny", True), ("library", False), ("reference", False), ("-triton", False)],
)
def test_when_the_activation_is_the_kernels(backend: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, as a stand-in for a GPU's tensors: what is launched is nothing."""
    made: list[str] = []
    monkeypatch.setattr(first_use, "swiglu_faults", lambda gated: iter(()))
    monkeypatch.setattr(swiglu, "launch_forward", lambda g, u, activation, overwrite: made.append("forward"))
    monkeypatch.setattr(swiglu, "launch_backward", lambda g, u, dh, activation, with_h: made.append("backward"))
    monkeypatch.setenv("FASTLORA_BACKEND", backend)
    g, u, dh = torch.empty(3, 5, 8, device="meta", dtype=FP16)
    swiglu.forward(g, u, "silu")
    swiglu.backward(g, u, dh, "silu", with_h=True)
    assert made == (["forward", "backward"] if by_kernel else [])
    with torch._subclasses.FakeTensorMode():
        swiglu.forward(*torch.empty(2, 5, 8, device="meta"), "silu")
    swiglu.forward(g[:0], u[:0], "silu")
    swiglu.forward(torch.ones(1, 8), torch.ones(1, 8), "silu")
    assert len(made) == 2 * by_kernel
