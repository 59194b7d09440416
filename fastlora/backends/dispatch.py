"""Asks each kernel whether it refuses a call, picks one, and can explain the choice.

``auto`` takes the kernel that a table (``measured``) says is the fastest at such sizes, where it is proven and does not
refuse. Without one it goes by the rule: the skinny kernels, which prove themselves at their first use (``first_use``),
and where these cannot run ``library``, which needs no proof.
``FASTLORA_BACKEND`` forces a kernel by its name, or the first that can of those whose names it begins (``triton``); a
forced kernel that refuses is an error. A name with a minus before it (``-triton-serial``) keeps kernels from ``auto``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.tiles import architecture
from ..text import dtype_name
from ..variables import warn_of_unknown
from . import cuda, first_use, library, library_small, measured, reference, replay, triton, triton_skinny
from .dropout import Dropout
from .request import Kernel, Product, Request, Together

# For each verb. Of a family that is forced the first that can runs. rank_grad has one kernel of each, named by it.
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
    """The kernel that would run a request, why, its tile where it has one, and what each kernel answered.

    ``check`` is how the check at first use stands, on GPUs.
    """

    request: Request
    chosen: str | None
    verdicts: tuple[Verdict, ...]
    why: str
    tile: str | None = None
    check: str | None = None

    @property
    def heading(self) -> str:
        """The call, what would run it, and why."""
        r = self.request
        chosen = (self.chosen or "nothing") + (f" ({self.tile})" if self.tile else "")
        return (
            f"{r.verb} on {r.device}: M={r.m} K={r.k} N={r.n} R={r.r} {dtype_name(r.dtype)}, "
            f"adapters {dtype_name(r.adapter_dtype)}, {'with' if r.dropout else 'no'} dropout -> {chosen}\n  {self.why}"
        )

    @property
    def answers(self) -> str:
        """What each kernel answered, a line each."""
        lines = []
        for v in self.verdicts:
            note = f": {self.check}" if self.check and v.kernel == first_use.KERNELS[self.request.verb] else ""
            lines.append(f"  {v.kernel:<16} {'can run' + note if v.reason is None else v.reason}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.heading}\n{self.answers}"


def lora_matmul(p: Product) -> tuple[Tensor | None, Tensor]:
    """(y, z) by the kernel that was chosen; y is None without w.

    Raises:
        RuntimeError: ``FASTLORA_BACKEND`` names an unknown kernel, or one that refuses.
    """
    kernel = _simple("lora_matmul") if p.x.is_cpu and _environment.get(_NAME, _AUTO) in _LIBRARY else None
    if kernel is None:
        kernel = _choose(Request.of_lora_matmul(p), _forced())
    result: tuple[Tensor | None, Tensor] = kernel.run(p)
    return result


def rank_grad(p: Tensor, q: Tensor, dtype: torch.dtype, dropout: Dropout | None) -> Tensor:
    """pᵀ D(q) in ``dtype`` by the kernel that was chosen.

    Raises:
        RuntimeError: ``FASTLORA_BACKEND`` names an unknown kernel, or one that refuses.
    """
    kernel = _simple("rank_grad") if q.is_cpu and _environment.get(_NAME, _AUTO) in _LIBRARY else None
    if kernel is None:
        kernel = _choose(Request.of_rank_grad(p, q, dtype, dropout is not None), _forced())
    grad: Tensor = kernel.run(p, q, dtype=dtype, dropout=dropout)
    return grad


def gradients_of(p: Product, dy: Tensor) -> Callable[[Product, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None:
    """The kernel's own dx, da and db in one call, or None where they are to be made by the two verbs.

    Args:
        p: the forward's product, with x [M, K].
        dy: gradient of the output [M, N].
    """
    kernel = _simple("lora_matmul") if dy.is_cpu and _environment.get(_NAME, _AUTO) in _LIBRARY else None
    if kernel is None:
        kernel = _choose(Request.of_lora_matmul(p.turned(dy)), _forced())
        # The library's are those of a CPU.
        if kernel.name == "library" and not dy.is_cpu:
            return None
    return kernel.gradients


def lora_matmul_group(products: Sequence[Product]) -> tuple[list[Tensor], list[Tensor]]:
    """y and z of each of several products of one x [M, K], together where one kernel runs all and has a way to."""
    together = _together(products)
    if together is not None:
        return together.run(products)
    made = [lora_matmul(p) for p in products]
    return [y for y, _ in made], [z for _, z in made]  # type: ignore[misc]


GroupGradients = Callable[
    [Sequence[Product], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor], list[Tensor]]
]


def group_gradients_of(products: Sequence[Product], dys: Sequence[Tensor]) -> GroupGradients | None:
    """A kernel's own dx, and da and db of each, in one call, or None where they are to be made one by one.

    Args:
        products: the forward's, with one x [M, K].
        dys: gradient of each output [M, N].
    """
    together = _together([p.turned(dy) for p, dy in zip(products, dys, strict=True)])
    return None if together is None else together.gradients


def _together(products: Sequence[Product]) -> Together | None:
    """The way with a group of the kernel that would run each of its products; None where they differ."""
    if products[0].x.is_cpu and _environment.get(_NAME, _AUTO) in _LIBRARY:
        return _library("lora_matmul").together
    requests, forced = tuple(Request.of_lora_matmul(p) for p in products), _forced()
    if (requests, forced) in _ways:
        return _ways[requests, forced]
    kernels = {_choose(request, forced).name: None for request in requests}
    together = named("lora_matmul")[next(iter(kernels))].together if len(kernels) == 1 else None
    checked = first_use.KERNELS["lora_matmul"]
    if together is not None and checked in kernels and (forced == "auto" or forced.startswith("-")):
        objection = first_use.objection_to_group(requests)
        if objection is not None:
            if objection != first_use.LATER:
                _forget_choices()
            return None
    if all((request, forced) in _chosen for request in requests):
        if len(_ways) >= _MOST_CHOSEN:
            _ways.clear()
        _ways[requests, forced] = together
    return together


def small_of(x: Tensor) -> Callable[[Product, bool], Tensor | None] | None:
    """The kernel's own way with small calls, or None where it has none."""
    return _library("lora_matmul").small if x.is_cpu and _environment.get(_NAME, _AUTO) in _LIBRARY else None


