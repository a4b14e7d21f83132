"""GGUF to the bf16 safetensors checkpoint that SGLang and transformers load."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_dflash.errors import UserError


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write config, bf16 weights, tokenizer and chat template of ``gguf`` into the folder ``out``.

    The quantized blocks are expanded once (Q4_1 to bf16), so the result is a plain Llama
    checkpoint and its values are the quantized model's, not the original release's.
    """
    # transformers asks the model hub for optional files otherwise, and waits where there is none.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Its per-tensor progress bar cannot be turned off through its own API.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if not tokenizer.chat_template:
        raise UserError(f"{name} has no chat template; the file is not the instruct model")
    bad = [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"{name} gives weights that are not finite ({bad[0]}); delete it and fetch again")
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # safetensors writes 0600; a cache shared by several users is read by all of them.
    for path in out.iterdir():
        path.chmod(0o644)
