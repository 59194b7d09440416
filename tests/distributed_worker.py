"""What two ranks check together, each against one process; test_distributed.py starts it under torchrun.

    torchrun --nproc-per-node 2 tests/distributed_worker.py FOLDER

Every rank writes FOLDER/RANK.json: for each check "ok" or what went wrong.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import importlib.util
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from decoder import Decoder, Shape  # noqa: E402

import fastlora  # noqa: E402
import fastlora.loralib  # noqa: E402
from fastlora import LoRALinear, lora_linear  # noqa: E402
from fastlora.accuracy import assert_close_to_oracle  # noqa: E402
from fastlora.adapters import folder as folders  # noqa: E402
from fastlora.adapters import saving  # noqa: E402
from fastlora.ops import dtensor  # noqa: E402
from fastlora.parallel import ColwiseParallel, RowwiseParallel  # noqa: E402
from tests.cases import OpLog, gradient_of  # noqa: E402

SHAPE = Shape(width=48, layers=2, heads=4, kv_heads=2, hidden=80)
RANKS, BATCH, LENGTH, STEPS = 2, 8, 11, 4
FUSED = ["fastlora::lora_matmul", "fastlora::rank_grad"]
GROUPS = [("q", "k", "v"), ("gate", "up")]

Check = Callable[[DeviceMesh], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """A check of its own name."""
    CHECKS[function.__name__] = function
    return function


def raises(message: str, function: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError), match=re.escape(message)):
        function()


# Whole models


def projections(model: Decoder) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for block in model.blocks:
        for parent in (block.attention, block.mlp):
            for name, child in list(parent.named_children()):
                yield parent, name, child


def with_layers(model: Decoder) -> None:
    model.requires_grad_(False)
    for parent, name, linear in projections(model):
        setattr(parent, name, LoRALinear.from_linear(linear, r=6, lora_alpha=10))


def injected(model: Decoder) -> None:
    report = fastlora.inject(model, "all-linear", r=6, lora_alpha=10, exclude_modules=["head"], groups=GROUPS)
    assert len(report.groups) == 2 * SHAPE.layers


def with_loralib(model: Decoder) -> None:
    for parent, name, linear in projections(model):
        layer = fastlora.loralib.Linear(linear.in_features, linear.out_features, r=6, lora_alpha=10, bias=False)
        layer.load_state_dict(linear.state_dict(), strict=False)
        setattr(parent, name, layer)
    fastlora.loralib.mark_only_lora_as_trainable(model)


def with_patched_peft(model: Decoder) -> None:
    peft = importlib.import_module("peft")
    names = ["q", "k", "v", "o", "gate", "up", "down"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=6, lora_alpha=10, target_modules=names), model)
    report = fastlora.patch_peft(model, groups=GROUPS)
    assert len(report.patched) == 7 * SHAPE.layers
    assert len(report.groups) == 2 * SHAPE.layers


KINDS: dict[str, Callable[[Decoder], None]] = {"layers": with_layers, "injected": injected, "loralib": with_loralib}
# Tensor parallelism of PEFT's layers is PEFT's and transformers' own business, so these are not in KINDS.
DATA_KINDS = KINDS | ({"patched_peft": with_patched_peft} if importlib.util.find_spec("peft") else {})


def decoder(kind: str = "layers") -> Decoder:
    """The same on every rank, with an update that is not zero."""
    torch.manual_seed(3)
    model = Decoder(SHAPE)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    DATA_KINDS[kind](model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        yield torch.randint(256, (BATCH, LENGTH), generator=generator)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def trained(
    model: nn.Module, part: Callable[[Tensor], Tensor] = lambda tokens: tokens, accumulated: int = 1
) -> dict[str, Tensor]:
    """Logits and gradients of the first step, and the adapters after the last; ``part`` is this rank's share.

    The gradients of so many pieces of it are accumulated, and those of the last piece bring the ranks together.
    """
    parameters = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.3, momentum=0.9)
    found: dict[str, Tensor] = {}
    for tokens in map(part, batches()):
        outputs = []
        for i, piece in enumerate(tokens.chunk(accumulated)):
            with contextlib.nullcontext() if i == accumulated - 1 else model.no_sync():
                logits = model(piece)
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), piece[:, 1:].flatten())
                (loss / accumulated).backward()
            outputs.append(logits.detach())
        if not found:
            found["logits"] = torch.cat(outputs)
            found |= {f"gradient of {name}": whole(p.grad).clone() for name, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: whole(p.detach()) for name, p in parameters.items()}


def share(tensor: Tensor) -> Tensor:
    return tensor.chunk(RANKS)[dist.get_rank()]


def assert_as_alone(
    found: dict[str, Tensor], kind: str, split: bool, baseline: dict[str, Tensor] | None = None
) -> None:
    """By the one error rule: the oracle is one process in float64, the baseline one in float32."""
    oracle = trained(decoder(kind).double())
    baseline = trained(decoder(kind)) if baseline is None else baseline
    if split:
        oracle, baseline = ({**each, "logits": share(each["logits"])} for each in (oracle, baseline))
    assert set(found) == set(oracle) == set(baseline), set(found) ^ set(oracle)
    assert len(found) == 1 + 2 * 2 * 7 * SHAPE.layers
    for name, tensor in found.items():
        assert_close_to_oracle(tensor, oracle=oracle[name], baseline=baseline[name], name=name)


def fully_sharded(model: Decoder, mesh: DeviceMesh, **options: Any) -> Decoder:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def tensor_parallel(model: Decoder, mesh: DeviceMesh, styles: Any = None) -> Decoder:
    columns, rows = styles or (ColwiseParallel, RowwiseParallel)
    plan = {f"attention.{name}": columns for name in "qkv"} | {"attention.o": rows}
    plan |= {"mlp.gate": columns, "mlp.up": columns, "mlp.down": rows}
    for block in model.blocks:
        torch_parallel.parallelize_module(block, mesh, {name: style() for name, style in plan.items()})
    return model


@check
def ddp(mesh: DeviceMesh) -> None:
    for kind in DATA_KINDS:
        assert_as_alone(trained(DistributedDataParallel(decoder(kind)), share), kind, split=True)


@check
def ddp_that_accumulates(mesh: DeviceMesh) -> None:
    for kind in DATA_KINDS:
        assert_as_alone(trained(DistributedDataParallel(decoder(kind)), share, accumulated=2), kind, split=True)


@check
def fsdp2(mesh: DeviceMesh) -> None:
    for kind in DATA_KINDS:
        model = fully_sharded(decoder(kind), mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        with OpLog() as log:
            found = trained(model, share)
        assert log.count(FUSED[:1]) == {FUSED[0]: 2 * 7 * SHAPE.layers * STEPS}
        assert_as_alone(found, kind, split=True)


@check
def adapters_in_fsdp_groups_of_their_own_run_in_peft(mesh: DeviceMesh) -> None:
    if "patched_peft" not in DATA_KINDS:
        return
    model = decoder("patched_peft")
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            fully_shard(module, mesh=mesh)
    model = fully_sharded(model, mesh)
    with Heard() as heard, OpLog() as log:
        found = trained(model, share)
    assert log.count(FUSED) == dict.fromkeys(FUSED, 0)
    assert any("lora_A has hooks" in message for message in heard.messages), heard.messages
    assert_as_alone(found, "patched_peft", split=True)


@check
def fsdp2_in_bf16(mesh: DeviceMesh) -> None:
    # The baseline does in one process what the policy asks for: bfloat16 copies for each half of the batch, gradients
    # averaged in float32.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = trained(fully_sharded(decoder(), mesh, mp_policy=policy), share)
    model = decoder()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.3, momentum=0.9)
    expected: dict[str, Tensor] = {}
    for tokens in batches():
        low = copy.deepcopy(model).bfloat16()
        halves = []
        for half in tokens.chunk(RANKS):
            logits = low(half)
            F.cross_entropy(logits[:, :-1].flatten(0, 1), half[:, 1:].flatten()).backward()
            gradients = {name: p.grad.float() / RANKS for name, p in low.named_parameters() if p.requires_grad}
            halves.append((logits.detach(), gradients))
            low.zero_grad()
        for name, p in parameters.items():
            p.grad = halves[0][1][name] + halves[1][1][name]
        if not expected:
            expected["logits"] = torch.cat([logits for logits, _ in halves])
            expected |= {f"gradient of {name}": p.grad.clone() for name, p in parameters.items()}
        optimizer.step()
    assert_as_alone(found, "layers", split=True, baseline=expected | {n: p.detach() for n, p in parameters.items()})


@check
def fsdp1(mesh: DeviceMesh) -> None:
    model = decoder()
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    for i, block in enumerate(model.blocks):
        model.blocks[i] = FullyShardedDataParallel(block, **options)
    model = FullyShardedDataParallel(model, **options)
    parameters = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.3, momentum=0.9)
    for tokens in map(share, batches()):
        logits = model(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    block = model.module.blocks[0].module
    raises("under FSDP1 or DeepSpeed ZeRO-3", lambda: block.attention.q(torch.randn(3, SHAPE.width)))
    raises("weight belongs to FSDP", block.attention.q.merge)
    oracle, baseline = trained(decoder().double()), trained(decoder())
    with FullyShardedDataParallel.summon_full_params(model):
        for name, p in model.named_parameters():
            if (name := plain_name(name)) in parameters:
                actual = p.detach().clone()
                assert_close_to_oracle(actual, oracle=oracle[name], baseline=baseline[name], name=name)


@check
def tp(mesh: DeviceMesh) -> None:
    for kind in KINDS:
        model = tensor_parallel(decoder(kind), mesh)
        shapes = {p.to_local().shape for n, p in model.named_parameters() if "lora_A" in n and isinstance(p, DTensor)}
        assert shapes == {(6, 48), (6, 24), (6, 40)}  # whole; o and down sharded
        with OpLog() as log:
            found = trained(model)
        assert log.count(FUSED[:1]) == {FUSED[0]: 2 * 7 * SHAPE.layers * STEPS}
        assert_as_alone(found, kind, split=False)


@check
def tp_clips_the_gradients_of_the_whole_model(mesh: DeviceMesh) -> None:
    norms = []
    for model in (decoder(), tensor_parallel(decoder(), mesh)):
        logits = model(next(batches()))
        logits.square().mean().backward()
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
        norms.append(whole(norm))
        for name, p in model.named_parameters():
            if isinstance(p, DTensor) and p.grad is not None:
                assert p.grad.placements == p.placements, name
    torch.testing.assert_close(norms[0], norms[1])


@check
def torchs_own_tp_styles_on_loralib_layers(mesh: DeviceMesh) -> None:
    model = tensor_parallel(decoder("loralib"), mesh, (torch_parallel.ColwiseParallel, torch_parallel.RowwiseParallel))
    with Heard() as heard:
        found = trained(model)
    assert_as_alone(found, "loralib", split=False)
    assert heard.messages
    assert len(heard.messages) == len(set(heard.messages))  # each reason once
    assert all("plain DTensor operators, not fused" in message for message in heard.messages)


@check
def fsdp2_with_tp(mesh: DeviceMesh) -> None:
    # Two ranks: a tensor-parallel group of two in a data-parallel group of one, on one mesh of two dimensions.
    grid = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    model = fully_sharded(tensor_parallel(decoder(), grid["tp"]), grid["dp"])
    with OpLog() as log:
        found = trained(model)
    assert log.count(FUSED[:1]) == {FUSED[0]: 2 * 7 * SHAPE.layers * STEPS}
    assert_as_alone(found, "layers", split=False)


@check
def adapters_are_switched_through_every_wrapper(mesh: DeviceMesh) -> None:
    tokens, alone = next(batches()), decoder("injected").double()
    with_adapter = alone(tokens)
    fastlora.set_adapter(alone, None)
    base = alone(tokens)
    assert (with_adapter - base).abs().max() > 0.1
    for wrap in (lambda model, _: DistributedDataParallel(model), fully_sharded, tensor_parallel):
        model = wrap(decoder("injected").double(), mesh)

        def expect(expected: Tensor, model: nn.Module = model) -> None:
            torch.testing.assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)

        expect(with_adapter)
        with fastlora.disable(model):
            expect(base)
        expect(with_adapter)
        fastlora.set_adapter(model, None)
        expect(base)
        fastlora.set_adapter(model, "default")
        expect(with_adapter)


@check
def sharded_models_keep_out_of_merging(mesh: DeviceMesh) -> None:
    for wrap in (fully_sharded, tensor_parallel):
        for kind in ("layers", "injected"):
            model = wrap(decoder(kind), mesh)
            expected = model(next(batches()))
            layer = model.blocks[0].attention.q
            raises("weight belongs to", layer.merge)
            if kind == "injected":
                raises("weight belongs to", lambda model=model: fastlora.merge_adapter(model))
            assert not layer.merged
            assert torch.equal(model(next(batches())), expected)


@check
def loralib_layers_stay_unmerged_and_right(mesh: DeviceMesh) -> None:
    styles = (torch_parallel.ColwiseParallel, torch_parallel.RowwiseParallel)
    for wrap in (fully_sharded, lambda model, mesh: tensor_parallel(model, mesh, styles)):
        # In float64: what float32 loses on the way through a model is chance.
        alone, model = decoder("loralib").double().eval(), wrap(decoder("loralib").double(), mesh).eval()
        tokens = next(batches())
        assert alone.blocks[0].attention.q.merged
        assert not model.blocks[0].attention.q.merged
        torch.testing.assert_close(model(tokens), alone(tokens), rtol=1e-9, atol=1e-9)
        assert model.train() is model


@check
def a_root_that_keeps_its_weights_gathered_does_not_merge(mesh: DeviceMesh) -> None:
    model = nn.Sequential(LoRALinear(48, 30, r=6))
    nn.init.normal_(model[0].lora_B)
    fully_shard(model, mesh=mesh)
    model(torch.randn(3, 48))
    assert type(model[0].weight) is nn.Parameter
    raises("weight belongs to FSDP", model[0].merge)


@check
def gathered_state_dicts_load_into_one_process(mesh: DeviceMesh) -> None:
    for kind in ("layers", "injected"):
        expected = decoder(kind).state_dict()
        for wrap in (fully_sharded, tensor_parallel):
            state = get_model_state_dict(wrap(decoder(kind), mesh), options=StateDictOptions(full_state_dict=True))
            assert set(state) == set(expected)
            assert all(torch.equal(state[name], expected[name]) for name in state)


FILES = ("adapter_config.json", "adapter_model.safetensors")


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder that all ranks know; a block ends on all of them before it is gone."""
    with tempfile.TemporaryDirectory() as mine:
        names = [mine]
        dist.broadcast_object_list(names)
        yield Path(names[0])
        dist.barrier()


