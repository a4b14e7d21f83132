"""SGLang's own attention test kit, with trees of any size instead of its three-node one.

The kit builds a tiny attention layer, SGLang's `TritonAttnBackend` and a KV pool with shuffled pages; our
kernel sits at the backend's verify seam as it does in the server. Runs where Triton runs: in the interpreter
process, or on a CUDA device.
"""

from __future__ import annotations

import random
import unittest
from dataclasses import replace

import pytest
import torch
from dflash_kernels import ancestor_mask
from dflash_kernels._dispatch import interpreting
from kernel_trees import to_device, tree_from_parents

if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("needs Triton: see test_interpreter.py", allow_module_level=True)

from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.test.kits.attention_unittest.attention_methods.dense_attention import (
    DENSE_ATOL,
    DENSE_RTOL,
    DenseAttentionCase,
    build_dense_attention_fixture,
    dense_attention_reference_with_custom_mask,
    dense_fixture_inputs,
    run_dense_forward,
)
from sglang.test.kits.attention_unittest.runner_modes.speculative_target_verify_runner import (
    _prepare_target_verify_batch,
)

from sglang_dflash.upstream.triton_seam import TreeBuffers, VerifyAttention

DEVICE = "cpu" if interpreting() else "cuda"


@pytest.mark.parametrize(
    ("N", "page", "prefix_lens", "heads", "kv_heads", "window"),
    [
        (16, 1, (5, 9), 4, 2, None),
        (33, 16, (17, 1), 4, 4, None),
        (64, 1, (0, 20), 6, 2, None),
        (13, 1, (30, 4), 4, 2, 6),
    ],
)
@torch.no_grad()
def test_random_trees(N, page, prefix_lens, heads, kv_heads, window):
    case = DenseAttentionCase(
        name=f"tree-{N}-{page}",
        backend="triton",
        forward_mode=ForwardMode.TARGET_VERIFY,
        num_heads=heads,
        num_kv_heads=kv_heads,
        page_size=page,
        prefix_lens=prefix_lens,
        extend_lens=(N,) * len(prefix_lens),
        sliding_window_size=window,
    )
    bs = case.batch_size
    rng = random.Random(torch.initial_seed())
    parents = [[-1, *(rng.randrange(i) for i in range(1, N))] for _ in range(bs)]
    tree = tree_from_parents(parents, torch.zeros(bs, N, dtype=torch.int64), [N] * bs)
    block = ancestor_mask(tree.ancestors, N)
    masks = []
    for b, prefix in enumerate(prefix_lens):
        mask = torch.cat([torch.ones(N, prefix, dtype=torch.bool), block[b]], 1)
        if window is not None:
            # The kit's window counts rows as positions; a tree's positions are prefix + depth.
            depth = tree.depth[b].long()
            key_position = torch.cat([torch.arange(prefix), prefix + depth])
            mask &= (prefix + depth)[:, None] - key_position <= window
        masks.append(mask.to(DEVICE))

    fixture = build_dense_attention_fixture(
        unittest.TestCase(), case, max_context_len=192, dtype=torch.float32, device=DEVICE
    )
    batch = fixture.forward_batch
    _prepare_target_verify_batch(batch, case, DEVICE)
    batch.spec_info = DFlashVerifyInput(
        draft_token=batch.input_ids,
        positions=batch.positions,
        draft_token_num=N,
        topk=1,
        custom_mask=None,
        capture_hidden_mode=CaptureHiddenMode.FULL,
    )
    buffers = TreeBuffers(bs, DEVICE)
    buffers.write(to_device(tree, DEVICE))
    fixture.backend.use_verify_shared_kv = False
    fixture.backend.use_verify_splitkv = True
    fixture.backend.verify_splitkv_fwd = VerifyAttention(buffers, None)

    inputs = dense_fixture_inputs(fixture)
    expected = dense_attention_reference_with_custom_mask(
        fixture.reference_module,
        replace(case, sliding_window_size=None),
        inputs["prefix_hidden"],
        inputs["input_hidden"],
        masks,
    )
    with forward_context(ForwardContext(attn_backend=fixture.backend)):
        fixture.backend.init_forward_metadata(batch)
        actual = run_dense_forward(fixture, batch, inputs)
    torch.testing.assert_close(actual, expected, atol=DENSE_ATOL, rtol=DENSE_RTOL)

    # The same call without our kernel is a chain: the test would notice a silent fall back.
    fixture.backend.use_verify_splitkv = False
    with forward_context(ForwardContext(attn_backend=fixture.backend)):
        fixture.backend.init_forward_metadata(batch)
        chain = run_dense_forward(fixture, batch, inputs)
    assert not torch.allclose(chain, expected, atol=DENSE_ATOL, rtol=DENSE_RTOL)
