"""Claims that follow from an architecture: parameters counted on the meta device, and the bytes that they come to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from .claims import COMPUTED, FOOTNOTE_5, Claim, Finding, Lab, printed
from .models import COUNTED, DECODERS, QUERY_VALUE, adapt, build, count, trained_parameters

# Table 4 of the paper: its ratios and bytes are reckoned from this, in fp16.
GPT3_PARAMETERS = 175_255.8e6
GPT3_BYTES = 2 * GPT3_PARAMETERS

# Table 5 of the paper: the projections adapted, and the rank that each selection leaves room for.
TABLE_5 = {("q",): 8, ("k",): 8, ("v",): 8, ("o",): 8, ("q", "k"): 4, ("q", "v"): 4, ("q", "k", "v", "o"): 2}

# Bytes of each trained parameter: weight, gradient, both moments of Adam, a float32 copy for its update.
PRECISIONS = {
    "all fp16, gradients freed as they are used": (2, 0, 4, 0),
    "all fp16": (2, 2, 4, 0),
    "fp16 with moments and a copy in fp32": (2, 2, 8, 4),
}


class Counted(NamedTuple):
    """The parameters of an architecture's adapters: so many ``matrices`` are adapted, square and of this ``width``."""

    trained: int
    matrices: int
    width: int

    def formula(self, r: int) -> int:
        """Θ = 2 · L · d · r (section 5.1)."""
        return 2 * self.matrices * self.width * r


@cache
def counted(architecture: str, r: int, names: tuple[str, ...] = QUERY_VALUE) -> Counted:
    """Builds the architecture on the meta device, adapts it and counts.

    Raises:
        ArithmeticError: the count is not what the formula gives.
    """
    model = build(architecture)
    layers = adapt(model, r, names)
    found = Counted(count(trained_parameters(model)), len(layers), layers[0].in_features)
    if found.trained != found.formula(r):
        raise ArithmeticError(f"{architecture}: counted {found.trained:,}, the formula gives {found.formula(r):,}")
    return found


def _count_claim(architecture: str, title: str, r: int, source: str, stated: str) -> Claim:
    def find(lab: Lab) -> Finding:
        found = counted(architecture, r)
        ours = printed(found.trained, stated)
        note = f"2 · {found.matrices} matrices · {found.width} · {r}, counted on the meta device."
        if ours != stated:
            others = [str(other) for other in range(1, 257) if printed(found.formula(other), stated) == stated]
            note += f" {stated} would be r = {others[0]}." if others else f" No rank gives {stated}."
        whole = count(build(architecture).parameters()) if architecture in DECODERS else 0
        if printed(whole / 1000, stated) == stated:
            note += f" It is 0.1 % of the model's {whole / 1e6:,.2f}M, and the figure of the table's prefix-layer row."
        return Finding(f"{found.trained:,} = {ours}", ours == stated, note)

    claim = f"trained parameters of {title}: Wq and Wv at r = {r}"
    return Claim(f"parameters-{architecture}-r{r}", claim, source, stated, COMPUTED, find)


def _formula(lab: Lab) -> Finding:
    ranks = (1, 8, 64)
    equal = [counted(name, r).trained for name in COUNTED for r in ranks]
    note = f"{', '.join(COUNTED)}, each at r = {', '.join(map(str, ranks))}; L counts adapted matrices, not layers."
    return Finding(f"equal in all {len(equal)} counts", True, note)


def _equal_budget(lab: Lab) -> Finding:
    counts = {counted("gpt3", r, names).trained for names, r in TABLE_5.items()}
    least, most = min(counts), max(counts)
    rounded = printed(least, "18M")
    same = f"the same in all {len(TABLE_5)} columns" if least == most else f"from {least:,} to {most:,}"
    note = f"2 · 192 matrices · {DECODERS['gpt3'].width} · 4 for Wq and Wv: {same}. {least / 1e6:.2f}M was cut to 18M."
    return Finding(f"{least:,} = {rounded}", least == most and rounded == "18M", note)


