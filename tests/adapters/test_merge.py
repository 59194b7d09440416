"""Merging: in float32 with one rounding, out again to the bit, for good without fastlora, and from folder to folder."""

from __future__ import annotations

import copy
import json
import math
import os
import pty
import shutil
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
from fastlora import merge
from fastlora.accuracy import assert_close_to_oracle
from fastlora.adapters.layer import AdaptedConv1D, AdaptedLinear
from fastlora.merge import merge_folders
from tests.adapters.test_inject import snapshot, untouched
from tests.adapters.tiny_models import adapted, fill, gpt2, llama, run, toy

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"llama": llama, "gpt2": gpt2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return request.param


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def exact_weights(model: nn.Module) -> dict[str, Tensor]:
    """W + scale · B A of every adapted layer in float64, as the weight is stored."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            key: Any = layer.active_adapter
            delta = layer.scale[key] * layer.lora_B[key].double() @ layer.lora_A[key].double()
            weights[name] = layer.weight.double() + (delta.T if isinstance(layer, AdaptedConv1D) else delta)
    return {name: weight.detach() for name, weight in weights.items()}


def ulps(dtype: torch.dtype, values: Tensor) -> Tensor:
    """Half the distance to the next value of the dtype: what one rounding may lose."""
    return torch.finfo(dtype).eps * 2.0 ** values.abs().clamp_min(1e-30).log2().floor() / 2


# In memory.


def test_merge_is_one_rounding_and_unmerge_exact(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = adapted(make().to(dtype))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    exact = exact_weights(model)
    report = fastlora.merge_adapter(model)
    assert [layer.name for layer in report.layers] == list(exact)
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        error = (weight.double() - exact[layer.name]).abs()
        # float32's own sum comes before the rounding: for half precision it is nothing, for float32 it is all.
        assert (error <= ulps(dtype, exact[layer.name]) * (1 + 2**-8) + 2**-22 * exact[layer.name].abs().max()).all()
        assert layer.max_error == pytest.approx(error.max().item(), rel=1e-9)
        assert layer.rms_error == pytest.approx(error.square().mean().sqrt().item(), rel=1e-9)
        base = before[f"{layer.name}.weight"].double()
        assert layer.rms_update == pytest.approx((exact[layer.name] - base).square().mean().sqrt().item(), rel=1e-6)
        assert layer.dtype is dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # a state dict holds the base
    fastlora.merge_adapter(model)
    fastlora.unmerge_adapter(model)
    fastlora.unmerge_adapter(model)
    for name, tensor in dict(model.named_parameters()).items():
        assert torch.equal(tensor, before[name]), name


def test_merged_model_is_the_unmerged_up_to_rounding(make: Callable[[], nn.Module]) -> None:
    model = adapted(make().double())
    y = run(model)
    fastlora.merge_adapter(model)
    assert_close_to_oracle(run(model), oracle=y, baseline=y, name="logits")


def test_a_thousand_merges_drift_nowhere() -> None:
    model = adapted(toy().bfloat16(), ["up", "down"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(1000):
        for layer in model.modules():
            if isinstance(layer, AdaptedLinear):
                layer.merge().unmerge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_only_the_active_adapter_is_merged() -> None:
    model = adapted(toy(), ["up", "down"])
    fastlora.inject(model, ["up"], r=5, adapter_name="other", init_lora_weights=False)
    fastlora.set_adapter(model, "other")
    y = run(model)
    assert [layer.name for layer in fastlora.merge_adapter(model).layers] == [f"blocks.{i}.up" for i in range(3)]
    assert_close_to_oracle(run(model).double(), oracle=y.double(), baseline=y.double() * (1 + 2**-22), name="logits")


def test_report_in_words() -> None:
    text = str(fastlora.merge_adapter(adapted(toy().bfloat16(), ["up", "down"])))
    lines = text.splitlines()
    assert lines[0].startswith("6 layers merged in bfloat16: rounding lost at most 0.00")
    assert len(lines) == 5
    assert lines[1] == "  the 3 that lost the most:"
    assert "update RMS" in lines[2]
    assert "%)" in lines[2]
    few = str(fastlora.merge_adapter(adapted(toy(), ["0.up", "1.up"])))
    assert len(few.splitlines()) == 3


def test_merge_and_unload_agrees_with_peft(make: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    """Both against float64; PEFT adds an update that it has rounded before."""
    ours = adapted(make().to(dtype), use_rslora=True, rank_pattern={"q_proj|c_attn": 5})
    exact = exact_weights(ours)
    fastlora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make().to(dtype), tmp_path).merge_and_unload()
    assert fastlora.merge_and_unload(ours) is ours
    assert {type(m) for m in ours.modules()} == {type(m) for m in theirs.modules()}
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in ours.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in exact and name.endswith(".weight"):
            baseline = theirs.state_dict()[name]
            assert_close_to_oracle(weight, oracle=exact[layer], baseline=baseline, name=name)
        else:
            assert torch.equal(weight, theirs.state_dict()[name]), name


def test_merge_and_unload_of_a_merged_model_is_the_same() -> None:
    one, two = adapted(gpt2()), adapted(gpt2())
    fastlora.merge_adapter(one)
    y = run(one)
    fastlora.merge_and_unload(one)
    fastlora.merge_and_unload(two)
    assert torch.equal(run(one), y)
    assert torch.equal(run(two), y)
    assert all(p.requires_grad for p in one.parameters())


@pytest.mark.parametrize("leave", [fastlora.merge_and_unload, fastlora.unload])
def test_a_model_without_its_adapters_needs_no_fastlora(
    leave: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    for make in (llama, gpt2):
        model = adapted(make())
        fastlora.merge_adapter(model)
        model = leave(model)
        assert torch.equal(run(copy.deepcopy(model)), run(model))
        torch.save(model, tmp_path / f"{make.__name__}.pt")
        torch.save(run(model), tmp_path / f"{make.__name__}.y")
    code = textwrap.dedent(
        """
        import sys, torch
        sys.modules["fastlora"] = None
        for name in ("llama", "gpt2"):
            model = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False)
            y = model(torch.arange(22).view(2, 11)).logits
            assert torch.equal(y, torch.load(f"{sys.argv[1]}/{name}.y"))
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_merged() -> None:
    model = adapted(toy(), ["up", "head"])
    before = snapshot(model)
    for act in (fastlora.merge_adapter, fastlora.merge_and_unload):
        with pytest.raises(ValueError, match=r"head\.weight is tied to embed\.weight, where a merge would show too"):
            act(model)
    assert untouched(model, before)

    model = adapted(toy().half(), ["up", "down"])
    with torch.no_grad():
        model.blocks[2]["down"].lora_B["default"][0, 0] = 1e9
    before = snapshot(model)
    for act in (fastlora.merge_adapter, fastlora.merge_and_unload):
        with pytest.raises(ValueError, match=r"blocks\.2\.down merged is not finite in float16.*nothing was merged"):
            act(model)
    assert untouched(model, before)
    fastlora.set_adapter(model, None)
    with pytest.raises(RuntimeError, match="no adapter is active"):
        fastlora.merge_adapter(model)
    fastlora.set_adapter(model, "default")
    with fastlora.disable(model), pytest.raises(RuntimeError, match="the adapters are switched off"):
        fastlora.merge_and_unload(model)


