"""``python -m fastlora``: lists the package's commands."""

from __future__ import annotations

COMMANDS = {
    "info": "what is installed here, which kernels would run, and why no others",
    "measure": "what fastlora does for a model's training step here, in time and memory",
    "merge": "merges an adapter into a model's safetensors files",
    "tune": "proves the kernels on this machine and keeps which is the fastest",
}


def listing() -> str:
    """Makes the text that ``python -m fastlora`` prints."""
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: python -m fastlora.COMMAND [--help]", "", *lines])


if __name__ == "__main__":
    print(listing())
