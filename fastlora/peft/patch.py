"""PEFT models on fastlora in one line: ``fastlora.patch_peft(model)``.

Each layer that is exactly ``peft.tuners.lora.Linear`` gets the class of :mod:`fastlora.peft.layer`, and each that is
exactly PEFT's layer on one of bitsandbytes that of :mod:`fastlora.peft.quantised`. Neither has state of its own;
nothing is wrapped, moved or renamed, so checkpoints, ``isinstance`` and optimisers see no difference, and
``unpatch_peft`` puts the class back. peft is imported in functions only.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import gated, siblings
from ..backends.request import Request
from ..mergeable import Mergeable
from ..ownership import unwrapped
from ..sibling_names import Groups, choose
from ..text import listed
from . import calls
from .reasons import variant
from .report import TOKENS, PatchReport

if TYPE_CHECKING:
    from .layer import Fused

# The attributes of a layer that the fast path reads; a version of PEFT without one of them is not supported.
READ = (
    "base_layer",
    "lora_A",
    "lora_B",
    "lora_dropout",
    "scaling",
    "lora_variant",
    "active_adapters",
    "disable_adapters",
    "merged",
    "cast_input_dtype_enabled",
)

# What is tested: the oldest version that there is for transformers 5, and the pinned one.
OLDEST, NEWEST = "0.18.0", "0.21.2"

# Modules whose frames a warning skips, to be about the caller's line; a with statement calls through contextlib.
_NOT_CALLERS = (__name__.split(".")[0], "contextlib")


def patch_peft(
    model: nn.Module, *, strict_dtype: bool = False, groups: Groups = "auto", mlp: bool = False
) -> PatchReport:
    """Runs the LoRA layers of a PEFT model on :func:`fastlora.lora_linear` wherever a call proves that it may.

    ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias``, for every layer whose class is ``peft.tuners.lora.Linear`` itself, or
    PEFT's ``Linear4bit`` or ``Linear8bitLt`` on a layer of bitsandbytes (QLoRA). Each call looks at the layer's state;
    where anything but this formula, or DoRA's (:func:`fastlora.dora_linear`), would run (merged, disabled, hooks, ...:
    docs/peft.md has the table), PEFT's own forward does, and the first time its reason is logged by
    ``logging.getLogger("fastlora")``. Patch once the model has its adapters and before FSDP or an engine wraps it; DDP
    and ``torch.compile`` are looked through. Layers that get their first adapter later need another call.
    For peft 0.18.0 and later; tested with 0.18.0 and 0.21.2, and bitsandbytes 0.50.2.

    Args:
        model: what ``get_peft_model`` returned, or any module that holds PEFT's layers.
        strict_dtype: leave float32 adapters on a half-precision base (outside of autocast) to PEFT, which casts x up
            and computes the adapter in float32. By default fastlora rounds the adapters to the dtype of x instead.
        groups: layers that compute together, as :func:`fastlora.lora_linear_group`, in calls with one input: the first
            of them that is called computes all, and the others take their part where they prove that it is theirs.
            ``"auto"`` for children of one parent named q_proj, k_proj, v_proj; query, key, value; gate_proj, up_proj;
            or w1, w3; but not of cross attention. Tuples of other names, such as ``[("wq", "wk", "wv")]``; or None.
        mlp: run modules whose forward is, by its source, ``down(act(gate(x)) * up(x))`` with silu or gelu as
            :func:`fastlora.lora_swiglu_mlp`, which keeps half as much for the backward; their three layers are not
            called then. Calls in which one of these has hooks, or would run PEFT's forward, run the module's own.

    Returns:
        A :class:`PatchReport`.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``groups`` is something else.
        ValueError: names in ``groups`` are of different parents, or match nothing.
        ImportError: peft is not installed, or older than 0.18.0.

    Warns:
        UserWarning: no layer was patched, with the reasons counted; a patched layer's base weight is trainable; or
            ``mlp=True`` finds no gated MLP.
    """
    return _patch(model, strict_dtype, groups, mlp)[0]


def unpatch_peft(model: nn.Module) -> int:
    """Gives every patched layer of ``model`` PEFT's class back.

    Returns:
        The number of layers that were patched.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Warns:
        UserWarning: no layer was patched, or some were wrapped by a class of their own since and stay as they are.
    """
    _check_module(model)
    count = 0
    wrapped: list[str] = []
    # Not imported here: where nobody has, no layer has the class, and peft may be missing.
    ours = sys.modules.get(f"{__package__}.layer")
    if ours is not None:
        back = {fused: kind for kind, both in ours.KINDS.items() for fused in both}
        for name, layer in model.named_modules():
            gated.restore(layer)
            if type(layer) in back:
                siblings.dissolve(layer)
                layer.__class__ = back[type(layer)]
                count += 1
            elif isinstance(layer, ours.Fused):
                wrapped.append(name)
    if wrapped:
        _warn(
            f"{len(wrapped)} layers stay patched ({listed(wrapped)}): a wrapper such as fully_shard gave them a class "
            "of its own. Unpatch before wrapping"
        )
    elif count == 0:
        _warn(
            "no layer of model is patched, so there is nothing to undo: call fastlora.patch_peft(model) first, or pass "
            "the model that was patched"
        )
    return count


@contextmanager
def patched_peft(
    model: nn.Module, *, strict_dtype: bool = False, groups: Groups = "auto", mlp: bool = False
) -> Iterator[PatchReport]:
    """:func:`patch_peft` for the length of a block: ``with fastlora.patched_peft(model) as report: ...``.

    Every layer leaves the block with the class it had before; what was patched before stays patched.
    """
    grouped = {layer: group for layer in model.modules() if (group := siblings.group_of(layer))}
    report, before = _patch(model, strict_dtype, groups, mlp)
    after = {layer: type(layer) for layer in before}
    try:
        yield report
    finally:
        for layer, kind in before.items():
            # A layer that somebody gave another class meanwhile keeps it.
            if type(layer) is after[layer]:
                layer.__class__ = kind
        siblings.restore(model, grouped)


def _patch(
    model: nn.Module, strict_dtype: bool, groups: Groups, mlp: bool
) -> tuple[PatchReport, dict[nn.Module, type]]:
    """Patches, and returns the report and the old class of each layer whose class was changed."""
    _check_module(model)
    # A patch changes no Parameter, so that no wrapper needs to know; torch.compile sees the classes and compiles anew.
    model = unwrapped(model)
    if importlib.util.find_spec("peft") is None:
        raise ImportError("patch_peft needs peft, which is not installed: pip install peft")
    try:
        importlib.import_module(f"{__package__}.layer")
    except ImportError as error:
        if (error.name or "").split(".")[0] != "peft":
            raise
        raise ImportError(f"this version of peft has no {error.name}: {_remedy()}", name=error.name) from error

    wanted: dict[type, type[Fused]] = {}
    for kind, (fused, strict) in kinds().items():
        wanted |= dict.fromkeys((kind, fused, strict), strict if strict_dtype else fused)
    patched, already, skipped = _sorted_out(model)
    before: dict[nn.Module, type] = {}
    try:
        for name, layer in (patched | already).items():
            if wanted.get(type(layer), type(layer)) is not type(layer):
                before[layer] = type(layer)
                layer.__class__ = wanted[type(layer)]
                calls.name_layer(layer, name)
        calls.forget_warnings()
        chosen = choose(model, groups, _unfit)
        trainable = tuple(name for name, layer in patched.items() if layer.base_layer.weight.requires_grad)
        running = (patched | already).values()
        requests = Counter(request for layer in running if (request := _request(layer)))
        bases = Counter(words for layer in running if (words := layer.base_words(layer.base_layer)))
        mlps = gated.find(model, _unfit) if mlp else {}
        report = PatchReport(
            tuple(patched),
            tuple(already),
            skipped,
            trainable,
            chosen.names,
            chosen.refused,
            tuple(mlps),
            requests,
            bases,
        )
        # Inside of the try, because a user may have made warnings errors.
        _warn_of(model, report)
        if mlp and not mlps:
            _warn(f"mlp=True {gated.why_none(model)}")
    except BaseException:
        for layer, was in before.items():
            layer.__class__ = was
        raise
    for layer in (patched | already).values():
        siblings.dissolve(layer)
    for _, parent, names in chosen.formed:
        siblings.form(parent, names)
    for module in model.modules():
        if isinstance(module, gated.GatedMLP):
            before[module] = type(module)
            gated.restore(module)
    for module in mlps.values():
        before.setdefault(module, type(module))
        gated.swap(module)
    return report, before


def _sorted_out(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """The adapter layers of a model by name: those to patch, those that are patched, and why the others are not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .layer import Fused

    to_patch: dict[str, Any] = {}
    already: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Fused):
            already[name] = layer
        elif isinstance(layer, BaseTunerLayer):
            reason = refusal(layer)
            if reason is None:
                to_patch[name] = layer
            else:
                skipped[name] = reason
    return to_patch, already, skipped


