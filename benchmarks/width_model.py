"""Which widths the policy would choose on an H200 and a B200, by a byte-and-operation model of a step.

    python benchmarks/width_model.py

Nothing here was measured on a GPU. Prices follow from data sheets and the shares below, acceptance from an
assumed accept length of one width; the policy (sglang_dflash/worker/width) then chooses over these tables
as it would over measured ones. docs/width.md says which measurement settles it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width.cost import Cell, CostTable
from sglang_dflash.worker.width.gain import Gains
from sglang_dflash.worker.width.policy import WidthPolicy
from sglang_dflash.worker.width.tiers import tiers_up_to

HBM_SHARE = 0.85  # of the data sheet's bandwidth that a decode pass streams at
TENSOR_SHARE = 0.6  # of dense bf16 operations, products of some hundred rows
ATTENTION_SHARE = 0.35  # the same for tree attention in Triton
TILE = 16  # rows that a product is padded to
KERNEL = 1.5e-6  # seconds of an operator's launch, drain and fill inside a CUDA graph
OPERATORS = 9  # per layer
GRAPH = 40e-6  # a graph's launch, per pass
TREE = 120e-6  # building, accepting and compacting
HOST = 0.0  # hidden behind the step by overlap scheduling
CONTEXT = 2048
WIDEST = Width(64, 16)
MOST_ROWS = 4096  # n x requests with a captured graph
LOADS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GRAPHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclass(frozen=True)
class Gpu:
    name: str
    hbm: float  # bytes/s
    tensor: float  # dense bf16 operations/s


@dataclass(frozen=True)
class Model:
    """bf16 throughout. ``experts`` of ``expert`` parameters a layer, ``active`` of them per row; 0: dense."""

    name: str
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    experts: int = 0
    active: int = 0

    @property
    def attention(self) -> int:
        return self.hidden * self.head_dim * (2 * self.q_heads + 2 * self.kv_heads)


GPUS = (Gpu("H200", 4.8e12, 989e12), Gpu("B200", 8.0e12, 2250e12))
DENSE = Model("Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936)
MIXTURE = Model("Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 768, 151936, experts=128, active=8)
DRAFT_LAYERS = 5


def products(gpu: Gpu, parameters: float, rows: int, streamed: float | None = None) -> float:
    """Seconds of products of ``rows`` with so many parameters, of which ``streamed`` are read."""
    padded = -(-rows // TILE) * TILE
    read = 2 * (parameters if streamed is None else streamed) / (gpu.hbm * HBM_SHARE)
    return max(read, 2 * parameters * padded / (gpu.tensor * TENSOR_SHARE))


def layers_seconds(model: Model, gpu: Gpu, layers: int, requests: int, n: int, dense_mlp: bool) -> float:
    rows = requests * n
    one = products(gpu, model.attention, rows)
    mlp = 3 * model.hidden * model.mlp
    if model.experts and not dense_mlp:
        touched = model.experts * (1 - (1 - model.active / model.experts) ** rows)
        one += products(gpu, model.active * mlp, rows, touched * mlp)
    else:
        one += products(gpu, mlp if not model.experts else 8 * mlp, rows)
    cache = requests * CONTEXT * model.kv_heads * model.head_dim * 2 * 2
    operations = 4 * rows * CONTEXT * model.q_heads * model.head_dim
    one += max(cache / (gpu.hbm * HBM_SHARE), operations / (gpu.tensor * ATTENTION_SHARE))
    return layers * (one + OPERATORS * KERNEL)


def head_seconds(model: Model, gpu: Gpu, rows: int) -> float:
    """The product and a pass over its float32 logits."""
    return products(gpu, model.hidden * model.vocab, rows) + 3 * 4 * rows * model.vocab / (
        gpu.hbm * HBM_SHARE
    )


def cells(model: Model, gpu: Gpu) -> list[Cell]:
    out = []

    def say(what, rows, requests, seconds) -> None:
        out.append(Cell(what=what, rows=rows, requests=requests, length=CONTEXT, ms=seconds * 1e3))

    features = (
        DRAFT_LAYERS * model.hidden**2 + DRAFT_LAYERS * 2 * model.hidden * model.kv_heads * model.head_dim
    )
    for requests in LOADS:
        for n in tiers_up_to(WIDEST.nodes):
            target = layers_seconds(model, gpu, model.layers, requests, n, False)
            say("target", n, requests, target + head_seconds(model, gpu, requests * n) + GRAPH)
        for b in range(2, WIDEST.block + 1):
            draft = layers_seconds(model, gpu, DRAFT_LAYERS, requests, b, True)
            say("draft", b, requests, draft + head_seconds(model, gpu, requests * (b - 1)) + GRAPH)
        project = products(gpu, features, requests) + 3 * KERNEL
        say("rest", 1, requests, project + HOST)
        for n in (2, WIDEST.nodes):
            say("rest", n, requests, products(gpu, features, requests * n) + 3 * KERNEL + TREE + HOST)
    return out


def policy_for(model: Model, gpu: Gpu, tokens: float) -> WidthPolicy:
    """The policy over the predicted table and a drafter that brings so many tokens at the greatest width."""
    captured = {n: [r for r in GRAPHS if n * r <= MOST_ROWS] for n in tiers_up_to(WIDEST.nodes)}
    table = CostTable(cells(model, gpu), captured=captured)
    gains = Gains(WIDEST.block, {str(WIDEST): tokens})
    return WidthPolicy(WIDEST, table, gains, max_rows=MOST_ROWS)


def rate(policy: WidthPolicy, width: Width, requests: int) -> float:
    """Tokens per second of the whole batch."""
    return 1e3 * requests * policy.gains.tokens(width, 0.0) / policy.cost.ms(width, requests, CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", default="9.5,4.5,2.5", help=f"assumed tokens per pass of a tree of {WIDEST}, greedy"
    )
    o = parser.parse_args()
    fixed = (Width(8, 8), Width(16, 16), Width(64, 16))
    for gpu in GPUS:
        for model in (DENSE, MIXTURE):
            for tokens in map(float, o.tokens.split(",")):
                assumed = f"{CONTEXT} cached tokens, {WIDEST} assumed to bring {tokens}"
                print(f"\n{gpu.name}, {model.name}, {assumed}:\n")
                columns = ("in flight", "plain tokens/s", "auto", "width", "tokens a step", *map(str, fixed))
                print(f"| {' | '.join(columns)} |")
                print("|---" * len(columns) + "|")
                for requests in LOADS:
                    policy = policy_for(model, gpu, tokens)
                    width = policy.choose(requests, CONTEXT, 0.0)
                    plain = rate(policy, PLAIN, requests)
                    others = [f"{rate(policy, w, requests) / plain:.2f}x" for w in fixed]
                    cells_ = (
                        requests,
                        f"{plain:.0f}",
                        f"{rate(policy, width, requests) / plain:.2f}x",
                        width,
                    )
                    cells_ = (*cells_, f"{policy.gains.tokens(width, 0.0):.2f}", *others)
                    print(f"| {' | '.join(map(str, cells_))} |")


if __name__ == "__main__":
    main()
