"""The benchmarks' GPU branch from the command line to tables and pictures, on the stand-in for ``torch.cuda``.

Kernels launch into the stubs; figures mean nothing and are not looked at.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.records.files import Results, read
from benchmarks.records.rows import ClaimRow, LayerRow, ModelRow
from fastlora.backends import dispatch
from tests.stub_gpu import build, launch, stand_in

pytestmark = pytest.mark.skipif(build.driver_obstacle() is not None, reason=str(build.driver_obstacle()))

RESULTS = build.ROOT / "benchmarks" / "results"
RUNS = {
    "layers": (
        *("--layer", "256x128", "host", "--tokens", "24", "40", "64", "--rank", "16", "--dtype", "bf16"),
        *("--dropout", "0.1", "--rounds", "1"),
    ),
    "model": (
        *("--model", "llama-tiny-1layers", "--batch", "1", "--sequence", "8", "16", "24", "--rank", "8"),
        *("--dtype", "bf16", "--dropout", "0", "--checkpointing", "on", "--rounds", "1"),
    ),
    "paper": ("--claim", "memory", "speed-up", "latency", "one-product", "switching", "memory-held", "throughput"),
}
# Answers every question as nvidia-smi does, with as many values as were asked for.
SMI = """#!/bin/sh
for word in "$@"; do
  case $word in
    --query-gpu=*) echo "${word#--query-gpu=}" | sed 's/[^,]*/7/g; s/,/, /g' ;;
  esac
done
"""


def snapshot() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*") if "local" not in path.parts}


def forced() -> list[str]:
    """The arms of the kernels that can be launched here."""
    families = [name for name in launch.FAMILIES if name == "triton" or build.runtime_obstacle() is None]
    kernels = [kernel.name for kernel in dispatch.KERNELS["lora_matmul"]]
    return [f"fastlora-{name}" for name in kernels if name.partition("-")[0] in families]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A README, and the results of every measuring subcommand beside it, rendered."""
    root = tmp_path_factory.mktemp("gpu")
    smi = root / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI)
    smi.chmod(0o755)
    variables = {"PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}"}
    build.driver()
    if build.runtime_obstacle() is None:
        build.library()
    before = snapshot()
    made = root / "results" / "gpu"
    # Not torch.compile: inductor would compile for a device that is not there.
    named = {
        "layers": ("--arm", "plain", "full", "peft-fp32", "peft-same", "fastlora", "fastlora-fp32", *forced()),
        "model": ("--arm", "full", "peft-same", "fastlora", *forced()),
    }
    running = [
        build.start(
            "tests.stub_gpu.bench",
            *(name, *options, *named.get(name, ()), "--json", str(made / f"{name}-quick.jsonl")),
            **variables,
        )
        for name, options in RUNS.items()
    ]
    for process in running:
        build.finish(process)
    (root / "README.md").write_text("<!-- benchmarks:start -->\n<!-- benchmarks:end -->\n")
    places = ("--readme", str(root / "README.md"), "--results", str(root / "results"))
    build.finish(build.start("tests.stub_gpu.bench", "report", *places, **variables))
    assert snapshot() == before
    return root


def results(folder: Path, command: str) -> Results:
    return read(folder / "results" / "gpu" / f"{command}-quick.jsonl")


def test_the_gpu_is_described(folder: Path) -> None:
    environment = results(folder, "layers").environment
    assert (environment["device"], environment["device_name"]) == ("cuda", stand_in.NAME)
    assert environment["gpu"]["capability"] == "9.0"
    assert environment["gpu"]["driver_version"] == "7"


def test_every_arm_that_can_run_is_timed_on_the_device_and_none_fails(folder: Path) -> None:
    rows = [row for row in results(folder, "layers").rows if isinstance(row, LayerRow)]
    assert [(row.arm, row.reason) for row in rows if row.status not in ("ok", "absent")] == []
    timed = [row for row in rows if row.status == "ok"]
    assert {"frozen", "plain", "full", "fastlora", *forced()} <= {row.arm for row in timed}
    # The time of a host-sized case is the host's.
    assert all((row.device_ms is None) == row.case.is_host for row in timed)


def test_rows_of_a_kernel_with_tiles_say_which(folder: Path) -> None:
    rows = [row for row in results(folder, "layers").rows if isinstance(row, LayerRow) and row.status == "ok"]
    tiled = {kernel.name for kernel in dispatch.KERNELS["lora_matmul"] if kernel.tile is not None}
    ours = [row for row in rows if row.kernel is not None and set(row.kernel.split("+")) <= tiled]
    assert ours
    assert {row.arm for row in ours if row.tile} == {row.arm for row in ours}
    assert {row.tile for row in ours if row.arm.startswith("fastlora-cuda")} <= {"128x128x64, clusters of 1"}


def test_models_are_trained_by_every_kernel(folder: Path) -> None:
    rows = [row for row in results(folder, "model").rows if isinstance(row, ModelRow)]
    assert [(row.arm, row.reason) for row in rows if row.status not in ("ok", "absent")] == []
    assert {row.arm for row in rows if row.status == "ok"} >= {"full", "fastlora", *forced()}


def test_the_papers_claims_are_measured(folder: Path) -> None:
    rows = [row for row in results(folder, "paper").rows if isinstance(row, ClaimRow)]
    assert [(row.claim, row.note) for row in rows if row.verdict == "error"] == []
    assert len(rows) == 7


def test_tables_and_pictures_are_rendered(folder: Path) -> None:
    page = (folder / "results" / "gpu" / "README.md").read_text()
    assert page.startswith(f"# {stand_in.NAME}\n")
    pictures = sorted((folder / "results" / "gpu").glob("*.png"))
    assert {picture.name for picture in pictures} == {
        "layers-quick-glance.png",
        "layers-quick.png",
        "layers-quick-by-tokens.png",
        "model-quick-glance.png",
        "model-quick-throughput.png",
        "model-quick-memory.png",
    }
    for picture in pictures:
        assert picture.name in page
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(f"\n## {name}-quick\n" in page for name in RUNS)
    readme = (folder / "README.md").read_text()
    assert stand_in.NAME in readme
    assert "No GPU result yet" not in readme
