"""``AdapterCallback``: the adapter in the checkpoints of transformers' Trainer, as a folder that can be loaded.

Imports transformers, so it is imported by those who use it: ``from fastlora.adapters.trainer import AdapterCallback``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .folder import read_adapter
from .model import adapted_layers, adapted_model, checked_name
from .saving import replace_values, save_adapter
from .sharded import mesh_of

FOLDER = "adapter"


class AdapterCallback(TrainerCallback):
    """Saves the adapter of an injected model into each checkpoint of the Trainer, and loads it where a run is resumed.

    The Trainer itself saves such a model under the names that its layers have now, which ``from_pretrained`` does not
    know: it gives the bare base, with a report of unexpected keys. ``checkpoint-N/adapter`` is what
    :func:`fastlora.load_adapter` and ``PeftModel.from_pretrained`` read::

        trainer = Trainer(model=model, callbacks=[AdapterCallback()], ...)
        trainer.train(resume_from_checkpoint=True)

    Args:
        adapter_name: name of the adapter.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Loads the adapter of the checkpoint from which the run goes on; at its beginning, and sharded, nothing.

        Raises:
            ValueError: the model has no adapter of that name, or the checkpoint's is another.
        """
        model, adapters = adapted_model(model)
        checked_name(adapters, self.adapter_name)
        folder = _folder(args, state)
        # A sharded one has the Trainer's own values already, as any other has.
        if state.global_step > 0 and folder.is_dir() and not self._is_sharded(model):
            replace_values(model, self.adapter_name, *read_adapter(folder), str(folder))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Saves the adapter beside what the Trainer has saved: one process, or all where the model is sharded."""
        if state.is_world_process_zero or self._is_sharded(model):
            save_adapter(model, _folder(args, state), self.adapter_name)

    def _is_sharded(self, model: nn.Module) -> bool:
        layers = adapted_layers(adapted_model(model)[0], self.adapter_name)
        return mesh_of(layer.lora_A[self.adapter_name] for _, layer in layers) is not None


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FOLDER
