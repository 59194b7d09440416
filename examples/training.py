"""The training loop: loss, one step of one model, several models in turn, and what they cost."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from decoder import Decoder
from torch import Tensor
from torch.autograd.profiler import profile

WARMUP_STEPS = 3


def logits_of(model: Decoder, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens [B, T] -> logits [B, T, 256], under autocast where ``dtype`` is bfloat16."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        logits: Tensor = model(tokens)
    return logits


def loss_of(model: Decoder, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy of the next bytes of tokens [B, T + 1], in nats."""
    logits = logits_of(model, tokens[:, :-1], dtype)
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Decoder, batches: Iterable[Tensor], dtype: torch.dtype) -> float:
    """The mean loss over batches that training never sees."""
    model.eval()
    loss = statistics.fmean(loss_of(model, tokens, dtype).item() for tokens in batches)
    model.train()
    return loss


@dataclass
class Run:
    """A model in training, and what was seen of it."""

    name: str
    model: Decoder
    lr: float
    steps: int
    dtype: torch.dtype
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens_per_step: int = 0
    peak_bytes: int | None = None

    def __post_init__(self) -> None:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trainable)
        self.optimizer = torch.optim.AdamW(trainable, lr=self.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / 10, 1 - step / self.steps)
        )

    def step(self, tokens: Tensor) -> None:
        """One step of training. Reading the loss waits for the device, so the clock holds the whole step."""
        start = time.perf_counter()
        loss = loss_of(self.model, tokens, self.dtype)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.tokens_per_step = tokens[:, 1:].numel()
        self.schedule.step()

    @property
    def timed(self) -> list[float]:
        """Seconds of the steps after the warm-up."""
        return self.seconds[WARMUP_STEPS:]

    def throughput(self, last: int = 0) -> float:
        """Tokens a second at the median of the last steps, of all timed ones by default."""
        return self.tokens_per_step / statistics.median(self.seconds[-last:] if last else self.timed)

    def own_bytes(self) -> int:
        """What the run holds between steps: weights and optimizer state."""
        states = (t for state in self.optimizer.state.values() for t in state.values())
        return sum(t.nbytes for t in (*self.model.state_dict().values(), *states))


def train(runs: list[Run], batches: Iterable[Tensor]) -> None:
    """Trains the runs in turn on the same batches, and prints each run's loss and speed as they go."""
    steps = runs[0].steps
    for step, tokens in enumerate(batches, start=1):
        for run in runs:
            with peak_memory(run, tokens.device) if step == WARMUP_STEPS else contextlib.nullcontext():
                run.step(tokens)
        if step == 1 or step == steps or step % max(1, steps // 6) == 0:
            columns = (f"{run.name} {run.losses[-1]:.4f} {run.throughput(last=10):>9,.0f}/s" for run in runs)
            print(f"  step {step:>4}/{steps}   " + "   ".join(columns), flush=True)


@contextlib.contextmanager
def peak_memory(run: Run, device: torch.device) -> Iterator[None]:
    """Notes a run's peak memory over one step: what the run holds, and on top the most that the step had allocated.

    The latter comes from the allocator: CUDA's own peak counter, or on a CPU every allocation and release as torch's
    profiler records them. So the models of the other runs do not count. Elsewhere the peak stays unknown.
    """
    on_top = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        on_top = torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler talks on stderr
        with profile(profile_memory=True) as profiled:
            yield
        live = on_top = 0
        for event in sorted(profiled.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                on_top = max(on_top, live)
    else:
        yield
    run.peak_bytes = None if on_top is None else run.own_bytes() + on_top
