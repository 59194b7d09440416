"""A kernel launch as a value: what the launchers return, what runs, and what the compile gate compiles."""

from __future__ import annotations

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its arguments by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """Launches on the current device and stream."""
        self.kernel[self.grid](**self.arguments, **self.options)
