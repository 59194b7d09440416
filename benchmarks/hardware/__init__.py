"""One command for a GPU: proves the kernels, times those that passed, and files what came back."""
