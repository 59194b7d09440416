"""Measures what LoRA costs, with fastlora and without: ``python -m benchmarks --help``; nothing imports it."""

import logging
import os

# Torch reads this on import. Its profiler warns of memory that was there before; the benchmarks count what comes after.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# bitsandbytes, which PEFT imports, warns of a kernel for CPUs that is not installed; nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
