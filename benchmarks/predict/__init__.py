"""Predictions of each design's cost, without a GPU."""
