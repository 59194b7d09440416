"""``python -m benchmarks.hardware.facts``: the machine of the run, which is also the first look at its GPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from fastlora import info

from ..records import environment

_TOOLS = (["nvidia-smi"], ["nvcc", "--version"], ["/usr/local/cuda/bin/nvcc", "--version"])
_TEST_PACKAGES = ("pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "ninja", "accelerate")


def main() -> int:
    """Prints the facts and writes them; status 2 where torch sees no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="PATH")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device here: expected a GPU and its driver")
        return 2
    facts = environment.describe(torch.device("cuda", torch.cuda.current_device()), "hardware", {}, 0)
    facts["packages"] |= {name: info.version(name) for name in _TEST_PACKAGES}
    args.json.write_text(json.dumps(facts))
    for tool in _TOOLS:
        try:
            done = subprocess.run(tool, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{tool[0]}: {error}")
        else:
            print(done.stdout.strip())
    print(json.dumps(facts, indent=1))
    gpu = facts["gpu"]
    print(f"{facts['device_name']}, sm_{gpu['capability'].replace('.', '')}, torch {facts['packages']['torch']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
