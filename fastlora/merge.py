"""``python -m fastlora.merge BASE ADAPTER OUT``: merges a LoRA adapter into a model's safetensors files.

Every merged weight is ``W + scale · B A``, of a DoRA with its rows given their lengths, computed in float32 and rounded
once to the dtype of W; with ``lora_bias`` also every ``bias + scale · lora_bias``. Other bytes are those of the base.
Files are copied one after the other and changed tensor by tensor, so that memory stays at one weight.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .adapters import unmatched
from .adapters.checkpoint import (
    Checkpoint,
    Entry,
    copy_file,
    is_floating,
    open_checkpoint,
    read_tensor,
    write_tensor,
)
from .adapters.folder import CONFIG, WEIGHTS, Adapters, key_of, read_adapter
from .adapters.merging import LayerMerge, MergeReport, fold_and_measure
from .atomic import new_folder
from .mergeable import Update, folded_bias, scaled_bias
from .text import dtype_name, shown

# Files that hold unmerged weights in other formats.
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.npz")

_log = logging.getLogger("fastlora")

_QUANTISED = (
    "the base is quantised, and no sum is stored in quantised weights: merge into the weights that they were made "
    "from, or load the model and the adapter (fastlora.load_adapter), and call fastlora.merge_and_unload"
)

Progress = Callable[[int, int], None]


class _Target(NamedTuple):
    """One tensor that changes: its name and place, the layer's name in the adapter, and the update in its layout.

    Of a layer's bias, ``is_bias`` holds.
    """

    name: str
    entry: Entry
    layer: str
    update: Update
    is_bias: bool = False


def merge_folders(
    base: str | Path, adapter: str | Path, out: str | Path, *, force: bool = False, progress: Progress | None = None
) -> MergeReport:
    """Writes a copy of a model's folder with an adapter merged into it; ``out`` appears when it is complete.

    Args:
        base: folder with ``model.safetensors``, another single safetensors file, or shards and their index; of a
            transformers model or any other.
        adapter: folder that PEFT or ``fastlora.save_adapter`` wrote.
        out: folder to write. Configuration and tokenizer are copied too, weights in other formats are not.
        force: True to replace a model in ``out``.
        progress: called with bytes written and bytes in all.

    Returns:
        The rounding, layer by layer, and which weights were merged into.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError, FileExistsError: an input is missing; ``out`` exists.
        ValueError: a file is damaged; an option of the adapter is not supported; it is for another model; or the base
            is quantised.
    """
    base, out = Path(base), Path(out)
    config, adapters = read_adapter(adapter)
    checkpoint = open_checkpoint(base)
    _check_not_quantised(base)
    _check_out(base, Path(adapter), out, force)
    for option, entry, why in unmatched.patterns(config, adapters):
        _log.warning("%s: %s: %r %s", Path(adapter) / CONFIG, option, entry, why)
    scales = {layer: config.scale(layer) for layer in adapters}
    targets = _targets(checkpoint, adapters, scales, config.fan_in_fan_out, base)

    total = sum(file.stat().st_size for file in checkpoint.files)
    done = 0

    def step(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    layers: list[LayerMerge] = []
    with new_folder(out) as temporary:
        _copy_others(base, temporary)
        for file in checkpoint.files:
            copy_file(file, temporary / file.name, step)
            with file.open("rb") as source, (temporary / file.name).open("r+b") as copy:
                for target in targets:
                    if target.entry.file == file:
                        merged, measured = _folded(target, read_tensor(source, target.entry))
                        write_tensor(copy, target.entry, merged)
                        layers += measured
    dtypes = ", ".join(sorted({dtype_name(layer.dtype) for layer in layers}))
    note = (
        f"merged into the {dtypes} weights of '{base}'; an adapter that was trained on a quantised copy of it was "
        "trained on other weights: to merge into those, load it in 4 bits and call fastlora.merge_and_unload"
    )
    return MergeReport(tuple(layers), note)


def _folded(target: _Target, base: Tensor) -> tuple[Tensor, list[LayerMerge]]:
    """The tensor that is written in the place of ``base``, and of a weight its rounding."""
    if target.is_bias:
        bias = folded_bias(base, target.update, target.name)
        assert bias is not None
        return bias, []
    weight, measured = fold_and_measure(target.name, base, target.update)
    return weight, [measured]


def _targets(
    checkpoint: Checkpoint, adapters: Adapters, scales: Mapping[str, float], fan_in_fan_out: bool, base: Path
) -> list[_Target]:
    """Finds the tensor that each layer of the adapter changes, and checks all before a byte is written."""
    names = _names(checkpoint, list(adapters), base)
    targets: list[_Target] = []
    # Of the weights that are not square, one that is stored as [K, N] (True) and one as [N, K] (False).
    witnesses: dict[bool, str] = {}
    for layer, parts in adapters.items():
        entry, a, b = checkpoint.tensors[names[layer]], parts["lora_A"], parts["lora_B"]
        _check_weight(names[layer], entry, layer, parts)
        is_turned = fan_in_fan_out
        if a.shape[1] != b.shape[0]:
            is_turned = entry.shape == (a.shape[1], b.shape[0])
            witnesses[is_turned] = layer
        bias = parts.get("lora_bias")
        if bias is not None:
            bias = scaled_bias(bias, scales[layer])
        update = Update.of(a, b, scales[layer], is_turned, parts.get("lora_magnitude"), bias)
        targets.append(_Target(names[layer], entry, layer, update))
        if bias is not None:
            name = names[layer].removesuffix("weight") + "bias"
            targets.append(_Target(name, _bias_entry(checkpoint, name, layer, len(bias)), layer, update, is_bias=True))
    against = witnesses.get(not fan_in_fan_out)
    square = next((each.layer for each in targets if not each.is_bias and len(set(each.entry.shape)) == 1), None)
    if against is not None and square is not None:
        raise ValueError(
            f"{CONFIG} has fan_in_fan_out={fan_in_fan_out}, but the weight of {against} lies the other way, so that of "
            f"{square}, which is square, may lie either way: correct fan_in_fan_out, or use fastlora.load_adapter and "
            "merge_and_unload"
        )
    return targets


def _check_weight(name: str, entry: Entry, layer: str, parts: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a weight that cannot hold the sum, or is of another shape than the adapter's."""
    if entry.dtype in ("U8", "I8"):
        raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)} in {entry.file}: {_QUANTISED}")
    if not is_floating(entry):
        raise ValueError(f"{name} is {entry.dtype} in {entry.file}: dequantise the base first")
    n, k = parts["lora_B"].shape[0], parts["lora_A"].shape[1]
    if entry.shape not in ((n, k), (k, n)):
        part = "lora_A" if n in entry.shape else "lora_B"
        raise ValueError(
            f"the adapter is for another model: {key_of(layer, part)} has shape {list(parts[part].shape)}, made for a "
            f"weight {[n, k]}; {name} is {list(entry.shape)}"
        )


