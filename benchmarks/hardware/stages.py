"""The stages of a run on a GPU: what each starts, how long it should take on an H100, and when it is ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastlora.backends import dispatch

# Every kernel but the reference, by name.
KERNELS = tuple(kernel.name for kernel in dispatch.KERNELS["lora_matmul"] if kernel.name != "reference")
# What may still be timed after a timing stage hung or lost the GPU: no flags, no tensor copies, no waiting.
EASY = ("library", "triton-skinny")

_ARMS = ("plain", "addmm", "peft-same", "peft-fp32", "full", "fastlora", "fastlora-fp32")
_TRITON_TESTS = tuple(f"tests/kernels/test_{name}.py" for name in ("skinny", "skinny_group", "kernels"))
_CUDA = tuple(name for name in KERNELS if name.startswith("cuda"))
_CUDA_TESTS = "tests/csrc/test_cuda_kernels.py"
_SWIGLU_TESTS = "tests/kernels/test_swiglu.py"
_PORTABLE = "portable or rank_grad or mask_bits or swiglu"


class Sizes(NamedTuple):
    """How large what is timed is; ``stall`` are the seconds without a word after which a test counts as hung."""

    layers: Sequence[str] = ("llama3-8b.q", "llama3-8b.kv", "llama3-8b.down", "llama3-70b.gate")
    tokens: int = 8192
    model: str = "llama3-8b-8layers"
    sequence: int = 4096
    rounds: int = 9
    sweep_n: int = 4096
    sweep_ks: Sequence[int] = (1024, 2048, 4096, 8192, 16384)
    copy_bytes: int = 1 << 32
    stall: float = 90.0


class Context(NamedTuple):
    """What a stage knows of the run: where files go, the sizes, and the kernels that it may use."""

    work: Path
    sizes: Sizes
    kernels: Sequence[str]


Arguments = Callable[[Context], list[str]]


@dataclass(frozen=True)
class Stage:
    """One process, or for tests one after another until each has run.

    Attributes:
        arguments: of the interpreter; for tests those of pytest.
        seconds, limit: as expected on one H100, and the most it may take.
        kind: ``module``, ``tests``, ``timing`` (without kernels that failed) or ``memcheck`` (tests, sanitized).
        workers: processes of a parallel run of tests.
        of: the kernels that it is about; empty for all.
    """

    name: str
    about: str
    seconds: float
    limit: float
    arguments: Arguments
    kind: str = "module"
    workers: int = 8
    of: tuple[str, ...] = field(default=())

    @property
    def is_tests(self) -> bool:
        """True where pytest runs."""
        return self.kind in ("tests", "memcheck")


def _module(name: str, *options: str) -> Arguments:
    return lambda c: ["-m", name, *options]


def _written(name: str, stage: str, *options: str) -> Arguments:
    """A module that writes JSON to the stage's own file."""
    return lambda c: ["-m", name, *options, "--json", str(c.work / f"{stage}.json")]


def _tests(*arguments: str) -> Arguments:
    return lambda c: list(arguments)


def _cuda_tests(c: Context) -> list[str]:
    others = [name.removeprefix("cuda-") for name in _CUDA if name not in c.kernels]
    return [_CUDA_TESTS, *(["-k", f"not ({' or '.join(others)})"] if others else [])]


def _ceilings(c: Context) -> list[str]:
    sizes = c.sizes
    numbers = ["--bytes", str(sizes.copy_bytes), "--tokens", str(sizes.tokens), "--layer", *sizes.layers]
    return ["-m", "benchmarks.hardware.ceilings", *numbers, "--json", str(c.work / "ceilings.json")]


def _sweep(c: Context) -> list[str]:
    sizes = c.sizes
    numbers = ["--m", str(sizes.tokens), "--n", str(sizes.sweep_n), "--k", *map(str, sizes.sweep_ks)]
    path = str(c.work / "sweep.json")
    return ["-m", "benchmarks.hardware.sweep", *numbers, "--kernels", *c.kernels, "--json", path]


def _layers(stage: str, rank: int, dropout: float, *options: str) -> Arguments:
    def arguments(c: Context) -> list[str]:
        axes = ["--layer", *c.sizes.layers, "--tokens", str(c.sizes.tokens), "--rank", str(rank), "--dtype", "bf16"]
        axes += ["--dropout", f"{dropout:g}", "--rounds", str(c.sizes.rounds), *options]
        arms = ["--arm", *_ARMS, *(f"fastlora-{name}" for name in c.kernels)]
        path = str(c.work / f"{stage}.jsonl")
        return ["-m", "benchmarks", "layers", "--device", "cuda", *axes, *arms, "--json", path]

    return arguments


