"""Tables of results as Markdown: numbers are rendered from rows, never typed."""

from __future__ import annotations

from collections.abc import Sequence

from ..cases import FLOOR
from ..records.environment import Environment
from ..records.rows import LayerRow, Measured, ModelRow, shown
from ..records.tables import PAIRS, speedups
from ..records.units import geometric_mean, readable_bytes

# fastlora itself comes last, beside the margin.
OURS = "fastlora"


def machine(environment: Environment) -> str:
    """What it ran on, in a few words."""
    name: str = environment["device_name"]
    return f"{name} ({environment['threads']} threads)" if environment["device"] == "cpu" else name


def provenance(environment: Environment) -> str:
    """One line: command, profile, commit, day, software."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    commit = (environment["commit"] or "unknown commit")[:9] + (" with local changes" if environment["dirty"] else "")
    settings = environment["settings"]
    return (
        f"`python -m benchmarks {environment['command']} --profile {settings['profile']}` at {commit}, "
        f"{environment['time'][:10]}; Python {environment['python']}, {packages}."
    )


def layers(rows: Sequence[LayerRow]) -> str:
    """Training steps (forward and backward) of single layers, and the speed-ups over PEFT below the table.

    Each number is time over the frozen layer's own step, or the word for why there is none; ``arithmetic`` is the least
    the FLOPs allow; ``kept`` is what fastlora and PEFT (adapters in the base's dtype) keep for the backward beyond x.
    """
    steps = {(row.case, row.arm): row for row in rows if row.mode == "step"}
    arms = _arms([row for row in shown(rows) if row.ms is not None and row.arm != FLOOR])
    heads = ["layer", "M", "K → N", "R", "dtype", "dropout", "frozen, ms", "arithmetic", *arms, "kept: ours / PEFT"]
    lines = [_line(heads), _line(["---"] * 3 + ["--:"] * (len(heads) - 3))]
    for case in dict.fromkeys(row.case for row in rows if not row.case.is_host):
        floor = steps.get((case, FLOOR))
        cells = [case.layer, str(case.m), f"{case.k} → {case.n}", str(case.r), case.dtype, f"{case.dropout:g}"]
        cells.append("-" if floor is None or floor.ms is None else f"{floor.ms.p50:.3g}")
        cells.append("-" if floor is None or floor.theory is None else f"{floor.theory:.3f}")
        cells += [_ratio(steps.get((case, arm)), bold=arm == OURS) for arm in arms]
        kept = [steps.get((case, name)) for name in (OURS, "peft-same")]
        cells.append(" / ".join(readable_bytes(row.kept_bytes if row else None) for row in kept))
        lines.append(_line(cells))
    return "\n".join([*lines, "", *_noise(rows), *_speedups(rows), *_wall(rows), *_host_overhead(rows)]).strip()


def models(rows: Sequence[ModelRow]) -> str:
    """Tokens a second and peak memory of whole training steps, a line a case; noise is one arm timed twice."""
    arms = _arms([row for row in rows if row.status != "absent"])
    heads = ["model", "batch × tokens", "R", "dtype", "dropout", "checkpointing"]
    heads += [f"{arm}, tokens/s" for arm in arms] + ["noise", "peak memory: " + " / ".join(arms)]
    lines = [_line(heads), _line(["---"] * 2 + ["--:"] * (len(heads) - 2))]
    for case in dict.fromkeys(row.case for row in rows):
        group = {row.arm: row for row in rows if row.case == case}
        cells = [case.model, f"{case.batch} × {case.sequence}", str(case.r), case.dtype, f"{case.dropout:g}"]
        cells.append("on" if case.checkpointing else "off")
        cells += [_tokens(group.get(arm), bold=arm == OURS) for arm in arms]
        noise = next((row.noise for row in group.values() if row.noise is not None), None)
        cells.append("-" if noise is None else f"{noise:.1%}")
        cells.append(" / ".join(_peak(group.get(arm)) for arm in arms))
        lines.append(_line(cells))
    return "\n".join(lines)


def memory(rows: Sequence[ModelRow]) -> str:
    """What the peak consists of, a line a case and arm."""
    heads = ["model", "batch × tokens", "dtype", "checkpointing", "arm", "trained"]
    heads += ["weights", "gradients", "optimiser", "activations", "peak"]
    lines = [_line(heads), _line(["---"] * 2 + ["--:"] * (len(heads) - 2))]
    for row in rows:
        if row.peak_bytes is not None:
            sizes = (row.weight_bytes, row.gradient_bytes, row.optimizer_bytes, row.activation_bytes, row.peak_bytes)
            cells = [row.model, f"{row.batch} × {row.sequence}", row.dtype, "on" if row.checkpointing else "off"]
            cells += [row.arm, f"{row.trained_parameters:,}", *map(readable_bytes, sizes)]
            lines.append(_line(cells))
    return "\n".join(lines)


def absences(rows: Sequence[Measured]) -> str:
    """Who was not there, and why, each reason once."""
    reasons = dict.fromkeys((row.arm, row.reason) for row in rows if row.status == "absent")
    return "\n".join(f"- `{arm}` absent: {reason}" for arm, reason in reasons)


def _noise(rows: Sequence[LayerRow]) -> list[str]:
    steps = [row for row in rows if row.mode == "step" and not row.case.is_host]
    noise = [row.noise for row in steps if row.arm == FLOOR and row.noise is not None]
    lines = [f"- noise: the frozen layer's second timing lay within {max(noise):.1%} of its first"] if noise else []
    ours = {row.case: row for row in steps if row.arm == OURS and row.ms is not None}
    twins = [
        abs(row.ms.p50 / chosen.ms.p50 - 1)
        for row in steps
        if row.is_forced and row.ms is not None and (chosen := ours.get(row.case)) is not None
        if chosen.ms is not None and (row.kernel, row.tile) == (chosen.kernel, chosen.tile)
    ]
    if twins:
        lines.append(f"- and fastlora's own, the same kernel chosen and forced: within {max(twins):.1%}")
    return lines


def _speedups(rows: Sequence[LayerRow]) -> list[str]:
    lines = []
    for ours, theirs in PAIRS:
        ratios = speedups([row for row in rows if not row.case.is_host], ours, theirs)
        if ratios:
            lines.append(
                f"- `{theirs}` over `{ours}`, step: {geometric_mean(ratios):.2f}× (geometric mean of "
                f"{len(ratios)} cases, worst {min(ratios):.2f}×)"
            )
    return lines


def _wall(rows: Sequence[LayerRow]) -> list[str]:
    """How much longer the wall saw a step than the device, where both were measured."""
    quotients: dict[str, list[float]] = {}
    for row in shown(rows):
        if row.mode == "step" and row.wall_ms and row.device_ms and not row.case.is_host:
            quotients.setdefault(row.arm, []).append(row.wall_ms.p50 / row.device_ms.p50)
    if not quotients:
        return []
    means = ", ".join(f"{name} {geometric_mean(group):.2f}" for name, group in quotients.items())
    return [f"- wall time of a step over the device's (geometric mean; above 1 the host is seen): {means}"]


def _host_overhead(rows: Sequence[LayerRow]) -> list[str]:
    lines = []
    for case in dict.fromkeys(row.case for row in rows if row.case.is_host):
        steps = [row for row in shown(rows) if row.case == case and row.mode == "step"]
        times = ", ".join(f"{row.arm} {1e3 * row.wall_ms.p50:.0f}" for row in steps if row.wall_ms)
        lines.append(f"- host overhead of a step (M = {case.m}, K = N = {case.k}, {case.dtype}), µs: {times}")
    return lines


def _arms(rows: Sequence[Measured]) -> list[str]:
    """Their arms in the order of the rows, fastlora itself last."""
    return sorted(dict.fromkeys(row.arm for row in rows), key=lambda name: name == OURS)


def _ratio(row: LayerRow | None, bold: bool) -> str:
    if row is None or row.ratio is None:
        return "-" if row is None or row.status in ("ok", "absent") else row.status
    return f"**{row.ratio:.2f}**" if bold else f"{row.ratio:.2f}"


def _tokens(row: ModelRow | None, bold: bool) -> str:
    if row is None or row.tokens_per_second is None:
        return "-" if row is None or row.status in ("ok", "absent") else row.status
    text = f"{row.tokens_per_second:,.0f}"
    return f"**{text}**" if bold else text


def _peak(row: ModelRow | None) -> str:
    return "-" if row is None else "oom" if row.status == "oom" else readable_bytes(row.peak_bytes)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