def _bias_entry(checkpoint: Checkpoint, name: str, layer: str, n: int) -> Entry:
    """The place of the bias that an adapter's own is added to."""
    entry = checkpoint.tensors.get(name)
    if entry is None:
        raise ValueError(
            f"the adapter has a bias of its own ({key_of(layer, 'lora_bias')}, by lora_bias), and the base has no "
            f"{name} to add it to: use it unmerged, or give the base a bias of zeros there"
        )
    if not is_floating(entry) or entry.shape != (n,):
        raise ValueError(
            f"{name} is {entry.dtype} {list(entry.shape)}: the adapter is made for a floating-point bias [{n}]"
        )
    return entry


def _names(checkpoint: Checkpoint, layers: list[str], base: Path) -> dict[str, str]:
    """Finds the tensor of each layer: a checkpoint may lack the model's prefix ("transformer.") or have one more."""
    first = layers[0]
    candidates = [("", "")]
    parts = first.split(".")
    candidates += [(".".join(parts[:depth]) + ".", "") for depth in range(1, len(parts))]
    ending = f".{first}.weight"
    candidates += [("", name.removesuffix(ending) + ".") for name in checkpoint.tensors if name.endswith(ending)]
    for strip, add in candidates:
        names = {layer: f"{add}{layer.removeprefix(strip)}.weight" for layer in layers if layer.startswith(strip)}
        if len(names) == len(layers) and all(name in checkpoint.tensors for name in names.values()):
            return names
    missing = next((layer for layer in layers if f"{layer}.weight" not in checkpoint.tensors), first)
    known = sorted(name for name, entry in checkpoint.tensors.items() if len(entry.shape) == 2)
    raise ValueError(
        f"the adapter is for another model: '{base}' has no {missing}.weight, which {key_of(missing, 'lora_A')} needs "
        f"(a tied weight is stored under its other name, and cannot be merged); it has {', '.join(known[:4])} …"
    )


