"""Result files: the schema, what survives a kill, and what a resumed run refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cases import MODES, Case, ModelCase
from benchmarks.records import environment
from benchmarks.records.files import RESULTS, ResultFile, parse, read
from benchmarks.records.rows import KINDS, STATUSES, ClaimRow, LayerRow, Measured, ModelRow, Spread, from_json

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
COMMITTED = sorted(path for path in RESULTS.glob("*/*.jsonl") if path.parent.name != "local")

LAYER = replace(
    LayerRow.of(Case("gpt2.attn", 256, 8, "bf16", 0.1), "fastlora", "step"),
    kernel="library",
    errors={"y": {"rms": 0.5, "rms_bound": 1.0, "max": None, "max_bound": 2.0}},
    rounds=3,
    noise=0.01,
    wall_ms=Spread(1.0, 2.0, 3.0),
    ratio=1.25,
    theory=1.01,
    peak_bytes=7,
    kept_bytes=5,
    gate_dropout=0.1,
)
MODEL = replace(
    ModelRow.of(ModelCase("gpt2", 2, 128, 8, "fp32", 0.0, True), "full"), status="oom", reason="out of memory"
)
CLAIM = ClaimRow("fewer parameters", "Table 2", "0.3M", "294,912", "computed", "holds", "2·12·768·2·8")


def described(**changes):
    return {**environment.describe(CPU, "layers", {"rounds": 1}, 2), **changes}


@pytest.mark.parametrize("row", [LAYER, MODEL, CLAIM], ids=lambda row: row.KIND)
def test_a_row_survives_json(row):
    assert from_json(json.loads(json.dumps(row.to_json()))) == row
    assert set(row.to_json()) == {"record", *(field.name for field in fields(row))}


def test_rows_under_their_former_names_are_read():
    former = {"arm": "provider", "kernel": "backend"}
    assert from_json({former.get(name, name): value for name, value in LAYER.to_json().items()}) == LAYER


def test_every_kind_is_covered_above():
    assert set(KINDS) == {row.KIND for row in (LAYER, MODEL, CLAIM)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": "song"}, "unknown record 'song': expected layer, model, claim"),
        ({"m": "many"}, "m must be int, got 'many'"),
        ({"m": True}, "m must be int, got True"),
        ({"ratio": "fast"}, "ratio must be float"),
        ({"wall_ms": {"p20": 1.0, "p50": 2.0}}, "p80"),
        ({"wall_ms": [1.0, 2.0, 3.0]}, "wall_ms must be Spread"),
        ({"errors": {"y": {"rms": "small"}}}, "errors.y.rms must be float"),
        ({"colour": "red"}, r"unknown \['colour'\]"),
    ],
)
def test_the_schema_names_what_is_off(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(LAYER.to_json() | change)


def test_a_missing_field_is_named():
    record = LAYER.to_json()
    del record["noise"]
    with pytest.raises(ValueError, match=r"missing \['noise'\]"):
        from_json(record)


def test_the_environment_is_of_its_schema():
    environment.check(described())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": "many"}, "threads must be int, got 'many'"),
        ({"gpu": "H200"}, r"gpu must be dict \| None, got 'H200'"),
        ({"colour": "red"}, r"missing nothing, unknown \['colour'\]"),
    ],
)
def test_an_environment_that_is_off_is_named(change, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    with ResultFile(path, described(**change)) as file:
        file.append("first", [LAYER], {})
    with pytest.raises(ValueError, match=f"{path}, line 1: environment: {message}"):
        read(path)


def test_a_gpu_is_described_with_driver_and_clocks(monkeypatch):
    properties = {
        "major": 9,
        "minor": 0,
        "multi_processor_count": 132,
        "total_memory": 1 << 37,
        "L2_cache_size": 1 << 25,
    }
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u", **properties))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    said = {"driver_version": "580.95", "clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz", "power.draw": "310.00 W"}

    def run(command):
        query = next((word for word in command if word.startswith("--query-gpu=")), "=")
        return ", ".join(said.get(fact, "1") for fact in query.partition("=")[2].split(","))

    def run_by_an_older_driver(command):
        return None if "clocks_event_reasons" in str(command) else run(command)

    gpu = torch.device("cuda")
    monkeypatch.setattr(environment, "_run", run_by_an_older_driver)
    assert environment.seen(gpu)["gpu"].keys() == {"clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"}
    monkeypatch.setattr(environment, "_run", run)
    assert environment.seen(gpu)["gpu"]["clocks_event_reasons.active"] == "1"
    found = environment.describe(gpu, "layers", {}, 1)
    environment.check(found)
    assert found["device_name"] == "NVIDIA H200"
    expected = {"capability": "9.0", "driver_version": "580.95", "clocks.sm": "1980 MHz", "cuda": torch.version.cuda}
    assert expected.items() <= found["gpu"].items()
    assert {"clocks.sm": "1980 MHz", "power.draw": "310.00 W"}.items() <= environment.seen(gpu)["gpu"].items()


def test_the_build_of_torch_is_on_record(monkeypatch):
    """The version of the package does not say for which CUDA it was built."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert described()["packages"]["torch"] == "2.11.0+cu130"


