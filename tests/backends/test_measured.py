"""Tables: what a file may hold, whose it is, where it is looked for, and what ``auto`` makes of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.backends import dispatch, machine, measured, triton
from fastlora.backends.machine import Machine, machine_of
from fastlora.backends.measured import Bucket, Proof, Table
from fastlora.backends.request import Request

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
NAME = "NVIDIA A100-SXM4-80GB"
TIME = "2026-11-25T20:00:00+00:00"

FORWARD = Request("lora_matmul", GPU, torch.bfloat16, torch.bfloat16, 512, 1024, 1024, 16, False)
GRAD = Request("rank_grad", GPU, torch.bfloat16, torch.bfloat16, 512, 16, 1024, 16, False)


def bucket(best: str | None = "triton-portable", rule: str = "library", **changes: Any) -> Bucket:
    times = {"library": [1.0, 1.1, 1.2], "triton-portable": [0.9, 1.0, 1.1]}
    usual = Bucket(
        "lora_matmul", "forward", "bfloat16", "bfloat16", False, 512, 1024, 1024, 16, times, rule, best, 1.1, TIME
    )
    return usual._replace(**changes)


def proof(kernel: str = "triton-portable", **changes: Any) -> Proof:
    return Proof("lora_matmul", kernel, "bfloat16", 40, True, "", TIME)._replace(**changes)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache directory, and an A100 in which every kernel that is written for it can run."""
    monkeypatch.delenv("FASTLORA_TABLE")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(measured, "PACKAGE_TABLES", tmp_path / "package")
    machine_kernels = {"triton-portable", "triton-skinny", "triton", "library"}
    for verb, kernels in dispatch.KERNELS.items():
        able = tuple(
            kernel._replace(refuses=lambda request: None) if kernel.name in machine_kernels else kernel
            for kernel in kernels
        )
        monkeypatch.setitem(dispatch.KERNELS, verb, able)
    monkeypatch.setattr(dispatch.first_use, "objection", lambda request: None)
    monkeypatch.setattr(dispatch.first_use, "state", lambda request: "passed its check at first use")
    triton.capability_of.cache_clear()
    yield tmp_path / "cache"
    triton.capability_of.cache_clear()


def keep(*records: Bucket | Proof, device: torch.device = GPU, path: Path | None = None, **differs: str) -> Path:
    """Writes the table of these records, where this machine's is looked for or at ``path``."""
    here = machine_of(device)
    path = path or measured.table_path(here)
    path.parent.mkdir(parents=True, exist_ok=True)
    proofs = tuple(record for record in records if isinstance(record, Proof))
    buckets = tuple(record for record in records if isinstance(record, Bucket))
    path.write_text(Table(here._replace(**differs), proofs, buckets).text(), encoding="utf-8")
    dispatch.forget()
    return path


def chosen(request: Request, forced: str = "auto") -> str | None:
    return dispatch._explain(request, forced).chosen


def why(request: Request) -> str:
    return dispatch._explain(request, "auto").why


def test_a_table_reads_as_it_was_written() -> None:
    table = Table(machine_of(GPU), (proof(), proof("triton-serial", passed=False, why="hung")), (bucket(),))
    assert Table.parse(table.text()) == table
    assert Table.parse(Table(machine_of(CPU)).text()) == Table(machine_of(CPU))


def test_the_machine_is_all_that_a_time_depends_on() -> None:
    here = machine_of(CPU)
    assert here.torch == torch.__version__
    assert here.threads == str(torch.get_num_threads())
    gpu = machine_of(GPU)
    assert (gpu.device, gpu.capability, gpu.threads) == (NAME, "sm_80", "")
    assert gpu.slug == "nvidia-a100-sxm4-80gb"
    assert len({here.key, gpu.key, gpu._replace(driver="1.2").key}) == 3


def test_every_kernel_is_made_by_a_module_whose_source_counts() -> None:
    # A partial or a lambda is of the module that made it.
    modules = {
        getattr(kernel.run, "func", kernel.run).__module__
        for kernels in dispatch.KERNELS.values()
        for kernel in kernels
        if kernel.name != "reference"
    }
    assert {name.rpartition(".")[2] for name in modules} <= set(machine._MAKERS)
    assert all(Path(machine.__file__).with_name(f"{name}.py").is_file() for name in machine._MAKERS)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 01:31:52 UTC 2025\n", "570.124.06"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n", "580.82.07"),
    ],
)
def test_the_driver_names_itself(text: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.Path, "read_text", lambda path, encoding: text)
    assert machine._driver() == version


