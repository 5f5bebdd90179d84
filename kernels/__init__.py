"""Compiled kernels, each with a PyTorch implementation beside it. The README says how to build them."""
