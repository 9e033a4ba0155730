"""LoRA adapters, read as the full models that they make of their base."""
