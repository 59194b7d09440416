"""``python -m fastlora.info``: prints the environment, the tables, the kernels that would run, and why."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

import torch

from . import __version__, variables
from .backends import dropout_cpu, measured, triton
from .backends.machine import version as version
from .kernels.tiles import architecture
from .ops.linear import explain

PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "safetensors")
VARIABLES = (*variables.READ, "TRITON_INTERPRET")


def report() -> str:
    """Makes the text that ``python -m fastlora.info`` prints."""
    lines = [f"fastlora {__version__}, Python {platform.python_version()} on {platform.platform()}"]
    lines += [f"  {package:<14}{version(package) or 'not installed'}" for package in PACKAGES]
    lines.append(f"  {'CUDA':<14}{torch.version.cuda or 'this torch has none'}")
    for variable in VARIABLES:
        lines.append(f"  {variable:<24}{os.environ.get(variable, 'not set')}")
    lines += [f"  {name:<24}{why}" for name, why in variables.unknown().items()]
    built = dropout_cpu.is_built()
    lines.append(f"  {'CPU code':<14}{'built' if built else 'not built: dropout on a CPU takes torch operators'}")
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        lines.append(f"  {device!s:<14}{_gpu(device)}")
    if not devices:
        lines.append("  no CUDA GPU: everything runs on the CPU")
    devices.append(torch.device("cpu"))
    for device in devices:
        lines.append(f"  {f'table of {device}':<24}{_table(device)}")
    return "\n".join([*lines, "", *_explained(devices)])


def _gpu(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, {architecture(triton.capability_of(device))}"


def _table(device: torch.device) -> str:
    sources = measured.sources_of(device)
    return "; ".join(map(str, sources)) or f"none: `{measured.COMMAND}` makes one"


def _explained(devices: Sequence[torch.device]) -> list[str]:
    """What would run a few usual calls; what the kernels answer, and what is wrong, once for all calls alike."""
    headings: dict[str, list[str]] = {}
    for device in devices:
        for dtype, dropout_p in ((torch.bfloat16, 0.0), (torch.bfloat16, 0.1), (torch.float32, 0.0)):
            x = torch.empty(256, 1024, dtype=dtype, device=device)
            weight = torch.empty(1024, 1024, dtype=dtype, device=device)
            lora_a = torch.empty(16, 1024, dtype=dtype, device=device)
            try:
                explanation = explain(x, weight, lora_a, lora_a.T, dropout_p=dropout_p)
                headings.setdefault(explanation.answers, []).append(explanation.heading)
            except RuntimeError as error:
                headings.setdefault(str(error), [])
    return [line for answers, calls in headings.items() for line in (*calls, answers)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.info",
        description="Prints the versions, variables and tables in use, which kernel would run a few usual calls on "
        "each device, and what every other one answers.",
    )
    parser.parse_args(arguments)
    print(report())


if __name__ == "__main__":
    main()
