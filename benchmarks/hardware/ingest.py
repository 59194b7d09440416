"""Files what a run on a GPU brought back: rows, the ledger's lines, and the README rendered from both.

Nothing is written that the run's own files do not show: rows of finished cases, counts of checks that ran, the commit
and the GPU that the run recorded. Rows go to files of their own (``hardware-*``), so that no whole profile is replaced.
What ``python -m fastlora.tune --export`` wrote is filed too (:mod:`.tables`).
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.backends.measured import PACKAGE_TABLES

from ..records.environment import Environment, slug_of
from ..records.files import RESULTS, Results, read
from ..report import command as report
from . import outcomes, tables
from .outcomes import Check, Tally
from .run import ARCHIVE, ROOT, Ended, all_outcomes, read_table, unpack
from .stages import STAGES, TIMED
from .sweep import loop_rate

LEDGER = ROOT / "benchmarks" / "HARDWARE.md"
README = ROOT / "README.md"
PREFIX = "hardware-"
NOT_RUN = "not yet run on hardware"


class Places(NamedTuple):
    """What an ingest writes to."""

    results: Path = RESULTS
    ledger: Path = LEDGER
    readme: Path = README
    tables: Path = PACKAGE_TABLES


def ingest(path: Path, places: Places | None = None) -> str:
    """Files the results in a folder (``results.tgz``, or what it holds) or an exported table; returns what was done.

    Raises:
        ValueError: the run says of no GPU or of no clean commit what it was, or the file is no table to be filed.
        OSError: something cannot be read or written.
    """
    places = places or Places()
    if path.is_file():
        return "\n".join(tables.file_table(path, places.tables, places.ledger))
    folder = path
    if not (folder / ARCHIVE).exists():
        return "\n".join(_ingest(folder, places))
    with tempfile.TemporaryDirectory() as unpacked:
        unpack(folder / ARCHIVE, Path(unpacked))
        return "\n".join(_ingest(Path(unpacked), places))


def _ingest(work: Path, places: Places) -> list[str]:
    facts = _facts(work)
    device = places.results / slug_of(facts["device_name"])
    device.mkdir(parents=True, exist_ok=True)
    said = [line for stage in TIMED if (line := _file_rows(work / f"{stage}.jsonl", device, facts))]
    said.append(_file_summary(work, device, facts))
    found = outcomes.tallies(all_outcomes(work))
    text, lines = with_results(places.ledger.read_text(encoding="utf-8"), facts, found, unfinished(read_table(work)))
    places.ledger.write_text(text, encoding="utf-8")
    said += lines or [f"no line of the ledger: no kernel that has one for {capability(facts)} was checked to the end"]
    if report.devices(places.results):
        report.run(argparse.Namespace(readme=places.readme, results=places.results))
    return said


def _facts(work: Path) -> Environment:
    path = work / "facts.json"
    if not path.exists():
        raise ValueError(f"expected {ARCHIVE} or what it holds: there is no {path.name}, which every run begins with")
    facts: Environment = json.loads(path.read_text(encoding="utf-8"))
    if facts["device"] != "cuda" or not facts["gpu"]:
        raise ValueError(f"expected the results of a GPU, got those of {facts['device']}")
    if not facts["commit"] or facts["dirty"]:
        changes = " with local changes" if facts["dirty"] else ""
        raise ValueError(
            f"the run was of {facts['commit'] or 'an unknown commit'}{changes}: "
            "only those of a commit are filed; commit first, and name it by --commit where there is no git"
        )
    return facts


def capability(facts: Environment) -> str:
    """The architecture as the ledger has it, such as ``sm_90``."""
    return "sm_" + str(facts["gpu"]["capability"]).replace(".", "")


def _file_rows(path: Path, device: Path, facts: Environment) -> str | None:
    """Files the finished cases of one stage; returns what was done, or None where the stage left nothing."""
    if not path.exists():
        return None
    results, target = read(path), device / f"{PREFIX}{path.name}"
    named = ("commit", "dirty", "device_name")
    if differing := [name for name in named if results.environment[name] != facts[name]]:
        return f"left out {path.name}: its {', '.join(differing)} are not the run's"
    if not results.cases:
        return f"left out {path.name}: no case was finished"
    if target.exists() and (more := set(read(target).cases) - set(results.cases)):
        return f"left out {path.name}: {target} has {len(more)} cases that it lacks"
    target.write_bytes(finished(path.read_bytes(), results))
    planned = results.environment["cases"]
    return f"wrote {target}: {len(results.cases)} of {planned} cases"


def finished(content: bytes, results: Results) -> bytes:
    """A result file as one of the cases that were finished: of the others nothing is known."""
    if results.complete:
        return content
    names = list(results.cases)
    settings = results.environment["settings"] | {"all": names}
    record = {"record": "environment", **results.environment, "cases": len(names), "settings": settings}
    first = json.dumps(record, allow_nan=False, ensure_ascii=False).encode()
    return first + content[content.index(b"\n") : results.size]


def _file_summary(work: Path, device: Path, facts: Environment) -> str:
    """What is no row: machine, stages, ceilings and the sweep by K, as numbers and as a page."""
    tests = all_outcomes(work)
    summary: dict[str, Any] = {"facts": facts, "stages": [ended._asdict() for ended in read_table(work)]}
    summary |= {name: _json(work / f"{name}.json") for name in ("ceilings", "sweep")}
    summary["failed"] = [str(outcome) for outcome in tests.values() if outcome.is_failure]
    path = device / "hardware.json"
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(summary), encoding="utf-8")
    return f"wrote {path} and {path.with_suffix('.md').name}"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # The stage did not run, or was ended as it wrote.
        return None


def page(summary: Mapping[str, Any]) -> str:
    """The summary in words and tables."""
    facts = summary["facts"]
    lines = [f"# {facts['device_name']}: a run of `python -m benchmarks.hardware`", ""]
    lines += [f"Commit {facts['commit'][:9]}, {facts['time'][:10]}, torch {facts['packages']['torch']}.", ""]
    lines += ["| stage | result | s |", "|---|---|--:|"]
    lines += [f"| {e['stage']} | {e['result']} | {e['seconds']:.0f} |" for e in summary["stages"]]
    if ceilings := summary["ceilings"]:
        rate = 1e-12 * ceilings["copy"]["bytes_per_second"]
        lines += ["", f"A copy moves {rate:.2f} TB/s, read and written. The vendor's GEMM, bfloat16:", ""]
        lines += ["| M | K | N | µs | TFLOP/s |", "|--:|--:|--:|--:|--:|"]
        for p in ceilings["products"]:
            lines.append(f"| {p['m']} | {p['k']} | {p['n']} | {1e3 * p['ms']['p50']:.0f} | {1e-12 * p['flops']:.0f} |")
    if sweep := summary["sweep"]:
        lines += ["", *_sweep_table(sweep)]
    if summary["failed"]:
        lines += ["", "Tests that failed:", "", *(f"- {line}" for line in summary["failed"])]
    return "\n".join(lines) + "\n"


def _sweep_table(sweep: Mapping[str, Any]) -> list[str]:
    """Each kernel's forward over the vendor's GEMM by K, and in brackets the rate of what that K adds."""
    m, n, all_lines = sweep["m"], sweep["n"], sweep["lines"]
    ks = list(dict.fromkeys(line["k"] for line in all_lines))
    lines = [
        f"Forward over the vendor's GEMM at M = {m}, N = {n}, R = {sweep['r']}; in brackets TFLOP/s of the added K:"
    ]
    lines += ["", f"| kernel | {' | '.join(f'K = {k}' for k in ks)} |", f"|---|{'--:|' * len(ks)}"]
    for kernel in dict.fromkeys(line["kernel"] for line in all_lines):
        cells = []
        for k in ks:
            line = next((x for x in all_lines if (x["kernel"], x["k"]) == (kernel, k)), None)
            rate = loop_rate(all_lines, kernel, k, m, n)
            loop = "" if rate is None else f" ({1e-12 * rate:.0f})"
            ratio = None if line is None else f"{line['ratio']:.3f}{loop}" if line["status"] == "ok" else line["status"]
            cells.append(ratio or "-")
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return lines


def unfinished(table: Sequence[Ended]) -> set[str]:
    """The stages of tests that did not run, or were ended before all of their tests had."""
    ended = {line.stage: line.result for line in table}
    tests = [stage.name for stage in STAGES if stage.kind == "tests"]
    return {name for name in tests if not re.fullmatch(r"ok|\d+ failed", ended.get(name, "no time"))}


def with_results(
    ledger: str, facts: Environment, found: Mapping[Check, Tally], missing: set[str]
) -> tuple[str, list[str]]:
    """The ledger with what was found, and the lines that changed.

    A kernel passed where each stage that is about it came to its end, no check failed, and whole steps at real sizes
    are among them, or for ``rank_grad`` behind them. A check that failed is written down whatever else there is.
    """
    changed, lines = [], []
    for line in ledger.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 6 and cells[2] == capability(facts):
            check = Check(cells[1], cells[0], cells[3])
            words = _in_words(check, found.get(check, Tally()), missing)
            if words:
                cells[5] = f"{facts['device_name']}, {facts['commit'][:9]}: {words}"
                line = f"| {' | '.join(cells)} |"
                changed.append(line)
        lines.append(line)
    return "\n".join(lines) + "\n", changed


def _in_words(check: Check, tally: Tally, missing: set[str]) -> str | None:
    """What the ledger says of one kernel, verb and dtype; None where there is nothing to say."""
    if tally.failed:
        return f"{tally.failed} of {tally.failed + tally.passed} checks failed"
    needed = {stage.name for stage in STAGES if stage.kind == "tests" and check.kernel in stage.of} | {"real", "graphs"}
    if check.verb == "rank_grad":
        needed |= {"cuda"} if check.kernel == "cuda" else {"portable"}
    if not tally.passed or not tally.real or needed & missing:
        return None
    return f"{tally.passed} checks passed"
