"""What the worker does: checks a kernel on a case, and times kernels at a size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..accuracy import reference_step
from ..backends import dispatch, reference
from ..backends.request import Kernel, Product, Request, new_middle
from ..clock import Clock, Hold, no_garbage_collection, shuffled
from ..error_rule import compare
from .plan import Case, Size

_SCALE, _DROPOUT = 1.7, 0.3
_SEED = (2**62 + 3, -5)

# Inputs are taken in turns, so that none lies in a cache because the call before read it.
_COPIES = 3
_WARM_UP, _MOST_ROUNDS, _LEAST_ROUNDS = 2, 60, 7

# A sample for which the host came too late is taken again, so many times.
_TRIES = 4


class Verdict(NamedTuple):
    """How a kernel did on a case: ``passed``, ``refused`` or ``failed``, and why."""

    outcome: str
    why: str = ""


def _normal(seed: int, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cpu") * std).to(dtype)


def _product(case: Case) -> tuple[Product, Tensor]:
    """The forward of a case and the gradient of its output, on the CPU."""
    dtype, adapter_dtype = getattr(torch, case.dtype), getattr(torch, case.adapter_dtype)
    m, k, n, r = case.m, case.k, case.n, case.r
    return Product(
        _normal(1, m, k, dtype=dtype),
        _normal(2, n, k, dtype=dtype, std=k**-0.5),
        _normal(3, r, k, dtype=adapter_dtype, std=k**-0.5),
        _normal(4, n, r, dtype=adapter_dtype, std=r**-0.5),
        _SCALE,
        _normal(5, n, dtype=dtype, std=0.5) if case.bias else None,
        _DROPOUT if case.dropout else 0.0,
        torch.tensor(_SEED, device="cpu") if case.dropout else None,
    ), _normal(6, m, n, dtype=dtype)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fills memory that nobody has written with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


Results = dict[str, Tensor]


@torch.no_grad()
def check(verb: str, kernel: Kernel, case: Case, device: torch.device) -> Verdict:
    """Holds what a kernel makes of a case to the oracle, and its bits to those of its first run."""
    p, dy = _product(case)
    there = p.map(lambda t: t.to(device))._replace(seed=None if p.seed is None else p.seed.to(device))
    dy_there = dy.to(device)
    baseline, oracle = _expected(p, dy), _expected(p.map(Tensor.double), dy.double())
    if verb == "rank_grad":
        # Of the middles that a lora_matmul would hand over, rounded to their dtype.
        z, t = (new_middle(there.x, case.r).copy_(baseline[name]) for name in ("z", "t"))
        oracle |= _grads(p.map(Tensor.double), dy.double(), baseline["z"].double(), baseline["t"].double())
        baseline |= _grads(p, dy, baseline["z"], baseline["t"])
        requests = [
            Request.of_rank_grad(t, there.x, there.a.dtype, case.dropout),
            Request.of_rank_grad(dy_there, z, there.b.dtype, False),
        ]

        def run() -> Results:
            da = kernel.run(t, there.x, dtype=there.a.dtype, dropout=there.mask_x)
            return {"da": da, "db": kernel.run(dy_there, z, dtype=there.b.dtype, dropout=None)}
    else:
        requests = [Request.of_lora_matmul(there), Request.of_lora_matmul(there.turned(dy_there))]

        def run() -> Results:
            y, z = kernel.run(there)
            dx, t = kernel.run(there.turned(dy_there))
            made = {"y": y, "z": z, "dx": dx, "t": t}
            if kernel.gradients is not None:
                fused = dict(zip(("dx", "da", "db"), kernel.gradients(there, dy_there, z), strict=True))
                made |= {f"{name} of gradients": tensor for name, tensor in fused.items()}
            return made

    if why := next(filter(None, map(kernel.refuses, requests)), None):
        return Verdict("refused", why)
    with _poisoned():
        first = run()
        for name, tensor in first.items():
            key = name.partition(" ")[0]
            errors = compare(tensor.cpu(), oracle=oracle[key], baseline=baseline[key])
            if not errors.ok:
                return Verdict("failed", f"{name}: {errors}")
        for i in range(1, case.repeats):
            for name, tensor in run().items():
                if not torch.equal(tensor, first[name]):
                    return Verdict("failed", f"{name} has other bits in run {i + 1}")
    return Verdict("passed")


def _expected(p: Product, dy: Tensor) -> Results:
    """All that a step makes, the middles among it."""
    z, t = reference.lora_matmul(p._replace(w=None))[1], reference.lora_matmul(p.turned(dy))[1]
    return {**reference_step(p, dy)._asdict(), "z": z, "t": t}


def _grads(p: Product, dy: Tensor, z: Tensor, t: Tensor) -> Results:
    return {
        "da": reference.rank_grad(t, p.x, dtype=p.a.dtype, dropout=p.mask_x),
        "db": reference.rank_grad(dy, z, dtype=p.b.dtype),
    }


class Times(NamedTuple):
    """Milliseconds of each kernel in each round, the rule's once more as ``again``; of those that were wrong, why.

    A kernel for which there was not enough memory is in neither.
    """

    samples: dict[str, list[float]]
    again: list[float]
    wrong: dict[str, str]


Say = Callable[[str], None]


@torch.no_grad()
def measure(
    size: Size, names: Sequence[str], rule: str, grads: dict[str, str], device: torch.device, seconds: float, say: Say
) -> Times:
    """Times kernels in turns at one size; those that are wrong there are left out.

    Args:
        size: what each of them computes.
        names: kernels, or forms of one.
        rule: the one among them that runs twice a round, so that its two times show the noise.
        grads: the kernels of rank_grad in a backward, by direction, for those that leave it to that verb.
        device: where.
        seconds: no round begins later than this, once the least have been run.
        say: is told the name of each kernel before it runs.
    """
    works = _works(size, names, grads, device)
    clock = Clock(device)
    on_device = device.type == "cuda"
    holds = {name: Hold() for name in (*names, "")}
    expected = _expected_at(size, works.inputs[0])
    wrong: dict[str, str] = {}
    fit = []
    for name in names:
        say(name)
        try:
            errors = list(_errors(works.run(name, 0), expected))
            for i in range(_WARM_UP):
                works.run(name, i)
            if on_device:
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            continue
        if faults := [f"{what}: {error}" for what, error in errors if not error.ok]:
            wrong[name] = faults[0]
        else:
            fit.append(name)
    del expected
    if rule not in fit:
        return Times({}, [], wrong)
    samples: dict[str, list[float]] = {name: [] for name in ("", *fit)}

    def sample(name: str, turn: int) -> float | None:
        def work() -> object:
            return works.run(name or rule, turn)

        if not on_device:
            return clock.wall(work)
        say(name or rule)
        return clock.device(work, holds[name])

    deadline = time.monotonic() + seconds
    with no_garbage_collection():
        for turn in range(_MOST_ROUNDS):
            if turn >= _LEAST_ROUNDS and time.monotonic() > deadline:
                break
            taken = {}
            for name in shuffled(list(samples), turn):
                tries = (sample(name, turn) for _ in range(_TRIES))
                taken[name] = next((ms for ms in tries if ms is not None), None)
            # A round counts where every kernel was timed in it: kernels are compared within rounds.
            if None not in taken.values():
                for name, ms in taken.items():
                    samples[name].append(ms)  # type: ignore[arg-type]
    again = samples.pop("")
    return Times(samples, again, wrong)


class _Works(NamedTuple):
    """The inputs in turns, and what a kernel makes of one of them."""

    inputs: list[tuple[Product, Tensor, Tensor, Tensor]]
    run: Callable[[str, int], tuple[Any, ...]]


def _works(size: Size, names: Sequence[str], grads: dict[str, str], device: torch.device) -> _Works:
    inputs = [_inputs(size, device, copy) for copy in range(_COPIES)]
    known, of_grads = dispatch.named(size.verb), dispatch.named("rank_grad")
    adapter_dtype = getattr(torch, size.adapter_dtype)

    def run(name: str, turn: int) -> tuple[Any, ...]:
        p, dy, z, t = inputs[turn % _COPIES]
        kernel = known[name]
        if size.direction == "forward":
            return kernel.run(p)  # type: ignore[no-any-return]
        if size.direction == "da":
            return (kernel.run(t, p.x, dtype=adapter_dtype, dropout=p.mask_x),)
        if size.direction == "db":
            return (kernel.run(dy, z, dtype=adapter_dtype, dropout=None),)
        # As eager code has it: the library's own are those of a CPU.
        if kernel.gradients is not None and (device.type == "cpu" or name.partition(":")[0] != "library"):
            return kernel.gradients(p, dy, z)
        dx, t = kernel.run(p.turned(dy))
        da = of_grads[grads["da"]].run(t, p.x, dtype=adapter_dtype, dropout=p.mask_x)
        return dx, da, of_grads[grads["db"]].run(dy, z, dtype=adapter_dtype, dropout=None)

    return _Works(inputs, run)


def _inputs(size: Size, device: torch.device, copy: int) -> tuple[Product, Tensor, Tensor, Tensor]:
    """The forward's product, dy, z and t; what the direction does not read is empty."""
    dtype, adapter_dtype = getattr(torch, size.dtype), getattr(torch, size.adapter_dtype)
    generator = torch.Generator(device).manual_seed(copy)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    def middle() -> Tensor:
        return new_middle(x, r).copy_(normal(m, r))

    m, r = size.m, size.r
    k, n = {
        "forward": (size.k, size.n),
        "backward": (size.n, size.k),
        "da": (size.n, 1),
        "db": (1, size.k),
    }[size.direction]
    r = {"da": size.k, "db": size.n}.get(size.direction, size.r)
    dropped = (_DROPOUT, torch.tensor(_SEED, device=device)) if size.dropout else (0.0, None)
    x = normal(m, k)
    product = Product(
        x,
        normal(n, k, std=k**-0.5),
        normal(r, k, std=k**-0.5, dtype=adapter_dtype),
        normal(n, r, std=r**-0.5, dtype=adapter_dtype),
        _SCALE,
        None,
        *dropped,
    )
    return product, normal(m, n), middle(), middle()