def is_small(p: Product) -> bool:
    """Whether a call, x [..., K], goes the kernel's own way with small ones, if nothing speaks against it."""
    return small_of(p.x) is not None and library_small.is_small(p)


@functools.cache
def _simple(verb: str) -> Kernel | None:
    """What runs every call on a CPU, or None where a table knows better forms of it: the other kernels are for GPUs."""
    return None if measured.sources_of(torch.device("cpu")) else _library(verb)


@functools.cache
def _library(verb: str) -> Kernel:
    warn_of_unknown()
    return next(kernel for kernel in KERNELS[verb] if kernel.name == "library")


def explain(p: Product) -> Explanation:
    """What :func:`lora_matmul` would run for this product, and each other kernel's reason."""
    explanation = explain_request(Request.of_lora_matmul(p))
    kernel = next((k for k in KERNELS["lora_matmul"] if k.name == explanation.chosen), None)
    if kernel is None or kernel.tile is None:
        return explanation
    return explanation._replace(tile=kernel.tile(p))


def explain_request(request: Request) -> Explanation:
    """What would run a request, and each other kernel's reason."""
    return _explain(request, _forced())


def forget() -> None:
    """Lets every choice be made anew."""
    _forget_choices()
    first_use.forget()
    measured.forget()
    replay.forget()
    _simple.cache_clear()
    _library.cache_clear()


# os.environ encodes the name in each look and raises inside where it is not set, half a microsecond; this is its dict.
_environment = os.environ._data  # type: ignore[attr-defined]
_NAME, _AUTO = os.environ.encodekey("FASTLORA_BACKEND"), os.environ.encodevalue("auto")
# The settings that come to the library on a CPU.
_LIBRARY = frozenset({_AUTO, os.environ.encodevalue("library")})


def _forced() -> str:
    return os.environ.get("FASTLORA_BACKEND", "auto")


_chosen: dict[tuple[Request, str], Kernel] = {}
_ways: dict[tuple[tuple[Request, ...], str], Together | None] = {}
_MOST_CHOSEN = 4096


def _forget_choices() -> None:
    _chosen.clear()
    _ways.clear()


