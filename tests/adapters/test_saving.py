"""Adapters on disk: both ways with PEFT, what is refused and how, and a save that is killed at every moment."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.accuracy import assert_close_to_oracle
from fastlora.adapters.config import AdapterConfig
from fastlora.adapters.layer import AdaptedLinear
from tests.adapters.test_inject import snapshot, untouched
from tests.adapters.tiny_models import adapted, fill, gpt2, llama, run, toy

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:The following (rank|alpha)_pattern keys")

ROOT = Path(__file__).resolve().parents[2]

Q = "base_model.model.model.layers.0.self_attn.q_proj"


# Both ways with PEFT.

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.25},
    "rank_pattern": {"rank_pattern": {"q_proj": 5, "c_attn": 5}},
    "alpha_pattern": {"alpha_pattern": {r"layers\.1\..*": 2, r"h\.0\..*": 3}, "use_rslora": True},
    "list": {"target_modules": ["q_proj", "down_proj", "c_proj"]},
    "regex": {"target_modules": r".*\.(q_proj|gate_proj|c_attn)"},
    "exclude_list": {
        "target_modules": ["q_proj", "c_attn", "c_fc"], "exclude_modules": ["layers.0.self_attn.q_proj", "c_fc"]
    },
    "exclude_regex": {"target_modules": r".*_proj|.*c_fc", "exclude_modules": r".*mlp\.[du].*"},
    "layers": {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1]},
    "layer_and_pattern": {
        "target_modules": ["q_proj", "c_attn"], "layers_to_transform": 0, "layers_pattern": ["layers", "h"]
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "task": {"task_type": "CAUSAL_LM"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}  # fmt: skip
MODELS = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return request.param


def check_outputs(ours: nn.Module, theirs: nn.Module) -> None:
    """Ours against PEFT in float64, with PEFT in the tested dtype as the baseline."""
    baseline = run(theirs)
    assert_close_to_oracle(run(ours).double(), oracle=run(theirs.double()), baseline=baseline.double(), name="logits")


@pytest.mark.parametrize("case", OPTIONS)
def test_peft_loads_what_we_write(make: Callable[[], nn.Module], case: str, tmp_path: Path) -> None:
    options = {"target_modules": "all-linear", "r": 3, "lora_alpha": 7} | OPTIONS[case]
    # In float64, as the models have it; PEFT reads the same file into its own layers.
    model = adapted(make().double(), **options)
    fastlora.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make().double(), tmp_path / "ours").eval()
    check_outputs(model, theirs)
    names = {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    assert names == set(theirs.base_model.targeted_module_names)

    theirs.save_pretrained(tmp_path / "theirs")
    ours, back = ((tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs"))
    assert ours == back
    config, again = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    for key in config:
        value, other = config[key], again[key]
        assert (sorted(value) == sorted(other)) if isinstance(value, list) else value == other, key
    assert config["fan_in_fan_out"] == (make is gpt2)


@pytest.mark.parametrize("case", OPTIONS)
def test_we_load_what_peft_writes(make: Callable[[], nn.Module], case: str, tmp_path: Path) -> None:
    options = {"target_modules": "all-linear", "r": 3, "lora_alpha": 7} | OPTIONS[case]
    theirs = peft.get_peft_model(make().double(), peft.LoraConfig(**options)).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = make().double()
    report = fastlora.load_adapter(model, tmp_path / "theirs")
    assert not report.refused
    check_outputs(model, theirs)
    fastlora.save_adapter(model, tmp_path / "ours")
    ours, back = ((tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs"))
    assert ours == back
    again = make().double()
    fastlora.load_adapter(again, tmp_path / "ours")
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_on_disk(base: torch.dtype, adapters: torch.dtype, tmp_path: Path) -> None:
    """bf16 adapters stay so on a bf16 base and are widened, exactly, elsewhere; PEFT reads either."""
    theirs = peft.get_peft_model(
        llama().to(adapters), peft.LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False
    )
    fill(theirs)
    theirs.save_pretrained(tmp_path / "a")
    model = llama().to(base)
    fastlora.load_adapter(model, tmp_path / "a")
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].dtype is (base if adapters == base else torch.float32)
    saved = safetensors_torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert torch.equal(layer.lora_A["default"], saved[f"{Q}.lora_A.weight"].to(layer.lora_A["default"].dtype))
    fastlora.save_adapter(model, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(llama().to(base), tmp_path / "b")
    b = again.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert torch.equal(b, layer.lora_B["default"].float())


def test_metadata_and_notes(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", revision="v2")
    )
    theirs.peft_config["default"].base_model_name_or_path = "somebody/llama"
    theirs.save_pretrained(tmp_path / "a")
    model = llama()
    fastlora.load_adapter(model, tmp_path / "a")
    fastlora.save_adapter(model, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    notes = {
        key: config[key] for key in ("base_model_name_or_path", "revision", "task_type", "peft_type", "inference_mode")
    }
    assert list(notes.values()) == ["somebody/llama", "v2", "CAUSAL_LM", "LORA", True]
    import safetensors

    with safetensors.safe_open(tmp_path / "b" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(os.listdir(tmp_path / "b")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_model_without_transformers(tmp_path: Path) -> None:
    model = adapted(toy(), {"up", "head"}, rank_pattern={"head": 2})
    fastlora.save_adapter(model, str(tmp_path / "a"))
    other = toy()
    fastlora.load_adapter(other, str(tmp_path / "a"), "renamed")
    assert torch.equal(run(other), run(model))
    assert [n for n, p in other.named_parameters() if p.requires_grad and not n.endswith("renamed")] == []


def test_several_adapters_are_saved_apart(tmp_path: Path) -> None:
    model = adapted(toy(), ["up"])
    fastlora.inject(model, ["down"], r=2, adapter_name="other")
    fill(model)
    for name in ("default", "other"):
        fastlora.save_adapter(model, tmp_path / name, name)
    both = toy()
    for name in ("other", "default"):
        fastlora.load_adapter(both, tmp_path / name, name)
    for name in ("default", "other", None):
        for each in (model, both):
            fastlora.set_adapter(each, name)
        assert torch.equal(run(both), run(model))


def test_compiled_and_data_parallel_models_save_under_the_names_of_the_model_inside(tmp_path: Path) -> None:
    model = adapted(toy(), ["up"])
    fastlora.save_adapter(model, tmp_path / "a")
    for wrapper in (torch.compile(model), nn.DataParallel(model)):
        fastlora.save_adapter(wrapper, tmp_path / "b")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_merged_model_saves_its_adapter(tmp_path: Path) -> None:
    model = adapted(toy(), ["up"])
    y = run(model)
    fastlora.merge_adapter(model)
    fastlora.save_adapter(model, tmp_path)
    other = toy()
    fastlora.load_adapter(other, tmp_path)
    assert torch.equal(run(other), y)


def test_values_are_loaded_into_an_adapter_that_exists(tmp_path: Path) -> None:
    saved = adapted(toy(), ["up"])
    fastlora.save_adapter(saved, tmp_path)
    model = toy()
    fastlora.inject(model, ["up"], r=3, lora_alpha=7)
    parameters = [p for p in model.parameters() if p.requires_grad]
    fastlora.load_adapter(model, tmp_path)
    assert torch.equal(run(model), run(saved))
    assert all(p is q for p, q in zip(parameters, [p for p in model.parameters() if p.requires_grad], strict=True))


# What is refused, by name.


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(
    model: nn.Module, folder: Path, message: str, exception: type[Exception] = ValueError, **options: Any
) -> None:
    """load_adapter raises this, of its own accord, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(exception, match=message) as caught:
        fastlora.load_adapter(model, folder, **options)
    assert caught.type is exception
    assert untouched(model, before)


