"""The specialisations that are compiled ahead of time: at most 28 in `make test`, the rest when asked for."""

from __future__ import annotations

import triton
from dflash_kernels.gumbel import kernel as gumbel
from dflash_kernels.head_topk import kernel as topk
from dflash_kernels.kv_compact import kernel as compact
from dflash_kernels.recall import kernel as recall
from dflash_kernels.tree_accept import kernel as accept
from dflash_kernels.tree_attn import kernel as attn
from dflash_kernels.tree_attn.configs import _TABLE, MIN_CHUNK, TileConfig, tile_config
from dflash_kernels.tree_build import kernel as build
from dflash_kernels.tree_build import lattice_kernel as lattice
from kernel_aot import Spec

FP8 = "*fp8e4nv"
_ATTN_TYPES = {
    **dict.fromkeys(("q_ptr", "k_new", "v_new", "out_ptr"), "*bf16"),
    **dict.fromkeys(("kv_indptr", "anc", "depth_ptr"), "*i32"),
    **dict.fromkeys(("sinks", "part_o", "part_lse"), "*fp32"),
    **dict.fromkeys(("sm_scale", "k_scale", "v_scale", "cap"), "fp32"),
    "kv_indices": "*i64",
}


def _strides(kernel) -> dict[str, str]:
    """Strides, and what follows the step's width or its load."""
    return {p.name: "i32" for p in kernel.params if p.name.startswith("stride") or p.do_not_specialize}


