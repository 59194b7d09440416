"""How messages write values, names and dtypes."""

from __future__ import annotations

import pytest
import torch

from fastlora.text import dtype_name, listed, nearest, shown, shown_names, starred, suggestion, with_article


def test_dtypes_are_written_without_torch() -> None:
    assert [dtype_name(dtype) for dtype in (torch.bfloat16, torch.float32)] == ["bfloat16", "float32"]


def test_articles() -> None:
    assert [with_article(name) for name in ("AdaptedLinear", "LoRALinear")] == ["an AdaptedLinear", "a LoRALinear"]


@pytest.mark.parametrize("length", [8, 9, 10, 100])
def test_long_values_are_cut(length: int) -> None:
    text = shown("x" * length, most=11)
    assert text == ("'" + "x" * length + "'" if length <= 9 else "'xxxxxxx...")
    assert len(text) <= 11


def test_names_are_listed_up_to_a_number() -> None:
    assert listed(iter("abc")) == "a, b, c"
    assert listed("abcde") == "a, b, c and 2 more"
    assert listed([]) == ""


def test_names_of_a_stack_are_one_kind() -> None:
    assert starred("layers.11.mlp.experts.3.up") == "layers.*.mlp.experts.*.up"
    assert shown_names(["layers.0.up", "layers.1.up", "head", "layers.0.down"]) == "layers.*.up, head, layers.*.down"
    assert shown_names([f"layers.0.{letter}" for letter in "abcdefghijklmn"]).endswith("layers.*.l and 2 more")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("v_prj", ["v_proj", "q_proj"]),
        ("self_atn.v_proj", ["self_attn.v_proj", "self_attn.q_proj"]),
        ("layers.9.self_attn.v_proj", ["layers.1.self_attn.v_proj", "layers.0.self_attn.v_proj"]),
        (r".*\.v_prj", ["v_proj", "q_proj"]),
        ("dense", []),
    ],
)
def test_the_nearest_names(wanted: str, expected: list[str]) -> None:
    names = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj", "o")]
    found = nearest(wanted, names)
    assert found[:1] == expected[:1]
    assert set(expected) <= set(found)
    text = f"did you mean {' or '.join(found)}?" if found else f"there are {shown_names(names)}"
    assert suggestion(wanted, names) == text


def test_no_names_are_near_to_none() -> None:
    assert suggestion("up", []) == "there are none"
