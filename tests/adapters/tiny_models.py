"""Models of a few thousand parameters that the tests of adapters share: their shapes are real, their sizes are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastlora


class Toy(nn.Module):
    """What a user without transformers writes: blocks in a list, a head tied to the embedding, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 24)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False), "norm": nn.LayerNorm(24)})
            for _ in range(3)
        )
        self.head = nn.Linear(24, 31, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](block["norm"](x))))
        return self.head(x)


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().eval()


def llama(seed: int = 0, **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**(sizes | {"num_key_value_heads": 2} | options))).eval()


def gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


IDS = torch.arange(22).view(2, 11)


def run(model: nn.Module) -> Tensor:
    """What the model says of IDS."""
    with torch.no_grad():
        y = model(IDS)
    return y if isinstance(y, Tensor) else y.logits


def fill(model: nn.Module, seed: int = 5) -> None:
    """Adapters with values as after training: neither A nor B zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapted(model: nn.Module, target_modules: Any = "all-linear", r: int = 3, **options: Any) -> nn.Module:
    """The model with a trained adapter."""
    fastlora.inject(model, target_modules, r, **({"lora_alpha": 7} | options))
    fill(model)
    return model
