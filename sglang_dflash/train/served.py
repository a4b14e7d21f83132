"""Accept length of a running server, request by request, beside the offline judgement of the same prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import httpx

from sglang_dflash.client import access
from sglang_dflash.client.info import ServerInfo, normalize_url, read_server_info
from sglang_dflash.errors import UserError
from sglang_dflash.train.batches import Document
from sglang_dflash.train.judge import Walk, group_indices


@dataclass(frozen=True)
class Policy:
    """What a server does with a block: ``chain``, or a tree of ``nodes`` from ``top_k`` candidates each."""

    mode: str
    block: int
    nodes: int = 0
    top_k: int = 16

    @property
    def name(self) -> str:
        return f"tree-{self.nodes}" if self.mode == "tree" else "chain"


def policy_of(info: ServerInfo) -> Policy:
    """The policy in use; UserError for a server without a DFlash drafter."""
    if (info.speculative_algorithm or "").upper() != "DFLASH":
        raise UserError("the server runs without a DFlash drafter: start it with sglang-dflash serve")
    marker = info.marker
    if marker is None or marker.mode != "tree":
        return Policy("chain", int(info.speculative_num_draft_tokens or 0))
    more = marker.model_extra or {}
    top_k = int((more.get("settings") or {}).get("top_k", 16))
    return Policy("tree", int(more["block_size"]), int(more["num_nodes"]), top_k)


#: The group of the answers that came out token for token: there the two lengths are of one text.
EQUAL = "equal"


@dataclass
class ServedRun:
    """Walks by group, as the offline judgement names them, and of the answers that came out token for token.

    ``equal`` says of each answer whether it did.
    """

    policy: Policy
    walks: dict[str, Walk] = field(default_factory=dict)
    equal: list[bool] = field(default_factory=list)

    @property
    def answers(self) -> int:
        return len(self.equal)

    @property
    def same(self) -> int:
        return sum(self.equal)

    def as_dict(self) -> dict:
        return {
            "policy": self.policy.name,
            "accept_length": {name: round(walk.length, 4) for name, walk in self.walks.items()},
            "tokens": {name: walk.tokens for name, walk in self.walks.items()},
            "passes": {name: walk.passes for name, walk in self.walks.items()},
            "answers": self.answers,
            "same_answer": self.same,
        }


def run(url: str, documents: list[Document], max_new: int, api_key: str | None = None) -> ServedRun:
    """Answers the documents' prompts one at a time, at their temperature, from token ids.

    ``spec_verify_ct`` counts verify passes; the first token of an answer comes from the prefill,
    the rest from verify passes, so the length is (tokens - 1) / passes, as offline.
    """
    base = normalize_url(url)
    out = ServedRun(policy_of(read_server_info(base, api_key=api_key)))
    counts = []
    session = httpx.Client(
        base_url=base,
        headers=access.headers(api_key),
        timeout=600.0,
        trust_env=False,
        verify=access.trust(base),
    )
    with session as http:
        for document in documents:
            prompt, answer = document.tokens[: document.prompt_len], document.tokens[document.prompt_len :]
            sampling = {"temperature": document.temperature, "max_new_tokens": max_new}
            body = {"input_ids": prompt.tolist(), "sampling_params": sampling}
            try:
                reply = http.post("/generate", json=body)
                reply.raise_for_status()
            except httpx.HTTPError as error:
                raise UserError(f"{base} failed on a request: {error}") from None
            tokens = reply.json()["output_ids"]
            counts.append((len(tokens) - 1, int(reply.json()["meta_info"].get("spec_verify_ct") or 0)))
            out.equal.append(tokens == answer.tolist())
    groups = group_indices([(d.family, d.temperature) for d in documents])
    if out.same:
        groups[EQUAL] = [i for i, equal in enumerate(out.equal) if equal]
    for name, members in groups.items():
        out.walks[name] = Walk(sum(counts[i][1] for i in members), sum(counts[i][0] for i in members))
    return out
