"""The file of a table: whole at every moment, what others found out beside it, and nothing lost that was there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from fastlora.backends import measured
from fastlora.backends.machine import machine_of
from fastlora.backends.measured import Bucket, Proof, Table
from fastlora.tune.keep import Keeper

ROOT = Path(__file__).resolve().parents[2]
MACHINE = machine_of(torch.device("cpu"))
PROOF = Proof("lora_matmul", "triton-serial", "float16", 9, True, "", "2026-11-25")
TIMES = {"library": [1.0, 1.1, 1.2]}
BUCKET = Bucket(
    "lora_matmul", "forward", "float16", "float16", False, 8, 64, 48, 4, TIMES, "library", None, 1.0, "2026-11-25"
)


def test_what_is_added_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "table.json"
    keeper = Keeper(path, MACHINE)
    keeper.add(PROOF)
    keeper.add(BUCKET)
    assert measured.read(path, MACHINE) == keeper.table == Table(MACHINE, (PROOF,), (BUCKET,))
    assert os.listdir(path.parent) == ["table.json"]


def test_a_record_about_the_same_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    for passed in (True, False):
        Keeper(path, MACHINE).add(PROOF._replace(passed=passed), BUCKET._replace(best="x" if passed else None))
    assert measured.read(path, MACHINE) == Table(MACHINE, (PROOF._replace(passed=False),), (BUCKET,))
    Keeper(path, MACHINE).add(PROOF._replace(dtype="float32"), BUCKET._replace(m=9))
    table = measured.read(path, MACHINE)
    assert (len(table.proofs), len(table.buckets)) == (2, 2)


def test_two_that_tune_at_once_keep_what_both_found(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    one, other = Keeper(path, MACHINE), Keeper(path, MACHINE)
    one.add(PROOF)
    other.add(PROOF._replace(kernel="triton-portable"))
    one.add(BUCKET)
    assert {proof.kernel for proof in measured.read(path, MACHINE).proofs} == {"triton-serial", "triton-portable"}
    assert measured.read(path, MACHINE).buckets == (BUCKET,)


def test_many_that_write_at_the_same_moment_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    together = threading.Barrier(8)

    def write(m: int) -> None:
        keeper = Keeper(path, MACHINE)
        together.wait()
        keeper.add(BUCKET._replace(m=m))

    threads = [threading.Thread(target=write, args=(m,)) for m in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bucket.m for bucket in measured.read(path, MACHINE).buckets) == list(range(1, 9))
    assert os.listdir(tmp_path) == ["table.json"]


@pytest.mark.parametrize("proven_by_both", [True, False])
def test_a_kernel_that_another_has_seen_fail_stays_failed(proven_by_both: bool, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    Keeper(path, MACHINE).add(PROOF)
    one, other = Keeper(path, MACHINE), Keeper(path, MACHINE)
    if proven_by_both:
        one.add(PROOF)
    failed = PROOF._replace(passed=False, why="hung", time="2026-11-26")
    other.add(failed)
    one.add(BUCKET)
    assert one.table.proofs == measured.read(path, MACHINE).proofs == (failed,)
    later = PROOF._replace(time="2026-11-27")
    one.add(later)
    assert measured.read(path, MACHINE).proofs == (later,)


@pytest.mark.parametrize("content", ["", "{", Table(MACHINE._replace(torch="1.0")).text()])
def test_a_file_that_cannot_be_used_is_put_aside_and_stays(content: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    keeper = Keeper(path, MACHINE)
    assert keeper.unusable
    assert os.listdir(tmp_path) == ["table.json"]  # until there is something to write
    keeper.add(PROOF)
    assert keeper.aside is not None
    assert keeper.aside.read_text() == content
    assert measured.read(path, MACHINE).proofs == (PROOF,)
    assert len(os.listdir(tmp_path)) == 2


def test_where_nothing_can_be_written_the_table_lives_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keeper = Keeper(tmp_path / "file" / "table.json", MACHINE)
    keeper.add(PROOF)
    keeper.add(BUCKET)
    assert keeper.table == Table(MACHINE, (PROOF,), (BUCKET,))
    assert keeper.obstacle == f"{tmp_path / 'file' / 'table.json'}: Not a directory"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    keeper = Keeper(tmp_path / "table.json", MACHINE)
    keeper.add(PROOF)
    assert keeper.obstacle == f"{tmp_path / 'table.json'}: Permission denied"


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    Keeper(path, MACHINE).add(PROOF)
    before = path.read_bytes()
    keeper = Keeper(path, MACHINE)

    def full(self: Path, *args: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    keeper.add(BUCKET)
    assert keeper.obstacle == f"{path}: No space left on device"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["table.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_whole_table(tmp_path: Path) -> None:
    """A process adds a proof and is killed: before each of its system calls that Python sees, and at random moments."""
    code = textwrap.dedent(
        """
        import os, random, signal, sys, time
        from pathlib import Path
        import torch
        from fastlora.backends import measured
        from tests.tune.test_keep import MACHINE, PROOF, BUCKET
        from fastlora.tune.keep import Keeper

        path = Path(sys.argv[1]) / "table.json"

        def start():
            path.unlink(missing_ok=True)
            Keeper(path, MACHINE).add(BUCKET)

        def killed(at):
            child = os.fork()
            if child == 0:
                calls = 0
                def hook(event, args):
                    nonlocal calls
                    if event == "open" or event.startswith("os.") and event != "os.kill":
                        calls += 1
                        if calls == at + 1:
                            os.kill(os.getpid(), signal.SIGKILL)
                keeper = Keeper(path, MACHINE)
                if at is not None:
                    sys.addaudithook(hook)
                    keeper.add(PROOF)
                    os._exit(0)
                while True:
                    keeper.add(PROOF)
            if at is None:
                time.sleep(random.random() * 0.02)
                os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1] == signal.SIGKILL

        def state():
            table = measured.read(path, MACHINE)
            assert table.buckets == (BUCKET,)
            assert table.proofs in ((), (PROOF,))
            return len(table.proofs)

        states, at = [], 0
        start()
        while killed(at):
            states.append(state())
            start()
            at += 1
        assert state() == 1
        assert states == sorted(states), states  # without it until the one step, with it from then on
        random.seed(0)
        for _ in range(40):
            start()
            assert killed(None)
            state()
        print(len(states), sum(states))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps, after = map(int, done.stdout.split())
    assert steps >= 5
    assert after >= 1
