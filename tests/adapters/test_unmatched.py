"""Entries of options that match nothing in the model are said, with the names that may have been meant."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fastlora
from fastlora.merge import merge_folders
from tests.adapters.tiny_models import adapted, llama, toy

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

# Options of an adapter of the toy or of a Llama; what is said, without "adapter 'default': ", and what is reported.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "target": (
        {"target_modules": ["q_proj", "v_prj", "self_attn.k_porj"]},
        [
            "target_modules: 'v_prj' matches no module of the model: did you mean v_proj",
            "target_modules: 'self_attn.k_porj' matches no module of the model: did you mean self_attn.k_proj",
        ],
    ),
    "target_by_another_name": (
        {"target_modules": ["q_proj", "query_key_value"]},
        ["target_modules: 'query_key_value' matches no module of the model: there are model.layers.*.self_attn.q_"],
    ),
    "target_of_no_layer_there": (
        {"target_modules": ["q_proj", "layers.7.self_attn.v_proj"]},
        ["target_modules: 'layers.7.self_attn.v_proj' matches no module of the model: did you mean layers."],
    ),
    "exclude": (
        {"exclude_modules": ["layers.0.self_attn.q_proj", "lm_haed", "embed_tokens"]},
        ["exclude_modules: 'lm_haed' matches no module of the model: did you mean lm_head"],
    ),
    "exclude_around_layers": (
        {"exclude_modules": ["mlp"], "target_modules": "all-linear"},
        [
            "exclude_modules: 'mlp' matches no layer, but what is around layers: the string "
            r"'(.*\\.)?mlp\\..*' would exclude"
        ],
    ),
    "exclude_regex": (
        {"exclude_modules": r".*\.v_porj"},
        [r"exclude_modules: '.*\\.v_porj' matches no module of the model: did you mean v_proj"],
    ),
    "numbers": (
        {"layers_to_transform": [1, 2, 12]},
        [
            "layers_to_transform: 2 selects no layer: there are 0, 1",
            "layers_to_transform: 12 selects no layer: there are 0, 1",
        ],
    ),
    "number_that_a_whole_name_makes_up_for": (
        {"layers_to_transform": 5, "target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"]},
        ["layers_to_transform: 5 selects no layer: there are 0, 1"],
    ),
    "layers_pattern": (
        {"layers_to_transform": [1], "layers_pattern": ["layer", "layers"]},
        ["layers_pattern: 'layer' is before the number of no target: did you mean layers?"],
    ),
    "layers_pattern_never_reached": (
        {"layers_to_transform": [1], "layers_pattern": ["layers", "model.layers"]},
        ["layers_pattern: 'model.layers' is never reached: an entry before it matches the same layers"],
    ),
    "rank_and_alpha": (
        {"rank_pattern": {"q_proj": 2, "o_proj": 4}, "alpha_pattern": {"v_prj": 3}},
        [
            "rank_pattern: 'o_proj' matches none of the adapter's layers, but others of the model, such as model.",
            "alpha_pattern: 'v_prj' matches none of the adapter's layers: did you mean v_proj",
        ],
    ),
    "rank_never_reached": (
        {"rank_pattern": {".*proj": 2, "q_proj": 4}},
        ["rank_pattern: 'q_proj' is never reached: '.*proj', which comes before it, matches the same layers"],
    ),
    "rank_reached_in_part": ({"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 4}}, []),
    "all": (
        {
            "exclude_modules": ["layers.0.self_attn.q_proj"], "layers_to_transform": [0, 1],
            "layers_pattern": "layers", "rank_pattern": {"v_proj": 5}, "alpha_pattern": {r"layers\.1\..*": 3},
        },
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_matches_nothing_is_said(case: str, caplog: pytest.LogCaptureFixture) -> None:
    options, expected = CASES[case]
    with caplog.at_level(logging.WARNING, logger="fastlora"):
        report = fastlora.inject(llama(), **({"target_modules": ["q_proj", "v_proj"]} | options))
    said = [record.getMessage().removeprefix("adapter 'default': ") for record in caplog.records]
    assert len(said) == len(expected), said
    assert all(line.startswith(start) for line, start in zip(said, expected, strict=True)), said
    entries = [f"{option}: {entry!r} " for option, entries in report.unmatched.items() for entry in entries]
    assert len(entries) == len(said)
    assert all(line.startswith(entry) for line, entry in zip(said, entries, strict=True))
    assert ("  matches nothing: " in str(report)) == bool(expected)


def test_the_report_prints_them() -> None:
    report = fastlora.inject(toy(), ["up", "q", "k"], rank_pattern={"down": 2})
    assert report.unmatched == {"target_modules": ("q", "k"), "rank_pattern": ("down",)}
    assert "\n  matches nothing: target_modules: 'q', 'k'\n  matches nothing: rank_pattern: 'down'" in str(report)


def test_a_layer_that_is_refused_has_no_rank(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"plain": nn.Linear(4, 3), "odd": nn.Embedding(5, 3)})
    report = fastlora.inject(model, ["plain", "odd"], rank_pattern={"odd": 2})
    assert report.unmatched == {"rank_pattern": ("odd",)}
    assert list(report.refused) == ["odd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["v_prj", "o"]}, r"are model.*\. Did you mean v_proj.* for 'v_prj'\?$"),
        ({"target_modules": "v_proj"}, r"A string is a regular expression for the whole name: \['v_proj'\] would"),
        ({"layers_to_transform": 4}, r" that exclude_modules and layers_to_transform leave; layers_to_transform:"
                                     r" 4 selects no layer: there are 0, 1$"),
        ({"layers_to_transform": 1, "layers_pattern": "h"}, "'h' is before the number of no target: there are model."),
        ({"exclude_modules": ".*"}, "that exclude_modules and layers_to_transform leave$"),
    ],
)  # fmt: skip
def test_where_nothing_at_all_matches_it_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"matches none of the model's modules.*{message}"):
        fastlora.inject(llama(), **({"target_modules": ["v_proj"]} | options))


def test_a_saved_adapter_says_it_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = adapted(toy(), ["up", "dwon"], alpha_pattern={"head": 5})
    fastlora.save_adapter(saved, tmp_path / "adapter")
    for again in (toy(), saved):  # as a new adapter, and into the one that is there
        caplog.clear()
        report = fastlora.load_adapter(again, tmp_path / "adapter")
        assert report.unmatched == {"target_modules": ("dwon",), "alpha_pattern": ("head",)}
        assert "target_modules: 'dwon' matches no module of the model: did you mean down?" in caplog.text
        assert (
            "alpha_pattern: 'head' matches none of the adapter's layers, but others of the model, such as head"
            in caplog.text
        )


def test_the_merge_command_says_what_it_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fastlora.save_adapter(adapted(toy(), ["up"], alpha_pattern={"upp": 5}), tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    tensors = {name: tensor for name, tensor in toy().state_dict().items() if name != "head.weight"}
    safetensors.save_file(tensors, tmp_path / "base" / "model.safetensors")
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (
        "adapter_config.json: alpha_pattern: 'upp' matches none of the adapter's layers: did you mean up?"
        in caplog.text
    )
