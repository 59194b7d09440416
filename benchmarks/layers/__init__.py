"""Single layers: every provider beside the frozen floor."""
