"""The cases: named layers of real models, whole models, and the profiles that pick from them.

Letters as everywhere: M tokens, K in_features, N out_features, R rank.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from .names import suggestion

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("forward", "backward", "step")
HOST_LAYER = "host"

# The arm that every time is compared with: the base layer alone.
FLOOR = "frozen"

SCALE = 1.7

# Inputs are rotated over this many copies.
COPIES = 3


class Layer(NamedTuple):
    """One linear layer: ``nn.Linear(k, n, bias)``."""

    k: int
    n: int
    bias: bool


# Sizes from each model's published configuration; key and value projections have the grouped-query width.
LAYERS = {
    HOST_LAYER: Layer(64, 64, False),
    "roberta-base.query": Layer(768, 768, True),
    "roberta-base.fc": Layer(768, 3072, True),
    "roberta-large.query": Layer(1024, 1024, True),
    "gpt2.attn": Layer(768, 2304, True),
    "gpt2.proj": Layer(768, 768, True),
    "gpt2.fc": Layer(768, 3072, True),
    "llama3.2-1b.q": Layer(2048, 2048, False),
    "llama3.2-1b.kv": Layer(2048, 512, False),
    "llama3.2-1b.gate": Layer(2048, 8192, False),
    "llama3.2-1b.down": Layer(8192, 2048, False),
    "llama3-8b.q": Layer(4096, 4096, False),
    "llama3-8b.kv": Layer(4096, 1024, False),
    "llama3-8b.gate": Layer(4096, 14336, False),
    "llama3-8b.down": Layer(14336, 4096, False),
    "llama3-70b.q": Layer(8192, 8192, False),
    "llama3-70b.kv": Layer(8192, 1024, False),
    "llama3-70b.gate": Layer(8192, 28672, False),
    "llama3-70b.down": Layer(28672, 8192, False),
    "qwen2.5-7b.q": Layer(3584, 3584, True),
    "qwen2.5-7b.kv": Layer(3584, 512, True),
    "qwen2.5-7b.gate": Layer(3584, 18944, False),
    "qwen2.5-7b.down": Layer(18944, 3584, False),
}

# Layers of one input, by their names.
GROUPS = {
    "llama3.2-1b.qkv": ("llama3.2-1b.q", "llama3.2-1b.kv", "llama3.2-1b.kv"),
    "llama3.2-1b.gate_up": ("llama3.2-1b.gate", "llama3.2-1b.gate"),
    "llama3-8b.qkv": ("llama3-8b.q", "llama3-8b.kv", "llama3-8b.kv"),
    "llama3-8b.gate_up": ("llama3-8b.gate", "llama3-8b.gate"),
}

# Gate, up and down of a gated MLP, by their names.
MLPS = {
    "llama3.2-1b.mlp": ("llama3.2-1b.gate", "llama3.2-1b.gate", "llama3.2-1b.down"),
    "llama3-8b.mlp": ("llama3-8b.gate", "llama3-8b.gate", "llama3-8b.down"),
}


# What a layer's name may end in, after a colon: a base that is stored otherwise, or another kind of update.
QUANTISED = ("nf4", "int8")
DORA = "dora"
VARIANTS = {
    ":nf4": "a base in 4 bits, of bitsandbytes",
    ":int8": "a base in 8 bits, of bitsandbytes",
    ":dora": "DoRA's update instead of LoRA's",
}


def parted(name: str) -> tuple[str, str | None]:
    """A layer's name without its variant, and the variant: ``llama3-8b.q:nf4`` -> ``llama3-8b.q``, ``nf4``."""
    bare, colon, variant = name.rpartition(":")
    return (bare, variant) if colon + variant in VARIANTS and bare else (name, None)


def layer_named(name: str) -> Layer:
    """A layer of LAYERS, or ``KxN`` such as ``4096x14336``: in_features and out_features, no bias.

    Raises:
        ValueError: neither.
    """
    name, _ = parted(name)
    if name in LAYERS:
        return LAYERS[name]
    if sizes := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        return Layer(int(sizes[1]), int(sizes[2]), False)
    raise ValueError(_unknown(name))


