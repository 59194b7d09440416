"""A kernel launch as a value: what the launchers return, what runs, and what the compile gate compiles."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its arguments by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> Any:
        """Launches on the current device and stream; returns the compiled kernel, None in the interpreter."""
        return self.kernel[self.grid](**self.arguments, **self.options)

    def on_amd(self) -> Launch:
        """The launch as AMD GPUs take it: one buffer of each operand, since a workgroup has 64 KiB for them all."""
        return self._replace(options=self.options | {"num_stages": min(self.options["num_stages"], 2)})


def strided(name: str, tensor: Tensor, axes: str) -> dict[str, Any]:
    """A kernel's arguments for one operand: ``strided("x", x, "mk")`` is x_ptr, stride_xm and stride_xk."""
    return {f"{name}_ptr": tensor} | {f"stride_{name}{axis}": tensor.stride(i) for i, axis in enumerate(axes)}


def in_eights(*matrices: Tensor) -> bool:
    """Whether all rows of the matrices may be read eight elements at a time, and Triton does not know it.

    Triton takes a size for a multiple of 16 or of nothing; told by this that it is one of 8, ``size // 8 * 8`` in a
    kernel says so to the compiler, and rank 8 is read by vector loads as rank 16 is.
    """
    sizes = [size for t in matrices for size in (t.shape[1], t.stride(0))]
    contiguous = all(t.stride(1) == 1 for t in matrices)
    return contiguous and not any(size % 8 for size in sizes) and any(size % 16 for size in sizes)
