"""Rows, result files, the environment they were measured in, and pictures of them."""
