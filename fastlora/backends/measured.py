"""The tables that ``auto`` reads: which kernels are proven on a machine, and which is the fastest at which sizes.

A user's own table is what ``python -m fastlora.tune`` keeps in the cache directory, or the file that ``FASTLORA_TABLE``
names (``none`` for no table at all); it holds for the machine it was made on. The package's own are in ``tables/``, by
the name of the GPU; each of their proofs has its line in benchmarks/HARDWARE.md. The user's is asked first.

Nothing is measured here: a table is read once in a process for each device, when a kernel is first chosen there.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..text import dtype_name
from .machine import Machine, machine_of
from .request import Request

_log = logging.getLogger("fastlora")

FORMAT = 1
COMMAND = "python -m fastlora.tune"
_NO_TABLE = "none"
PACKAGE_TABLES = Path(__file__).with_name("tables")

# How far outside of the sizes that were measured a table is still believed, as a factor on each of M, K, N and R.
REACH = 4.0


class Proof(NamedTuple):
    """How the checks of one kernel ended on a machine, for one verb and dtype."""

    verb: str
    kernel: str
    dtype: str
    checks: int
    passed: bool
    why: str
    time: str


class Bucket(NamedTuple):
    """The times of one verb, in one direction, at one size.

    Attributes:
        direction: ``forward``, or ``backward`` with all that eager code does there (dx, da and db); of rank_grad ``da``
            or ``db``.
        times: milliseconds of each kernel: a fifth of the runs were faster, the median, a fifth were slower.
        rule: the kernel that runs here without a table.
        best: the fastest kernel, where it beats the rule's beyond the noise; else None.
        ahead: the median of the next kernel over that of the best; 1 where there is none.
        time: when it was measured.
    """

    verb: str
    direction: str
    dtype: str
    adapter_dtype: str
    dropout: bool
    m: int
    k: int
    n: int
    r: int
    times: Mapping[str, Sequence[float]]
    rule: str
    best: str | None
    ahead: float
    time: str

    @property
    def kind(self) -> tuple[str, str, str, str, bool]:
        """What a call must have in common with it."""
        return self.verb, self.direction, self.dtype, self.adapter_dtype, self.dropout

    @property
    def sizes(self) -> tuple[float, ...]:
        """M, K, N and R on a scale of factors."""
        return tuple(math.log2(size) for size in (self.m, self.k, self.n, self.r))

    def __str__(self) -> str:
        return f"M={self.m} K={self.k} N={self.n} R={self.r}"


class Table(NamedTuple):
    """What one machine has proven and measured."""

    machine: Machine
    proofs: tuple[Proof, ...] = ()
    buckets: tuple[Bucket, ...] = ()

    @staticmethod
    def parse(text: str) -> Table:
        """The table that ``text`` holds.

        Raises:
            ValueError: it is none, and why.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is no JSON: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"it has format {found!r}, this fastlora reads {FORMAT}")
        proofs, buckets = content.get("proofs"), content.get("buckets")
        if not isinstance(proofs, list) or not isinstance(buckets, list):
            raise ValueError("it has no list of proofs and of buckets")
        return Table(
            _record(Machine, content.get("machine")),
            tuple(_record(Proof, proof) for proof in proofs),
            tuple(_checked(_record(Bucket, bucket)) for bucket in buckets),
        )

    def text(self) -> str:
        """The table as a file holds it, a line for each proof and bucket."""
        proofs, buckets = (
            ",\n".join(f"  {json.dumps(record._asdict())}" for record in records)
            for records in (self.proofs, self.buckets)
        )
        head = f'{{"format": {FORMAT}, "machine": {json.dumps(self.machine._asdict())}'
        return f'{head},\n "proofs": [\n{proofs}\n ],\n "buckets": [\n{buckets}\n ]}}\n'

    def proof(self, verb: str, kernel: str, dtype: str) -> Proof | None:
        """How the checks of a kernel ended, or None where it has had none."""
        named = (proof for proof in self.proofs if (proof.verb, proof.kernel, proof.dtype) == (verb, kernel, dtype))
        return next(named, None)

    def nearest(self, request: Request) -> Bucket | None:
        """The bucket of the request's kind that is nearest by the factors of its sizes; None where all are too far."""
        if request.z_only:
            return None
        kind = (request.verb, request.direction, *_dtypes(request), request.dropout)
        buckets = [bucket for bucket in self.buckets if bucket.kind == kind]
        sizes = tuple(math.log2(size) for size in (request.m, request.k, request.n, request.r))
        reach = math.log2(REACH)
        for i, size in enumerate(sizes):
            known = [bucket.sizes[i] for bucket in buckets]
            if not known or not min(known) - reach <= size <= max(known) + reach:
                return None
        return min(buckets, key=lambda bucket: math.dist(bucket.sizes, sizes))


