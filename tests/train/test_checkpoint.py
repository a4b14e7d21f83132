"""The checkpoint is the stock one: dflash 0.1.0 gives the same numbers, SGLang reads its config."""

import json

import pytest
import torch

from sglang_dflash.errors import UserError
from sglang_dflash.train import checkpoint
from sglang_dflash.train.batches import build_batch
from sglang_dflash.train.model import Drafter


@pytest.fixture
def saved(tmp_path, drafter_config):
    torch.manual_seed(1)
    drafter = Drafter(drafter_config)
    with torch.no_grad():
        for p in drafter.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).bfloat16())
    checkpoint.save_drafter(tmp_path, drafter, {"tree_depth_bonus": [0.0] * 5})
    return tmp_path, drafter


def test_round_trip(saved):
    folder, drafter = saved
    again = checkpoint.load_drafter(folder)
    assert again.config == drafter.config
    for (name, a), b in zip(drafter.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


def test_dflash_package_gives_the_same_hidden_states(saved, make_document, target):
    dflash = pytest.importorskip("dflash.model", reason="pip install --no-deps dflash==0.1.0")
    folder, drafter = saved
    stock = dflash.DFlashDraftModel.from_pretrained(folder, dtype=torch.float32)
    document = make_document(30)
    anchors = torch.tensor([6, 13, 22])
    c = drafter.config
    batch = build_batch([document], [anchors], c.block, c.mask_token, 4.0)
    embeddings = torch.nn.functional.embedding(batch.inputs, target.embed)
    with torch.no_grad():
        ours = drafter(embeddings, batch.planes[:, :, :-1], batch.layout)[0]
        for i, anchor in enumerate(anchors.tolist()):
            theirs = stock(
                target_hidden=document.planes[None, :anchor, :-1].flatten(2),
                noise_embedding=embeddings[:, i],
                position_ids=torch.arange(anchor + c.block)[None],
            )[0]
            # Rotary tables differ in rounding (double against float), nothing else.
            torch.testing.assert_close(ours[i], theirs, atol=1e-4, rtol=1e-3)


def test_sglang_parses_the_config(saved):
    utils = pytest.importorskip("sglang.srt.speculative.dflash_utils")
    from transformers import Qwen3Config

    folder, drafter = saved
    config = Qwen3Config.from_pretrained(folder)
    parsed = utils.parse_dflash_draft_config(draft_hf_config=config)
    assert parsed.block_size == drafter.config.block
    assert parsed.mask_token_id == drafter.config.mask_token
    assert tuple(parsed.target_layer_ids) == drafter.config.target_layers
    assert parsed.num_target_layers == drafter.config.target_depth


def test_warm_start_copies_layers_and_keeps_scale(target, drafter_config):
    drafter = Drafter(drafter_config)
    tokens = torch.arange(10, 60)[None]
    checkpoint.warm_start(drafter, target, (1, 4), tokens)
    q = drafter.layers[1].self_attn
    assert torch.equal(q.q_proj.weight, target.layers[4].qkv[: q.q_proj.weight.shape[0]])
    assert 0.2 < float(q.q_norm.weight.mean()) < 20
    with pytest.raises(UserError, match="--warm-layers"):
        checkpoint.warm_start(drafter, target, (1,), tokens)
    with pytest.raises(UserError, match="0 to 5"):
        checkpoint.warm_start(drafter, target, (5, 6), tokens)


@pytest.mark.parametrize("layers", [(0, 5), (3, 2), (-1, 2)])
def test_feature_layers_that_sglang_cannot_capture(target, layers):
    with pytest.raises(UserError, match="from 0 to 4"):
        checkpoint.config_for(target, layers=1, block=4, target_layers=layers, mask_token=3)


def test_default_layers_are_the_paper_s():
    assert checkpoint.default_target_layers(36) == (1, 9, 17, 25, 33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, "shape"),
        ({"block_size": None, "dflash_config": {}}, "not a DFlash drafter"),
        ({"dflash_config": {"sample_from_anchor": True}}, "sample_from_anchor"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"layer_types": ["sliding_attention"]}, "sliding"),
    ],
)
def test_foreign_checkpoints_are_refused_by_name(saved, change, message):
    folder, _ = saved
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        checkpoint.load_drafter(folder)


def test_truncated_weights_are_one_line(saved):
    folder, _ = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read") as error:
        checkpoint.load_drafter(folder)
    assert "\n" not in str(error.value)
