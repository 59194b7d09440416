"""The model benchmark: arms, gate, bytes, sweeps until memory ends, and the command line. Times are never asserted."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import __main__ as command_line
from benchmarks.cases import ModelCase
from benchmarks.layers.arm import KERNELS
from benchmarks.measure import failures
from benchmarks.measure.contest import MIN_ROUNDS
from benchmarks.model import architectures
from benchmarks.model import case as model_case
from benchmarks.model import command as model
from benchmarks.model import training as training_step
from benchmarks.model.architectures import ARCHITECTURES, Architecture, architecture_named, build, parameter_count
from benchmarks.model.arms import FULL, ModelArm, arms
from benchmarks.model.case import run_case
from benchmarks.model.command import MODEL_PROFILES
from benchmarks.model.gate import ModelGate
from benchmarks.model.table import render_case, render_summary
from benchmarks.model.training import Training, keep_imports
from benchmarks.records import styles
from benchmarks.records.files import read
from benchmarks.records.rows import ModelRow, Spread, from_json
from benchmarks.records.tables import WIDTH, quotients
from fastlora.clock import Clock
from fastlora.ops import mlp as ops_mlp
from fastlora.siblings import counts, group_of

CPU = torch.device("cpu")
ON_CPU = [name for name, arm in arms().items() if arm.kernel in (None, "library")]
ON_GPU = [f"fastlora-{kernel}" for kernel in KERNELS if kernel != "library"]
LORA = [name for name in ON_CPU if name != FULL]

# Small enough that building, checking and timing an arm takes a tenth of a second.
WIDTHS = {"hidden_size": 64, "num_attention_heads": 4}
MICRO = {
    "llama": Architecture("", "llama", 2, 96, {**WIDTHS, "intermediate_size": 96, "num_key_value_heads": 2}),
    "gpt2": Architecture("", "gpt2", 2, 96, {**WIDTHS, "n_positions": 64}, longest=64),
    "roberta": Architecture("", "roberta", 2, 96, {**WIDTHS, "intermediate_size": 96}, longest=64),
}
# in_features + out_features of every adapted layer.
ADAPTED = {
    "llama": 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96)),
    "gpt2": 2 * ((64 + 192) + (64 + 64) + 2 * (64 + 256)),
    "roberta": 2 * (4 * (64 + 64) + 2 * (64 + 96)),
}


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    keep_imports(["llama-tiny", "gpt2-tiny", "roberta-tiny"])
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def micro_models(monkeypatch):
    for kind, architecture in MICRO.items():
        monkeypatch.setitem(ARCHITECTURES, f"{kind}-micro", architecture)
    monkeypatch.setitem(command_line.COMMANDS, "model", model)


def micro(kind="llama", batch=2, sequence=16, r=4, dtype="fp32", dropout=0.0, checkpointing=False):
    return ModelCase(f"{kind}-micro", batch, sequence, r, dtype, dropout, checkpointing)


def run_micro(contestants, case=None, earlier=(), rounds=1, gate=None):
    known = arms()
    chosen = [known[arm] if isinstance(arm, str) else arm for arm in contestants]
    return run_case(case or micro(), chosen, earlier, gate or ModelGate(CPU), rounds, 60.0, Clock(CPU), CPU)


def main(path, *options):
    argv = ["model", "--device", "cpu", "--rank", "4", "--dtype", "fp32", "--dropout", "0", "--rounds", "1"]
    return command_line.main([*argv, "--json", str(path), *options])


def training(name, case):
    return Training(case, arms()[name], CPU)


@pytest.mark.parametrize(
    ("name", "dtype", "checkpointing"),
    [
        ("llama-tiny", "fp32", False),
        ("gpt2-tiny", "fp32", False),
        ("roberta-tiny", "fp32", False),
        ("llama-tiny", "bf16", True),
    ],
)
def test_every_arm_passes_the_gate(name, dtype, checkpointing):
    case, gate = ModelCase(name, 2, 64, 8, dtype, 0.1, checkpointing), ModelGate(CPU)
    passed = {}
    for arm in arms().values():
        if arm.refuses(case, CPU) is None:
            errors = gate.check(arm, case)
            assert all(e.ok for e in errors.values()), (arm.name, errors)
            passed[arm.name] = list(errors)
    wide = {"peft-fp32", "fastlora-fp32"} if dtype == "bf16" else set()
    assert passed.keys() == {*ON_CPU} - {"peft-fp32", "fastlora-fp32"} | wide
    assert passed.pop(FULL) == ["logits", "dw"]
    assert all(kinds == ["logits", "da", "db"] for kinds in passed.values())


def spoilt(name, spoil):
    """An arm that adapts as the named one does, and is then spoilt."""

    def adapt(base, architecture, case):
        subject = arms()[name].adapt(base, architecture, case)
        spoil(subject)
        return subject

    return ModelArm("spoilt", "", adapt)


def scale_a_gradient(subject):
    a, _ = subject.adapters["model.layers.1.mlp.up_proj"]
    a.register_hook(lambda gradient: 1.01 * gradient)


def ignore_adapters(subject):
    subject.model.disable_adapter_layers()


def lose_an_adapter(subject):
    subject.adapters.pop("model.layers.0.self_attn.k_proj")


def detach_a(subject):
    for a, _ in subject.adapters.values():
        a.requires_grad_(False)


def overflow(subject):
    subject.adapters["model.layers.0.self_attn.k_proj"][1].register_hook(lambda gradient: gradient / 0)


@pytest.mark.parametrize(
    ("arm", "found"),
    [
        (spoilt("fastlora", scale_a_gradient), "da: rms error"),
        (spoilt("peft-same", ignore_adapters), "logits: rms error"),
        (spoilt("peft-same", lose_an_adapter), "no gradient arrived at model.layers.0.self_attn.k_proj"),
        (spoilt("fastlora", detach_a), "no gradient arrived"),
        (spoilt("fastlora", overflow), "db: is "),
    ],
    ids=["scaled", "ignored", "lost", "detached", "infinite"],
)
def test_a_broken_arm_is_wrong_and_has_no_speed(arm, found):
    broken, sound = run_micro([arm, "fastlora"])
    assert (broken.status, sound.status) == ("wrong", "ok")
    assert found in broken.reason
    assert broken.step_ms is broken.tokens_per_second is broken.peak_bytes is None
    assert broken.errors
    assert sound.step_ms is not None


def test_what_breaks_at_full_size_alone_is_wrong(monkeypatch):
    monkeypatch.setattr(Training, "broken", lambda self: "the gradient of b is zero")
    assert [(row.status, row.reason) for row in run_micro(["fastlora"])] == [("wrong", "the gradient of b is zero")]


def test_a_step_without_gradients_is_noticed():
    subject = training("fastlora", micro())
    assert subject.broken() is None
    a, _ = next(iter(subject.subject.adapters.values()))
    a.grad.zero_()
    assert "is zero" in subject.broken()
    a.grad.fill_(torch.nan)
    assert "is not finite" in subject.broken()
    a.grad = None
    assert "no gradient arrived" in subject.broken()


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "fp32"), ("gpt2", "bf16"), ("roberta", "fp32")])
def test_bytes_and_parameters_are_exact(kind, dtype):
    case = micro(kind, dtype=dtype)
    rows = {row.arm: row for row in run_micro(arms(), case) if row.status == "ok"}
    assert rows.keys() == set(ON_CPU) - ({"peft-fp32", "fastlora-fp32"} if dtype == "fp32" else set())
    base = build(MICRO[kind], case.torch_dtype, CPU, False)
    base_parameters, itemsize = parameter_count(case.model), case.torch_dtype.itemsize
    buffers = sum(t.untyped_storage().nbytes() for t in base.buffers())
    base_tensors = len(list(base.parameters()))
    adapters, adapter_tensors = case.r * ADAPTED[kind], 2 * len(training("fastlora", case).subject.adapters)
    for name, row in rows.items():
        trained = base_parameters if name == FULL else adapters
        tensors = base_tensors if name == FULL else adapter_tensors
        own_itemsize = 4 if name.endswith("fp32") else itemsize
        assert row.trained_parameters == trained
        assert row.parameters == base_parameters + (0 if name == FULL else adapters)
        assert row.gradient_bytes == trained * own_itemsize
        assert row.optimizer_bytes == 2 * trained * own_itemsize + 4 * tensors
        extra = 0 if name == FULL else adapters * own_itemsize
        assert row.weight_bytes == base_parameters * itemsize + buffers + extra
        assert row.peak_bytes > row.weight_bytes + row.gradient_bytes + row.optimizer_bytes
        assert row.activation_bytes > 0


def test_gpt2_weights_are_the_base_s_own_storage():
    case = micro("gpt2")
    architecture = architecture_named(case.model)
    base = build(architecture, torch.float32, CPU, False)
    own = {name: module.weight.data_ptr() for name, module in architectures.targets(base, architecture)}
    adapted = arms()["fastlora"].adapt(base, architecture, case).model
    assert len(own) == 8
    assert {name: adapted.get_submodule(name).weight.data_ptr() for name in own} == own


@pytest.mark.parametrize("name", ON_CPU)
def test_checkpointing_lowers_the_activations(name):
    with_it, without = (
        training(name, micro(sequence=64, dtype="bf16", checkpointing=on)).memory() for on in (True, False)
    )
    assert with_it.activation_bytes < 0.5 * without.activation_bytes
    assert with_it.held == without.held


@pytest.mark.parametrize("kind", MICRO)
def test_arms_adapt_the_same_layers_of_the_same_base(kind):
    case, architecture = micro(kind, dtype="bf16"), MICRO[kind]
    base = build(architecture, torch.bfloat16, CPU, False)
    names = [name for name, _ in architectures.targets(base, architecture)]
    for name in LORA:
        subject = arms()[name].adapt(build(architecture, torch.bfloat16, CPU, False), architecture, case)
        assert list(subject.adapters) == names
        assert sum(p.numel() for p in subject.trained) == case.r * ADAPTED[kind]
        assert all(not b.any() and a.any() for a, b in subject.adapters.values())
        mine = {p.data_ptr() for pair in subject.adapters.values() for p in pair}
        frozen = [p for p in subject.model.parameters() if p.data_ptr() not in mine]
        for ours, theirs in zip(frozen, base.parameters(), strict=True):
            assert not ours.requires_grad
            # A layer of fastlora sees GPT-2's weights transposed.
            assert torch.equal(ours, theirs) or torch.equal(ours.mT, theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_the_same_for_the_same_turn(checkpointing):
    case = micro(dropout=0.5, checkpointing=checkpointing)
    first, other, again = (float(training("fastlora", case).prepare(turn)()) for turn in (7, 10, 7))
    # Turns 7 and 10 have the same batch, and each its own dropout.
    assert first == again != other


@pytest.mark.parametrize(("kind", "groups"), [("llama", ["q_proj", "gate_proj"]), ("gpt2", []), ("roberta", ["query"])])
@pytest.mark.parametrize("name", ["patched", "fastlora", "fastlora-alone"])
def test_siblings_run_together_but_where_they_are_to_run_alone(name, kind, groups):
    before, subject, after = counts(), training(name, micro(kind, sequence=64)).subject, counts()
    formed = {(p.rpartition(".")[0], g.names[0]) for p, m in subject.model.named_modules() if (g := group_of(m))}
    expected = [] if name == "fastlora-alone" else 2 * groups
    assert sorted(first for _, first in formed) == sorted(expected)
    assert (after.grouped > before.grouped) == bool(expected)
    assert after.wasted == before.wasted


def test_an_mlp_as_one_product_keeps_less(monkeypatch):
    # Few tokens run layer by layer.
    monkeypatch.setattr(ops_mlp, "_SMALL", 0)
    together, apart = (training(name, micro(sequence=64)).memory() for name in ("fastlora-mlp", "fastlora"))
    # Of each of two MLPs act(g) and h.
    assert apart.activation_bytes - together.activation_bytes == 2 * 2 * 4 * 2 * 64 * 96


def test_every_arm_has_a_mark_of_its_own_in_pictures():
    marks = [styles.STYLES[name] for name in arms()]
    assert len({(mark.colour, mark.marker) for mark in marks}) == len(marks)


def test_arms_are_measured_alone_and_timed_together(monkeypatch):
    alive, seen = weakref.WeakSet(), []

    class Watched(Training):
        def __init__(self, *rest):
            super().__init__(*rest)
            gc.collect()
            alive.add(self)
            seen.append(len(alive))

    monkeypatch.setattr(model_case, "Training", Watched)
    rows = run_micro([FULL, "peft-same", "fastlora"], rounds=2)
    assert seen == [1, 1, 1, 1, 2, 3]
    assert [row.rounds for row in rows] == [2, 2, 2]
    assert len({row.noise for row in rows}) == 1


def test_arms_that_do_not_fit_together_take_turns_in_blocks(monkeypatch):
    built = []

    class Watched(Training):
        def __init__(self, case, arm, device):
            super().__init__(case, arm, device)
            built.append(arm.name)

    monkeypatch.setattr(model_case, "Training", Watched)
    monkeypatch.setattr(model_case, "capacity", lambda device: 1)
    rows = run_micro([FULL, "fastlora"], rounds=5)
    assert [row.status for row in rows] == ["ok", "ok"]
    assert [row.rounds for row in rows] == [6, 6]
    # Once each alone; then in every block full, full again for the noise, and fastlora.
    assert built[:2] == [FULL, "fastlora"]
    blocks = [built[2 + 3 * i : 5 + 3 * i] for i in range(model_case.BLOCKS)]
    assert [sorted(block) for block in blocks] == [["fastlora", FULL, FULL]] * model_case.BLOCKS
    assert len(built) == 2 + 3 * model_case.BLOCKS


def test_a_case_stops_at_its_time_but_not_before_the_least_rounds():
    rows = run_case(micro(), [arms()["fastlora"]], [], ModelGate(CPU), 1000, 0.0, Clock(CPU), CPU)
    assert rows[0].rounds == MIN_ROUNDS


def test_the_gate_runs_once_for_a_sweep(monkeypatch):
    checks, check = [], ModelGate._check
    monkeypatch.setattr(ModelGate, "_check", lambda self, arm, case: checks.append(arm.name) or check(self, arm, case))
    gate = ModelGate(CPU)
    for sequence in (8, 16):
        run_micro(["fastlora"], micro(sequence=sequence, dropout=0.1 * (sequence == 16)), gate=gate)
    assert checks == ["fastlora"]
    run_micro(["fastlora"], micro(checkpointing=True), gate=gate)
    assert checks == ["fastlora"] * 2


def test_absent_arms_say_why(monkeypatch):
    rows = {row.arm: row for row in run_micro(arms())}
    assert rows.keys() - {name for name, row in rows.items() if row.status == "ok"} == {
        "peft-fp32",
        "fastlora-fp32",
        *ON_GPU,
    }
    assert {rows[name].reason for name in ON_GPU} == {"needs a CUDA GPU"}
    assert rows["peft-fp32"].reason == "the base is float32 already"
    long = run_micro(["fastlora"], micro("gpt2", sequence=65))[0]
    assert (long.status, long.reason) == ("absent", "gpt2-micro takes at most 64 tokens")
    monkeypatch.setattr(failures.importlib.util, "find_spec", lambda name: None)
    missing = run_micro(["peft-same"])[0]
    assert (missing.status, missing.reason) == ("absent", "peft is not installed")


def short_of_memory(monkeypatch, name, tokens):
    """From so many tokens on the named arm runs out of memory; returns what was built."""
    built = []

    class Short(Training):
        def __init__(self, case, arm, device):
            built.append((arm.name, case.batch, case.sequence))
            if arm.name == name and case.batch * case.sequence >= tokens:
                raise torch.OutOfMemoryError("no more")
            super().__init__(case, arm, device)

    monkeypatch.setattr(model_case, "Training", Short)
    return built


def test_more_than_a_cpu_has_is_a_row_before_the_kernel_kills(monkeypatch):
    monkeypatch.setattr(training_step, "capacity", lambda device: 3 * 4 * parameter_count("llama-micro"))
    full, fastlora = run_micro([FULL, "fastlora"])
    assert (full.status, fastlora.status) == ("oom", "ok")
    assert full.reason.startswith("MemoryError: holds")


SWEEP = ("--model", "llama-micro", "--batch", "2", "1", "--sequence", "32", "8", "16", "--checkpointing", "off")


def statuses(rows, name):
    return {(row.batch, row.sequence): row.status for row in rows if row.arm == name}


def test_out_of_memory_ends_the_sweep_of_that_arm_alone(tmp_path, monkeypatch):
    built = short_of_memory(monkeypatch, "peft-same", 32)
    path = tmp_path / "rows.jsonl"
    assert main(path, *SWEEP, "--arm", "peft-same", "fastlora") == 0
    rows = read(path).rows
    assert [(row.batch, row.sequence) for row in rows[::2]] == [(1, 8), (1, 16), (1, 32), (2, 8), (2, 16), (2, 32)]
    assert set(statuses(rows, "fastlora").values()) == {"ok"}
    expected = ["ok", "ok", "oom", "ok", "oom", "oom"]
    assert list(statuses(rows, "peft-same").values()) == expected
    reasons = [row.reason for row in rows if row.status == "oom"]
    assert reasons == [
        "OutOfMemoryError: no more",
        "OutOfMemoryError: no more",
        "out of memory already at batch 1 x 32 tokens",
    ]
    assert ("peft-same", 2, 32) not in built
    assert all(row.step_ms is None for row in rows if row.status == "oom")


def test_a_resumed_sweep_remembers_where_memory_ended(tmp_path, monkeypatch, capsys):
    built = short_of_memory(monkeypatch, "fastlora", 16)
    path, run, options = tmp_path / "rows.jsonl", model.run_case, (*SWEEP, "--arm", "fastlora", "--batch", "1")

    def interrupted(case, *rest):
        if case.sequence == 32:
            raise KeyboardInterrupt
        return run(case, *rest)

    monkeypatch.setattr(model, "run_case", interrupted)
    assert main(path, *options) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(model, "run_case", run)
    built.clear()
    assert main(path, *options, "--resume") == 0
    assert built == []
    assert [row.reason for row in read(path).rows][1:] == [
        "OutOfMemoryError: no more",
        "out of memory already at batch 1 x 16 tokens",
    ]


def test_resuming_what_is_no_result_is_refused(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("something else\n")
    assert main(path, *SWEEP, "--resume") == 2
    assert "no result file" in capsys.readouterr().err


def test_rows_survive_the_file_and_are_printed(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    options = ("--model", "gpt2-micro", "--batch", "2", "--sequence", "16", "--dtype", "bf16")
    assert main(path, *options, "--checkpointing", "off", "on") == 0
    rows = read(path).rows
    assert [row.arm for row in rows] == 2 * list(arms())
    assert [row.checkpointing for row in rows] == [False] * len(arms()) + [True] * len(arms())
    assert {row.kernel for row in rows} == {None, "library"}
    assert all(from_json(row.to_json()) == row for row in rows)
    for row in rows:
        if row.status != "ok":
            assert row.arm in ON_GPU
            assert row.step_ms is None
            continue
        assert row.tokens_per_second == pytest.approx(32e3 / row.step_ms.p50)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*arms(), "tokens/s", "optimiser", "fastlora / peft-fp32"))


def test_a_wrong_arm_makes_the_run_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "run_case", lambda case, *rest: [replace(ModelRow.of(case, "fastlora"), status="wrong")])
    assert main(tmp_path / "rows.jsonl", *SWEEP) == 1


def timed(arm, tokens_per_second, peak, **changes):
    ms = 4000 / tokens_per_second
    numbers = {"step_ms": Spread(0.9 * ms, ms, 1.1 * ms), "tokens_per_second": tokens_per_second, "peak_bytes": peak}
    return replace(ModelRow.of(micro(), arm), **numbers, **changes)


def test_the_table_and_the_summary_hold_the_numbers():
    rows = [
        timed(FULL, 1000.0, 4096, parameters=2_000_000),
        timed("peft-same", 1500.0, 2048, trained_parameters=100_000, noise=0.012),
        timed("fastlora", 3000.0, 1024, kernel="library"),
        replace(ModelRow.of(micro(), "peft-fp32"), status="oom", reason="no more"),
    ]
    lines = render_case(rows).splitlines()
    assert lines[1] == "  2.0 M parameters, 0.1 M of adapters; noise: 1.2%; kernel library (fastlora)"
    assert lines[5].split() == ["fastlora", "1.333", "±10%", "3,000", "3.00", "-", "-", "-", "-", "1.0", "KiB", "-"]
    assert lines[6].split() == ["peft-fp32", "oom:", "no", "more"]
    summary = render_summary(rows)
    once = "(faster in 1, slower in 0, within noise in 0; worst 2.00)"
    assert f"fastlora / peft-same       tokens/s 2.00 {once}" in summary
    assert "peak memory 0.50 (worst 0.50)" in summary
    assert "fastlora / full            tokens/s 3.00" in summary
    assert "peft-fp32" not in summary
    assert quotients(rows, "fastlora", "peft-fp32", lambda row: row.peak_bytes) == []
    assert render_summary(rows[:1]) == ""


def test_every_line_of_the_table_fits_the_screen():
    case, sizes = ModelCase("llama3-8b-8layers", 64, 131072, 128, "bf16", 0.05, True), 5 * [1023 << 30]
    kinds = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "peak_bytes")
    rows = [
        replace(
            ModelRow.of(case, name),
            step_ms=Spread(1e3, 12345.6, 5e4),
            tokens_per_second=1234567.0,
            kernel=arm.kernel or "triton-serial",
            **dict(zip(kinds, sizes, strict=True)),
        )
        for name, arm in arms().items()
    ]
    rows[-1].fail("error", "RuntimeError: " + "something went wrong; " * 10)
    assert max(map(len, render_case(rows).splitlines())) <= WIDTH


@pytest.mark.parametrize("device", MODEL_PROFILES)
@pytest.mark.parametrize("profile", ["quick", "full"])
def test_profiles_ask_for_what_the_models_take(device, profile):
    cases = MODEL_PROFILES[device][profile].cases()
    assert len(set(map(str, cases))) == len(cases)
    for case in cases:
        longest = architecture_named(case.model).longest
        assert longest is None or case.sequence <= longest
    sweeps = {case._replace(batch=0, sequence=0): [] for case in cases}
    for case in cases:
        sweeps[case._replace(batch=0, sequence=0)].append((case.batch, case.sequence))
    for sizes in sweeps.values():
        for i, (batch, sequence) in enumerate(sizes):
            assert not any(b <= batch and s <= sequence for b, s in sizes[i + 1 :])


def test_llama_3_8b_has_its_published_size_and_may_be_cut():
    assert parameter_count("llama3-8b") == 8_030_261_248
    layer = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096
    assert parameter_count("llama3-8b") - parameter_count("llama3-8b-8layers") == 24 * layer
    assert "8 of 32 layers" in architecture_named("llama3-8b-8layers").about
    assert round(parameter_count("gpt2") / 1e6) == 124
    assert round(parameter_count("roberta-base") / 1e6) == 125


@pytest.mark.parametrize("name", ["llama", "llama3-8b-33layers", "gpt2-0layers", "nonsense-2layers"])
def test_unknown_models_list_the_known_ones(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["model", "--model", name])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(known in message for known in ARCHITECTURES)


@pytest.mark.parametrize(
    ("option", "known"), [("--arm", arms()), ("--checkpointing", ("on", "off")), ("--dtype", ("bf16", "fp32"))]
)
def test_unknown_options_list_the_known_ones(option, known, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["model", option, "nonsense"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in known)


def test_list_names_everything(capsys):
    assert command_line.main(["model", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*ARCHITECTURES, *arms(), "quick", "full"))


def test_without_transformers_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    assert command_line.main(["model"]) == 2
    assert "pip install transformers" in capsys.readouterr().err


def test_publish_refuses_a_part_of_a_profile(capsys):
    assert command_line.main(["model", "--device", "cpu", "--publish", "--rounds", "1"]) == 2
    assert "whole profile" in capsys.readouterr().err