def _expected_at(size: Size, inputs: tuple[Product, Tensor, Tensor, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Oracle and baseline of what a kernel returns at a size, made where the inputs are."""

    def made(p: Product, dy: Tensor, z: Tensor, t: Tensor) -> Results:
        if size.direction == "forward":
            y, z = reference.lora_matmul(p)
            assert y is not None
            return {"y": y, "z": z}
        if size.direction == "da":
            return {"da": reference.rank_grad(t, p.x, dtype=adapter_dtype(p), dropout=p.mask_x)}
        if size.direction == "db":
            return {"db": reference.rank_grad(dy, z, dtype=adapter_dtype(p))}
        dx, t = reference.lora_matmul(p.turned(dy))
        assert dx is not None
        da = reference.rank_grad(t, p.x, dtype=adapter_dtype(p), dropout=p.mask_x)
        return {"dx": dx, "da": da, "db": reference.rank_grad(dy, z, dtype=adapter_dtype(p))}

    def adapter_dtype(p: Product) -> torch.dtype:
        return p.a.dtype

    p, *others = inputs
    oracle = made(p.map(Tensor.double), *(tensor.double() for tensor in others))
    baseline = made(p, *others)
    return [(name, oracle[name], baseline[name]) for name in baseline]


def _errors(made: tuple[Any, ...], expected: list[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Any]]:
    for tensor, (name, oracle, baseline) in zip(made, expected, strict=True):
        yield name, compare(tensor, oracle=oracle, baseline=baseline)


def spread(samples: Sequence[float]) -> list[float]:
    """A fifth of the samples are faster than the first of the three, the second is the median, a fifth are slower."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return [ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]]
