"""The benchmarks: rows, the gate, failures, order, names and the report. Times are never asserted."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise, permutations
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import FLOOR, GROUPS, LAYERS, MLPS, MODES, PROFILES, VARIANTS, Case, Layer, branches_of
from benchmarks.layers import arms as layers_arms
from benchmarks.layers import case as layers_case
from benchmarks.layers import command as layers
from benchmarks.layers.arm import KERNELS, LayerArm, forcing
from benchmarks.layers.arms import HOST_ARMS, arms
from benchmarks.layers.gate import Gate
from benchmarks.layers.operands import make_operands
from benchmarks.layers.table import render_case
from benchmarks.layers.work import kept_bytes, peak_bytes, prepare
from benchmarks.measure import contest, failures, runner
from benchmarks.measure.failures import failures_into
from benchmarks.records import environment
from benchmarks.records.files import read
from benchmarks.records.rows import STATUSES, LayerRow, Spread
from benchmarks.records.tables import WIDTH
from benchmarks.records.units import geometric_mean
from benchmarks.records.verdict import duels
from fastlora.clock import Clock, shuffled
from fastlora.ops import mlp as ops_mlp

pytestmark = pytest.mark.usefixtures("no_interpreter")

CPU = torch.device("cpu")
# Of no fewer elements: the largest error of a few hundred is no yardstick.
GROUP = "768x512+256+128"
TINY = ["--layer", "host", "--tokens", "24", "--rank", "4", "--rounds", "2"]


def contestants(*names):
    known = arms()
    return [known[name] for name in names]


def run_tiny(arms, modes=MODES, dropout=0.0, dtype="fp32", rounds=1, layer="gpt2.proj"):
    case = Case(layer, 24, 4, dtype, dropout)
    return layers_case.run_case(case, arms, modes, rounds, 60.0, Clock(CPU), CPU)


def broken(name, **changes):
    """An arm that builds plain LoRA and then breaks it."""

    def build(case, operands, p):
        return replace(contestants("plain")[0].build(case, operands, p), **changes)

    return LayerArm(name, "broken", build)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The rows of one small run through the command line: both dtypes, with and without dropout."""
    path = tmp_path_factory.mktemp("results") / "cpu" / "layers-quick.jsonl"
    assert main([*TINY, "--dtype", "fp32", "bf16", "--dropout", "0", "0.1", "--json", str(path)]) == 0
    return path


def test_every_arm_has_a_row_in_every_mode_and_case(published):
    header, rows = read(published).environment, read(published).rows
    names = list(arms())
    assert {(row.dtype, row.dropout, row.arm, row.mode) for row in rows} == {
        (dtype, p, name, mode) for dtype in ("fp32", "bf16") for p in (0.0, 0.1) for name in names for mode in MODES
    }
    assert header["device"] == "cpu"
    assert header["packages"]["torch"] == torch.__version__
    for row in rows:
        assert row.status in STATUSES
        assert (row.m, row.k, row.n, row.r, row.bias) == (24, 64, 64, 4, False)
        if row.status != "ok":
            assert row.reason
            assert row.wall_ms is None
            assert row.ratio is None
            continue
        assert row.wall_ms.p20 <= row.wall_ms.p50 <= row.wall_ms.p80
        assert row.device_ms is None
        assert row.ratio > 0
        assert row.noise >= 0
        assert contest.MIN_ROUNDS <= row.rounds <= 2 * layers_case.HOST_ROUNDS
        assert row.kept_bytes >= 0
        assert row.peak_bytes > 0
        for numbers in row.errors.values():
            assert numbers["rms"] <= numbers["rms_bound"]
            assert numbers["max"] <= numbers["max_bound"]
    assert all(row.ratio == 1 for row in rows if row.arm == FLOOR)


def test_lora_rows_check_all_four_tensors_and_dropout_where_the_mask_is_known(published):
    rows = read(published).rows
    for row in rows:
        if (row.arm.startswith("fastlora") or row.arm in HOST_ARMS) and row.status == "ok":
            assert set(row.errors) == {"y", "dx", "da", "db"}
            assert row.gate_dropout == row.dropout
        elif row.status == "ok":
            assert row.gate_dropout == 0
    assert {row.kernel for row in rows if row.arm == "fastlora"} == {"library"}