def branches_of(name: str) -> tuple[str, ...]:
    """The names of a case's layers: those of GROUPS, MLPS or ``KxN+N``, such as ``4096x1024+1024``; else of the layer.

    Raises:
        ValueError: there is no such layer.
    """
    bare, variant = parted(name)
    ending = f":{variant}" if variant else ""
    if several := GROUPS.get(bare) or MLPS.get(bare):
        return tuple(f"{each}{ending}" for each in several)
    if bare not in LAYERS and re.fullmatch(r"[1-9]\d*x[1-9]\d*(\+[1-9]\d*)+", bare):
        k, _, ns = bare.partition("x")
        return tuple(f"{k}x{n}{ending}" for n in ns.split("+"))
    layer_named(name)
    return (name,)


def _unknown(name: str) -> str:
    near = suggestion(name, [*LAYERS, *GROUPS, *MLPS])
    return (
        f"unknown layer {name!r}: {near}expected KxN, such as 4096x14336, or one of {', '.join(LAYERS)}; of layers of "
        f"one input KxN+N, or one of {', '.join(GROUPS)}; of MLPs one of {', '.join(MLPS)}; behind each, if wanted, "
        f"{' or '.join(VARIANTS)}"
    )


class Case(NamedTuple):
    """One layer, several of one input, or an MLP, at one size: every arm runs this, in every mode."""

    layer: str
    m: int
    r: int
    dtype: str
    dropout: float

    @property
    def branches(self) -> tuple[Case, ...]:
        """The case of each of its layers; of one layer itself."""
        return tuple(self._replace(layer=name) for name in branches_of(self.layer))

    @property
    def is_mlp(self) -> bool:
        """True where its layers are gate, up and down: ``down(silu(gate(x)) * up(x))``."""
        return parted(self.layer)[0] in MLPS

    @property
    def quantised(self) -> str | None:
        """How the base is stored: one of QUANTISED, or None for a matrix."""
        variant = parted(self.layer)[1]
        return variant if variant in QUANTISED else None

    @property
    def is_dora(self) -> bool:
        """True where the update is DoRA's."""
        return parted(self.layer)[1] == DORA

    @property
    def is_plain(self) -> bool:
        """True where the base is a matrix and the update LoRA's."""
        return parted(self.layer)[1] is None

    @property
    def k(self) -> int:
        """in_features."""
        return self._layers[0].k

    @property
    def n(self) -> int:
        """out_features, of all layers together."""
        return sum(layer.n for layer in self._layers)

    @property
    def widths(self) -> str:
        """out_features of each layer, such as ``4096+1024+1024``."""
        return "+".join(str(layer.n) for layer in self._layers)

    @property
    def bias(self) -> bool:
        """True where a base has a bias."""
        return any(layer.bias for layer in self._layers)

    @property
    def weights(self) -> int:
        """Elements of all base weights."""
        return sum(layer.k * layer.n for layer in self._layers)

    @property
    def _layers(self) -> tuple[Layer, ...]:
        return tuple(layer_named(name) for name in branches_of(self.layer))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The base's dtype."""
        return DTYPES[self.dtype]

    def theory(self, mode: str) -> float:
        """The FLOP minimum over the frozen layer's FLOPs, on any device.

        forward 1 + R/N + R/K, backward 1 + 2R/N + 2R/K (t, t a, da and db), step their mean. No dropout, no bias. Of
        several layers R (K + N) and K N are sums.
        """
        low_rank = sum(self.r * (layer.k + layer.n) for layer in self._layers)
        return 1 + {"forward": 1.0, "backward": 2.0, "step": 1.5}[mode] * (low_rank / self.weights)

    @property
    def is_host(self) -> bool:
        """True for a shape so small that its time is the host's: Python, autograd and dispatch."""
        return self.layer == HOST_LAYER

    def __str__(self) -> str:
        return (
            f"{self.layer}  M={self.m} K={self.k} N={self.widths} R={self.r} {self.dtype}"
            f"{f' dropout {self.dropout}' if self.dropout else ''}"
        )


