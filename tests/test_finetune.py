"""The example's fine-tune, at its smallest: what it checks, writes and says when something is wrong."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("FASTLORA_BACKEND", "library")  # what a CPU runs; an interpreted kernel would take minutes
    return importlib.import_module("finetune")


def run_tiny(example: ModuleType, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    status = example.main(["--preset", "tiny", "--out", str(out), *flags])
    return status, json.loads((out / "finetune.json").read_text())


def test_finetune_passes_its_own_checks_and_repeats(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, results = run_tiny(example, tmp_path)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "FAILED" not in printed
    assert results["curves"]["compared"]
    assert results["curves"]["coincide"]
    assert results["curves"]["max_relative_difference"] < 1e-4
    assert results["adapter"]["loaded_equal"]
    assert results["adapter"]["merged_equal"]
    assert results["adapter"]["unmerged_equal"]
    assert 0 < results["adapter"]["adapter_bytes"] < results["adapter"]["model_bytes"]
    plain, fast, full = results["rows"]
    assert [row["variant"] for row in results["rows"]] == ["plain", "fastlora", "full"]
    assert plain["trainable"] == fast["trainable"] < full["trainable"]
    assert fast["peak_bytes"] <= 1.01 * plain["peak_bytes"]
    for row in results["rows"]:
        assert row["held_out_after"] < row["held_out_before"]
        assert row["tokens_per_second"] > 0
    pytest.importorskip("matplotlib")
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")

    _, again = run_tiny(example, tmp_path)
    assert again["losses"] == results["losses"]


def test_finetune_with_dropout_claims_nothing_about_the_curves(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, results = run_tiny(example, tmp_path, "--dropout", "0.1", "--steps", "4")
    assert status == 0
    assert not results["curves"]["compared"]
    assert "each draw their own masks" in capsys.readouterr().out


def test_finetune_fails_when_the_curves_part(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example.LoRALinear, "scale", property(lambda layer: 1.1 * layer.lora_alpha / layer.r))
    status, results = run_tiny(example, tmp_path, "--steps", "12")
    assert status == 1
    assert not results["curves"]["coincide"]
    assert "FAILED  loss curves" in capsys.readouterr().out


def test_finetune_reads_any_file(example: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "bytes.bin"
    text.write_bytes(bytes(range(256)) * 8)
    status, results = run_tiny(example, tmp_path, "--text", str(text), "--adapt-text", str(text), "--steps", "4")
    assert status == 0
    assert list(results["settings"]["texts"]) == [str(text)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "no/such/file"], "cannot read no/such/file: No such file or directory"),
        (["--text", "{empty}"], "holds 0 bytes: a context of 32 needs at least"),
        (["--adapt-text", "{empty}"], "holds 0 bytes: a context of 32 needs at least"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1, got 1.0"),
        (["--steps", "3"], "--steps must be above the 3 of the warm-up, got 3"),
        (["--pretrain-steps", "2"], "--pretrain-steps must be above the 3 of the warm-up, got 2"),
        (["--device", "abacus"], "no such device here"),
    ],
)
def test_finetune_says_what_is_wrong(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(SystemExit) as exit_:
        example.main(["--preset", "tiny", "--out", str(tmp_path), *(flag.format(empty=empty) for flag in flags)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_finetune_interrupted(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "train", interrupt)
    assert example.main(["--preset", "tiny", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_adapter_that_does_not_fit_is_refused(example: ModuleType) -> None:
    model = torch.nn.Sequential(example.LoRALinear(8, 8, r=2))
    adapter = example.adapter_of(model)
    with pytest.raises(ValueError, match=r"does not fit this model: 0\.lora_B"):
        example.load_adapter(model, {name: tensor for name, tensor in adapter.items() if "lora_A" in name})
