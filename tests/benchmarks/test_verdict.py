"""The verdict: from the repeats of a run alone, what counts as faster, what is within noise, and when there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cases import FLOOR, Case
from benchmarks.layers.table import render_case, render_summary
from benchmarks.records.rows import LayerRow, Spread
from benchmarks.records.tables import closing
from benchmarks.records.verdict import duels, stalled, verdict

CASE = Case("gpt2.attn", 256, 8, "bf16", 0.0)
QUIET, WIDE, STALLED = (0.95, 1.05), (0.8, 1.3), (0.9, 2.0)


def timed(arm, p50, spread=QUIET, case=CASE, **changes):
    low, high = spread
    return replace(LayerRow.of(case, arm, "step"), wall_ms=Spread(low * p50, p50, high * p50), **changes)


@pytest.mark.parametrize(
    ("peft", "spread", "noise", "said"),
    [
        (2.0, QUIET, 0.0, "2.00 (faster in 1, slower in 0, within noise in 0; worst 2.00)"),
        (0.5, QUIET, 0.0, "0.50 (faster in 0, slower in 1, within noise in 0; worst 0.50)"),
        (0.92, WIDE, 0.0, "0.92 (faster in 0, slower in 0, within noise in 1; worst 0.92, within noise)"),
        (1.2, QUIET, 0.3, "1.20 (faster in 0, slower in 0, within noise in 1; worst 1.20, within noise)"),
        (2.0, STALLED, 0.0, "no verdict: the machine stalled in all of 1"),
    ],
)
def test_ranges_that_overlap_and_noise_that_is_larger_decide_nothing(peft, spread, noise, said):
    rows = [timed("fastlora", 1.0, noise=noise), timed("peft-same", peft, spread, noise=noise)]
    assert verdict(duels(rows, "fastlora", "peft-same")) == said


def test_a_case_in_which_the_machine_stalled_is_in_no_mean_and_named_beside_it():
    other = CASE._replace(m=512)
    rows = [timed("fastlora", 1.0), timed("peft-same", 2.0)]
    rows += [timed("fastlora", 1.0, case=other), timed("peft-same", 8.0, STALLED, other)]
    assert stalled(rows) == [str(other)]
    said = render_summary(rows)
    assert (
        "layers: 2.00 (faster in 1, slower in 0, within noise in 0; worst 2.00; the machine stalled in 1 more)" in said
    )
    assert "the machine stalled in 1 of 2 cases" in said
    assert "gpt2.attn M=512 K=768" in " ".join(said.split())
    assert "THE MACHINE STALLED" in render_case(rows[2:])
    assert "STALLED" not in render_case(rows[:2])


def test_a_quiet_run_has_no_warning():
    rows = [timed(FLOOR, 1.0), timed("fastlora", 1.0), timed("peft-same", 2.0)]
    assert "stalled" not in render_summary(rows)


def test_the_verdict_is_of_time_and_memory_and_stands_last():
    rows = [timed("fastlora", 1.0, kept_bytes=10, peak_bytes=30), timed("peft-same", 2.0, kept_bytes=40, peak_bytes=40)]
    rows.append(replace(LayerRow.of(CASE, "addmm", "step"), status="absent", reason="takes no dropout"))
    last = closing(render_summary(rows), rows, {}).splitlines()[-1]
    assert last == "  fastlora / peft-same       kept 0.25 (worst 0.25), peak 0.75 (worst 0.75)"