class Source(NamedTuple):
    """A table in use, and where it came from in words: ``the package`` or a path."""

    table: Table
    origin: str

    def __str__(self) -> str:
        proofs, buckets = self.table.proofs, self.table.buckets
        times = [proof.time for proof in proofs] + [bucket.time for bucket in buckets]
        until = f" until {max(times)[:10]}" if times else ""
        return f"{self.origin}: {len(proofs)} proofs, {len(buckets)} sizes{until}"


class Choice(NamedTuple):
    """What the tables say of a request: the kernel, or None where the rule holds, and why in words."""

    kernel: str | None
    why: str


def choice(request: Request) -> Choice:
    """The kernel that the first table with a bucket for this request takes there."""
    sources = sources_of(request.device)
    for table, origin in sources:
        bucket = table.nearest(request)
        if bucket is None:
            continue
        where = f"measured at {bucket}, {bucket.time[:10]}, {origin}"
        if bucket.best is None:
            return Choice(None, f"no kernel was faster beyond the noise: {where}")
        # A form of a kernel needs the proof of the kernel.
        if obstacle := unproven(request, bucket.best.partition(":")[0]):
            return Choice(None, f"{bucket.best} was faster but {obstacle}: {where}")
        return Choice(bucket.best, f"{bucket.ahead:.2f} x as fast as the next: {where}")
    if sources:
        return Choice(None, f"nothing like it was measured: {', '.join(origin for _, origin in sources)}")
    if os.environ.get("FASTLORA_TABLE") == _NO_TABLE:
        return Choice(None, f"FASTLORA_TABLE={_NO_TABLE}")
    if request.device.type != "cuda":
        return Choice(None, "no table for this CPU")
    return Choice(None, f"no table for {torch.cuda.get_device_name(request.device)}: {COMMAND}")


# Kernels that run without a proof in a table: nothing is written by us, or it is checked at its first use.
TRUSTED = frozenset({"library", "triton-skinny"})
_TRUSTED_OF = {"lora_matmul": TRUSTED, "rank_grad": frozenset({"library", "triton"})}


def unproven(request: Request, kernel: str) -> str | None:
    """Why the tables do not let a kernel run this request: it failed, or has no proof. None where it may run."""
    proofs = [
        (proof, origin)
        for table, origin in sources_of(request.device)
        if (proof := table.proof(request.verb, kernel, dtype_name(request.dtype))) is not None
    ]
    if proofs:
        proof, origin = proofs[0]
        return None if proof.passed else f"failed its checks on {proof.time[:10]} ({proof.why}; {origin})"
    return None if kernel in _TRUSTED_OF[request.verb] else "is not proven"


@functools.cache
def sources_of(device: torch.device) -> tuple[Source, ...]:
    """The tables for a device in the order they are asked; says once of each file why it is not used."""
    named = os.environ.get("FASTLORA_TABLE")
    if named == _NO_TABLE:
        return ()
    machine = machine_of(device)
    found = list(_users(machine, named))
    if device.type == "cuda":
        found += _packages(machine)
        if not found:
            _warn("no kernel has been measured on this %s: `%s` finds the fastest", machine.device, COMMAND)
    return tuple(found)


def forget() -> None:
    """Lets every table be read anew."""
    sources_of.cache_clear()


