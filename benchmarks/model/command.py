"""``python -m benchmarks model``: whole training steps of real architectures, beside full fine-tuning and PEFT."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence

from fastlora.clock import Clock

from ..cases import DTYPES, ModelCase, Profile, Sweep
from ..layers.arm import absent
from ..measure import runner
from ..measure.runner import Doing, StopError, one_of, positive, probability
from ..records import plots
from ..records.rows import ModelRow
from ..records.tables import closing, opening
from .architectures import ARCHITECTURES, architecture_named, parameter_count
from .arms import arms
from .case import run_case
from .gate import ModelGate
from .table import LEGEND, render_case, render_summary
from .training import keep_imports

HELP = "time training steps of whole models beside full fine-tuning and PEFT"

# Work of a case beyond its products, in multiply-adds: building, checking and the profiler.
_FIXED_WORK = 2e9

_SWITCH = {"off": False, "on": True}


def _sweep(
    model: Sequence[str],
    batch: Sequence[int],
    sequence: Sequence[int],
    r: Sequence[int],
    dtype: Sequence[str],
    dropout: Sequence[float] = (0.0,),
    checkpointing: Sequence[bool] = (False,),
) -> Sweep:
    """Batches and sequences ascend: what ran out of memory is not tried at a larger size."""
    return dict(zip(ModelCase._fields, (model, batch, sequence, r, dtype, dropout, checkpointing), strict=True))


MODEL_PROFILES = {
    "cpu": {
        "quick": Profile(
            "three small models: a minute",
            rounds=15,
            seconds=2.5,
            kind=ModelCase,
            sweeps=(
                _sweep(["llama-tiny"], [1], [128, 256, 512], [8], ["fp32"]),
                _sweep(["gpt2-tiny", "roberta-tiny"], [1], [256], [8], ["fp32"]),
                _sweep(["llama-tiny"], [1], [256], [8], ["bf16"]),
                _sweep(["llama-tiny"], [1], [256], [8], ["fp32"], [0.0], [True]),
            ),
        ),
        "full": Profile(
            "the small models, GPT-2 and RoBERTa base: half an hour",
            rounds=9,
            seconds=45.0,
            kind=ModelCase,
            sweeps=(
                _sweep(["llama-tiny"], [1], [256, 512, 1024, 2048], [8], ["fp32", "bf16"], [0.0], [False, True]),
                _sweep(["llama-tiny"], [1, 2, 4, 8, 16], [256], [8], ["fp32"]),
                _sweep(["llama-tiny", "gpt2-tiny", "roberta-tiny"], [4], [256], [8], ["fp32", "bf16"], [0.0, 0.1]),
                _sweep(["llama-tiny", "gpt2-tiny"], [4], [256], [64], ["fp32"]),
                _sweep(["gpt2"], [1], [512], [8], ["fp32"]),
                _sweep(["roberta-base"], [4], [128], [8], ["fp32"]),
            ),
        ),
    },
    "cuda": {
        "quick": Profile(
            "8 layers of Llama-3 8B by sequence until memory ends, GPT-2 and RoBERTa base: five minutes",
            rounds=9,
            seconds=12.0,
            kind=ModelCase,
            sweeps=(
                _sweep(["llama3-8b-8layers"], [1], [2048, 4096, 8192, 16384, 32768, 65536], [16], ["bf16"]),
                _sweep(["llama3-8b-8layers"], [1], [8192], [16], ["bf16"], [0.0], [True]),
                _sweep(["gpt2"], [8], [1024], [16], ["bf16"]),
                _sweep(["roberta-base"], [32], [512], [16], ["bf16"]),
            ),
        ),
        "full": Profile(
            "more batches, sequences and ranks, dropout, and the whole of Llama-3 8B",
            rounds=15,
            seconds=30.0,
            kind=ModelCase,
            sweeps=(
                _sweep(
                    ["llama3-8b-8layers"],
                    [1],
                    [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072],
                    [16],
                    ["bf16"],
                    [0.0],
                    [False, True],
                ),
                _sweep(["llama3-8b-8layers"], [1, 2, 4, 8, 16, 32, 64], [2048], [16], ["bf16"], [0.0, 0.1]),
                _sweep(["llama3-8b-8layers"], [1], [8192], [64, 128], ["bf16"]),
                _sweep(["llama3-8b"], [1], [2048, 4096, 8192], [16], ["bf16"], [0.0], [False, True]),
                _sweep(["gpt2"], [1, 4, 16, 64], [1024], [16], ["bf16"], [0.0, 0.1]),
                _sweep(["roberta-base"], [8, 32, 128], [512], [16], ["bf16"], [0.0, 0.1]),
                _sweep(["gpt2", "roberta-base"], [8], [512], [16], ["fp32"]),
            ),
        ),
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options. An axis given on the command line replaces the profile's own."""
    runner.add_arguments(parser)
    axes = parser.add_argument_group("axes", "each replaces the profile's own; several values make a product")
    axes.add_argument("--model", nargs="+", type=model_name, metavar="NAME", help="models; see --list")
    axes.add_argument("--batch", nargs="+", type=positive, metavar="B", help="sequences a step")
    axes.add_argument("--sequence", nargs="+", type=positive, metavar="S", help="tokens a sequence")
    axes.add_argument("--rank", dest="r", nargs="+", type=positive, metavar="R", help="ranks")
    axes.add_argument(
        "--dtype", nargs="+", type=one_of(DTYPES), metavar="NAME", help=f"dtypes of the base: {', '.join(DTYPES)}"
    )
    axes.add_argument("--dropout", nargs="+", type=probability, metavar="P", help="dropout of the adapters")
    axes.add_argument("--checkpointing", nargs="+", choices=_SWITCH, help="activation checkpointing")
    runner.add_arm_option(parser, "only these", choices=arms())
    parser.add_argument("--rounds", type=positive, metavar="N", help="timings of each arm")
    parser.add_argument("--list", action="store_true", help="list profiles, models and arms, and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status: 1 where an arm was wrong or failed."""
    if args.list:
        about = {name: arm.about for name, arm in arms().items()}
        models = {"models (NAME-Nlayers: the first N layers alone)": _models()}
        print(runner.listing(MODEL_PROFILES, {**models, "arms": about}))
        return 0
    if importlib.util.find_spec("transformers") is None:
        raise StopError(2, "the models come from transformers, which is not installed: pip install transformers peft")
    chosen = [arm for name, arm in arms().items() if name in (args.arm or arms())]
    axes = {axis: getattr(args, axis) for axis in ModelCase._fields}
    axes |= {axis: axes[axis] and sorted(axes[axis]) for axis in ("batch", "sequence")}
    axes["checkpointing"] = args.checkpointing and [_SWITCH[word] for word in args.checkpointing]
    settings = {"arms": [arm.name for arm in chosen], "rounds": args.rounds}
    job = runner.start("model", args, MODEL_PROFILES, axes, settings, whole=not (args.arm or args.rounds))
    gate, clock, profile = ModelGate(job.device), Clock(job.device), job.profile
    keep_imports({case.model for case in job.cases})
    rounds = args.rounds or profile.rounds

    def case_rows(case: ModelCase, before: Sequence[ModelRow], doing: Doing) -> list[ModelRow]:
        return run_case(case, chosen, before, gate, rounds, profile.seconds, clock, job.device, doing)

    missing = absent(chosen, job.device)
    print(opening(LEGEND, missing))
    rows = job.measure(case_rows, render_case, _work)
    print(closing(render_summary(rows), rows, missing))
    job.publish([job.path, *plots.save(job.path)])
    return 1 if any(row.status in ("wrong", "error") for row in rows) else 0


def model_name(text: str) -> str:
    """An option's named model."""
    try:
        architecture_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _work(case: ModelCase) -> float:
    return case.batch * case.sequence * parameter_count(case.model) + _FIXED_WORK


def _models() -> dict[str, str]:
    return {name: f"{model.about}, {model.layers} layers" for name, model in ARCHITECTURES.items()}
