"""What a drafter's files say, read without loading a weight.

Runs in the parent process, so that a wrong drafter is one line and not a child's traceback.
Layout: z-lab's Hugging Face checkpoints (``config.json`` with ``block_size`` and
``dflash_config``, safetensors), as SGLang's ``models/dflash.py`` loads them. Three questions:
what does it say (``config``), what does it hold (``tensors``), does it fit (``fit``).
"""

from sglang_dflash.drafter.config import (
    DFlashSection,
    DrafterConfig,
    block_size_of,
    read_config,
    resolve_folder,
)
from sglang_dflash.drafter.fit import check_fits
from sglang_dflash.drafter.tensors import TensorEntry, read_tensors

__all__ = [
    "DFlashSection",
    "DrafterConfig",
    "TensorEntry",
    "block_size_of",
    "check_fits",
    "read_config",
    "read_tensors",
    "resolve_folder",
]
