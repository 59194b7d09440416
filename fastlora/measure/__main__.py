"""``python -m fastlora.measure --model CONFIG.json``: is fastlora faster for such a model, on this machine?"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import STEPS, measure
from .report import Measurement

_ABOUT = """\
Builds the model that a config.json of transformers describes, with random weights and PEFT's adapters, and measures its
training steps as PEFT runs them and on fastlora, by turns. Prints tokens/s, memory, the kernel and a verdict, which may
be no. For a model that you have in memory: fastlora.measure(model, batch).
"""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, which is 2 for what cannot be done.

    Args:
        arguments: of the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        measured = _measured(options)
        print(measured)
        if options.json is not None:
            options.json.write_text(json.dumps(measured.as_dict(), indent=1) + "\n", encoding="utf-8")
        if options.markdown is not None:
            _append(options.markdown, _section(options, measured))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measured(options: argparse.Namespace) -> Measurement:
    from .build import build, random_batch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(
            options.model,
            layers=options.layers,
            rank=options.rank,
            dropout=options.dropout,
            dtype=_DTYPES[options.dtype],
            tokens=options.tokens,
            device=device,
        )
    batch = random_batch(model, options.batch, options.tokens, device)
    return measure(model, batch, steps=options.steps, backward=not options.forward, mlp=options.mlp)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.measure", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, metavar="CONFIG.json", required=True, help="of transformers; or the folder that holds it"
    )
    parser.add_argument("--layers", type=_count, metavar="N", help="only the first of the stack; default: all")
    parser.add_argument("--tokens", type=_count, metavar="N", default=512, help="of a sequence; default: 512")
    parser.add_argument("--batch", type=_count, metavar="N", default=1, help="sequences; default: 1")
    parser.add_argument("--rank", type=_count, metavar="R", default=16, help="of the adapters; default: 16")
    parser.add_argument(
        "--dropout", type=_probability, metavar="P", default=0.05, help="of the adapters; default: 0.05"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the base; default: bf16")
    parser.add_argument("--steps", type=_count, metavar="N", default=STEPS, help=f"timed, of each; default: {STEPS}")
    parser.add_argument("--threads", type=_count, metavar="N", help="of torch on a CPU; default: torch's own number")
    parser.add_argument("--forward", action="store_true", help="the forward alone, in eval mode")
    parser.add_argument("--mlp", action="store_true", help="gated MLPs as one product, as patch_peft(mlp=True)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="add the report to this file")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _probability(text: str) -> float:
    try:
        p = float(text)
    except ValueError:
        p = -1.0
    if not 0 <= p < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up to, not including, 1, got {text!r}")
    return p


def _section(options: argparse.Namespace, measured: Measurement) -> str:
    """The command, all its defaults said, and what it printed."""
    said = [f"--{name} {value}" for name, value in vars(options).items() if name in _SAID and value is not None]
    said += [f"--{name}" for name in ("forward", "mlp") if getattr(options, name)]
    command = f"python -m fastlora.measure {' '.join(said)}"
    name = options.model.parent.name if options.model.name == "config.json" else options.model.stem
    heading = f"{name}, {options.dtype}, dropout {options.dropout:g}: {measured.verdict}"
    return f"## {heading}\n\n```\n$ {command}\n{measured}\n```\n"


_SAID = ("model", "layers", "tokens", "batch", "rank", "dropout", "dtype", "steps", "threads")


def _append(file: Path, section: str) -> None:
    before = file.read_text(encoding="utf-8") if file.exists() else "# Is it faster for my model?\n"
    file.write_text(f"{before}\n{section}", encoding="utf-8")


if __name__ == "__main__":
    # bitsandbytes, which PEFT imports, warns of a kernel for CPUs that is not installed; nothing here needs it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.exit(main())
