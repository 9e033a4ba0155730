"""cocktail-serve: mix fine-tuned models for a task while serving them (LM-Cocktail, arXiv 2311.13534)."""

__version__ = "0.1.0"
