"""Tiny random models in the forms that the hub's publishers use: their names, files, tokenizers and old layouts.

`specimens` says what there is, `making` puts a family of it on disk, `reference` says what its mixtures must answer.
Importing any of it is cheap; torch and transformers are loaded where a model is made.
"""
