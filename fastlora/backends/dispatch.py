"""Asks each kernel whether it refuses a call, picks one, and can explain the choice.

``auto`` takes the first kernel in the order of ``KERNELS`` that neither refuses nor is unproven on the device. Skinny
kernels prove themselves at their first use (``first_use``); the last of all, ``library``, needs no proof.
``FASTLORA_BACKEND`` forces a kernel by its name, or the first that can of those whose names it begins (``triton``); a
forced kernel that refuses is an error.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.tiles import architecture
from ..text import dtype_name
from . import cuda, first_use, library, measured, reference, replay, triton, triton_skinny
from .dropout import Dropout
from .measured import Proof
from .request import Kernel, Product, Request

# For each verb, in the order of preference. rank_grad has one kernel of each family, named by it.
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "lora_matmul": (
        *cuda.LORA_MATMUL,
        *triton.LORA_MATMUL,
        *triton_skinny.LORA_MATMUL,
        *library.LORA_MATMUL,
        *reference.LORA_MATMUL,
    ),
    "rank_grad": (*cuda.RANK_GRAD, *triton.RANK_GRAD, *library.RANK_GRAD, *reference.RANK_GRAD),
}


class Verdict(NamedTuple):
    """One kernel's answer to a request: None where it runs, else the reason why not."""

    kernel: str
    reason: str | None


class Explanation(NamedTuple):
    """The kernel that would run a request, its tile where it has one, and what each kernel answered.

    ``check`` is how the check at first use stands, on GPUs.
    """

    request: Request
    chosen: str | None
    verdicts: tuple[Verdict, ...]
    tile: str | None = None
    check: str | None = None

    def __str__(self) -> str:
        r = self.request
        chosen = (self.chosen or "nothing") + (f" ({self.tile})" if self.tile else "")
        lines = [
            f"{r.verb} on {r.device}: M={r.m} K={r.k} N={r.n} R={r.r} {dtype_name(r.dtype)}, "
            f"adapters {dtype_name(r.adapter_dtype)}, {'with' if r.dropout else 'no'} dropout -> {chosen}"
        ]
        for v in self.verdicts:
            note = f": {self.check}" if self.check and v.kernel == first_use.KERNELS[r.verb] else ""
            lines.append(f"  {v.kernel:<16} {'can run' + note if v.reason is None else v.reason}")
        return "\n".join(lines)


def lora_matmul(p: Product) -> tuple[Tensor | None, Tensor]:
    """(y, z) by the kernel that was chosen; y is None without w.

    Raises:
        RuntimeError: ``FASTLORA_BACKEND`` names an unknown kernel, or one that refuses.
    """
    simple = p.x.is_cpu and _environment.get(_NAME, _AUTO) in _LIBRARY
    kernel = _on_a_cpu("lora_matmul") if simple else _choose(Request.of_lora_matmul(p), _forced())
    result: tuple[Tensor | None, Tensor] = kernel.run(p)
    return result


def rank_grad(p: Tensor, q: Tensor, dtype: torch.dtype, dropout: Dropout | None) -> Tensor:
    """pᵀ D(q) in ``dtype`` by the kernel that was chosen.

    Raises:
        RuntimeError: ``FASTLORA_BACKEND`` names an unknown kernel, or one that refuses.
    """
    simple = q.is_cpu and _environment.get(_NAME, _AUTO) in _LIBRARY
    kernel = (
        _on_a_cpu("rank_grad") if simple else _choose(Request.of_rank_grad(p, q, dtype, dropout is not None), _forced())
    )
    grad: Tensor = kernel.run(p, q, dtype=dtype, dropout=dropout)
    return grad


