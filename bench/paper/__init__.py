"""LM-Cocktail's tables and figures (arXiv 2311.13534) in our own hands; see `bench/paper/README.md`."""
