"""The claims of the LoRA paper."""
