"""The environment of a run: everything a reader needs to judge or repeat its numbers."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastlora import info
from fastlora.backends.machine import cpu_name
from fastlora.backends.machine import slug_of as slug_of

Environment = dict[str, Any]

_PACKAGES = (*info.PACKAGES, "loralib", "lorafusion", "unsloth", "freesolo-chalk", "lycoris-lora")
_VARIABLES = (*info.VARIABLES, "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE")
# Results are written between one published run and the next: they make no tree dirty.
_STATUS = ["git", "status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results"]
# Behind the commit in FASTLORA_COMMIT: the tree is a copy with changes.
_DIRTY = "-dirty"
# This folder, as git names it in a tree of ours.
_PREFIX = "benchmarks/records/"
# In a query of its own, since an older driver that does not know it answers nothing at all.
_THROTTLING = ("clocks_event_reasons.active",)
_GPU_FACTS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


# The record that begins every result file: its fields and their types.
SCHEMA: Mapping[str, Any] = {
    "time": str,
    "command": str,
    "settings": dict,
    "cases": int,
    "commit": str | None,
    "dirty": bool | None,
    "python": str,
    "platform": str,
    "packages": dict,
    "device": str,
    "device_name": str,
    "cpu": str,
    "cpu_count": int | None,
    "load_average": float | None,
    "threads": int,
    "gpu": dict | None,
    "flags": dict,
    "variables": dict,
}

# Fields that may differ in a resumed run.
_VOLATILE = ("time", "load_average", "gpu.clocks.sm", "gpu.clocks.mem", "gpu.temperature.gpu", "gpu.power.draw")


def describe(device: torch.device, command: str, settings: dict[str, Any], cases: int) -> Environment:
    """One JSON-ready record of a run of ``cases`` cases; facts that cannot be found out are None."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "settings": settings,
        "cases": cases,
        **_source(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: info.version(name) for name in _PACKAGES} | {"torch": str(torch.__version__)},
        "device": device.type,
        "device_name": device_name(device),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "load_average": _load(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu(device),
        "flags": {
            # The older switches cannot be read where somebody has set these.
            "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
            "fp32_precision_cpu": torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
            "bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            "fp16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            "preferred_blas": str(torch.backends.cuda.preferred_blas_library()),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
    }


def commit() -> str | None:
    """The commit of this tree, with ``-dirty`` behind it where there are local changes; None where nobody knows."""
    source = _source()
    return f"{source['commit']}-dirty" if source["commit"] and source["dirty"] else source["commit"]


def _source() -> dict[str, Any]:
    """Commit and whether there are local changes: of ``FASTLORA_COMMIT``, else of git, where this is its tree."""
    if named := os.environ.get("FASTLORA_COMMIT"):
        return {"commit": named.removesuffix(_DIRTY), "dirty": named.endswith(_DIRTY)}
    # A copy inside another repository is not of that one's commit.
    if _run(["git", "rev-parse", "--show-prefix"]) != _PREFIX:
        return {"commit": None, "dirty": None}
    status = _run(_STATUS)
    return {"commit": _run(["git", "rev-parse", "HEAD"]), "dirty": None if status is None else bool(status)}


def check(environment: Environment) -> None:
    """Raises ValueError where a field is missing, unknown or of another type; the message names it."""
    missing, unknown = sorted(set(SCHEMA) - set(environment)), sorted(set(environment) - set(SCHEMA))
    if missing or unknown:
        raise ValueError(f"environment: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
    for name, kind in SCHEMA.items():
        if not isinstance(environment[name], kind):
            raise ValueError(
                f"environment: {name} must be {getattr(kind, '__name__', kind)}, got {environment[name]!r}"
            )


def differences(before: Environment, after: Environment) -> list[str]:
    """Lists the differences of two environments, as ``name: before → after``, without load, clocks and the hour."""
    old, new = _flat(before), _flat(after)
    return [f"{k}: {old.get(k)} → {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]


def seen(device: torch.device) -> dict[str, Any]:
    """The facts that change during a run: the GPU's clocks, their limits, heat and power, or the CPU's load."""
    if device.type == "cuda":
        moving = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
        return {"gpu": _query(device, moving) | _query(device, _THROTTLING)}
    return {"load_average": _load()}


def _flat(environment: Environment, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in environment.items():
        name = prefix + key
        if name not in _VOLATILE:
            flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


@contextmanager
def variables_set(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables for a while; None unsets."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def device_name(device: torch.device) -> str:
    """The maker's name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def machine(environment: Environment) -> str:
    """The name of the machine it ran on."""
    name: str = environment["device_name"]
    return f"{name} ({environment['threads']} threads)" if environment["device"] == "cpu" else name


def slug(device: torch.device) -> str:
    """The device's folder under ``results/``: ``cpu``, or the GPU's name, such as ``nvidia-h200``."""
    return "cpu" if device.type == "cpu" else slug_of(device_name(device))


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        **_query(device, _GPU_FACTS),
    }


def _query(device: torch.device, facts: Sequence[str]) -> dict[str, str]:
    """Facts from nvidia-smi about the device; empty where it gives none."""
    uuid = torch.cuda.get_device_properties(device).uuid
    answers = _run(["nvidia-smi", f"--query-gpu={','.join(facts)}", "--format=csv,noheader", f"--id=GPU-{uuid}"])
    values = answers.split(", ") if answers else []
    return dict(zip(facts, values, strict=True)) if len(values) == len(facts) else {}


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _run(command: Sequence[str]) -> str | None:
    """Standard output of a command run in this repository; None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
