"""A model of transformers as its config.json describes it, read without what would have other code take part."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from .text import listed, shown


class Described(NamedTuple):
    """What a config.json says: ``values`` without the names of code and of quantisation, for the class ``kind``."""

    file: Path
    model_type: str
    kind: Any
    values: dict[str, Any]

    def config(self) -> Any:
        """The configuration; a value of the file may break anything in there."""
        return self.kind.from_dict(self.values)


def read_described(path: str | Path, instead: str = "") -> Described:
    """Reads the config.json of a model that the installed transformers knows.

    Args:
        path: a ``config.json``, or the folder that holds one.
        instead: what may be given in its place, for the messages; such as ``, or give the layers, with --layer``.

    Raises:
        ValueError: there is no such file; it describes no model that transformers knows; or transformers is missing.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    values = _read(file, instead)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{file} is read by transformers, which cannot be imported ({error}): pip install transformers{instead}"
        ) from error
    model_type, known = str(values["model_type"]), transformers.CONFIG_MAPPING
    if model_type not in known:
        near = get_close_matches(model_type, known.keys()) or ["llama", "gpt2", "bert"]
        raise ValueError(
            f"{file} has model_type {shown(model_type)}: expected one that transformers {transformers.__version__} "
            f"knows, such as {listed(near)}. Install a newer transformers (code of the model's own is not run){instead}"
        )
    return Described(file, model_type, known[model_type], values)


def _read(file: Path, instead: str) -> dict[str, Any]:
    expected = f"expected the config.json of a model of transformers, or the folder that holds it{instead}"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): {expected}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): {expected}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{file} has no model_type: {expected}")
    return {key: value for key, value in values.items() if key not in ("auto_map", "quantization_config")}
