"""``python -m fastlora.tune`` and ``tune_model`` on a CPU: what they print, keep, go on with and refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.backends import dispatch, measured
from fastlora.backends.machine import machine_of
from fastlora.backends.measured import Bucket, Proof, Table
from fastlora.tune import __main__ as command
from fastlora.tune import plan, report, run, work
from fastlora.tune.plan import Case, Size
from fastlora.tune.worker import Worker

CPU = torch.device("cpu")
MACHINE = machine_of(CPU)
TINY = ("--quick", "--layer", "24", "40", "--tokens", "8", "--rank", "4", "--dtype", "fp32")


class Here(Worker):
    """Does jobs in this process, where a test can see them."""

    def __init__(self, device: torch.device, python: object) -> None:
        self.begun = ""

    def ask(self, job: Any, seconds: float) -> dict[str, Any]:
        job = dict(job)
        if job.pop("do") == "check":
            kernel = dispatch.named(job["verb"])[job["kernel"]]
            return work.check(job["verb"], kernel, Case(*job["case"]), CPU)._asdict()
        return work.measure(
            Size(*job.pop("size")), **job | {"seconds": 0.0}, device=CPU, say=lambda name: None
        )._asdict()

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, no kernel that could run without a GPU, and a worker in this process."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("FASTLORA_TABLE")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "Worker", Here)
    return tmp_path / "cache"


@pytest.fixture
def tune(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command: its status, and what it printed on either stream."""

    def tuned(*arguments: str) -> tuple[int, str, str]:
        status = command.main(arguments or TINY)
        return status, *capsys.readouterr()

    return tuned


Tune = Callable[..., tuple[int, str, str]]


def kept(cache: Path) -> Table:
    (path,) = cache.iterdir()
    return measured.read(path, MACHINE)


def test_a_run_prints_and_keeps_a_table_and_another_is_up_to_date(tune: Tune, cache: Path) -> None:
    status, printed, progress = tune()
    assert status == 0
    assert progress.splitlines()[0].startswith(MACHINE.device)
    assert "[4 of 4, about 0:00 left] timing backward M=8 K=40 N=24 R=4 float32: 6 ways" in progress
    lines = {tuple(line.split()[:2]): line for line in printed.splitlines() if line.split()[1:]}
    assert "cannot run here" in lines["triton-serial", "lora_matmul"]
    assert "needs none" in lines["library", "rank_grad"]
    table = kept(cache)
    assert {bucket.direction for bucket in table.buckets} == {"da", "db", "forward", "backward"}
    assert printed.splitlines()[-1] == f"kept in {measured.table_path(MACHINE)}"

    status, printed, progress = tune()
    assert status == 0
    assert "timing" not in progress
    assert f"up to date: measured on {table.buckets[-1].time[:10]}" in printed
    assert kept(cache) == table