def test_absent_rows_say_why(published):
    rows = read(published).rows
    absent = {(row.arm, row.dtype, row.dropout): row.reason for row in rows if row.status == "absent"}
    assert absent["addmm", "fp32", 0.1] == "takes no dropout"
    assert absent["peft-fp32", "fp32", 0.0] == "the base is float32 already"


def test_absent_arms_are_said_once_before_the_cases(tmp_path, capsys):
    options = ["--dtype", "fp32", "bf16", "--dropout", "0", "0.1", "--json", str(tmp_path / "rows.jsonl")]
    assert main([*TINY, *options, "--arm", "peft-fp32", "addmm", "fastlora-triton-serial", "fastlora-cuda-z_jobs"]) == 0
    out = capsys.readouterr().out
    opening, *cases, closing = out.split("\n\n")
    (absent,) = [line for line in opening.splitlines() if line.startswith("absent: ")]
    assert all(name in absent for name in ("fastlora-triton-serial", "fastlora-cuda-z_jobs", "(needs a CUDA GPU)"))
    assert len(cases) == 4
    assert "absent" not in "".join(cases)
    for line in ("peft-fp32 (the base is float32 already)", "addmm (takes no dropout)"):
        assert out.count(line) == closing.count(f"absent from some cases: {line}") == 1


def test_absent_peft_is_listed_as_absent(monkeypatch):
    monkeypatch.setattr(failures.importlib.util, "find_spec", lambda name: None)
    rows = run_tiny(contestants(FLOOR, "peft-same"), modes=["forward"])
    assert [(row.status, row.reason) for row in rows] == [("ok", None), ("absent", "peft is not installed")]


def test_a_wrong_arm_gets_no_speed():
    def doubled_update(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)
        return replace(built, layer=lambda x: 1.01 * built.layer(x))

    rows = run_tiny([*contestants(FLOOR), LayerArm("wrong", "1 % too large", doubled_update)])
    wrong = [row for row in rows if row.arm == "wrong"]
    assert [row.status for row in wrong] == ["wrong"] * 3
    assert all(row.ms is None and row.ratio is None and row.rounds is None for row in wrong)
    assert all(name in wrong[0].reason for name in ("y: rms error", "dx: rms error", "bound"))
    assert "wrong: y: rms error" in render_case(rows)


@pytest.mark.parametrize("m", [1, 4])
def test_at_a_few_tokens_every_arm_is_held_to_more(m):
    """At one token da and dx hang on R sums alone, where the baseline may be exact by chance."""
    case = Case("host", m, 8, "fp32", 0.0)
    gate = Gate(case, make_operands(case, CPU))
    for arm in contestants("plain", "addmm", "fastlora"):
        assert all(errors.ok for errors in gate.check(arm).values()), arm.name


def spoil_gradient(spoil):
    def build(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)
        built.trained["db"].register_hook(spoil)
        return built

    return build


def spoil_output(spoil):
    def build(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)
        return replace(built, layer=lambda x: spoil(built.layer(x)))

    return build


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("where", [spoil_output, spoil_gradient], ids=["output", "gradient"])
@pytest.mark.parametrize(
    ("factor", "found"), [(0.0, ("rms error", "all zero")), (torch.nan, ("is nan", "not finite"))], ids=["zero", "nan"]
)
def test_what_is_zero_or_not_finite_gets_no_speed(factor, found, where, dropout):
    """The gate sees it without dropout, and what the gate cannot see is seen in the layer itself."""

    def build(case, operands, p):
        return (where(lambda tensor: factor * tensor) if p == dropout else contestants("plain")[0].build)(
            case, operands, p
        )

    rows = run_tiny([*contestants(FLOOR), LayerArm("spoilt", "at one dropout alone", build)], ["step"], dropout=dropout)
    assert (rows[1].status, rows[1].ms, rows[1].rounds) == ("wrong", None, None)
    assert any(words in rows[1].reason for words in found)
    assert ("db: " if where is spoil_gradient else "y: ") in rows[1].reason


def test_a_gradient_that_never_arrives_is_wrong():
    def detached(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)
        return replace(built, trained={**built.trained, "db": built.trained["db"].detach().clone().requires_grad_()})

    rows = run_tiny([*contestants(FLOOR), LayerArm("detached", "db is another tensor", detached)], modes=["step"])
    assert (rows[1].status, rows[1].reason) == ("wrong", "db: no gradient arrived")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "oom"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "oom"),
        (ZeroDivisionError("no luck"), "error"),
    ],
)
def test_an_arm_that_raises_is_a_row_and_the_others_go_on(error, status):
    def fail(x):
        raise error

    rows = run_tiny([*contestants(FLOOR), broken("fails", layer=fail), *contestants("plain")], modes=["step"])
    assert [row.status for row in rows] == ["ok", status, "ok"]
    assert rows[1].reason.startswith(type(error).__name__)


