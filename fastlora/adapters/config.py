"""An adapter's options; reads and writes them as PEFT's ``adapter_config.json``.

An option that changes the result and is not supported here is refused by its name; so is a key that a newer PEFT may
have added, unless it is switched off. Nothing is ignored that could have a meaning.
"""

from __future__ import annotations

import json
import numbers
import re
from dataclasses import dataclass, field
from typing import Any

from ..start import scale_of
from ..text import shown
from .matching import ALL_LINEAR, first_match, is_target

# Options of PEFT 0.21.2 that fastlora does not support, each with the default that PEFT writes.
_UNSUPPORTED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "modules_to_save": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}

# Keys that never change the result: parameters of options that are off, and notes.
_INERT = frozenset({"eva_config", "inference_mode", "megatron_core", "peft_version", "qalora_group_size"})
_INERT |= {"runtime_config"}

# Notes that are kept, so that an adapter that is loaded and saved again still names its base.
_NOTES = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")

# PEFT's, each with an auto class of its own.
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# The others (pissa, olora, corda, loftq, lora_ga) subtract their start from the base weight, and so change it.
_STARTS = (True, False, "gaussian")
_HARMLESS_STARTS = ("eva", "orthogonal")

_CONVERT = (
    "; in PEFT, save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain "
    "LoRA adapter of it"
)


