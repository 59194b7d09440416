"""Keeps what was proven and measured, in a file that is whole whoever writes it or is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..atomic import new_file, temporary_name
from ..backends import measured
from ..backends.machine import Machine
from ..backends.measured import Bucket, Proof, Table


class Keeper:
    """The table of a machine and its file.

    A file at ``path`` that cannot be used is put aside under another name, and stays.

    Args:
        path: the file.
        machine: the machine that the table is of.

    Attributes:
        table: what is known so far.
        obstacle: why nothing can be written, or None.
        unusable: why the file that was there is not gone on with, or None.
        aside: where an older file was put, or None.
    """

    def __init__(self, path: Path, machine: Machine) -> None:
        self.path = path
        self.table = self._own = Table(machine)
        self.obstacle: str | None = None
        self.unusable: str | None = None
        self.aside: Path | None = None
        try:
            self.table = measured.read(path, machine)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.obstacle = f"{path}: {error.strerror}"
        except ValueError as error:
            self.unusable = str(error)

    def add(self, *records: Proof | Bucket) -> None:
        """Adds records, each in the place of one about the same, and writes the file."""
        self.table, self._own = _with(self.table, records), _with(self._own, records)
        if self.obstacle is not None:
            return
        try:
            self._write()
        except OSError as error:
            self.obstacle = f"{self.path}: {error.strerror or error}"

    def _write(self) -> None:
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            try:
                # What another process has found out meanwhile stays, where this one has found nothing out about it.
                others = measured.read(path, self.table.machine)
                proofs = (proof for proof in self._own.proofs if not _is_withdrawn(proof, others))
                self.table = _with(others, (*proofs, *self._own.buckets))
            except FileNotFoundError:
                pass
            except ValueError:
                self.aside = temporary_name(path).with_suffix(".unusable")
                path.replace(self.aside)
            with new_file(path) as temporary:
                temporary.write_text(self.table.text(), encoding="utf-8")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time read and write in a folder, where the system can lock it: leaves no file behind."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _is_withdrawn(proof: Proof, others: Table) -> bool:
    """Whether another process has seen a kernel fail since it passed here."""
    other = others.proof(proof.verb, proof.kernel, proof.dtype)
    return proof.passed and other is not None and not other.passed and other.time > proof.time


def _with(table: Table, records: Iterable[Proof | Bucket]) -> Table:
    proofs = {(proof.verb, proof.kernel, proof.dtype): proof for proof in table.proofs}
    buckets = {(bucket.kind, bucket.sizes): bucket for bucket in table.buckets}
    for record in records:
        if isinstance(record, Proof):
            proofs[record.verb, record.kernel, record.dtype] = record
        else:
            buckets[record.kind, record.sizes] = record
    return Table(table.machine, tuple(proofs.values()), tuple(buckets.values()))
