"""Result files: JSON Lines, one record of the environment first, then the rows of each case and a line that ends it.

Rows count once their case is done, so a run may be killed anywhere: readable cases are whole, and a resumed run starts
at the first one that is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from .environment import Environment, check, differences
from .rows import Row, from_json

RESULTS = Path(__file__).parents[1] / "results"
LOCAL = RESULTS / "local"

_START = b'{"record": "environment"'


class Results(NamedTuple):
    """The content of a file: the rows of each finished case, and the ``size`` in bytes up to the last of them."""

    environment: Environment
    cases: dict[str, list[Row]]
    size: int

    @property
    def rows(self) -> list[Row]:
        """All rows, in the file's order."""
        return [row for rows in self.cases.values() for row in rows]

    @property
    def complete(self) -> bool:
        """True where every case of the run is there."""
        return bool(len(self.cases) == self.environment.get("cases"))


class ResultFile:
    """A run being written, case by case.

    What was there is put aside, an unfinished run as ``NAME.unfinished``, a finished one as ``NAME.previous``:
    ``aside`` is that path, None where there was nothing to lose.

    Raises:
        ValueError: ``path`` holds something else than results, or, to be resumed, results of another run.
    """

    def __init__(self, path: Path, environment: Environment, resume: bool = False) -> None:
        before = None
        self.finished: dict[str, list[Row]] = {}
        self.aside: Path | None = None
        if path.exists() and not _is_cut_off(path):
            if resume:
                before = read(path)
            elif suffix := _aside(path):
                self.aside = path.replace(path.with_name(path.name + suffix))
        if before:
            if differing := differences(before.environment, environment):
                raise ValueError(
                    f"{path} cannot be resumed, it is of another run ({'; '.join(differing)}): "
                    "without --resume this run starts over"
                )
            self.finished = before.cases
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if self.finished else "wb")
        if self.finished and before:
            self._file.truncate(before.size)
            self._file.seek(before.size)
        else:
            self._write({"record": "environment", **environment})

    def append(self, case: str, rows: Sequence[Row], seen: dict[str, Any]) -> None:
        """Adds a finished case; ``seen`` are the changing facts of the machine at its end."""
        self._write(*(row.to_json() for row in rows), {"record": "done", "case": case, **seen})
        self.finished[case] = list(rows)

    def _write(self, *records: dict[str, Any]) -> None:
        lines = "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in records)
        self._file.write(lines.encode())
        self._file.flush()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _is_cut_off(path: Path) -> bool:
    """True for a file without content: empty, or one of ours that ends within its first line."""
    first = path.read_bytes().partition(b"\n")
    return not first[1] and (not first[0] or first[0].startswith(_START))


def _aside(path: Path) -> str | None:
    """The suffix under which a file is put aside, None without a case; ValueError for what are no results at all."""
    content = path.read_bytes()
    parse(content[: content.index(b"\n") + 1] if b"\n" in content else content, str(path))
    try:
        results = read(path)
    except ValueError:
        return ".previous"
    if not results.cases:
        return None
    return ".previous" if results.complete else ".unfinished"


def read(path: Path) -> Results:
    """The results in a file; rows of a case that was cut short are left out.

    Raises:
        ValueError: the file is none of ours, or the environment or a row is not of the schema.
        OSError: it cannot be read.
    """
    results = parse(path.read_bytes(), str(path))
    try:
        check(results.environment)
    except ValueError as error:
        raise ValueError(f"{path}, line 1: {error}") from None
    return results


def parse(content: bytes, name: str) -> Results:
    """The results in the bytes of a file, its environment of any version; ``name`` is for the messages.

    Raises ValueError as :func:`read` does.
    """
    environment: Environment | None = None
    cases: dict[str, list[Row]] = {}
    rows: list[Row] = []
    size = position = 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        position += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            if environment is None:
                if record["record"] != "environment":
                    raise ValueError("expected an environment record")
                environment, size = {key: value for key, value in record.items() if key != "record"}, position
            elif record["record"] == "done":
                cases[record["case"]], rows, size = rows, [], position
            else:
                rows.append(from_json(record))
        except KeyError as error:
            raise ValueError(f"{name}, line {number}: {error} is missing: no result file of this package") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}, line {number}: {error}: no result file of this package") from None
    if environment is None:
        raise ValueError(f"{name} does not begin with an environment record: no result file of this package")
    return Results(environment, cases, size)