def _choose(request: Request, forced: str) -> Kernel:
    kernel = _chosen.get((request, forced))
    return _decide(request, forced) if kernel is None else kernel


def _decide(request: Request, forced: str) -> Kernel:
    warn_of_unknown()
    failures = len(first_use.failed)
    explanation = _explain(request, forced)
    if explanation.chosen is None:
        raise RuntimeError(f"FASTLORA_BACKEND={forced} cannot run this call\n{explanation}")
    kernel = named(request.verb)[explanation.chosen]
    if len(first_use.failed) > failures or len(_chosen) >= _MOST_CHOSEN:
        _forget_choices()
    if not any(verdict.reason == first_use.LATER for verdict in explanation.verdicts):
        _chosen[request, forced] = kernel
    return kernel


def named(verb: str) -> dict[str, Kernel]:
    """The kernels of a verb and their forms, by name."""
    return {form.name: form for kernel in KERNELS[verb] for form in (kernel, *kernel.forms)}


def _explain(request: Request, forced: str) -> Explanation:
    forbidden = forced[1:] if forced.startswith("-") else None
    meant = forced if forbidden is None else forbidden
    if meant != "auto" and not any(_is_named(kernel.name, meant) for kernel in KERNELS["lora_matmul"]):
        names = [kernel.name for kernel in KERNELS["lora_matmul"]]
        raise RuntimeError(
            f"FASTLORA_BACKEND={forced!r} is unknown: expected auto, one of the kernels {', '.join(names)}, or the "
            "beginning of their names, such as triton; with a minus before it, such as -triton, none of them"
        )
    refusals = {kernel.name: kernel.refuses(request) for kernel in KERNELS[request.verb]}
    chosen: str | None
    if 0 in (request.m, request.k, request.n):
        # Nothing to multiply, so nothing to force: an empty batch must not break a training loop.
        chosen, why = "library", "nothing to multiply"
    elif forced != "auto" and forbidden is None:
        able = (name for name, refusal in refusals.items() if refusal is None)
        chosen = next((name for name in able if _is_named(name, forced) or _is_family(name, forced)), None)
        why = f"forced by FASTLORA_BACKEND={forced}"
    else:
        if forbidden is not None:
            for name in refusals:
                if name != "library" and _is_named(name, forbidden):
                    refusals[name] = refusals[name] or f"FASTLORA_BACKEND={forced} forbids it"
        chosen, why = _automatic(request, refusals)
    check = first_use.state(request) if request.device.type == "cuda" else None
    return Explanation(request, chosen, tuple(Verdict(*item) for item in refusals.items()), why, check=check)


def _automatic(request: Request, refusals: dict[str, str | None]) -> tuple[str, str]:
    """The kernel that ``auto`` takes and why; adds to the refusals why it passes over those that could run."""
    best, why = measured.choice(request)
    checked = first_use.KERNELS[request.verb]
    for name in refusals:
        if refusals[name] is None and name not in (checked, "library", "reference"):
            refusals[name] = unproven(name, request)
    # What is checked at its first use is not before it is wanted. A form is refused what its kernel is.
    kernel = None if best is None else best.partition(":")[0]
    if kernel is None or kernel == checked or refusals.get(kernel, "is unknown") is not None:
        refusals[checked] = refusals[checked] or unproven(checked, request)
    if best in named(request.verb) and refusals[kernel] is None:  # type: ignore[index]
        return best, why
    chosen = checked if refusals[checked] is None else "library"
    return chosen, f"by the rule: {why}" if best is None else f"by the rule: {best} was faster but cannot run ({why})"


def rule(request: Request) -> str:
    """The kernel that ``auto`` takes where no table knows better."""
    checked = first_use.KERNELS[request.verb]
    able = named(request.verb)[checked].refuses(request) is None and unproven(checked, request) is None
    return checked if able else "library"


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
    if obstacle := measured.unproven(request, kernel):
        return (
            f"can run, but auto passes it over: {obstacle} on {architecture(triton.capability_of(request.device))} in "
            f"{dtype_name(request.dtype)} (`{measured.COMMAND}`, docs/tuning.md); FASTLORA_BACKEND={kernel} forces it"
        )
    return first_use.objection(request) if kernel == first_use.KERNELS[request.verb] else None
