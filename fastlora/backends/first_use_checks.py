"""What the check at first use runs: each kernel of a variant on small inputs, held to the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..error_rule import compare
from ..text import dtype_name
from . import reference, triton, triton_skinny
from .dropout import Dropout
from .request import Product, Request, new_middle

_MOST_RANKS = 128

# M, K, N of the check: every sum is split, and the first block of each grid is not the last.
_SIZES = (600, 1184, 320)
# The same of a group's branches, the next of which is a little wider.
_GROUP_SIZES = (300, 600, 264)
_SCALE = 1.7


class Variant(NamedTuple):
    """What is compiled apart from everything else, and so has a check of its own."""

    device: torch.device
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    r: int
    dropout: bool
    precision: str

    @staticmethod
    def of(request: Request) -> Variant:
        """The variant that a request would run."""
        precision = triton.precision() if request.dtype is torch.float32 else "ieee"
        r = min(request.r, _MOST_RANKS)
        return Variant(request.device, request.dtype, request.adapter_dtype, r, request.dropout, precision)

    def __str__(self) -> str:
        dropout = "with dropout" if self.dropout else "without dropout"
        dtypes = f"{dtype_name(self.dtype)} with {dtype_name(self.adapter_dtype)} adapters"
        return f"{dtypes}, rank {self.r}, {dropout}"


class Gated(NamedTuple):
    """A gated activation's kernels, which pass and fail by themselves."""

    device: torch.device
    dtype: torch.dtype
    activation: str

    def __str__(self) -> str:
        return f"{self.activation} in {dtype_name(self.dtype)}"


class GroupVariant(NamedTuple):
    """The same for branches in one launch; whether any of them drops is in ``dropout``."""

    device: torch.device
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    ranks: tuple[int, ...]
    dropout: bool
    precision: str

    @staticmethod
    def of(requests: Sequence[Request]) -> GroupVariant:
        """The variant that the requests of one launch would run."""
        each = [Variant.of(request) for request in requests]
        device, dtype, adapter_dtype, _, _, precision = each[0]
        ranks, dropout = tuple(v.r for v in each), any(v.dropout for v in each)
        return GroupVariant(device, dtype, adapter_dtype, ranks, dropout, precision)

    def __str__(self) -> str:
        alone = Variant(self.device, self.dtype, self.adapter_dtype, 0, self.dropout, self.precision)
        return str(alone).replace("rank 0", f"ranks {', '.join(map(str, self.ranks))} together")


def faults(variant: Variant) -> Iterator[str]:
    """Runs each kernel of a variant and says of each that breaks the error rule by how much, in order."""
    from ..kernels import middle, middle_and_grad, rank_grad, rank_update

    device, dtype, adapter_dtype, r, dropped, precision = variant
    if dropped:
        yield from mask_faults(device)
    m, k, n = _SIZES
    dropout = Dropout(0.3, torch.tensor((2**62 + 3, -5), device="cpu")) if dropped else None
    x, dy, z, t = (_normal(m, width, dtype) for width in (k, n, r, r))
    a, b = _normal(r, k, adapter_dtype), _normal(n, r, adapter_dtype)
    bias = _normal(1, n, dtype)[0]
    seed = None if dropout is None else dropout.seed
    forward = Product(x, None, a, b, _SCALE, bias, 0.3 if dropped else 0.0, seed)
    update = forward._replace(on_product=True)
    on_device = None if seed is None else Dropout(0.3, seed.to(device))
    there = forward.map(lambda t: t.to(device))._replace(seed=None if on_device is None else on_device.seed)
    dy_there, z_there, t_there = dy.to(device), z.to(device), t.to(device)

    def held(name: str, actual: Tensor, oracle: Tensor, baseline: Tensor) -> Iterator[str]:
        errors = compare(actual.cpu(), oracle=oracle, baseline=baseline)
        if not errors.ok:
            yield f"{name}: {errors}"

    capability = triton.capability_of(device)
    with triton.device_of(there.x):
        made = new_middle(there.x, r)
        _run(middle.launches(there, made, capability=capability, precision=precision), made)
        yield from held("middle", made, *(_middle(p) for p in (forward.map(Tensor.double), forward)))

        y, step = rank_update.launch(there._replace(on_product=True), z_there, precision=precision)
        _run([step], y)
        yield from held("rank_update", y, _update(update.map(Tensor.double), z.double()), _update(update, z))

        if middle_and_grad.pays(m, n, r, dtype.itemsize, capability):
            made = new_middle(dy_there, r)
            db, steps = middle_and_grad.launches(
                dy_there, there.b, z_there, made, scale=_SCALE, capability=capability, precision=precision
            )
            _run(steps, made, db)
            turned = Product(dy, None, b.T, b, _SCALE)
            yield from held("middle_and_grad, t", made, *(_middle(p) for p in (turned.map(Tensor.double), turned)))
            yield from held("middle_and_grad, db", db, *_grads(dy, z, adapter_dtype, None))
        else:
            db, steps = rank_grad.launches(
                dy_there, z_there, dtype=adapter_dtype, capability=capability, precision=precision
            )
            _run(steps, db)
            yield from held("rank_grad, db", db, *_grads(dy, z, adapter_dtype, None))

        da, steps = rank_grad.launches(
            t_there, there.x, dtype=adapter_dtype, capability=capability, precision=precision, dropout=on_device
        )
        _run(steps, da)
        yield from held("rank_grad, da", da, *_grads(t, x, adapter_dtype, dropout))