@dataclass(frozen=True)
class AdapterConfig:
    """The options of one adapter, by PEFT's names; made by :func:`fastlora.inject` and read from files.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two exclude each other.
    """

    target_modules: str | list[str]
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names("target_modules", self.target_modules, f"a regular expression, or {ALL_LINEAR!r}")
        if self.exclude_modules is not None:
            _check_names("exclude_modules", self.exclude_modules, "a regular expression")
        _check_number("r", self.r, 1, integer=True)
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout, 0, below=1)
        for name in ("use_rslora", "fan_in_fan_out", "lora_bias", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        for name, low in (("rank_pattern", 1), ("alpha_pattern", None)):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict) or not all(isinstance(key, str) for key in patterns):
                raise TypeError(f"{name} must be a dict from name patterns to numbers, got {shown(patterns)}")
            for key, value in patterns.items():
                _check_regex(name, key)
                _check_number(f"{name}[{key!r}]", value, low, integer=name == "rank_pattern")
        self._check_layers()
        # numpy's numbers are welcome, but JSON has none of them.
        for name in ("r", "lora_alpha", "lora_dropout"):
            object.__setattr__(self, name, _number(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, {key: _number(value) for key, value in getattr(self, name).items()})
        if not any(self.init_lora_weights is start or self.init_lora_weights == start for start in _STARTS):
            raise ValueError(f"init_lora_weights must be one of {_STARTS}, got {self.init_lora_weights!r}")
        if self.lora_bias and self.init_lora_weights == "gaussian":
            raise ValueError("lora_bias=True goes with init_lora_weights=True or False, got 'gaussian'")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias=True and use_dora=True exclude each other, as in PEFT: pass one of them")

    def _check_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        if layers is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform goes with a list of target_modules, got the regular expression "
                f"{self.target_modules!r}: write the numbers into the expression"
            )
        if pattern and layers is None:
            raise ValueError(f"layers_pattern={pattern!r} needs layers_to_transform, got None")
        for index in layers if isinstance(layers, list) else [] if layers is None else [layers]:
            _check_number("layers_to_transform", index, 0, integer=True)
        for name in pattern if isinstance(pattern, list) else [] if pattern is None else [pattern]:
            _check_regex("layers_pattern", name)

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that the adapter has in a layer, by the names that the layer has for them."""
        more = {"lora_bias": self.lora_bias, "lora_magnitude": self.use_dora}
        return ("lora_A", "lora_B", *(part for part, has in more.items() if has))

    def targets(self, name: str) -> bool:
        """Returns True if the module of this name gets the adapter."""
        return is_target(name, self.target_modules, self.exclude_modules, self.layers_to_transform, self.layers_pattern)

    def rank(self, name: str) -> int:
        """The rank in the module of this name."""
        return first_match(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """lora_alpha in the module of this name."""
        return first_match(self.alpha_pattern, name, self.lora_alpha)

    def scale(self, name: str) -> float:
        """The factor on the update in the module of this name."""
        return scale_of(self.alpha(name), self.rank(name), self.use_rslora)

    def to_json(self) -> str:
        """The text of ``adapter_config.json``: PEFT's keys, those that change the result and those that it requires."""
        values: dict[str, Any] = {
            "alpha_pattern": self.alpha_pattern,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": self.init_lora_weights,
            "layers_pattern": self.layers_pattern,
            "layers_to_transform": self.layers_to_transform,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "target_modules": self.target_modules,
            "use_rslora": self.use_rslora,
        }
        values |= {note: self.notes.get(note) for note in _NOTES}
        if self.exclude_modules is not None:  # PEFT below 0.14 does not know it
            values["exclude_modules"] = self.exclude_modules
        if self.lora_bias:  # nor, below 0.15, this
            values["lora_bias"] = True
        if self.use_dora:  # nor, below 0.9, this
            values["use_dora"] = True
        return json.dumps(values, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: str) -> AdapterConfig:
        """Reads PEFT's ``adapter_config.json``.

        Args:
            text: its content.
            source: its path, for messages.

        Raises:
            ValueError: it is no JSON object, no LoRA adapter, asks for an option that is not supported, or holds an
                unknown key that is not switched off; the message names it.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source} is not JSON ({error}): it is damaged, or no PEFT adapter's") from None
        if not isinstance(values, dict):
            raise ValueError(f"{source} holds a {type(values).__name__}: expected PEFT's JSON object of options")
        if values.get("peft_type") != "LORA":
            raise ValueError(f"{source} has peft_type {values.get('peft_type')!r}: fastlora loads 'LORA' alone")

        supported = set(cls.__dataclass_fields__) - {"notes"}
        known = {"peft_type", *_NOTES, *_INERT, *_UNSUPPORTED, *supported}
        for key, value in values.items():
            off = value is None or value is False or value in ("", [], {}) or value == _UNSUPPORTED.get(key)
            if key in _UNSUPPORTED and not off:
                raise ValueError(f"{source} asks for {key}={shown(value)}, which fastlora does not support: use PEFT")
            if key not in known and not off:
                raise ValueError(
                    f"{source} has {key}={shown(value)}, which fastlora does not know, and it may change the result: "
                    "use the PEFT that wrote it, or delete the key if this is its default"
                )
        start = values.get("init_lora_weights", True)
        if start in _HARMLESS_STARTS or start is None:
            values["init_lora_weights"] = True
        elif start not in _STARTS:
            raise ValueError(
                f"{source} has init_lora_weights={shown(start)}, which fastlora does not support: such a start may "
                f"have changed the base weight too{_CONVERT}"
            )
        if values.get("target_modules") is None:
            raise ValueError(f"{source} has no target_modules: expected the names, or a regular expression for them")
        options = {key: values[key] for key in supported & set(values)}
        for key in ("rank_pattern", "alpha_pattern"):
            options[key] = options.get(key) or {}
        try:
            return cls(notes={note: values[note] for note in _NOTES if values.get(note) is not None}, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None


def check_task_type(task_type: object) -> None:
    """Raises ValueError for a task type that PEFT has no model class for."""
    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(f"task_type must be one of {', '.join(TASK_TYPES)}, or None, got {task_type!r}")


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _check_number(
    name: str, value: Any, low: float | None = None, *, below: float | None = None, integer: bool = False
) -> None:
    kind: Any = numbers.Integral if integer else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {'an integer' if integer else 'a number'}, got {value!r}")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be finite, got {value}")
    if (low is not None and value < low) or (below is not None and value >= below):
        raise ValueError(f"{name} must be at least {low}{f' and below {below}' if below else ''}, got {value}")


def _check_names(name: str, value: Any, if_string: str) -> None:
    if isinstance(value, str):
        _check_regex(name, value)
    elif not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        has_some = isinstance(getattr(value, name, None), (str, list, tuple, set))
        remedy = f": pass its fields, {name}=config.{name} and so on" if has_some else ""
        raise TypeError(f"{name} must be a list of module names or a string ({if_string}), got {shown(value)}{remedy}")
    if name == "target_modules" and (not value or (isinstance(value, list) and "" in value)):
        raise ValueError(f"{name} must name at least one module, got {value!r}")


def _check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must be a string or a list of strings, got {shown(pattern)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression ({error}){_for_globs(name, pattern)}") from None


def _for_globs(name: str, pattern: str) -> str:
    """What to say of a pattern that would do as one of file names, such as ``*.q_proj``."""
    regex = re.sub(r"(?<!\.)\*", ".*", re.sub(r"(?<!\\)\.(?!\*)", r"\.", pattern))
    try:
        re.compile(regex)
    except re.error:
        return ""
    ending = pattern.removeprefix("*.")
    as_list = name in ("target_modules", "exclude_modules") and re.fullmatch(r"[\w.]+", ending)
    return f": a star repeats what is before it, write r'{regex}'" + (f" or the list [{ending!r}]" if as_list else "")
