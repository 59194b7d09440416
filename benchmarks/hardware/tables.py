"""Files a table that ``python -m fastlora.tune --export`` wrote: for the package, and as lines of the ledger."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fastlora.atomic import new_file
from fastlora.backends import dispatch
from fastlora.backends.measured import COMMAND, Bucket, Table
from fastlora.tune import report
from fastlora.tune.plan import DTYPES

_EXPORTED = f"expected what `{COMMAND} --export FILE` wrote on a GPU"
_GPU = re.compile(r"sm_\d+|gfx[0-9a-f]+")
_DTYPES = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}


def file_table(path: Path, tables: Path, ledger: Path) -> list[str]:
    """Writes an exported table to the folder of the package's, and its rows into the ledger; returns what was done.

    Raises:
        ValueError: it is none, or none that may be filed, and why; nothing is written then.
        OSError: something cannot be read or written.
    """
    table, rows = _read(path)
    text, lines = with_rows(ledger.read_text(encoding="utf-8"), rows)
    target = tables / f"{table.machine.slug}.json"
    tables.mkdir(exist_ok=True)
    replaced = " in the place of an older one" if target.exists() else ""
    # The ledger first: a table without its lines is what must not be.
    for file, content in ((ledger, text), (target, table.text())):
        with new_file(file) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [f"wrote {target}{replaced}: {len(table.proofs)} proofs, {len(table.buckets)} sizes", *lines]


def _read(path: Path) -> tuple[Table, list[list[str]]]:
    """The table in a file, and the cells of its rows of the ledger.

    Raises:
        ValueError: it may not be filed, and why.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = Table.parse(text)
    except UnicodeDecodeError:
        raise ValueError(f"it is no text: {_EXPORTED}, or the folder of a run") from None
    except ValueError as error:
        raise ValueError(f"{error}: {_EXPORTED}") from None
    machine = table.machine
    if not _GPU.fullmatch(machine.capability):
        raise ValueError(
            f"it is of {machine.device} ({machine.capability}), which is no GPU: the package has tables of GPUs alone"
        )
    for proof in table.proofs:
        known = [kernel.name for kernel in dispatch.KERNELS.get(proof.verb, ())]
        if proof.kernel not in known or proof.dtype not in _DTYPES:
            raise ValueError(
                f"it has a proof of {proof.kernel} ({proof.verb}, {proof.dtype}): expected a kernel, verb and dtype of "
                "this tree, so export it with the fastlora of this commit"
            )
    for bucket in table.buckets:
        if obstacle := objection(table, bucket):
            raise ValueError(
                f"{bucket.best} is the fastest at {bucket} ({bucket.direction}, {bucket.dtype}) {obstacle}"
            )
    return table, _rows(table, json.loads(text).get("ledger"))


def objection(table: Table, bucket: Bucket) -> str | None:
    """Why the kernel that a bucket names may not be taken there; None where it may."""
    kernel = (bucket.best or "library").partition(":")[0]
    if kernel == "library":
        return None
    proof = table.proof(bucket.verb, kernel, bucket.dtype)
    if proof is None:
        return f"but has no proof: run `{COMMAND}` there once more, and export again"
    if not proof.passed:
        return f"but failed its checks ({proof.why}): run `{COMMAND} --again` there, and export again"
    return None


def _rows(table: Table, exported: object) -> list[list[str]]:
    """The cells of the exported rows, which are those of the table's proofs."""
    if not isinstance(exported, list):
        raise ValueError(f"it has no `ledger`, such as a table in a cache directory: {_EXPORTED}")
    if exported != list(report.ledger(table)):
        raise ValueError(
            "its `ledger` does not say what its proofs do: export it with the fastlora of this commit, change nothing"
        )
    # What a kernel said as it failed, in the last cell, may hold anything.
    rows = [[" ".join(cell.split()) for cell in row.strip("|").split("|", 5)] for row in exported]
    return [[*row[:5], row[5].replace("|", "/")] for row in rows]


def with_rows(ledger: str, rows: Sequence[list[str]]) -> tuple[str, list[str]]:
    """The ledger with the last cells of these rows, and the lines that changed.

    A row that it does not have comes behind the last of that kernel and verb, with nothing done without a GPU.
    """
    lines, changed = ledger.splitlines(), []
    for row in rows:
        known = [_cells(line) for line in lines]
        at = next((i for i, cells in enumerate(known) if cells[:4] == row[:4]), None)
        if at is None:
            at = 1 + max(i for i, cells in enumerate(known) if cells[:2] == row[:2])
            lines.insert(at, "")
            without_gpu = "none"
        else:
            without_gpu = known[at][4]
        lines[at] = f"| {' | '.join([*row[:4], without_gpu, row[5]])} |"
        changed.append(lines[at])
    return "\n".join(lines) + "\n", changed


def _cells(line: str) -> list[str]:
    """The cells of a row of the ledger; none of another line."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells if line.startswith("| ") and len(cells) == 6 else []
