"""The seeded sampler in SGLang's own prefill and decode passes.

SGLang's ``Sampler`` draws from a generator that knows neither request nor position, or, in
deterministic mode, hashes the sorted rank. The functions here are hooked (``plugin/hooks.py``) into
``SamplingBatchInfo``, which then carries a seed per request through filter and merge, and into
``Sampler``, which then takes the token that a tree node would take.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch

from sglang_dflash.step.sampling import SamplingParams, filter_probs, sample_rows

# What `number_sample` appends to the id of a parallel sample (n > 1).
_SAMPLE_ID = re.compile(r"[0-9a-f]{32}-(\d+)")
_COUNTER = "dflash_samples"


def _hash(*parts: object) -> int:
    """63 well-mixed bits of the parts."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class Seeds:
    """Gives each request its seed, once: it stays with the request through retraction.

    A seeded request's is its own; sample k > 0 of a request with n > 1 has one derived from it. The
    others' come from the server's random seed (broadcast by SGLang, equal on all ranks), the number of
    requests seeded before (ranks schedule alike) and the request's id, so that neither a reused id nor
    a fixed ``--random-seed`` repeats noise within a server's life or between replicas.
    """

    def __init__(self) -> None:
        self.server_seed = 0
        self._count = itertools.count()

    def of(self, req: Any) -> int:
        seed = getattr(req, "dflash_seed", None)
        if seed is None:
            seed = req.dflash_seed = self._draw(req)
        return seed

    def _draw(self, req: Any) -> int:
        asked = req.sampling_params.sampling_seed
        if asked is None:
            return _hash("server", self.server_seed, next(self._count), req.rid)
        if req.sampling_params.n <= 1:
            return asked
        found = _SAMPLE_ID.fullmatch(req.rid)
        # Without a number (another front end than SGLang's): distinct, though not reproducible.
        sample = req.rid if found is None else int(found[1])
        return asked if sample == 0 else _hash("sample", asked, sample)


SEEDS = Seeds()


# -- a batch's seeds -----------------------------------------------------------


def seeds_of(info: Any) -> torch.Tensor | None:
    """int64 [bs], or None for a batch that no request is behind (graph capture, warm-up)."""
    return getattr(info, "dflash_seeds", None)


def attach_seeds(info: Any, batch: Any) -> None:
    """For ``SamplingBatchInfo.from_schedule_batch``."""
    seeds = torch.tensor([SEEDS.of(req) for req in batch.reqs], dtype=torch.int64)
    if str(info.device).startswith("cuda"):
        seeds = seeds.pin_memory()
    info.dflash_seeds = seeds.to(info.device, non_blocking=True)


def merge_seeds(info: Any, other: Any) -> None:
    """For ``SamplingBatchInfo.merge_batch``: other's rows come behind."""
    mine, others = seeds_of(info), seeds_of(other)
    if mine is not None and others is not None:
        info.dflash_seeds = torch.cat([mine, others])


def filter_seeds(info: Any, keep: torch.Tensor) -> None:
    """For ``SamplingBatchInfo.filter_batch``; ``keep`` are row numbers on the device."""
    seeds = seeds_of(info)
    if seeds is not None:
        info.dflash_seeds = seeds[keep]


def copy_seeds(copy: Any, info: Any) -> None:
    """For ``SamplingBatchInfo.copy_for_forward``, which copies declared fields only."""
    copy.dflash_seeds = seeds_of(info)


def params_of(info: Any) -> SamplingParams:
    """The batch's sampling parameters, as the filters and the race want them."""
    return SamplingParams(
        temperature=info.temperatures.view(-1),
        top_k=info.top_ks,
        top_p=info.top_ps,
        min_p=info.min_ps,
        all_greedy=bool(info.is_all_greedy),
        any_top_k=bool(info.need_top_k_sampling),
        any_top_p=bool(info.need_top_p_sampling),
        any_min_p=bool(info.need_min_p_sampling),
        seeds=seeds_of(info),
    )


# -- the choice ----------------------------------------------------------------


def sample_from_probs(
    original: Callable, self: Any, probs: torch.Tensor, info: Any, positions: torch.Tensor, simple: bool
) -> tuple[torch.Tensor, Any]:
    """AROUND ``Sampler._sample_from_probs``: the seeded race instead of a draw.

    ``positions`` are those of the input tokens; the sampled token's index is one more. SGLang's
    deterministic mode keeps its own sampler.
    """
    if seeds_of(info) is None or info.sampling_seed is not None:
        return original(self, probs, info, positions, simple)
    params = params_of(info)
    chosen = sample_rows(probs.float(), params, positions + 1).to(torch.int32)
    rows = info.sampling_mask_batch_indices
    return chosen, None if rows is None else _mask_capture(filter_probs(probs, params), chosen, rows)


def _mask_capture(filtered: torch.Tensor, chosen: torch.Tensor, rows: torch.Tensor) -> Any:
    """What a request with ``return_sampling_mask`` gets: the support it was sampled from."""
    from sglang.srt.layers.sampler import _SamplingMaskCapture

    weights = filtered.index_select(0, rows)
    picked = chosen.index_select(0, rows).long()
    return _SamplingMaskCapture(
        weights=weights,
        token_ids=None,
        selected_weight=weights.gather(1, picked[:, None])[:, 0],
        batch_rows=rows,
    )


# -- parallel samples, in the front end ------------------------------------------


def attach_counter(prompt: Any, batch: Any) -> None:
    """For ``GenerateReqInput.__getitem__``: a counter that all samples of one prompt share."""
    if batch.parallel_sample_num > 1:
        # The first of a prompt's ids is for a pass that only fills the prefix cache.
        prompt.__dict__.setdefault(_COUNTER, itertools.count(-1))


def number_sample(original: Callable, self: Any) -> str:
    """AROUND ``GenerateReqInput.regenerate_rid``: sample k's id ends in ``-k``.

    The scheduler sees n requests with one seed and random ids; the number is what tells them apart in
    the same way every time.
    """
    rid = original(self)
    counter = self.__dict__.get(_COUNTER)
    number = -1 if counter is None else next(counter)
    if number >= 0:
        self.rid = rid = f"{rid}-{number}"
    return rid
