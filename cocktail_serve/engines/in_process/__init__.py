"""Encoders and rerankers, in this process, by sentence-transformers."""
