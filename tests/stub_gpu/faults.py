"""Launches into the stub driver that are wrong on purpose, and two that are right: prints each one's error, or null."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.stub_gpu import launch, stand_in

_CLUSTER_DIMENSION = 4
_MAX_DYNAMIC_SHARED = 8


@triton.jit
def _copy(x_desc, y_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(y_ptr + m[:, None] * BLOCK_N + n[None, :], x_desc.load([0, 0]))


class Attribute(ctypes.Structure):
    """``CUlaunchAttribute``: of its values the dimensions of a cluster alone."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("sides", ctypes.c_uint * 16))


class Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


class Driver:
    """The stub driver, called by hand."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def _raise(self, code: int) -> None:
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError((text.value or b"").decode())

    def ask_for_shared(self, function: int, size: int) -> None:
        self._raise(self._library.cuFuncSetAttribute(ctypes.c_void_p(function), _MAX_DYNAMIC_SHARED, size))

    def launch(
        self,
        function: int,
        sizes: tuple[int, ...],
        *,
        grid: tuple[int, int, int] = (2, 1, 1),
        threads: int = 128,
        cluster: int | None = None,
        shared: int = 0,
        dropped: int = 0,
    ) -> None:
        """Launches with arguments of these sizes that are not zero, the last ones missing."""
        values = [(ctypes.c_ubyte * size)(*[1] * size) for size in sizes]
        pointers = [ctypes.addressof(value) for value in values[: len(sizes) - dropped]] + [0] * dropped
        arguments = (ctypes.c_void_p * len(sizes))(*pointers)
        attribute = Attribute(id=_CLUSTER_DIMENSION, sides=(cluster or 1, 1, 1))
        config = Config(grid, (threads, 1, 1), shared, None, ctypes.pointer(attribute), cluster is not None)
        self._raise(self._library.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), arguments, None))


@triton.jit
def _add_one(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < size) + 1, mask=i < size)


def product_with_wrong_strides() -> None:
    """A call of ``triton-serial`` whose every tensor map has rows that start on 8 bytes."""
    from fastlora.backends import dispatch

    kernel = next(kernel for kernel in dispatch.KERNELS["lora_matmul"] if kernel.name == "triton-serial")
    right = TensorDescriptor.from_tensor

    def wrong(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
        descriptor = right(tensor, block)
        descriptor.strides = [descriptor.strides[0] + 4, 1]
        return descriptor

    TensorDescriptor.from_tensor = staticmethod(wrong)
    try:
        call = launch.Call()
        outcome = launch.outcome_of(ctypes.CDLL("libcuda.so.1"), kernel, "lora_matmul", call, *launch.product(call))
    finally:
        TensorDescriptor.from_tensor = staticmethod(right)
    if outcome.error is not None:
        raise RuntimeError(outcome.error)


def main() -> None:
    """Plants each fault, through Triton's launcher or by the driver's own calls."""
    stand_in.enter()
    driver = Driver()
    x, y = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64, dtype=torch.bfloat16)
    function = _add_one[(2,)](x, y, 100, BLOCK=128).function
    # x, y, size and Triton's two pointers to scratch memory.
    sizes = (8, 8, 4, 8, 8)

    def described(**changes: Any) -> Callable[[], object]:
        def run() -> object:
            descriptor = TensorDescriptor.from_tensor(x, [64, 64])
            for name, value in changes.items():
                setattr(descriptor, name, value)
            return _copy[(1,)](descriptor, y, BLOCK_M=64, BLOCK_N=64)

        return run

    def by_hand(**options: Any) -> Callable[[], object]:
        return lambda: driver.launch(function, sizes, **options)

    faults: dict[str, Callable[[], object]] = {
        "none": described(),
        "none_by_hand": by_hand(cluster=2),
        "map_stride": described(strides=[68, 1]),
        "map_stride_of_a_product": product_with_wrong_strides,
        "map_base": described(base=x.view(-1)[4:]),
        "null_pointer": lambda: _add_one[(2,)](torch.empty(0, dtype=torch.bfloat16), y, 100, BLOCK=128),
        "argument_missing": by_hand(dropped=3),
        "argument_missing_in_python": lambda: _add_one[(2,)](x, 100, BLOCK=128),
        "cluster_of_the_grid": by_hand(grid=(3, 1, 1), cluster=2),
        "cluster_too_large": by_hand(grid=(16, 1, 1), cluster=16),
        "shared_without_opt_in": by_hand(shared=64 << 10),
        "shared_over_the_limit": lambda: driver.ask_for_shared(function, 232_449),
        "grid": by_hand(grid=(1, 65536, 1)),
        "block": by_hand(threads=1056),
    }
    for name, run in faults.items():
        error = None
        try:
            run()
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        print(json.dumps([name, error]))


if __name__ == "__main__":
    main()