def _model(c: Context) -> list[str]:
    axes = ["--model", c.sizes.model, "--batch", "1", "--sequence", str(c.sizes.sequence), "--rank", "16"]
    axes += [
        "--dtype",
        "bf16",
        "--dropout",
        "0",
        "--checkpointing",
        "off",
        "--rounds",
        str(max(1, c.sizes.rounds // 2)),
    ]
    arms = ["--arm", "full", "peft-same", "peft-fp32", "fastlora", *(f"fastlora-{name}" for name in c.kernels)]
    return ["-m", "benchmarks", "model", "--device", "cuda", *axes, *arms, "--json", str(c.work / "model.jsonl")]


_STEPS = "test_step_against_the_oracle or group_step or fp32_adapters or inside_16_bytes"
_CHECKED = (
    "off_the_tile or (every_tile_design_and_mask and product and forward and bf16) or every_kernel_with_every_mask"
)
_GPU, _AROUND = "tests/test_gpu.py", "tests/test_gpu_integration.py"

# In this order: the smallest kernels first, times after proofs, the sanitizer last.
STAGES = (
    Stage("facts", "versions, GPU, clocks", 10, 60, _written("benchmarks.hardware.facts", "facts")),
    Stage("build", "csrc, by nvcc", 25, 150, lambda c: ["csrc/build.py"]),
    Stage("ceilings", "copy bandwidth, and cuBLAS at the layers' shapes", 12, 60, _ceilings),
    Stage("info", "which kernel would run, and why no other", 8, 60, _module("fastlora.info")),
    Stage(
        "library",
        "library against fp64",
        12,
        90,
        _tests(_AROUND, "-k", "library_step or mask_is"),
        "tests",
        4,
        ("library",),
    ),
    Stage(
        "skinny",
        "triton-skinny and each of its kernels",
        30,
        90,
        _tests(*_TRITON_TESTS, "-k", f"skinny and not ({_PORTABLE})"),
        "tests",
        of=("triton-skinny",),
    ),
    Stage(
        "portable",
        "triton-portable, rank_grad, masks, the gated activation",
        25,
        90,
        _tests(*_TRITON_TESTS, _SWIGLU_TESTS, "-k", _PORTABLE),
        "tests",
        of=("triton-portable", "triton-skinny", "triton-serial"),
    ),
    Stage(
        "serial",
        "triton-serial, and the rest of Triton's tests",
        25,
        90,
        _tests("tests/kernels/test_kernels.py", "-k", f"not (skinny or {_PORTABLE})"),
        "tests",
        of=("triton-serial",),
    ),
    Stage("cuda", "the CUDA kernels", 25, 90, _cuda_tests, "tests", of=_CUDA),
    Stage("real", "whole steps at real sizes against fp64", 45, 120, _tests(_GPU, "-k", _STEPS), "tests", 6),
    Stage("graphs", "graphs, streams, 100 equal runs", 25, 90, _tests(_GPU, "-k", f"not ({_STEPS})"), "tests", 6),
    Stage(
        "around",
        "autocast, checkpointing, compile, PEFT",
        45,
        120,
        _tests(_AROUND, "-k", "not (library_step or mask_is)"),
        "tests",
    ),
    Stage("layers", "four layers, R = 16", 60, 130, _layers("layers", 16, 0.0), "timing"),
    Stage("sweep", "each GEMM core by K, beside cuBLAS", 15, 60, _sweep, "timing"),
    Stage("dropout", "the same with dropout 0.1", 35, 80, _layers("dropout", 16, 0.1, "--mode", "step"), "timing"),
    Stage("model", "eight layers of Llama-3 8B", 55, 110, _model, "timing"),
    Stage("rank64", "the layers at R = 64", 30, 80, _layers("rank64", 64, 0.0, "--mode", "step"), "timing"),
    Stage(
        "rank64-dropout", "and with dropout 0.1", 30, 80, _layers("rank64-dropout", 64, 0.1, "--mode", "step"), "timing"
    ),
    Stage(
        "memcheck",
        "our kernels under compute-sanitizer",
        50,
        150,
        _tests(*_TRITON_TESTS, _CUDA_TESTS, "-k", _CHECKED),
        "memcheck",
    ),
)
NAMES = tuple(stage.name for stage in STAGES)
# What --only takes for several.
GROUPS = {"tests": ("build", "info", *(stage.name for stage in STAGES if stage.kind == "tests"))}
TIMED = tuple(stage.name for stage in STAGES if stage.kind == "timing")