def _check_not_quantised(base: Path) -> None:
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        method = config.get("quantization_config") or None
    except (OSError, ValueError, AttributeError):
        return  # the weights themselves are looked at later
    if method is not None:
        name = method.get("quant_method", "") if isinstance(method, dict) else ""
        raise ValueError(f"{base / 'config.json'} has a quantization_config ({name or shown(method)}): {_QUANTISED}")


def _check_out(base: Path, adapter: Path, out: Path, force: bool) -> None:
    for name, other in (("base", base.resolve()), ("adapter", adapter.resolve())):
        if out.resolve() == other or out.resolve() in other.parents or other in out.resolve().parents:
            raise ValueError(f"out '{out}' and {name} '{other}' lie in one another: expected a folder apart")
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"out '{out}' exists: choose another folder, or pass --force to replace a model in it")
    if not out.is_dir() or (any(out.iterdir()) and not any(out.glob("*.safetensors"))):
        raise FileExistsError(
            f"out '{out}' holds no safetensors model: --force replaces nothing else; delete it yourself"
        )


def _copy_others(base: Path, target: Path) -> None:
    """Copies all but weights, hidden files, and an adapter, which transformers would load on top of the merge."""
    ignored = shutil.ignore_patterns(*_OTHER_WEIGHTS, *(f"{name}.index.json" for name in _OTHER_WEIGHTS[1:]), ".*")

    def ignore(folder: str, names: list[str]) -> set[str]:
        return ignored(folder, names) | ({CONFIG, WEIGHTS} & set(names) if Path(folder) == base else set())

    shutil.copytree(base, target, ignore=ignore, dirs_exist_ok=True)


def _bar(done: int, total: int) -> None:
    width = 40
    filled = width * done // max(total, 1)
    end = "\n" if done >= total else ""
    sys.stderr.write(f"\r[{'#' * filled}{' ' * (width - filled)}] {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB{end}")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.merge",
        description="Merges a LoRA adapter of PEFT's format into the safetensors files of a model, transformers' or "
        "any other: in float32, rounded once.",
    )
    parser.add_argument("base", type=Path, help="folder of the model: one safetensors file, or shards and their index")
    parser.add_argument(
        "adapter", type=Path, help="folder of the adapter: adapter_config.json, adapter_model.safetensors"
    )
    parser.add_argument("out", type=Path, help="folder to write; it appears when it is complete")
    parser.add_argument("--force", action="store_true", help="replace a model in OUT")
    options = parser.parse_args(arguments)
    try:
        report = merge_folders(
            options.base,
            options.adapter,
            options.out,
            force=options.force,
            progress=_bar if sys.stderr.isatty() else None,
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    print(f"written to '{options.out}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
