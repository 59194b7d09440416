"""Tables of results as Markdown: numbers are rendered from rows, never typed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..cases import FLOOR, Case, ModelCase
from ..layers.arm import LayerArm
from ..layers.arms import arms as layer_arms
from ..model.arms import ModelArm
from ..model.arms import arms as model_arms
from ..records.environment import Environment
from ..records.rows import LayerRow, Measured, ModelRow, shown
from ..records.tables import PAIRS, two_digits
from ..records.units import geometric_mean, readable_bytes
from ..records.verdict import STALLED, Duel, duels, stalled, steady, verdict

# The arm that stands last and bold, and the one beside it: PEFT with adapters in the base's dtype.
OURS, PEFT, FULL = "fastlora", "peft-same", "full"

_MARKS = "≈: within noise of fastlora; ?: the machine stalled"
_LAYERS = (
    "a step (forward and backward) over the frozen layer's, so 1.00 is free; M tokens, K → N the layer's inputs and "
    "outputs, R the rank; kept: for the backward, beyond x; peak: the most that a step holds"
)
_BRIEF = "a step over the frozen layer's, so 1.00 is free; M tokens, K → N the layer's inputs and outputs, R the rank"
_MODELS = "tokens/s of whole training steps; R the rank; noise: one arm timed twice"


def provenance(environment: Environment) -> str:
    """One line: command, profile, commit, day, software."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    commit = (environment["commit"] or "unknown commit")[:9] + (" with local changes" if environment["dirty"] else "")
    settings = environment["settings"]
    # A number of rounds is given on the command line alone, as by `python -m benchmarks.hardware`.
    profile = "`, chosen cases," if settings.get("rounds") else f" --profile {settings['profile']}`"
    return (
        f"`python -m benchmarks {environment['command']}{profile} at {commit}, "
        f"{environment['time'][:10]}; Python {environment['python']}, {packages}."
    )


def layers_in_brief(rows: Sequence[LayerRow]) -> str:
    """Steps of single layers over the frozen layer's: fastlora, PEFT, and the fastest LoRA of the other arms."""
    lines = [_line(["layer", "M", "K → N", "R", OURS, PEFT, "best other"]), _line(["---"] * 3 + ["--:"] * 4)]
    named = []
    for case in dict.fromkeys(row.case for row in rows if not row.case.is_host):
        steps = {row.arm: row for row in rows if row.case == case and row.mode == "step"}
        others = [(row.ratio, arm) for arm, row in steps.items() if row.ratio and arm not in (FLOOR, FULL)]
        ratio, best = min((other for other in others if OURS not in other[1]), default=(None, ""))
        cells = [_setting(case, case.layer), str(case.m), f"{case.k} → {case.widths}", str(case.r)]
        cells += [_ratio(steps.get(OURS), bold=True), _ratio(steps.get(PEFT), beside=steps.get(OURS))]
        cells.append(f"{best} {two_digits(ratio)}".strip())
        named.append(best)
        lines.append(_line(cells))
    legend = _legend(_BRIEF, layer_arms(), [OURS, PEFT, *dict.fromkeys(named)])
    return "\n".join([*lines, "", legend, *_notes(rows), *_host_overhead(rows)]).strip()


def layers(rows: Sequence[LayerRow]) -> str:
    """Training steps (forward and backward) of single layers, every arm, and the speed-ups over PEFT below the table.

    Each number is time over the frozen layer's own step, or the status that stands for it; ``arithmetic`` is the least
    the FLOPs allow; ``kept`` are the bytes that fastlora and PEFT keep for the backward beyond x, ``peak`` the most
    that a step holds beyond inputs and parameters.
    """
    steps = {(row.case, row.arm): row for row in rows if row.mode == "step"}
    arms = _arms([row for row in shown(rows) if row.ms is not None and row.arm != FLOOR and not row.case.is_host])
    heads = ["layer", "M", "K → N", "R", "dtype", "dropout", "frozen, ms", "arithmetic", *arms, "kept: ours / PEFT"]
    heads.append("peak: ours / PEFT")
    lines = [_line(heads), _line(["---"] * 3 + ["--:"] * (len(heads) - 3))]
    for case in dict.fromkeys(row.case for row in rows if not row.case.is_host):
        floor = steps.get((case, FLOOR))
        cells = [case.layer, str(case.m), f"{case.k} → {case.widths}", str(case.r), case.dtype, f"{case.dropout:g}"]
        cells.append("-" if floor is None or floor.ms is None else f"{floor.ms.p50:.3g}")
        cells.append("-" if floor is None or floor.theory is None else f"{floor.theory:.3f}")
        cells += [_ratio(steps.get((case, arm)), bold=arm == OURS, beside=steps.get((case, OURS))) for arm in arms]
        pair = [steps.get((case, name)) for name in (OURS, PEFT)]
        cells.append(" / ".join(readable_bytes(row.kept_bytes if row else None) for row in pair))
        cells.append(" / ".join(readable_bytes(row.peak_bytes if row else None) for row in pair))
        lines.append(_line(cells))
    return "\n".join([*lines, "", _legend(_LAYERS, layer_arms(), arms), *_notes(rows)]).strip()


