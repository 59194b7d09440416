"""What is measured: named layers of real models, and the profiles that pick from them.

Letters as everywhere: M tokens, K in_features, N out_features, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("forward", "backward", "step")
HOST_LAYER = "host"


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


class Case(NamedTuple):
    """One row group: every provider runs this, in every mode."""

    layer: str
    m: int
    r: int
    dtype: str
    dropout: float

    @property
    def k(self) -> int:
        """in_features."""
        return LAYERS[self.layer].k

    @property
    def n(self) -> int:
        """out_features."""
        return LAYERS[self.layer].n

    @property
    def bias(self) -> bool:
        """Whether the base has a bias."""
        return LAYERS[self.layer].bias

    @property
    def torch_dtype(self) -> torch.dtype:
        """The base's dtype."""
        return DTYPES[self.dtype]

    @property
    def is_host(self) -> bool:
        """Whether the shape is so small that its time is the host's: Python, autograd and dispatch."""
        return self.layer == HOST_LAYER

    def __str__(self) -> str:
        return (
            f"{self.layer}  M={self.m} K={self.k} N={self.n} R={self.r} {self.dtype}"
            f"{f' dropout {self.dropout}' if self.dropout else ''}"
        )


@dataclass(frozen=True)
class Sweep:
    """The product of its axes."""

    layers: Sequence[str]
    tokens: Sequence[int]
    ranks: Sequence[int]
    dtypes: Sequence[str]
    dropouts: Sequence[float] = (0.0,)

    def cases(self) -> Iterator[Case]:
        """Every combination, layers outermost."""
        axes = (self.layers, self.tokens, self.ranks, self.dtypes, self.dropouts)
        return itertools.starmap(Case, itertools.product(*axes))

    def with_axes(self, **axes: Sequence[Any] | None) -> Sweep:
        """The same sweep with each axis that is not None replaced."""
        return replace(self, **{name: values for name, values in axes.items() if values is not None})


AXES = tuple(axis.name for axis in fields(Sweep))


@dataclass(frozen=True)
class Profile:
    """A named selection of cases for one kind of device.

    ``rounds`` is how often every provider of a case is timed in every mode, ``seconds`` after how long a mode may stop
    short of that: a busy machine ends with fewer rounds, not later.
    """

    device: str
    about: str
    rounds: int
    seconds: float
    sweeps: Sequence[Sweep] = field(repr=False)

    def cases(self, **axes: Sequence[Any] | None) -> list[Case]:
        """The profile's cases without repeats, with each given axis in place of its own."""
        return list(dict.fromkeys(itertools.chain(*(sweep.with_axes(**axes).cases() for sweep in self.sweeps))))


_LLAMA = ("llama3-8b.q", "llama3-8b.kv", "llama3-8b.gate", "llama3-8b.down")
_LLAMA_70B = ("llama3-70b.q", "llama3-70b.kv", "llama3-70b.gate", "llama3-70b.down")
_QWEN = ("qwen2.5-7b.q", "qwen2.5-7b.kv", "qwen2.5-7b.gate", "qwen2.5-7b.down")
_SMALL = ("gpt2.attn", "gpt2.fc", "roberta-base.query", "roberta-large.query")

PROFILES = {
    "quick": Profile(
        "cpu",
        "a CPU, about two minutes",
        rounds=25,
        seconds=3.0,
        sweeps=(
            Sweep(["roberta-base.query"], [512], [8], ["fp32", "bf16"], [0.0, 0.1]),
            Sweep(["gpt2.attn"], [1024], [8], ["fp32", "bf16"]),
            Sweep(["llama3.2-1b.kv", "llama3.2-1b.q"], [256], [16], ["fp32", "bf16"]),
            Sweep([HOST_LAYER], [1], [8], ["fp32"]),
        ),
    ),
    "full": Profile(
        "cpu",
        "a CPU, about half an hour",
        rounds=21,
        seconds=10.0,
        sweeps=(
            Sweep(
                ["roberta-base.query", "roberta-base.fc", "roberta-large.query", "gpt2.attn", "gpt2.fc"],
                [256, 1024],
                [8, 64],
                ["fp32", "bf16"],
                [0.0, 0.1],
            ),
            Sweep(["llama3.2-1b.q", "llama3.2-1b.kv", "llama3.2-1b.gate"], [256, 1024], [16], ["fp32", "bf16"]),
            Sweep([HOST_LAYER], [1], [8], ["fp32", "bf16"]),
        ),
    ),
    "gpu": Profile(
        "cuda",
        "a GPU, the README's table",
        rounds=31,
        seconds=20.0,
        sweeps=(
            Sweep([*_LLAMA, *_LLAMA_70B, *_QWEN], [8192], [16], ["bf16"]),
            Sweep(["llama3-8b.q", "llama3-70b.gate"], [8192], [64], ["bf16"]),
            Sweep(["llama3-8b.q", "llama3-8b.kv", "llama3-70b.gate"], [8192], [16], ["bf16"], [0.1]),
            Sweep(_SMALL, [8192], [8], ["bf16"]),
            Sweep([HOST_LAYER], [1], [8], ["bf16"]),
        ),
    ),
    "gpu-full": Profile(
        "cuda",
        "a GPU, every layer, M 2k to 32k, ranks 8 to 128, dropout 0 and 0.1",
        rounds=31,
        seconds=20.0,
        sweeps=(
            Sweep(
                [*_LLAMA, *_LLAMA_70B, *_QWEN, *_SMALL],
                [2048, 8192, 32768],
                [8, 16, 64, 128],
                ["bf16"],
                [0.0, 0.1],
            ),
            Sweep([HOST_LAYER], [1], [8], ["bf16"]),
        ),
    ),
}
