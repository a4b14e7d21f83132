"""Batches: packed rows mean what their documents mean alone, and every document has its turn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sglang_dflash.train.batches import Sampler, _fill, build_batch, last_hidden, pack
from sglang_dflash.train.model import Drafter

LENGTHS = (9, 14, 11)
# The last anchors' slots run past their documents' ends, into the next document where rows are packed.
ANCHORS = ([5, 7], [5, 9, 12], [6, 9])


@pytest.mark.parametrize("how", ["split", "dense", "flex"])
def test_a_packed_row_is_its_documents(how, drafter_config, make_document, target):
    c = drafter_config
    drafter = Drafter(c).requires_grad_(False)
    documents = [make_document(length, seed=i) for i, length in enumerate(LENGTHS)]

    def blocks(rows, anchors):
        batch = build_batch(rows, anchors, c.block, c.mask_token, 4.0, how=how)
        hidden = drafter(F.embedding(batch.inputs, target.embed), batch.planes[:, :, :-1], batch.layout)
        real = batch.labels >= 0
        wanted = last_hidden(batch, rows).masked_fill(~real[..., None], 0)
        return batch.inputs, batch.labels, batch.weight, wanted, hidden

    alone = [
        blocks([document], [torch.tensor(places)])
        for document, places in zip(documents, ANCHORS, strict=True)
    ]
    starts = pack(documents).starts
    assert starts == (0, 9, 23)
    together = torch.cat([torch.tensor(p) + s for p, s in zip(ANCHORS, starts, strict=True)])
    packed = blocks([pack(documents)], [together])
    for got, parts in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(parts, dim=1), atol=2e-5, rtol=1e-4)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60))
def test_rows_hold_every_document_once_and_no_more_than_fits(lengths, pack_to):
    rows = _fill(lengths, pack_to)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= pack_to for row in rows)
    # Best fit leaves no two rows that could be one, save where both hold a document too long to share.
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > pack_to
    assert _fill(lengths, 0) == [[i] for i in range(len(lengths))]


def test_an_epoch_visits_every_document_of_the_packs(make_document):
    documents = [make_document(8 + i % 5, seed=i) for i in range(23)]
    sampler = Sampler(documents, rows=2, anchors=3, seed=1, pack_to=32)
    assert all(len(unit) > 1 for unit in sampler.units[:-1])
    seen = []
    for step in range(sampler.per_epoch):
        rows, anchors, _ = sampler.draw(step)
        for row, places in zip(rows, anchors, strict=True):
            number, start = row.places()
            inside = places - start[places]
            assert (inside >= 5).all()
            ends = torch.bincount(number)[number[places]]
            assert (inside < ends - 1).all()
            assert torch.bincount(number[places]).max() <= 3
            seen += [tuple(row.tokens[number == i].tolist()) for i in range(len(row.starts))]
    assert len(seen) == len(set(seen))
    left_out = len(sampler.units) - sampler.per_epoch * sampler.rows
    assert len(documents) - len(seen) <= left_out * max(map(len, sampler.units))
    again = Sampler(documents, rows=2, anchors=3, seed=1, pack_to=32).draw(1)
    assert all(torch.equal(a, b) for a, b in zip(again[1], sampler.draw(1)[1], strict=True))