# From folder to folder.


class Folders:
    """A base and an adapter on disk, with the model in memory that they came from."""

    def __init__(
        self, root: Path, make: Callable[[], nn.Module], dtype: torch.dtype, shard: str = "5GB", **options: Any
    ):
        self.base, self.adapter, self.out = root / "base", root / "adapter", root / "out"
        self.model = make().to(dtype)
        self.model.save_pretrained(self.base, max_shard_size=shard)
        (self.base / "tokenizer.json").write_text("{}")
        (self.base / "pytorch_model.bin").write_bytes(b"unmerged")
        (self.base / "1_Pooling").mkdir()
        (self.base / "1_Pooling" / "config.json").write_text("{}")
        adapted(self.model, **options)
        fastlora.save_adapter(self.model, self.adapter)

    def merge(self, **options: Any) -> Any:
        return merge_folders(self.base, self.adapter, self.out, **options)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors_torch.load_file(file)
    return tensors


@pytest.mark.parametrize("shard", ["5GB", "40KB"], ids=["single", "sharded"])
def test_folders_merge_as_models_do(
    make: Callable[[], nn.Module], dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    folders = Folders(tmp_path, make, dtype, shard, use_rslora=True, rank_pattern={"q_proj|c_attn": 5})
    assert (len(list(folders.base.glob("*.safetensors"))) > 1) == (shard == "40KB")
    steps: list[tuple[int, int]] = []
    report = folders.merge(progress=lambda done, total: steps.append((done, total)))
    in_memory = fastlora.merge_adapter(folders.model)
    assert {layer.name.removesuffix(".weight"): layer[1:] for layer in report.layers} == {
        layer.name: layer[1:] for layer in in_memory.layers
    }
    merged = fastlora.merge_and_unload(folders.model)
    state = merged.state_dict()
    for name, tensor in tensors_of(folders.out).items():
        assert torch.equal(tensor, state[name]), name
    again = type(merged).from_pretrained(folders.out, dtype=dtype).eval()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())

    files = {str(p.relative_to(folders.out)) for p in folders.out.rglob("*") if p.is_file()}
    source = {str(p.relative_to(folders.base)) for p in folders.base.rglob("*") if p.is_file()}
    assert source - files == {"pytorch_model.bin"}
    assert files <= source
    for name in files:
        one, other = (folder / name for folder in (folders.base, folders.out))
        assert one.stat().st_size == other.stat().st_size
        if not name.endswith(".safetensors"):
            assert one.read_bytes() == other.read_bytes()
    assert steps[-1][0] == steps[-1][1] == sum(p.stat().st_size for p in folders.base.glob("*.safetensors"))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


