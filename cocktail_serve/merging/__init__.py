"""The mathematics of mixing parameters: tensors in, tensors out; no files, no requests."""