def table_path(machine: Machine) -> Path:
    """The file that the machine's own table is kept in."""
    named = os.environ.get("FASTLORA_TABLE")
    if named and named != _NO_TABLE:
        return Path(named)
    return cache_folder() / f"{machine.slug}-{machine.key}.json"


def cache_folder() -> Path:
    """``FASTLORA_CACHE``, else ``fastlora`` in the user's cache directory."""
    if named := os.environ.get("FASTLORA_CACHE"):
        return Path(named)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, by the XDG specification.
    return (Path(shared) if Path(shared).is_absolute() else Path("~/.cache").expanduser()) / "fastlora"


def read(path: Path, machine: Machine) -> Table:
    """The table in a file, which must be of this machine.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no table, or of another machine, and why.
    """
    try:
        table = Table.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None
    if differences := table.machine.differences(machine):
        # Told from the table's side: what it is of, and what is here.
        raise ValueError(f"it is of another machine: here is {differences}")
    return table


def _warn(message: str, *values: object) -> None:
    """Warns, of several ranks of one machine in the first alone: they read the same files."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _log.warning(message, *values)


def _users(machine: Machine, named: str | None) -> Iterator[Source]:
    path = table_path(machine)
    try:
        yield Source(read(path, machine), str(path))
    except FileNotFoundError:
        if named:
            _warn("FASTLORA_TABLE=%s is no file: make it with `%s`", path, COMMAND)
        else:
            _say_what_is_outdated(machine)
    except (OSError, ValueError) as error:
        _warn("the table %s is not used: %s", path, error)


def _say_what_is_outdated(machine: Machine) -> None:
    """Names the newest table of this device from before something else was changed."""
    try:
        paths = sorted(cache_folder().glob(f"{machine.slug}-*.json"), key=lambda path: path.stat().st_mtime)
        if paths:
            read(paths[-1], machine)
    except (OSError, ValueError) as error:
        _warn("the table %s is not used: %s; measure again with `%s`", paths[-1], error, COMMAND)


def _packages(machine: Machine) -> Iterator[Source]:
    path = PACKAGE_TABLES / f"{machine.slug}.json"
    if path.is_file():
        table = Table.parse(path.read_text(encoding="utf-8"))
        if (table.machine.device, table.machine.capability) == (machine.device, machine.capability):
            yield Source(table, "the package's own table")


def _dtypes(request: Request) -> tuple[str, str]:
    return dtype_name(request.dtype), dtype_name(request.adapter_dtype)


R = TypeVar("R", bound=tuple[Any, ...])


def _record(kind: type[R], fields: object) -> R:
    """A NamedTuple of a JSON object that has exactly its fields, of their types.

    Raises:
        ValueError: it has not, and which.
    """
    expected = _types(kind)
    if not isinstance(fields, dict) or set(fields) != set(expected):
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"a {kind.__name__.lower()} has {found}: expected {sorted(expected)}")
    for name, allowed in expected.items():
        if not isinstance(fields[name], allowed) or (isinstance(fields[name], bool) and bool not in allowed):
            raise ValueError(f"{name} of a {kind.__name__.lower()} is {fields[name]!r}")
    return kind(**fields)


@functools.cache
def _types(kind: type) -> dict[str, tuple[type, ...]]:
    def plain(hint: Any) -> tuple[type, ...]:
        if isinstance(hint, types.UnionType):
            return tuple(kind for part in typing.get_args(hint) for kind in plain(part))
        if hint is float:
            return int, float
        return (dict,) if typing.get_origin(hint) is not None else (hint,)

    return {name: plain(hint) for name, hint in typing.get_type_hints(kind).items()}


def _checked(bucket: Bucket) -> Bucket:
    sizes = (bucket.m, bucket.k, bucket.n, bucket.r)
    times = [ms for spread in bucket.times.values() for ms in (spread if isinstance(spread, list) else (None,))]
    if min(sizes) < 1 or not all(isinstance(ms, int | float) for ms in times):
        raise ValueError(f"a bucket has the sizes {sizes} and the times {bucket.times}")
    return bucket
