"""Trains LoRA on several ranks, and checks the result against one process on the same global batch.

    torchrun --nproc-per-node 2 examples/distributed.py --engine ddp fsdp2 tp
    accelerate launch --num_processes 2 examples/distributed.py --engine accelerate

A small decoder learns Python's own sources: on GPUs over NCCL where there is one for each rank, else on the CPU over
gloo. Ends with an error status if any rank disagrees.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import corpus
import torch
import torch.distributed as dist
import torch.nn.functional as F
from decoder import Decoder, Shape
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fastlora import LoRALinear
from fastlora.parallel import ColwiseParallel, RowwiseParallel

SHAPE = Shape(width=64, layers=2, heads=4, kv_heads=2, hidden=160)
CONTEXT = 64
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# What different orders of float32 sums may make of an adapter, relative to how far it has moved.
TOLERANCE = 1e-3


def lora_model(device: torch.device) -> Decoder:
    """The decoder with LoRA in every block, the same on every rank. The layers are replaced before any wrapping."""
    torch.manual_seed(0)
    model = Decoder(SHAPE).requires_grad_(False)
    for block in model.blocks:
        for parent in block.children():
            for name, linear in list(parent.named_children()):
                if name in TARGETS and isinstance(linear, nn.Linear):
                    setattr(parent, name, LoRALinear.from_linear(linear, r=8, lora_alpha=16))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):  # B starts at zero; anything else here makes the comparison stricter
            nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def with_ddp(model: Decoder, mesh: DeviceMesh) -> nn.Module:
    """Every rank holds the model and takes a part of the batch; gradients of the adapters are averaged."""
    return DistributedDataParallel(model)


def with_fsdp2(model: Decoder, mesh: DeviceMesh) -> nn.Module:
    """Every rank holds a part of each weight; a block's are gathered for its forward and backward."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def with_tp(model: Decoder, mesh: DeviceMesh) -> nn.Module:
    """Every rank holds some heads and some of the hidden units, adapters included, and takes the whole batch."""
    columns = dict.fromkeys(("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"))
    for block in model.blocks:
        plan = {name: ColwiseParallel() for name in columns}
        parallelize_module(block, mesh, {**plan, "attention.o": RowwiseParallel(), "mlp.down": RowwiseParallel()})
    return model


def with_accelerate(model: Decoder, mesh: DeviceMesh) -> nn.Module:
    """Whatever ``accelerate config`` or the launcher's flags ask for; by default DDP."""
    from accelerate import Accelerator

    wrapped: nn.Module = Accelerator(cpu=mesh.device_type == "cpu").prepare(model)
    return wrapped


ENGINES: dict[str, Callable[[Decoder, DeviceMesh], nn.Module]] = {
    "ddp": with_ddp,
    "fsdp2": with_fsdp2,
    "tp": with_tp,
    "accelerate": with_accelerate,
}


def train(model: nn.Module, batches: Iterator[Tensor], lr: float = 3e-3) -> list[float]:
    """The loss of every step, on this rank's part of the batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for tokens in batches:
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, gathered, under the names they have without a wrapper."""
    trained = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest difference of an adapter, as a root mean square relative to how far it has moved."""
    assert found.keys() == expected.keys()
    distances = [(found[name] - expected[name]).norm() / (expected[name] - start[name]).norm() for name in expected]
    return float(torch.stack(distances).max())


def check(engine: str, mesh: DeviceMesh, steps: int, batch: int) -> bool:
    """Trains with the engine and alone, and prints what differs; True where all ranks agree."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device(mesh.device_type, int(os.environ["LOCAL_RANK"]) if mesh.device_type == "cuda" else 0)
    text = corpus.python_sources(CONTEXT).to(device)

    def batches() -> Iterator[Tensor]:
        return text.batches(CONTEXT, batch, steps, seed=1)

    alone = lora_model(device)
    start = {name: tensor.clone() for name, tensor in adapters(alone).items()}
    losses = torch.tensor(train(alone, batches()))

    model = ENGINES[engine](lora_model(device), mesh)
    if engine == "tp":
        found = torch.tensor(train(model, batches()), device=device)
    else:  # data parallel: each rank its part, and the mean of the parts' losses is the whole batch's
        found = torch.tensor(train(model, (whole.chunk(ranks)[rank] for whole in batches())), device=device)
    dist.all_reduce(found)
    found = found.cpu() / ranks
    worst = torch.tensor(largest_difference(adapters(model), adapters(alone), start), device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    agree = worst.item() <= TOLERANCE and torch.allclose(found, losses, rtol=1e-4)
    if rank == 0:
        print(
            f"{engine}: {ranks} ranks {'agree' if agree else 'DISAGREE'} with one process after {steps} steps of "
            f"{batch} x {CONTEXT} bytes: loss {found[0]:.4f} -> {found[-1]:.4f}, alone {losses[0]:.4f} -> "
            f"{losses[-1]:.4f}; adapters within {worst.item():.1e} of their movement",
            flush=True,
        )
    return agree


def main() -> int:
    """Runs the engines named on the command line; 1 if one disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=["ddp"], help="how the ranks work together")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="of all ranks together")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 or accelerate launch --num_processes 2")
    ranks, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if options.batch % ranks:
        parser.error(f"--batch {options.batch} must be a multiple of the {ranks} ranks")
    if "tp" in options.engine and SHAPE.kv_heads % ranks:
        parser.error(f"--engine tp splits {SHAPE.kv_heads} key heads: {ranks} ranks must divide them")

    gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        mesh = init_device_mesh("cuda" if gpus else "cpu", (ranks,))
        verdicts = [check(engine, mesh, options.steps, options.batch) for engine in options.engine]
        return 0 if all(verdicts) else 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Without taking the interpreter down: a thread of gloo's that still lets go of its last tensors would abort the
    # process then (pytorch issue 179291).
    os._exit(status)
