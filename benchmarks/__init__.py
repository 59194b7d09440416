"""Measures fastlora beside its peers on the layers of real models: ``python -m benchmarks``; nothing imports it."""
