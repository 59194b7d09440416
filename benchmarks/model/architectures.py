"""Real architectures from their published configurations: random weights, random tokens, no download.

Every linear layer of the stack is adapted; embeddings and heads stay as they are. The models' own dropout is
off, so that a case's dropout is the adapters' alone.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..names import suggestion

_SEED = 0

# RoBERTa's lowest ids mean padding and the like.
_FIRST_TOKEN = 4

# The ends of the names of the layers to adapt, by transformers' model type. RoBERTa's head has a ``dense`` layer, too.
_TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "roberta": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
}


@dataclass(frozen=True)
class Architecture:
    """One model: ``kind`` is transformers' model type, ``longest`` the most tokens that it takes, None for any."""

    about: str
    kind: str
    layers: int
    vocabulary: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    longest: int | None = None
    classes: int = 2

    @property
    def targets(self) -> tuple[str, ...]:
        """The ends of the names of the layers to adapt."""
        return _TARGETS[self.kind]

    @property
    def classifies(self) -> bool:
        """True where it puts sequences into classes; else it predicts the next token."""
        return self.kind == "roberta"

    def reduced(self) -> Architecture:
        """Two layers of the same widths and a small vocabulary; classes enough to take an RMS of the logits."""
        return replace(self, layers=min(self.layers, 2), vocabulary=512, classes=512)


_LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}

ARCHITECTURES = {
    "llama3-8b": Architecture("Llama-3 8B", "llama", 32, 128256, _LLAMA3_8B),
    "gpt2": Architecture("GPT-2 124M", "gpt2", 12, 50257, longest=1024),
    "roberta-base": Architecture("RoBERTa base, two classes", "roberta", 12, 50265, _ROBERTA, longest=512),
    "llama-tiny": Architecture("Llama in the widths of SmolLM2-135M, small vocabulary", "llama", 2, 1024, _SMOL),
    "gpt2-tiny": Architecture("GPT-2 in its own widths, small vocabulary", "gpt2", 2, 1024, longest=1024),
    "roberta-tiny": Architecture("RoBERTa in its own widths, small vocabulary", "roberta", 2, 1024, _ROBERTA, 512),
}


def architecture_named(name: str) -> Architecture:
    """One of ARCHITECTURES, or its first layers alone: ``llama3-8b-8layers`` is 8 of the 32, widths unchanged.

    Raises:
        ValueError: neither.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    cut = re.fullmatch(r"(.+)-([1-9]\d*)layers", name)
    whole = ARCHITECTURES.get(cut[1]) if cut else None
    if cut is None or whole is None or int(cut[2]) > whole.layers:
        known = ", ".join(f"{name} ({whole.layers})" for name, whole in ARCHITECTURES.items())
        raise ValueError(
            f"unknown model {name!r}: {suggestion(name, ARCHITECTURES)}expected one of {known}, or "
            "NAME-Nlayers for fewer layers than these"
        )
    return replace(whole, layers=int(cut[2]), about=f"{whole.about}, {cut[2]} of {whole.layers} layers")


def build(architecture: Architecture, dtype: torch.dtype, device: torch.device, checkpointing: bool) -> nn.Module:
    """The model in training mode, its weights the same at every call; ``checkpointing`` is of activations."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        architecture.kind,
        **{
            "num_hidden_layers": architecture.layers,
            "vocab_size": architecture.vocabulary,
            "num_labels": architecture.classes,
            "use_cache": False,
            "bos_token_id": None,
            "eos_token_id": None,
            **architecture.settings,
        },
    )
    auto: Any = AutoModelForSequenceClassification if architecture.classifies else AutoModelForCausalLM
    torch.manual_seed(_SEED)
    with device:
        model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if not architecture.classifies:
        model.loss_type = "ForCausalLM"  # transformers takes it for GPT-2 anyway, with a warning
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing:
        with warnings.catch_warnings():
            # Of a new name that older transformers lack.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return cast("nn.Module", model)


@functools.cache
def parameter_count(name: str) -> int:
    """Counts the parameters of the named model; allocates none."""
    model = build(architecture_named(name), torch.float32, torch.device("meta"), checkpointing=False)
    return sum(parameter.numel() for parameter in model.parameters())


def targets(model: nn.Module, architecture: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """The layers to adapt, by their names in the model."""
    for name, module in list(model.named_modules()):
        if any(name.endswith(f".{end}") for end in architecture.targets):
            yield name, module


def as_linear(module: nn.Module) -> nn.Linear:
    """The layer itself, or GPT-2's ``Conv1D`` as an ``nn.Linear`` over the transposed view of its weight: no copy."""
    if type(module) is nn.Linear:
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    in_features, out_features = weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.train(module.training)


def random_batch(
    architecture: Architecture, batch: int, sequence: int, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` as the model takes them: for the next token the ids themselves, else random."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    ids = draw(_FIRST_TOKEN, architecture.vocabulary, batch, sequence)
    labels = draw(0, architecture.classes, batch) if architecture.classifies else ids
    return {"input_ids": ids, "labels": labels}
