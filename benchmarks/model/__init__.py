"""Whole training steps of whole models."""
