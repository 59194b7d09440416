"""docs/tuning.md says what the code does: its blocks run; options, variables, numbers and messages are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fastlora
from fastlora.backends import dispatch, measured
from fastlora.backends.measured import Table
from fastlora.tune import plan, report, run, verdict, work
from fastlora.tune.__main__ import _parser

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SOURCES = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "fastlora").rglob("*.py"))


def block(language: str) -> str:
    (found,) = (text for known, text in BLOCKS if known == language)
    return found


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTLORA_TABLE", raising=False)
    # In Triton's interpreter, which takes minutes.
    monkeypatch.setattr(run.Run, "_unproven", lambda self: ())
    model = nn.Sequential(nn.Linear(48, 32))
    fastlora.inject(model, ["0"], r=4, lora_alpha=8)
    names: dict[str, Any] = {"model": model}
    try:
        exec(compile(block("python"), "docs/tuning.md", "exec"), names)
    finally:
        dispatch.forget()
    (path,) = tmp_path.iterdir()
    assert Table.parse(path.read_text()) == names["table"]
    assert {bucket.m for bucket in names["table"].buckets} == {512, 2048}


def test_the_file_in_the_page_is_a_table() -> None:
    table = Table.parse(block("json"))
    assert (len(table.proofs), len(table.buckets)) == (1, 1)


def test_the_transcript_ends_as_the_command_does() -> None:
    lines = block("text").splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("kernel "))
    refusals = {(verb, kernel.name): "no GPU" for verb, kernels in dispatch.KERNELS.items() for kernel in kernels}
    of_none = report.table(Table(Table.parse(block("json")).machine), refusals).splitlines()
    assert [line.partition("  8 of 8")[0].rstrip() for line in lines[head:-1]] == of_none


def test_the_options_are_those_of_the_command() -> None:
    rows = re.findall(r"^\| `(--\w+)", PAGE, re.MULTILINE)
    assert rows == [option for action in _parser()._actions for option in action.option_strings if len(option) > 2][1:]
    assert set(re.findall(r"--[a-z]+", PAGE)) <= {*rows, *("--nproc",)}


def test_the_variables_are_read_somewhere() -> None:
    for variable in set(re.findall(r"FASTLORA_[A-Z]+|XDG_[A-Z_]+|LOCAL_RANK", PAGE)):
        assert f'"{variable}"' in SOURCES, variable


def test_the_numbers_are_those_of_the_code() -> None:
    words = " ".join(PAGE.split())
    k_to_n = plan._LAYERS["cuda"]
    assert k_to_n == ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
    assert plan._TOKENS["cuda"] == (512, 2048, 8192)
    for text in (
        f"more than {measured.REACH:.0f} times below the smallest",
        f"ranks {plan._RANK / measured.REACH:.0f} to {plan._RANK * measured.REACH:.0f}, and "
        f"{512 / measured.REACH:.0f} to {8192 * measured.REACH:.0f} tokens",
        f"{plan.REPEATS} runs give the same bits",
        f"no answer for {run.CASE_SECONDS:.0f} seconds",
        f"at least {work._LEAST_ROUNDS} and at most {work._MOST_ROUNDS}",
        f"by more than {100 * verdict._LEAST:.0f} %",
    ):
        assert text in words, text
    assert (len(plan._CASES), len(plan._LARGE_CASES)) == (10, 2)
    assert (run.SECONDS, run.QUICK_SECONDS, verdict._ROUNDS, work._COPIES) == (1.0, 0.5, 0.9, 3)


def test_messages_in_the_page_are_those_of_the_code() -> None:
    quoted = re.findall(r"^\| `([^`]+)`", PAGE.split("## When something is wrong")[1], re.MULTILINE)
    assert len(quoted) == 12
    code = re.sub(r'"\s+f?"', "", SOURCES)
    for message in quoted:
        for part in re.split(r"…|: it |error: ", message):
            assert part.strip() in code.replace("%s", ""), message
