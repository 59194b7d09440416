"""``python -m benchmarks`` as on a GPU: the stand-in for ``torch.cuda``, and kernels that launch into the stubs.

What a kernel launches computes nothing, so its results are filled in from the reference afterwards: an arm passes the
gate and is timed like any other. The paper's claims are measured on a small decoder, host-sized layers in few rounds.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from tests.stub_gpu import build, launch, stand_in


def _filled_in(kernel: Any, verb: str) -> Any:
    """The kernel with the numbers it would have computed."""
    from fastlora.backends import library, reference

    def lora_matmul(p: Any) -> Any:
        made = kernel.run(p)
        for mine, right in zip(made, reference.lora_matmul(p), strict=True):
            if mine is not None:
                mine.copy_(right)
        return made

    def rank_grad(p: Any, q: Any, **options: Any) -> Any:
        return kernel.run(p, q, **options).copy_(reference.rank_grad(p, q, **options))

    def gradients(p: Any, dy: Any, z: Any) -> Any:
        made = kernel.gradients(p, dy, z)
        for mine, right in zip(made, library.gradients(p, dy, z), strict=True):
            mine.copy_(right)
        return made

    run = {"lora_matmul": lora_matmul, "rank_grad": rank_grad}[verb]
    together = kernel.together and _together(kernel.together)
    return kernel._replace(run=run, gradients=kernel.gradients and gradients, together=together)


def _together(way: Any) -> Any:
    """A kernel's way with a group, with the numbers."""
    from fastlora.backends import library

    def run(products: Any) -> Any:
        made = way.run(products)
        for mine, right in zip(made, library.lora_matmul_group(products), strict=True):
            for one, other in zip(mine, right, strict=True):
                one.copy_(other)
        return made

    def gradients(products: Any, dys: Any, zs: Any) -> Any:
        dx, *others = way.gradients(products, dys, zs)
        right_dx, *right = library.gradients_group(products, dys, zs)
        dx.copy_(right_dx)
        for mine, theirs in zip(others, right, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                one.copy_(other)
        return dx, *others

    return type(way)(run, gradients)


def prepare() -> None:
    """Puts the stand-in into this process, and the numbers behind its kernels."""
    stand_in.enter()
    if build.LIBRARY.exists():
        os.environ["FASTLORA_CUDA_LIBRARY"] = str(build.LIBRARY)

    from benchmarks.layers import case
    from benchmarks.paper import command as paper
    from benchmarks.paper.claims import Lab
    from fastlora.backends import dispatch

    for verb, kernels in dispatch.KERNELS.items():
        dispatch.KERNELS[verb] = tuple(
            _filled_in(kernel, verb) if kernel.name.startswith(launch.FAMILIES) else kernel for kernel in kernels
        )
    case.HOST_ROUNDS = 1
    paper.LABS["cuda"]["quick"] = Lab(
        paper.CUDA, "tiny", "tiny", batch=2, sequence=8, rounds=2, seconds=0.0, inputs=((2, 3),), width=64
    )


def main() -> int:
    """Runs the command line of the benchmarks."""
    prepare()

    from benchmarks.__main__ import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
