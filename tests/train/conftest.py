"""A tiny real target: Llama weights, a trained byte-level tokenizer, a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_dflash.train.batches import Document
from sglang_dflash.train.checkpoint import config_for
from sglang_dflash.train.target import DenseTarget

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYERS = (0, 2, 4)


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("target")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator(["the cat sat on the mat", "user assistant system"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", bos_token="<|im_start|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    hidden, inter, depth, heads, kv, dim, vocab = 64, 96, 6, 4, 2, 16, 320
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": inter, "num_hidden_layers": depth, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": dim, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": True,
        "max_position_embeddings": 512, "hidden_act": "silu", "dtype": "float32",
    }  # fmt: skip
    w = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden) * 0.3,
        "model.norm.weight": torch.ones(hidden),
    }
    for i in range(depth):
        p = f"model.layers.{i}."
        shapes = {
            "self_attn.q_proj": (heads * dim, hidden), "self_attn.k_proj": (kv * dim, hidden),
            "self_attn.v_proj": (kv * dim, hidden), "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }  # fmt: skip
        w |= {f"{p}{n}.weight": torch.randn(s) * s[1] ** -0.5 for n, s in shapes.items()}
        w |= {f"{p}{n}.weight": torch.ones(hidden) for n in ("input_layernorm", "post_attention_layernorm")}
    save_file(w, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def target(target_dir) -> DenseTarget:
    return DenseTarget(target_dir, dtype=torch.float32)


@pytest.fixture(scope="session")
def drafter_config(target):
    return config_for(target, layers=2, block=6, target_layers=LAYERS, mask_token=3)


@pytest.fixture
def make_document(target):
    """Random documents with true features, ``prompt_len`` 5."""

    def make(length: int, seed: int = 0, kind: str = "code") -> Document:
        rng = torch.Generator().manual_seed(seed)
        tokens = torch.randint(4, target.vocab, (length,), generator=rng)
        return Document(tokens, 5, kind, 0.0, target.prefill(tokens[None], LAYERS)[0].clone())

    return make
