"""``python -m fastlora.info``: the environment, the tables in use, and what would run."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import __main__ as command
from fastlora import info, variables
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


def test_an_unknown_variable_is_named_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKENDS", "triton")
    monkeypatch.setenv("FASTLORA_ZZ", "1")
    monkeypatch.setenv("FASTLORA_COMMIT", "0" * 40)
    assert [line.split()[:1] + line.split(": ")[1:] for line in lines() if "is ignored" in line] == [
        ["FASTLORA_BACKENDS", "did you mean FASTLORA_BACKEND?"],
        ["FASTLORA_ZZ", f"there are {', '.join(variables.READ)}"],
    ]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_the_first_call_warns_of_an_unknown_variable_once(
    kernel: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTLORA_TABEL", "none")
    monkeypatch.setenv("FASTLORA_BACKEND", kernel)
    variables.warn_of_unknown.cache_clear()
    layer = fastlora.LoRALinear(12, 10, r=3)
    with caplog.at_level(logging.WARNING, "fastlora"):
        for _ in range(3):
            layer(torch.randn(5, 12))
            dispatch.forget()
    assert [record.getMessage() for record in caplog.records] == [
        "FASTLORA_TABEL is no variable of fastlora's, and is ignored: did you mean FASTLORA_TABLE?"
    ]


def test_every_variable_that_is_set_in_a_program_is_known() -> None:
    root = Path(__file__).parents[1]
    texts = [path.read_text(encoding="utf-8") for folder in ("benchmarks", "csrc", "tests") for path in
             sorted((root / folder).rglob("*.py"))]  # fmt: skip
    read = {name for text in texts for name in re.findall(r"environ[\w.]*[(\[]\"(FASTLORA_\w+)\"", text)}
    assert {"FASTLORA_BUILD_CUDA", "FASTLORA_COMMIT"} <= read <= {*variables.READ, *variables._ELSEWHERE}


def test_what_is_wrong_and_what_kernels_answer_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    kernels = [kernel.name for kernel in dispatch.KERNELS["lora_matmul"]]
    assert [line.split()[0] for line in lines()[-len(kernels) :]] == kernels
    assert sum(line.startswith("lora_matmul on cpu") for line in lines()) == 3
    monkeypatch.setenv("FASTLORA_BACKEND", "tritn")
    assert sum("is unknown" in line for line in lines()) == 1


def test_help_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        info.main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m fastlora.info")


def test_the_package_lists_its_commands() -> None:
    root = Path(fastlora.__file__).parent
    runnable = {path.stem for path in root.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    runnable |= {path.parent.name for path in root.glob("*/__main__.py")}
    named = {line.split()[0] for line in command.listing().splitlines() if line.startswith("  ")}
    assert {"info", "merge", "tune"} <= named == runnable - {"__main__"}
    done = subprocess.run([sys.executable, "-m", "fastlora"], capture_output=True, text=True, check=True)
    assert done.stdout == command.listing() + "\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [16, 20])
@pytest.mark.parametrize(
    "forced",
    ["auto", "library", "reference", "triton", "triton-serial", "triton-portable", "triton-skinny", "cuda", "-library",
     "-triton", "triton-tma"],
)  # fmt: skip
def test_explain_answers_what_the_call_answers(
    forced: str, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", forced)
    ran: list[str] = []

    def noted(kernel: Any) -> Any:
        def run(p: Any) -> Any:
            ran.append(kernel.name)
            return kernel.run(p)

        return kernel._replace(run=run)

    monkeypatch.setitem(dispatch.KERNELS, "lora_matmul", tuple(map(noted, dispatch.KERNELS["lora_matmul"])))
    dispatch.forget()
    w, a, b = (torch.randn(shape).to(dtype) for shape in ((n, 24), (3, 24), (n, 3)))
    x = torch.randn(5, 24).to(dtype)
    for p in (0.0, 0.3):
        ran.clear()
        try:
            chosen = fastlora.explain(x, w, a, b, scale=1.7, dropout_p=p).chosen
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                fastlora.lora_linear(x, w, a, b, scale=1.7, dropout_p=p)
            continue
        if chosen is None:
            with pytest.raises(RuntimeError, match=f"FASTLORA_BACKEND={forced} cannot run this call"):
                fastlora.lora_linear(x, w, a, b, scale=1.7, dropout_p=p)
        else:
            fastlora.lora_linear(x, w, a, b, scale=1.7, dropout_p=p)
        assert ran == ([] if chosen is None else [chosen])
