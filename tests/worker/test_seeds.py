"""A request's seed: where it comes from, and that it stays with its row of SGLang's batch."""

from __future__ import annotations

import copy
import itertools
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dflash.upstream import sampler
from sglang_dflash.upstream.sampler import Seeds


def request(rid: str = "", seed: int | None = None, n: int = 1) -> Any:
    return SimpleNamespace(
        rid=rid or uuid.uuid4().hex, sampling_params=SimpleNamespace(sampling_seed=seed, n=n)
    )


def server(random_seed: int = 1) -> Seeds:
    seeds = Seeds()
    seeds.server_seed = random_seed
    return seeds


def test_a_given_seed_is_the_requests_own() -> None:
    assert server(1).of(request(seed=77)) == server(2).of(request(seed=77)) == 77
    assert server().of(request(seed=-(2**63))) == -(2**63)


def test_unseeded_requests_differ_even_with_one_id() -> None:
    seeds = server()
    drawn = [seeds.of(request("mine")) for _ in range(50)]
    assert len(set(drawn)) == 50
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_ranks_draw_alike_and_servers_do_not() -> None:
    """Ranks see the same requests in the same order and have the same random seed."""
    ids = [uuid.uuid4().hex for _ in range(10)]
    first, second = server(), server()
    assert [first.of(request(rid)) for rid in ids] == [second.of(request(rid)) for rid in ids]
    other = server(random_seed=2)
    assert not {server().of(request(rid)) for rid in ids} & {other.of(request(rid)) for rid in ids}
    # Two replicas with one fixed --random-seed see other ids.
    assert server().of(request("a")) != server().of(request("b"))


def test_a_seed_outlives_retraction() -> None:
    seeds = server()
    req = request()
    before = seeds.of(req)
    seeds.of(request())
    assert seeds.of(req) == before


def test_parallel_samples_differ_and_repeat() -> None:
    def samples() -> list[int]:
        return [server().of(request(f"{uuid.uuid4().hex}-{k}", seed=5, n=4)) for k in range(4)]

    assert samples() == samples()
    assert len(set(samples())) == 4
    assert samples()[0] == 5, "the first sample is what the seed gives alone"
    # An id that looks like a sample's is nothing special where n is 1.
    assert server().of(request(f"{uuid.uuid4().hex}-3", seed=5)) == 5
    # Samples that nobody numbered must not be equal either.
    assert server().of(request("a", seed=5, n=2)) != server().of(request("b", seed=5, n=2))


def test_samples_are_numbered_as_the_front_end_makes_them() -> None:
    """As ``TokenizerManager._handle_batch_request`` calls SGLang's own class."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    obj = GenerateReqInput(text=["one", "two"], sampling_params={"n": 3})
    obj.normalize_batch_and_arguments()
    prompts = [obj[i] for i in range(2)]
    for prompt in prompts:
        sampler.attach_counter(prompt, obj)
        sampler.attach_counter(prompt, obj)  # later reads of obj[i]
    original = GenerateReqInput.regenerate_rid
    ids = {}
    for prompt in prompts:
        warm = copy.copy(prompt)
        assert sampler.number_sample(original, warm).isalnum()
    for i, prompt in enumerate(prompts):
        made = [copy.copy(prompt) for _ in range(3)]
        ids[i] = [sampler.number_sample(original, one) for one in made]
        assert [one.rid for one in made] == ids[i]
    for i in range(2):
        assert [rid.rpartition("-")[2] for rid in ids[i]] == ["0", "1", "2"]
    assert len(set(itertools.chain(*ids.values()))) == 6

    single = GenerateReqInput(text="one", sampling_params={})
    single.normalize_batch_and_arguments()
    assert sampler.number_sample(original, single).isalnum()


@pytest.fixture
def batch_info(monkeypatch: pytest.MonkeyPatch) -> type:
    """SGLang's class with our hooks in, for the length of a test."""
    from sglang.srt.plugins.hook_registry import _wrap_fn
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from sglang_dflash.plugin import hooks

    for target, (hook, kind) in hooks._sampler_table().items():
        owner, name = target.rsplit(".", 2)[-2:]
        if owner == "SamplingBatchInfo":
            monkeypatch.setattr(
                SamplingBatchInfo, name, _wrap_fn(getattr(SamplingBatchInfo, name), hook, kind)
            )
    return SamplingBatchInfo