def _attention_constants(dim: int, rows: int, splits: int, config: TileConfig, **extra) -> dict[str, object]:
    nodes, group = min(rows, 32), max(rows // 32, 1)
    padded = triton.next_power_of_2(dim)
    return {
        "N": nodes,
        "G": group,
        "HKV": 8,
        "WORDS": (nodes + 31) // 32,
        "DK": dim,
        "DV": dim,
        "BDK": padded,
        "BDV": padded,
        "BLOCK": 16 if nodes <= 16 else 32,
        "SPLITS": splits,
        "MIN_CHUNK": max(MIN_CHUNK, config.block_n),
        "MASK": attn.TREE,
        "WINDOW": -1,
        "HAS_DEPTH": True,
        "HAS_CAP": False,
        "HAS_SINK": False,
        "PRECISION": "tf32",
        "UPCAST": False,
        **extra,
    }


def prefix_spec(arch: int, dim: int, rows: int, *, kv: str = "*bf16", fused: bool = False, **extra) -> Spec:
    """Stage 1 of the stored configuration for a head dim and a row bucket."""
    config = tile_config(arch, dim, rows, 1 if kv == FP8 else 2)
    types = {**_ATTN_TYPES, "k_cache": kv, "v_cache": kv, **_strides(attn.prefix_kernel)}
    if fused:
        types |= {"part_o": "*bf16", "part_lse": "*bf16"}
    constants = _attention_constants(dim, rows, 1 if fused else 16, config, **extra)
    name = f"prefix-sm{arch}-dim{dim}-rows{rows}{'-fused' if fused else ''}{'-fp8' if kv == FP8 else ''}"
    return Spec(
        name=name + "".join(f"-{k.lower()}" for k in extra),
        kernel=attn.prefix_kernel,
        arch=arch,
        types=types,
        constants={**constants, "BM": config.block_m, "BN": config.block_n, "FUSED": fused},
        options={
            "num_warps": config.fused_warps if fused else config.warps,
            "num_stages": config.stages,
        },
        tensor_core=True,
        per_sm=None if fused else config.per_sm,
    )


def merge_spec(arch: int, dim: int, rows: int) -> Spec:
    """Stage 2."""
    config = tile_config(arch, dim, rows)
    return Spec(
        name=f"merge-sm{arch}-dim{dim}-rows{rows}",
        kernel=attn.merge_kernel,
        arch=arch,
        types={**_ATTN_TYPES, **_strides(attn.merge_kernel)},
        constants={**_attention_constants(dim, rows, 16, config), "BM": attn.MERGE_BLOCK_M},
        options={"num_warps": 4, "num_stages": 2},
        tensor_core=True,
    )


def build_spec(arch: int, nodes: int, *, spine: bool = True) -> Spec:
    """Tree build, 15 draft positions of 16 candidates."""
    pointers = dict.fromkeys(
        ("parents_ptr", "depth_ptr", "first_child_ptr", "next_sibling_ptr", "ancestors_ptr"), "*i32"
    )
    pointers |= dict.fromkeys(("anchor_ptr", "ids_ptr", "tokens_ptr"), "*i64")
    pointers |= dict.fromkeys(("logprobs_ptr", "bonus_ptr"), "*fp32")
    return Spec(
        name=f"build-sm{arch}-n{nodes}{'' if spine else '-free'}",
        kernel=build.build_tree_kernel,
        arch=arch,
        types={**pointers, **_strides(build.build_tree_kernel)},
        constants={
            "NP": max(triton.next_power_of_2(nodes), 32),
            "K": 16,
            "WORDS": (nodes + 31) // 32,
            "HOPS": build.hops(15),
            "HAS_BONUS": True,
            "FORCE_SPINE": spine,
        },
        options={"num_warps": 1},
    )


def lattice_spec(
    arch: int, nodes: int, *, edges: bool = True, chain: bool = True, spine: bool = False
) -> Spec:
    """Tree build over edges, a chain of 31 or both, 15 draft positions of 16 candidates."""
    base = build_spec(arch, nodes, spine=spine)
    depth = min(31, nodes - 1) if chain else 0
    parts = [word for word, there in (("edges", edges), ("chain", chain), ("spine", spine)) if there]
    return Spec(
        name=f"lattice-sm{arch}-n{nodes}-{'-'.join(parts)}",
        kernel=lattice.build_lattice_kernel,
        arch=arch,
        types={
            **base.types,
            **dict.fromkeys(("edges_ptr", "chain_logprobs_ptr"), "*fp32"),
            "chain_ids_ptr": "*i64",
            **_strides(lattice.build_lattice_kernel),
        },
        constants={
            **base.constants,
            "KP": 32,
            "HOPS": build.hops(max(15, depth)),
            "HAS_EDGES": edges,
            "HAS_CHAIN": chain,
        },
        options={"num_warps": 1},
    )


def accept_spec(arch: int, nodes: int) -> Spec:
    """Accept walk."""
    pointers = dict.fromkeys(
        ("parents_ptr", "first_child_ptr", "next_sibling_ptr", "accept_lens_ptr", "path_ptr"), "*i32"
    )
    pointers |= dict.fromkeys(
        ("tokens_ptr", "target_ptr", "prefix_lens_ptr", "out_tokens_ptr", "bonus_ptr", "new_lens_ptr"), "*i64"
    )
    return Spec(
        name=f"accept-sm{arch}-n{nodes}",
        kernel=accept.accept_tree_kernel,
        arch=arch,
        types={**pointers, **_strides(accept.accept_tree_kernel)},
        constants={"NP": max(triton.next_power_of_2(nodes), 32), "DP": 16},
        options={"num_warps": 1},
    )


def compact_spec(arch: int) -> Spec:
    """KV compaction of 2 KiB rows, 16 deep."""
    import triton.language as tl

    return Spec(
        name=f"compact-sm{arch}",
        kernel=compact.compact_kv_kernel,
        arch=arch,
        types={
            "base_ptr": "*i64",
            "row_stride_ptr": "*i64",
            "width_ptr": "*i32",
            "slots_ptr": "*i64",
            "path_ptr": "*i32",
            "accept_lens_ptr": "*i32",
            **_strides(compact.compact_kv_kernel),
        },
        constants={"DP": 16, "ELEM": tl.int64, "TILE": 256},
        options={"num_warps": 4},
    )


def topk_spec(arch: int, rows: int, k: int = 16, *, race: bool = False) -> Spec:
    """Head matmul with the top-K epilogue."""
    pointers = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "keys_ptr": "*i64"}
    pointers |= dict.fromkeys(("max_ptr", "sum_ptr", "scale_ptr", "strength_ptr"), "*fp32")
    pointers |= dict.fromkeys(("seeds_ptr", "positions_ptr"), "*i64")
    return Spec(
        name=f"topk-sm{arch}-rows{rows}-k{k}{'-race' if race else ''}",
        kernel=topk.head_topk_kernel,
        arch=arch,
        types={
            **pointers,
            **dict.fromkeys(("V", "H"), "i32"),
            "cap": "fp32",
            **_strides(topk.head_topk_kernel),
        },
        constants={
            "KP": k,
            "BT": rows,
            "BV": topk.BLOCK_V,
            "BH": topk.BLOCK_H,
            "HAS_CAP": False,
            "HAS_RACE": race,
            "PRECISION": "tf32",
            "UPCAST": False,
        },
        options={"num_warps": topk.WARPS, "num_stages": topk.stages(k)},
        multiples_of_16=("H",),
        tensor_core=True,
    )


def topk_merge_spec(arch: int) -> Spec:
    """Merge of the top-K spans."""
    return Spec(
        name=f"topk-merge-sm{arch}",
        kernel=topk.merge_topk_kernel,
        arch=arch,
        types={
            **dict.fromkeys(("keys_ptr", "ids_ptr"), "*i64"),
            **dict.fromkeys(("max_ptr", "sum_ptr", "values_ptr", "log_z_ptr"), "*fp32"),
            "spans": "i32",
        },
        constants={"SPANS_P": 256, "K": 16, "KP": 16, "CHUNK": 1024},
        options={"num_warps": 4},
    )


