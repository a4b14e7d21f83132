"""``sglang-dflash trace``: a page that shows how each token of an answer came to be.

One self-contained HTML file: the answer, each token coloured by where it came from, and for the step under
the pointer its whole tree with the drafter's probabilities, the accepted path and its time. Asks the server
of --url, or starts one for the pair. Only the requests of this command are traced; others pay nothing.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from sglang_dflash.cli import target
from sglang_dflash.cli.options import parser_of
from sglang_dflash.client import access
from sglang_dflash.client.chat import read_prompts
from sglang_dflash.client.info import ServerInfo, normalize_url, read_server_info
from sglang_dflash.client.ports import free_port
from sglang_dflash.client.server import Server
from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import make_dir
from sglang_dflash.models.pair import mode_environment
from sglang_dflash.step.trace import ANSWERED, ASKED

PAGE = Path(__file__).with_name("trace_page.html")
_DATA = "/*DATA*/null"

#: How a token came, in the order of the legend.
PREFILL, BONUS, SPINE, BRANCH, RECALLED, PLAIN = "prefill", "bonus", "spine", "branch", "recalled", "plain"


def kinds(step: dict[str, Any], count: int) -> list[str]:
    """How each of a step's ``count`` tokens came: along the accepted path, then the target's own."""
    if len(step["tree"]) == 1 and step["width"].startswith("1x"):
        return [PLAIN] * count
    out = []
    depth_of = _depths(step["tree"])
    for node in step["path"][1:]:
        # What is in the tree of the drafter's first choices comes first, each at its depth.
        out.append(RECALLED if step["tree"][node][3] else SPINE if node == depth_of[node] else BRANCH)
    return [*out, BONUS][:count]


def _depths(tree: Sequence[Sequence[Any]]) -> list[int]:
    depth: list[int] = []
    for node in tree:
        depth.append(0 if node[1] < 0 else depth[int(node[1])] + 1)
    return depth


def tokens_of(output_ids: Sequence[int], said: Sequence[dict[str, Any] | None]) -> list[tuple[int, str, int]]:
    """(token, how it came, number in the answer's list of steps or -1) of a whole answer.

    Args:
        said: what the server says in ``meta_info``: at the first token of each step, what that did.
    """
    starts = [i for i, step in enumerate(said) if step is not None]
    bounds = [*starts, len(output_ids)]
    out = [(token, PREFILL, -1) for token in output_ids[: bounds[0]]]
    for number, (first, end) in enumerate(pairwise(bounds)):
        step = said[first]
        assert step is not None
        ways = kinds(step, end - first)
        out += [(output_ids[i], ways[i - first], number) for i in range(first, end)]
    return out


class Asker:
    """Sends traced requests to one server.

    Args:
        url: of a server with draft trees.
        raw: prompts are sent as they are, without the chat template.
    """

    def __init__(self, url: str, *, raw: bool, api_key: str | None = None) -> None:
        self.url, self.raw = url, raw
        self.http = httpx.Client(
            base_url=url,
            timeout=600.0,
            trust_env=False,
            headers=access.headers(api_key),
            verify=access.trust(url),
        )

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            reply = self.http.post(path, json=body)
        except httpx.HTTPError as error:
            raise UserError(f"no answer from {self.url} ({error}); is a server running there?") from None
        if reply.status_code != 200:
            raise UserError(f"{self.url}{path} answered {reply.status_code}: {reply.text.strip()[:200]}")
        return reply.json()

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself."""
        return self._post("/detokenize", {"tokens": [[i] for i in ids], "skip_special_tokens": False})["text"]

    def run(self, prompt: str, template: Callable[[str], list[int] | None], body: dict[str, Any]) -> dict:
        """One prompt's answer, as the page takes it."""
        ids = None if self.raw else template(prompt)
        what: dict[str, Any] = {"text": prompt} if ids is None else {"input_ids": ids}
        params = {**body, "custom_params": {ASKED: True}}
        begin = time.perf_counter()
        reply = self._post("/generate", {**what, "sampling_params": params})
        seconds = time.perf_counter() - begin
        said = reply["meta_info"].get(ANSWERED)
        if not said and len(reply["output_ids"]) > 1:
            raise UserError(
                f"{self.url} says nothing of its steps; it has to be a server of this plugin with draft trees"
            )
        return self._page(prompt, reply["output_ids"], said or [], seconds)

    def _page(
        self, prompt: str, output: list[int], said: list[dict[str, Any] | None], seconds: float
    ) -> dict:
        tokens = tokens_of(output, said)
        steps = [step for step in said if step is not None]
        wanted = sorted({*output, *(node[0] for step in steps for node in step["tree"])})
        text = dict(zip(wanted, self.texts(wanted), strict=True))
        return {
            "prompt": prompt,
            "seconds": round(seconds, 3),
            "tokens": [[text[token], how, number] for token, how, number in tokens],
            "counts": Counter(how for _, how, _ in tokens),
            "steps": [
                {**step, "tree": [[text[node[0]], *node[1:]] for node in step["tree"]]} for step in steps
            ],
        }


def render(runs: Sequence[dict], about: dict[str, Any]) -> str:
    """The page with its data in it."""
    data = json.dumps({"about": about, "runs": list(runs)}, ensure_ascii=False)
    # Whatever a token says, it does not end the script.
    safe = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return PAGE.read_text().replace(_DATA, safe)


def template_of(info: ServerInfo) -> Callable[[str], list[int] | None]:
    """The target's chat template; one that gives None where its tokenizer is not on this machine."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(info.model_path, local_files_only=True)
    except Exception:
        return lambda prompt: None
    if not tokenizer.chat_template:
        return lambda prompt: None

    def apply(prompt: str) -> list[int]:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return apply


@contextmanager
def _server(args: Any, console: Console) -> Iterator[str]:
    """The URL to ask: the given one, or that of a server that lives as long as the block."""
    if args.url:
        yield normalize_url(args.url)
        return
    pair = target.resolve(args)
    port, log = free_port(), make_dir(args.out.parent) / "trace.log"
    env = {**pair.env, **mode_environment("tree")}
    status = console.status("starting the server")
    with status, Server(pair.flags["tree"], port=port, log=log, env=env) as server:
        status.stop()
        yield server.url


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__, "sglang-dflash trace")
    parser.add_argument("prompt", nargs="*", help="what to ask")
    parser.add_argument("--prompts", type=Path, help="a JSONL file of prompts instead (kind, prompt)")
    parser.add_argument("--limit", type=int, default=8, help="of these, at most so many (%(default)s)")
    parser.add_argument("--url", help="of a running server (default: start one)")
    parser.add_argument("--api-key", help=access.OPTION_HELP)
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(%(default)s)")
    parser.add_argument("--raw", action="store_true", help="send prompts without the chat template")
    parser.add_argument("--out", type=Path, default=Path("out/trace.html"), help="(%(default)s)")
    target.add_arguments(parser)
    args = target.parse(parser, argv)
    prompts = list(args.prompt)
    if args.prompts is not None:
        prompts += [prompt.prompt for prompt in read_prompts(args.prompts)[: args.limit]]
    if not prompts:
        raise UserError('nothing to ask; write sglang-dflash trace "What is the capital of France?"')
    if args.max_tokens < 1 or args.limit < 1 or args.temperature < 0:
        raise UserError("--max-tokens and --limit must be above 0, --temperature not below")
    body = {"max_new_tokens": args.max_tokens, "temperature": args.temperature}
    console = Console()
    make_dir(args.out.parent)
    with _server(args, console) as url:
        info = read_server_info(url, api_key=args.api_key)
        marker = info.marker
        if marker is None or marker.mode != "tree":
            why = f" ({marker.reason})" if marker is not None and marker.reason else ""
            raise UserError(
                f"{url} does not decode with draft trees{why}; run `sglang-dflash doctor --url {url}`"
            )
        asker, template = Asker(url, raw=args.raw, api_key=args.api_key), template_of(info)
        with console.status("asking"):
            runs = [asker.run(prompt, template, body) for prompt in prompts]
    about = {"model": Path(info.model_path).name, "sglang": info.version, "device": info.device or ""}
    args.out.write_text(render(runs, about))
    tokens = sum(len(run["tokens"]) for run in runs)
    steps = sum(len(run["steps"]) for run in runs)
    console.print(f"{tokens} tokens in {steps} steps; open {args.out}", highlight=False, soft_wrap=True)
    return 0