def test_folders_merge_what_peft_trained(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(make(), peft.LoraConfig(target_modules="all-linear", r=4, lora_alpha=6))
    fill(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    baseline, oracle = theirs.merge_and_unload().state_dict(), make().double()
    fastlora.load_adapter(oracle, tmp_path / "adapter")
    exact = fastlora.merge_and_unload(oracle).state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert_close_to_oracle(tensor, oracle=exact[name], baseline=baseline[name], name=name)


@pytest.mark.parametrize("move", ["strip", "add"])
def test_a_checkpoint_may_lack_the_prefix_of_the_model_or_have_one_more(move: str, tmp_path: Path) -> None:
    """Released GPT-2 files say h.0… where the model says transformer.h.0…."""
    folders = Folders(tmp_path, gpt2, torch.float32)
    file = folders.base / "model.safetensors"
    rename = (lambda n: n.removeprefix("transformer.")) if move == "strip" else (lambda n: f"model.{n}")
    safetensors_torch.save_file({rename(n): t for n, t in tensors_of(folders.base).items()}, file)
    folders.merge()
    state = fastlora.merge_and_unload(folders.model).state_dict()
    merged = tensors_of(folders.out)
    assert {rename(name) for name in state if name != "lm_head.weight"} == merged.keys()
    for name, tensor in state.items():
        if name != "lm_head.weight":
            assert torch.equal(tensor, merged[rename(name)]), name


def test_square_weights_that_may_lie_either_way(tmp_path: Path) -> None:
    folders = Folders(tmp_path, gpt2, torch.float32)
    config = folders.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"fan_in_fan_out": true', '"fan_in_fan_out": false'))
    with pytest.raises(
        ValueError, match=r"fan_in_fan_out=False, but the weight of transformer\.h\.\d\.\w+\.\w+ lies the"
    ):
        folders.merge()
    # Without square weights the shapes say it all.
    folders = Folders(tmp_path / "b", gpt2, torch.float32, target_modules=["c_attn", "c_fc"])
    config = folders.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"fan_in_fan_out": true', '"fan_in_fan_out": false'))
    folders.merge()
    state = fastlora.merge_and_unload(folders.model).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors_of(folders.out).items())


def test_other_bytes_and_the_header_are_those_of_the_base(tmp_path: Path) -> None:
    folders = Folders(tmp_path, llama, torch.bfloat16, target_modules=["layers.1.mlp.up_proj"])
    folders.merge()
    before, after = ((folder / "model.safetensors").read_bytes() for folder in (folders.base, folders.out))
    changed = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
    assert changed
    assert changed[-1] - changed[0] < 48 * 80 * 2


def test_an_adapter_in_the_base_folder_is_not_copied(tmp_path: Path) -> None:
    """transformers would load it on top of the merged weights."""
    folders = Folders(tmp_path, llama, torch.float32, target_modules=["q_proj"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folders.adapter / name, folders.base / name)
    folders.merge()
    assert not list(folders.out.glob("adapter_*"))


# What cannot be merged, and that nothing is left behind.


def spoil_config(**changes: Any) -> Callable[[Folders], None]:
    def spoil(folders: Folders) -> None:
        file = folders.adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def spoil_base(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Folders], None]:
    def spoil(folders: Folders) -> None:
        tensors = tensors_of(folders.base)
        change(tensors)
        safetensors_torch.save_file(tensors, folders.base / "model.safetensors")

    return spoil


def cut(folders: Folders) -> None:
    file = folders.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def pickled(folders: Folders) -> None:
    (folders.base / "model.safetensors").rename(folders.base / "model.bin")


def write_index(folders: Folders, text: str) -> None:
    (folders.base / "model.safetensors.index.json").write_text(text)


def index_of_nothing(folders: Folders) -> None:
    (folders.base / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
    )


def index_elsewhere(folders: Folders) -> None:
    (folders.base / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../adapter/adapter_model.safetensors"}}'
    )


def broken_index(folders: Folders) -> None:
    write_index(folders, "{}")


def quantised(folders: Folders) -> None:
    file = folders.base / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps(config))