def group_faults(variant: GroupVariant) -> Iterator[str]:
    """The same for a forward and a backward of branches that go together, but for the vendor's GEMMs.

    Of three branches or more the last drops nothing.
    """
    device, dtype, adapter_dtype, ranks, dropped, precision = variant
    if dropped:
        yield from mask_faults(device)
    m, k, n = _GROUP_SIZES
    x, a_s = _normal(m, k, dtype), _normal(sum(ranks), k, adapter_dtype).split(ranks)
    group, dys = [], []
    for i, a in enumerate(a_s):
        drops = dropped and (i < 2 or i + 1 < len(ranks))
        seed = torch.tensor((2**62 + 3 * i, -5), device="cpu") if drops else None
        b, bias = _normal(n + 8 * i, len(a), adapter_dtype), _normal(1, n + 8 * i, dtype)[0]
        group.append(Product(x, None, a, b, _SCALE + i, bias, 0.3 if drops else 0.0, seed))
        dys.append(_normal(m, n + 8 * i, dtype))
    oracles = [_low_rank_step(p.map(Tensor.double), dy.double()) for p, dy in zip(group, dys, strict=True)]
    baselines = [_low_rank_step(p, dy) for p, dy in zip(group, dys, strict=True)]

    x_there = x.to(device)
    there = [p._replace(x=x_there, a=p.a.to(device), b=p.b.to(device)) for p in group]
    there = [p._replace(bias=p.bias.to(device), seed=None if p.seed is None else p.seed.to(device)) for p in there]  # type: ignore[union-attr]
    capability = triton.capability_of(device)
    with triton.device_of(x_there):
        ys, zs, steps = triton_skinny.group_launches(there, capability, precision)
        _run(steps, *ys, *zs)
        on_device = [dy.to(device) for dy in dys]
        dx, da, dbs, steps = triton_skinny.group_gradient_launches(there, on_device, zs, capability, precision)
        _run(steps, dx, da, *dbs)
    das = triton_skinny.rows_of_each(da, group)
    for i, of_branch in enumerate(zip(ys, zs, das, dbs, strict=True)):
        for name, actual in zip(("y", "z", "da", "db"), of_branch, strict=True):
            errors = compare(actual.cpu(), oracle=oracles[i][name], baseline=baselines[i][name])
            if not errors.ok:
                yield f"group, {name} of branch {i}: {errors}"
    oracle, baseline = (torch.stack([step["dx"] for step in steps]).sum(0) for steps in (oracles, baselines))
    errors = compare(dx.cpu(), oracle=oracle, baseline=baseline)
    if not errors.ok:
        yield f"group, dx: {errors}"


