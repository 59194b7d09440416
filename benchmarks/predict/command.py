"""``python -m benchmarks predict``: predicts each design's FLOPs, bytes, time and ratio for a layer; needs no GPU.

The model and its omissions: benchmarks/predict/cost.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..cases import DTYPES, GROUPS, LAYERS, MLPS, MODES, Case
from ..measure.runner import layer_name, number, one_of, positive
from .cost import DESIGNS, TOGETHER, Device, Kernel, Problem, designs, gemm, in_whole_waves, kernels, minimum

HELP = "predict what each design costs over the frozen layer, from FLOPs and bytes"

# An H200 sustains 790 of its specified 989 TFLOP/s and 4.3 of 4.8 TB/s; other GPUs are taken to keep the same shares.
_FLOPS_SHARE, _BYTES_SHARE = 0.8, 0.9


def _specified(name: str, half_tflops: float, fp32_tflops: float, tbytes: float, sms: int) -> Device:
    half, single = _FLOPS_SHARE * half_tflops * 1e12, _FLOPS_SHARE * fp32_tflops * 1e12
    basis = f"{_FLOPS_SHARE:.0%} of the specified FLOP/s, {_BYTES_SHARE:.0%} of the bytes/s; not measured"
    return Device(name, basis, {"bf16": half, "fp16": half, "fp32": single}, _BYTES_SHARE * tbytes * 1e12, sms)


# Half precision accumulates in fp32. fp32 is IEEE, torch's default, on the CUDA cores, and specified on every GPU.
DEVICES = {
    device.name: device
    for device in (
        # cuBLAS bf16 at 8192³ on random data (788 to 797 in published runs), and a device copy.
        _specified("h200", 989.5, 67, 4.8, 132)._replace(
            basis="published measurements; fp32 from the specification",
            flops={"bf16": 790e12, "fp16": 790e12, "fp32": _FLOPS_SHARE * 67e12},
            bytes_per_s=4.3e12,
        ),
        # NVIDIA H100 data sheet, SXM5.
        _specified("h100", 989.5, 67, 3.35, 132),
        # NVIDIA A100 data sheet, SXM4 with 80 GB.
        _specified("a100", 312, 19.5, 2.039, 108),
        # NVIDIA HGX B200 data sheet, one of its eight GPUs.
        _specified("b200", 2250, 75, 7.7, 148),
        # NVIDIA Ada GPU architecture white paper, appendix A.
        _specified("rtx-4090", 165.2, 82.6, 1.008, 128),
    )
}


# Layers and ranks.
PROFILES = {
    "quick": (("llama3-8b.q", "llama3-70b.gate", "llama3-8b.kv", "llama3-8b.qkv"), (16, 64)),
    "full": (tuple(name for name in (*LAYERS, *GROUPS) if name.startswith(("llama3-", "qwen"))), (8, 16, 64, 128)),
}


_KNOWN = {name: design.about for name, design in DESIGNS.items()}
_KNOWN |= {name: design.about for name, design in TOGETHER.items()}
_NAME = max(map(len, _KNOWN))


@dataclass(frozen=True)
class Prediction:
    """One design in one mode of one case.

    Attributes:
        layer, m, k, n, r, dtype: the case; of several layers ``n`` is their sum.
        device, flops_per_s, bytes_per_s, sms: the device it is predicted for.
        design, mode: one of DESIGNS or TOGETHER; forward, backward or step.
        launches: how many kernels; the gaps between them are not in ``ms``.
        flops, bytes: over all kernels.
        arithmetic_ms, bandwidth_ms: the time of the FLOPs by themselves, and of the bytes.
        compulsory_bytes: each argument and result of the LoRA layer moved once, the same for every design.
        ms: the sum over kernels of the longer of arithmetic and traffic.
        ratio: ``ms`` over that of ``frozen``.
        theory: the FLOP minimum over the frozen layer's FLOPs, the same for every design.
    """

    layer: str
    m: int
    k: int
    n: int
    r: int
    dtype: str
    device: str
    flops_per_s: float
    bytes_per_s: float
    sms: int
    design: str
    mode: str
    launches: int
    flops: float
    bytes: float
    arithmetic_ms: float
    bandwidth_ms: float
    compulsory_bytes: float
    ms: float
    ratio: float
    theory: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options. An axis given on the command line replaces the profile's own."""
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="quick",
        help="full: every Llama-3 and Qwen layer and group",
    )
    axes = parser.add_argument_group("axes", "each replaces the profile's own; several values make a product")
    axes.add_argument("--layer", nargs="+", type=_layer, metavar="NAME", help="named layers, KxN, or KxN+N")
    axes.add_argument("--tokens", nargs="+", type=positive, default=[8192], metavar="M", help="tokens (default: 8192)")
    axes.add_argument("--rank", nargs="+", type=positive, metavar="R", help="ranks")
    parser.add_argument(
        "--design",
        nargs="+",
        type=one_of(_KNOWN),
        default=list(_KNOWN),
        metavar="NAME",
        help=f"only these of {', '.join(_KNOWN)}",
    )
    parser.add_argument(
        "--mode", nargs="+", type=one_of(MODES), default=MODES, metavar="NAME", help=f"only these of {', '.join(MODES)}"
    )
    parser.add_argument(
        "--dtype",
        type=one_of(DTYPES),
        default="bf16",
        metavar="NAME",
        help=f"of base and adapters: {', '.join(DTYPES)} (default: bf16)",
    )
    parser.add_argument(
        "--device",
        type=lambda text: one_of(DEVICES)(text.lower()),
        default="h200",
        metavar="NAME",
        help=f"{', '.join(DEVICES)} (default: h200)",
    )
    rates = parser.add_argument_group("another device", "each replaces the device's own")
    rates.add_argument("--flops", type=_rate, metavar="TFLOP/S", help="what it sustains in the dtype, in 10^12 FLOP/s")
    rates.add_argument("--bandwidth", type=_rate, metavar="TB/S", help="what it sustains, in 10^12 bytes/s")
    rates.add_argument("--sms", type=positive, metavar="COUNT", help="streaming multiprocessors")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write a JSON line for each case, design and mode")