REFUSED: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 2}, "bias": "lora_only", "corda_config": {"x": 1},
    "ensure_weight_tying": True, "kasa_config": {"beta": 1.0}, "layer_replication": [[0, 2]],
    "lora_ga_config": {"scale": "stable"}, "megatron_config": {"x": 1}, "modules_to_save": ["lm_head"],
    "monteclora_config": {"x": 1}, "target_parameters": ["weight"], "trainable_token_indices": [3],
    "use_bdlora": {"nblocks": 2}, "use_qalora": True, "velora_config": {"x": 1},
    "loftq_config": {"loftq_bits": 4},
}  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of llama's on q_proj and v_proj."""
    fastlora.save_adapter(adapted(llama(), ["q_proj", "v_proj"]), tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_options_are_refused_by_name(key: str, saved: Path) -> None:
    rewrite(saved, **{key: REFUSED[key]})
    refused(llama(), saved, f"asks for {key}=.*, which fastlora does not support")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "news"])
def test_starts_that_change_the_base_are_refused(start: str, saved: Path) -> None:
    rewrite(saved, init_lora_weights=start)
    refused(llama(), saved, f"has init_lora_weights='{start}', .*path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("start", ["eva", "orthogonal", "gaussian", False, None])
def test_starts_that_do_not_are_read(start: Any, saved: Path) -> None:
    rewrite(saved, init_lora_weights=start, eva_config={"rho": 2.0})
    fastlora.load_adapter(llama(), saved)


def test_every_option_of_peft_is_known() -> None:
    """A new option of PEFT's shows here: it is to be supported, or refused by name."""
    from fastlora.adapters import config as options

    ours = {field.name for field in dataclasses.fields(AdapterConfig)} - {"notes"}
    known = ours | {*options._UNSUPPORTED, *options._INERT, *options._NOTES, "peft_type"}
    theirs = {field.name: field for field in dataclasses.fields(peft.LoraConfig) if field.init}
    assert theirs.keys() <= known
    defaults = peft.LoraConfig(target_modules=["a"]).to_dict()
    for key, default in options._UNSUPPORTED.items():
        assert defaults[key] == default, key
    for field in dataclasses.fields(AdapterConfig):
        if field.name not in ("notes", "target_modules"):
            value = getattr(AdapterConfig(target_modules=["a"]), field.name)
            assert defaults[field.name] == value, field.name


def test_keys_of_a_newer_peft(saved: Path) -> None:
    rewrite(saved, use_news=False, news_config=None, news={}, news_list=[])
    fastlora.load_adapter(llama(), saved)
    for value in (True, 16, "on", {"x": 1}, 0.0):
        rewrite(saved, use_news=value)
        refused(llama(), saved, "has use_news=.*, which fastlora does not know, and it may change the result")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"peft_type": "IA3"}, "has peft_type 'IA3': fastlora loads 'LORA' alone"),
    "no_type": ({"peft_type": None}, "has peft_type None"),
    "r": ({"r": -1}, "r must be at least 1, got -1"),
    "r_kind": ({"r": "8"}, "r must be an integer, got '8'"),
    "rank_pattern": ({"rank_pattern": [1]}, "rank_pattern must be a dict"),
    "targets": ({"target_modules": None}, "has no target_modules"),
    "targets_kind": ({"target_modules": 3}, "target_modules must be a list"),
    "alpha_nan": ({"lora_alpha": float("nan")}, "lora_alpha must be finite"),
    "rank": ({"r": 4}, rf"{Q}.lora_A.weight has shape \[3, 48\], so rank 3: expected rank 4"),
    "rank_of_one": ({"rank_pattern": {"v_proj": 2}}, r"v_proj.lora_A.weight has shape \[3, 48\].*: expected rank 2"),
    "more_targets": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"has no .*layers\.0\.self_attn\.o_proj\."),
    "fewer_targets": ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight is for another model: .* is not among"),
    "no_match": ({"target_modules": ["c_attn"]}, r"a: target_modules=\['c_attn'\] matches none"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit(case: str, saved: Path) -> None:
    changes, message = CONFIGS[case]
    rewrite(saved, **changes)
    refused(llama(), saved, message)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\udcff"], ids=["empty", "cut", "list", "null", "binary"])
def test_configs_that_are_none(text: str, saved: Path) -> None:
    (saved / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(llama(), saved, r"adapter_config\.json (is not JSON|is not text|holds a (list|NoneType))")


# Files that are damaged, incomplete, or of another model.


def test_missing_files(saved: Path) -> None:
    refused(llama(), saved / "nowhere", "folder '.*nowhere' does not exist", FileNotFoundError)
    weights = saved / "adapter_model.safetensors"
    weights.rename(saved / "adapter_model.bin")
    refused(llama(), saved, r"no adapter_model\.safetensors: adapter_model\.bin is a pickle, .*PEFT", FileNotFoundError)
    (saved / "adapter_model.bin").unlink()
    refused(llama(), saved, r"no adapter_model\.safetensors: expected a folder that", FileNotFoundError)
    (saved / "adapter_config.json").unlink()
    refused(llama(), saved, r"has no adapter_config\.json", FileNotFoundError)


def test_a_file_cut_short_anywhere(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    whole, model = weights.read_bytes(), llama()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    lengths = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1}
    for length in sorted(lengths | set(random.Random(0).sample(range(len(whole)), 40))):
        weights.write_bytes(whole[:length])
        refused(model, saved, "adapter_model.safetensors is damaged, cut short or no safetensors file .*copy it again")


def test_a_damaged_header(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    whole, model, rng = weights.read_bytes(), llama(), random.Random(1)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    wrong = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(header)] = rng.randrange(256)
        weights.write_bytes(data)
        before = snapshot(model)
        try:
            fastlora.load_adapter(model, saved)
        except ValueError:
            assert untouched(model, before)
            wrong += 1
        else:  # the change was to a byte without a meaning, such as one of the metadata
            fastlora.unload(model)
    assert wrong > 100


@pytest.mark.parametrize("content", [b"version https://git-lfs", b"PK\3\4" + bytes(60), b"\x80\2}q\0."],
                         ids=["lfs", "torch_zip", "pickle"])  # fmt: skip
def test_foreign_files(content: bytes, saved: Path) -> None:
    (saved / "adapter_model.safetensors").write_bytes(content)
    refused(llama(), saved, "is damaged, cut short or no safetensors file")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors_torch.load_file(file)
    change(tensors)
    safetensors_torch.save_file(tensors, file, metadata={"format": "pt"})


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "empty": (dict.clear, "holds no tensors"),
    "no_partner": (lambda t: t.pop(f"{Q}.lora_B.weight"), f"has no {Q}.lora_B.weight, the partner"),
    "no_layer": (lambda t: [t.pop(f"{Q}.lora_{c}.weight") for c in "AB"], rf"has no {Q}\.lora_A.*1 of 4 layers"),
    "dora": (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(3)}), "the key '.*lora_magnitude_vector'"),
    "embedding": (lambda t: t.update({"base_model.model.e.lora_embedding_A": torch.ones(3, 4)}), "key '.*embedding_A'"),
    "bias": (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(3)}), "the key '.*lora_B.bias'"),
    "base": (lambda t: t.update({"lm_head.weight": torch.ones(3, 4)}), "the key 'lm_head.weight'"),
    "no_prefix": (lambda t: t.update({"q.lora_A.weight": torch.ones(3, 4)}), "the key 'q.lora_A.weight'"),
    "other_layer": (
        lambda t: t.update({f"base_model.model.h.9.q.lora_{c}.weight": torch.ones(3, 3) for c in "AB"}),
        r"h\.9\.q\.lora_A\.weight is for another model: the model has no h\.9\.q; expected model\.layers\.\*",
    ),
    "width": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 64)}),
        rf"{Q}\.lora_A\.weight has shape \[3, 64\]: the model expects \[3, 48\]",
    ),
    "height": (
        lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(64, 3)}),
        rf"{Q}\.lora_B\.weight has shape \[64, 3\]: the model expects \[48, 3\]",
    ),
    "turned": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(48, 3)}), r"has shape \[48, 3\], so rank 48"),
    "vector": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(48)}), r"is float32 \[48\]: expected a floating"),
    "integer": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 48).int()}), r"is int32 \[3, 48\]: expected"),
    "nan": (lambda t: t[f"{Q}.lora_B.weight"][0].fill_(float("nan")), "lora_B.weight holds values that are not finite"),
    "inf": (lambda t: t[f"{Q}.lora_A.weight"][0].fill_(float("inf")), "lora_A.weight holds values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case: str, saved: Path) -> None:
    change, message = TENSORS[case]
    edit(saved, change)
    refused(llama(), saved, message)
    refused(adapted(llama(), ["q_proj", "v_proj"], adapter_name="mine"), saved, message)


def test_an_adapter_of_another_model(saved: Path) -> None:
    refused(llama(hidden_size=64), saved, rf"{Q}\.lora_A\.weight has shape \[3, 48\]: the model expects \[3, 64\]")
    refused(llama(num_hidden_layers=3), saved, r"has no base_model\.model\.model\.layers\.2\.self_attn\.q_proj\.lora_A")
    refused(llama(num_hidden_layers=1), saved, r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is for another model")
    refused(
        gpt2(), saved, r"target_modules=.* matches none of the model's modules; its linear layers are transformer\.h"
    )


def test_an_adapter_that_differs_from_the_one_in_the_model(saved: Path) -> None:
    refused(
        adapted(llama(), ["q_proj", "v_proj"], r=4), saved, r"has shape \[3, 48\]: the model expects \[4, 48\].*rank"
    )
    refused(adapted(llama(), ["q_proj"]), saved, "v_proj.lora_A.weight is for another model: .* not among the layers")
    refused(adapted(llama(), ["q_proj", "v_proj"], lora_alpha=6), saved, r"has scale 2\.33333 in .*adapter 'default' 2")
    refused(adapted(llama(), ["q_proj", "v_proj"]), saved, "adapter_dtype: the model has", adapter_dtype=torch.float32)
    model = adapted(llama(), ["q_proj", "v_proj"])
    fastlora.merge_adapter(model)
    refused(model, saved, "adapter 'default' is merged into the base")


def test_targets_that_cannot_have_an_adapter(saved: Path) -> None:
    model = llama()
    model.model.layers[0].self_attn.q_proj.forward = lambda x: x
    refused(model, saved, rf"{Q}\.lora_A\.weight is for a layer that cannot have an adapter: its forward was replaced")
    with pytest.raises(ValueError, match="q_proj is on the meta device, which holds no data"):
        fastlora.load_adapter(llama().to("meta"), saved)


def test_models_that_have_no_adapter_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model has no adapters"):
        fastlora.save_adapter(toy(), tmp_path / "a")
    with pytest.raises(ValueError, match="use PEFT's own methods, such as save_pretrained"):
        fastlora.save_adapter(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])), tmp_path / "a")
    with pytest.raises(ValueError, match="adapter_name 'other' is unknown: the model has default"):
        fastlora.save_adapter(adapted(toy(), ["up"]), tmp_path / "a", "other")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="folder must be a folder, got the file"):
        fastlora.save_adapter(adapted(toy(), ["up"]), tmp_path / "file")
    model = adapted(toy(), ["up"])
    with torch.no_grad():
        model.blocks[1]["up"].lora_B["default"][2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.up\.lora_B holds values that are not finite: the training"):
        fastlora.save_adapter(model, tmp_path / "a")
    assert os.listdir(tmp_path) == ["file"]


def test_without_safetensors(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    remedy = r"adapters on disk need safetensors: pip install 'safetensors>=0\.4'"
    refused(llama(), saved, remedy, ImportError)
    with pytest.raises(ImportError, match=remedy):
        fastlora.save_adapter(adapted(toy(), ["up"]), saved / "b")


# Writing over an older adapter.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_else_is_in_the_folder_stays(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    fastlora.save_adapter(adapted(toy(), ["up"]), folder)
    fastlora.save_adapter(adapted(toy(), ["down"]), folder / "fr")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "latest").symlink_to("optimizer.pt")
    others = {name: data for name, data in contents(folder).items() if not name.startswith("adapter_")}
    fastlora.save_adapter(adapted(toy(), ["up"], r=4), folder)
    assert {name: data for name, data in contents(folder).items() if not name.startswith("adapter_")} == others
    assert (folder / "latest").is_symlink()
    model = toy()
    assert fastlora.load_adapter(model, folder).layers[0].r == 4
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_adapter_and_no_litter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(saved.parent)

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    for r in (3, 4):  # the same config, and another one
        with pytest.raises(OSError, match="No space left"):
            fastlora.save_adapter(adapted(llama(), ["q_proj", "v_proj"], r=r), saved)
        assert contents(saved.parent) == before


def test_without_a_swap_in_one_step(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.atomic._exchanged_at_once", lambda one, other: False)
    fastlora.save_adapter(adapted(llama(), ["q_proj"], r=4), saved)
    assert fastlora.load_adapter(llama(), saved).layers[0].r == 4
    assert os.listdir(saved.parent) == ["a"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("change", ["same_config", "other_config", "new_folder"])
def test_a_kill_at_any_moment_leaves_a_whole_adapter(change: str, tmp_path: Path) -> None:
    """A process saves and is killed: before each of its system calls that Python sees, and at random moments."""
    code = textwrap.dedent(
        """
        import os, random, signal, sys, time
        from pathlib import Path
        import torch
        from safetensors.torch import load_file
        import fastlora
        from fastlora.adapters.folder import read_adapter
        from tests.adapters.tiny_models import adapted, toy, fill

        torch.set_num_threads(1)
        change, root = sys.argv[1], Path(sys.argv[2])
        old = adapted(toy(), ["up"], r=3)
        new = adapted(toy(), ["up"] if change == "same_config" else ["down"], r=3 if change == "same_config" else 5)
        fill(new, seed=9)
        folder = root / "a"
        FILES = ("adapter_config.json", "adapter_model.safetensors")
        written = {}
        for name, model in (("old", old), ("new", new)):
            fastlora.save_adapter(model, root / name)
            written[name] = [(root / name / f).read_bytes() for f in FILES]

        def start():
            # Only whole adapters are here, so that this needs no care.
            if change == "new_folder":
                os.system(f"rm -rf {folder}")
            else:
                fastlora.save_adapter(old, folder)

        def state():
            if change == "new_folder" and not folder.exists():
                return "old"
            read_adapter(folder)
            found = [(folder / f).read_bytes() for f in FILES]
            assert found in written.values(), "a mixture"
            return "old" if found == written["old"] else "new"

        def killed(at):
            child = os.fork()
            if child == 0:
                calls = 0
                def hook(event, args):
                    nonlocal calls
                    if event == "open" or event.startswith(("os.", "shutil.", "ctypes.")) and event != "os.kill":
                        calls += 1
                        if calls == at + 1:
                            os.kill(os.getpid(), signal.SIGKILL)
                if at is not None:
                    sys.addaudithook(hook)
                    fastlora.save_adapter(new, folder)
                    os._exit(0)
                while True:
                    for model in (new, old):
                        fastlora.save_adapter(model, folder)
            if at is None:
                time.sleep(random.random() * 0.03)
                os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1] == signal.SIGKILL

        states, at = [], 0
        start()
        while killed(at):
            states.append(state())
            start()
            at += 1
        assert state() == "new"
        assert states == sorted(states, reverse=True), states  # old until the one step, new from then on
        random.seed(0)
        for _ in range(40):
            start()
            assert killed(None)
            state()
        print(len(states), states.count("new"))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, change, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps, after = map(int, done.stdout.split())
    assert steps >= 5
    assert after >= 1


def test_saving_where_one_stands(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    fastlora.save_adapter(adapted(llama(), ["q_proj"], r=4), ".")
    assert fastlora.load_adapter(llama(), ".").layers[0].r == 4
    assert Path.cwd() == saved
    assert os.listdir(saved.parent) == ["a"]


def test_numbers_of_numpy(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    model = adapted(toy(), ["up"], r=numpy.int64(4), lora_alpha=numpy.float32(6), rank_pattern={"0.up": numpy.int32(2)})
    fastlora.save_adapter(model, tmp_path)
    assert fastlora.load_adapter(toy(), tmp_path).layers[1][3:] == (4, 1.5)


def test_old_leftovers_do_not_disturb(saved: Path) -> None:
    litter = saved.with_name(f".{saved.name}.1-abcd.tmp")
    shutil.copytree(saved, litter)
    fastlora.save_adapter(adapted(llama(), ["q_proj"], r=4), saved)
    assert fastlora.load_adapter(llama(), saved).layers[0].r == 4


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("said", ["when it is made", "when it is saved"])
def test_peft_s_auto_classes_load_what_we_write(task_type: str | None, said: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made, saved = (task_type, None) if said == "when it is made" else (None, task_type)
    fastlora.inject(model, "all-linear", r=3, lora_alpha=7, task_type=made)
    fill(model)
    fastlora.save_adapter(model, tmp_path / "adapter", task_type=saved)
    kinds = [peft.AutoPeftModelForCausalLM] if task_type else [peft.AutoPeftModel, peft.AutoPeftModelForCausalLM]
    for kind in kinds:
        check_outputs(model, kind.from_pretrained(tmp_path / "adapter").eval())
        model.float()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fastlora.load_adapter(again, tmp_path / "adapter")
    fastlora.save_adapter(again, tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() == (
        tmp_path / "adapter" / "adapter_config.json"
    ).read_bytes()


def test_an_unknown_task_is_told_the_known_ones(tmp_path: Path) -> None:
    model = adapted(llama(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"task_type must be one of SEQ_CLS, .* or None, got 'CHAT'"):
        fastlora.save_adapter(model, tmp_path / "a", task_type="CHAT")
    with pytest.raises(ValueError, match="task_type must be one of"):
        fastlora.inject(llama(), ["q_proj"], task_type="CHAT")
    assert not (tmp_path / "a").exists()