def test_an_arm_that_raises_inside_the_clock_is_a_row():
    calls = []

    def build(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)

        def layer(x):
            calls.append(1)
            if len(calls) > 5:
                raise ValueError("late")
            return built.layer(x)

        return replace(built, layer=layer)

    rows = run_tiny([*contestants(FLOOR), LayerArm("late", "fails on its sixth call", build)], ["step"], rounds=3)
    assert [row.status for row in rows] == ["ok", "error"]
    assert rows[1].ms is None


def test_operands_out_of_memory_fail_every_row(monkeypatch):
    def out_of_memory(case, device):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(layers_case, "make_operands", out_of_memory)
    assert [row.status for row in run_tiny(contestants(FLOOR, "plain"), ["step"])] == ["oom", "oom"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fastlora_keeps_the_rank_r_middle_alone(dtype):
    case = Case("gpt2.proj", 40, 8, dtype, 0.0)
    operands = make_operands(case, CPU)
    for arm in contestants("fastlora", "fastlora-library", "addmm"):
        with arm.turn():
            built = arm.build(case, operands, 0.0)
            assert kept_bytes(built, operands) == 40 * 8 * operands.w.itemsize
    floor = contestants(FLOOR)[0].build(case, operands, 0.0)
    assert kept_bytes(floor, operands) == 0


def test_a_group_is_the_layers_of_one_input():
    for name, parts in GROUPS.items():
        assert branches_of(name) == parts
        assert {LAYERS[layer].k for layer in parts} == {LAYERS[parts[0]].k}
    case = Case("llama3-8b.qkv", 256, 16, "bf16", 0.0)
    assert [(of.layer, of.k, of.n, of.m) for of in case.branches] == [
        ("llama3-8b.q", 4096, 4096, 256),
        ("llama3-8b.kv", 4096, 1024, 256),
        ("llama3-8b.kv", 4096, 1024, 256),
    ]
    assert (case.k, case.n, case.bias, case.weights) == (4096, 6144, False, 4096 * 6144)
    assert str(case) == "llama3-8b.qkv  M=256 K=4096 N=4096+1024+1024 R=16 bf16"
    assert [of.layer for of in case._replace(layer="64x32+16").branches] == ["64x32", "64x16"]
    alone = case._replace(layer="gpt2.attn")
    assert alone.branches == (alone,)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_name_may_end_in_a_variant(variant):
    case = Case(f"llama3-8b.qkv{variant}", 256, 16, "bf16", 0.0)
    plain = case._replace(layer="llama3-8b.qkv")
    assert [of.layer for of in case.branches] == [f"{name}{variant}" for name in GROUPS["llama3-8b.qkv"]]
    assert (case.k, case.n, case.weights, case.theory("step")) == (
        plain.k,
        plain.n,
        plain.weights,
        plain.theory("step"),
    )
    assert branches_of(f"64x32+16{variant}") == (f"64x32{variant}", f"64x16{variant}")
    assert (case.quantised, case.is_dora, case.is_plain) == (
        variant[1:] if variant != ":dora" else None,
        variant == ":dora",
        False,
    )
    assert (plain.quantised, plain.is_dora, plain.is_plain) == (None, False, True)


@pytest.mark.parametrize("name", ["llama3-8b.q:nf5", "llama3-8b.q:", ":nf4"])
def test_an_unknown_variant_is_told_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown layer .*:nf4 or :int8 or :dora"):
        branches_of(name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("layer", ["128x96:nf4", "128x96:int8", "128x96:dora", "128x96+64:nf4"])
def test_every_arm_of_a_variant_is_right_or_absent(layer, dropout, dtype):
    pytest.importorskip("bitsandbytes")
    rows = run_tiny(list(arms().values()), ["step"], dropout, layer=layer, dtype=dtype)
    assert {row.status for row in rows} == {"ok", "absent"}, [(row.arm, row.reason) for row in rows]
    ran = {row.arm: row for row in rows if row.status == "ok"}
    expected = {FLOOR, "plain", "peft-same", "patched", "fastlora"}
    expected |= {"peft-fp32", "fastlora-fp32"} if dtype == "bf16" else set()
    expected |= {"fastlora-lora"} if "dora" in layer else {"fastlora-alone"} if "+" in layer else set()
    assert set(ran) == expected - ({"plain"} if "dora" in layer and dropout else set())
    checked = {"y", "dx", "da", "db"} | ({"dm"} if "dora" in layer else set())
    for arm in ("fastlora", "peft-same"):
        assert {name.rstrip("01") for name in ran[arm].errors} == checked
    if dtype == "fp32":  # rows of z in 16 bits are padded to 16 bytes
        assert ran["fastlora"].kept_bytes <= ran["peft-same"].kept_bytes


def test_theory_of_a_group_is_that_of_its_layers_together():
    case = Case("64x48+16", 256, 8, "bf16", 0.0)
    base, low_rank = 64 * (48 + 16), 8 * (64 + 48) + 8 * (64 + 16)
    assert case.theory("forward") == 1 + low_rank / base
    assert case.theory("backward") == 1 + 2 * low_rank / base


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_result_of_a_group_is_checked(dropout):
    rows = run_tiny(contestants(FLOOR, "plain", "full", "fastlora", "fastlora-alone"), ["step"], dropout, layer=GROUP)
    errors = {row.arm: set(row.errors) for row in rows}
    of_each = {
        name: {"dx", *(f"{kind}{i}" for kind in kinds for i in range(3))}
        for name, kinds in {FLOOR: ["y"], "full": ["y", "dw"], "plain": ["y", "da", "db"]}.items()
    }
    assert errors == of_each | dict.fromkeys(["fastlora", "fastlora-alone"], of_each["plain"])
    assert [(row.status, row.reason) for row in rows] == [("ok", None)] * 5
    assert {row.gate_dropout for row in rows[-2:]} == {dropout}
    assert (rows[0].k, rows[0].n, rows[0].ratio) == (768, 896, 1)


def test_a_group_with_one_wrong_layer_gets_no_speed():
    def build(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)

        def layer(x):
            first, second, third = built.layer(x)
            return first, 1.01 * second, third

        return replace(built, layer=layer)

    wrong = run_tiny([*contestants(FLOOR), LayerArm("wrong", "the second is", build)], ["step"], layer=GROUP)[1]
    assert (wrong.status, wrong.ms) == ("wrong", None)
    assert all(f"{name}: rms error" in wrong.reason for name in ("y1", "dx", "da1", "db1"))
    assert not any(name in wrong.reason for name in ("y0", "da2"))


def test_fastlora_runs_a_group_together_and_its_layers_alone(monkeypatch):
    together, group = [], layers_arms.fastlora.lora_linear_group

    def spy(x, weights, *rest, **options):
        together.append(len(weights))
        return group(x, weights, *rest, **options)

    monkeypatch.setattr(layers_arms.fastlora, "lora_linear_group", spy)
    case = Case(GROUP, 24, 4, "fp32", 0.0)
    operands = make_operands(case, CPU)
    for name, expected in {"fastlora": [3], "fastlora-library": [3], "fastlora-alone": []}.items():
        (arm,) = contestants(name)
        with arm.turn():
            prepare("step", arm.build(case, operands, 0.0), operands, 0)()
        assert together == expected, name
        together.clear()
    (row,) = run_tiny(contestants("fastlora-alone"), ["step"])
    assert (row.status, row.reason) == ("absent", "a layer by itself: the same as fastlora's")


def test_a_group_keeps_the_middles_of_its_layers_alone():
    case = Case("768x768+256", 400, 8, "bf16", 0.0)
    operands = make_operands(case, CPU)
    for arm in contestants("fastlora", "fastlora-alone", "addmm"):
        assert kept_bytes(arm.build(case, operands, 0.0), operands) == 2 * 400 * 8 * 2, arm.name
    assert kept_bytes(contestants(FLOOR)[0].build(case, operands, 0.0), operands) == 0


@pytest.fixture
def mlp(monkeypatch):
    """The name of a small MLP with biases."""
    sizes = {"tiny.gate": Layer(384, 512, True), "tiny.down": Layer(512, 256, True)}
    for name, layer in sizes.items():
        monkeypatch.setitem(LAYERS, name, layer)
    monkeypatch.setitem(MLPS, "tiny.mlp", ("tiny.gate", "tiny.gate", "tiny.down"))
    return "tiny.mlp"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_arm_of_an_mlp_is_right_or_absent(mlp, dtype, dropout, monkeypatch):
    # Few tokens run layer by layer.
    monkeypatch.setattr(ops_mlp, "_SMALL", 0)
    chosen = [arm for name, arm in arms().items() if not arm.by_name_only and "compiled" not in name]
    rows = {row.arm: row for row in run_tiny(chosen, ["step"], dropout, dtype, layer=mlp)}
    assert {row.status for row in rows.values()} == {"ok", "absent"}, [
        f"{row.arm}: {row.reason}" for row in rows.values() if row.status == "wrong"
    ]
    lora = {"y", "dx", *(f"{kind}{i}" for kind in ("da", "db") for i in range(3))}
    full = {"y", "dx", *(f"{kind}{i}" for kind in ("dw", "dbias") for i in range(3))}
    assert set(rows[FLOOR].errors) == {"y", "dx"}
    assert set(rows["full"].errors) == full
    for name in ("plain", "peft-same", "fastlora", "fastlora-alone", "fastlora-library"):
        assert set(rows[name].errors) == lora
    assert rows["fastlora"].gate_dropout == rows["fastlora-alone"].gate_dropout == dropout


def test_an_mlp_is_gate_up_and_down(mlp, monkeypatch):
    for name, (gate, up, down) in MLPS.items():
        assert branches_of(name) == (gate, up, down)
        assert LAYERS[gate] == LAYERS[up]
        assert LAYERS[gate].n == LAYERS[down].k
    case = Case(mlp, 40, 8, "fp32", 0.0)
    assert case.theory("forward") == 1 + 8 * (2 * (384 + 512) + 512 + 256) / (2 * 384 * 512 + 512 * 256)
    operands = make_operands(case, CPU)
    assert [dy.shape for dy in operands.dys] == 3 * [(40, 256)]
    # Few tokens run layer by layer.
    monkeypatch.setattr(ops_mlp, "_SMALL", 0)
    (ours,) = contestants("fastlora")
    assert kept_bytes(ours.build(case, operands, 0.0), operands) == 4 * (40 * 512 * 2 + 3 * 40 * 8)
    # silu keeps g, the product silu(g) and u, down h; the layers their middles.
    (plain,) = contestants("plain")
    assert kept_bytes(plain.build(case, operands, 0.0), operands) == 4 * (40 * 512 * 4 + 3 * 40 * 8)


@pytest.mark.parametrize("wrong", ["da0", "db2"])
def test_an_mlp_with_a_wrong_gradient_gets_no_speed(mlp, wrong):
    def build(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)
        built.trained[wrong].register_hook(lambda gradient: 1.01 * gradient)
        return built

    row = run_tiny([*contestants(FLOOR), LayerArm("wrong", "one gradient is", build)], ["step"], layer=mlp)[1]
    assert (row.status, row.ms) == ("wrong", None)
    assert row.reason.startswith(f"{wrong}: rms error")


def test_fastlora_stores_no_mask_and_plain_lora_does():
    case = Case("gpt2.proj", 40, 8, "fp32", 0.1)
    operands = make_operands(case, CPU)
    ours, plain = (arm.build(case, operands, 0.1) for arm in contestants("fastlora", "plain"))
    seed_bytes = 16
    assert kept_bytes(ours, operands) == 40 * 8 * 4 + seed_bytes
    assert kept_bytes(plain, operands) > 40 * 768 * 4


def test_peak_of_the_floor_is_y_and_dx():
    case = Case("gpt2.attn", 40, 8, "fp32", 0.0)
    operands = make_operands(case, CPU)
    floor = contestants(FLOOR)[0].build(case, operands, 0.0)
    assert peak_bytes(floor, operands) == 4 * 40 * (768 + 2304)


def test_arms_take_turns_in_ever_other_order():
    orders = [shuffled("abcde", turn) for turn in range(200)]
    assert all(sorted(order) == list("abcde") for order in orders)
    assert orders == [shuffled("abcde", turn) for turn in range(200)]
    assert {order[0] for order in orders} == set("abcde")
    assert {pair for order in orders for pair in pairwise(order)} == set(permutations("abcde", 2))


def test_rounds_are_interleaved(monkeypatch):
    order = []
    sample = contest.Subject.sample

    def spy(subject, *rest):
        order.append(subject.row.arm)
        sample(subject, *rest)

    monkeypatch.setattr(contest.Subject, "sample", spy)
    run_tiny(contestants(FLOOR, "plain", "addmm"), ["forward"], rounds=2)
    # A warm-up and two rounds.
    assert len(order) == 12
    for round_ in (order[:4], order[4:8], order[8:]):
        assert sorted(round_) == sorted([FLOOR, FLOOR, "plain", "addmm"])


def test_no_call_finds_its_input_where_the_last_one_left_it(monkeypatch):
    copies, prepare = [], layers_case.prepare

    def spy(mode, built, operands, call):
        copies.append(call % len(operands.xs))
        return prepare(mode, built, operands, call)

    monkeypatch.setattr(layers_case, "prepare", spy)
    run_tiny(contestants(FLOOR, "plain"), ["step"], rounds=3)
    assert len(copies) > 9
    assert all(one != two for one, two in pairwise(copies))


def test_a_lost_gpu_ends_the_run_and_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    path, run_case = tmp_path / "rows.jsonl", layers.run_case

    def lost(case, *rest):
        if case.dtype == "bf16":
            with failures_into([LayerRow.of(case, "plain", "step")]):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return run_case(case, *rest)

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(layers, "run_case", lost)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert main([*SHORT, "--json", str(path)]) == 1
    message = capsys.readouterr().err
    assert "the GPU is lost to this process after plain: RuntimeError: CUDA error: an illegal memory access" in message
    assert "--resume" in message
    assert {row.dtype for row in read(path).rows} == {"fp32"}


def test_host_sized_cases_compare_wall_time():
    times = {"wall_ms": Spread(0.2, 0.2, 0.2), "device_ms": Spread(0.01, 0.01, 0.01)}
    rows = [replace(LayerRow.of(Case(name, 1, 8, "bf16", 0.0), "fastlora", "step"), **times) for name in LAYERS]
    assert {row.ms.p50 for row in rows if row.case.is_host} == {0.2}
    assert {row.ms.p50 for row in rows if not row.case.is_host} == {0.01}


def test_wall_time_stands_beside_the_device_s():
    both = [timed(FLOOR, 2.0, device_ms=Spread(1.5, 1.5, 1.5)), timed("addmm", 2.5, device_ms=Spread(1.5, 1.6, 1.7))]
    head, floor, addmm = (line.split() for line in render_case(both).splitlines()[1:4])
    assert head[:5] == ["step", "ms", "×", "wall", "ms"]
    assert floor[:5] == [FLOOR, "1.500", "±0%", "1.00", "2.000"]
    assert addmm[:5] == ["addmm", "1.600", "±6%", "1.25", "2.500"]
    assert "wall" not in render_case([timed(FLOOR, 2.0)])


def test_an_arm_by_name_only_is_listed_and_told_how(published):
    rows = [row for row in read(published).rows if row.arm == "unsloth"]
    assert {(row.status, row.reason) for row in rows} == {
        ("absent", "takes part only where it is named: --arm unsloth")
    }


def test_a_mode_stops_at_its_time_but_not_before_the_least_rounds():
    case = Case("host", 4, 4, "fp32", 0.0)
    rows = layers_case.run_case(case, contestants(FLOOR), ["forward"], 1000, 0.0, Clock(CPU), CPU)
    assert rows[0].rounds == contest.MIN_ROUNDS


@pytest.mark.parametrize(("layer", "expected"), [("host", 0), ("gpt2.proj", 3)])
def test_a_host_sized_case_is_not_timed_on_the_device(layer, expected, monkeypatch):
    """Its table has the wall time alone, and every sample on the device would wait for its hold."""
    timed = []

    class OnADevice(Clock):
        def device(self, work, hold):
            timed.append(work())
            return 1.0

    monkeypatch.setattr(layers_case, "HOST_ROUNDS", 1)
    case = Case(layer, 24, 4, "fp32", 0.0)
    rows = layers_case.run_case(case, contestants(FLOOR), ["forward"], 3, 60.0, OnADevice(CPU), CPU)
    # The floor runs twice a round.
    assert len(timed) == 2 * expected
    assert (rows[0].device_ms is not None) == (expected > 0)


def test_each_kernel_is_forced_by_its_own_variables():
    assert forcing("triton-serial") == {"FASTLORA_BACKEND": "triton-serial"}
    assert forcing(None) == {"FASTLORA_BACKEND": "auto"}
    assert {name for name, arm in arms().items() if arm.kernel} == {f"fastlora-{kernel}" for kernel in KERNELS}


def test_a_turn_forces_the_kernel_and_restores_the_variable(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    with contestants("fastlora-library")[0].turn():
        assert os.environ["FASTLORA_BACKEND"] == "library"
    assert os.environ["FASTLORA_BACKEND"] == "reference"
    monkeypatch.delenv("FASTLORA_BACKEND")
    with contestants("fastlora")[0].turn():
        assert os.environ["FASTLORA_BACKEND"] == "auto"
    assert "FASTLORA_BACKEND" not in os.environ


@pytest.mark.parametrize("option", ["--layer", "--arm", "--profile", "--mode", "--dtype"])
def test_unknown_names_list_the_known_ones(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main([option, "nonsense"])
    assert stop.value.code == 2
    known = {"--layer": (*LAYERS, *GROUPS, *MLPS), "--arm": arms(), "--profile": PROFILES["cpu"], "--mode": MODES}
    message = capsys.readouterr().err
    assert all(name in message for name in known.get(option, ("bf16", "fp16", "fp32")))


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["--layer", "roberta"], "roberta-base.query or roberta-base.fc or roberta-large.query"),
        (["--dtype", "bfloat16"], "bf16"),
        (["--arm", "peft"], "peft-fp32 or peft-same"),
        (["--profile", "smal"], "small"),
        (["model", "--model", "gpt2-tinny"], "gpt2-tiny"),
        (["paper", "--claim", "check-point"], "checkpoint"),
        (["predict", "--device", "H20"], "h200"),
    ],
)
def test_a_mistyped_name_is_told_the_nearest(arguments, near, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"did you mean {near}" in capsys.readouterr().err


def test_without_arguments_there_is_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(f"    {name} " in said for name in ("layers", "model", "paper", "predict", "compare", "report"))


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "some"])
def test_a_dropout_that_is_none_is_told_what_was_expected(value, capsys):
    with pytest.raises(SystemExit):
        main([f"--dropout={value}"])
    assert f"--dropout: expected a number of at least 0 and below 1, got '{value}'" in capsys.readouterr().err


