"""A thousand different prompts through plain decoding and draft trees, in float32: are the answers equal?

    python benchmarks/thousand.py --minutes 30           # or: make thousand

The prompts are those of examples/corpus, short answers, greedy, with penalties and with seeds in turn. The
tree server answers them at 1 to 32 in flight in turn, its width following the load. Where an answer differs,
plain decoding is asked for the two likeliest tokens at the first difference: a near-tie is listed as one,
with its gap. Writes out/thousand.json; exit code 1 where an answer differs that is no near-tie.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import command
import httpx
from fleet import Fleet
from rich.console import Console
from rich.progress import Progress
from serving_rows import AUTO, PLAIN, ROOT

from sglang_dflash.cli import target
from sglang_dflash.errors import UserError
from sglang_dflash.train.corpus import load_split

LEVELS = (1, 4, 32, 8, 16, 2)
#: Of the log-probabilities of the two likeliest tokens; sums in another order move one by some 1e-5.
NEAR_TIE = 1e-4
_LONGEST = 96  # tokens of a prompt
_KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("greedy", {}),
    ("greedy", {}),
    ("greedy", {}),
    ("greedy", {}),
    ("frequency penalty", {"frequency_penalty": 0.6}),
    ("repetition penalty", {"repetition_penalty": 1.2}),
    ("seeded", {"temperature": 0.8}),
    ("seeded, filtered", {"temperature": 1.0, "top_p": 0.9, "top_k": 40}),
)


def bodies(prompts: Sequence[list[int]], tokens: int) -> list[tuple[str, dict[str, Any]]]:
    """(kind, ``/generate`` body) of each."""
    out = []
    for i, (ids, (kind, params)) in enumerate(zip(prompts, itertools.cycle(_KINDS), strict=False)):
        sampling = {"temperature": 0, "max_new_tokens": tokens, **params}
        if sampling["temperature"] > 0:
            sampling["sampling_seed"] = i
        out.append((kind, {"input_ids": ids, "sampling_params": sampling}))
    return out


def prompts_of(folders: Sequence[Path], count: int) -> list[list[int]]:
    """Different templated prompts of at most ``_LONGEST`` tokens, in an order that is always the same."""
    found: set[tuple[int, ...]] = set()
    for shard in load_split(folders, "train"):
        for start, length in zip(shard.offsets, shard.prompt_len, strict=False):
            if length <= _LONGEST:
                found.add(tuple(map(int, shard.tokens[start : start + length])))
    if len(found) < count:
        raise UserError(f"the corpora hold {len(found)} different short prompts, not {count}")
    return [list(ids) for ids in random.Random(0).sample(sorted(found), count)]


def chunks(count: int) -> list[tuple[int, range]]:
    """(requests in flight, which requests), until all had their turn."""
    out, at = [], 0
    for level in itertools.cycle(LEVELS):
        if at >= count:
            return out
        out.append((level, range(at, min(at + 3 * level, count))))
        at += 3 * level
    raise AssertionError("the cycle never ends")


def answers(
    url: str,
    asked: Sequence[dict[str, Any]],
    levels: Sequence[tuple[int, range]],
    progress: Progress,
    name: str,
) -> list[list[int]]:
    """Output ids of all requests."""
    task = progress.add_task(name, total=len(asked))
    out: list[list[int]] = []
    with httpx.Client(base_url=url, timeout=600.0, trust_env=False) as http:

        def ask(i: int) -> list[int]:
            reply = http.post("/generate", json=asked[i])
            reply.raise_for_status()
            progress.advance(task)
            return reply.json()["output_ids"]

        for level, which in levels:
            with ThreadPoolExecutor(level) as pool:
                out += pool.map(ask, which)
    return out


def gap(url: str, body: dict[str, Any], said: Sequence[int]) -> float:
    """Log-probability of plain decoding's likeliest token after ``said``, over that of the second."""
    ask = {
        "input_ids": [*body["input_ids"], *said],
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    reply = httpx.post(f"{url}/generate", json=ask, timeout=600.0, trust_env=False)
    reply.raise_for_status()
    first, second = (entry[0] for entry in reply.json()["meta_info"]["output_top_logprobs"][0])
    return first - second


def compare(
    url: str, asked: Sequence[tuple[str, dict[str, Any]]], want: Sequence[list[int]], got: Sequence[list[int]]
) -> list[dict[str, Any]]:
    """What differs, with the gap at the first difference of greedy answers."""
    found = []
    for i, ((kind, body), left, right) in enumerate(zip(asked, want, got, strict=True)):
        if left == right:
            continue
        same = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(left))
        near = gap(url, body, left[:same]) if kind == "greedy" else None
        found.append({"request": i, "kind": kind, "plain": left, "tree": right, "at": same, "gap": near})
    return found


def both(
    common: command.Common, asked: Sequence[tuple[str, dict[str, Any]]], bars: Progress
) -> tuple[list[list[int]], list[dict[str, Any]], dict[str, float]]:
    """The trees' answers, what of them is not plain decoding's, and the share of steps by width."""
    requests, levels, folder = [body for _, body in asked], chunks(len(asked)), common.out / "servers"
    flags = ["--dtype", "float32"]
    # With overlap, plain decoding's penalties lag by one token.
    with ExitStack() as servers:
        plain = Fleet(common.pair, [PLAIN], folder, flags=[*flags, "--disable-overlap-schedule"])
        plainly = servers.enter_context(plain)
        trees = servers.enter_context(Fleet(common.pair, [AUTO], folder, nodes=common.nodes, flags=flags))
        url = plainly.use(PLAIN)
        want = answers(url, requests, levels, bars, "plain")
        got = answers(trees.use(AUTO), requests, levels, bars, "draft trees")
        steps = trees.steps(AUTO)
        return got, compare(url, asked, want, got), steps.shares if steps else {}


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, minutes=30.0, methods=(PLAIN, AUTO), rounds=1)
    parser.add_argument("--prompts", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=12, help="of an answer (%(default)s)")
    args = target.parse(parser, argv)
    if args.prompts < 1 or args.max_tokens < 1:
        raise UserError("--prompts and --max-tokens must be above 0")
    common = command.resolve(args, ["thousand"])
    corpora = [path.parent for path in sorted((ROOT / "examples" / "corpus").glob("*/corpus.json"))]
    asked = bodies(prompts_of(corpora, args.prompts), args.max_tokens)
    console, begin = Console(), time.monotonic()
    with command.progress(console) as bars:
        got, wrong, widths = both(common, asked, bars)
    ties = [row for row in wrong if row["gap"] is not None and row["gap"] < NEAR_TIE]
    different = [row for row in wrong if row not in ties]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": common.machine,
        "prompts": len(asked),
        "kinds": Counter(kind for kind, _ in asked),
        "tokens": sum(map(len, got)),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "equal": len(asked) - len(wrong),
        "near_ties": ties,
        "different": different,
        "widths": widths,
    }
    path = common.out / "thousand.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    said = (
        f"{result['equal']} of {len(asked)} answers equal, {len(ties)} near-ties, {len(different)} different"
    )
    console.print(
        f"{said}; {result['tokens']} tokens in {result['minutes']} minutes; {path}", highlight=False
    )
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(command.main_of(main, sys.argv[1:]))
