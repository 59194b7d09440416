"""``python -m fastlora.info``: the environment, the tables in use, and what would run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import info
from fastlora.backends import dispatch, measured
from fastlora.backends.machine import machine_of
from fastlora.backends.measured import Bucket, Proof, Table

CPU = torch.device("cpu")


def lines() -> list[str]:
    return info.report().splitlines()


def test_it_names_versions_variables_and_the_device() -> None:
    report = lines()
    assert report[0].startswith(f"fastlora {fastlora.__version__}, Python ")
    assert f"  torch         {torch.__version__}" in report
    assert {name for name in info.VARIABLES if any(line.split()[:1] == [name] for line in report)} == set(
        info.VARIABLES
    )
    assert "  FASTLORA_TABLE          none" in report
    if not torch.cuda.is_available():
        assert "  no CUDA GPU: everything runs on the CPU" in report


def test_every_variable_that_is_read_is_named() -> None:
    texts = [path.read_text(encoding="utf-8") for path in Path(fastlora.__file__).parent.rglob("*.py")]
    read = {name for text in texts for name in re.findall(r"environ[\w.]*[(\[]\"(FASTLORA_\w+)\"", text)}
    assert {"FASTLORA_BACKEND", "FASTLORA_CACHE", "FASTLORA_TABLE"} <= read <= set(info.VARIABLES)


def test_an_amd_gpu_is_named_by_its_own_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    monkeypatch.setattr(info.triton, "capability_of", lambda device: 0x942)
    assert info._gpu(torch.device("cuda", 0)) == "AMD Instinct MI300X, gfx942"


def test_without_a_table_it_names_the_command() -> None:
    assert "  table of cpu            none: `python -m fastlora.tune` makes one" in lines()


def test_a_table_is_named_with_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"library": [1.0, 1.0, 1.0], "library:last": [0.5, 0.5, 0.5]}
    bucket = Bucket(
        "lora_matmul", "forward", "bfloat16", "bfloat16", False, 256, 1024, 1024, 16, times, "library", "library:last",
        2.0, "2026-11-24T10:00:00+00:00",
    )  # fmt: skip
    proof = Proof("lora_matmul", "triton-portable", "float32", 10, True, "", "2026-11-25T10:00:00+00:00")
    path = tmp_path / "table.json"
    path.write_text(Table(machine_of(CPU), (proof,), (bucket,)).text())
    monkeypatch.setenv("FASTLORA_TABLE", str(path))
    dispatch.forget()
    report = lines()
    assert f"  table of cpu            {path}: 1 proofs, 1 sizes until 2026-11-25" in report
    at = report.index(
        "lora_matmul on cpu: M=256 K=1024 N=1024 R=16 bfloat16, adapters bfloat16, no dropout -> library:last"
    )
    assert report[at + 1] == f"  2.00 x as fast as the next: measured at M=256 K=1024 N=1024 R=16, 2026-11-24, {path}"


def test_a_table_that_cannot_be_used_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.json").write_text("[]")
    monkeypatch.setenv("FASTLORA_TABLE", str(tmp_path / "table.json"))
    dispatch.forget()
    assert measured.sources_of(CPU) == ()
    assert "  table of cpu            none: `python -m fastlora.tune` makes one" in lines()
