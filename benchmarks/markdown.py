"""Tables of results as Markdown: numbers are rendered from rows, never typed."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import FLOOR
from .environment import Environment
from .layers.table import PAIRS, step_speedups
from .rows import LayerRow, Measured, ModelRow
from .units import geometric_mean, readable_bytes

# Worth a column of a page's width; forced backends are in the result file.
LAYER_ARMS = (
    "plain",
    "addmm",
    "compiled",
    "loralib",
    "lorafusion",
    "unsloth",
    "freesolo-chalk",
    "lycoris",
    "peft-fp32",
    "peft-same",
    "full",
    "fastlora-fp32",
    "fastlora",
)
MODEL_ARMS = ("full", "peft-fp32", "peft-same", "fastlora-fp32", "fastlora")


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
    steps = {(row.case, row.provider): row for row in rows if row.mode == "step"}
    arms = [name for name in LAYER_ARMS if any(provider == name and row.ms for (_, provider), row in steps.items())]
    heads = ["layer", "M", "K → N", "R", "dtype", "dropout", "frozen, ms", "arithmetic", *arms, "kept: ours / PEFT"]
    lines = [_line(heads), _line(["---"] * 3 + ["--:"] * (len(heads) - 3))]
    for case in dict.fromkeys(row.case for row in rows if not row.case.is_host):
        floor = steps.get((case, FLOOR))
        cells = [case.layer, str(case.m), f"{case.k} → {case.n}", str(case.r), case.dtype, f"{case.dropout:g}"]
        cells.append("-" if floor is None or floor.ms is None else f"{floor.ms.p50:.3g}")
        cells.append("-" if floor is None or floor.theory is None else f"{floor.theory:.3f}")
        cells += [_ratio(steps.get((case, arm)), bold=arm == "fastlora") for arm in arms]
        kept = [steps.get((case, name)) for name in ("fastlora", "peft-same")]
        cells.append(" / ".join(readable_bytes(row.kept_bytes if row else None) for row in kept))
        lines.append(_line(cells))
    return "\n".join([*lines, "", *_noise(rows), *_speedups(rows), *_host_overhead(rows)]).strip()


def models(rows: Sequence[ModelRow]) -> str:
    """Tokens a second and peak memory of whole training steps, a line a case; best of each line in bold."""
    arms = [name for name in MODEL_ARMS if any(row.provider == name and row.status != "absent" for row in rows)]
    heads = ["model", "batch × tokens", "R", "dtype", "dropout", "checkpointing"]
    heads += [f"{arm}, tokens/s" for arm in arms] + ["peak memory: " + " / ".join(arms)]
    lines = [_line(heads), _line(["---"] * 2 + ["--:"] * (len(heads) - 2))]
    for case in dict.fromkeys(row.case for row in rows):
        group = {row.provider: row for row in rows if row.case == case}
        best = max((row.tokens_per_second or 0 for row in group.values()), default=0)
        cells = [case.model, f"{case.batch} × {case.sequence}", str(case.r), case.dtype, f"{case.dropout:g}"]
        cells.append("on" if case.checkpointing else "off")
        cells += [_tokens(group.get(arm), best) for arm in arms]
        cells.append(" / ".join(_peak(group.get(arm)) for arm in arms))
        lines.append(_line(cells))
    return "\n".join(lines)


def memory(rows: Sequence[ModelRow]) -> str:
    """What the peak consists of, a line a case and provider."""
    heads = ["model", "batch × tokens", "dtype", "checkpointing", "provider", "trained"]
    heads += ["weights", "gradients", "optimiser", "activations", "peak"]
    lines = [_line(heads), _line(["---"] * 2 + ["--:"] * (len(heads) - 2))]
    for row in rows:
        if row.peak_bytes is not None:
            sizes = (row.weight_bytes, row.gradient_bytes, row.optimizer_bytes, row.activation_bytes, row.peak_bytes)
            cells = [row.model, f"{row.batch} × {row.sequence}", row.dtype, "on" if row.checkpointing else "off"]
            cells += [row.provider, f"{row.trained_parameters:,}", *map(readable_bytes, sizes)]
            lines.append(_line(cells))
    return "\n".join(lines)


def absences(rows: Sequence[Measured]) -> str:
    """Who was not there, and why, each reason once."""
    reasons = dict.fromkeys((row.provider, row.reason) for row in rows if row.status == "absent")
    return "\n".join(f"- `{provider}` absent: {reason}" for provider, reason in reasons)


def _noise(rows: Sequence[LayerRow]) -> list[str]:
    noise = [row.noise for row in rows if row.mode == "step" and row.provider == FLOOR and row.noise is not None]
    if not noise:
        return []
    return [f"- noise: the frozen layer's second timing lay within {max(noise):.1%} of its first in every step"]


def _speedups(rows: Sequence[LayerRow]) -> list[str]:
    lines = []
    for ours, theirs in PAIRS:
        speedups = step_speedups([row for row in rows if not row.case.is_host], ours, theirs)
        if speedups:
            lines.append(
                f"- `{theirs}` over `{ours}`, step: {geometric_mean(speedups):.2f}× (geometric mean of "
                f"{len(speedups)} layers, worst {min(speedups):.2f}×)"
            )
    return lines


def _host_overhead(rows: Sequence[LayerRow]) -> list[str]:
    lines = []
    for case in dict.fromkeys(row.case for row in rows if row.case.is_host):
        steps = [row for row in rows if row.case == case and row.mode == "step" and not _forced(row)]
        times = ", ".join(f"{row.provider} {1e3 * row.wall_ms.p50:.0f}" for row in steps if row.wall_ms)
        lines.append(f"- host overhead of a step (M = {case.m}, K = N = {case.k}, {case.dtype}), µs: {times}")
    return lines


def _forced(row: LayerRow) -> bool:
    """Whether the row belongs to one backend by force."""
    return row.backend is not None and row.provider.endswith(f"-{row.backend}")


def _ratio(row: LayerRow | None, bold: bool) -> str:
    if row is None or row.ratio is None:
        return "-" if row is None or row.status in ("ok", "absent") else row.status
    return f"**{row.ratio:.2f}**" if bold else f"{row.ratio:.2f}"


def _tokens(row: ModelRow | None, best: float) -> str:
    if row is None or row.tokens_per_second is None:
        return "-" if row is None or row.status in ("ok", "absent") else row.status
    text = f"{row.tokens_per_second:,.0f}"
    return f"**{text}**" if row.tokens_per_second == best else text


def _peak(row: ModelRow | None) -> str:
    return "-" if row is None else "oom" if row.status == "oom" else readable_bytes(row.peak_bytes)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
