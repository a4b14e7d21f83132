"""What SGLang serves and draft trees do not, known from arguments, configs and headers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_dflash.drafter import DrafterConfig
from sglang_dflash.plugin.target_head import is_packed

#: Caches of which our kernels read and move every byte; the others keep scales beside them.
KV_DTYPES = frozenset({None, "auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"})
#: Attention backends for the ordinary KV cache, slot by slot: on CUDA each may read the prompts, whose rows
#: our kernel then sees in the verify pass.
READERS = frozenset({"triton", "fa3", "fa4", "flashinfer", "trtllm_mha", "torch_native"})
LATENT = "latent attention (MLA)"


@dataclass(frozen=True)
class Facts:
    """What a server knows before it loads a weight.

    Attributes:
        cfg: SGLang's arguments under resolution.
        model: SGLang's ``ModelConfig`` of the target.
        drafter: the drafter's config.
        backends: the attention backends that were named; SGLang fills ``cfg`` with defaults before this.
    """

    cfg: Any
    model: Any
    drafter: DrafterConfig
    backends: frozenset[str] = frozenset()

    @property
    def text(self) -> Any:
        return self.model.hf_text_config

    @property
    def on_cpu(self) -> bool:
        return str(self.cfg.device).startswith("cpu")


@dataclass(frozen=True)
class Obstacle:
    """Why trees cannot serve, and how to get them."""

    what: str
    way_out: str
    applies: Callable[[Facts], bool]


def _is_hybrid(facts: Facts) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(facts.model) is not None


def _is_latent(facts: Facts) -> bool:
    from sglang.srt.configs.model_config import AttentionArch

    return facts.model.attention_arch == AttentionArch.MLA


def _wrong_backend(facts: Facts) -> bool:
    return bool(facts.backends - ({"dflash_cpu", "triton"} if facts.on_cpu else READERS))


def _by_heads() -> bool:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_USE_HND_KVCACHE.get())


def named_backends(server_args: Any) -> frozenset[str]:
    """What the operator wrote; the record keeps it beside what resolution makes of it."""
    fields = ("attention_backend", "decode_attention_backend", "prefill_attention_backend")
    return frozenset(name for name in (getattr(server_args, field) for field in fields) if name)


def _other_head(facts: Facts) -> bool:
    """A drafter that chooses its tokens by another rule than the head's probabilities."""
    drafter = facts.drafter
    return bool(
        drafter.dflash_config.lilicorr
        or "LiLiCorrDraftModel" in drafter.architectures
        or drafter.dflash_config.projector_type in ("domino", "lilicorr")
    )


def _has_sparse_attention(facts: Facts) -> bool:
    from sglang.srt.configs.model_config import is_minimax_sparse

    return bool(is_minimax_sparse(facts.model.hf_config))


OBSTACLES = (
    Obstacle(
        "this kind of device",
        "use CUDA, or a CPU without an accelerator",
        lambda facts: not (facts.on_cpu or str(facts.cfg.device).startswith("cuda")),
    ),
    Obstacle(
        "targets with Mamba or linear-attention layers (a state by node is not committed yet)",
        "use a target with attention layers only",
        _is_hybrid,
    ),
    Obstacle(f"targets with {LATENT}", "use a target with MHA or GQA", _is_latent),
    Obstacle(
        "targets with a separate sliding-window KV pool",
        "start with --disable-hybrid-swa-memory",
        lambda facts: bool(facts.model.is_hybrid_swa and not facts.cfg.disable_hybrid_swa_memory),
    ),
    Obstacle("targets with sparse attention", "use a target with dense attention", _has_sparse_attention),
    Obstacle(
        "Grok's temperature by length",
        "use another target",
        lambda facts: (getattr(facts.text, "attn_temperature_len", None) or -1) > 0,
    ),
    Obstacle(
        "targets with a quantised head",
        "use a checkpoint whose lm_head is bfloat16, float16 or float32",
        lambda facts: is_packed(facts.model),
    ),
    Obstacle(
        "a KV cache with scales beside it",
        "leave out --kv-cache-dtype, or set it to bfloat16 or fp8_e4m3",
        lambda facts: facts.cfg.kv_cache_dtype not in KV_DTYPES,
    ),
    Obstacle(
        "drafters with a Domino or LiLiCorr head",
        "use a DFlash or DFlash 2 drafter",
        _other_head,
    ),
    Obstacle(
        "selectors over logits that the drafter scales or caps",
        "use a drafter without output_multiplier and final_logit_softcapping",
        lambda facts: facts.drafter.dflash_config.reshapes_logits,
    ),
    Obstacle(
        "quantised drafters on a CPU (SGLang's kernels for them need a GPU)",
        "take the drafter in bfloat16",
        lambda facts: bool(facts.drafter.quantization_config and facts.on_cpu),
    ),
    Obstacle(
        "an attention backend without our tree kernel",
        f"leave out --attention-backend, or name one of {', '.join(sorted(READERS))}",
        _wrong_backend,
    ),
    Obstacle(
        "a KV cache by heads (SGLANG_USE_HND_KVCACHE)",
        "unset SGLANG_USE_HND_KVCACHE",
        lambda facts: _by_heads(),
    ),
    Obstacle(
        "deterministic inference",
        "leave out --enable-deterministic-inference",
        lambda facts: bool(facts.cfg.enable_deterministic_inference),
    ),
    Obstacle(
        "unified memory",
        "leave out --enable-unified-memory",
        lambda facts: bool(facts.cfg.enable_unified_memory),
    ),
    Obstacle(
        "data-parallel attention",
        "leave out --enable-dp-attention",
        lambda facts: bool(facts.cfg.enable_dp_attention),
    ),
    Obstacle(
        "decode context parallelism", "leave out --dcp-size", lambda facts: (facts.cfg.dcp_size or 1) > 1
    ),
    Obstacle(
        "a drafter window",
        "leave out --speculative-draft-window-size",
        lambda facts: facts.cfg.speculative_draft_window_size is not None,
    ),
    Obstacle(
        "LoRA adapters",
        "leave out --enable-lora and --lora-paths",
        lambda facts: bool(facts.cfg.enable_lora or facts.cfg.lora_paths),
    ),
    Obstacle(
        "hierarchical sparse attention",
        "leave out --enable-hisparse",
        lambda facts: bool(facts.cfg.enable_hisparse),
    ),
)


def first_obstacle(facts: Facts) -> Obstacle | None:
    return next((obstacle for obstacle in OBSTACLES if obstacle.applies(facts)), None)