class Batch:
    """The part of SGLang's ``ScheduleBatch`` that the sampling info reads."""

    device = "cpu"

    def __init__(self, reqs: list[Any]) -> None:
        self.reqs = reqs


def batch_of(cls: type, reqs: list[Any]) -> Any:
    """What ``from_schedule_batch`` makes, without a server's published settings."""
    from sglang.srt.sampling.penaltylib import BatchedPenalizerOrchestrator

    rows, batch = len(reqs), Batch(reqs)
    info = cls(
        temperatures=torch.ones(rows, 1),
        top_ps=torch.ones(rows),
        top_ks=torch.full((rows,), 1 << 30),
        min_ps=torch.zeros(rows),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        vocab_size=8,
        device="cpu",
        penalizer_orchestrator=BatchedPenalizerOrchestrator(vocab_size=8, batch=batch, penalizers=set()),
    )
    info.adjusted_from_schedule_batch(batch, 8)
    return info


def test_seeds_stay_with_their_rows(batch_info: type) -> None:
    reqs = [request(seed=k) for k in range(5)]
    info = batch_of(batch_info, reqs[:3])
    assert sampler.seeds_of(info).tolist() == [0, 1, 2]

    keep = [2, 0]
    info.filter_batch(keep, torch.tensor(keep))
    assert sampler.seeds_of(info).tolist() == [2, 0]

    info.merge_batch(batch_of(batch_info, reqs[3:]))
    assert sampler.seeds_of(info).tolist() == [2, 0, 3, 4]

    forward = info.copy_for_forward()
    info.filter_batch([1], torch.tensor([1]))
    assert sampler.seeds_of(forward).tolist() == [2, 0, 3, 4]
    assert sampler.params_of(forward).seeds.tolist() == [2, 0, 3, 4]
    assert sampler.seeds_of(info).tolist() == [0]


def test_a_retracted_request_comes_back_with_its_seed(batch_info: type) -> None:
    reqs = [request() for _ in range(3)]
    before = sampler.seeds_of(batch_of(batch_info, reqs)).tolist()
    again = sampler.seeds_of(batch_of(batch_info, [reqs[2], request(), reqs[0]])).tolist()
    assert [again[0], again[2]] == [before[2], before[0]]
    assert again[1] not in before


def test_the_hook_samples_one_past_the_input_and_leaves_others_alone() -> None:
    from dflash_kernels import race_argmax

    info = SimpleNamespace(
        dflash_seeds=torch.tensor([4, 5]),
        sampling_seed=None,
        sampling_mask_batch_indices=None,
        temperatures=torch.ones(2, 1),
        top_ks=torch.full((2,), 1 << 30),
        top_ps=torch.ones(2),
        min_ps=torch.zeros(2),
        is_all_greedy=False,
        need_top_k_sampling=False,
        need_top_p_sampling=False,
        need_min_p_sampling=False,
    )
    probs, positions = torch.randn(2, 60).softmax(-1), torch.tensor([30, 9])
    got, capture = sampler.sample_from_probs(pytest.fail, None, probs, info, positions, True)
    assert capture is None
    assert got.dtype == torch.int32
    assert got.tolist() == race_argmax(probs, info.dflash_seeds, positions + 1).tolist()

    # A request that asks for the support it was sampled from.
    info.sampling_mask_batch_indices = torch.tensor([1])
    info.need_top_k_sampling, info.top_ks = True, torch.tensor([1 << 30, 5])
    got, capture = sampler.sample_from_probs(pytest.fail, None, probs, info, positions, False)
    assert int((capture.weights > 0).sum()) == 5
    assert float(capture.selected_weight) == float(probs[1, got[1].long()])

    for name, value in (("sampling_seed", torch.zeros(2)), ("dflash_seeds", None)):
        other = SimpleNamespace(**{**vars(info), name: value})
        told = sampler.sample_from_probs(lambda *args: "upstream", None, probs, other, positions, True)
        assert told == "upstream"
