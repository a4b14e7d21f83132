"""Triton kernels for draft trees, each beside its plain-torch reference (no SGLang import)."""
