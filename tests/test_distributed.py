"""Two ranks over gloo on the CPU, by torchrun and by accelerate, held to what one process makes of the same batch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed_worker import CHECKS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = str(ROOT / "examples" / "distributed.py")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# accelerate's word for several processes, whatever they run on.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2")

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


def launched(launcher: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script on two ranks of the CPU; a hang is a failure."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Shards are multiplied by DTensor's own operators too, which on CPUs with AMX read past their rows (whole_rows).
    environment["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    command = [sys.executable, "-m", *launcher, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank says to each check of distributed_worker.py."""
    folder = tmp_path_factory.mktemp("verdicts")
    done = launched(TORCHRUN, "-m", "tests.distributed_worker", str(folder))
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name: str, verdicts: list[dict[str, str]]) -> None:
    for rank, verdict in enumerate(verdicts):
        said = verdict.get(name, "never ran: an earlier check stopped the ranks")
        assert said == "ok", f"rank {rank}: {said}"


def test_the_example_agrees_with_one_process_on_every_engine() -> None:
    done = launched(TORCHRUN, EXAMPLE, "--engine", "ddp", "fsdp2", "tp", "--steps", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ddp", "fsdp2", "tp"]
    assert all("2 ranks agree with one process after 4 steps" in line for line in lines)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_the_example_runs_under_accelerate() -> None:
    done = launched(ACCELERATE, EXAMPLE, "--engine", "accelerate", "fsdp2", "--steps", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accelerate: 2 ranks agree" in done.stdout
    assert "fsdp2: 2 ranks agree" in done.stdout


def test_the_example_says_how_it_is_started() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, EXAMPLE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "start it with torchrun --nproc-per-node 2" in done.stderr
