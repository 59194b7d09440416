"""Comparing two runs: what is flagged, what is not, and what is refused. Rows are made up; no time is asserted."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import FLOOR, MODES, Case, ModelCase
from benchmarks.layers import command as layers
from benchmarks.measure.runner import StopError
from benchmarks.records import environment
from benchmarks.records.files import ResultFile, read
from benchmarks.records.rows import ClaimRow, LayerRow, Measured, ModelRow, Row, Spread
from benchmarks.report import compare

SMALL, LARGE = Case("gpt2.attn", 256, 8, "bf16", 0.0), Case("llama3-8b.q", 512, 16, "bf16", 0.1)
MODEL = ModelCase("gpt2", 2, 128, 8, "fp32", 0.0, False)
MS = {FLOOR: 2.0, "plain": 4.0, "fastlora": 3.0}
CLAIM = ClaimRow("fewer parameters", "Table 2", "0.3M", "294,912", "computed", "holds", "2·12·768·2·8")
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")


def spread(ms: float, width: float = 0.01) -> Spread:
    return Spread((1 - width) * ms, ms, (1 + width) * ms)


def layer_rows(cases: Sequence[Case] = (SMALL, LARGE), noise: float = 0.01) -> list[LayerRow]:
    numbers = {"kept_bytes": 10_000, "peak_bytes": 50_000, "rounds": 9, "noise": noise}
    return [
        replace(LayerRow.of(case, name, mode), wall_ms=spread(ms), ratio=ms / MS[FLOOR], **numbers)
        for case in cases
        for name, ms in MS.items()
        for mode in MODES
    ]


def model_rows() -> list[ModelRow]:
    return [
        replace(ModelRow.of(MODEL, name), step_ms=spread(100 * ms), peak_bytes=10**6, noise=0.01)
        for name, ms in MS.items()
    ]


def slowed(rows: Iterable[LayerRow], factor: float, *arms: str) -> list[LayerRow]:
    """The named arms' times, or everybody's, multiplied; ratios follow unless the floor moved alike."""
    return [
        replace(
            row,
            wall_ms=Spread(*(factor * ms for ms in row.wall_ms)),
            ratio=row.ratio * factor if arms else row.ratio,
        )
        if row.wall_ms and row.ratio and row.arm in (arms or MS)
        else row
        for row in rows
    ]


def changed(rows: Iterable[Measured], arm: str, **changes: Any) -> list[Measured]:
    return [replace(row, **changes) if row.arm == arm else row for row in rows]


def write(path: Path, rows: Iterable[Row], cases: int | None = None, **changes: Any) -> Path:
    """A result file; ``cases`` is how many the run was to have."""
    groups = [(str(case), list(group)) for case, group in groupby(rows, lambda row: getattr(row, "case", "claims"))]
    described = environment.describe(torch.device("cpu"), "layers", {}, cases or len(groups))
    with ResultFile(path, described | changes) as file:
        for case, group in groups:
            file.append(case, group, {})
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args([str(argument) for argument in arguments]))


def refused(*arguments: object) -> str:
    with pytest.raises(StopError) as stop:
        run(*arguments)
    assert stop.value.status == 2
    return str(stop.value)


def flagged(out: str, verdict: str = "REGRESSION") -> list[str]:
    """The flagged lines of what was printed."""
    return [line for line in out.splitlines() if f"  {verdict}: " in line]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return write(tmp_path / "before.jsonl", layer_rows())


@pytest.mark.parametrize("rows", [layer_rows(), model_rows()], ids=["layers", "models"])
def test_a_run_beside_itself_flags_nothing(rows: list[Measured], tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    assert run(path, path) == 0
    out = capsys.readouterr().out
    assert f"regressions: 0, improvements: 0, rows: {len(rows)}; " in out
    assert "geometric mean of speed-ups: frozen 1.00, plain 1.00, fastlora 1.00" in out
    assert "floor itself moved" not in out
    assert "environment" not in out
    assert run(path, path, "--only-changes") == 0
    assert "llama3-8b.q" not in capsys.readouterr().out


@pytest.mark.parametrize("by", ["time", "ratio"])
def test_a_slowed_arm_is_flagged_and_nobody_else(by: str, before: Path, tmp_path: Path, capsys: Any) -> None:
    after = write(tmp_path / "after.jsonl", slowed(layer_rows(), 1.2, "fastlora"))
    assert run(before, after, "--by", by) == 1
    lines = flagged(out := capsys.readouterr().out)
    assert len(lines) == 2 * len(MODES)
    assert all("fastlora" in line and line.endswith("0.83  ±5.0%  REGRESSION: slower") for line in lines)
    assert "fastlora 0.83" in out.splitlines()[-1]
    assert run(after, before, "--by", by) == 0
    assert len(flagged(capsys.readouterr().out, "IMPROVEMENT")) == 2 * len(MODES)


def test_a_slowed_model_is_flagged(tmp_path: Path, capsys: Any) -> None:
    before = write(tmp_path / "before.jsonl", model_rows())
    rows = changed(model_rows(), "plain", step_ms=spread(500.0))
    assert run(before, write(tmp_path / "after.jsonl", rows), "--mode", "step") == 1
    assert ["plain" in line for line in flagged(capsys.readouterr().out)] == [True]


def test_the_least_change_that_counts_can_be_set(before: Path, tmp_path: Path) -> None:
    after = write(tmp_path / "after.jsonl", slowed(layer_rows(), 1.2, "fastlora"))
    assert run(before, after, "--threshold", "25") == 0
    assert run(before, write(after, slowed(layer_rows(), 1.04, "plain"))) == 0
    assert run(before, after, "--threshold", "3") == 1


@pytest.mark.parametrize("value", ["-1", "nan", "some"])
def test_a_threshold_that_is_none_is_told_what_was_expected(value: str, before: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(before, before, f"--threshold={value}")
    assert f"--threshold: expected a number of at least 0, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("loud", [{FLOOR, "plain"}, {"fastlora"}], ids=["the run's", "the row's own"])
@pytest.mark.parametrize("noisy", ["before", "after"])
def test_a_change_within_twice_the_noise_of_either_run_is_not_flagged(
    noisy: str, loud: set[str], tmp_path: Path
) -> None:
    def written(which: str, factor: float) -> Path:
        rows = [replace(row, noise=0.11 if which == noisy and row.arm in loud else 0.0) for row in layer_rows()]
        return write(tmp_path / which, slowed(rows, factor, "fastlora"))

    assert run(written("before", 1.0), written("after", 1.2)) == 0
    assert run(written("before", 1.0), written("after", 1.3)) == 1


def test_ranges_that_overlap_are_not_flagged_but_said(before: Path, tmp_path: Path, capsys: Any) -> None:
    rows = changed(layer_rows(), "fastlora", wall_ms=Spread(3.02, 3.9, 4.0))
    assert run(before, write(tmp_path / "after.jsonl", rows)) == 0
    assert "slower, but the ranges overlap" in capsys.readouterr().out
    assert run(before, write(tmp_path / "after.jsonl", changed(rows, "fastlora", kept_bytes=20_000))) == 1
    assert "REGRESSION: kept_bytes 9.8 KiB → 19.5 KiB; slower, but the ranges overlap" in capsys.readouterr().out


def test_faster_at_the_price_of_memory_is_a_regression(before: Path, tmp_path: Path) -> None:
    rows = changed(slowed(layer_rows(), 0.5, "plain"), "plain", peak_bytes=60_000)
    assert run(before, write(tmp_path / "after.jsonl", rows)) == 1


@pytest.mark.parametrize("status", ["absent", "wrong", "oom", "error"])
def test_what_no_longer_works_is_a_regression(status: str, before: Path, tmp_path: Path, capsys: Any) -> None:
    gone = {"status": status, "reason": "of some kind", "wall_ms": None, "ratio": None}
    after = write(tmp_path / "after.jsonl", changed(layer_rows([SMALL]), "plain", **gone))
    assert run(before, after) == 1
    lines = flagged(capsys.readouterr().out)
    assert len(lines) == len(MODES)
    assert all(line.endswith(f"REGRESSION: ok → {status}: of some kind") for line in lines)
    assert run(after, before) == 0
    assert len(flagged(capsys.readouterr().out, "IMPROVEMENT")) == len(MODES)
    assert run(after, after) == 0
    assert f"rows without numbers in either: {len(MODES)}" in capsys.readouterr().out


def test_what_fails_otherwise_than_before_is_said(tmp_path: Path, capsys: Any) -> None:
    failed = {"wall_ms": None, "ratio": None}
    rows = [changed(layer_rows(), "plain", status=status, **failed) for status in ("absent", "error")]
    assert run(*(write(tmp_path / f"{i}.jsonl", r) for i, r in enumerate(rows))) == 0
    assert "absent → error" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["kept_bytes", "peak_bytes"])
def test_memory_that_grew_by_more_than_a_percent_is_flagged(
    field: str, before: Path, tmp_path: Path, capsys: Any
) -> None:
    size = getattr(layer_rows()[0], field)
    assert (
        run(before, write(tmp_path / "same.jsonl", changed(layer_rows(), "plain", **{field: size * 101 // 100}))) == 0
    )
    after = write(tmp_path / "after.jsonl", changed(layer_rows(), "plain", **{field: 2 * size}))
    capsys.readouterr()
    assert run(before, after) == 1
    lines = flagged(capsys.readouterr().out)
    assert len(lines) == 2 * len(MODES)
    assert all("plain" in line and f"REGRESSION: {field} " in line for line in lines)
    assert run(after, before) == 0


def test_memory_from_nothing_is_flagged(tmp_path: Path) -> None:
    before = write(tmp_path / "before.jsonl", changed(layer_rows(), "plain", kept_bytes=0))
    assert run(before, write(tmp_path / "after.jsonl", changed(layer_rows(), "plain", kept_bytes=32))) == 1


def test_a_models_peak_is_flagged(tmp_path: Path) -> None:
    before = write(tmp_path / "before.jsonl", model_rows())
    assert run(before, write(tmp_path / "after.jsonl", changed(model_rows(), "fastlora", peak_bytes=1_020_000))) == 1


def test_by_ratio_a_slow_down_of_everything_cancels(before: Path, tmp_path: Path, capsys: Any) -> None:
    after = write(tmp_path / "after.jsonl", slowed(layer_rows(), 1.5))
    assert run(before, after) == 1
    assert "moved by more than noise in 6 of 6 cases and modes (speed-up 0.67 over all): --by ratio" in (
        capsys.readouterr().out
    )
    assert run(before, after, "--by", "ratio") == 0
    assert run(before, write(after, slowed(slowed(layer_rows(), 1.5), 1.6, "plain")), "--by", "ratio") == 1
    assert run(before, write(after, slowed(slowed(layer_rows(), 1.5), 1.4, "plain")), "--by", "ratio") == 0
    assert "the bands there are as wide as it moved" in capsys.readouterr().out


def test_by_ratio_has_ranges_that_scale_alike(before: Path, tmp_path: Path) -> None:
    rows = changed(layer_rows(), "plain", wall_ms=spread(4.0, 0.5), ratio=2.4)
    assert run(before, write(tmp_path / "after.jsonl", rows), "--by", "ratio") == 0
    rows = changed(layer_rows(), "plain", wall_ms=spread(4.0, 0.1), ratio=2.4)
    assert run(before, write(tmp_path / "after.jsonl", rows), "--by", "ratio") == 1


def test_device_time_counts_where_both_have_it(tmp_path: Path) -> None:
    both = [replace(row, wall_ms=spread(30.0), device_ms=row.wall_ms) for row in layer_rows()]
    before = write(tmp_path / "before.jsonl", both)
    assert run(before, write(tmp_path / "after.jsonl", changed(both, "plain", wall_ms=spread(60.0)))) == 0
    assert run(before, write(tmp_path / "after.jsonl", changed(both, "plain", device_ms=spread(6.0)))) == 1
    assert run(before, write(tmp_path / "after.jsonl", changed(both, "plain", device_ms=None))) == 0


def test_rows_of_one_run_alone_are_counted_and_named(before: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [row for row in layer_rows() if row.case == SMALL and row.arm != "plain"]
    after = write(tmp_path / "after.jsonl", rows)
    assert run(before, after) == 0
    assert f"rows only before: 12: plain (3); {LARGE} (9)" in capsys.readouterr().out
    assert run(after, before, "--arm", "fastlora", "--mode", "step") == 0
    assert f"rows only after: 1: {LARGE} (1)" in capsys.readouterr().out


def test_an_interrupted_run_is_compared_as_far_as_it_got(before: Path, tmp_path: Path, capsys: Any) -> None:
    after = write(tmp_path / "after.jsonl", slowed(layer_rows(), 1.2, "plain"), cases=5)
    with after.open("r+b") as file:
        file.truncate(after.stat().st_size - 100)
    assert run(before, after) == 1
    out = capsys.readouterr().out
    assert "1 of 5 cases: it was cut short" in out
    assert len(flagged(out)) == len(MODES)


def test_options_select(before: Path, tmp_path: Path, capsys: Any) -> None:
    after = write(tmp_path / "after.jsonl", slowed(layer_rows(), 1.2, "plain"))
    assert run(before, after, "--arm", FLOOR, "fastlora") == 0
    capsys.readouterr()
    assert run(before, after, "--arm", "plain", "--mode", "backward", "--only-changes") == 1
    out = capsys.readouterr().out
    assert len(flagged(out)) == 2
    assert ", rows: 2; " in out
    assert "expected of frozen, plain, fastlora" in refused(before, after, "--arm", "nonsense")
    assert run(before, after, "--provider", "fastlora") == 0


def test_options_select_layers_models_and_ranks(before: Path, tmp_path: Path, capsys: Any) -> None:
    after = write(tmp_path / "after.jsonl", [*layer_rows([SMALL]), *slowed(layer_rows([LARGE]), 1.2, "plain")])
    assert run(before, after) == 1
    capsys.readouterr()
    for option in (("--layer", SMALL.layer), ("--rank", SMALL.r)):
        assert run(before, after, *option) == 0
        assert LARGE.layer not in capsys.readouterr().out
    assert run(before, after, "--layer", SMALL.layer, LARGE.layer, "--rank", SMALL.r, LARGE.r) == 1
    assert "--layer nonsense: in neither run; expected of gpt2.attn, llama3-8b.q" in refused(
        before, after, "--layer", "nonsense"
    )
    assert "--rank 3: in neither run; expected of 8, 16" in refused(before, after, "--rank", 3)
    models = write(tmp_path / "models.jsonl", model_rows())
    assert run(models, models, "--layer", MODEL.model, "--rank", MODEL.r) == 0


def test_only_changes_prints_the_flagged_rows(before: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(before, write(tmp_path / "after.jsonl", slowed(layer_rows(), 1.2, "plain")), "--only-changes") == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith((SMALL.layer, LARGE.layer))]
    assert len(rows) == 2 * len(MODES)
    assert all("plain" in row for row in rows)


def test_where_the_machine_stalled_nothing_is_judged_and_it_is_said(before: Path, tmp_path: Path, capsys: Any) -> None:
    stalled = [replace(row, wall_ms=Spread(10.0, 24.0, 90.0)) for row in layer_rows()]
    assert run(before, write(tmp_path / "stalled.jsonl", stalled)) == 0
    out = capsys.readouterr().out
    assert out.count("slower, but the machine stalled") == len(stalled)
    states = f"rows in which the machine stalled 0 → {len(stalled)}, repeats spread by 2% → 333%"
    assert f"the machines were in different states ({states})" in out
    assert "--by ratio" in out


@pytest.mark.parametrize(("load", "differs"), [(0.1, False), (0.9, False), (1.9, True)])
def test_loads_that_differ_are_said(load: float, differs: bool, tmp_path: Path, capsys: Any) -> None:
    quiet = write(tmp_path / "quiet.jsonl", layer_rows(), load_average=0.1, cpu_count=2)
    other = write(tmp_path / "other.jsonl", layer_rows(), load_average=load, cpu_count=2)
    assert run(quiet, other) == 0
    assert (f"load 0.1 on 2 cores → {load:.1f} on 2 cores" in capsys.readouterr().out) == differs


def test_environments_are_told_apart(before: Path, tmp_path: Path, capsys: Any) -> None:
    after = write(tmp_path / "after.jsonl", layer_rows(), threads=64, commit="abcdef0123", settings={"rounds": 3})
    assert run(before, after) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("environment"))
    assert line == f"environment: threads: {torch.get_num_threads()} → 64"


def test_json_holds_the_comparison(before: Path, tmp_path: Path) -> None:
    rows = slowed(layer_rows([SMALL]), 1.2, "plain")
    path = tmp_path / "comparison.jsonl"
    assert run(before, write(tmp_path / "after.jsonl", rows), "--json", path) == 1
    first, *records, last = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (first["record"], first["by"], first["before"]) == ("comparison", "time", str(before))
    pairs = [record for record in records if record["record"] == "pair"]
    assert len(pairs) == len(rows)
    assert {pair["arm"] for pair in pairs if pair["verdict"] == "regression"} == {"plain"}
    assert pairs[0]["before"]["p50"] == 2.0
    assert len([record for record in records if record["record"] == "only"]) == len(rows)
    assert last["plain"] == pytest.approx(1 / 1.2)
    assert "one of the two" in refused(before, before, "--json", before)
    assert "cannot be written" in refused(before, before, "--json", tmp_path / "no" / "such.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with an environment record"),
        (b"\xff\xfe\n", "no result file of this package"),
        (b'{"some": "json"}\n', "no result file of this package"),
        (b"case,ms\nx,1\n", "no result file of this package"),
        (b'{"record": "environment"}\n{"record": "row"}\n', "line 2: unknown record 'row'"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_foreign_files_are_refused(content: bytes, message: str, side: int, before: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(content)
    said = refused(*((foreign, before) if side == 0 else (before, foreign)))
    assert str(foreign) in said
    assert message in said
    assert "expected what `python -m benchmarks layers --json` writes" in said


def test_runs_that_have_nothing_to_compare_are_refused(before: Path, tmp_path: Path) -> None:
    claims = write(tmp_path / "claims.jsonl", [CLAIM])
    assert f"{claims} has no finished case" in refused(before, claims)
    models = write(tmp_path / "models.jsonl", model_rows())
    assert "have no row in common" in refused(before, models)
    assert "have no row in common" in refused(models, models, "--mode", "forward")
    assert "only layers have a frozen floor" in refused(models, models, "--by", "ratio")


def test_claims_beside_layers_are_ignored(before: Path, tmp_path: Path) -> None:
    assert run(before, write(tmp_path / "mixed.jsonl", [*layer_rows(), CLAIM])) == 0


def test_missing_files_are_refused(before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "neither no.jsonl nor nowhere is a file" in refused("no.jsonl", "nowhere")
    said = refused(before, "no.jsonl")
    assert f"no.jsonl is neither a file nor a git revision where {before} lies (git: " in said
    assert "not a git repository" in said


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with two states of ``results/rows.jsonl``: the older one is quicker."""
    folder = tmp_path / "repository"
    path = folder / "results" / "rows.jsonl"
    subprocess.run([*GIT, "init", "--quiet", str(folder)], check=True)
    for name, factor in (("older", 1.0), ("newer", 1.2)):
        write(path, slowed(layer_rows(), factor, "fastlora"))
        for command in (["add", "."], ["commit", "--quiet", "--message", name], ["tag", name]):
            subprocess.run([*GIT, *command], cwd=folder, check=True)
    return path