class ModelCase(NamedTuple):
    """One architecture at one size: every arm trains this. ``sequence`` is in tokens."""

    model: str
    batch: int
    sequence: int
    r: int
    dtype: str
    dropout: float
    checkpointing: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """The base's dtype."""
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return (
            f"{self.model}  batch {self.batch} x {self.sequence} tokens R={self.r} {self.dtype}"
            f"{f' dropout {self.dropout}' if self.dropout else ''}{' checkpointing' if self.checkpointing else ''}"
        )


# A NamedTuple: its fields are the axes.
C = TypeVar("C", bound=tuple[Any, ...])
Sweep = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Profile(Generic[C]):
    """A named selection of cases: the products of each sweep's axes, which are the fields of the case.

    Every arm of a case is timed ``rounds`` times, or until ``seconds`` have passed: a busy machine ends with fewer
    rounds, not later.
    """

    about: str
    rounds: int
    seconds: float
    kind: type[C]
    sweeps: Sequence[Sweep] = field(repr=False)

    def cases(self, **axes: Sequence[Any] | None) -> list[C]:
        """The cases without repeats, with each given axis in place of the profile's own; the first is outermost."""
        given = {name: values for name, values in axes.items() if values is not None}
        products = (
            itertools.product(*({**sweep, **given}[name] for name in self.kind._fields))  # type: ignore[attr-defined]
            for sweep in self.sweeps
        )
        return list(dict.fromkeys(self.kind(*values) for values in itertools.chain(*products)))


def _sweep(
    layer: Sequence[str], m: Sequence[int], r: Sequence[int], dtype: Sequence[str], dropout: Sequence[float] = (0.0,)
) -> Sweep:
    return {"layer": layer, "m": m, "r": r, "dtype": dtype, "dropout": dropout}


_LLAMA = ("llama3-8b.q", "llama3-8b.kv", "llama3-8b.gate", "llama3-8b.down")
_LLAMA_70B = ("llama3-70b.q", "llama3-70b.kv", "llama3-70b.gate", "llama3-70b.down")
_QWEN = ("qwen2.5-7b.q", "qwen2.5-7b.kv", "qwen2.5-7b.gate", "qwen2.5-7b.down")
_SMALL = ("gpt2.attn", "gpt2.fc", "roberta-base.query", "roberta-large.query")