def test_a_path_that_cannot_be_written_is_named_with_the_remedy(tmp_path, capsys):
    assert main([*TINY, "--json", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be written: Is a directory; --json PATH names another" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_run_without_gpu_offers_the_cpu_one(capsys):
    assert main(["--device", "cuda"]) == 2
    message = capsys.readouterr().err
    assert "no CUDA device" in message
    assert "--device cpu" in message


def test_publish_refuses_a_part_of_a_profile(capsys):
    assert main(["--publish", *TINY]) == 2
    assert "whole profile" in capsys.readouterr().err


def test_publish_copies_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "LOCAL", tmp_path / "local")
    quick = PROFILES["cpu"]["quick"]
    tiny = replace(quick, rounds=1, sweeps=[{**quick.sweeps[0], "layer": ["host"]}])
    monkeypatch.setitem(layers.PROFILES["cpu"], "quick", tiny)
    monkeypatch.setattr(layers_case, "HOST_ROUNDS", 1)
    assert main(["--device", "cpu", "--publish"]) == 0
    written = tmp_path / environment.slug(CPU) / "layers-quick.jsonl"
    assert written.read_bytes() == (tmp_path / "local" / "cpu" / "layers-quick.jsonl").read_bytes()


def test_a_narrowed_run_has_a_file_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "LOCAL", tmp_path)
    whole = tmp_path / "cpu" / "layers-quick.jsonl"
    whole.parent.mkdir()
    whole.write_text("the whole profile")
    short = ["--device", "cpu", *TINY, "--dtype", "fp32", "--dropout", "0", "--arm", "plain", "--mode"]
    for mode in ("forward", "step", "step"):
        assert main([*short, mode]) == 0
    parts = sorted(path.name for path in whole.parent.glob("layers-quick-part-*.jsonl*"))
    assert len(parts) == 3
    assert [name.removesuffix(".previous") in parts for name in parts] == [True] * 3
    assert whole.read_text() == "the whole profile"
    assert f"are in {tmp_path}" in capsys.readouterr().err


