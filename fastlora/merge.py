"""``python -m fastlora.merge BASE ADAPTER OUT``: merges a LoRA adapter into a model's safetensors files.

Every merged weight is ``W + scale · B A``, computed in float32 and rounded once to the dtype of W; every other byte is
that of the base. Files are copied one after the other and changed tensor by tensor, so that memory stays at one weight.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
from .mergeable import Update

# Files that hold unmerged weights in other formats.
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.npz")

_log = logging.getLogger("fastlora")

Progress = Callable[[int, int], None]


class _Target(NamedTuple):
    """One tensor that changes: its name and place, the layer's name in the adapter, and the update in its layout."""

    name: str
    entry: Entry
    layer: str
    update: Update


def merge_folders(
    base: str | Path, adapter: str | Path, out: str | Path, *, force: bool = False, progress: Progress | None = None
) -> MergeReport:
    """Writes a copy of a model's folder with an adapter merged into it; ``out`` appears when it is complete.

    Args:
        base: folder with ``model.safetensors``, or shards and their index.
        adapter: folder that PEFT or ``fastlora.save_adapter`` wrote.
        out: folder to write. Configuration and tokenizer are copied too, weights in other formats are not.
        force: True to replace a model in ``out``.
        progress: called with bytes written and bytes in all.

    Returns:
        The rounding, layer by layer.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError, FileExistsError: an input is missing; ``out`` exists.
        ValueError: a file is damaged; an option of the adapter is not supported; or it is for another model.
    """
    base, out = Path(base), Path(out)
    config, adapters = read_adapter(adapter)
    checkpoint = open_checkpoint(base)
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
                        weight = read_tensor(source, target.entry)
                        merged, measured = fold_and_measure(target.name, weight, target.update)
                        write_tensor(copy, target.entry, merged)
                        layers.append(measured)
    return MergeReport(tuple(layers))


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
        if not is_floating(entry):
            raise ValueError(f"{names[layer]} is {entry.dtype} in {entry.file}: dequantise the base first")
        linear, turned = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
        if entry.shape not in (linear, turned):
            part = "lora_A" if b.shape[0] in entry.shape else "lora_B"
            raise ValueError(
                f"the adapter is for another model: {key_of(layer, part)} has shape {list(parts[part].shape)}, made "
                f"for a weight {list(linear)}; {names[layer]} is {list(entry.shape)}"
            )
        is_turned = fan_in_fan_out
        if linear != turned:
            is_turned = entry.shape == turned
            witnesses[is_turned] = layer
        targets.append(_Target(names[layer], entry, layer, Update.of(a, b, scales[layer], is_turned)))
    against = witnesses.get(not fan_in_fan_out)
    square = next((target.layer for target in targets if target.entry.shape[0] == target.entry.shape[1]), None)
    if against is not None and square is not None:
        raise ValueError(
            f"{CONFIG} has fan_in_fan_out={fan_in_fan_out}, but the weight of {against} lies the other way, so that of "
            f"{square}, which is square, may lie either way: correct fan_in_fan_out, or use fastlora.load_adapter and "
            "merge_and_unload"
        )
    return targets


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
        f"the adapter is for another model: {base} has no {missing}.weight, which {key_of(missing, 'lora_A')} needs "
        f"(a tied weight is stored under its other name, and cannot be merged); it has {', '.join(known[:4])} …"
    )


def _check_out(base: Path, adapter: Path, out: Path, force: bool) -> None:
    for name, other in (("base", base.resolve()), ("adapter", adapter.resolve())):
        if out.resolve() == other or out.resolve() in other.parents or other in out.resolve().parents:
            raise ValueError(f"out {out} and {name} {other} lie in one another: expected a folder apart")
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"out {out} exists: choose another folder, or pass --force to replace a model in it")
    if not out.is_dir() or (any(out.iterdir()) and not any(out.glob("*.safetensors"))):
        raise FileExistsError(
            f"out {out} holds no safetensors model: --force replaces nothing else; delete it yourself"
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
        description="Merges a LoRA adapter of PEFT's format into safetensors files: in float32, rounded once.",
    )
    parser.add_argument("base", type=Path, help="folder of the model: model.safetensors, or shards and their index")
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
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
