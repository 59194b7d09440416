"""``python -m fastlora.tune`` on the stand-in for a GPU: what fails costs itself alone, what is fastest is chosen."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from fastlora.backends import dispatch
from fastlora.backends.measured import Bucket, Table
from tests.stub_gpu import tune
from tests.stub_gpu.tune import Planted, Script

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up in /proc")

LORA, GRAD = "lora_matmul", "rank_grad"
NAMES = {verb: [k.name for k in kernels if k.name != "reference"] for verb, kernels in dispatch.KERNELS.items()}
OURS = {verb: [name for name in names if name != "library"] for verb, names in NAMES.items()}
K, N, R = 64, 48, 8
USUAL = ("--quick", "--layer", str(K), str(N), "--rank", str(R), "--dtype", "fp16")
FORWARD, BACKWARD = {"k": K, "n": N}, {"k": N, "n": K}
SECONDS = 60.0


class Started:
    """A command that runs."""

    def __init__(self, process: Any, out: Path) -> None:
        self._process, self._out = process, out
        self.pid: int = process.pid

    @property
    def out(self) -> str:
        return self._out.with_suffix(".out").read_text()

    @property
    def told(self) -> str:
        """Its progress, and what went wrong."""
        path = self._out.with_suffix(".err")
        return path.read_text() if path.exists() else ""

    @property
    def workers(self) -> list[int]:
        """The workers that have begun, by their process ids."""
        path = self._out.with_suffix(".workers")
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self) -> int:
        self._process.join(SECONDS)
        assert self._process.exitcode is not None, f"it did not end\n{self.told}"
        return int(self._process.exitcode)

    def wait_until_it_hangs(self) -> None:
        """Waits for the fault of that name."""
        deadline = time.monotonic() + SECONDS
        while not self._out.with_suffix(".hangs").exists():
            assert self._process.is_alive(), self.told
            assert time.monotonic() < deadline, self.told
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Gpu:
    """A machine with a GPU that is not there, and a cache directory of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.cache, self._count = folder, folder / "cache", 0

    def _start(self, target: Callable[..., None], script: Script, *arguments: object) -> Started:
        self._count += 1
        out = self._folder / f"process-{self._count}"
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=target, args=(script.text(), self.cache, out, *arguments), daemon=True)
        process.start()
        return Started(process, out)

    def start(self, script: Script, *arguments: str) -> Started:
        return self._start(tune.command, script, [*USUAL, *arguments])

    def run(self, script: Script, *arguments: str) -> Started:
        started = self.start(script, *arguments)
        assert started.wait() == 0, started.told
        return started

    @property
    def table(self) -> Table:
        """What is kept, in the one file that is left."""
        (path,) = self.cache.iterdir()
        return Table.parse(path.read_text())

    def ask(self, *calls: Mapping[str, Any]) -> list[tuple[str, str]]:
        """For each call the kernel that ``auto`` runs in a fresh process, and the explanation."""
        started = self._start(tune.ask, Script(), list(calls))
        assert started.wait() == 0, started.told
        return [tuple(json.loads(line)) for line in started.out.splitlines()]


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """The process that all others are forked from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        forkserver.set_forkserver_preload(["tests.stub_gpu.tune"])
        forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()
    forkserver.set_forkserver_preload(["__main__"])


@pytest.fixture
def gpu(tmp_path: Path) -> Gpu:
    return Gpu(tmp_path)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended: one that nobody waits for stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def bucket(table: Table, m: int, direction: str = "forward", dtype: str = "float16") -> Bucket:
    (found,) = (b for b in table.buckets if (b.m, b.direction, b.dtype) == (m, direction, dtype))
    return found


def timed(started: Started) -> list[str]:
    """The sizes that a command has begun to time."""
    return re.findall(r"timing (.*?):", started.told)


def proved(started: Started) -> list[str]:
    """The kernels that a command has begun to prove."""
    return re.findall(r"proving (.*?):", started.told)


# Kernel, fault, which of its calls, and what is said of it. Each is planted as ten times as fast as every other.
IN_THE_PROOF: dict[tuple[str, str, str], tuple[str, dict[str, Any], str]] = {
    (LORA, "cuda-z_jobs", "float16"): ("is wrong", {"r": 64}, r"R=64 .*: [yd]x?: rms error .* worst at \(128, 775\)"),
    (LORA, "cuda-serial", "float16"): ("hangs", {"m": 17}, r"M=17 .*gave no answer within 3 s"),
    (LORA, "triton-serial", "float16"): ("crashes", {"m": 1}, r"M=1 .*ended its process with signal SIGSEGV"),
    (LORA, "triton-portable", "float16"): ("exits", {}, r"M=256 .*ended its process with status 7"),
    (LORA, "cuda-z_jobs", "bfloat16"): (
        "raises",
        {"adapters": "float32"},
        r"float32 adapters.*: ValueError: a planted",
    ),
    (LORA, "cuda-serial", "bfloat16"): ("has other bits", {"m": 150}, r"M=150 .*: y has other bits in run 13"),
    (LORA, "triton-serial", "bfloat16"): (
        "leaves memory unwritten",
        {"m": 520},
        r"M=520 .*: y: is nan at \(519, 263\)",
    ),
    (LORA, "triton-portable", "bfloat16"): ("loses the GPU", {"dropout": True}, r"dropout.*an illegal memory access"),
    (GRAD, "cuda", "float16"): ("is wrong", {"k": 12}, r"R=12 .*: da: rms error"),
}


def test_what_fails_in_its_proof_is_told_kept_and_not_chosen_and_costs_nothing_else(gpu: Gpu) -> None:
    planted: list[Planted] = []
    for (verb, kernel, dtype), (fault, where, _) in IN_THE_PROOF.items():
        where = where | {"dtype": dtype}
        planted += [Planted(verb, kernel, [0.1], {"dtype": dtype}), Planted(verb, kernel, fault, where)]
    script = Script(tuple(planted), dtypes=("fp16", "bf16"), case_seconds=3.0, repeats=20)
    started = gpu.run(script, "--tokens", "32", "--dtype", "fp16", "bf16")
    table = gpu.table

    for (verb, kernel, dtype), (_, _, words) in IN_THE_PROOF.items():
        proof = table.proof(verb, kernel, dtype)
        assert proof is not None
        assert not proof.passed
        assert re.search(words, proof.why), proof.why
        assert f"  {kernel} failed: {proof.why}\n" in started.told
        assert f"{kernel} failed in {dtype}: {proof.why}"[:240] in started.out
    for dtype in ("float16", "bfloat16"):
        for verb, kernels in OURS.items():
            passed = {name for name in kernels if (verb, name, dtype) not in IN_THE_PROOF}
            for name in passed:
                proof = table.proof(verb, name, dtype)
                assert proof is not None
                assert proof.passed
                assert proof.checks == 11
            directions = ("forward", "backward") if verb == LORA else ("da", "db")
            for direction in directions:
                found = bucket(table, 32, direction, dtype)
                assert set(found.times) == {*passed, "library"}
    assert len(table.buckets) == 8

    forward = {"m": 32}, {"m": 32, "dtype": "bfloat16"}
    backward = tuple(call | {"direction": "backward"} for call in forward)
    for name, why in gpu.ask(*forward, *backward):
        assert name == "triton-skinny"
        for kernel in ("cuda-z_jobs", "cuda-serial", "triton-serial", "triton-portable"):
            assert re.search(rf"{kernel} +can run, but auto passes it over: failed its checks on \d{{4}}-", why)
    (da, _), (of_bf16, _) = gpu.ask({"m": 32, "direction": "da"}, {"m": 32, "direction": "da", "dtype": "bfloat16"})
    assert (da, of_bf16) == ("triton", "triton")

    again = gpu.run(script, "--tokens", "32", "--dtype", "fp16", "bf16")
    assert (proved(again), timed(again)) == ([], [])
    assert "up to date: measured on " in again.out


# What is right in its cases and not at a size: kernel, fault, where, what is said.
AT_A_SIZE: dict[tuple[str, str], tuple[str, dict[str, Any], str]] = {
    (LORA, "cuda-z_jobs"): ("hangs", {"m": 32, "k": K}, "gave no answer within 3 s"),
    (LORA, "cuda-serial"): ("crashes", {"m": 32, "k": K}, "ended its process with signal SIGSEGV"),
    (LORA, "triton-serial"): ("raises", {"m": 32, "k": N}, "ValueError: a planted exception"),
    (LORA, "triton-portable"): ("is wrong", {"m": 32, "k": N}, "dx: rms error"),
    (GRAD, "cuda"): ("loses the GPU", {"m": 32, "k": N}, "an illegal memory access"),
}


def test_what_fails_at_a_size_alone_is_withdrawn_and_the_others_are_timed(gpu: Gpu) -> None:
    planted = [Planted(verb, name, [0.1]) for verb, name in AT_A_SIZE]
    planted += [Planted(verb, name, fault, where) for (verb, name), (fault, where, _) in AT_A_SIZE.items()]
    script = Script(tuple(planted), case_seconds=3.0)
    started = gpu.run(script, "--tokens", "32")
    table = gpu.table
    for (verb, name), (_, _, words) in AT_A_SIZE.items():
        proof = table.proof(verb, name, "float16")
        assert proof is not None
        assert not proof.passed
        assert words in proof.why
        assert re.match(r"(forward|backward|db) M=32 ", proof.why)
        assert f"  {name} failed: {proof.why}\n" in started.told
    assert set(bucket(table, 32, "db").times) == {"triton", "library"}
    assert set(bucket(table, 32, "backward").times) == {"triton-skinny", "library"}
    assert not {"cuda-z_jobs", "cuda-serial"} & set(bucket(table, 32, "forward").times)
    calls = [{"m": 32, "direction": direction} for direction in ("forward", "backward", "da", "db")]
    assert [name for name, _ in gpu.ask(*calls)] == ["triton-skinny"] * 2 + ["triton"] * 2


def test_sizes_at_which_a_withdrawn_kernel_was_ahead_or_the_rules_are_timed_without_it(gpu: Gpu) -> None:
    planted = (
        Planted(LORA, "triton-serial", [0.1]),
        Planted(LORA, "cuda-serial", [0.5]),
        Planted(LORA, "triton-serial", "raises", BACKWARD | {"m": 64}),
        Planted(LORA, "triton-skinny", "raises", BACKWARD | {"m": 64}),
        # A part of a backward, but for kernels that make it all at once.
        *(Planted(GRAD, name, [0.01]) for name in NAMES[GRAD]),
    )
    started = gpu.run(Script(planted), "--tokens", "32", "64")
    sizes = timed(started)
    assert len(sizes) == 8 + 3
    assert set(sizes[8:]) < set(sizes[:8])
    for found in gpu.table.buckets:
        if found.verb == LORA:
            assert (found.best, found.rule) == ("cuda-serial", "library")
            assert set(found.times) == {"cuda-z_jobs", "cuda-serial", "triton-portable", "library"}
    # Far from all that was measured the rule holds, and it knows of the failure too.
    assert [name for name, _ in gpu.ask({"m": 32}, {"m": 4000})] == ["cuda-serial", "library"]
    assert "up to date" in gpu.run(Script(planted), "--tokens", "32", "64").out


def test_what_is_no_kernels_fault_is_not_kept_against_it(gpu: Gpu) -> None:
    options = ("--tokens", "32", "--kernel", "triton-skinny")
    started = gpu.start(Script(starts=False), *options)
    assert started.wait() == 1
    assert (
        "error: the process that tries kernels does not start: it ended its process with status 1 (no GPU is free)\n"
        in started.told
    )
    assert not gpu.cache.exists()
    full = gpu.run(Script((Planted(LORA, "triton-skinny", "has no memory", {"m": 150}),)), *options)
    assert re.search(r"  triton-skinny is not proven: M=150 .*: OutOfMemoryError: CUDA out of memory", full.told)
    assert [proof.kernel for proof in gpu.table.proofs] == ["triton"]
    # Behind the run that is checked, and those that warm up.
    in_the_times = Planted(LORA, "triton-skinny", "has no memory", FORWARD | {"m": 32, "call": 6})
    fuller = gpu.run(Script((in_the_times,)), *options)
    assert proved(fuller) == ["triton-skinny (lora_matmul, float16)"]
    assert "  not timed: OutOfMemoryError: CUDA out of memory" in fuller.told
    assert timed(gpu.run(Script(), *options)) == [f"forward M=32 K={K} N={N} R={R} float16"]
    assert all(proof.passed for proof in gpu.table.proofs)
    assert len(gpu.table.buckets) == 4


def test_the_fastest_is_taken_at_sizes_like_those_it_was_the_fastest_at_and_nowhere_else(gpu: Gpu) -> None:
    small, large = {"m": 32}, {"m": 512}
    script = Script(
        (
            Planted(LORA, "cuda-z_jobs", [0.1], small | FORWARD),
            Planted(LORA, "cuda-z_jobs", [5.0], large),
            # Twice as fast in two rounds of three is no winner, nor is one ahead by a hundredth.
            Planted(LORA, "cuda-serial", [0.5, 0.5, 2.0], large | FORWARD),
            Planted(GRAD, "cuda", [0.99], small | {"k": R}),
            Planted(LORA, "library", [0.1], large | BACKWARD),
            Planted(GRAD, "library", [0.1], large),
        )
    )
    started = gpu.run(script, "--tokens", "32", "512")
    table = gpu.table
    found = {(b.m, b.direction): (b.best, b.rule) for b in table.buckets}
    assert found == {
        (32, "da"): (None, "triton"),
        (32, "db"): (None, "triton"),
        (32, "forward"): ("cuda-z_jobs", "triton-skinny"),
        (32, "backward"): (None, "triton-skinny"),
        (512, "da"): ("library", "triton"),
        (512, "db"): ("library", "triton"),
        (512, "forward"): (None, "triton-skinny"),
        (512, "backward"): ("library", "triton-skinny"),
    }
    assert bucket(table, 32).ahead == 10.0
    assert re.search(r"forward +M=32 K=64 N=48 R=8 +float16 +cuda-z_jobs +100.0 us, triton-skinny 1000.0", started.out)
    assert re.search(
        r"cuda-z_jobs +lora_matmul +11 checks passed \(fp16\) +1 of 4 sizes, 10.00 x the rule's", started.out
    )

    (path,) = gpu.cache.iterdir()
    where = rf"measured at M=32 K=64 N=48 R=8, \d{{4}}-\d\d-\d\d, {re.escape(str(path))}"
    ahead = rf"-> cuda-z_jobs\n  10\.00 x as fast as the next: {where}\n"
    no_winner = r"-> triton-skinny\n  by the rule: no kernel was faster beyond the noise: measured at M="
    unlike = rf"-> triton-skinny\n  by the rule: nothing like it was measured: {re.escape(str(path))}\n"
    expected = [
        *((call, ahead) for call in (small, {"m": 20}, {"m": 100}, small | {"k": 96})),
        (large, f"{no_winner}512 "),
        ({"m": 1000}, f"{no_winner}512 "),
        (small | {"direction": "backward"}, f"{no_winner}32 "),
        *((small | other, unlike) for other in ({"dtype": "bfloat16"}, {"dropout": True}, {"m": 4000}, {"r": 64})),
        (large | {"direction": "backward"}, r"-> library\n  \d\.\d\d x as fast as the next: measured at M=512 "),
    ]
    grads = [{"m": m, "direction": direction} for m in (32, 512) for direction in ("da", "db")]
    answers = gpu.ask(*(call for call, _ in expected), *grads)
    for (call, words), (name, why) in zip(expected, answers, strict=False):
        assert re.search(words, why), (call, why)
        assert f"-> {name}\n" in why
    assert [name for name, _ in answers[len(expected) :]] == ["triton", "triton", "library", "library"]


def test_ctrl_c_keeps_what_is_done_ends_the_worker_and_the_same_command_goes_on(gpu: Gpu) -> None:
    in_a_proof = Planted(LORA, "triton-portable", "hangs", {"m": 17})
    at_a_size = Planted(LORA, "cuda-z_jobs", "hangs", {"m": 64, "k": N})
    stopped = []
    for planted in (in_a_proof, at_a_size):
        started = gpu.start(Script((planted,)), "--tokens", "32", "64")
        started.wait_until_it_hangs()
        started.signal(signal.SIGINT)
        assert started.wait() == 130
        assert "stopped: what is done is kept, and the same command goes on" in started.told
        assert started.workers
        assert not any(is_running(pid) for pid in started.workers)
        stopped.append(started)
        gpu.table  # noqa: B018 - is whole
    last = gpu.run(Script(), "--tokens", "32", "64")
    every = [f"{name} ({verb}, float16)" for verb, names in OURS.items() for name in names]
    assert proved(stopped[0])[-1] == "triton-portable (lora_matmul, float16)"
    assert timed(stopped[0]) == []
    assert proved(stopped[0])[:-1] + proved(stopped[1]) == every
    assert timed(stopped[1])[:-1] + timed(last) == list(dict.fromkeys(timed(stopped[1]) + timed(last)))
    assert proved(last) == []
    assert len(gpu.table.buckets) == 8
    assert all(proof.passed for proof in gpu.table.proofs)
    assert "up to date" not in last.out


def test_a_killed_command_leaves_a_whole_file_and_no_worker_that_hangs(gpu: Gpu) -> None:
    hanging = Planted(LORA, "cuda-serial", "hangs", {"m": 193})
    started = gpu.start(Script((hanging,), forked=False), "--tokens", "32")
    started.wait_until_it_hangs()
    started.signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert [proof.kernel for proof in gpu.table.proofs] == ["cuda-z_jobs"]
    assert len(started.workers) == 2
    deadline = time.monotonic() + 10.0
    while any(is_running(pid) for pid in started.workers):
        assert time.monotonic() < deadline, "a worker is left behind"
        time.sleep(0.05)


def test_two_commands_at_once_leave_what_both_have_found(gpu: Gpu) -> None:
    commands = [
        gpu.start(Script(dtypes=(name,)), "--tokens", tokens, "--dtype", name)
        for name, tokens in (("fp16", "32"), ("bf16", "64"))
    ]
    assert [started.wait() for started in commands] == [0, 0]
    table = gpu.table
    every = {(verb, name, dtype) for verb in OURS for name in OURS[verb] for dtype in ("float16", "bfloat16")}
    assert {proof[:3] for proof in table.proofs} == every
    directions = ("da", "db", "forward", "backward")
    assert {(b.direction, b.dtype, b.m) for b in table.buckets} == {
        (direction, *size) for direction in directions for size in (("float16", 32), ("bfloat16", 64))
    }


def test_named_kernels_are_held_to_the_rules_and_the_library_and_the_others_join_them_later(gpu: Gpu) -> None:
    script = Script((Planted(LORA, "triton-serial", [0.1]), Planted(LORA, "cuda-z_jobs", [0.5])))
    gpu.run(script, "--tokens", "32", "--kernel", "cuda-z_jobs")
    table = gpu.table
    mine = {"cuda-z_jobs", "triton-skinny"}
    assert {proof.kernel for proof in table.proofs} == {*mine, "cuda", "triton"}
    assert set(bucket(table, 32).times) == {*mine, "library"}
    assert bucket(table, 32).best == "cuda-z_jobs"
    whole = gpu.run(script, "--tokens", "32")
    table = gpu.table
    assert {name.partition(" ")[0] for name in proved(whole)} == set(OURS[LORA]) - mine
    # Those of rank_grad have had all kernels.
    assert [name.partition(" ")[0] for name in timed(whole)] == ["forward", "backward"]
    assert set(bucket(table, 32).times) == set(NAMES[LORA])
    assert bucket(table, 32).best == "triton-serial"
    assert timed(gpu.run(script, "--tokens", "32", "--kernel", "cuda-z_jobs")) == []
    assert [name for name, _ in gpu.ask({"m": 32})] == ["triton-serial"]
