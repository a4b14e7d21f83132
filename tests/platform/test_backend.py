"""The attention backend as SGLang drives it: real batches, real pools, every forward mode."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_dflash.errors import UserError
from tests.platform.test_attention import causal, random_tree, with_tree

Q_HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 16, 2
SLOTS, ROWS, CONTEXT = 16384, 8, 6000


class Rig:
    """A backend over a request table and a KV pool that hold random keys."""

    def __init__(self, dtype: torch.dtype = torch.float32, kv_cache_dtype: torch.dtype | None = None) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        from sglang_dflash.platform.attention_backend import CpuAttentionBackend
        from sglang_dflash.platform.kv_pool import CpuMHATokenToKVPool

        self.generator = torch.Generator().manual_seed(0)
        self.pool = CpuMHATokenToKVPool(
            size=SLOTS,
            page_size=1,
            dtype=dtype,
            head_num=KV_HEADS,
            head_dim=DIM,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.copy_(torch.randn(buffer.shape, generator=self.generator))
        self.table = ReqToTokenPool(ROWS, CONTEXT, "cpu", False)
        order = torch.randperm(SLOTS, generator=self.generator) + 1
        self.used = order[: ROWS * 2000].view(ROWS, 2000)
        self.table.req_to_token[:ROWS, :2000] = self.used.int()
        self.runner = SimpleNamespace(
            use_mla_backend=False,
            token_to_kv_pool=self.pool,
            req_to_token_pool=self.table,
            kv_cache_dtype=kv_cache_dtype or dtype,
        )
        self.backend = CpuAttentionBackend(self.runner)
        self.layer = RadixAttention(Q_HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id=1)

    def batch(self, mode: str, rows: list[int], lens: list[int], new: list[int], spec_info: object = None):
        """A forward batch over table rows ``rows``; request i brings ``new[i]`` tokens.

        ``lens`` are ``seq_lens`` as SGLang gives them: with the new tokens in prefill and
        decode, without them in a verify pass.
        """
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        forward_mode = ForwardMode[mode]
        starts = lens if mode == "TARGET_VERIFY" else [n - k for n, k in zip(lens, new, strict=True)]
        slots = [self.used[r, s : s + k] for r, s, k in zip(rows, starts, new, strict=True)]
        positions = [torch.arange(s, s + k) for s, k in zip(starts, new, strict=True)]
        return ForwardBatch(
            forward_mode=forward_mode,
            batch_size=len(rows),
            input_ids=torch.zeros(sum(new), dtype=torch.int64),
            req_pool_indices=torch.tensor(rows),
            seq_lens=torch.tensor(lens),
            # Under overlap scheduling the host only knows an upper bound.
            seq_lens_cpu=torch.tensor(lens) + 57,
            out_cache_loc=torch.cat(slots),
            seq_lens_sum=sum(lens) + 57 * len(lens),
            positions=torch.cat(positions),
            spec_info=spec_info,
            extend_prefix_lens=torch.tensor(starts),
            extend_seq_lens=torch.tensor(new),
        )

    def check(self, batch, seen: list[torch.Tensor], layer: torch.nn.Module | None = None) -> None:
        """Run one layer; compare with a dense float64 reference over the slots of each request."""
        layer = layer or self.layer
        count = batch.input_ids.shape[0]
        q, k, v = (
            torch.randn(count, h * DIM, generator=self.generator) for h in (Q_HEADS, KV_HEADS, KV_HEADS)
        )
        self.backend.init_forward_metadata(batch)
        got = self.backend.forward(q, k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM), layer, batch)
        assert torch.equal(self.pool.k_buffer[1][batch.out_cache_loc], k.view(-1, KV_HEADS, DIM))
        start = 0
        for row, mask in zip(batch.req_pool_indices.tolist(), seen, strict=True):
            width, length = mask.shape
            slots = self.used[row, :length]
            keys = self.pool.k_buffer[1][slots].double().repeat_interleave(Q_HEADS // KV_HEADS, 1)
            values = self.pool.v_buffer[1][slots].double().repeat_interleave(Q_HEADS // KV_HEADS, 1)
            query = q[start : start + width].double().view(width, Q_HEADS, DIM)
            scores = torch.einsum("whd,khd->hwk", query, keys) * DIM**-0.5
            probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            expected = torch.einsum("hwk,khd->whd", probs, values).flatten(1)
            error = (got[start : start + width].double() - expected).abs().max().item()
            assert error < 1e-5, f"row {row}: error {error}"
            start += width
        assert start == count


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_decode(rig: Rig) -> None:
    batch = rig.batch("DECODE", [3, 0, 5], [1, 40, 300], [1, 1, 1])
    rig.check(batch, [causal(n - 1, 1) for n in (1, 40, 300)])


def test_decode_of_one_request_with_consecutive_slots(rig: Rig) -> None:
    rig.used[2] = torch.arange(101, 2101)
    rig.table.req_to_token[2, :2000] = rig.used[2].int()
    rig.check(rig.batch("DECODE", [2], [77], [1]), [causal(76, 1)])
    assert rig.backend.segments[0].first_slot == 101


def test_decode_of_very_different_lengths_is_not_padded_to_the_longest(rig: Rig) -> None:
    lens = [1900, 3, 5, 4, 2]
    rig.check(rig.batch("DECODE", [0, 1, 2, 3, 4], lens, [1] * 5), [causal(n - 1, 1) for n in lens])
    assert sum(s.slots.numel() for s in rig.backend.segments) < 2 * sum(lens)


def test_prefill_with_and_without_cached_prefix(rig: Rig) -> None:
    batch = rig.batch("EXTEND", [1, 4, 6], [9, 130, 1], [9, 30, 1])
    rig.check(batch, [causal(0, 9), causal(100, 30), causal(0, 1)])


def test_verify_of_a_chain(rig: Rig) -> None:
    batch = rig.batch("TARGET_VERIFY", [1, 4], [9, 130], [8, 8], SimpleNamespace(custom_mask=None))
    rig.check(batch, [causal(9, 8), causal(130, 8)])


@pytest.mark.parametrize("packed", [False, True])
def test_verify_of_trees(rig: Rig, packed: bool) -> None:
    trees = torch.stack([random_tree(40, rig.generator) for _ in range(2)])
    info = SimpleNamespace(tree_mask=trees)
    if packed:
        weights = 2 ** torch.arange(32, dtype=torch.int64)
        bits = torch.constant_pad_nd(trees, (0, 24)).view(2, 40, 2, 32)
        words = (bits * weights).sum(-1)
        info = SimpleNamespace(tree_ancestors=torch.where(words >= 2**31, words - 2**32, words).int())
    batch = rig.batch("TARGET_VERIFY", [1, 4], [0, 130], [40, 40], info)
    rig.check(batch, [with_tree(0, trees[0]), with_tree(130, trees[1])])


def test_drafters_block_beside_the_chain_in_one_pass(rig: Rig) -> None:
    """The mask belongs to the layer, not to the pass."""
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    batch = rig.batch("TARGET_VERIFY", [1, 4], [9, 130], [8, 8])
    rig.check(batch, [causal(9, 8), causal(130, 8)])
    layer = RadixAttention(
        Q_HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id=1, attn_type=AttentionType.ENCODER_ONLY
    )
    rig.check(batch, [torch.ones(8, 17, dtype=torch.bool), torch.ones(8, 138, dtype=torch.bool)], layer)


@pytest.mark.parametrize("window", [3, 40])
def test_a_windowed_drafters_block(rig: Rig, window: int) -> None:
    """As a sliding layer of a bidirectional drafter asks for it (``models/dflash.py``)."""
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    layer = RadixAttention(
        Q_HEADS,
        DIM,
        DIM**-0.5,
        KV_HEADS,
        layer_id=1,
        sliding_window_size=window,
        attn_type=AttentionType.ENCODER_ONLY,
    )
    batch = rig.batch("TARGET_VERIFY", [1, 4], [9, 130], [8, 8])
    gaps = [torch.arange(p, p + 8)[:, None] - torch.arange(p + 8)[None, :] for p in (9, 130)]
    rig.check(batch, [gap.abs() <= window for gap in gaps], layer)


def test_a_mask_it_cannot_read_is_refused(rig: Rig) -> None:
    info = SimpleNamespace(custom_mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="tree_mask"):
        rig.backend.init_forward_metadata(rig.batch("TARGET_VERIFY", [1], [9], [8], info))


def test_unsupported_models_are_refused_at_start(rig: Rig) -> None:
    with pytest.raises(UserError, match="--kv-cache-dtype"):
        Rig(kv_cache_dtype=torch.float8_e4m3fn)
    rig.runner.use_mla_backend = True
    with pytest.raises(UserError, match="MLA"):
        type(rig.backend)(rig.runner)