PROFILES = {
    "cpu": {
        "quick": Profile(
            "two minutes",
            rounds=25,
            seconds=2.5,
            kind=Case,
            sweeps=(
                _sweep(["roberta-base.query"], [512], [8], ["fp32", "bf16"], [0.0, 0.1]),
                _sweep(["gpt2.attn"], [512], [8], ["fp32", "bf16"]),
                _sweep(["llama3.2-1b.kv"], [64, 256, 1024], [16], ["bf16"]),
                _sweep(["llama3.2-1b.qkv"], [256], [16], ["fp32", "bf16"]),
                _sweep(["llama3.2-1b.gate_up", "llama3.2-1b.mlp"], [144], [16], ["bf16"]),
                _sweep([HOST_LAYER], [1], [8], ["fp32"], [0.0, 0.1]),
            ),
        ),
        "small": Profile(
            "few tokens, three minutes",
            rounds=150,
            seconds=2.5,
            kind=Case,
            sweeps=(
                _sweep(["roberta-base.query"], [1, 16, 64], [8], ["fp32", "bf16"], [0.0, 0.1]),
                _sweep(["512x512"], [16], [16], ["bf16"], [0.0, 0.1]),
                _sweep(["llama3.2-1b.kv"], [1, 16, 64], [16], ["bf16"], [0.0, 0.1]),
            ),
        ),
        "variants": Profile(
            "4-bit and 8-bit bases, and DoRA; two minutes",
            rounds=25,
            seconds=2.5,
            kind=Case,
            sweeps=(
                _sweep(["llama3.2-1b.kv:nf4"], [256, 1024], [16], ["bf16"]),
                _sweep(["llama3.2-1b.kv:int8", "llama3.2-1b.qkv:nf4"], [256], [16], ["bf16"]),
                _sweep(["roberta-base.query:nf4", "roberta-base.query:dora"], [512], [8], ["fp32"], [0.0, 0.1]),
                _sweep(["llama3.2-1b.kv:dora"], [256, 1024], [16], ["bf16"]),
            ),
        ),
        "full": Profile(
            "half an hour",
            rounds=21,
            seconds=10.0,
            kind=Case,
            sweeps=(
                _sweep(
                    ["roberta-base.query", "roberta-base.fc", "roberta-large.query", "gpt2.attn", "gpt2.fc"],
                    [256, 1024],
                    [8, 64],
                    ["fp32", "bf16"],
                    [0.0, 0.1],
                ),
                _sweep(["llama3.2-1b.q", "llama3.2-1b.kv", "llama3.2-1b.gate"], [256, 1024], [16], ["fp32", "bf16"]),
                _sweep(
                    ["llama3.2-1b.qkv", "llama3.2-1b.gate_up", "llama3.2-1b.mlp"],
                    [64, 256, 1024],
                    [16],
                    ["fp32", "bf16"],
                ),
                _sweep([HOST_LAYER], [1], [8], ["fp32", "bf16"], [0.0, 0.1]),
            ),
        ),
    },
    "cuda": {
        "quick": Profile(
            "Llama-3 8B and 70B at M = 8192",
            rounds=21,
            seconds=15.0,
            kind=Case,
            sweeps=(
                _sweep(["llama3-8b.q", "llama3-70b.gate"], [8192], [16], ["bf16"], [0.0, 0.1]),
                _sweep(["llama3-8b.q", "llama3-70b.gate"], [8192], [64], ["bf16"]),
                _sweep(["llama3-8b.kv", "llama3-8b.gate", "llama3-8b.down"], [8192], [16], ["bf16"]),
                _sweep(["llama3-8b.qkv", "llama3-8b.gate_up", "llama3-8b.mlp"], [8192], [16], ["bf16"]),
                _sweep([HOST_LAYER], [1], [8], ["bf16"], [0.0, 0.1]),
            ),
        ),
        "variants": Profile(
            "4-bit bases, and DoRA, of Llama-3 8B",
            rounds=21,
            seconds=15.0,
            kind=Case,
            sweeps=(
                _sweep(["llama3-8b.q:nf4", "llama3-8b.qkv:nf4", "llama3-8b.gate:nf4"], [1, 512, 8192], [16], ["bf16"]),
                _sweep(["llama3-8b.q:dora", "llama3-8b.gate:dora"], [8192], [16], ["bf16"], [0.0, 0.1]),
            ),
        ),
        "full": Profile(
            "every layer; M from 2k to 32k, ranks 8 to 128, dropout",
            rounds=31,
            seconds=20.0,
            kind=Case,
            sweeps=(
                _sweep([*_LLAMA, *_LLAMA_70B, *_QWEN], [8192], [16], ["bf16"], [0.0, 0.1]),
                _sweep(
                    ["llama3-8b.q", "llama3-8b.kv", "llama3-8b.qkv"], [2048, 4096, 8192, 16384, 32768], [16], ["bf16"]
                ),
                _sweep(["llama3-8b.qkv", "llama3-8b.gate_up", "llama3-8b.mlp"], [8192], [16, 64], ["bf16"], [0.0, 0.1]),
                _sweep(["llama3-8b.q", "llama3-70b.gate"], [8192], [8, 16, 64, 128], ["bf16"]),
                _sweep(["llama3-8b.q"], [8192], [16], ["fp16", "fp32"]),
                _sweep(_SMALL, [8192], [8], ["bf16"]),
                _sweep([HOST_LAYER], [1], [8], ["bf16"], [0.0, 0.1]),
            ),
        ),
    },
}
