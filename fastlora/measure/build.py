"""A model of a config.json with random weights and PEFT's adapters, and a batch for it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..described import Described, read_described


def build(
    path: Path, *, layers: int | None, rank: int, dropout: float, dtype: torch.dtype, tokens: int, device: torch.device
) -> nn.Module:
    """Builds the model that a config.json describes, with random weights, and gives every linear layer an adapter.

    A model that predicts tokens comes with its head and loss, others as they are. Nothing is downloaded; code and
    quantisation that the file names are not looked at.

    Args:
        path: a ``config.json`` of transformers, or the folder that holds one.
        layers: of the stack; all by default.
        rank: of the adapters.
        dropout: of the adapters.
        dtype: of the base; PEFT makes adapters float32 where it is half precision.
        tokens: of a sequence.
        device: of the model.

    Raises:
        ValueError: there is no such file, or no such model can be built; it takes no sequence of this length or is too
            large; or transformers or peft is missing.
    """
    described = read_described(path)
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"the adapters are PEFT's, which cannot be imported ({error}): pip install peft") from error
    config = _config(described, layers)
    _check_length(config, tokens)
    try:
        _check_room(_model(config, dtype, torch.device("meta")), device)
        base = _model(config, dtype, device)
    except ValueError:
        raise
    except Exception as error:  # a value of the file may break anything in there
        raise _broken(described, error) from error
    options = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False
    )
    try:
        with warnings.catch_warnings():
            # PEFT sets fan_in_fan_out for GPT-2's layers, and says so.
            warnings.simplefilter("ignore")
            model: nn.Module = peft.get_peft_model(base, options)
    except ValueError as error:
        raise _broken(described, error) from error
    return model.train()


def random_batch(model: Any, batch: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Random ids [batch, tokens], and as labels the same, for a model of transformers."""
    config = model.config
    made = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    # The lowest ids mean padding and the like in some models.
    ids = torch.randint(min(4, vocabulary - 1), vocabulary, (batch, tokens), generator=made).to(device)
    named = {"input_ids": ids}
    if _predicts(config):
        named["labels"] = ids
    elif config.is_encoder_decoder:
        named["decoder_input_ids"] = ids
    return named


def _config(described: Described, layers: int | None) -> Any:
    try:
        config = described.config()
    except Exception as error:  # as above
        raise _broken(described, error) from error
    text = config.get_text_config()
    if layers is not None:
        has = getattr(text, "num_hidden_layers", None)
        if has is None or layers > has:
            raise ValueError(f"--layers must be at most the {has or 'unknown number of'} layers of {described.file}")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    text.use_cache = False
    return config


def _check_length(config: Any, tokens: int) -> None:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ValueError(f"--tokens must be at most the {longest} that the model takes in a sequence, got {tokens}")


def _model(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM if _predicts(config) else transformers.AutoModel
    with device:
        model: nn.Module = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    if _predicts(config):
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]  # transformers takes it for GPT-2, with a warning
    return model


def _predicts(config: Any) -> bool:
    """Whether it is a model that predicts the next token: by the class that the file names, else by its kind."""
    import transformers

    named = getattr(config, "architectures", None)
    if named:
        return str(named[0]).endswith(("ForCausalLM", "LMHeadModel"))
    return type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING


def _check_room(shapes: nn.Module, device: torch.device) -> None:
    """Raises ValueError where the weights alone are more than the device has: Linux would kill the process."""
    needs = sum(p.numel() * p.element_size() for p in shapes.parameters())
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    else:
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needs > 0.9 * has:
        raise ValueError(
            f"the weights alone take {needs / 2**30:.1f} GiB of the {has / 2**30:.1f} GiB here: cut the stack with "
            "--layers, its widths stay"
        )


def _broken(described: Described, error: Exception) -> ValueError:
    import transformers

    why = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ValueError(
        f"transformers {transformers.__version__} builds no {described.model_type} with linear layers from "
        f"{described.file} ({why}): mend the file"
    )
