"""The report: what it renders, that it is the same twice, and that what is committed is not stale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import FLOOR, Case, ModelCase
from benchmarks.records import environment, glance, plots
from benchmarks.records.files import RESULTS, ResultFile
from benchmarks.records.rows import ClaimRow, LayerRow, ModelRow, Spread
from benchmarks.report import command as report
from benchmarks.report import markdown

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("gpt2.attn", 256, 8, "bf16", 0.0)
MODEL = ModelCase("gpt2", 2, 128, 8, "fp32", 0.0, False)


def layer(arm, p50, case=CASE, **changes):
    row = LayerRow.of(case, arm, "step")
    return replace(row, wall_ms=Spread(p50, p50, p50), ratio=p50 / 2, **changes)


def model(arm, tokens, case=MODEL, **changes):
    return replace(
        ModelRow.of(case, arm),
        step_ms=Spread(1.0, 1.0, 1.0),
        tokens_per_second=tokens,
        parameters=1000,
        trained_parameters=100,
        weight_bytes=4000,
        gradient_bytes=400,
        optimizer_bytes=800,
        activation_bytes=2048,
        peak_bytes=2**20,
        **changes,
    )


LAYERS = [
    layer(FLOOR, 2.0, noise=0.01),
    layer("plain", 3.0),
    layer("peft-same", 6.0, kept_bytes=2048, peak_bytes=4 << 20),
    layer("fastlora", 2.5, kept_bytes=1024, peak_bytes=3 << 20, kernel="library"),
    layer("fastlora-library", 2.5, kernel="library"),
    replace(LayerRow.of(CASE, "addmm", "step"), status="absent", reason="takes no dropout"),
]


def write(folder, command, cases):
    """A finished run of these cases, as the subcommand would leave it."""
    path = folder / f"{command}-quick.jsonl"
    record = environment.describe(torch.device("cpu"), command, {"profile": "quick"}, len(cases))
    with ResultFile(path, record) as file:
        for i, rows in enumerate(cases):
            file.append(f"case {i}", rows, {})
    return path


@pytest.fixture
def results(tmp_path):
    """Results of every kind, with enough sizes for every picture."""
    folder = tmp_path / "cpu"
    by_tokens = [[layer(name, 3.0, CASE._replace(m=m)) for name in (FLOOR, "fastlora")] for m in (64, 128, 512)]
    write(folder, "layers", [LAYERS, *by_tokens])
    sweep = [
        [model("full", 90.0, case), model("fastlora", 100.0, case)]
        for case in (MODEL._replace(sequence=s) for s in (128, 256, 512))
    ]
    sweep[-1][0] = replace(ModelRow.of(sweep[-1][0].case, "full"), status="oom", reason="out of memory")
    write(folder, "model", sweep)
    claim = ClaimRow("fewer parameters", "Table 2", "0.3M", "294,912", "computed", "holds", "2·12·768·2·8")
    write(folder, "paper", [[claim]])
    return tmp_path


def test_a_layer_table_holds_the_numbers():
    table = markdown.layers(LAYERS).splitlines()
    assert table[0].startswith("| layer | M |")
    assert "addmm" not in table[0]
    least = 1 + 1.5 * (8 / 2304 + 8 / 768)
    cells = ["gpt2.attn", "256", "768 → 2304", "8", "bf16", "0", "2", f"{least:.3f}"]
    cells += ["1.50", "3.00", "**1.25**", "1.0 KiB / 2.0 KiB", "3.0 MiB / 4.0 MiB"]
    assert table[2] == f"| {' | '.join(cells)} |"
    assert "- noise: the frozen layer's second timing lay within 1.0% of its first" in table
    assert (
        "- `peft-same` over `fastlora`, step, geometric mean: 2.40 (faster in 1, slower in 0, within noise in 0; "
        "worst 2.40)" in table
    )
    assert "; `plain`: F.linear(x, w, bias)" in f"; {table[5].removeprefix('- arms: ')}"


def test_a_model_table_names_the_best_and_who_ran_out():
    rows = [model("peft-same", 90.0), model("fastlora", 100.4)]
    rows.append(replace(ModelRow.of(MODEL, "full"), status="oom", reason="out of memory"))
    table = markdown.models(rows).splitlines()
    assert table[2] == ("| gpt2 | 2 × 128 | 8 | fp32 | 0 | off | 90 ≈ | oom | **100** | - | 1.0 MiB / oom / 1.0 MiB |")
    assert "| fastlora | 100 | 3.9 KiB | 400 B | 800 B | 2.0 KiB | 1.0 MiB |" in markdown.memory(rows)


def test_a_layer_table_in_brief_names_the_best_of_the_others():
    dropped = CASE._replace(dropout=0.1)
    rows = [*LAYERS, layer("full", 2.1), layer(FLOOR, 2.0, dropped), layer("fastlora", 2.5, dropped)]
    table = markdown.layers_in_brief(rows).splitlines()
    assert table[2] == "| gpt2.attn, bf16 | 256 | 768 → 2304 | 8 | **1.25** | 3.00 | plain 1.50 |"
    assert table[3] == "| gpt2.attn, bf16, dropout 0.1 | 256 | 768 → 2304 | 8 | **1.25** | - | - |"
    assert markdown.layers(rows).splitlines()[7:] == table[7:]
    assert table[5].startswith("- columns: a step over the frozen layer's")
    assert "`peft-same`: PEFT, adapters in the base's dtype; `plain`: " in table[6]


def test_a_model_table_in_brief_says_what_is_missing():
    case = MODEL._replace(checkpointing=True)
    rows = [model("full", 90.0, case, noise=0.01), model("fastlora", 100.4, case), model("peft-fp32", 80.0, case)]
    rows.append(replace(ModelRow.of(case, "peft-same"), status="oom", reason="out of memory"))
    assert markdown.models_in_brief(rows).splitlines()[2] == (
        "| gpt2, R = 8, fp32, checkpointing | 2 × 128 | 90 ≈ | oom | **100** | 1.0 MiB / oom / 1.0 MiB | 1.0% |"
    )


def test_the_tables_of_the_readme_have_at_most_seven_columns(results):
    section = report.readme_section(report.devices(results), results)
    tables = [line for line in section.splitlines() if line.startswith("|")]
    assert len(tables) > 8
    assert {line.count("|") - 1 for line in tables} == {7}
    assert "[cpu](cpu/README.md)" in section


def test_a_case_in_which_the_machine_stalled_is_marked_and_in_no_mean():
    stalled = CASE._replace(m=512)
    rows = [*LAYERS, layer("peft-same", 60.0, stalled)]
    rows.append(replace(layer("fastlora", 2.5, stalled), wall_ms=Spread(2.0, 2.5, 4.1)))
    table = markdown.layers_in_brief(rows)
    assert "| gpt2.attn, bf16 | 512 | 768 → 2304 | 8 | 1.25? | 30.00 | peft-same 30.00 |" in table
    assert "worst 2.40; the machine stalled in 1 more)" in table
    assert f"- ?: the machine stalled while these ran, and they are in no mean: {stalled}" in table.splitlines()


def test_forced_arms_are_shown_where_they_ran_something_else():
    forced = [layer("fastlora-triton", 2.2, kernel="triton", tile="serial 128x256x64, 8 warps, 3 stages")]
    heads = markdown.layers([*LAYERS, *forced]).splitlines()[0].split(" | ")
    assert heads[8:-2] == ["plain", "peft-same", "fastlora-triton", "fastlora"]


def test_noise_tells_the_same_code_apart_from_itself():
    rows = [*LAYERS[:-2], layer("fastlora-library", 2.6, kernel="library")]
    assert "- and fastlora's own, the same kernel chosen and forced: within 4.0%" in markdown.layers(rows)


def test_the_host_is_seen_where_wall_and_device_were_timed():
    on_gpu = [replace(row, device_ms=Spread(1.0, 2.0, 3.0)) for row in (layer(FLOOR, 2.0), layer("fastlora", 2.5))]
    line = (
        "- wall time of a step over the device's (geometric mean; above 1 the host is seen): frozen 1.00, fastlora 1.25"
    )
    assert line in markdown.layers(on_gpu)
    assert "wall time" not in markdown.layers(LAYERS)


def test_absences_give_each_reason_once():
    assert markdown.absences(2 * LAYERS) == "- `addmm` absent: takes no dropout"


def test_report_twice_gives_identical_files(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.START}\nold\n{report.END}\n\nafter\n", encoding="utf-8")
    command = ["report", "--readme", str(readme), "--results", str(results)]
    assert main(command) == 0
    once = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert main(command) == 0
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == once
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\n{report.START}\n")
    assert text.endswith(f"{report.END}\n\nafter\n")
    assert "old" not in text
    assert report.NO_GPU in text
    page = (results / "cpu" / "README.md").read_text(encoding="utf-8")
    assert all(words in page for words in ("## layers-quick", "## model-quick", "## paper-quick", "fewer parameters"))


def test_every_picture_is_drawn_and_carries_its_source(results):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    drawn = [picture for path in sorted(results.glob("cpu/*.jsonl")) for picture in plots.save(path)]
    assert [picture.name for picture in drawn] == [
        "layers-quick-glance.png",
        "layers-quick.png",
        "layers-quick-by-tokens.png",
        "model-quick-glance.png",
        "model-quick-throughput.png",
        "model-quick-memory.png",
    ]
    for picture in drawn:
        source = results / "cpu" / f"{'-'.join(picture.stem.split('-')[:2])}.jsonl"
        assert image.open(picture).text["Description"] == plots.digest(source)


def test_a_glance_has_the_numbers_the_machine_and_no_bar_where_it_stalled():
    pytest.importorskip("matplotlib")
    other = CASE._replace(m=512)
    stalled = [layer("peft-same", 6.0, other), replace(layer("fastlora", 2.5, other), wall_ms=Spread(2.0, 2.5, 5.0))]
    drawn = glance.at_a_glance([*LAYERS, *stalled], "the machine's name")
    (panel,) = drawn.axes
    assert [text.get_text().strip() for text in panel.texts] == ["1.50", "3.00", "1.25"]
    assert len(panel.patches) == 3
    assert [label.get_text().endswith("(the machine stalled)") for label in panel.get_yticklabels()] == [False, True]
    assert drawn.legends[0].get_title().get_text().endswith(", the machine's name")
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["plain", "peft-same", "fastlora"]
    assert glance.at_a_glance(LAYERS[:3], "") is None


def test_no_mark_hides_another():
    pytest.importorskip("matplotlib")
    rows = [replace(row, ratio=2.0) for row in LAYERS if row.arm != FLOOR and row.ratio]
    (panel,) = plots.ratio_by_layer(rows, "a machine").axes
    marks = [tuple(line.get_xydata()[0]) for line in panel.lines if line.get_label() in {row.arm for row in rows}]
    assert len(set(marks)) == len(marks) == len(rows)


def test_no_picture_of_other_rows_stays(results):
    pytest.importorskip("matplotlib")
    path = results / "cpu" / "layers-quick.jsonl"
    drawn = plots.save(path)
    foreign = path.with_name("layers-quick-memory.png")
    foreign.write_bytes(b"not ours")
    path.write_bytes(write(results / "other", "layers", [LAYERS]).read_bytes())
    assert plots.save(path) == drawn[:2]
    assert [picture.exists() for picture in drawn] == [True, True, False]
    plots.discard(path)
    assert sorted(results.glob("cpu/*.png")) == [foreign]


def test_a_gpu_result_silences_the_missing_gpu_line(results):
    path = results / "cpu" / "layers-quick.jsonl"
    folder = results / "nvidia-h200"
    folder.mkdir()
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    gpu = json.dumps(json.loads(header) | {"device": "cuda", "device_name": "NVIDIA H200"})
    (folder / path.name).write_text("\n".join([gpu, *rows, ""]), encoding="utf-8")
    rendered = report.readme_section(report.devices(results), results)
    assert report.NO_GPU not in rendered
    assert rendered.startswith("**NVIDIA H200**")


@pytest.mark.parametrize("text", ["", report.START, f"{report.END}{report.START}", 2 * (report.START + report.END)])
def test_report_without_its_markers_changes_nothing(text, results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    assert main(["report", "--readme", str(readme), "--results", str(results)]) == 2
    assert readme.read_text(encoding="utf-8") == text
    assert report.START in capsys.readouterr().err


def test_report_into_no_file_says_what_it_must_hold(results, tmp_path, capsys):
    nowhere = tmp_path / "new" / "README.md"
    assert main(["report", "--readme", str(nowhere), "--results", str(results)]) == 2
    assert f"--readme {nowhere}: expected a file that is there and holds {report.START}" in capsys.readouterr().err


def test_report_without_results_changes_nothing(tmp_path, capsys):
    readme, nowhere = tmp_path / "README.md", tmp_path / "nowhere"
    text = f"{report.START}\nwhat was measured\n{report.END}\n"
    readme.write_text(text, encoding="utf-8")
    assert main(["report", "--readme", str(readme), "--results", str(nowhere)]) == 2
    assert readme.read_text(encoding="utf-8") == text
    assert f"--results {nowhere}: expected FOLDER/<device>/*.jsonl, found none" in capsys.readouterr().err


STALE = "stale: run `python -m benchmarks report` and commit what it writes"


def test_what_is_committed_is_not_stale():
    folders = report.devices(RESULTS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.replace_between_markers(readme, report.readme_section(folders, ROOT)) == readme, STALE
    for folder, runs in folders.items():
        assert (folder / "README.md").read_text(encoding="utf-8") == report.page(runs), STALE


def test_committed_pictures_are_not_stale():
    image = pytest.importorskip("PIL.Image")
    for path in (path for runs in report.devices(RESULTS).values() for path in runs):
        pictures = [path.with_name(f"{path.stem}{suffix}.png") for suffix in plots.CAPTIONS]
        found = [picture for picture in pictures if picture.exists()]
        assert found or path.stem.startswith("paper"), path
        assert {image.open(picture).text.get("Description") for picture in found} <= {plots.digest(path)}, STALE


def test_the_host_table_has_every_arm_and_mode() -> None:
    rows = [
        replace(LayerRow.of(Case("host", 1, 8, "fp32", p), arm, mode), wall_ms=Spread(0.01, 0.02, 0.03))
        for p in (0.0, 0.1)
        for arm in ("frozen", "fastlora", "patched")
        for mode in ("forward", "step")
    ]
    table = markdown.host(rows).splitlines()
    assert table[2] == "| arm | fp32: forward | fp32: step | fp32, dropout 0.1: forward | fp32, dropout 0.1: step |"
    assert table[-1] == "| `fastlora` | 20.0 | 20.0 | 20.0 | 20.0 |"
    assert [line.split(" ")[1] for line in table[4:]] == ["`frozen`", "`patched`", "`fastlora`"]
    assert markdown.host([replace(row, layer="gpt2.attn") for row in rows]) == ""
