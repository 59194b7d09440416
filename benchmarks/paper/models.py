"""The architectures of the claims, and the adapters put on them.

On the meta device a model has shapes and no storage, so that 175 billion parameters are counted, not estimated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora

from .claims import NotMeasuredError

# The names of the query and value projections in the decoder below, RoBERTa and DeBERTa.
QUERY_VALUE = ("q", "v", "query", "value", "query_proj", "value_proj")


class Shape(NamedTuple):
    """The sizes of a decoder of GPT-2's kind."""

    width: int
    layers: int
    heads: int
    vocabulary: int = 50257
    positions: int = 1024


# Sizes from each model's published configuration; ``small`` has a vocabulary as minor beside its layers as GPT-3's.
DECODERS = {
    "tiny": Shape(64, 2, 4, 128, 64),
    "small": Shape(512, 6, 8, 2048, 512),
    "gpt2": Shape(768, 12, 12),
    "gpt2-medium": Shape(1024, 24, 16),
    "gpt2-large": Shape(1280, 36, 20),
    "gpt2-xl": Shape(1600, 48, 25),
    "gpt3": Shape(12288, 96, 96, positions=2048),
}


class Block(nn.Module):
    """Causal attention and a GELU MLP, each behind a layer norm; the four projections of attention are separate."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width] -> [B, T, width]."""
        h = self.attention_norm(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))
        return y


class Decoder(nn.Module):
    """A decoder of GPT-2's and GPT-3's kind; the embedding is the head, too."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of each next token; tokens [B, T + 1]."""
        x, y = tokens[:, :-1], tokens[:, 1:]
        hidden = self.norm(self.blocks(self.embedding(x) + self.positions.weight[: x.shape[1]]))
        return F.cross_entropy(F.linear(hidden, self.embedding.weight).flatten(0, 1).float(), y.flatten())


def _encoder(kind: str, width: int, layers: int, heads: int) -> nn.Module:
    """An encoder of transformers, ``kind`` its model type; sizes that Wq and Wv do not have are the type's defaults."""
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise NotMeasuredError(f"transformers cannot be imported, whose model this is: {error}") from None
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    made: nn.Module = library.AutoModel.from_config(library.AutoConfig.for_model(kind, **sizes))
    return made


COUNTED: dict[str, Callable[[], nn.Module]] = {
    "roberta-base": partial(_encoder, "roberta", 768, 12, 12),
    "roberta-large": partial(_encoder, "roberta", 1024, 24, 16),
    "deberta-xxl": partial(_encoder, "deberta-v2", 1536, 48, 24),
    **{name: partial(Decoder, DECODERS[name]) for name in ("gpt2-medium", "gpt2-large", "gpt3")},
}


def build(name: str) -> nn.Module:
    """An architecture of COUNTED on the meta device.

    Raises:
        NotMeasuredError: it is one of transformers', which is not there.
    """
    with torch.device("meta"):
        return COUNTED[name]()


def adapt(model: nn.Module, r: int, names: Sequence[str] = QUERY_VALUE) -> list[fastlora.LoRALinear]:
    """Freezes the model, puts a LoRALinear on every linear layer of one of these names, and returns them."""
    model.requires_grad_(False)
    adapted = []
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names:
            adapted.append(fastlora.LoRALinear.from_linear(module, r=r))
            model.set_submodule(path, adapted[-1])
    return adapted


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Counts the elements of parameters."""
    return sum(parameter.numel() for parameter in parameters)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