def run(args: argparse.Namespace) -> int:
    """Prints a block for each case; returns the exit status."""
    device = _device(args)
    layers, ranks = PROFILES[args.profile]
    axes = itertools.product(args.layer or layers, args.tokens, args.rank or ranks)
    blocks = {
        case: [row for row in predict(case, device) if row.design in args.design and row.mode in args.mode]
        for case in (Case(name, m, r, args.dtype, dropout=0.0) for name, m, r in axes)
    }
    print(
        f"Predictions for {device.name}: {device.flops[args.dtype] / 1e12:g} TFLOP/s {args.dtype}, "
        f"{device.bytes_per_s / 1e12:g} TB/s, {device.sms} SMs ({device.basis})\n"
    )
    for case, rows in blocks.items():
        only = f"{case}: {', '.join(args.design)} take layers of one input"
        print(render(case, rows, device) if rows else only, end="\n\n")
    print("\n".join(f"  {name:<{_NAME}}  {_KNOWN[name]}" for name in args.design))
    if args.json:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(asdict(row)) + "\n" for rows in blocks.values() for row in rows)
            args.json.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            print(f"--json {args.json}: {error.strerror}", file=sys.stderr)
            return 2
        print(f"\nwrote {args.json}")
    return 0


def predict(case: Case, device: Device) -> Iterator[Prediction]:
    """Every design in every mode."""
    problems = _problems(case, device)
    least = {mode: kernel.bytes for mode, kernel in minimum(*problems).items()}
    least["step"] = sum(least.values())
    frozen: dict[str, float] = {}
    for design in designs(problems):
        for mode, launches in kernels(design, *problems).items():
            seconds = sum(kernel.seconds(device, case.dtype) for kernel in launches)
            flops, moved = sum(kernel.flops for kernel in launches), sum(kernel.bytes for kernel in launches)
            yield Prediction(
                layer=case.layer,
                m=case.m,
                k=case.k,
                n=case.n,
                r=case.r,
                dtype=case.dtype,
                device=device.name,
                flops_per_s=device.flops[case.dtype],
                bytes_per_s=device.bytes_per_s,
                sms=device.sms,
                design=design,
                mode=mode,
                launches=len(launches),
                flops=flops,
                bytes=moved,
                arithmetic_ms=1e3 * flops / device.flops[case.dtype],
                bandwidth_ms=1e3 * moved / device.bytes_per_s,
                compulsory_bytes=least[mode],
                ms=1e3 * seconds,
                ratio=seconds / frozen.setdefault(mode, seconds),
                theory=case.theory(mode),
            )