def _unfit(layer: Any) -> str | None:
    """Why a layer can be in no group, or None."""
    from .layer import Fused

    if not isinstance(layer, Fused):
        return "it does not run on fastlora"
    ups: Any = layer._modules["lora_B"]
    if len(ups) and all(up.bias is not None for up in ups.values()):
        return "lora_B has a bias, which is joined with the base's in each call"
    variants: Any = layer.lora_variant
    if len(ups) and all(name in variants for name in ups):
        return "DoRA layers compute alone"
    return None


def kinds() -> dict[type, tuple[type[Fused], type[Fused]]]:
    """PEFT's classes → ours, and ours for ``strict_dtype``; those for bitsandbytes where PEFT has imported its own."""
    from .layer import KINDS

    if "peft.tuners.lora.bnb" in sys.modules:
        from . import quantised  # noqa: F401
    return KINDS


def refusal(layer: Any) -> str | None:
    """Gives the reason why an adapter layer of peft can never run on fastlora, as it was built; None where it can."""
    from .dora import is_dora

    kind = type(layer)
    if kind not in kinds():
        return f"a {kind.__module__}.{kind.__name__} is not peft.tuners.lora.Linear itself"
    missing = [attribute for attribute in READ if not hasattr(layer, attribute)]
    if missing:
        return f"this version of peft has no {', '.join(missing)} in its LoRA layers: {_remedy()}"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (X-LoRA and accelerate's hooks do so)"
    if reason := kinds()[kind][0].base_refusal(layer.base_layer):
        return reason
    names = list(layer.lora_A)
    if names and all(name in layer.lora_variant and not is_dora(layer, name) for name in names):
        return variant(layer, names[0])
    return None


def _request(layer: Fused) -> Request | None:
    """What a layer asks of a kernel with the first of its active adapters; None where it has none, or no data."""
    peft: Any = layer
    base = peft.base_layer
    name = next((name for name in peft.active_adapters if name in peft.lora_A), None)
    if name is None or base.weight.device.type == "meta":
        return None
    a, n, dtype = peft.lora_A[name].weight, peft.out_features, layer.base_dtype(base)
    return Request("lora_matmul", base.weight.device, dtype, a.dtype, TOKENS, a.shape[1], n, a.shape[0], False)


def _remedy() -> str:
    return f"install peft {OLDEST} or later (tested with {OLDEST} and {NEWEST})"


def _warn_of(model: nn.Module, report: PatchReport) -> None:
    if not report.patched and not report.already_patched:
        if report.skipped:
            why = "; ".join(f"{count} × {reason}" for reason, count in report.reasons.most_common())
        elif own := next((type(module) for module in model.modules() if isinstance(module, Mergeable)), None):
            why = f"its {own.__name__} layers run on fastlora already"
        else:
            why = "it holds no adapter layers of peft: pass what get_peft_model returned, unmerged"
        _warn(f"patch_peft patched no layer of model: {why}")
    if report.trainable_base:
        _warn(
            f"{len(report.trainable_base)} patched layers have a trainable base weight "
            f"({listed(report.trainable_base)}): its gradient is computed too, at the cost of full fine-tuning. Freeze "
            "it (requires_grad_(False)) unless you mean to train it"
        )


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass get_peft_model's result")


def _warn(message: str) -> None:
    """Warns about the line of the first caller outside of this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_CALLERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
