"""Measures what LoRA costs, with fastlora and without: ``python -m benchmarks --help``; nothing imports it."""

import os

# Torch reads this on import. Its profiler warns of memory that was there before; the benchmarks count what comes after.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