SHORT = [*TINY, "--dtype", "fp32", "bf16", "--dropout", "0", "--arm", "plain", "--mode", "step"]


def interrupt_at(monkeypatch, dtype):
    """Ctrl-C in the first case of this dtype; returns the cases that ran."""
    run_case, ran = layers.run_case, []

    def interrupted(case, *rest):
        if case.dtype == dtype:
            raise KeyboardInterrupt
        ran.append(case)
        return run_case(case, *rest)

    monkeypatch.setattr(layers, "run_case", interrupted)
    return ran


def test_an_interrupted_run_keeps_finished_cases_and_is_resumed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "bf16")
        assert main([*SHORT, "--json", str(path)]) == 130
    assert "1 of 2 cases are in" in capsys.readouterr().err
    before = read(path)
    assert not before.complete
    assert [row.arm for row in before.rows] == [FLOOR, "plain"]
    ran = interrupt_at(monkeypatch, "none")
    assert main([*SHORT, "--json", str(path), "--resume"]) == 0
    assert [case.dtype for case in ran] == ["bf16"]
    after = read(path)
    assert after.complete
    assert after.rows[:2] == before.rows
    assert [(row.dtype, row.arm) for row in after.rows] == [
        (dtype, name) for dtype in ("fp32", "bf16") for name in (FLOOR, "plain")
    ]