def test_again_measures_once_more(tune: Tune, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune()
    monkeypatch.setattr(run, "_now", lambda: "later")
    tune(*TINY, "--again")
    assert {bucket.time for bucket in kept(cache).buckets} == {"later"}


def test_other_sizes_are_added(tune: Tune, cache: Path) -> None:
    tune()
    _, _, progress = tune(*TINY[:5], "8", "16", *TINY[6:])
    assert progress.count("timing") == 4
    assert {bucket.m for bucket in kept(cache).buckets} == {8, 16}


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    tune: Tune, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = work.measure
    calls: list[Size] = []

    def interrupted(size: Size, *arguments: Any, **options: Any) -> work.Times:
        calls.append(size)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(size, *arguments, **options)

    monkeypatch.setattr(work, "measure", interrupted)
    status, printed, progress = tune()
    assert status == 130
    assert "stopped: what is done is kept, and the same command goes on" in progress
    assert "library" in printed
    assert len(kept(cache).buckets) == 2
    status, _, progress = tune()
    assert status == 0
    assert progress.count("timing") == 2
    assert len(set(calls)) == 4
    assert len(kept(cache).buckets) == 4


def test_without_the_right_to_write_the_table_is_printed_and_the_path_named(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    status, printed, progress = tune()
    assert status == 1
    assert "library         rank_grad" in printed
    assert f"error: the table could not be kept: {measured.table_path(MACHINE)}: Not a directory" in progress


def test_a_broken_file_is_put_aside_and_named(tune: Tune, cache: Path) -> None:
    cache.mkdir()
    path = measured.table_path(MACHINE)
    path.write_text("{")
    status, printed, progress = tune()
    assert status == 0
    assert f"{path} is put aside: it is no JSON" in progress
    aside = next(file for file in cache.iterdir() if file != path)
    assert f"the older file is {aside}" in printed
    assert aside.read_text() == "{"


def test_a_named_file_of_another_machine_is_not_touched(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shipped.json"
    path.write_text(Table(MACHINE._replace(device="NVIDIA H200")).text())
    before = path.read_bytes()
    monkeypatch.setenv("FASTLORA_TABLE", str(path))
    status, printed, progress = tune()
    assert (status, printed) == (2, "")
    assert f"error: FASTLORA_TABLE={path} cannot be gone on with (it is of another machine" in progress
    assert path.read_bytes() == before
    monkeypatch.setenv("FASTLORA_TABLE", str(tmp_path / "new.json"))
    assert tune()[0] == 0
    assert measured.read(tmp_path / "new.json", MACHINE).buckets


@pytest.mark.parametrize("refused", [3, 12])
def test_what_the_worker_refuses_is_no_check(
    refused: int, tune: Tune, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([work.Verdict("refused", "not at this address")] * refused + [work.Verdict("passed")] * 10)
    monkeypatch.setattr(work, "check", lambda *arguments: next(answers))
    for verb, kernels in dispatch.KERNELS.items():
        able = [k._replace(refuses=lambda request: None) if k.name == "triton-portable" else k for k in kernels]
        monkeypatch.setitem(dispatch.KERNELS, verb, tuple(able))
    monkeypatch.setattr(plan, "DTYPES", {"fp32": torch.float32})
    tune(*TINY, "--kernel", "triton-portable")
    (proof,) = kept(cache).proofs
    expected = (9, True, "") if refused == 3 else (0, False, "every case was refused: not at this address")
    assert (proof.checks, proof.passed, proof.why) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kernel", "tritn"), "unknown kernel 'tritn': expected cuda, "),
        (("--dtype", "fp8"), "unknown --dtype fp8: expected bf16, fp16, fp32"),
        (("--model", "absent.json"), "absent.json cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    arguments: tuple[str, ...], words: str, tune: Tune, cache: Path
) -> None:
    status, printed, said = tune(*arguments)
    assert (status, printed) == (2, "")
    assert said.startswith(f"error: {words}")
    assert not cache.exists()


@pytest.mark.parametrize("arguments", [("--tokens", "0"), ("--layer", "24", "x"), ("--rank", "-1"), ("--layer", "24")])
def test_sizes_are_whole_numbers(arguments: tuple[str, ...], tune: Tune) -> None:
    with pytest.raises(SystemExit) as caught:
        tune(*arguments)
    assert caught.value.code == 2


def test_the_layers_of_a_config(tune: Tune, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, _, _ = tune("--quick", "--model", str(tmp_path), "--tokens", "8", "--rank", "4", "--dtype", "fp32")
    assert status == 0
    forward = {(bucket.k, bucket.n) for bucket in kept(cache).buckets if bucket.direction == "forward"}
    assert forward == {(24, 72), (24, 24), (24, 96), (96, 24)}


def test_an_export_is_a_table_with_its_lines_of_the_ledger(tune: Tune, cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    proof = Proof("lora_matmul", "triton-serial", "float16", 9, True, "", "2026-11-25")
    failed = proof._replace(dtype="bfloat16", passed=False, why="hung")
    path = measured.table_path(MACHINE)
    path.write_text(Table(MACHINE, (proof, failed)).text())
    status, printed, _ = tune(*TINY, "--export", str(tmp_path / "out.json"))
    assert status == 0
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert Table.parse(text) == measured.read(path, MACHINE)
    lines = [
        f"| triton-serial | lora_matmul | {MACHINE.capability} | float16 | | {MACHINE.device}, kernels "
        f"{MACHINE.kernels}: 9 checks of fastlora.tune passed |",
        f"| triton-serial | lora_matmul | {MACHINE.capability} | bfloat16 | | {MACHINE.device}, kernels "
        f"{MACHINE.kernels}: failed: hung |",
    ]
    assert json.loads(text)["ledger"] == lines
    assert all(line in printed for line in lines)


def test_an_export_that_cannot_be_written_is_said(tune: Tune, tmp_path: Path) -> None:
    status, _, said = tune(*TINY, "--export", str(tmp_path / "absent" / "out.json"))
    assert status == 1
    assert f"error: --export {tmp_path / 'absent' / 'out.json'}: No such file or directory" in said


def model() -> nn.Module:
    layers = nn.Sequential(fastlora.LoRALinear(24, 40, r=4, lora_dropout=0.1), fastlora.LoRALinear(40, 24, r=4))
    return nn.Sequential(layers, layers)


def test_tune_model_measures_its_layers_and_is_read_at_once(cache: Path) -> None:
    assert dispatch._simple("lora_matmul") is not None
    table = fastlora.tune_model(model(), tokens=[8, 16], quick=True)
    assert table == kept(cache)
    sizes = {
        (bucket.m, bucket.k, bucket.n, bucket.dropout) for bucket in table.buckets if bucket.direction == "forward"
    }
    assert sizes == {(m, *widths) for m in (8, 16) for widths in ((24, 40, False), (24, 40, True), (40, 24, False))}
    assert dispatch._simple("lora_matmul") is None
    assert str(fastlora.explain(torch.empty(8, 24), torch.empty(40, 24), torch.empty(4, 24), torch.empty(40, 4)))


def test_tune_model_refuses_in_words(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastlora.tune_model(1, [8])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model has no LoRA layer"):
        fastlora.tune_model(nn.Linear(2, 3), [8])
    for tokens in ([], [0], [8, -1]):
        with pytest.raises(ValueError, match="tokens must be numbers of at least 1"):
            fastlora.tune_model(model(), tokens)
    with pytest.raises(ValueError, match="unknown kernel 'x'"):
        fastlora.tune_model(model(), [8], kernels=["x"])
    assert not cache.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"the table could not be kept: .*Not a directory"):
        fastlora.tune_model(model(), [8], quick=True)


def test_the_table_on_the_screen() -> None:
    times = {"library": [1.0, 1.0, 1.1], "triton-serial": [0.7, 0.8, 0.9]}
    bucket = Bucket(
        "lora_matmul", "forward", "bfloat16", "bfloat16", True, 512, 1024, 768, 16, times, "library", "triton-serial",
        1.25, "2026-11-25",
    )  # fmt: skip
    proofs = (
        Proof("lora_matmul", "triton-serial", "bfloat16", 12, True, "", ""),
        Proof("lora_matmul", "triton-serial", "float16", 12, True, "", ""),
        Proof("lora_matmul", "cuda-serial", "float16", 12, False, "M=1 K=2: gave no answer within 120 s", ""),
    )
    table = Table(MACHINE, proofs, (bucket, bucket._replace(m=64, best=None)))
    lines = report.table(table, {("rank_grad", "triton"): "no"}).splitlines()
    by_kernel = {tuple(line.split()[:2]): line for line in lines}
    assert by_kernel["triton-serial", "lora_matmul"].endswith(
        "24 checks passed (bf16, fp16)     1 of 2 sizes, 1.25 x the rule's"
    )
    assert by_kernel["library", "lora_matmul"].endswith("1 of 2 sizes, by the rule")
    assert "failed (fp16)" in by_kernel["cuda-serial", "lora_matmul"]
    assert by_kernel["triton", "rank_grad"].endswith("cannot run here")
    assert by_kernel["triton-skinny", "lora_matmul"].endswith("not tried")
    assert lines[-1] == "cuda-serial failed in float16: M=1 K=2: gave no answer within 120 s"
    (line,) = report.winners(table).splitlines()
    assert " ".join(line.split()) == (
        "forward M=512 K=1024 N=768 R=16 bfloat16 dropout triton-serial 800.0 us, library 1000.0"
    )


def test_nothing_is_left_in_the_folder_but_the_table(tune: Tune, cache: Path) -> None:
    tune()
    assert os.listdir(cache) == [measured.table_path(MACHINE).name]
