"""Committed results as Markdown, and the comparison of two runs."""