KEY = "model.layers.0.self_attn.q_proj.weight"
SPOILT: dict[str, tuple[Callable[[Folders], Any], type[Exception], str]] = {
    "option": (spoil_config(use_qalora=True), ValueError, "asks for use_qalora=True, which fastlora does not support"),
    "modules_to_save": (spoil_config(modules_to_save=["lm_head"]), ValueError, "asks for modules_to_save="),
    "unknown": (spoil_config(use_news=1), ValueError, "has use_news=1, which fastlora does not know"),
    "rank": (spoil_config(r=4), ValueError, "so rank 3: expected rank 4"),
    "no_base": (lambda f: shutil.rmtree(f.base), FileNotFoundError, "base .* does not exist"),
    "no_adapter": (lambda f: shutil.rmtree(f.adapter), FileNotFoundError, "folder .* does not exist"),
    "pickled": (pickled, FileNotFoundError, "holds no safetensors file, and nothing else is read .*save_pretrained"),
    "cut": (cut, ValueError, r"model\.safetensors is damaged, cut short"),
    "index_of_nothing": (index_of_nothing, FileNotFoundError, "names model-00002-of-00002.safetensors, which is not"),
    "index_elsewhere": (index_elsewhere, FileNotFoundError, r"names \.\./adapter/.*, which is not in its folder"),
    "broken_index": (broken_index, ValueError, r"index\.json is damaged \(KeyError"),
    "missing": (spoil_base(lambda t: t.pop(KEY)), ValueError, rf"another model: .* has no {KEY}, which base_"),
    "shape": (spoil_base(lambda t: t.update({KEY: torch.ones(48, 47)})), ValueError,
              r"lora_A\.weight has shape \[3, 48\], made for a weight \[48, 48\]; .*q_proj\.weight is \[48, 47\]"),
    "dtype": (spoil_base(lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)})), ValueError,
              "q_proj.weight is F8_E4M3 .*: dequantise the base first"),
    "packed": (spoil_base(lambda t: t.update({KEY: torch.zeros(48 * 24, 1, dtype=torch.uint8)})), ValueError,
               r"q_proj.weight is U8 \[1152, 1\] .*: the base is quantised, .*call fastlora.merge_and_unload"),
    "quantised": (quantised, ValueError, r"has a quantization_config \(bitsandbytes\): the base is quantised"),
    "nan": (spoil_base(lambda t: t[KEY].fill_(math.nan)), ValueError, "q_proj.weight merged is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_merged_is_said_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    spoil, exception, message = SPOILT[case]
    folders = Folders(tmp_path, llama, torch.float32, target_modules=["q_proj"])
    spoil(folders)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(exception, match=message) as caught:
        folders.merge()
    assert caught.type is exception
    assert sorted(os.listdir(tmp_path)) == before


def test_where_it_may_write(tmp_path: Path) -> None:
    folders = Folders(tmp_path, llama, torch.float32, target_modules=["q_proj"])
    for out in (folders.base, folders.base / "sub", folders.adapter, tmp_path):
        with pytest.raises(ValueError, match=r"out '.*' and .* '.*' lie in one another"):
            merge_folders(folders.base, folders.adapter, out, force=True)
    folders.out.mkdir()
    (folders.out / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="exists: choose another folder, or pass --force"):
        folders.merge()
    with pytest.raises(FileExistsError, match="holds no safetensors model: --force replaces nothing else"):
        folders.merge(force=True)
    (folders.out / "thesis.txt").unlink()
    folders.merge(force=True)
    (folders.out / "of_the_old_one.json").touch()
    folders.merge(force=True)
    assert not (folders.out / "of_the_old_one.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


def test_an_interruption_leaves_the_old_model(tmp_path: Path) -> None:
    folders = Folders(tmp_path, llama, torch.float32, target_modules=["q_proj"])
    folders.merge()
    old = {p.name: p.read_bytes() for p in folders.out.iterdir() if p.is_file()}

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folders.merge(force=True, progress=interrupt)
    assert {p.name: p.read_bytes() for p in folders.out.iterdir() if p.is_file()} == old
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


# The command.


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "fastlora.merge", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, text=True, check=False, **({"capture_output": True} | options))


def test_command(tmp_path: Path) -> None:
    folders = Folders(tmp_path, llama, torch.bfloat16, "40KB", target_modules=["q_proj"])
    done = command(folders.base, folders.adapter, folders.out)
    assert done.returncode == 0
    assert done.stderr == ""  # no bar where nobody watches
    assert done.stdout.startswith("2 layers merged in bfloat16: rounding lost at most ")
    assert done.stdout.endswith(f"written to '{folders.out}'\n")
    again = command(folders.base, folders.adapter, folders.out)
    assert again.returncode == 1
    assert (
        again.stderr
        == f"error: out '{folders.out}' exists: choose another folder, or pass --force to replace a model in it\n"
    )
    text = command("--help")
    assert text.returncode == 0
    assert all(word in text.stdout for word in ("base", "adapter", "out", "--force"))


def test_command_draws_a_bar_on_a_terminal(tmp_path: Path) -> None:
    folders = Folders(tmp_path, llama, torch.float32, target_modules=["q_proj"])
    mine, theirs = pty.openpty()
    done = command(
        folders.base, folders.adapter, folders.out, capture_output=False, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    drawn = b""
    while True:
        try:
            piece = os.read(mine, 4096)
        except OSError:
            break
        if not piece:
            break
        drawn += piece
    os.close(mine)
    assert done.returncode == 0
    assert drawn.startswith(b"\r[")
    assert b"[" + b"#" * 40 + b"]" in drawn


def test_main_returns_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge.main([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c")]) == 1
    assert capsys.readouterr().err.startswith("error: folder ")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_one_shard(tmp_path: Path) -> None:
    """A base of 3 shards, 80 MiB each, in 40 weights: the process may grow by some weights, not by a shard."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    shards, weights, n, k = 3, 40, 512, 2048
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {f"layers.{shard}.w{i}.weight": torch.randn(n, k, dtype=torch.bfloat16) for i in range(weights)}
        safetensors_torch.save_file(tensors, base / name)
        weight_map |= dict.fromkeys(tensors, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "target_modules": [f"w{i}" for i in range(weights)]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    pairs = {}
    for name in weight_map:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        pairs |= {f"{key}.lora_A.weight": torch.randn(4, k), f"{key}.lora_B.weight": torch.randn(n, 4)}
    safetensors_torch.save_file(pairs, adapter / "adapter_model.safetensors")

    code = textwrap.dedent(
        """
        import re, sys, threading, time, torch, safetensors.torch
        from fastlora.merge import merge_folders

        def resident():
            return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])

        def watch():
            while not done:
                seen.append(resident())
                time.sleep(0.001)

        torch.set_num_threads(1)
        a = torch.randn(64, 64)
        torch.addmm(a, a, a)  # what the BLAS needs for itself
        seen, done = [before := resident()], False
        thread = threading.Thread(target=watch)
        thread.start()
        report = merge_folders(*sys.argv[1:])
        done = True
        thread.join()
        print(len(report.layers), max(seen) - before)
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(base), str(adapter), str(tmp_path / "out")], cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    merged, grown_kib = map(int, done.stdout.split())
    shard_kib = weights * n * k * 2 // 1024
    assert merged == shards * weights
    adapter_kib = (adapter / "adapter_model.safetensors").stat().st_size // 1024
    assert shard_kib // weights < grown_kib - adapter_kib < shard_kib
