"""Writes files and folders that are whole at every moment: beside their place, flushed, then renamed into it.

A process that is killed leaves the old content under its name, and at worst a leftover ``.<name>.….tmp`` beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS


def temporary_name(path: Path) -> Path:
    """Returns an unused name in the same folder."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; it replaces ``path`` when the block ends without an error."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if not file.is_symlink():
                sync(file)
        sync(temporary)
        if path.exists():
            here = Path.cwd()
            _exchange(temporary, path)
            if here.is_relative_to(path) and here.exists():
                os.chdir(here)  # into the new folder of that name: the old one is about to go
        else:
            temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a path to write a file to; it replaces ``path`` when the block ends without an error."""
    temporary = temporary_name(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk, so that a rename cannot overtake its content."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders in one step where the system can; in two elsewhere, the old one first."""
    if not _exchanged_at_once(bytes(one), bytes(other)):
        aside = temporary_name(other)
        other.rename(aside)
        try:
            one.rename(other)
        except OSError:
            aside.rename(other)
            raise
        aside.rename(one)


def _exchanged_at_once(one: bytes, other: bytes) -> bool:
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(libc.renamex_np(one, other, _EXCHANGE) == 0)
        return bool(libc.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _EXCHANGE) == 0)
    except (AttributeError, OSError, TypeError):  # no such call, no such library, no libc at all
        return False
