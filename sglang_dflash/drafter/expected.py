"""The tensors that SGLang's drafter classes take from a checkpoint, and those they pass over in silence.

``models/dflash.py: DFlashDraftModel.load_weights`` leaves a parameter that no tensor names as it was made
(norms one, matrices whatever lay in memory) and drops a tensor that names no parameter, both without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sglang_dflash.drafter.config import DrafterConfig
from sglang_dflash.drafter.tensors import TensorEntry

#: Names of other exports that SGLang knows (``_VENDOR_ENCODER_ALIASES``).
ALIASES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
#: What SGLang's parameters of fused projections are made of.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
#: Endings of a matrix kept in another form than ``weight``; they need a ``quantization_config``.
PACKED = ("weight_packed", "qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv")
DENSE_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})
#: Passed over and harmless: buffers that are computed.
_BUFFERS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Wanted:
    """A tensor that SGLang needs.

    Attributes:
        name: without a leading ``model.``.
        shape: None where the config leaves it open.
        matrix: one of the projections, which may be quantised.
    """

    name: str
    shape: tuple[int, ...] | None
    matrix: bool = False


def canonical(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors under the names SGLang looks them up by."""
    names = {}
    for name, entry in tensors.items():
        bare = name.removeprefix("model.")
        names[ALIASES.get(bare, bare)] = entry
    return names


def wanted(config: DrafterConfig, features: int) -> Iterator[Wanted]:
    """Every tensor SGLang needs for ``config`` and ``features`` feature layers."""
    hidden, section = config.hidden_size, config.dflash_config
    yield Wanted("fc.weight", (hidden, features * hidden), matrix=True)
    yield Wanted("hidden_norm.weight", (hidden,))
    yield Wanted("norm.weight", (hidden,))
    if "DFlashLagunaForCausalLM" in config.architectures:
        for feature in range(features):
            yield Wanted(f"aux_hidden_norms.{feature}.weight", (hidden,))
    if section.selector_rank:
        rank = section.selector_rank
        vocab = None if config.vocab_size is None else (config.vocab_size, rank)
        yield Wanted("candidate_selector.predecessor_codebook", vocab)
        yield Wanted("candidate_selector.successor_codebook", vocab)
        yield Wanted("candidate_selector.hidden_projection.weight", (rank, hidden))
    if section.projector_type == "domino":
        for name in ("prefix_gru.weight_ih_l0", "prefix_gru.weight_hh_l0"):
            yield Wanted(name, None)
        for name in ("embed_proj.0.weight", "embed_proj.2.weight"):
            yield Wanted(name, None)
    for layer in range(config.num_hidden_layers):
        for tensor in _layer(config):
            yield Wanted(f"layers.{layer}.{tensor.name}", tensor.shape, tensor.matrix)


def _layer(config: DrafterConfig) -> Iterator[Wanted]:
    hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
    # Where the config leaves a size open, transformers' default counts, which is not known here.
    q = None if heads is None or dim is None else heads * dim
    kv_heads = config.num_key_value_heads
    kv = None if kv_heads is None or dim is None else kv_heads * dim
    wide = config.intermediate_size

    def matrix(name: str, rows: int | None, columns: int | None) -> Wanted:
        shape = None if rows is None or columns is None else (rows, columns)
        return Wanted(f"{name}.weight", shape, matrix=True)

    yield Wanted("input_layernorm.weight", (hidden,))
    yield Wanted("post_attention_layernorm.weight", (hidden,))
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield matrix(f"self_attn.{name}_proj", rows, hidden)
        if config.attention_bias:
            yield Wanted(f"self_attn.{name}_proj.bias", None if rows is None else (rows,))
    yield matrix("self_attn.o_proj", hidden, q)
    if config.attention_bias:
        yield Wanted("self_attn.o_proj.bias", (hidden,))
    for name in ("q_norm", "k_norm"):
        yield Wanted(f"self_attn.{name}.weight", None if dim is None else (dim,))
    yield matrix("mlp.gate_proj", wide, hidden)
    yield matrix("mlp.up_proj", wide, hidden)
    yield matrix("mlp.down_proj", hidden, wide)
    section = config.dflash_config
    if section.attention_sink_bias:
        yield Wanted("self_attn.attention_sink_bias", None if heads is None else (heads,))
    if section.conv_kernel_size and section.conv_group_size:
        taps, groups = section.conv_kernel_size, hidden // section.conv_group_size
        for name in ("attention_conv", "mlp_conv"):
            yield Wanted(f"{name}.base_kernel", (2, taps, hidden))
            yield Wanted(f"{name}.kernel_projection.weight", (2 * taps * groups, hidden))
    gating = (config.model_extra or {}).get("gating", True)
    if "DFlashLagunaForCausalLM" in config.architectures and gating not in (False, None, "disabled"):
        yield Wanted("self_attn.g_proj.weight", None, matrix=True)


def stored(want: Wanted, names: Mapping[str, TensorEntry]) -> tuple[TensorEntry | None, bool]:
    """The checkpoint's tensor for ``want``, and whether its shape is that of the plain matrix.

    A projection may be part of a fused tensor or, quantised, stand under other endings; neither is held
    against the plain shape.
    """
    if want.name in names:
        return names[want.name], names[want.name].dtype in DENSE_DTYPES
    for fused, parts in FUSED.items():
        for part in parts:
            if f".{part}." in want.name:
                whole = want.name.replace(part, fused)
                if whole in names:
                    return names[whole], False
    if want.matrix:
        base = want.name.removesuffix("weight")
        for ending in PACKED:
            if base + ending in names:
                return names[base + ending], False
    return None, False


def packed(names: Iterable[str]) -> str | None:
    """A tensor that belongs to a quantised matrix, None when every matrix is plain."""
    return next((name for name in sorted(names) if name.rpartition(".")[2] in PACKED), None)


def passed_over(config: DrafterConfig, names: Mapping[str, TensorEntry], features: int) -> list[str]:
    """Tensors that SGLang drops: they name none of its parameters."""
    if "LiLiCorrDraftModel" in config.architectures or config.quantization_config:
        return []  # classes and quantisation methods that bring parameters of their own
    known = {want.name for want in wanted(config, features)}
    for want in tuple(known):
        for fused, parts in FUSED.items():
            known |= {want.replace(part, fused) for part in parts if f".{part}." in want}
    return sorted(name for name in names if name not in known and not name.endswith(_BUFFERS))
