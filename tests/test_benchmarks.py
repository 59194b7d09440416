"""The benchmarks: rows, the gate, failures, order, names and the report. Times are never asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise, permutations
from types import SimpleNamespace

import pytest
import torch

from benchmarks import contest, environment, layers, providers, report
from benchmarks.__main__ import main
from benchmarks.cases import LAYERS, MODES, PROFILES, Case
from benchmarks.clocks import Clock, Spread, geometric_mean, shuffled
from benchmarks.memory import kept_bytes, peak_bytes
from benchmarks.operands import make_operands
from benchmarks.providers import FLOOR, Provider
from benchmarks.results import STATUSES, ResultFile, Row, read
from benchmarks.table import render_case, step_speedups
from fastlora import dispatch

CPU = torch.device("cpu")
TINY = ["--layer", "host", "--tokens", "24", "--rank", "4", "--rounds", "2"]


@pytest.fixture(scope="module", autouse=True)
def no_interpreter():
    """A benchmark is what a user runs: no kernel under Triton's interpreter, which the other tests switch on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        dispatch._choose.cache_clear()
        yield
    dispatch._choose.cache_clear()


def contestants(*names):
    known = providers.providers()
    return [known[name] for name in names]


def run_tiny(arms, modes=MODES, dropout=0.0, dtype="fp32", rounds=1):
    case = Case("gpt2.proj", 24, 4, dtype, dropout)
    return contest.run_case(case, arms, modes, rounds, 60.0, Clock(CPU), CPU)


