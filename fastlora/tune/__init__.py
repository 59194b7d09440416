"""Proves and measures the kernels on this machine, for the layers that matter to a user."""