def _gpt3_size(lab: Lab) -> Finding:
    stated, shape, ours = "175,255.8M", DECODERS["gpt3"], count(build("gpt3").parameters())
    head = shape.vocabulary * shape.width
    rest = GPT3_PARAMETERS - ours - head
    return Finding(
        printed(ours, stated),
        printed(ours, stated) == stated,
        f"{shape.layers} layers of width {shape.width:,} with biases and layer norms, {shape.vocabulary:,} tokens, "
        f"{shape.positions:,} positions, the embedding also the head. A head of its own adds {head / 1e6:,.1f}M: "
        f"{printed(ours + head, stated)}; the other {rest / 1e6:.1f}M ({rest / GPT3_PARAMETERS:.2%}) we cannot place.",
    )


def _gpt2_sizes(lab: Lab) -> Finding:
    stated = {"gpt2-medium": "354.92M", "gpt2-large": "774.03M"}
    ours = {name: printed(count(build(name).parameters()), figure) for name, figure in stated.items()}
    verdicts = (f"{name} {'is' if ours[name] == figure else 'is not'} {figure}" for name, figure in stated.items())
    note = f"as many as transformers' GPT2Model has, head tied to the embedding: {'; '.join(verdicts)}."
    return Finding(", ".join(ours.values()), ours == stated, note)


def _fewer(lab: Lab) -> Finding:
    ratios = {r: GPT3_PARAMETERS / counted("gpt3", r).trained for r in (1, 4, 8)}
    return Finding(
        f"{ratios[4]:,.0f}× at r = 4, {ratios[1]:,.0f}× at r = 1",
        max(ratios.values()) >= 10_000,
        f"{GPT3_PARAMETERS / 1e6:,.1f}M (Table 4) over the counted adapters. Section 4.2's r = 4 gives "
        f"{ratios[4]:,.0f}, a round 10,000; the two rows of Table 4 are {ratios[1]:,.0f} (r = 1) and {ratios[8]:,.0f} "
        "(r = 8).",
    )


def _checkpoint(lab: Lab) -> Finding:
    adapter = 2 * counted("gpt3", 4).trained
    return Finding(
        f"{GPT3_BYTES / 1e9:.1f} GB → {adapter / 1e6:.1f} MB, {GPT3_BYTES / adapter:,.0f}×",
        printed(adapter, "35 MB") == "35 MB",
        f"2 bytes a parameter: {adapter // 2:,} · 2 B = {adapter / 1e6:.1f} MB = {adapter / 2**20:.1f} MiB, "
        f"{adapter / 35e6 - 1:.0%} more than 35 MB. The factor is roughly 10,000, as the section says.",
    )


def _hundred_models(lab: Lab) -> Finding:
    adapter = 2 * counted("gpt3", 4).trained
    adapted, separate = printed(GPT3_BYTES + 100 * adapter, "354 GB"), printed(100 * GPT3_BYTES, "35 TB")
    note = f"{GPT3_BYTES / 1e9:.1f} GB + 100 · {adapter / 1e6:.1f} MB, and 100 · {GPT3_BYTES / 1e9:.1f} GB."
    return Finding(f"{adapted} against {separate}", (adapted, separate) == ("354 GB", "35 TB"), note)


def _memory() -> dict[str, tuple[float, float]]:
    """Bytes of full fine-tuning and of LoRA at r = 4, GPT-3, by precision; a frozen parameter has its weight alone."""
    adapters = counted("gpt3", 4).trained
    return {name: (sum(each) * GPT3_PARAMETERS, GPT3_BYTES + sum(each) * adapters) for name, each in PRECISIONS.items()}


