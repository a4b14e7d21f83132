"""Chooses between the Triton kernels and their torch twins."""

from __future__ import annotations

import os

import torch


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter (set the variable before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: torch.Tensor) -> bool:
    """CUDA tensors go to Triton, everything else to torch unless the interpreter is on."""
    return tensor.is_cuda or interpreting()