def host(rows: Sequence[LayerRow]) -> str:
    """Medians of layers whose products are nothing, every arm in every mode: the time is the host's, in µs."""
    group = [row for row in shown(rows) if row.case.is_host and row.wall_ms is not None]
    if not group:
        return ""
    cases, modes = list(dict.fromkeys(row.case for row in group)), list(dict.fromkeys(row.mode for row in group))
    times = {(row.case, row.arm, row.mode): 1e3 * row.wall_ms.p50 for row in group if row.wall_ms}
    columns = [(case, mode) for case in cases for mode in modes]
    heads = [f"{case.dtype}{f', dropout {case.dropout:g}' if case.dropout else ''}: {mode}" for case, mode in columns]
    first = cases[0]
    lines = [f"The host's time, µs (M = {first.m}, K = {first.k}, N = {first.n}, R = {first.r}):", ""]
    lines += [_line(["arm", *heads]), _line(["---", *["--:"] * len(heads)])]
    for arm in _arms(group):
        cells = [times.get((case, arm, mode)) for case, mode in columns]
        lines.append(_line([f"`{arm}`", *("-" if time is None else f"{time:.1f}" for time in cells)]))
    return "\n".join(lines)


def models_in_brief(rows: Sequence[ModelRow]) -> str:
    """Tokens a second and peak memory of whole training steps: full fine-tuning, PEFT and fastlora."""
    arms = (FULL, PEFT, OURS)
    heads = ["model", "batch × tokens", *(f"{arm}, tokens/s" for arm in arms), f"peak memory: {' / '.join(arms)}"]
    lines = [_line([*heads, "noise"]), _line(["---"] * 2 + ["--:"] * 5)]
    for case in dict.fromkeys(row.case for row in rows):
        group = {row.arm: row for row in rows if row.case == case}
        cells = [_setting(case, f"{case.model}, R = {case.r}"), f"{case.batch} × {case.sequence}"]
        cells += [_tokens(group.get(arm), bold=arm == OURS, beside=group.get(OURS)) for arm in arms]
        lines.append(_line([*cells, " / ".join(_peak(group.get(arm)) for arm in arms), _repeat(group.values())]))
    return "\n".join([*lines, "", _legend(_MODELS, model_arms(), arms), *_stalled(rows), *_gains(rows)])


def models(rows: Sequence[ModelRow]) -> str:
    """Tokens a second and peak memory of whole training steps, every arm; noise is one arm timed twice."""
    arms = _arms([row for row in rows if row.status != "absent"])
    heads = ["model", "batch × tokens", "R", "dtype", "dropout", "checkpointing"]
    heads += [f"{arm}, tokens/s" for arm in arms] + ["noise", "peak memory: " + " / ".join(arms)]
    lines = [_line(heads), _line(["---"] * 2 + ["--:"] * (len(heads) - 2))]
    for case in dict.fromkeys(row.case for row in rows):
        group = {row.arm: row for row in rows if row.case == case}
        cells = [case.model, f"{case.batch} × {case.sequence}", str(case.r), case.dtype, f"{case.dropout:g}"]
        cells.append("on" if case.checkpointing else "off")
        cells += [_tokens(group.get(arm), bold=arm == OURS, beside=group.get(OURS)) for arm in arms]
        lines.append(_line([*cells, _repeat(group.values()), " / ".join(_peak(group.get(arm)) for arm in arms)]))
    return "\n".join([*lines, "", _legend(_MODELS, model_arms(), arms), *_stalled(rows), *_gains(rows)])