def _memory_factor(lab: Lab) -> Finding:
    ratios = {name: full / lora for name, (full, lora) in _memory().items()}
    return Finding(
        ", ".join(f"{ratio:.1f}×" for ratio in ratios.values()),
        round(min(ratios.values())) >= 3,
        "Weights, gradients and Adam's moments, no activations; "
        + "; ".join(f"{name}: {ratio:.1f}×" for name, ratio in ratios.items())
        + f". The 1.2 TB → 350 GB of the same section is {1200 / 350:.2f}×, so {1 - 350 / 1200:.0%} less.",
    )


def _memory_bytes(lab: Lab) -> Finding:
    sizes = _memory()
    full = [printed(whole, "1.2 TB") for whole, _ in sizes.values()]
    each = (
        f"{name}: {'+'.join(map(str, PRECISIONS[name]))} bytes a parameter = {whole / 1e12:.2f} TB"
        for name, (whole, _) in sizes.items()
    )
    return Finding(
        f"{', '.join(full)} → {', '.join(sorted({f'{lora / 1e9:.0f} GB' for _, lora in sizes.values()}))}",
        "1.2 TB" in full,
        f"{'; '.join(each)}. 1.2 TB would be {1.2e12 / GPT3_PARAMETERS:.1f} bytes. 350 GB are the fp16 weights alone, "
        "so activations are in neither.",
    )


def _speed_up(lab: Lab) -> Finding:
    full, lora = FOOTNOTE_5
    gain, saved = lora / full - 1, 1 - full / lora
    note = f"{lora} / {full} = {lora / full:.3f}: 25 % is the time saved for each token, the gain in throughput is "
    return Finding(f"{gain:+.1%} tokens/s, {-saved:+.1%} time", f"{saved:.0%}" == "25%", f"{note}{gain:.0%}.")


def _computed(name: str, claim: str, source: str, stated: str, find: Callable[[Lab], Finding]) -> Claim:
    return Claim(name, claim, source, stated, COMPUTED, find)


CLAIMS = (
    _computed("formula", "trained parameters are 2 · L · d · r", "section 5.1", "Θ = 2 · L · d · r", _formula),
    _count_claim("roberta-base", "RoBERTa base", 8, "Table 2", "0.3M"),
    _count_claim("roberta-large", "RoBERTa large", 8, "Table 2", "0.8M"),
    _count_claim("deberta-xxl", "DeBERTa XXL", 8, "Table 2", "4.7M"),
    _count_claim("gpt2-medium", "GPT-2 M", 4, "Table 3", "0.35M"),
    _count_claim("gpt2-large", "GPT-2 L", 4, "Table 3", "0.77M"),
    _count_claim("gpt3", "GPT-3", 1, "Table 4", "4.7M"),
    _count_claim("gpt3", "GPT-3", 8, "Table 4", "37.7M"),
    _computed("budget", "seven selections at an equal budget, GPT-3", "Table 5", "18M", _equal_budget),
    _computed("size-gpt2", "parameters of GPT-2 M and L", "Table 3", "354.92M, 774.03M", _gpt2_sizes),
    _computed("size-gpt3", "parameters of GPT-3", "Table 4", "175,255.8M", _gpt3_size),
    _computed("fewer-parameters", "fewer trained parameters, GPT-3", "abstract", "10,000×", _fewer),
    _computed("checkpoint", "checkpoint of GPT-3 in fp16, r = 4", "section 4.2", "350 GB → 35 MB", _checkpoint),
    _computed("hundred-models", "100 adapted models", "footnote 4", "354 GB against 35 TB", _hundred_models),
    _computed("memory", "less training memory, GPT-3 with Adam", "abstract, section 4.2", "3×", _memory_factor),
    _computed("memory-bytes", "training memory, GPT-3 with Adam", "section 4.2", "1.2 TB → 350 GB", _memory_bytes),
    _computed("speed-up", "faster training, GPT-3", "section 4.2", "25 %: 32.5 → 43.1 tokens/s per V100", _speed_up),
)