def assert_same_files(one: Path, other: Path) -> None:
    """The two files of an adapter are there, as soon as a rank returns, and equal to the byte."""
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    dist.barrier()


def one_step(model: nn.Module, tokens: Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(tokens).square().mean().backward()
    torch.optim.SGD(parameters, lr=0.3).step()


SHARDED = {
    "fsdp2": fully_sharded,
    "tp": tensor_parallel,
    "fsdp2 in bf16": lambda model, mesh: fully_sharded(
        model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    ),
    "root alone": lambda model, mesh: fully_shard(model, mesh=mesh),
    "fsdp2 over tp": lambda model, mesh: over_tp(model),
}


def over_tp(model: Decoder) -> Decoder:
    grid = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    return fully_sharded(tensor_parallel(model, grid["tp"]), grid["dp"])


@check
def a_sharded_adapter_is_saved_whole(mesh: DeviceMesh) -> None:
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            fastlora.save_adapter(decoder("injected"), folder / "alone")
        for kind, wrap in SHARDED.items():
            model = wrap(decoder("injected"), mesh)
            fastlora.save_adapter(model, folder / kind)
            assert_same_files(folder / kind, folder / "alone")
            gradients = []
            for name in ("", kind):
                y = model(next(batches()))  # a root keeps its weights gathered, in the policy's dtype
                if name:
                    fastlora.save_adapter(model, folder / name)
                    assert_same_files(folder / name, folder / "alone")
                y.square().mean().backward()
                gradients.append([whole(p.grad) for p in model.parameters() if p.requires_grad])
                model.zero_grad()
            assert all(map(torch.equal, *gradients))  # between forward and backward too

            one_step(model, next(batches()))
            expected = {name: whole(p.detach()) for name, p in model.named_parameters() if "lora_" in name}
            fastlora.save_adapter(model, folder / kind)
            assert (folder / kind / FILES[1]).read_bytes() != (folder / "alone" / FILES[1]).read_bytes()
            alone = decoder("injected")
            fastlora.load_adapter(alone, folder / kind)
            found = {name: p for name, p in alone.named_parameters() if "lora_" in name}
            assert set(found) == set(expected)
            assert all(torch.equal(found[name], expected[name]) for name in found)
            again = folder / f"{kind}, loaded by {dist.get_rank()}"
            fastlora.save_adapter(alone, again)
            assert_same_files(again, folder / kind)
            one_step(model, next(batches()))  # training goes on


@check
def what_keeps_one_rank_from_saving_is_said_on_all(mesh: DeviceMesh) -> None:
    rank, model = dist.get_rank(), fully_sharded(decoder("injected"), mesh)

    def fails(path: Path, at: int, error: type[Exception], message: str) -> None:
        expected: Any = (error, message) if rank == at else (RuntimeError, f"rank {at}: {error.__name__}: .*{message}")
        with pytest.raises(expected[0], match=expected[1]):
            fastlora.save_adapter(model, path)

    with shared_folder() as folder:
        fastlora.save_adapter(model, folder / "adapter")
        before = (folder / "adapter" / FILES[1]).read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(saving._Part, "whole", lambda part, tensor: 1 // 0)
            fails(folder / "adapter", 1, ZeroDivisionError, "by zero")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "_replace_files", full_disk)
            fails(folder / "adapter", 0, OSError, "No space left")
        (folder / f"file{rank}").write_text("")
        dist.barrier()
        fails(folder / "file1", 0, NotADirectoryError, "got the file")

        # One value on one rank: both have it in the whole tensor.
        local = model.blocks[1].attention.k.lora_B["default"].detach().to_local()
        kept = local.clone()
        if rank == 1:
            local[0, 0] = float("nan")
        words = "blocks.1.attention.k.lora_B holds values that are not finite"
        with pytest.raises(ValueError, match=words):
            fastlora.save_adapter(model, folder / "adapter")
        local.copy_(kept)
        assert (folder / "adapter" / FILES[1]).read_bytes() == before
        fastlora.save_adapter(model, folder / "other")
        assert_same_files(folder / "adapter", folder / "other")


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@check
def nothing_is_loaded_into_a_sharded_model(mesh: DeviceMesh) -> None:
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            fastlora.save_adapter(decoder("injected"), folder)
        dist.barrier()
        for wrap, owner in (
            (fully_sharded, "FSDP, which keeps the weights itself"),
            (tensor_parallel, "a device mesh"),
        ):
            model = wrap(decoder("injected"), mesh)
            raises(f"belongs to {owner}", lambda model=model: fastlora.load_adapter(model, folder))
            for act in (
                lambda m: fastlora.load_adapter(m, folder, "other"),
                lambda m: fastlora.inject(m, ["q"], 2, adapter_name="other"),
            ):
                raises(f"its weight belongs to {owner}", lambda model=model, act=act: act(model))
            assert list(model._fastlora.configs) == ["default"]
    bare = nn.Sequential(nn.Linear(12, 10))
    fully_shard(bare, mesh=mesh)
    bare(torch.randn(3, 12))
    raises("its weight belongs to FSDP", lambda: fastlora.inject(bare, ["0"]))


# One layer


class Operands(NamedTuple):
    """x [..., 67], weight [45, 67], lora_a [5, 67], lora_b [45, 5], bias [45]: nothing divides by two."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None

    @staticmethod
    def make(lead: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float32) -> Operands:
        generator = torch.Generator().manual_seed(5)
        shapes: list[Any] = [(*lead, 67), (45, 67), (5, 67), (45, 5), (45,)]
        made: list[Any] = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        for t in made[1:4]:
            t *= t.shape[1] ** -0.5
        return Operands(*made[:4], made[4] if bias else None)

    def placed(self, mesh: DeviceMesh, placements: Any) -> Operands:
        pairs = zip(self, placements, strict=True)
        return Operands(
            *(None if t is None else distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in pairs)  # type: ignore
        )

    def leaves(self, dtype: torch.dtype | None = None) -> Operands:
        return Operands(*(None if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in self))

    def product(self, **options: Any) -> Tensor:
        return lora_linear(*self[:4], bias=self.bias, scale=1.7, **options)

    def product_in_parts(self, plan: str) -> Tensor:
        """In plain torch and one process, part by part as the ranks have them."""
        x, w, a, b, bias = self
        assert bias is not None
        parts = [(x, w, a, b, bias)]
        if plan == "columns":
            parts = [(x, *part[:1], a, *part[1:]) for part in zip(*(t.chunk(RANKS) for t in (w, b, bias)), strict=True)]
        elif plan == "rows":
            halves = zip(*(t.chunk(RANKS, dim=-1) for t in (x, w, a)), strict=True)
            parts = [(*part, b, bias / RANKS) for part in halves]
        made = [
            F.linear(x, w, bias) + F.linear(1.7 * F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            for x, w, a, b, bias in parts
        ]
        return torch.cat(made, dim=-1) if plan == "columns" else sum(made[1:], made[0])

    def step(self, product: Callable[..., Tensor] | None = None, **options: Any) -> dict[str, Tensor]:
        """y and every gradient, gathered; gradients lie where their tensors do."""
        y = self.product(**options) if product is None else product(self)
        dy = gradient_of(whole(y.detach()).float()).to(y.dtype)
        whole(y).backward(dy)
        found = {"y": whole(y.detach())}
        for name, t in self._asdict().items():
            if t is not None:
                if isinstance(t, DTensor) and name != "x":
                    assert t.grad.placements == t.placements, (name, t.grad.placements, t.placements)
                found[name] = whole(t.grad)
        return found


def plans(x_dim: int) -> dict[str, tuple[Any, ...]]:
    """By placement of x, weight, lora_a, lora_b, bias."""
    return {
        "columns": (Replicate(), Shard(0), Replicate(), Shard(0), Shard(0)),
        "rows": (Shard(x_dim - 1), Shard(1), Shard(1), Replicate(), Replicate()),
        "whole": (Replicate(),) * 5,
        "data": (Shard(0), *[Replicate()] * 4),
        "first": (Replicate(), *[Shard(0)] * 4),
        "rows_whole_adapter": (Shard(x_dim - 1), Shard(1), *[Replicate()] * 3),
        "crossed": (Shard(0), Shard(1), Shard(0), Shard(1), Replicate()),
    }


@check
def every_placement_is_right_and_the_two_plans_are_fused(mesh: DeviceMesh) -> None:
    for lead in ((34,), (4, 9), (2, 3, 6), ()):
        for bias in (True, False):
            operands = Operands.make(lead, bias)
            oracle, baseline = operands.leaves(torch.float64).step(), operands.leaves().step()
            for name, placements in plans(len(lead) + 1).items():
                if not lead and name in {"data", "crossed"}:
                    continue  # no rows to shard
                with OpLog() as log:
                    found = operands.placed(mesh, placements).step()
                fused = log.count(FUSED) == {FUSED[0]: 2, FUSED[1]: 2}
                assert fused == (name in {"columns", "rows"}), name
                for key, tensor in found.items():
                    where = f"{name} {lead} {key}"
                    if lead:
                        assert_close_to_oracle(tensor, oracle=oracle[key], baseline=baseline[key], name=where)
                    else:  # one row: the baseline is no yardstick
                        torch.testing.assert_close(tensor, baseline[key], rtol=1e-5, atol=1e-4)


@check
def no_gradient_is_made_that_nobody_asks_for(mesh: DeviceMesh) -> None:
    operands = Operands.make((4, 9), True)
    for name in ("columns", "rows"):
        placed = operands.placed(mesh, plans(3)[name])
        for t in (placed.x, placed.weight, placed.bias):
            t.requires_grad_(False)
        y = placed.product()
        whole(y).sum().backward()
        assert placed.x.grad is placed.weight.grad is placed.bias.grad is None
        assert placed.lora_a.grad.placements == placed.lora_a.placements
        with torch.no_grad():
            assert torch.equal(whole(placed.product()), whole(y))


@check
def partial_gradients_of_a_partial_output_are_summed(mesh: DeviceMesh) -> None:
    operands = Operands.make((7,), True)
    expected = operands.leaves()
    (3 * expected.product()).sum().backward()
    placed = operands.placed(mesh, plans(2)["rows"])
    y = placed.product()
    assert y.placements == (Partial(),)
    gradient = DTensor.from_local(torch.full((7, 45), 1.5), mesh, [Partial()], run_check=False)  # two halves of 3
    y.backward(gradient)
    for name, t in expected._asdict().items():
        torch.testing.assert_close(whole(getattr(placed, name).grad), t.grad, msg=name)


@check
def half_precision_and_autocast(mesh: DeviceMesh) -> None:
    for name in ("columns", "rows", "whole"):
        half = Operands.make((4, 9), True, torch.bfloat16)
        wide = half._replace(lora_a=half.lora_a.float(), lora_b=half.lora_b.float())
        for operands in (half, wide):
            oracle = operands.leaves(torch.float64).step()
            baseline = operands.leaves().step(lambda o, name=name: o.product_in_parts(name))
            for key, tensor in operands.placed(mesh, plans(3)[name]).step().items():
                assert_close_to_oracle(tensor, oracle=oracle[key], baseline=baseline[key], name=f"{name} {key}")
        operands = Operands.make((4, 9), True)
        with torch.autocast("cpu", torch.bfloat16):
            y = operands.product()
            placed = operands.placed(mesh, plans(3)[name])
            found = placed.product()
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(whole(found), y, rtol=0.02, atol=0.02)


@check
def dropout_by_columns_and_by_formula_is_that_of_one_process(mesh: DeviceMesh) -> None:
    operands = Operands.make((4, 9), True, torch.float64)
    torch.manual_seed(6)
    expected = operands.leaves().step(dropout_p=0.4)
    for name in ("columns", "whole", "data", "first", "crossed", "rows_whole_adapter"):
        torch.manual_seed(6)
        found = operands.placed(mesh, plans(3)[name]).step(dropout_p=0.4)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], msg=lambda text, at=f"{name} {key}": f"{at}: {text}")


@check
def dropout_by_rows_drops_differently_on_every_rank(mesh: DeviceMesh) -> None:
    k, p = 128, 0.3
    x = torch.randn(500, k)
    operands = Operands(x, torch.zeros(k, k), torch.eye(k), torch.eye(k), None).placed(mesh, plans(2)["rows"])
    torch.manual_seed(7)  # alike on all ranks
    y = lora_linear(*operands[:4], scale=0.5, dropout_p=p)
    kept = whole(y) != 0
    torch.testing.assert_close(whole(y)[kept], 0.5 * x[kept] / (1 - p), rtol=1e-4, atol=0)
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    left, right = kept.double().chunk(2, dim=1)
    both = (left * right).mean().item()
    assert abs(both - (1 - p) ** 2) < 5 * (0.25 / left.numel()) ** 0.5  # independent, not the same mask twice
    # The gradient uses each rank's own mask: y is linear in x.
    dy = gradient_of(whole(y.detach()))
    whole(y).backward(dy)
    torch.testing.assert_close((whole(operands.x.grad) * x).sum(), (dy * whole(y)).sum(), rtol=1e-4, atol=1e-3)


@check
def a_reason_is_logged_once(mesh: DeviceMesh) -> None:
    dtensor._say_once.cache_clear()
    operands = Operands.make((7,), True)
    with Heard() as heard:
        for _ in range(3):
            operands.placed(mesh, plans(2)["whole"]).step()
            operands.placed(mesh, plans(2)["columns"]).step()
    assert len(heard.messages) == 1, heard.messages
    assert "fastlora.parallel.ColwiseParallel" in heard.messages[0]


@check
def what_does_not_fit_together_is_refused_in_words(mesh: DeviceMesh) -> None:
    plain = Operands.make((7,), True)
    placed = plain.placed(mesh, plans(2)["columns"])
    mixed = "is a DTensor and"
    for i in range(5):
        operands = Operands(*placed[:i], plain[i], *placed[i + 1 :])
        raises(f"{mixed} {Operands._fields[i]} a plain tensor", lambda o=operands: o.leaves().step())
    raises("weight is a DTensor and x a plain tensor", lambda: Operands(plain.x, *placed[1:]).step())
    other = init_device_mesh("cpu", (1, RANKS))
    moved = placed._replace(weight=distribute_tensor(plain.weight, other, [Replicate(), Shard(0)]))
    raises("expected one", moved.step)
    raises("explain looks at one rank's share", lambda: fastlora.explain(*placed[:4], bias=placed.bias))
    raises("x has shape", lambda: lora_linear(placed.x, placed.weight.T, *placed[2:4], scale=1.7))

    model = nn.Sequential(LoRALinear(48, 30, r=6))
    fully_shard(model, mesh=mesh)
    raises("call the module that fully_shard wrapped", lambda: model[0](torch.randn(3, 48)))

    linear = torch_parallel.parallelize_module(nn.Linear(48, 30), mesh, torch_parallel.ColwiseParallel())
    raises("linear.weight is a DTensor", lambda: LoRALinear.from_linear(linear))
    merged = LoRALinear(48, 30).merge()
    for style in (ColwiseParallel(), RowwiseParallel()):
        raises("LoRALinear is merged", lambda s=style: torch_parallel.parallelize_module(merged, mesh, s))


@check
def styles_are_torchs_on_every_other_module(mesh: DeviceMesh) -> None:
    for ours, theirs in (
        (ColwiseParallel, torch_parallel.ColwiseParallel),
        (RowwiseParallel, torch_parallel.RowwiseParallel),
    ):
        outputs = []
        for style in (ours, theirs):
            torch.manual_seed(8)
            layer = torch_parallel.parallelize_module(nn.Linear(12, 10), mesh, style(input_layouts=Replicate()))
            outputs.append(layer(torch.ones(3, 12)))
        assert torch.equal(*outputs)


@check
def both_styles_shard_every_linear_layer(mesh: DeviceMesh) -> None:
    sizes: dict[str, Any] = {"in_features": 12, "out_features": 10, "r": 3}

    def injected_layer() -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 10))
        fastlora.inject(model, ["0"], r=3)
        return model[0]

    kinds: dict[str, Callable[[], Any]] = {
        "LoRALinear": lambda: LoRALinear(**sizes),
        "injected": injected_layer,
        "loralib.Linear": lambda: fastlora.loralib.Linear(**sizes),
        "turned": lambda: fastlora.loralib.Linear(**sizes, fan_in_fan_out=True),
        "MergedLinear": lambda: fastlora.loralib.MergedLinear(**sizes, enable_lora=[True, False]),
        "MergedLinear, turned": lambda: fastlora.loralib.MergedLinear(
            **sizes, enable_lora=[True, False], fan_in_fan_out=True
        ),
    }
    x = torch.randn(7, 12)
    for name, make in kinds.items():
        for style, dim in ((ColwiseParallel, 0), (RowwiseParallel, 1)):
            torch.manual_seed(8)
            alone = make()
            for key, parameter in alone.named_parameters():
                if "lora_" in key:
                    nn.init.normal_(parameter)
            layer = copy.deepcopy(alone)
            torch_parallel.parallelize_module(layer, mesh, style(input_layouts=Replicate(), output_layouts=Replicate()))
            found = {key.partition(".")[0]: p.placements for key, p in layer.named_parameters()}
            n, k = (Shard(0), Replicate()) if dim == 0 else (Replicate(), Shard(1))
            weight = Shard(1 - dim if layer.fan_in_fan_out else dim)
            assert found == {"weight": (weight,), "bias": (n,), "lora_A": (k,), "lora_B": (n,)}, name
            torch.testing.assert_close(layer(x), alone(x), msg=name)
    convolution = fastlora.loralib.Conv2d(4, 6, 3, r=2)
    for style in (ColwiseParallel(), RowwiseParallel()):
        with pytest.raises(NotImplementedError, match=r"only support nn\.Linear"):
            torch_parallel.parallelize_module(convolution, mesh, style)


@check
def the_pages_code_runs(mesh: DeviceMesh) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    sharding, parallel, saving_it, gathering = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    torch.manual_seed(3)
    names: dict[str, Any] = {"torch": torch, "model": Decoder(SHAPE), "device_type": "cpu", "ranks": RANKS}
    exec(compile(sharding, "docs/distributed.md", "exec"), names)
    names["model"](next(batches())).sum().backward()
    names["optimizer"].step()
    with shared_folder() as names["folder"]:
        exec(compile(saving_it, "docs/distributed.md", "exec"), names)
        assert all((names["folder"] / name).exists() for name in FILES)
    exec(compile(gathering, "docs/distributed.md", "exec"), names)
    if dist.get_rank() == 0:  # offloaded states are gathered there alone
        assert names["state"]["blocks.0.attention.q.lora_B.default"].ne(0).any()
    names["model"] = decoder().double()
    expected = names["model"](next(batches()))
    exec(compile(parallel, "docs/distributed.md", "exec"), names)
    torch.testing.assert_close(names["model"](next(batches())), expected, rtol=1e-9, atol=1e-9)


class Heard(logging.Handler):
    """What the logger "fastlora" says meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Heard:
        logging.getLogger("fastlora").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("fastlora").removeHandler(self)


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    verdicts = {}
    for name in names or CHECKS:
        torch.manual_seed(0)
        try:
            CHECKS[name](mesh)
            verdicts[name] = "ok"
        except BaseException:
            verdicts[name] = traceback.format_exc()
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(verdicts), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)  # as examples/distributed.py does, and why