def test_an_interruption_outside_the_cases_is_no_traceback(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(layers.plots, "save", interrupted)
    assert main([*SHORT, "--json", str(path)]) == 130
    assert capsys.readouterr().err.endswith("\ninterrupted\n")
    assert read(path).complete


def test_a_wrong_row_makes_the_run_fail(tmp_path, monkeypatch):
    def wrong(*args):
        return [replace(LayerRow.of(Case("host", 1, 1, "fp32", 0.0), "plain", "step"), status="wrong", reason="y")]

    monkeypatch.setattr(layers, "run_case", wrong)
    assert main([*TINY, "--json", str(tmp_path / "rows.jsonl")]) == 1


def test_list_names_everything(capsys):
    assert main(["layers", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*PROFILES["cpu"], *LAYERS, *GROUPS, *MLPS, *arms()))


@pytest.mark.parametrize("command", ["layers", "model", "compare"])
def test_the_former_name_of_the_option_is_not_shown(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--arm" in text
    assert "provider" not in text


def test_the_former_option_selects(tmp_path):
    path = tmp_path / "rows.jsonl"
    options = ["--dtype", "fp32", "--dropout", "0", "--mode", "step", "--provider", "plain", "--json", str(path)]
    assert main([*TINY, *options]) == 0
    assert [row.arm for row in read(path).rows] == [FLOOR, "plain"]


def test_percentiles_and_geometric_mean():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Spread(2.0, 3.5, 5.0)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def timed(arm, p50, **changes):
    row = LayerRow.of(Case("gpt2.attn", 256, 8, "bf16", 0.0), arm, "step")
    return replace(row, wall_ms=Spread(p50, p50, p50), ratio=p50 / 2, **changes)


def test_speedups_are_peft_over_fastlora():
    rows = [timed(FLOOR, 2.0), timed("peft-same", 6.0), timed("fastlora", 3.0)]
    assert [duel.gain for duel in duels(rows, "fastlora", "peft-same")] == [2.0]
    assert duels(rows, "fastlora", "peft-fp32") == []


def test_every_line_of_the_table_fits_the_screen():
    case, sizes = (
        Case("llama3.2-1b.gate", 131072, 128, "bf16", 0.05),
        {"kept_bytes": 1023 << 20, "peak_bytes": 1023 << 30},
    )
    spread = Spread(1e3, 12345.6, 5e4)
    rows = [
        replace(
            LayerRow.of(case, name, mode),
            wall_ms=spread,
            device_ms=spread,
            ratio=10.25,
            noise=0.0123,
            kernel=kernel,
            **sizes,
        )
        for name, arm in arms().items()
        for mode in MODES
        for kernel in [(arm.kernel or "triton-serial+triton-portable") if name.startswith("fastlora") else None]
    ]
    for row in rows[-3:]:
        row.fail("error", "RuntimeError: " + "something went wrong; " * 10)
    lines = render_case(rows).splitlines()
    assert len(lines) > len(arms())
    assert max(map(len, lines)) <= WIDTH == 120
    assert "triton-serial+triton-portable (fastlora, fastlora-alone, fastlora-fp32, fastlora-lora)" in " ".join(
        "\n".join(lines).split()
    )


def test_device_slug(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert environment.slug(SimpleNamespace(type="cuda")) == "nvidia-h200"
    assert environment.slug(CPU) == "cpu"
