"""The command for a GPU: driven end to end with a stand-in for the interpreter, and once on the stand-in for a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main as benchmarks
from benchmarks.cases import Case, ModelCase
from benchmarks.hardware import __main__ as hardware
from benchmarks.hardware import ingest, outcomes, processes, tables
from benchmarks.hardware import run as runner
from benchmarks.hardware.ingest import Places
from benchmarks.hardware.outcomes import Check, Outcome, Tally
from benchmarks.hardware.run import ARCHIVE, Run
from benchmarks.hardware.stages import EASY, KERNELS, NAMES, STAGES, TIMED, Sizes, Stage
from benchmarks.records.files import ResultFile, read
from benchmarks.records.rows import LayerRow, ModelRow
from fastlora.backends import dispatch
from fastlora.backends.machine import Machine
from fastlora.backends.measured import Bucket, Proof, Table
from fastlora.tune import report
from tests.stub_gpu import build, stand_in
from tests.test_repository import lacking

from .test_files import described

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PYTHON = (sys.executable, "-m", "tests.benchmarks.stand_in_python")
REAL = "tests/test_gpu.py::test_step_against_the_oracle[8192x4096x4096x16-bf16-no_dropout-{}]"
GRAPH = "tests/test_gpu.py::test_a_captured_graph_replays_the_step[{}]"
CUDA = "tests/csrc/test_cuda_kernels.py::test_any_rank[8-none-{}]"
RANK_GRAD = "tests/kernels/test_kernels.py::test_rank_grad[bf16-64-16-72-no_mask]"
SKINNY = "tests/kernels/test_skinny.py::test_middle[8-bf16-none]"
ALL_PASS = {
    "library": {"tests/test_gpu_integration.py::test_library_step[shape0-bf16-no_dropout]": "passed"},
    "skinny": {SKINNY: "passed"},
    "portable": {RANK_GRAD: "passed"},
    "serial": {"tests/kernels/test_kernels.py::test_any_rank[8-triton-serial]": "passed"},
    "cuda": {CUDA.format("z_jobs"): "passed", CUDA.format("serial"): "passed"},
    "real": {REAL.format(name): "passed" for name in KERNELS},
    "graphs": {GRAPH.format(name): "passed" for name in KERNELS},
    "around": {"tests/test_gpu_integration.py::test_autocast[library]": "skipped"},
    "memcheck": {SKINNY: "passed"},
}


@pytest.fixture(scope="module")
def canned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the modules of a run would write, small."""
    folder = tmp_path_factory.mktemp("canned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_COMMIT", COMMIT)
        record = described(settings={"profile": "quick", "rounds": 9}, device="cuda", device_name=stand_in.NAME)
    record["gpu"] = {"capability": "9.0", "multiprocessors": 132}
    (folder / "facts.json").write_text(json.dumps(record))
    copy = {"bytes": 8, "ms": {}, "bytes_per_second": 3e12}
    product = {"layer": "x", "m": 8, "k": 8, "n": 8, "ms": {"p50": 1.0}, "flops": 6e14}
    (folder / "ceilings.json").write_text(json.dumps({"copy": copy, "products": [product]}))
    lines = [
        {"k": k, "kernel": name, "status": "ok", "ms": {"p50": k * ratio}, "ratio": ratio}
        for k in (64, 128)
        for name, ratio in (("vendor", 1.0), ("library", 1.25))
    ]
    (folder / "sweep.json").write_text(json.dumps({"m": 8, "n": 8, "r": 16, "lines": lines}))
    for stage in set(TIMED) - {"sweep"}:
        with ResultFile(
            folder / f"{stage}.jsonl", record | {"command": "model" if stage == "model" else "layers"}
        ) as file:
            for name, m in (("first", 64), ("second", 128)):
                layer = LayerRow.of(Case("llama3-8b.q", m, 16, "bf16", 0.0), "fastlora", "step")
                layer.ratio = 1.5
                model = ModelRow.of(ModelCase("gpt2", 1, m, 8, "bf16", 0.0, False), "fastlora")
                row = model if stage == "model" else layer
                row.record_times([1.0, 2.0], [1.0, 2.0])
                file.append(name, [row], {})
    return folder