def test_a_run_with_torchs_new_switch_of_precision_is_described():
    """In a process of its own: torch refuses to read the old switches once the new one is set."""
    script = (
        "import torch; from benchmarks.records import environment\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "print(environment.describe(torch.device('cpu'), 'layers', {}, 1)['flags']['fp32_precision'])"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "tf32"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results_are_of_the_schema(path):
    results = read(path)
    assert results.complete
    assert results.environment["dirty"] is False
    assert results.environment["commit"]
    assert {"torch", "triton", "peft"} <= set(results.environment["packages"]) <= set(described()["packages"])
    keys = Counter(row.key for row in results.rows if isinstance(row, Measured))
    assert [key for key, count in keys.items() if count > 1] == []
    for row in results.rows:
        if isinstance(row, Measured):
            assert row.status in STATUSES
            assert (row.ms is None) == (row.status != "ok")
            assert (row.reason is None) == (row.status == "ok")


def test_something_is_committed():
    assert COMMITTED


def test_rows_of_a_case_cut_short_do_not_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    with ResultFile(path, described()) as file:
        file.append("first", [LAYER, LAYER], {})
        file.append("second", [MODEL], {})
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in [*ends, *(end - 5 for end in ends[1:])]:
        results = parse(whole[:cut], "rows")
        done = [case for case, end in (("first", ends[3]), ("second", ends[5])) if cut >= end]
        assert list(results.cases) == done
    assert read(path).complete


def test_resuming_cuts_what_was_not_finished(tmp_path):
    path = tmp_path / "rows.jsonl"
    with ResultFile(path, described()) as file:
        file.append("first", [LAYER], {"load_average": 0.5})
    kept = path.read_bytes()
    path.write_bytes(kept + json.dumps(MODEL.to_json()).encode() + b'\n{"record": "la')
    with ResultFile(path, described(time="later", load_average=9.0), resume=True) as file:
        assert file.finished == {"first": [LAYER]}
        file.append("second", [MODEL], {})
    assert path.read_bytes().startswith(kept)
    assert read(path).cases == {"first": [LAYER], "second": [MODEL]}


def test_resuming_another_run_is_refused_and_leaves_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    with ResultFile(path, described()) as file:
        file.append("first", [LAYER], {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another run \(settings.rounds: 1 → 2\).*without --resume"):
        ResultFile(path, described(settings={"rounds": 2}), resume=True)
    assert path.read_bytes() == before


def test_results_of_another_version_are_put_aside_and_not_resumed(tmp_path):
    path = tmp_path / "rows.jsonl"
    old = '{"record": "environment", "time": "long ago"}\n{"record": "row"}\n'
    path.write_text(old)
    with pytest.raises(ValueError, match="unknown record 'row'"):
        ResultFile(path, described(), resume=True)
    assert path.read_text() == old
    with ResultFile(path, described()) as file:
        file.append("first", [LAYER], {})
    assert read(path).rows == [LAYER]
    assert path.with_name("rows.jsonl.previous").read_text() == old


def test_what_was_there_is_put_aside(tmp_path):
    path = tmp_path / "rows.jsonl"
    with ResultFile(path, described()) as file:
        file.append("first", [LAYER], {})
    unfinished = path.read_bytes()
    with ResultFile(path, described(cases=1)) as file:
        file.append("first", [LAYER], {})
    aside = path.with_name("rows.jsonl.unfinished")
    assert file.aside == aside
    assert aside.read_bytes() == unfinished
    finished = path.read_bytes()
    for nothing_done in range(2):
        file = ResultFile(path, described())
        file.__exit__(None, None, None)
        assert (file.aside is None) == (nothing_done > 0)
        assert aside.read_bytes() == unfinished
        assert path.with_name("rows.jsonl.previous").read_bytes() == finished


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("content", [b"", b'{"record": "environment", "time": "2026'])
def test_a_file_cut_off_in_its_first_line_starts_anew(content, resume, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with ResultFile(path, described(), resume=resume) as file:
        file.append("first", [LAYER], {})
    assert read(path).rows == [LAYER]


def test_resuming_nothing_starts(tmp_path):
    with ResultFile(tmp_path / "new" / "rows.jsonl", described(), resume=True) as file:
        assert file.finished == {}


@pytest.mark.parametrize("content", ["# A readme\n", '{"record": "layer"}\n', "[1]\n", "no newline at all"])
def test_a_foreign_file_is_refused_and_left_alone(content, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(content)
    for resume in (False, True):
        with pytest.raises(ValueError, match="no result file of this package"):
            ResultFile(path, described(), resume=resume)
    assert path.read_text() == content


def test_a_killed_run_is_resumed_without_loss_or_doubling(tmp_path):
    """A real run, killed without warning once its first case is in the file."""
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks", "layers", "--device", "cpu", "--json", str(path)]
    command += ["--layer", "64x48", "--tokens", "16", "24", "40", "--rank", "4", "--dtype", "fp32", "--dropout", "0"]
    command += ["--arm", "plain", "--rounds", "5"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not (path.exists() and b'"done"' in path.read_bytes()):
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = read(path)
    assert before.cases
    assert (
        subprocess.run([*command, "--resume"], cwd=ROOT, env=variables, check=False, capture_output=True).returncode
        == 0
    )
    after = read(path)
    assert after.complete
    assert {case: after.cases[case] for case in before.cases} == before.cases
    found = [(row.m, row.arm, row.mode) for row in after.rows if isinstance(row, LayerRow)]
    assert found == [(m, name, mode) for m in (16, 24, 40) for name in ("frozen", "plain") for mode in MODES]


def test_what_the_machine_does_meanwhile_makes_no_other_environment():
    one = described(gpu={"clocks.sm": "1980 MHz", "driver_version": "580"}, load_average=0.1)
    two = described(gpu={"clocks.sm": "1200 MHz", "driver_version": "580"}, load_average=3.0, time="later")
    assert environment.differences(one, two) == []
    three = described(gpu={"clocks.sm": "1200 MHz", "driver_version": "590"})
    assert environment.differences(one, three) == ["gpu.driver_version: 580 → 590"]