def race_spec(arch: int) -> Spec:
    """Seeded race over the nodes' probabilities."""
    return Spec(
        name=f"race-sm{arch}",
        kernel=gumbel.race_argmax_kernel,
        arch=arch,
        types={
            "probs_ptr": "*fp32",
            **dict.fromkeys(("seeds_ptr", "positions_ptr", "groups_ptr", "keys_ptr"), "*i64"),
            **dict.fromkeys(("V", "SPAN"), "i32"),
            **_strides(gumbel.race_argmax_kernel),
        },
        constants={"HAS_GROUPS": True, "BLOCK": gumbel.BLOCK},
        options={"num_warps": gumbel.WARPS},
        multiples_of_16=("SPAN",),
    )


def race_noise_spec(arch: int) -> Spec:
    """The race's noise by itself."""
    return Spec(
        name=f"race-noise-sm{arch}",
        kernel=gumbel.race_noise_kernel,
        arch=arch,
        types={
            **dict.fromkeys(("seeds_ptr", "positions_ptr", "ids_ptr"), "*i64"),
            "out_ptr": "*fp32",
            "V": "i32",
        },
        constants={"HAS_IDS": True, "BLOCK": gumbel.BLOCK},
        options={"num_warps": gumbel.WARPS},
    )


def scan_spec(arch: int) -> Spec:
    """Scan of texts of up to 131,072 tokens for matches of 3 to 32."""
    return Spec(
        name=f"recall-scan-sm{arch}",
        kernel=recall.scan_kernel,
        arch=arch,
        types={
            "history_ptr": "*i32",
            **dict.fromkeys(("rows_ptr", "lengths_ptr", "best_ptr"), "*i64"),
            **_strides(recall.scan_kernel),
        },
        constants={
            "SPANS": 64,
            "SPAN": recall.SPAN,
            "BLOCK": recall.BLOCK,
            "MIN_MATCH": 3,
            "MAX_MATCH": 32,
        },
        options={"num_warps": recall.WARPS},
    )


def continue_spec(arch: int) -> Spec:
    """Best of 64 spans and a continuation of 31."""
    return Spec(
        name=f"recall-continue-sm{arch}",
        kernel=recall.continue_kernel,
        arch=arch,
        types={
            "history_ptr": "*i32",
            "matched_ptr": "*i32",
            **dict.fromkeys(("rows_ptr", "lengths_ptr", "best_ptr", "ids_ptr"), "*i64"),
            **_strides(recall.continue_kernel),
        },
        constants={"SPANS": 64, "DP": 32},
        options={"num_warps": 1},
    )


FAST: list[Spec] = [
    *(prefix_spec(90, 128, rows) for rows in (16, 32, 64, 128)),
    prefix_spec(90, 64, 128),
    prefix_spec(90, 256, 64),
    prefix_spec(90, 128, 64, fused=True),
    prefix_spec(90, 128, 128, fused=True),
    prefix_spec(90, 128, 128, kv=FP8),
    prefix_spec(90, 128, 64, WINDOW=4096, HAS_CAP=True, HAS_SINK=True),
    merge_spec(90, 128, 128),
    prefix_spec(80, 128, 64),
    prefix_spec(80, 128, 64, fused=True),
    prefix_spec(80, 256, 64, fused=True),
    prefix_spec(100, 128, 64),
    prefix_spec(100, 128, 128, fused=True),
    prefix_spec(100, 128, 128, kv=FP8),
    build_spec(90, 64),
    lattice_spec(90, 64),
    accept_spec(90, 64),
    compact_spec(90),
    topk_spec(90, 64),
    topk_merge_spec(90),
    topk_spec(100, 16),
    race_spec(90),
    scan_spec(90),
    scan_spec(100),
    continue_spec(90),
]
assert len(FAST) <= 28

_everything = [
    prefix_spec(arch, dim, rows, fused=fused)
    for arch in (80, 90, 100)
    for (entry_arch, dim, rows) in _TABLE
    if entry_arch == min(arch, 90)
    for fused in (False, True)
]
_everything += [
    prefix_spec(arch, dim, rows, kv=FP8) for arch in (90, 100) for (a, dim, rows) in _TABLE if a == 90
]
for _arch in (80, 90, 100):
    _everything += [merge_spec(_arch, dim, 64) for dim in (64, 128, 256)]
    _everything += [build_spec(_arch, n, spine=s) for n in (16, 64, 128) for s in (True, False)]
    _everything += [
        lattice_spec(_arch, n, edges=e, chain=c, spine=s)
        for n in (16, 64, 128)
        for e, c, s in ((True, False, False), (True, False, True), (False, True, False), (True, True, False))
    ]
    _everything += [accept_spec(_arch, n) for n in (16, 128)]
    _everything += [topk_spec(_arch, r) for r in (16, 64)]
    _everything += [topk_spec(_arch, r, 32, race=True) for r in (16, 64)]
    _everything += [compact_spec(_arch), topk_merge_spec(_arch)]
    _everything += [race_spec(_arch), race_noise_spec(_arch)]
    _everything += [scan_spec(_arch), continue_spec(_arch)]
_seen = {spec.name for spec in FAST}
REST: list[Spec] = [spec for spec in _everything if spec.name not in _seen]
