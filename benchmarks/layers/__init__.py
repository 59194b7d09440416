"""Single layers: every arm beside the frozen floor."""
