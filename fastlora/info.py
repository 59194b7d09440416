"""``python -m fastlora.info``: prints the environment, the tables, the kernels that would run, and why."""

from __future__ import annotations

import os
import platform

import torch

from . import __version__
from .backends import dropout_cpu, measured, triton
from .backends.machine import version as version
from .kernels.tiles import architecture
from .ops.linear import explain

PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "safetensors")
VARIABLES = (
    "FASTLORA_BACKEND",
    "FASTLORA_CACHE",
    "FASTLORA_CHECK",
    "FASTLORA_CUDA_LIBRARY",
    "FASTLORA_TABLE",
    "TRITON_INTERPRET",
)


def report() -> str:
    """Makes the text that ``python -m fastlora.info`` prints."""
    lines = [f"fastlora {__version__}, Python {platform.python_version()} on {platform.platform()}"]
    lines += [f"  {package:<14}{version(package) or 'not installed'}" for package in PACKAGES]
    lines.append(f"  {'CUDA':<14}{torch.version.cuda or 'this torch has none'}")
    for variable in VARIABLES:
        lines.append(f"  {variable:<24}{os.environ.get(variable, 'not set')}")
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
    lines.append("")
    for device in devices:
        for dtype, dropout_p in ((torch.bfloat16, 0.0), (torch.bfloat16, 0.1), (torch.float32, 0.0)):
            lines.append(_explained(device, dtype, dropout_p))
    return "\n".join(lines)


def _gpu(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, {architecture(triton.capability_of(device))}"


def _table(device: torch.device) -> str:
    sources = measured.sources_of(device)
    return "; ".join(map(str, sources)) or f"none: `{measured.COMMAND}` makes one"


def _explained(device: torch.device, dtype: torch.dtype, dropout_p: float) -> str:
    x = torch.empty(256, 1024, dtype=dtype, device=device)
    weight = torch.empty(1024, 1024, dtype=dtype, device=device)
    lora_a = torch.empty(16, 1024, dtype=dtype, device=device)
    try:
        return str(explain(x, weight, lora_a, lora_a.T, dropout_p=dropout_p))
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    print(report())
