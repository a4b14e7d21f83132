"""Kernels for draft-tree speculative decoding on SGLang's paged KV cache.

Depends on torch and triton alone. Every operation dispatches on its tensors: CUDA (or TRITON_INTERPRET=1)
runs the Triton kernel, CPU the torch implementation; both follow the same contract.
"""

from dflash_kernels.gumbel import Race, race_argmax, race_noise, race_noise_at
from dflash_kernels.head_topk import draft_topk, merge_topk
from dflash_kernels.kv_compact import KVCompactor, compact_kv
from dflash_kernels.recall import Recalled, recall
from dflash_kernels.tree import DraftTree, ancestor_mask, num_words
from dflash_kernels.tree_accept import Accepted, accept_tree
from dflash_kernels.tree_attn import TorchPlan, torch_plan, tree_attention
from dflash_kernels.tree_attn.workspace import TreeAttentionWorkspace
from dflash_kernels.tree_build import Chain, build_tree

__all__ = [
    "Accepted",
    "Chain",
    "DraftTree",
    "KVCompactor",
    "Race",
    "Recalled",
    "TorchPlan",
    "TreeAttentionWorkspace",
    "accept_tree",
    "ancestor_mask",
    "build_tree",
    "compact_kv",
    "draft_topk",
    "merge_topk",
    "num_words",
    "race_argmax",
    "race_noise",
    "race_noise_at",
    "recall",
    "torch_plan",
    "tree_attention",
]
