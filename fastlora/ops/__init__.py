"""What a call of ``lora_linear`` means: its arguments, its chain rule, and the same on DTensors."""