def memory(rows: Sequence[ModelRow]) -> str:
    """The parts of the peak, one line per case and arm."""
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
    """The absent arms by their reasons, each once."""
    arms: dict[str | None, dict[str, None]] = {}
    for row in rows:
        if row.status == "absent":
            arms.setdefault(row.reason, {})[row.arm] = None
    return "\n".join(f"- {', '.join(f'`{arm}`' for arm in names)} absent: {reason}" for reason, names in arms.items())


def _legend(columns: str, known: Mapping[str, LayerArm] | Mapping[str, ModelArm], arms: Sequence[str]) -> str:
    """What the columns and the arms in them are."""
    named = "; ".join(f"`{arm}`: {known[arm].about}" for arm in arms if arm in known)
    return f"- columns: {columns}; {_MARKS}\n- arms: {named}"


def _gains(rows: Sequence[ModelRow]) -> list[str]:
    found = duels(rows, OURS, PEFT)
    return [f"- `{OURS}` over `{PEFT}`, tokens/s, geometric mean: {verdict(found)}"] if found else []


def _notes(rows: Sequence[LayerRow]) -> list[str]:
    return [*_noise(rows), *_stalled(rows), *_speedups(rows), *_wall(rows)]


def _noise(rows: Sequence[LayerRow]) -> list[str]:
    steps = [row for row in rows if row.mode == "step" and not row.case.is_host and steady(row)]
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


def _stalled(rows: Sequence[Measured]) -> list[str]:
    found = stalled(rows)
    return [f"- ?: {STALLED} while these ran, and they are in no mean: {'; '.join(found)}"] if found else []


def _speedups(rows: Sequence[LayerRow]) -> list[str]:
    lines = []
    for ours, theirs in PAIRS:
        if found := duels([row for row in rows if not row.case.is_host], ours, theirs):
            lines.append(f"- `{theirs}` over `{ours}`, step, geometric mean: {verdict(found)}")
    return lines


def _wall(rows: Sequence[LayerRow]) -> list[str]:
    """The wall time of a step over the device's, where both were measured."""
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
        lines.append(f"- host overhead of a step ({_setting(case, f'M = {case.m}, K = N = {case.k}')}), µs: {times}")
    return lines


def _arms(rows: Sequence[Measured]) -> list[str]:
    """Their arms in the order of the rows, fastlora itself last."""
    return sorted(dict.fromkeys(row.arm for row in rows), key=lambda name: name == OURS)


def _setting(case: Case | ModelCase, name: str) -> str:
    """The name with dtype, dropout and checkpointing."""
    setting = [name, case.dtype, *([f"dropout {case.dropout:g}"] if case.dropout else [])]
    return ", ".join([*setting, *(["checkpointing"] if isinstance(case, ModelCase) and case.checkpointing else [])])


def _ratio(row: LayerRow | None, bold: bool = False, beside: LayerRow | None = None) -> str:
    return _cell(row, None if row is None or row.ratio is None else f"{row.ratio:.2f}", bold, beside)


def _tokens(row: ModelRow | None, bold: bool, beside: ModelRow | None) -> str:
    tokens = None if row is None else row.tokens_per_second
    return _cell(row, None if tokens is None else f"{tokens:,.0f}", bold, beside)


def _cell(row: Measured | None, number: str | None, bold: bool, beside: Measured | None) -> str:
    """The number, or the status that stands for it; a dash where the arm was absent.

    ``?`` where the machine stalled, ``≈`` where it and the row beside it are within noise.
    """
    if row is None or number is None:
        return "-" if row is None or row.status in ("ok", "absent") else row.status
    if not steady(row):
        return f"{number}?"
    if bold:
        return f"**{number}**"
    close = beside is not None and beside.ms is not None and row.ms is not None and not Duel(beside, row).apart
    return f"{number} ≈" if close else number


def _repeat(rows: Iterable[ModelRow]) -> str:
    noise = next((row.noise for row in rows if row.noise is not None), None)
    return "-" if noise is None else f"{noise:.1%}"


def _peak(row: ModelRow | None) -> str:
    return "-" if row is None else "oom" if row.status == "oom" else readable_bytes(row.peak_bytes)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
