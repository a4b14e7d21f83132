"""What a draft block may see, by numbers (three implementations) and by gradients."""

import pytest
import torch

from sglang_dflash.train.masks import Layout
from sglang_dflash.train.model import Drafter

# Two documents packed in row 0 (7 + 9 tokens), one and padding in row 1.
DOCUMENT = torch.tensor([[0] * 7 + [1] * 9, [0] * 12 + [-1] * 4])
POSITION = torch.tensor([[*range(7), *range(9)], [*range(12)] + [0] * 4])
ANCHOR = torch.tensor([[3, 5, 9, 14], [1, 4, 8, 11]])


def setup(config, how="split", seed=0):
    torch.manual_seed(seed)
    drafter = Drafter(config)
    layout = Layout(ANCHOR, DOCUMENT, POSITION, config.block, how)
    embeddings = torch.randn(2, 4, config.block, config.hidden, requires_grad=True)
    features = torch.randn(2, 16, len(config.target_layers), config.hidden, requires_grad=True)
    return drafter, layout, embeddings, features


@pytest.mark.parametrize("how", ["dense", "flex"])
def test_ways_agree(drafter_config, how):
    drafter, layout, embeddings, features = setup(drafter_config)
    other = Layout(ANCHOR, DOCUMENT, POSITION, drafter_config.block, how)
    want = drafter(embeddings, features, layout)
    with torch.set_grad_enabled(how == "dense"):  # FlexAttention has no backward on CPU
        if how == "flex":
            drafter.requires_grad_(False)
            got = drafter(embeddings.detach(), features.detach(), other)
        else:
            got = drafter(embeddings, features, other)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    if how == "dense":
        grads = [torch.autograd.grad(x.square().sum(), (embeddings, features)) for x in (want, got)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("how", ["split", "dense"])
@pytest.mark.parametrize(("row", "block"), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2)])
def test_a_block_sees_only_its_past_and_itself(drafter_config, how, row, block):
    drafter, layout, embeddings, features = setup(drafter_config, how)
    out = drafter(embeddings, features, layout)[row, block]
    to_embeddings, to_features = torch.autograd.grad(out.square().sum(), (embeddings, features))
    touched = to_features.abs().sum((-1, -2)) > 0
    anchor = int(ANCHOR[row, block])
    document = int(DOCUMENT[row, anchor])
    wanted = torch.zeros(2, 16, dtype=torch.bool)
    wanted[row, :anchor] = DOCUMENT[row, :anchor] == document
    assert wanted.any()
    assert torch.equal(touched, wanted)
    others = to_embeddings.abs().sum((-1, -2))
    others[row, block] = 0
    assert others.abs().max() == 0
    # Bidirectional inside the block: the first masked slot depends on the last one.
    first = drafter(embeddings, features, layout)[row, block, 1]
    (grad,) = torch.autograd.grad(first.square().sum(), embeddings)
    assert (grad[row, block].abs().sum(-1) > 0).all()


def test_packed_equals_alone(drafter_config):
    """A document's drafts do not depend on what else lies in its row."""
    drafter, layout, embeddings, features = setup(drafter_config)
    packed = drafter(embeddings, features, layout)[0, 2:]
    alone = Layout(ANCHOR[:1, 2:] - 7, DOCUMENT[:1, 7:], POSITION[:1, 7:], drafter_config.block)
    single = drafter(embeddings[:1, 2:], features[:1, 7:], alone)[0]
    torch.testing.assert_close(packed, single, atol=2e-5, rtol=1e-4)
