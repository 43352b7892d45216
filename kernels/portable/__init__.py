"""Triton kernels that run on every GPU."""
