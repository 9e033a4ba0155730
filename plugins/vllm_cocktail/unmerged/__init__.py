"""Experts as LoRA factors beside the base's parameters: a request brings its row of coefficients, nothing is merged."""
