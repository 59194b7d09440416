"""Keeps what was proven and measured, in a file that is whole whoever writes it or is killed meanwhile."""

from __future__ import annotations

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
        self.table = Table(machine)
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
        self.table = _with(self.table, records)
        if self.obstacle is not None:
            return
        try:
            self._write()
        except OSError as error:
            self.obstacle = f"{self.path}: {error.strerror or error}"

    def _write(self) -> None:
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # What another process has found out meanwhile stays, where it is about something else.
            others = measured.read(path, self.table.machine)
            self.table = _with(others, (*self.table.proofs, *self.table.buckets))
        except FileNotFoundError:
            pass
        except ValueError:
            self.aside = temporary_name(path).with_suffix(".unusable")
            path.replace(self.aside)
        with new_file(path) as temporary:
            temporary.write_text(self.table.text(), encoding="utf-8")


def _with(table: Table, records: tuple[Proof | Bucket, ...]) -> Table:
    proofs = {(proof.verb, proof.kernel, proof.dtype): proof for proof in table.proofs}
    buckets = {(bucket.kind, bucket.sizes): bucket for bucket in table.buckets}
    for record in records:
        if isinstance(record, Proof):
            proofs[record.verb, record.kernel, record.dtype] = record
        else:
            buckets[record.kind, record.sizes] = record
    return Table(table.machine, tuple(proofs.values()), tuple(buckets.values()))
