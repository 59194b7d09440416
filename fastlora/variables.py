"""The environment variables of fastlora's name: which are read, and which one an unknown name may have meant."""

from __future__ import annotations

import difflib
import functools
import logging
import os

_log = logging.getLogger("fastlora")

_PREFIX = "FASTLORA_"
# What the package reads as it runs.
READ = ("FASTLORA_BACKEND", "FASTLORA_CACHE", "FASTLORA_CHECK", "FASTLORA_CUDA_LIBRARY", "FASTLORA_TABLE")
# What its installation, the benchmarks and the tests read.
_ELSEWHERE = (
    "FASTLORA_BUILD_CPU",
    "FASTLORA_BUILD_CUDA",
    "FASTLORA_COMMIT",
    "FASTLORA_TEST_KERNELS",
    "FASTLORA_TEST_LOG",
    "FASTLORA_TEST_SKIP",
)


def unknown() -> dict[str, str]:
    """The variables of fastlora's name that are set and that nothing reads → what to say of each."""
    known = {name.removeprefix(_PREFIX): name for name in (*READ, *_ELSEWHERE)}
    found = {}
    for name in sorted(os.environ):
        if name.startswith(_PREFIX) and name not in known.values():
            near = difflib.get_close_matches(name.removeprefix(_PREFIX), known, 1)
            meant = f"did you mean {known[near[0]]}?" if near else f"there are {', '.join(READ)}"
            found[name] = f"is no variable of fastlora's, and is ignored: {meant}"
    return found


@functools.cache
def warn_of_unknown() -> None:
    """Logs a warning for each such variable, once in a process."""
    for name, why in unknown().items():
        _log.warning("%s %s", name, why)