def render(case: Case, rows: Sequence[Prediction], device: Device) -> str:
    """The case's FLOPs, bytes and their times, then each design's ratio in each mode, and a step's milliseconds."""
    problems = _problems(case, device)
    gemms = [gemm(problem) for problem in problems]
    floors = {"frozen, either way": Kernel(sum(each.flops for each in gemms), sum(each.bytes for each in gemms))}
    floors |= {f"minimum {mode}": kernel for mode, kernel in minimum(*problems).items()}
    lines = [str(case), f"  {'':<{_NAME}}{'GFLOP':>10}{'MB':>10}{'arithmetic ms':>16}{'bandwidth ms':>16}"]
    for name, kernel in floors.items():
        arithmetic, traffic = kernel.flops / device.flops[case.dtype], kernel.bytes / device.bytes_per_s
        lines.append(
            f"  {name:<{_NAME}}{kernel.flops / 1e9:>10.1f}{kernel.bytes / 1e6:>10.1f}"
            f"{1e3 * arithmetic:>16.4f}{1e3 * traffic:>16.4f}"
        )
    modes = list(dict.fromkeys(row.mode for row in rows))
    lines.append(f"  {'× frozen':<{_NAME}}" + "".join(f"{mode:>10}" for mode in modes) + f"{modes[-1] + ' ms':>14}")
    least = [case.theory(mode) for mode in modes]
    lines.append(f"  {'theory (FLOPs only)':<{_NAME}}" + "".join(f"{ratio:>10.3f}" for ratio in least))
    for design in dict.fromkeys(row.design for row in rows):
        by_mode = {row.mode: row for row in rows if row.design == design}
        ratios = "".join(f"{by_mode[mode].ratio:>10.3f}" for mode in modes)
        lines.append(f"  {design:<{_NAME}}{ratios}{by_mode[modes[-1]].ms:>14.4f}")
    if len(problems) == 1:
        ratios_in_waves = in_whole_waves(problems[0], device, case.dtype)
        waves = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios_in_waves.items())
        lines.append(f"  forward in whole waves of tiles, 2 µs for a second launch: {waves}")
    return "\n".join(lines)


def _problems(case: Case, device: Device) -> list[Problem]:
    """The problem of each of a case's layers."""
    itemsize = DTYPES[case.dtype].itemsize
    return [Problem(of.m, of.k, of.n, of.r, itemsize, device.sms) for of in case.branches]


def _device(args: argparse.Namespace) -> Device:
    """The device named, with the command line's own rates in place of its."""
    device: Device = DEVICES[args.device]
    given = [f"--{name}" for name in ("flops", "bandwidth", "sms") if getattr(args, name)]
    if not given:
        return device
    return Device(
        device.name,
        f"{', '.join(given)} as given; else {device.basis}",
        {**device.flops, args.dtype: 1e12 * args.flops} if args.flops else device.flops,
        1e12 * args.bandwidth if args.bandwidth else device.bytes_per_s,
        args.sms or device.sms,
    )


def _layer(text: str) -> str:
    name = layer_name(text)
    if name in MLPS:
        raise argparse.ArgumentTypeError(f"no design here is of a whole MLP such as {name}: expected a layer or group")
    return name


def _rate(text: str) -> float:
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