def test_the_fastest_proven_kernel_is_taken_and_explained() -> None:
    path = keep(bucket(), proof())
    assert chosen(FORWARD) == "triton-portable"
    assert why(FORWARD) == (f"1.10 x as fast as the next: measured at M=512 K=1024 N=1024 R=16, 2026-11-25, {path}")


def test_without_a_table_the_rule_holds_and_names_the_command() -> None:
    assert chosen(FORWARD) == "triton-skinny"
    assert chosen(GRAD) == "triton"
    assert why(FORWARD) == f"by the rule: no table for {NAME}: python -m fastlora.tune"


def test_where_the_skinny_kernels_fail_the_rule_is_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.first_use, "objection", lambda request: "failed its check")
    assert chosen(FORWARD) == "library"
    assert dispatch.rule(FORWARD) == "library"


def test_a_kernel_without_a_proof_is_not_taken_however_fast() -> None:
    keep(bucket())
    assert chosen(FORWARD) == "triton-skinny"
    assert "triton-portable was faster but is not proven" in why(FORWARD)


@pytest.mark.parametrize(
    "other",
    [
        proof(passed=False, why="wrong at rank 8"),
        proof(dtype="float16"),
        proof("triton-serial"),
        proof(verb="rank_grad"),
    ],
)
def test_only_its_own_passed_proof_counts(other: Proof) -> None:
    keep(bucket(), other)
    assert chosen(FORWARD) == "triton-skinny"


def test_kernels_that_failed_here_are_not_the_rules_either() -> None:
    keep(proof("triton-skinny", passed=False, why="y is NaN"), proof("triton", verb="rank_grad", passed=False))
    assert chosen(FORWARD) == "library"
    assert chosen(GRAD) == "library"
    reasons = dict(dispatch._explain(FORWARD, "auto").verdicts)
    assert "failed its checks on 2026-11-25 (y is NaN" in str(reasons["triton-skinny"])


def test_a_winner_that_refuses_leaves_the_rule() -> None:
    keep(bucket("cuda-serial"), proof("cuda-serial"))
    assert chosen(FORWARD) == "triton-skinny"
    assert "cuda-serial was faster but cannot run" in why(FORWARD)
    keep(bucket("library:unknown"), bucket("unknown", m=100_000), proof("unknown"))
    assert [chosen(FORWARD._replace(m=m)) for m in (512, 100_000)] == ["triton-skinny"] * 2


def test_nothing_is_taken_within_the_noise() -> None:
    keep(bucket(None), proof())
    assert chosen(FORWARD) == "triton-skinny"
    assert "no kernel was faster beyond the noise" in why(FORWARD)


def test_the_library_may_win() -> None:
    keep(bucket("library", rule="triton-skinny"))
    assert chosen(FORWARD) == "library"


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float16},
        {"adapter_dtype": torch.float32},
        {"dropout": True},
        {"backward": True},
        {"z_only": True},
    ],
)
def test_the_kind_of_a_call_must_match(changes: dict[str, Any]) -> None:
    keep(bucket(), proof(), proof(dtype="float16"))
    assert chosen(FORWARD._replace(**changes)) == "triton-skinny"


def test_directions_have_their_own_buckets() -> None:
    keep(bucket("library"), bucket(direction="backward"), proof())
    assert chosen(FORWARD) == "library"
    assert chosen(FORWARD._replace(backward=True)) == "triton-portable"
    keep(
        bucket("library", verb="rank_grad", direction="da", k=16, n=1024),
        bucket("triton", verb="rank_grad", direction="db", k=1024, n=16),
    )
    assert chosen(GRAD) == "library"
    assert chosen(GRAD._replace(k=1024, n=16)) == "triton"


def test_the_nearest_bucket_is_nearest_by_factors() -> None:
    keep(bucket(m=16), bucket("library", m=1024), proof())
    # 128 is 8 times 16, and an eighth of 1024: nearer by numbers to the first alone.
    assert [chosen(FORWARD._replace(m=m)) for m in (100, 127, 129, 512)] == [
        "triton-portable", "triton-portable", "library", "library",
    ]  # fmt: skip