def gradients_of(p: Product, dy: Tensor) -> Callable[[Product, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None:
    """The kernel's own dx, da and db in one call, or None where they are to be made by the two verbs.

    Args:
        p: the forward's product, with x [M, K].
        dy: gradient of the output [M, N].
    """
    if dy.is_cpu and _environment.get(_NAME, _AUTO) in _LIBRARY:
        return _on_a_cpu("lora_matmul").gradients
    turned = Product(dy, p.w.T, p.b.T, p.a.T, p.scale, None, p.dropout_p, p.seed, on_product=True)  # type: ignore[union-attr]
    kernel = _choose(Request.of_lora_matmul(turned), _forced())
    # The library's are those of a CPU.
    return None if kernel.name == "library" and not dy.is_cpu else kernel.gradients


def small_of(x: Tensor) -> Callable[[Product, bool], Tensor | None] | None:
    """The kernel's own way with small calls, or None where it has none."""
    return _on_a_cpu("lora_matmul").small if x.is_cpu and _environment.get(_NAME, _AUTO) in _LIBRARY else None


@functools.cache
def _on_a_cpu(verb: str) -> Kernel:
    """What ``auto`` takes on a CPU, whatever the call: the kernels before it are kept for GPUs."""
    return next(kernel for kernel in KERNELS[verb] if kernel.name == "library")


def explain(p: Product) -> Explanation:
    """What :func:`lora_matmul` would run for this product, and each other kernel's reason."""
    explanation = _explain(Request.of_lora_matmul(p), _forced())
    kernel = next((k for k in KERNELS["lora_matmul"] if k.name == explanation.chosen), None)
    if kernel is None or kernel.tile is None:
        return explanation
    return explanation._replace(tile=kernel.tile(p))


def forget() -> None:
    """Lets every choice be made anew."""
    _chosen.clear()
    first_use.forget()
    replay.forget()
    _on_a_cpu.cache_clear()


# os.environ encodes the name in each look and raises inside where it is not set, half a microsecond; this is its dict.
_environment = os.environ._data  # type: ignore[attr-defined]
_NAME, _AUTO = os.environ.encodekey("FASTLORA_BACKEND"), os.environ.encodevalue("auto")
# The settings that come to the library on a CPU.
_LIBRARY = frozenset({_AUTO, os.environ.encodevalue("library")})


def _forced() -> str:
    return os.environ.get("FASTLORA_BACKEND", "auto")


_chosen: dict[tuple[Request, str], Kernel] = {}
_MOST_CHOSEN = 4096


def _choose(request: Request, forced: str) -> Kernel:
    kernel = _chosen.get((request, forced))
    return _decide(request, forced) if kernel is None else kernel


def _decide(request: Request, forced: str) -> Kernel:
    failures = len(first_use.failed)
    explanation = _explain(request, forced)
    if explanation.chosen is None:
        raise RuntimeError(f"FASTLORA_BACKEND={forced} cannot run this call\n{explanation}")
    kernel = next(kernel for kernel in KERNELS[request.verb] if kernel.name == explanation.chosen)
    if len(first_use.failed) > failures or len(_chosen) >= _MOST_CHOSEN:
        _chosen.clear()
    if not any(verdict.reason == first_use.LATER for verdict in explanation.verdicts):
        _chosen[request, forced] = kernel
    return kernel


def _explain(request: Request, forced: str) -> Explanation:
    if forced != "auto" and not any(_is_named(kernel.name, forced) for kernel in KERNELS["lora_matmul"]):
        names = [kernel.name for kernel in KERNELS["lora_matmul"]]
        raise RuntimeError(
            f"FASTLORA_BACKEND={forced!r} is unknown: expected auto, one of the kernels {', '.join(names)}, or the "
            "beginning of their names, such as triton"
        )
    if 0 in (request.m, request.k, request.n):
        # Nothing to multiply, so nothing to force: an empty batch must not break a training loop.
        forced = "library"
    refusals = {kernel.name: kernel.refuses(request) for kernel in KERNELS[request.verb]}
    candidates = [name for name in refusals if _is_candidate(name, forced)]
    chosen = None
    for name in candidates:
        if forced == "auto" and refusals[name] is None and (chosen is None or name != first_use.KERNELS[request.verb]):
            refusals[name] = unproven(name, request)
        chosen = chosen or (name if refusals[name] is None else None)
    check = first_use.state(request) if request.device.type == "cuda" else None
    return Explanation(request, chosen, tuple(Verdict(*item) for item in refusals.items()), check=check)


def _is_candidate(name: str, forced: str) -> bool:
    return name != "reference" if forced == "auto" else _is_named(name, forced) or _is_family(name, forced)


def _is_named(kernel: str, forced: str) -> bool:
    """Whether this is the kernel, or one of those whose names begin so."""
    return kernel == forced or kernel.startswith(f"{forced}-")


def _is_family(kernel: str, forced: str) -> bool:
    """Whether this kernel serves a whole family of which the forced one is a member: rank_grad's ``triton``."""
    return forced.startswith(f"{kernel}-")


def unproven(kernel: str, request: Request) -> str | None:
    """Why ``auto`` passes over a kernel that could run here: it is not proven on this GPU. None where it is."""
    if kernel == "library":
        return None
    if request.device.type != "cuda":
        return f"can run without a GPU, but auto keeps it for GPUs; FASTLORA_BACKEND={kernel} forces it"
    if kernel == first_use.KERNELS[request.verb]:
        return first_use.objection(request)
    proof = Proof(request.verb, kernel, triton.capability_of(request.device), dtype_name(request.dtype))
    if proof in measured.PROVEN:
        return None
    return (
        f"can run, but auto passes it over: not yet proven on {architecture(proof.capability)} in {proof.dtype} "
        f"(benchmarks/HARDWARE.md); FASTLORA_BACKEND={kernel} forces it"
    )
