"""Decoders, in a vLLM server of their own."""
