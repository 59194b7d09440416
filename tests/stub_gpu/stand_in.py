"""``torch.cuda`` without a GPU: every tensor says that it is on ``cuda:0``, and lies on the CPU.

What asks a tensor or ``torch.cuda`` about devices takes the path it would take on a GPU; what torch computes, it
computes on the CPU. Streams and events are the host's clock, graphs replay nothing, the memory counters stand still.
For a process of its own: nothing is undone.
"""

from __future__ import annotations

import contextlib
import os
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
NAME = "NVIDIA H100 80GB HBM3"
MULTIPROCESSORS = 132

_PROPERTIES = types.SimpleNamespace(
    name=NAME,
    multi_processor_count=MULTIPROCESSORS,
    total_memory=85 * 10**9,
    L2_cache_size=50 << 20,
    uuid="00000000-0000-0000-0000-000000000000",
    warp_size=32,
)

# What a tensor answers for its device.
_ANSWERS: dict[Any, Any] = {
    torch.Tensor.device.__get__: DEVICE,
    torch.Tensor.is_cuda.__get__: True,
    torch.Tensor.is_cpu.__get__: False,
}


def capability() -> int:
    """As a number, 90 for sm_90; the stub driver reads the same variable."""
    return int(os.environ.get("STUB_GPU_CAPABILITY", "90"))


class Event:
    """A moment of the host's clock; the device is never seen to be done before the host is."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at: float | None = None

    def record(self, stream: object = None) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        assert self._at is not None, "the first event was never recorded"
        assert end._at is not None, "the second event was never recorded"
        return 1e3 * (end._at - self._at)


class Stream:
    """The only stream."""

    cuda_stream = 0
    device = DEVICE
    device_index = 0

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """A captured graph, which replays nothing."""

    def replay(self) -> None:
        pass


class OnTheCpu(TorchFunctionMode):
    """Answers for tensors, and sends what is asked of the GPU to the CPU."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ANSWERS:
            return _ANSWERS[func]
        if func is torch.Tensor.get_device:
            return 0
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args = tuple(_on_cpu(value) for value in args)
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if func is torch.mm and "out_dtype" in kwargs:
            # For CUDA tensors alone.
            return torch.mm(*(q.to(kwargs["out_dtype"]) for q in args))
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    return value


def enter() -> None:
    """Puts the stand-in in the place of ``torch.cuda``, for the rest of the process."""
    mode = OnTheCpu()
    mode.__enter__()
    _re_enter_in_backward(mode)
    _PROPERTIES.major, _PROPERTIES.minor = divmod(capability(), 10)
    for name, value in _functions().items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch._C._cuda_isCurrentStreamCapturing = lambda: False
    generator = torch.Generator

    class Generator(generator):
        def __new__(cls, device: object = "cpu") -> torch.Generator:
            return generator.__new__(generator, device=_on_cpu(device))

    torch.Generator = Generator
    _see_through_in_checkpoints()
    load = torch.load
    torch.load = lambda file, map_location=None, **options: load(file, map_location=_on_cpu(map_location), **options)


def _re_enter_in_backward(mode: OnTheCpu) -> None:
    """``torch.autograd.grad`` runs with the mode suspended, and the formulas of a backward need it."""
    run = torch.autograd._engine_run_backward

    def run_in_mode(*args: Any, **options: Any) -> Any:
        with mode:
            return run(*args, **options)

    torch.autograd._engine_run_backward = run_in_mode


def _see_through_in_checkpoints() -> None:
    """A checkpoint compares where tensors are inside operators, with the mode suspended, and outside of them."""
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    extract = checks["default"]

    def extracted(x: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            return extract(x)

    checks["default"] = extracted


def _answers(value: Any) -> Callable[..., Any]:
    """A function of its own: dynamo keeps a table of torch's, in which none may stand twice."""
    return lambda *args, **options: value


def _context() -> Callable[..., Any]:
    @contextlib.contextmanager
    def entered(*args: object, **options: object) -> Iterator[None]:
        yield

    return entered


def _functions() -> dict[str, Any]:
    """The names of ``torch.cuda`` that are replaced."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_properties": _PROPERTIES,
        "get_device_capability": divmod(capability(), 10),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "memory_allocated": 1 << 20,
        "max_memory_allocated": 1 << 21,
        "memory_reserved": 1 << 21,
        "max_memory_reserved": 1 << 21,
        "current_stream": Stream(),
        "default_stream": Stream(),
    }
    nothing = ("init", "_lazy_init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep")
    return {
        **{name: _answers(value) for name, value in answers.items()},
        **{name: _answers(None) for name in (*nothing, "manual_seed", "manual_seed_all")},
        **{name: _context() for name in ("device", "stream", "graph")},
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "default_generators": (),
    }