@pytest.mark.parametrize("inside", [True, False])
def test_a_revision_is_the_file_as_committed(
    inside: bool, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    name: object = repository
    if inside:
        monkeypatch.chdir(repository.parent)
        name = repository.name
    assert run("older", name) == 1
    assert f"before  {name} at older, " in capsys.readouterr().out
    assert run("HEAD~1", name) == 1
    assert run("HEAD", name) == 0
    assert run(name, "older") == 0
    assert f"after   {name} at older, " in capsys.readouterr().out


def test_a_revision_from_before_the_fields_had_their_names_is_read(repository: Path, capsys: Any) -> None:
    now = repository.read_text(encoding="utf-8")
    then = now.replace('"arm": ', '"provider": ').replace('"kernel": ', '"backend": ')
    repository.write_text(then, encoding="utf-8")
    subprocess.run([*GIT, "commit", "--quiet", "--all", "--message", "then"], cwd=repository.parent, check=True)
    repository.write_text(now, encoding="utf-8")
    assert run("HEAD", repository) == 0
    assert f"regressions: 0, improvements: 0, rows: {2 * len(MS) * len(MODES)}" in capsys.readouterr().out


def test_a_revision_without_the_file_is_refused(repository: Path) -> None:
    other = write(repository.with_name("other.jsonl"), layer_rows())
    said = refused("older", other)
    assert said == f"{other} is not committed at older, as local results never are: give the file of an earlier run"
    assert "newest is neither a file nor a git revision" in refused(repository, "newest")


def test_a_file_wins_over_a_revision_of_its_name(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.parent)
    write(Path("older"), slowed(layer_rows(), 1.2, "fastlora"))
    assert run("older", repository.name) == 0


def test_a_real_run(tmp_path: Path) -> None:
    path, slow = tmp_path / "rows.jsonl", tmp_path / "slow.jsonl"
    parser = argparse.ArgumentParser()
    layers.add_arguments(parser)
    axes = ["--layer", "32x48", "--tokens", "8", "--rank", "4", "--dtype", "fp32", "--dropout", "0", "--rounds", "2"]
    options = ["--device", "cpu", "--arm", "plain", "--json", str(path)]
    assert layers.run(parser.parse_args([*axes, *options])) == 0
    assert run(path, path) == 0
    results = read(path)
    rows = [row for row in results.rows if isinstance(row, LayerRow)]
    still = [replace(row, noise=0.0, wall_ms=spread(row.wall_ms.p50)) for row in rows if row.wall_ms]
    assert run(write(path, still), write(slow, slowed(still, 2.0, "plain"))) == 1
