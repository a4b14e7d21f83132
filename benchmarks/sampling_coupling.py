"""Accept length of sampled requests, with drafts that know the sampling noise and with drafts that do not.

Offline: the sampler's text is fixed by its seed whatever is drafted, so it is decoded once per prompt and
temperature; then the drafter drafts from every position of it, and a served run's steps are walked. Greedy
texts of the same prompts are the baseline. The scores are those of the served worker (`couple`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from dflash_kernels import draft_topk, race_argmax
from torch.nn import functional as F

from sglang_dflash.models.fetch import fetch
from sglang_dflash.models.registry import SMOLLM2
from sglang_dflash.step.noise import StepNoise
from sglang_dflash.step.sampling import SamplingParams
from sglang_dflash.train.batches import Document, build_batch
from sglang_dflash.train.chat import Chat
from sglang_dflash.train.checkpoint import load_drafter
from sglang_dflash.train.given import read_prompts
from sglang_dflash.train.judge import TOP, Table, Walk, tree_accepts
from sglang_dflash.train.model import Drafter
from sglang_dflash.train.target import DenseTarget
from sglang_dflash.worker.draft.couple import POOL, couple, race_for

OFF = 1 << 30
CHUNK = 32  # anchors drafted at once


def sampled(rows: int, temperature: float) -> SamplingParams:
    """Parameters without filters for ``rows`` requests."""
    return SamplingParams(
        torch.full((rows,), temperature),
        torch.full((rows,), OFF),
        torch.ones(rows),
        torch.zeros(rows),
        all_greedy=False,
        any_top_k=False,
        any_top_p=False,
        any_min_p=False,
    )


class Decoder:
    """Plain decoding of all prompts together, keeping the drafter's features."""

    def __init__(
        self, target: DenseTarget, prompts: list[list[int]], layers: tuple[int, ...], new: int
    ) -> None:
        self.target, self.prompts, self.layers, self.new = target, prompts, layers, new
        self.seeds = torch.arange(len(prompts)) * 7919 + 13

    def _pick(self, hidden: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, temperature: float):
        logits = F.linear(hidden, self.target.head).float()
        if temperature == 0:
            return logits.argmax(-1).tolist()
        return race_argmax((logits / temperature).softmax(-1), self.seeds[rows], index).tolist()

    @torch.inference_mode()
    def run(self, temperature: float, stop: set[int]) -> list[tuple[list[int], torch.Tensor]]:
        """Tokens and planes [tokens, planes, hidden] of each prompt with its answer."""
        target, n = self.target, len(self.prompts)
        longest = max(map(len, self.prompts)) + self.new + 1
        cache = target.new_cache(n, longest)
        planes = torch.zeros(n, longest, len(self.layers) + 1, target.hidden, dtype=target.dtype)
        texts = [list(prompt) for prompt in self.prompts]
        for row, prompt in enumerate(self.prompts):
            out = target.prefill(torch.tensor([prompt]), self.layers, cache, row)
            planes[row, : len(prompt)] = out[0]
            first = self._pick(out[:, -1, -1], torch.tensor([row]), torch.tensor([len(prompt)]), temperature)
            texts[row] += first
        for _ in range(self.new - 1):
            alive = torch.tensor([row for row in range(n) if texts[row][-1] not in stop])
            if not len(alive):
                break
            at = torch.tensor([len(texts[row]) - 1 for row in alive.tolist()])
            last = torch.tensor([texts[row][-1] for row in alive.tolist()])
            keys = max(map(len, texts))
            out = target.decode(last, alive, at, cache, [(0, n, keys)], self.layers)
            planes[alive, at] = out
            picked = self._pick(out[:, -1], alive, at + 1, temperature)
            for row, token in zip(alive.tolist(), picked, strict=True):
                texts[row].append(token)
        return [(text, planes[row, : len(text)]) for row, text in enumerate(texts)]


@torch.inference_mode()
def draft(
    drafter: Drafter, target: DenseTarget, document: Document, seed: int, temperature: float
) -> Iterator[tuple[str, Table]]:
    """Drafts from every anchor of one answer, by method."""
    c, places = drafter.config, torch.tensor(list(document.anchors()))
    batch = build_batch([document], [places], c.block, c.mask_token, 1.0)
    hidden = drafter(F.embedding(batch.inputs, target.embed), batch.planes[:, :, :-1], batch.layout)[0, :, 1:]
    depth = c.block - 1
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"uncoupled": [], "coupled": []}
    for at in range(0, len(places), CHUNK):
        rows = hidden[at : at + CHUNK].reshape(-1, hidden.shape[-1])
        parts["uncoupled"].append(draft_topk(rows, target.head, TOP)[:2])
        if temperature == 0:
            continue
        prefix = places[at : at + CHUNK]
        params = sampled(len(prefix), temperature)
        noise = StepNoise(torch.full_like(prefix, seed), prefix, c.block)
        race = race_for(noise, params, depth, target.vocab)
        values, ids, _ = draft_topk(rows, target.head, POOL, race=race)
        found = couple(values, ids, race, params.per_row(depth), TOP)
        parts["coupled"].append((found.chances, found.ids))
    for method, found in parts.items():
        if found:
            logprobs, ids = (torch.cat(t).view(len(places), depth, -1) for t in zip(*found, strict=True))
            yield (
                method,
                Table(
                    batch.inputs[0, :, 0],
                    batch.labels[0],
                    ids,
                    logprobs,
                    torch.empty(0),
                    document.family,
                    temperature,
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=20, help="benchmark prompts, half chat, half code")
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 16, 32])
    options = parser.parse_args()

    folder = fetch(SMOLLM2)
    target = DenseTarget(folder, dtype=torch.float32)
    drafter = load_drafter(SMOLLM2.drafter_dir).float().eval()
    chat = Chat(folder)
    rows = list(read_prompts(Path(__file__).parent / "prompts.jsonl"))
    half = -(-options.prompts // 2)
    rows = [row for kind in ("chat", "code") for row in [r for r in rows if r[0] == kind][:half]]
    decoder = Decoder(
        target, [chat.prompt_ids(text) for _, text in rows], drafter.config.target_layers, options.new_tokens
    )
    print("| temperature | drafts | " + " | ".join(f"N = {n}" for n in options.budgets) + " |")
    print("| ---: | --- |" + " ---: |" * len(options.budgets))
    base: list[float] = []
    for temperature in [0.0, *options.temperatures]:
        walks: dict[str, list[Walk]] = {}
        texts = decoder.run(temperature, chat.stop_ids())
        for (kind, _), prompt, seed, (text, planes) in zip(
            rows, decoder.prompts, decoder.seeds.tolist(), texts, strict=True
        ):
            if len(text) - len(prompt) < 3:
                continue
            document = Document(torch.tensor(text), len(prompt), kind, temperature, planes)
            for method, table in draft(drafter, target, document, seed, temperature):
                for walk, nodes in zip(
                    walks.setdefault(method, [Walk() for _ in options.budgets]), options.budgets, strict=True
                ):
                    walk.add(tree_accepts(table, nodes))
        for method, found in walks.items():
            lengths = [walk.length for walk in found]
            base = base or lengths
            cells = [f"{length:.3f} ({length / b:.2f}x)" for length, b in zip(lengths, base, strict=True)]
            name = "-" if temperature == 0 else method
            print(f"| {temperature:g} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