@pytest.mark.parametrize("axis", ["m", "k", "n", "r"])
def test_far_from_all_that_was_measured_the_rule_holds(axis: str) -> None:
    keep(bucket(), proof())
    size = getattr(FORWARD, axis)
    for factor, kernel in ((4, "triton-portable"), (5, "triton-skinny")):
        assert chosen(FORWARD._replace(**{axis: size * factor})) == kernel
        assert chosen(FORWARD._replace(**{axis: max(1, size // factor)})) == kernel
    assert "nothing like it was measured" in why(FORWARD._replace(m=1))


def test_the_users_table_is_asked_before_the_packages() -> None:
    packages = measured.PACKAGE_TABLES / "nvidia-a100-sxm4-80gb.json"
    keep(bucket("library"), path=packages, driver="another", kernels="older")
    assert chosen(FORWARD) == "library"
    assert why(FORWARD).endswith("2026-11-25, the package's own table")
    keep(bucket(), proof())
    assert chosen(FORWARD) == "triton-portable"
    # What it says nothing about is the package's to say.
    keep(bucket(dtype="float16"), proof())
    assert chosen(FORWARD) == "library"


def test_a_kernel_that_failed_here_is_not_taken_from_the_packages_table() -> None:
    packages = measured.PACKAGE_TABLES / "nvidia-a100-sxm4-80gb.json"
    keep(bucket(), proof(), path=packages)
    assert chosen(FORWARD) == "triton-portable"
    keep(proof(passed=False, why="hung"))
    assert chosen(FORWARD) == "triton-skinny"


def test_a_table_of_the_package_is_for_its_gpu_alone() -> None:
    keep(bucket("library"), path=measured.PACKAGE_TABLES / "nvidia-a100-sxm4-80gb.json", capability="sm_90")
    assert chosen(FORWARD) == "triton-skinny"


# What is wrong with a file, and what is said of it.
BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "cut": (lambda text: text[: len(text) // 2], "it is no JSON"),
    "empty": (lambda text: "", "it is no JSON"),
    "a_list": (lambda text: "[]", "it has format 'list', this fastlora reads 1"),
    "newer": (lambda text: text.replace('"format": 1', '"format": 2'), "it has format 2, this fastlora reads 1"),
    "no_buckets": (lambda text: text.replace('"buckets"', '"bucket"'), "it has no list of proofs and of buckets"),
    "a_field_more": (lambda text: text.replace('"rule":', '"ruler": 1, "rule":'), "a bucket has"),
    "a_word_for_a_size": (lambda text: text.replace('"m": 512', '"m": "512"'), "m of a bucket is '512'"),
    "true_for_a_size": (lambda text: text.replace('"m": 512', '"m": true'), "m of a bucket is True"),
    "no_size": (lambda text: text.replace('"m": 512', '"m": 0'), "a bucket has the sizes (0, 1024, 1024, 16)"),
    "a_word_for_a_time": (lambda text: text.replace("1.1]", '"x"]'), "a bucket has the sizes"),
    "another_gpu": (lambda text: text.replace("A100", "H200"), f"device {NAME} instead of NVIDIA H200"),
    "another_torch": (lambda text: text.replace(torch.__version__, "2.9.9"), "instead of 2.9.9"),
    "another_kernel": (
        lambda text: text.replace(machine_of(GPU).kernels, "0123456789ab"),
        "instead of 0123456789ab",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_used_is_named_once_and_left_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    harm, words = BROKEN[case]
    path = keep(bucket(), proof())
    path.write_text(harm(path.read_text()), encoding="utf-8")
    before = path.read_bytes()
    dispatch.forget()
    with caplog.at_level(logging.WARNING, logger="fastlora"):
        assert [chosen(FORWARD._replace(m=m)) for m in (512, 513)] == ["triton-skinny"] * 2
    said = [message for message in caplog.messages if str(path) in message]
    assert len(said) == 1
    assert words in said[0]
    assert path.read_bytes() == before


def test_bytes_that_are_no_text_are_no_table(caplog: pytest.LogCaptureFixture) -> None:
    path = keep(bucket(), proof())
    path.write_bytes(b"\xff\xfe\x00")
    dispatch.forget()
    assert chosen(FORWARD) == "triton-skinny"
    assert "it is no text" in caplog.text


def test_a_table_from_before_an_upgrade_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    older = machine_of(GPU)._replace(torch="2.9.9")
    path = keep(bucket(), proof(), path=measured.cache_folder() / f"{older.slug}-{older.key}.json", torch="2.9.9")
    assert chosen(FORWARD) == "triton-skinny"
    assert f"{path} is not used: it is of another machine: here is torch {torch.__version__} instead" in caplog.text
    assert caplog.text.count(str(path)) == 1


def test_the_command_is_named_once_a_gpu_and_by_one_rank(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"no kernel has been measured on this {NAME}: `python -m fastlora.tune` finds the fastest"
    assert [chosen(FORWARD._replace(m=m)) for m in (512, 513)] == ["triton-skinny"] * 2
    assert caplog.messages == [line]
    monkeypatch.setenv("LOCAL_RANK", "1")
    for broken in (False, True):
        if broken:
            keep(bucket()).write_text("")
        dispatch.forget()
        chosen(FORWARD)
    assert caplog.messages == [line]


def test_a_cpu_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(FORWARD._replace(device=CPU)) == "library"
    assert caplog.messages == []


def test_a_named_file_is_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(bucket("library"))
    shipped = keep(bucket(), proof(), path=tmp_path / "shipped.json")
    assert chosen(FORWARD) == "library"
    monkeypatch.setenv("FASTLORA_TABLE", str(shipped))
    dispatch.forget()
    assert chosen(FORWARD) == "triton-portable"
    monkeypatch.setenv("FASTLORA_TABLE", "none")
    dispatch.forget()
    assert chosen(FORWARD) == "triton-skinny"


def test_a_named_file_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FASTLORA_TABLE", str(tmp_path / "absent.json"))
    assert chosen(FORWARD) == "triton-skinny"
    assert f"FASTLORA_TABLE={tmp_path / 'absent.json'} is no file: make it with `python -m fastlora.tune`" in (
        caplog.text
    )


def test_the_cache_is_where_users_keep_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert measured.cache_folder() == Path(tmp_path / "cache")
    monkeypatch.delenv("FASTLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert measured.cache_folder() == tmp_path / "xdg" / "fastlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert measured.cache_folder() == Path.home() / ".cache" / "fastlora"


def test_a_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(bucket(), proof())
    reads: list[Path] = []
    read = measured.read
    monkeypatch.setattr(measured, "read", lambda path, here: reads.append(path) or read(path, here))
    for m in (512, 513, 514):
        dispatch._choose(FORWARD._replace(m=m), "auto")
    assert len(reads) == 1
    # And nothing is asked of it for a call that was chosen before.
    monkeypatch.setattr(measured, "choice", lambda request: pytest.fail("asked again"))
    assert dispatch._choose(FORWARD, "auto").name == "triton-portable"


def test_a_forced_kernel_is_no_tables_business(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(bucket(), proof())
    monkeypatch.setattr(measured, "choice", lambda request: pytest.fail("asked"))
    assert chosen(FORWARD, "library") == "library"


def test_a_minus_keeps_kernels_from_auto() -> None:
    keep(bucket(), proof())
    assert chosen(FORWARD, "-triton-portable") == "triton-skinny"
    assert chosen(FORWARD, "-triton") == "library"
    assert chosen(GRAD, "-triton") == "library"
    assert chosen(GRAD, "-triton-serial") == "triton"
    reasons = dict(dispatch._explain(FORWARD, "-triton").verdicts)
    assert reasons["triton-portable"] == "FASTLORA_BACKEND=-triton forbids it"
    # The last resort stays.
    assert chosen(FORWARD, "-library") == "triton-portable"
    with pytest.raises(RuntimeError, match="FASTLORA_BACKEND='-tritn' is unknown"):
        chosen(FORWARD, "-tritn")


def test_on_a_cpu_a_table_chooses_among_the_forms_of_the_library() -> None:
    here = FORWARD._replace(device=CPU)
    assert dispatch._simple("lora_matmul") is not None
    form = next(kernel for kernel in dispatch.KERNELS["lora_matmul"] if kernel.name == "library").forms[0]
    keep(bucket(form.name), bucket("triton-portable", direction="backward"), proof(), device=CPU)
    assert dispatch._simple("lora_matmul") is None
    assert chosen(here) == form.name
    assert dispatch._choose(here, "auto") is form
    assert chosen(here, "library") == "library"
    assert chosen(here._replace(backward=True)) == "library"


def test_all_ranks_choose_alike_from_one_file() -> None:
    keep(bucket(), proof())
    answers = set()
    for _ in range(3):
        dispatch.forget()
        answers.add(chosen(FORWARD._replace(m=700)))
    assert answers == {"triton-portable"}


def test_machine_is_a_record_of_words() -> None:
    assert all(isinstance(value, str) for value in machine_of(CPU))
    assert json.loads(json.dumps(machine_of(CPU)._asdict())) == Machine(**machine_of(CPU)._asdict())._asdict()
