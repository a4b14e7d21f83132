"""Prompts given as embeddings: in the model's dtype, and beside prompts of token ids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dflash.platform.embeds import in_own_dtype
from sglang_dflash.upstream.embeds import spread_embeds

OWN = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def batch(embeds: list[bool], lens: list[int], **fields: Any) -> SimpleNamespace:
    rows = sum(width for width, has in zip(lens, embeds, strict=True) if has)
    given = OWN[:rows] if rows else None
    reqs = [SimpleNamespace(input_embeds=[[0.0]] if has else None) for has in embeds]
    known = {"replace_embeds": None, "replace_positions": None}
    return SimpleNamespace(reqs=reqs, extend_lens=lens, device="cpu", input_embeds=given, **known | fields)


@pytest.mark.parametrize(
    ("embeds", "lens", "rows"),
    [
        ([True], [3], [0, 1, 2]),
        ([False, True, False, True], [2, 1, 1, 2], [2, 4, 5]),
        ([True, False], [2, 4], [0, 1]),
    ],
)
def test_embeddings_go_to_their_own_rows(embeds: list[bool], lens: list[int], rows: list[int]) -> None:
    made = batch(embeds, lens)
    spread_embeds(None, made)
    assert made.input_embeds is None
    assert made.replace_positions.tolist() == rows
    assert torch.equal(made.replace_embeds, OWN[: len(rows)])


def test_a_batch_without_embeddings_is_left_alone() -> None:
    made = batch([False], [4], replace_embeds=OWN[:1], replace_positions=torch.tensor([2]))
    spread_embeds(None, made)
    assert torch.equal(made.replace_embeds, OWN[:1])
    assert made.replace_positions.tolist() == [2]


def test_overrides_of_single_positions_win() -> None:
    made = batch([True], [2], replace_embeds=OWN[2:], replace_positions=torch.tensor([1]))
    spread_embeds(None, made)
    rows = torch.zeros(2, 2)
    rows[made.replace_positions] = made.replace_embeds
    assert torch.equal(rows, torch.stack([OWN[0], OWN[2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("replaced", [False, True])
def test_the_runner_keeps_its_own_dtype(dtype: torch.dtype, replaced: bool) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner

    given = torch.tensor([[1.0009765625, 2.0], [3.0, 4.0]])
    forward = SimpleNamespace(
        input_embeds=given.clone(),
        replace_embeds=OWN[2:] if replaced else None,
        replace_positions=torch.tensor([1]) if replaced else None,
    )
    runner = SimpleNamespace(support_pp=False, is_generation=True, dtype=dtype, _pp_kwargs=lambda pp: {})
    original = getattr(ModelRunner._extend_forward_kwargs, "__wrapped__", ModelRunner._extend_forward_kwargs)
    got = in_own_dtype(original)(runner, forward, None)["input_embeds"]
    want = torch.stack([given[0], OWN[2] if replaced else given[1]]).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(forward.input_embeds, given), "the batch's own tensor must not be written"