class Driven:
    """A folder to run in, and what the stand-in is to do."""

    def __init__(self, folder: Path, canned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STAND_IN_CANNED", str(canned))
        self.out, self.work, self.script = folder / "out", folder / "work", folder / "script.json"
        monkeypatch.setenv("STAND_IN_SCRIPT", str(self.script))
        monkeypatch.setenv("FASTLORA_COMMIT", COMMIT)
        monkeypatch.setattr(processes, "sanitizer", lambda: ["env"])
        self.does({})

    def does(self, changes: dict[str, object]) -> None:
        self.script.write_text(json.dumps(ALL_PASS | changes))

    def run(
        self,
        stages: Sequence[Stage] = STAGES,
        seconds: float = 600.0,
        kernels: Sequence[str] = KERNELS,
        stall: float = 1.0,
    ) -> tuple[int, Run]:
        for path in self.work.glob("*"):
            path.unlink()
        self.work.mkdir(exist_ok=True)
        run = Run(self.out, self.work, seconds, kernels, Sizes(stall=stall), PYTHON, parallel=False, commit=COMMIT)
        return run.run(stages), run

    def argv(self, stage: str) -> list[str]:
        """What the last process of a stage was started with."""
        lines = (self.work / f"{stage}.log").read_text().splitlines()
        return next(line for line in reversed(lines) if line.startswith("argv ")).split()[1:]

    def results(self, run: Run) -> dict[str, str]:
        return {ended.stage: ended.result for ended in run.table}


@pytest.fixture
def driven(tmp_path: Path, canned: Path, monkeypatch: pytest.MonkeyPatch) -> Driven:
    return Driven(tmp_path, canned, monkeypatch)


def only(*names: str) -> list[Stage]:
    return [stage for stage in STAGES if stage.name in names]


def test_every_stage_starts_and_the_archive_holds_what_was_done(
    driven: Driven, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, run = driven.run()
    assert driven.results(run) == dict.fromkeys(NAMES, "ok")
    assert status == 0
    assert [path.name for path in driven.out.iterdir()] == [ARCHIVE]
    with tarfile.open(driven.out / ARCHIVE) as archive:
        packed = set(archive.getnames())
    assert {f"{name}.log" for name in NAMES} | {f"{name}.jsonl" for name in TIMED if name != "sweep"} <= packed
    assert {"facts.json", "ceilings.json", "sweep.json", "stages.json", "real.tests.jsonl"} <= packed
    printed = capsys.readouterr().out.splitlines()
    table = printed[printed.index(next(line for line in printed if line.startswith("stage "))) :]
    assert [line.split()[0] for line in table[1:-1]] == list(NAMES)
    # Everything that passed is timed.
    arms = driven.argv("layers")
    assert {f"fastlora-{name}" for name in KERNELS} <= set(arms)
    # And nothing was written that could be filed twice: an ingest of the archive works from it alone.
    check_ingest(driven.out, tmp_path)


def check_ingest(folder: Path, tmp_path: Path) -> None:
    places = copied(tmp_path)
    whole = places.results / "nvidia-h100-80gb-hbm3" / "layers-quick.jsonl"
    said = ingest.ingest(folder, places)
    device = places.results / "nvidia-h100-80gb-hbm3"
    assert not whole.exists()
    filed = {path.stem for path in device.glob("*.jsonl")}
    assert filed == {f"hardware-{name}" for name in TIMED if name != "sweep"}
    for path in device.glob("*.jsonl"):
        results = read(path)
        assert results.complete
        assert (results.environment["commit"], results.environment["dirty"]) == (COMMIT, False)
    page = (device / "hardware.md").read_text()
    assert "3.00 TB/s" in page
    assert "| library | 1.250 | 1.250 (" in page
    readme = places.readme.read_text()
    assert stand_in.NAME in readme
    assert "chosen cases, at 012345678" in readme
    assert "No GPU result yet" not in readme
    ledger = places.ledger.read_text()
    lines = [line for line in ledger.splitlines() if COMMIT[:9] in line]
    assert all("| sm_90 | bfloat16 |" in line for line in lines)
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    words = {(kernel, verb): found for kernel, verb, _, _, _, found in cells}
    assert words["triton-skinny", "lora_matmul"] == f"{stand_in.NAME}, 012345678: 3 checks passed"
    assert words["triton", "rank_grad"] == f"{stand_in.NAME}, 012345678: 1 checks passed"
    # None of its own ran in this script, only steps that it is a part of.
    assert ("cuda", "rank_grad") not in words
    assert {kernel for kernel, verb in words if verb == "lora_matmul"} == set(KERNELS) - {"library"}
    assert all(line in said for line in lines)
    assert len(ledger.splitlines()) == len(ingest.LEDGER.read_text().splitlines())


def copied(folder: Path) -> Places:
    """Results, ledger and README to write to."""
    places = Places(folder / "results", folder / "HARDWARE.md", folder / "README.md", folder / "tables")
    places.results.mkdir(exist_ok=True)
    places.ledger.write_text(ingest.LEDGER.read_text())
    places.readme.write_text("<!-- benchmarks:start -->\n<!-- benchmarks:end -->\n")
    return places


def test_a_hang_a_crash_and_a_failure_cost_one_test_each(driven: Driven, capsys: pytest.CaptureFixture[str]) -> None:
    serial, z_jobs = CUDA.format("serial"), CUDA.format("z_jobs")
    later = "tests/csrc/test_cuda_kernels.py::test_any_rank[64-none-z_jobs]"
    portable = "tests/kernels/test_kernels.py::test_any_rank[8-triton-portable]"
    fp32 = "tests/kernels/test_skinny.py::test_middle[8-fp32-none]"
    driven.does(
        {"cuda": {serial: "hang", z_jobs: "passed", later: "passed"}, "portable": {portable: "failed"}}
        | {"serial": {"tests/kernels/test_kernels.py::test_any_rank[8-triton-serial]": "crash"}}
        | {"skinny": {fp32: "failed", SKINNY: "passed"}}
    )
    status, run = driven.run(only("facts", "skinny", "portable", "serial", "cuda", "layers"))
    assert status == 1
    tests = runner.all_outcomes(driven.work)
    assert {test: outcome.outcome for test, outcome in tests.items() if outcome.is_failure} == {
        serial: "hung",
        portable: "failed",
        fp32: "failed",
        "tests/kernels/test_kernels.py::test_any_rank[8-triton-serial]": "crashed",
    }
    assert tests[later].outcome == tests[z_jobs].outcome == "passed"
    assert driven.results(run)["cuda"] == "1 failed"
    # A failure in float32 keeps no kernel from being timed in bfloat16.
    assert [word for word in driven.argv("layers") if word.removeprefix("fastlora-") in KERNELS] == [
        f"fastlora-{name}" for name in KERNELS if name in ("library", "triton-skinny", "cuda-z_jobs")
    ]
    printed = capsys.readouterr().out
    assert f"  FAILED {portable}: off by one\n" in printed
    assert printed.index(f"HUNG {serial}") < printed.index("layers: four layers")


FAULTY = """
import time, torch
def test_first(): pass
def test_loses_the_gpu():
    def lost(): raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), lost
def test_wrong(): assert 1 == 2, "off by one"
def test_hangs(): time.sleep(600)
def test_last(): pass
"""


def test_pytest_itself_goes_on_behind_what_ends_it(driven: Driven, tmp_path: Path) -> None:
    """The hooks of tests/conftest.py, where no plugin runs tests in several processes."""
    faulty = tmp_path / "test_faulty.py"
    faulty.write_text(FAULTY)
    stage = replace(only("cuda")[0], arguments=lambda c: ["-p", "tests.conftest", "--rootdir", str(ROOT), str(faulty)])
    driven.work.mkdir()
    run = Run(driven.out, driven.work, 120.0, KERNELS, Sizes(stall=2.0), parallel=False, commit=COMMIT)
    assert run.run([stage]) == 1
    tests = {test.partition("::")[2]: outcome for test, outcome in runner.all_outcomes(driven.work).items()}
    assert {name: outcome.outcome for name, outcome in tests.items()} == {
        "test_first": "passed",
        "test_loses_the_gpu": "lost",
        "test_wrong": "failed",
        "test_hangs": "hung",
        "test_last": "passed",
    }
    assert tests["test_loses_the_gpu"].why == "the GPU is lost: an illegal memory access was encountered"
    assert "off by one" in tests["test_wrong"].why


@pytest.mark.parametrize("fate", ["hang", "lost"])
def test_after_a_timing_stage_that_hangs_only_easy_kernels_are_timed(driven: Driven, fate: str) -> None:
    driven.does({"layers": fate})
    stages = [replace(stage, limit=4.0) if stage.name == "layers" else stage for stage in only("layers", "dropout")]
    status, run = driven.run(stages)
    assert status == 1
    assert driven.results(run)["layers"] == ("time out" if fate == "hang" else "rc 1")
    assert driven.results(run)["dropout"] == "ok"
    assert {word.removeprefix("fastlora-") for word in driven.argv("dropout")} & set(KERNELS) == set(EASY)


def test_a_crash_of_any_stage_costs_only_itself(driven: Driven) -> None:
    driven.does({"build": "crash", "ceilings": "crash"})
    _, run = driven.run(only("facts", "build", "ceilings", "info"))
    assert driven.results(run) == {"facts": "ok", "build": "rc -6", "ceilings": "rc -6", "info": "ok"}


def test_without_a_gpu_nothing_else_starts(driven: Driven) -> None:
    driven.does({"facts": "no_gpu"})
    status, run = driven.run()
    assert status == 2
    assert len(run.table) == 1


def test_limits_are_kept(driven: Driven) -> None:
    driven.does(dict.fromkeys(("facts", "build", "ceilings", "info"), "hang"))
    start = time.monotonic()
    status, run = driven.run(only("facts", "build", "ceilings", "info"), seconds=4.0)
    assert time.monotonic() - start < 6.0
    assert status == 1
    assert {ended.result for ended in run.table} == {"time out", "no time"}


@pytest.mark.parametrize("seconds", [60.0, 300.0, 570.0, 2000.0])
def test_stages_that_all_take_their_limits_end_in_time(driven: Driven, seconds: float) -> None:
    driven.work.mkdir()
    run = Run(driven.out, driven.work, seconds, KERNELS)
    for i, stage in enumerate(STAGES):
        limit = run._limit(stage, sum(later.seconds for later in STAGES[i + 1 :]))
        assert 0 <= limit <= stage.limit
        run._end -= limit
    assert run._end >= time.monotonic() - 1


def test_the_expected_seconds_fit_the_ten_minutes() -> None:
    assert sum(stage.seconds for stage in STAGES) <= 570
    assert all(stage.seconds <= stage.limit for stage in STAGES)


def test_stopped_it_still_says_what_failed(driven: Driven, tmp_path: Path) -> None:
    test = CUDA.format("z_jobs")
    driven.does({"cuda": {test: "failed", CUDA.format("serial"): "hang"}})
    code = (
        "import sys; from benchmarks.hardware.__main__ import main\n"
        f"sys.exit(main(['--out', {str(driven.out)!r}, '--only', 'cuda'], python={PYTHON!r}, parallel=False))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "FAILED" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert lines[0].startswith("2 stages, about 35 s expected on one H100")
    assert f"FAILED {test}: off by one" in rest
    assert (driven.out / ARCHIVE).exists()


def test_a_folder_is_gone_on_with_and_another_commit_put_aside(driven: Driven) -> None:
    driven.run(only("facts", "skinny"))
    driven.run(only("facts", "cuda"))
    assert {ended.stage for ended in runner.read_table(driven.work)} == {"facts", "skinny", "cuda"}
    assert SKINNY in runner.all_outcomes(driven.work)
    for path in driven.work.iterdir():
        path.unlink()
    Run(driven.out, driven.work, 10.0, KERNELS, commit="f" * 40)
    assert list(driven.work.iterdir()) == []
    assert [path.name for path in driven.out.iterdir()] == [f"results-{COMMIT}.tgz"]


def test_stages_and_kernels_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [stage.name for stage in runner.pick(["layers"], KERNELS)] == ["facts", "layers"]
    picked = {stage.name for stage in runner.pick(None, ["cuda-z_jobs"])}
    assert {"cuda", "real", "layers"} <= picked
    assert picked & {"skinny", "portable", "serial", "library"} == set()
    for options, words in (
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--kernels", "cutlass"], "--kernels cutlass: expected cuda-z_jobs"),
        (["--commit", "main"], "expected the hash of a commit, got main"),
        ([], "--out DIR is missing"),
    ):
        with pytest.raises(SystemExit):
            hardware.main([*options, *(["--out", "/nowhere"] if options else [])])
        assert words in capsys.readouterr().err


def changed_facts(work: Path, **changes: object) -> None:
    facts = work / "facts.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | changes))


@pytest.fixture
def brought_back(driven: Driven) -> Driven:
    """What a run left, unpacked."""
    driven.run(only("facts", "cuda", "portable", "real", "graphs", "layers"))
    return driven


def test_only_rows_of_a_clean_commit_are_filed(brought_back: Driven, tmp_path: Path) -> None:
    places, work = copied(tmp_path), brought_back.work
    for changes, words in (
        ({"dirty": True}, "with local changes"),
        ({"commit": None}, "an unknown commit"),
        ({"device": "cpu"}, "those of cpu"),
    ):
        before = (work / "facts.json").read_text()
        changed_facts(work, **changes)
        with pytest.raises(ValueError, match=words):
            ingest.ingest(work, places)
        (work / "facts.json").write_text(before)
    assert list(places.results.iterdir()) == []
    changed_facts(work, commit="f" * 40)
    assert "left out layers.jsonl: its commit are not the run's" in ingest.ingest(work, places)


def test_what_is_filed_is_what_was_finished_and_never_less_than_before(brought_back: Driven, tmp_path: Path) -> None:
    places, rows = copied(tmp_path), brought_back.work / "layers.jsonl"
    filed = places.results / "nvidia-h100-80gb-hbm3" / "hardware-layers.jsonl"
    whole = rows.read_bytes()
    lines = whole.splitlines(keepends=True)
    # The second case was cut off in its rows.
    rows.write_bytes(b"".join(lines[:4]))
    assert "hardware-layers.jsonl: 1 of 2 cases" in ingest.ingest(brought_back.work, places)
    results = read(filed)
    assert results.complete
    assert list(results.cases) == results.environment["settings"]["all"] == ["first"]
    rows.write_bytes(whole)
    assert "hardware-layers.jsonl: 2 of 2 cases" in ingest.ingest(brought_back.work, places)
    assert filed.read_bytes() == whole
    rows.write_bytes(b"".join(lines[:4]))
    assert "has 1 cases that it lacks" in ingest.ingest(brought_back.work, places)
    assert filed.read_bytes() == whole


FACTS = {"device_name": "GPU", "commit": COMMIT, "gpu": {"capability": "9.0"}}
LINE = "| cuda-z_jobs | lora_matmul | sm_90 | bfloat16 | gate | not yet run on hardware |\n"
Z_JOBS = Check("lora_matmul", "cuda-z_jobs", "bfloat16")


@pytest.mark.parametrize(
    ("tally", "missing", "words"),
    [
        (Tally(9, 0, 2), set(), "GPU, 012345678: 9 checks passed"),
        (Tally(9, 0, 2), {"skinny"}, "GPU, 012345678: 9 checks passed"),
        (Tally(9, 0, 0), set(), "not yet run on hardware"),
        (Tally(9, 0, 2), {"cuda"}, "not yet run on hardware"),
        (Tally(9, 0, 2), {"real"}, "not yet run on hardware"),
        (Tally(8, 1, 2), {"cuda"}, "GPU, 012345678: 1 of 9 checks failed"),
    ],
)
def test_a_line_of_the_ledger_says_what_was_found(tally: Tally, missing: set[str], words: str) -> None:
    text, changed = ingest.with_results(LINE, FACTS, {Z_JOBS: tally}, missing)
    assert text == LINE.replace("not yet run on hardware", words)
    assert len(changed) == (text != LINE)


def test_lines_of_another_architecture_stay() -> None:
    other = LINE.replace("sm_90", "sm_100")
    assert ingest.with_results(other, FACTS, {Z_JOBS: Tally(9, 0, 2)}, set()) == (other, [])


GPU = Machine("NVIDIA H200", "sm_90", "570.86", "2.13.0", "3.6.0", "", "0123456789ab")
PROOFS = (
    Proof("lora_matmul", "triton-serial", "bfloat16", 12, True, "", "2026-11-25"),
    Proof("lora_matmul", "cuda-serial", "bfloat16", 12, False, "M=1: it said | and\nno check was passed", "2026-11-25"),
    Proof("rank_grad", "triton", "bfloat16", 12, True, "", "2026-11-25"),
)
BUCKET = Bucket(
    *("lora_matmul", "forward", "bfloat16", "bfloat16", False, 512, 4096, 1024, 16),
    {"triton-skinny": [2.0, 2.1, 2.2], "triton-serial": [1.0, 1.1, 1.2]},
    *("triton-skinny", "triton-serial", 1.9, "2026-11-25"),
)
TABLE = Table(GPU, PROOFS, (BUCKET,))


def exported(folder: Path, table: Table = TABLE) -> Path:
    path = folder / "sent.json"
    path.write_text(report.export(table))
    return path


def ledger_rows(ledger: str) -> dict[tuple[str, ...], tuple[str, str]]:
    """Kernel, verb, architecture and dtype → the two cells behind them, in order."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in ledger.splitlines() if line[:2] == "| "]
    return {tuple(row[:4]): (row[4], row[5]) for row in rows if len(row) == 6}


def test_an_exported_table_becomes_the_packages_and_its_rows_the_ledgers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = copied(tmp_path)
    monkeypatch.setattr(ingest, "Places", lambda: places)
    before = ledger_rows(places.ledger.read_text())
    assert hardware.main(["--ingest", str(exported(tmp_path))]) == 0
    filed = places.tables / "nvidia-h200.json"
    assert Table.parse(filed.read_text()) == TABLE
    assert "ledger" not in json.loads(filed.read_text())
    after = ledger_rows(places.ledger.read_text())
    assert list(after) == list(before)
    passed = "NVIDIA H200, kernels 0123456789ab: 12 checks of fastlora.tune passed"
    failed = "NVIDIA H200, kernels 0123456789ab: failed: M=1: it said / and no check was passed"
    changed = {
        ("triton-serial", "lora_matmul", "sm_90", "bfloat16"): passed,
        ("cuda-serial", "lora_matmul", "sm_90", "bfloat16"): failed,
        ("triton", "rank_grad", "sm_90", "bfloat16"): passed,
    }
    assert after == before | {row: (before[row][0], words) for row, words in changed.items()}
    assert lacking(places.tables, places.ledger.read_text()) == []
    said = capsys.readouterr().out
    assert f"wrote {filed}: 3 proofs, 1 sizes\n" in said
    assert failed in said
    assert hardware.main(["--ingest", str(exported(tmp_path))]) == 0
    assert f"wrote {filed} in the place of an older one" in capsys.readouterr().out
    assert ledger_rows(places.ledger.read_text()) == after


def test_rows_that_the_ledger_does_not_have_come_behind_those_of_their_kernel(tmp_path: Path) -> None:
    places = copied(tmp_path)
    before = list(ledger_rows(places.ledger.read_text()))
    machine = GPU._replace(device="NVIDIA Orin", capability="sm_87")
    ingest.ingest(exported(tmp_path, Table(machine, PROOFS[:1] + PROOFS[2:])), places)
    after = ledger_rows(places.ledger.read_text())
    serial, grad = ("triton-serial", "lora_matmul"), ("triton", "rank_grad")
    for kernel in (serial, grad):
        row = (*kernel, "sm_87", "bfloat16")
        assert after[row] == ("none", "NVIDIA Orin, kernels 0123456789ab: 12 checks of fastlora.tune passed")
        assert [known for known in after if known[:2] == kernel] == [*(r for r in before if r[:2] == kernel), row]
    assert [row for row in after if row[2] != "sm_87"] == before


CPU = Machine("A CPU", "AVX512", "", "2.13.0+cpu", "3.6.0", "2", "0123456789ab")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\x1f\x8b\x08\xff", r"it is no text: expected what `python -m fastlora\.tune --export FILE` wrote on a GPU"),
        (b"{", "it is no JSON: .*: expected what `python"),
        (b'{"format": 99}', "it has format 99, this fastlora reads 1: expected what"),
        (TABLE.text().encode(), "it has no `ledger`, such as a table in a cache directory: expected what"),
        (report.export(TABLE).replace("12 checks", "99 checks").encode(), "its `ledger` does not say what its proofs"),
        (TABLE._replace(machine=CPU), r"it is of A CPU \(AVX512\), which is no GPU"),
        (TABLE._replace(proofs=()), "triton-serial is the fastest at M=512 .* but has no proof: run `python"),
        (
            TABLE._replace(proofs=(PROOFS[0]._replace(passed=False, why="off by one"),)),
            r"triton-serial is the fastest at M=512 K=4096 N=1024 R=16 \(forward, bfloat16\) but failed its checks "
            r"\(off by one\): run `python -m fastlora.tune --again` there",
        ),
        (
            TABLE._replace(proofs=(*PROOFS, PROOFS[0]._replace(kernel="cutlass"))),
            r"a proof of cutlass \(lora_matmul, bfloat16\): expected a kernel",
        ),
    ],
)
def test_what_is_no_table_for_the_package_is_refused_and_nothing_written(
    tmp_path: Path, text: bytes | Table, words: str
) -> None:
    places = copied(tmp_path)
    path = tmp_path / "sent.json"
    path.write_bytes(report.export(text).encode() if isinstance(text, Table) else text)
    with pytest.raises(ValueError, match=words):
        ingest.ingest(path, places)
    assert places.ledger.read_text() == ingest.LEDGER.read_text()
    assert not places.tables.exists()


def test_a_form_is_as_good_as_its_kernels_proof() -> None:
    assert tables.objection(TABLE, BUCKET._replace(best="triton-serial:form")) is None
    assert tables.objection(TABLE, BUCKET._replace(best="library:last")) is None
    assert tables.objection(TABLE, BUCKET._replace(best=None)) is None
    assert "failed" in str(tables.objection(TABLE, BUCKET._replace(best="cuda-serial:form")))


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        (REAL.format("cuda-z_jobs"), {Z_JOBS}),
        (REAL.format("triton-skinny").replace("bf16", "fp32"), {Check("lora_matmul", "triton-skinny", "float32")}),
        (CUDA.format("serial"), {Check("lora_matmul", "cuda-serial", "bfloat16")}),
        ("tests/csrc/test_cuda_kernels.py::test_rank_grad[16-plain-fp16]", {Check("rank_grad", "cuda", "float16")}),
        (
            "tests/kernels/test_kernels.py::test_rank_grad[bf16_fp32_adapters-1-2-3-mask]",
            {Check("rank_grad", "triton", "bfloat16")},
        ),
        (
            "tests/kernels/test_kernels.py::test_every_tile_row[none-128x128]",
            {Check("lora_matmul", "triton-serial", "bfloat16")},
        ),
        ("tests/kernels/test_kernels.py::test_tile_order_visits_every_tile_once[1-1]", set()),
        (SKINNY.replace("bf16", "fp32"), {Check("lora_matmul", "triton-skinny", "float32")}),
    ],
)
def test_what_a_test_is_about(test: str, expected: set[Check]) -> None:
    assert set(outcomes.checks(test)) == expected


def test_a_familys_rank_grad_keeps_all_of_it_from_being_timed() -> None:
    test = "tests/csrc/test_cuda_kernels.py::test_rank_grad[16-plain-bf16]"
    assert set(outcomes.unfit({test: Outcome(test, "failed")})) == {"cuda-z_jobs", "cuda-serial"}


def test_what_runs_around_a_kernel_keeps_it_from_being_timed_only_if_it_ends_the_process() -> None:
    test = "tests/test_gpu_integration.py::test_patched_peft_is_peft[triton-skinny]"
    assert outcomes.unfit({test: Outcome(test, "failed")}) == {}
    assert set(outcomes.unfit({test: Outcome(test, "hung")})) == {"triton-skinny"}


def test_of_several_ends_the_worst_counts_and_of_those_the_one_with_a_reason() -> None:
    test = REAL.format("library")
    ends = [Outcome(test, end) for end in ("started", "passed", "failed", "lost", "crashed")]
    assert outcomes.by_test(ends)[test].outcome == "lost"
    assert outcomes.by_test(ends[:3])[test].outcome == "failed"


def test_a_test_that_began_and_never_ended_is_no_result() -> None:
    test = REAL.format("library")
    assert outcomes.tallies(outcomes.by_test([Outcome(test, "started")])) == {}


def picks(expression: str, test: str) -> bool:
    """Whether ``pytest -k`` would pick a test."""
    name = test.rpartition("/")[2].lower()
    words = re.sub(r"[\w.]+", lambda m: m[0] if m[0] in ("and", "or", "not") else str(m[0] in name), expression)
    return bool(eval(words))


def test_every_test_of_a_kernel_runs_in_one_stage() -> None:
    stages = [stage for stage in STAGES if stage.kind == "tests"]
    context = runner.Context(ROOT, Sizes(), KERNELS)
    files = sorted({word for stage in stages for word in stage.arguments(context) if word.endswith(".py")})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    counts: Counter[str] = Counter()
    for stage in stages:
        arguments = stage.arguments(context)
        expression = arguments[arguments.index("-k") + 1] if "-k" in arguments else "True"
        for test in collected:
            counts[test] += test.partition("::")[0] in arguments and (expression == "True" or picks(expression, test))
    assert len(collected) > 500
    assert [test for test in collected if counts[test] != 1] == []
    about = {check.kernel for test in collected for check in outcomes.checks(test) if check.verb == "lora_matmul"}
    assert set(KERNELS) - {"triton-serial"} <= about


def test_the_kernels_that_the_sanitizer_looks_at() -> None:
    functions = processes.kernel_functions()
    assert {"_middle_kernel", "_rank_update_kernel", "lora_matmul_kernel", "prepare_kernel"} <= set(functions)


@pytest.mark.skipif(build.driver_obstacle() is not None, reason=str(build.driver_obstacle()))
def test_what_measures_runs_on_the_stand_in_for_a_gpu(driven: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    build.driver()
    folder = str(build.FOLDER / "driver")
    for name, value in {
        "STAND_IN_REAL": "1",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH")))),
        "TRITON_LIBCUDA_PATH": folder,
        "TRITON_CACHE_DIR": str(build.FOLDER / "triton"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    driven.work.mkdir()
    sizes = Sizes(("64x32",), 24, "llama-tiny-1layers", 16, 1, 128, (64, 128), 1 << 20)
    kernels = ("library", "triton-skinny", "triton-portable")
    run = Run(driven.out, driven.work, 300.0, kernels, sizes, PYTHON, parallel=False, commit=COMMIT)
    assert run.run(only("facts", "ceilings", "sweep")) == 0, (driven.work / "sweep.log").read_text()
    sweep = json.loads((driven.work / "sweep.json").read_text())
    assert [(line["k"], line["kernel"]) for line in sweep["lines"]] == [
        (k, name)
        for k in (64, 128)
        for name in ("vendor", *(kernel.name for kernel in dispatch.KERNELS["lora_matmul"]))
        if name in ("vendor", *kernels)
    ]
    assert {line["status"] for line in sweep["lines"]} == {"ok"}
    facts = json.loads((driven.work / "facts.json").read_text())
    assert (facts["device_name"], facts["commit"], facts["gpu"]["capability"]) == (stand_in.NAME, COMMIT, "9.0")
    products = json.loads((driven.work / "ceilings.json").read_text())["products"]
    assert [(p["m"], p["k"], p["n"]) for p in products] == [(24, 64, 32)]


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.name in TIMED], ids=lambda stage: stage.name)
def test_the_benchmarks_know_the_options_of_a_stage(stage: Stage, tmp_path: Path) -> None:
    module, *options = stage.arguments(runner.Context(tmp_path, Sizes(), KERNELS))[1:]
    if module == "benchmarks":
        assert benchmarks([*options, "--list"]) == 0


def test_the_commit_is_the_variables_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTLORA_COMMIT", COMMIT)
    assert (described()["commit"], described()["dirty"]) == (COMMIT, False)
    monkeypatch.setenv("FASTLORA_COMMIT", f"{COMMIT}-dirty")
    assert (described()["commit"], described()["dirty"]) == (COMMIT, True)


def test_a_copy_inside_another_repository_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.records import environment

    monkeypatch.delenv("FASTLORA_COMMIT", raising=False)

    def answers(command: Sequence[str]) -> str:
        return "vendor/fastlora/benchmarks/records/" if "--show-prefix" in command else COMMIT

    monkeypatch.setattr(environment, "_run", answers)
    assert environment.commit() is None