def broken(name, **changes):
    """A provider that builds plain LoRA and then breaks it."""

    def build(case, operands, p):
        return replace(contestants("plain")[0].build(case, operands, p), **changes)

    return Provider(name, "broken", build)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The rows of one small run through the command line: both dtypes, with and without dropout."""
    path = tmp_path_factory.mktemp("results") / "cpu" / "layers-quick.jsonl"
    assert main([*TINY, "--dtype", "fp32", "bf16", "--dropout", "0", "0.1", "--json", str(path)]) == 0
    return path


def test_every_provider_has_a_row_in_every_mode_and_case(published):
    header, rows = read(published)
    names = list(providers.providers())
    assert {(row.dtype, row.dropout, row.provider, row.mode) for row in rows} == {
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
        assert row.rounds == 2 * contest.HOST_ROUNDS
        assert row.kept_bytes >= 0
        assert row.peak_bytes > 0
        for numbers in row.errors.values():
            assert numbers["rms"] <= numbers["rms_bound"]
            assert numbers["max"] <= numbers["max_bound"]
    assert all(row.ratio == 1 for row in rows if row.provider == FLOOR)


def test_lora_rows_check_all_four_tensors_and_dropout_where_the_mask_is_known(published):
    _, rows = read(published)
    for row in rows:
        if row.provider.startswith("fastlora") and row.status == "ok":
            assert set(row.errors) == {"y", "dx", "da", "db"}
            assert row.gate_dropout == row.dropout
        elif row.status == "ok":
            assert row.gate_dropout == 0
    assert {row.backend for row in rows if row.provider == "fastlora"} == {"library"}


def test_absent_rows_say_why(published):
    _, rows = read(published)
    absent = {(row.provider, row.dtype, row.dropout): row.reason for row in rows if row.status == "absent"}
    assert absent["addmm", "fp32", 0.1] == "takes no dropout"
    assert absent["peft-fp32", "fp32", 0.0] == "the base is float32 already"


def test_absent_peft_is_listed_as_absent(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    rows = run_tiny(contestants(FLOOR, "peft-same"), modes=["forward"])
    assert [(row.status, row.reason) for row in rows] == [("ok", None), ("absent", "peft is not installed")]


def test_rows_survive_the_file(published):
    header, rows = read(published)
    copy = published.with_name("copy.jsonl")
    with ResultFile(copy, {key: value for key, value in header.items() if key != "record"}) as file:
        file.append(rows)
    assert read(copy) == (header, rows)
    assert [json.loads(line)["record"] for line in copy.read_text().splitlines()][:2] == ["environment", "row"]


def test_a_wrong_provider_gets_no_speed():
    def doubled_update(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)
        return replace(built, layer=lambda x: 1.01 * built.layer(x))

    rows = run_tiny([*contestants(FLOOR), Provider("wrong", "1 % too large", doubled_update)])
    wrong = [row for row in rows if row.provider == "wrong"]
    assert [row.status for row in wrong] == ["wrong"] * 3
    assert all(row.ms is None and row.ratio is None and row.rounds is None for row in wrong)
    assert all(name in wrong[0].reason for name in ("y: rms error", "dx: rms error", "bound"))
    assert "wrong: y: rms error" in render_case(rows)


def test_a_gradient_that_never_arrives_is_wrong():
    def detached(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)
        return replace(built, trained={**built.trained, "db": built.trained["db"].detach().clone().requires_grad_()})

    rows = run_tiny([*contestants(FLOOR), Provider("detached", "db is another tensor", detached)], modes=["step"])
    assert (rows[1].status, rows[1].reason) == ("wrong", "db: no gradient arrived")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "oom"),
        (MemoryError(), "oom"),
        (ZeroDivisionError("no luck"), "error"),
    ],
)
def test_a_provider_that_raises_is_a_row_and_the_others_go_on(error, status):
    def fail(x):
        raise error

    rows = run_tiny([*contestants(FLOOR), broken("fails", layer=fail), *contestants("plain")], modes=["step"])
    assert [row.status for row in rows] == ["ok", status, "ok"]
    assert rows[1].reason.startswith(type(error).__name__)


def test_a_provider_that_raises_inside_the_clock_is_a_row():
    calls = []

    def build(case, operands, p):
        built = contestants("plain")[0].build(case, operands, p)

        def layer(x):
            calls.append(1)
            if len(calls) > 5:
                raise ValueError("late")
            return built.layer(x)

        return replace(built, layer=layer)

    rows = run_tiny([*contestants(FLOOR), Provider("late", "fails on its sixth call", build)], ["step"], rounds=3)
    assert [row.status for row in rows] == ["ok", "error"]
    assert rows[1].ms is None


def test_operands_out_of_memory_fail_every_row(monkeypatch):
    def out_of_memory(case, device):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(contest, "make_operands", out_of_memory)
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


def test_providers_take_turns_in_ever_other_order():
    orders = [shuffled("abcde", turn) for turn in range(200)]
    assert all(sorted(order) == list("abcde") for order in orders)
    assert orders == [shuffled("abcde", turn) for turn in range(200)]
    assert {order[0] for order in orders} == set("abcde")
    assert {pair for order in orders for pair in pairwise(order)} == set(permutations("abcde", 2))


def test_rounds_are_interleaved(monkeypatch):
    order = []
    sample = contest._Entrant.sample

    def spy(entrant, clock, operands, turn):
        order.append((turn, entrant.provider.name))
        sample(entrant, clock, operands, turn)

    monkeypatch.setattr(contest._Entrant, "sample", spy)
    run_tiny(contestants(FLOOR, "plain", "addmm"), ["forward"], rounds=2)
    assert [turn for turn, _ in order] == [0] * 4 + [1] * 4
    for round_ in (order[:4], order[4:]):
        assert sorted(name for _, name in round_) == sorted([FLOOR, FLOOR, "plain", "addmm"])


def test_a_mode_stops_at_its_time_but_not_before_the_least_rounds():
    case = Case("host", 4, 4, "fp32", 0.0)
    rows = contest.run_case(case, contestants(FLOOR), ["forward"], 1000, 0.0, Clock(CPU), CPU)
    assert rows[0].rounds == contest.MIN_ROUNDS


def test_a_turn_forces_the_backend_and_restores_the_variable(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    with contestants("fastlora-library")[0].turn():
        assert providers.os.environ["FASTLORA_BACKEND"] == "library"
    assert providers.os.environ["FASTLORA_BACKEND"] == "reference"
    monkeypatch.delenv("FASTLORA_BACKEND")
    with contestants("fastlora")[0].turn():
        assert providers.os.environ["FASTLORA_BACKEND"] == "auto"
    assert "FASTLORA_BACKEND" not in providers.os.environ


@pytest.mark.parametrize("option", ["--layer", "--provider", "--profile", "--mode", "--dtype"])
def test_unknown_names_list_the_known_ones(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main([option, "nonsense"])
    assert stop.value.code == 2
    known = {"--layer": LAYERS, "--provider": providers.providers(), "--profile": PROFILES, "--mode": MODES}
    message = capsys.readouterr().err
    assert all(name in message for name in known.get(option, ("bf16", "fp16", "fp32")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_profile_without_gpu_offers_the_cpu_one(capsys):
    assert main(["--profile", "gpu"]) == 2
    message = capsys.readouterr().err
    assert "needs a CUDA device" in message
    assert "--profile quick" in message


def test_publish_refuses_a_part_of_a_profile(capsys):
    assert main(["--publish", *TINY]) == 2
    assert "whole profile" in capsys.readouterr().err


def test_publish_copies_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "RESULTS", tmp_path)
    monkeypatch.setattr(layers, "LOCAL", tmp_path / "local")
    tiny = replace(PROFILES["quick"], rounds=1, sweeps=[replace(PROFILES["quick"].sweeps[0], layers=["host"])])
    monkeypatch.setitem(layers.PROFILES, "quick", tiny)
    monkeypatch.setattr(contest, "HOST_ROUNDS", 1)
    assert main(["--profile", "quick", "--publish"]) == 0
    written = tmp_path / environment.slug(CPU) / "layers-quick.jsonl"
    assert written.read_bytes() == (tmp_path / "local" / "cpu" / "layers-quick.jsonl").read_bytes()


def test_interrupt_keeps_finished_rows(tmp_path, monkeypatch, capsys):
    run_case, path = layers.run_case, tmp_path / "rows.jsonl"

    def interrupted(case, *rest):
        if case.dtype == "bf16":
            raise KeyboardInterrupt
        return run_case(case, *rest)

    monkeypatch.setattr(layers, "run_case", interrupted)
    status = main(
        [
            *TINY,
            "--dtype",
            "fp32",
            "bf16",
            "--dropout",
            "0",
            "--provider",
            "plain",
            "--mode",
            "step",
            "--json",
            str(path),
        ]
    )
    assert status == 130
    assert [row.provider for row in read(path)[1]] == [FLOOR, "plain"]
    assert "interrupted: 2 finished rows" in capsys.readouterr().err


def test_a_wrong_row_makes_the_run_fail(tmp_path, monkeypatch):
    def wrong(*args):
        return [replace(Row.of(Case("host", 1, 1, "fp32", 0.0), "plain", "step"), status="wrong", reason="y")]

    monkeypatch.setattr(layers, "run_case", wrong)
    assert main([*TINY, "--json", str(tmp_path / "rows.jsonl")]) == 1


def test_list_names_everything(capsys):
    assert main(["layers", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*PROFILES, *LAYERS, *providers.providers()))


def test_a_layer_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "rows.jsonl"
    options = [
        "--layer",
        "gpt2.proj",
        "--tokens",
        "8",
        "--dtype",
        "fp32",
        "--dropout",
        "0",
        "--rank",
        "4",
        "--rounds",
        "1",
    ]
    assert main([*options, "--provider", "fastlora", "--json", str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_percentiles_and_geometric_mean():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Spread(2.0, 3.5, 5.0)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def timed(provider, p50, **changes):
    row = Row.of(Case("gpt2.attn", 256, 8, "bf16", 0.0), provider, "step")
    return replace(row, wall_ms=Spread(p50, p50, p50), ratio=p50 / 2, **changes)


def test_speedups_are_peft_over_fastlora():
    rows = [timed(FLOOR, 2.0), timed("peft-same", 6.0), timed("fastlora", 3.0)]
    assert step_speedups(rows, "fastlora", "peft-same") == [2.0]
    assert step_speedups(rows, "fastlora", "peft-fp32") == []


def test_markdown_holds_the_numbers():
    rows = [
        timed(FLOOR, 2.0),
        timed("plain", 3.0),
        timed("peft-same", 6.0, kept_bytes=2048),
        timed("fastlora", 2.5, kept_bytes=1024, backend="library"),
        timed("fastlora-library", 2.5, backend="library"),
        Row.of(Case("gpt2.attn", 256, 8, "bf16", 0.0), "addmm", "step"),
    ]
    table = report.render_markdown(rows).splitlines()
    assert table[0].startswith("| layer | M |")
    cells = ["gpt2.attn", "256", "768 → 2304", "8", "bf16", "0", "2", "1.50", "3.00", "**1.25**", "1.0 KiB / 2.0 KiB"]
    assert table[2] == f"| {' | '.join(cells)} |"
    assert "- `peft-same` over `fastlora`, step: 2.40× (geometric mean of 1 layers, worst 2.40×)" in table


def test_report_replaces_what_lies_between_the_markers_and_is_idempotent(published, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.START}\nold\n{report.END}\n\nafter\n", encoding="utf-8")
    command = ["report", "--readme", str(readme), "--results", str(published.parent.parent)]
    assert main(command) == 0
    once = readme.read_text(encoding="utf-8")
    assert once.startswith(f"# Title\n\n{report.START}\n")
    assert once.endswith(f"{report.END}\n\nafter\n")
    assert "old" not in once
    assert report.NO_GPU in once
    assert "host overhead of a step" in once
    assert main(command) == 0
    assert readme.read_text(encoding="utf-8") == once


def test_a_gpu_result_silences_the_missing_gpu_line(published, tmp_path):
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    header, *rows = published.read_text(encoding="utf-8").splitlines()
    gpu = json.dumps(json.loads(header) | {"device": "cuda", "device_name": "NVIDIA H200"})
    (folder / "layers-gpu.jsonl").write_text("\n".join([gpu, *rows]), encoding="utf-8")
    rendered = report.render_results(tmp_path, tmp_path)
    assert report.NO_GPU not in rendered
    assert "**NVIDIA H200**" in rendered


@pytest.mark.parametrize("text", ["", report.START, f"{report.END}{report.START}", 2 * (report.START + report.END)])
def test_report_without_its_markers_changes_nothing(text, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    assert main(["report", "--readme", str(readme), "--results", str(tmp_path)]) == 2
    assert readme.read_text(encoding="utf-8") == text
    assert report.START in capsys.readouterr().err


def test_a_foreign_file_is_no_result(tmp_path):
    path = tmp_path / "layers-x.jsonl"
    path.write_text('{"record": "row"}\n')
    with pytest.raises(ValueError, match="environment record"):
        read(path)


def test_device_slug(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert environment.slug(SimpleNamespace(type="cuda")) == "nvidia-h200"
    assert environment.slug(CPU) == "cpu"
