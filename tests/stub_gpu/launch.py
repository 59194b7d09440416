"""Launches every kernel of the package into the stubs, and prints what became of each call.

A kernel is asked as ``dispatch`` asks it: whether it refuses the request, then to run. The compiler, the launcher and
csrc's host code are the real ones; the kernels do nothing, so results are not looked at.

    python -m tests.stub_gpu.launch        builds the stubs, launches on every architecture, and prints a table
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tests.stub_gpu import build, stand_in

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FAMILIES = ("triton", "cuda")

BF16, FP16, FP32 = "bfloat16", "float16", "float32"


class Call(NamedTuple):
    """One call of ``lora_matmul``; ``backward`` turns the operands as the backward does."""

    m: int = 150
    k: int = 96
    n: int = 272
    r: int = 16
    dtype: str = BF16
    adapter_dtype: str | None = None
    mask: str = "none"
    bias: bool = True
    backward: bool = False
    z_only: bool = False
    # Elements between the end of a row of x and the next.
    gap: int = 0


class Group(NamedTuple):
    """Several calls of one x together, forward and backward, by a kernel that has a way to."""

    ranks: tuple[int, ...] = (16, 16, 16)
    m: int = 150
    k: int = 96
    dtype: str = BF16
    adapter_dtype: str | None = None
    masked: bool = False


class Gradient(NamedTuple):
    """One call of ``rank_grad``: p [m, p_columns], q [m, q_columns]."""

    m: int = 520
    p_columns: int = 16
    q_columns: int = 264
    dtype: str = BF16
    grad_dtype: str | None = None
    masked: bool = False


class Step(NamedTuple):
    """A training step through ``lora_linear`` with the kernel forced."""

    dtype: str = BF16
    adapter_dtype: str | None = None
    dropout_p: float = 0.0


class Activation(NamedTuple):
    """A gated activation, forward in a place of its own and in that of g, and backward with and without h."""

    m: int = 65
    n: int = 1040
    dtype: str = BF16
    activation: str = "silu"


class Outcome(NamedTuple):
    """What became of one call: refused, or so many launches, or an exception."""

    kernel: str
    verb: str
    capability: int
    dtype: str
    call: str
    refusal: str | None = None
    error: str | None = None
    launches: tuple[str, ...] = ()
    maps: int = 0
    dependent: int = 0
    clusters: int = 0
    tile: str | None = None


def calls(everything: bool) -> Iterator[Call]:
    """What is asked of ``lora_matmul``: the plain call and a mask in every dtype; ``everything`` adds the rest."""
    for dtype in (BF16, FP16, FP32):
        yield Call(dtype=dtype)
        yield Call(dtype=dtype, mask="product", backward=True, bias=False)
    if not everything:
        return
    for dtype, adapter_dtype in ((BF16, FP32), (FP16, FP32), (FP32, FP32)):
        yield Call(dtype=dtype, adapter_dtype=adapter_dtype, mask="input")
        yield Call(dtype=dtype, adapter_dtype=adapter_dtype, bias=False, backward=True)
    for r in (1, 8, 64, 128):
        yield Call(r=r, mask="input")
        yield Call(r=r, mask="product", bias=False, backward=True)
    # Nothing a multiple of its tile; what the copy engine cannot read; a view with rows that are not; one token.
    yield Call(m=129, k=72, n=264, r=12)
    yield Call(m=63, k=31, n=65, r=5, mask="product")
    yield Call(gap=8)
    yield Call(gap=3)
    yield Call(m=1, k=64, n=64)
    # A wave of the largest tiles, and of the largest for few rows.
    yield Call(m=2304, k=128, n=2304)
    yield Call(m=2304, k=128, n=2304, mask="product", bias=False, backward=True)
    yield Call(m=64, k=128, n=28672, r=64)
    yield Call(z_only=True)
    yield Call(z_only=True, r=12, mask="input")


def groups(everything: bool) -> Iterator[Group]:
    """What is asked of a kernel for branches that go together."""
    for dtype in (BF16, FP16, FP32):
        yield Group(dtype=dtype)
        yield Group(dtype=dtype, masked=True)
    if not everything:
        return
    for masked in (False, True):
        yield Group(ranks=(64, 8), adapter_dtype=FP32, masked=masked)
        yield Group(ranks=(5, 12, 1, 128), m=63, k=31, masked=masked)
        # More than go into one launch, sums that are split, and one token.
        yield Group(ranks=(8,) * 6, masked=masked)
        yield Group(m=1000, k=4096, masked=masked)
        yield Group(m=1, masked=masked)


def gradients(everything: bool) -> Iterator[Gradient]:
    """What is asked of ``rank_grad``."""
    for dtype in (BF16, FP16, FP32):
        yield Gradient(dtype=dtype)
        yield Gradient(dtype=dtype, masked=True)
    if not everything:
        return
    for r in (1, 8, 64, 128):
        yield Gradient(p_columns=r, masked=True)
        yield Gradient(p_columns=264, q_columns=r)
    for dtype in (BF16, FP16):
        yield Gradient(dtype=dtype, grad_dtype=FP32)
    # Splits that are summed, a column too many, and one token.
    yield Gradient(m=8192, q_columns=4096)
    yield Gradient(m=70, p_columns=5, q_columns=33, masked=True)
    yield Gradient(m=1)


def steps(everything: bool) -> Iterator[Step]:
    """The whole steps."""
    if everything:
        for adapter_dtype, dropout_p in ((None, 0.0), (None, 0.1), (FP32, 0.1)):
            yield Step(BF16, adapter_dtype, dropout_p)


def activations(everything: bool) -> Iterator[Activation]:
    """What is asked of the gated activation, which belongs to no kernel of a verb."""
    for dtype in (BF16, FP16, FP32):
        yield Activation(dtype=dtype)
    if everything:
        yield Activation(activation="gelu")
        yield Activation(activation="gelu_tanh")
        yield Activation(m=1, n=1)
        yield Activation(m=7, n=33)


def outcomes(family: str, everything: bool) -> Iterator[Outcome]:
    """Every call of every kernel of a family, in this process, whose driver or runtime is a stub."""
    stand_in.enter()
    if family == "cuda":
        os.environ["FASTLORA_CUDA_LIBRARY"] = str(build.LIBRARY)
        library = ctypes.CDLL(str(build.LIBRARY))
    else:
        library = ctypes.CDLL("libcuda.so.1")

    from fastlora.backends import dispatch, request

    for kernel in dispatch.KERNELS["lora_matmul"]:
        if kernel.name.partition("-")[0] == family:
            for call in calls(everything):
                yield outcome_of(library, kernel, "lora_matmul", call, *product(call))
            for group in groups(everything) if kernel.together is not None else ():
                yield outcome_of(library, kernel, "lora_matmul", group, *_grouped(group))
            for step in steps(everything):
                yield outcome_of(library, kernel, "lora_matmul", step, lambda: None, _stepped(kernel.name, step))
    for kernel in dispatch.KERNELS["rank_grad"]:
        if kernel.name == family:
            for gradient in gradients(everything):
                yield outcome_of(library, kernel, "rank_grad", gradient, *_gradient(gradient))
    if family == "triton":
        kernel = request.Kernel("swiglu", request.runs_anything, _activate)
        for activation in activations(everything):
            yield outcome_of(
                library, kernel, "swiglu", activation, lambda: None, lambda kernel, call=activation: kernel.run(call)
            )


def outcome_of(
    library: ctypes.CDLL, kernel: Any, verb: str, call: Any, request: Callable[[], Any], run: Callable[[Any], object]
) -> Outcome:
    """Asks a kernel, and runs it where it does not refuse; ``library`` is the stub that it launches into."""
    library.stub_take.restype = ctypes.c_char_p
    outcome = Outcome(kernel.name, verb, stand_in.capability(), call.dtype, _words(call))
    asked = request()
    if asked is not None and (reason := kernel.refuses(asked)) is not None:
        return outcome._replace(refusal=reason)
    library.stub_take()
    tile = None
    try:
        result = run(kernel)
        tile = result if isinstance(result, str) else None
    except Exception as error:
        outcome = outcome._replace(error=f"{type(error).__name__}: {error}")
    seen = json.loads(library.stub_take())
    if seen["refusals"] and outcome.error is None:
        outcome = outcome._replace(error=f"nobody looked at the stub's refusal: {seen['refusals']}")
    launches = [operation for operation in seen["operations"] if "kernel" in operation]
    if outcome.error is None:
        # Once more: what is kept of a call must launch what its launcher did.
        run(kernel)
        again = json.loads(library.stub_take())
        if again["refusals"] or [o for o in again["operations"] if "kernel" in o] != launches:
            outcome = outcome._replace(error=f"the second call launched {again}, the first {seen}")
    return outcome._replace(
        launches=tuple(launch["kernel"] for launch in launches),
        maps=seen["maps"],
        dependent=sum(launch["dependent"] for launch in launches),
        clusters=sum(launch["cluster"] != [1, 1, 1] for launch in launches),
        tile=tile,
    )


def _words(call: Any) -> str:
    """The class and what differs from its defaults."""
    changed = (f"{name}={value}" for name, value in call._asdict().items() if value != call._field_defaults[name])
    return f"{type(call).__name__}({', '.join(changed)})"


def _tensor(rows: int, columns: int, dtype: Any, transposed: bool = False, gap: int = 0) -> Any:
    import torch

    if transposed:
        return _tensor(columns, rows, dtype, gap=gap).T
    return torch.empty(rows, columns + gap, dtype=dtype, device="cuda")[:, :columns]


def _dtypes(dtype: str, other: str | None) -> tuple[Any, Any]:
    import torch

    return getattr(torch, dtype), getattr(torch, other or dtype)


def _dropout(p: float = 0.1) -> Any:
    from fastlora.backends.dropout import Dropout, draw_seed

    return Dropout(p, draw_seed(stand_in.DEVICE))


def product(c: Call) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """The request of a call, and what runs it by a kernel."""
    from fastlora.backends.request import Product, Request

    dtype, adapter_dtype = _dtypes(c.dtype, c.adapter_dtype)
    dropout = None if c.mask == "none" else _dropout()
    operands = Product(
        x=_tensor(c.m, c.k, dtype, gap=c.gap),
        w=None if c.z_only else _tensor(c.n, c.k, dtype, c.backward),
        a=_tensor(c.r, c.k, adapter_dtype, c.backward),
        b=_tensor(c.n, c.r, adapter_dtype, c.backward),
        scale=1.7,
        bias=_tensor(1, c.n, dtype)[0] if c.bias and not c.z_only else None,
        dropout_p=0.0 if dropout is None else dropout.p,
        seed=None if dropout is None else dropout.seed,
        on_product=c.mask == "product",
    )

    def run(kernel: Any) -> str | None:
        _, z = kernel.run(operands)
        if kernel.gradients is not None and not (c.backward or c.z_only):
            kernel.gradients(operands, _tensor(c.m, c.n, dtype, gap=c.gap), z)
        return kernel.tile(operands) if kernel.tile and not c.z_only else None

    return lambda: Request.of_lora_matmul(operands), run


def _grouped(g: Group) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    from fastlora.backends.request import Product, Request

    dtype, adapter_dtype = _dtypes(g.dtype, g.adapter_dtype)
    x = _tensor(g.m, g.k, dtype)
    products, dys = [], []
    for i, r in enumerate(g.ranks):
        n = 264 + 8 * i
        dropout = _dropout() if g.masked and i != 1 else None
        mask = (0.0, None) if dropout is None else (dropout.p, dropout.seed)
        a, b = _tensor(r, g.k, adapter_dtype), _tensor(n, r, adapter_dtype)
        bias = _tensor(1, n, dtype)[0] if i else None
        products.append(Product(x, _tensor(n, g.k, dtype), a, b, 1.7 + i, bias, *mask))
        dys.append(_tensor(g.m, n, dtype))

    def run(kernel: Any) -> None:
        _, zs = kernel.together.run(products)
        kernel.together.gradients(products, dys, zs)

    return lambda: Request.of_lora_matmul(products[0]), run


def _gradient(g: Gradient) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    from fastlora.backends.request import Request

    dtype, grad_dtype = _dtypes(g.dtype, g.grad_dtype)
    # Rows on 16 bytes, as z and x have them.
    p, q = (_tensor(g.m, columns, dtype, gap=-columns % 8) for columns in (g.p_columns, g.q_columns))
    dropout = _dropout() if g.masked else None
    return (
        lambda: Request.of_rank_grad(p, q, grad_dtype, g.masked),
        lambda kernel: kernel.run(p, q, dtype=grad_dtype, dropout=dropout),
    )


def _activate(c: Activation) -> None:
    from fastlora.backends import swiglu

    dtype, _ = _dtypes(c.dtype, None)
    g, u, dh = (_tensor(c.m, c.n, dtype) for _ in range(3))
    for overwrite in (False, True):
        swiglu.launch_forward(g, u, c.activation, overwrite)
    for with_h in (False, True):
        swiglu.launch_backward(g, u, dh, c.activation, with_h)


def _stepped(kernel: str, step: Step) -> Callable[[Any], object]:
    import torch

    from fastlora import lora_linear

    dtype, adapter_dtype = _dtypes(step.dtype, step.adapter_dtype)

    def run(_: Any) -> None:
        x = torch.randn(2, 35, 96, dtype=dtype, device="cuda").requires_grad_()
        w, bias = torch.randn(272, 96, dtype=dtype), torch.randn(272, dtype=dtype)
        a = torch.randn(12, 96, dtype=adapter_dtype).requires_grad_()
        b = torch.randn(272, 12, dtype=adapter_dtype).requires_grad_()
        os.environ["FASTLORA_BACKEND"] = kernel
        try:
            y = lora_linear(x, w, a, b, scale=1.7, bias=bias, dropout_p=step.dropout_p)
            torch.autograd.grad(y, (x, a, b), torch.randn(y.shape, dtype=dtype))
        finally:
            del os.environ["FASTLORA_BACKEND"]

    return run


def launched(family: str, capability: int) -> list[Outcome]:
    """The outcomes of a process of its own: every call on sm_90, a few of each dtype on the others."""
    arguments = ["--family", family, *(["--everything"] if capability == 90 else [])]
    printed = build.finish(build.start("tests.stub_gpu.launch", *arguments, STUB_GPU_CAPABILITY=str(capability)))
    found = [Outcome(**json.loads(line)) for line in printed.splitlines()]
    return [outcome._replace(launches=tuple(outcome.launches)) for outcome in found]


def launch_everywhere() -> tuple[list[Outcome], dict[str, str]]:
    """Every outcome on every architecture, and the families that cannot be launched here with the reason."""
    reasons = {"triton": build.driver_obstacle(), "cuda": build.runtime_obstacle()}
    skipped = {family: reason for family, reason in reasons.items() if reason is not None}
    jobs = [("triton", capability) for capability in ARCHITECTURES] if "triton" not in skipped else []
    jobs += [("cuda", 90)] if "cuda" not in skipped else []
    if "triton" not in skipped:
        build.driver()
    if "cuda" not in skipped:
        build.library()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda job: launched(*job), jobs)
        return [outcome for batch in found for outcome in batch], skipped


def table(found: Sequence[Outcome]) -> str:
    """One line per kernel, verb, architecture and dtype: calls, refusals, launches, tensor maps."""
    lines = [f"{'kernel':<18}{'verb':<13}{'arch':<8}{'dtype':<10}{'calls':>6}{'refused':>9}{'launches':>10}{'maps':>6}"]
    keys = dict.fromkeys((o.kernel, o.verb, o.capability, o.dtype) for o in found)
    for key in keys:
        group = [o for o in found if (o.kernel, o.verb, o.capability, o.dtype) == key]
        kernel, verb, capability, dtype = key
        counts = (len(group), sum(o.refusal is not None for o in group), sum(len(o.launches) for o in group))
        maps = sum(o.maps for o in group)
        lines.append(
            f"{kernel:<18}{verb:<13}{f'sm_{capability}':<8}{dtype:<10}"
            f"{counts[0]:>6}{counts[1]:>9}{counts[2]:>10}{maps:>6}"
        )
        lines += [f"  {o.call}: {o.error}" for o in group if o.error is not None]
    names = Counter(name for o in found for name in o.launches)
    wrong = sum(o.error is not None for o in found)
    return "\n".join([*lines, f"{len(found)} calls, {names.total()} launches, {wrong} calls went wrong"])


def main() -> int:
    """Prints the table; or, for one family, the outcomes of this process as JSON Lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help=argparse.SUPPRESS)
    parser.add_argument("--everything", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.family:
        for outcome in outcomes(options.family, options.everything):
            print(json.dumps(outcome._asdict()), flush=True)
        return 0
    found, skipped = launch_everywhere()
    print(table(found))
    for family, reason in skipped.items():
        print(f"{family}: not launched, {reason}")
    return int(any(outcome.error is not None for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