def _low_rank_step(p: Product, dy: Tensor) -> dict[str, Tensor]:
    """What has the rank in it of a forward and a backward, by the reference."""
    z, t = _middle(p), _middle(Product(dy, None, p.b.T, p.b, p.scale))
    da = reference.rank_grad(t, p.x, dtype=p.a.dtype, dropout=p.mask_x)
    db = reference.rank_grad(dy, z, dtype=p.b.dtype)
    dx = _update(p._replace(b=p.a.T, bias=None, on_product=True), t)
    return {"y": _update(p, z), "z": z, "dx": dx, "da": da, "db": db}


def mask_faults(device: torch.device) -> Iterator[str]:
    """Makes a mask in the kernel and says how many of its bits are not those of torch's operators."""
    from ..kernels import philox

    rows, columns, first_row = 70, 300, 5
    dropout = Dropout(0.3, torch.tensor((-1, 2**40 + 7), device="cpu"))
    bits = torch.full((rows, columns), 7, dtype=torch.int16, device=device)
    with triton.device_of(bits):
        triton.run_all([philox.launch(Dropout(dropout.p, dropout.seed.to(device)), bits, first_row)])
    expected = -dropout.keep(rows, columns, first_row).to(torch.int16)
    if wrong := int(bits.cpu().ne(expected).sum()):
        yield f"keep_mask: {wrong} of {rows * columns} bits are wrong"


def swiglu_faults(gated: Gated) -> Iterator[str]:
    """Runs a gated activation forward and backward and says of each result that breaks the error rule by how much."""
    from ..kernels import swiglu

    device, dtype, activation = gated
    # In vectors, the last block not whole.
    rows, columns = 65, 1040
    normal = _normal(rows, columns, dtype) * columns**0.5
    g, u, dh = 3 * normal, normal.flip(0), normal.flip(1)
    there, other, dg = (t.to(device, copy=True) for t in (g, u, dh))
    h, again, du = (torch.empty_like(there) for _ in range(3))
    with triton.device_of(there):
        _run([swiglu.forward_launch(there, other, h, activation)], h)
        _run([swiglu.backward_launch(there, other, dg, du, again, activation)], du, again)
    exact = g.double(), u.double()
    forward = (reference.swiglu(*exact, activation), reference.swiglu(g, u, activation))
    oracles = reference.swiglu_gradients(*exact, dh.double(), activation)
    gradients = zip(oracles, reference.swiglu_gradients(g, u, dh, activation), strict=True)
    for name, made, (oracle, baseline) in zip(
        ("h", "h of the backward", "dg", "du"), (h, again, dg, du), (forward, forward, *gradients), strict=True
    ):
        errors = compare(made.cpu(), oracle=oracle, baseline=baseline)
        if not errors.ok:
            yield f"{activation}, {name}: {errors}"


def _normal(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers of eight bits, which TF32 multiplies as exactly as float32 does."""
    generator = torch.Generator("cpu").manual_seed(rows + columns)
    numbers = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
    rounded: Tensor = (numbers / columns**0.5).bfloat16()
    return rounded.to(dtype)


def _run(steps: list[Any], *results: Tensor) -> None:
    """Runs launches into memory that holds NaN."""
    between = [step.arguments.get(name) for step in steps for name in ("partial_ptr", "partial_2_ptr", "t_ptr")]
    for memory in (*results, *between):
        if memory is not None:
            memory.fill_(float("nan"))
    triton.run_all(steps)


def _middle(p: Product) -> Tensor:
    return reference.lora_matmul(p)[1]


def _update(p: Product, z: Tensor) -> Tensor:
    y = reference.dropped(torch.mm(z, p.b.to(z.dtype).T), p.mask_product)
    return y if p.bias is None else y.add_(p.bias)


def _grads(p: Tensor, q: Tensor, dtype: torch.dtype, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    oracle = reference.rank_grad(p.double(), q.double(), dtype=torch.float64, dropout=dropout)
    return oracle, reference.rank_grad(p, q, dtype=dtype, dropout=dropout)
