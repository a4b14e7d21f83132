"""What the soak asks: requests of every kind, each with a nonsense word of its own, and how it asks."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import httpx

from sglang_dflash.client.chat import Prompt

How = Literal["whole", "stream", "hang-up", "abort"]
HOWS: tuple[How, ...] = ("whole", "stream", "hang-up", "abort")

_JSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["name", "size"],
}
_EBNF = 'root ::= "The answer is " ("yes" | "no" | "not known") ", because " [a-z ]{5,60} "."'
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.02}

# Repetition penalty stands alone: without overlap SGLang applies its penalties in the order of a set of
# classes, another one in every process (``SamplingBatchInfo.from_schedule_batch``), so a mix of scale and
# additive penalties has no one plain answer.
# kind -> sampling parameters beside temperature 0 and max_new_tokens.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "long prompt": {},
    "echo": {},
    "ignore_eos": {"ignore_eos": True},
    "frequency penalty": {"frequency_penalty": 0.7},
    "presence penalty": {"presence_penalty": 0.8},
    "repetition penalty": {"repetition_penalty": 1.2},
    "penalties and min_new_tokens": {
        "frequency_penalty": -0.2,
        "presence_penalty": 0.4,
        "min_new_tokens": 24,
    },
    "logit_bias": {"logit_bias": {"28": 3.0, "253": -100.0}},
    "stop string": {"stop": [". ", ":"]},
    "stop token": {"stop_token_ids": [30, 28]},
    "regex": {"regex": r"[A-Z][a-z]{2,10}( [a-z]{1,10}){3,12}\."},
    "json schema": {"json_schema": json.dumps(_JSON)},
    "ebnf": {"ebnf": _EBNF},
    "logprobs": {},
    "seeded": SAMPLED,
    "unseeded": SAMPLED,
    "forbidding processor": {"custom_params": {"token_ids": [28, 30, 198, 253]}},
    "processor that reads the text": {"custom_params": {"ngram_size": 3, "window_size": 60}},
    "two samples": SAMPLED | {"n": 2},
    "tool call": {},
    "session": {},
    "streaming session": {},
}
#: Asked by ``soak_talk``, whole.
TALKS = ("two samples", "tool call", "session", "streaming session")
_SEEDED = ("seeded", "two samples")


@cache
def _processors() -> dict[str, str]:
    """SGLang's own, as a request names them."""
    from sglang.srt.sampling import custom_logit_processor as theirs

    return {
        "forbidding processor": theirs.DisallowedTokensLogitsProcessor.to_str(),
        "processor that reads the text": theirs.DeepseekOCRNoRepeatNGramLogitProcessor.to_str(),
    }


@dataclass(frozen=True)
class Task:
    """One request that can be asked any number of times."""

    number: int
    kind: str
    word: str
    ids: tuple[int, ...]
    params: dict[str, Any] = field(hash=False)

    @property
    def exact(self) -> bool:
        """Whether plain decoding's answer is the only right one."""
        return self.kind != "unseeded"

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"input_ids": list(self.ids), "sampling_params": self.params}
        if self.kind == "logprobs":
            body |= {"return_logprob": True, "top_logprobs_num": 2}
        if self.kind in _processors():
            body["custom_logit_processor"] = _processors()[self.kind]
        return body

    @property
    def most(self) -> int:
        """Tokens that an answer can have."""
        limit = self.params["max_new_tokens"]
        return 2 * limit if self.kind in TALKS and self.kind != "tool call" else limit


@dataclass(frozen=True)
class Answer:
    """What came back; of an aborted request, what came until then.

    Attributes:
        whole: False when this side broke it off.
        orderly: no streamed chunk took back or repeated text of the one before.
        retractions: how often its KV was taken while it ran.
    """

    ids: list[int]
    text: str
    finish: Any
    tokens: int
    passes: int
    logprobs: list[float]
    whole: bool = True
    orderly: bool = True
    retractions: int = 0


def nonsense(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(4)).capitalize()


def make_tasks(tokenizer: Any, prompts: Sequence[Prompt], count: int, seed: int) -> list[Task]:
    """``count`` tasks, the kinds in turn; every word occurs in one prompt only."""
    draw = random.Random(seed)
    words: list[str] = []
    while len(words) < count:
        word = nonsense(draw)
        if word not in words:
            words.append(word)
    kinds = list(KINDS)
    tasks = []
    for number, word in enumerate(words):
        kind = kinds[number % len(kinds)]
        question = draw.choice(prompts).prompt
        if kind == "echo":
            question = f"Repeat the word {word} five times."
        elif kind == "long prompt":
            question = "\n".join(p.prompt for p in draw.choices(prompts, k=draw.randrange(4, 14)))
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{word}: {question}"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        params = {"temperature": 0, "max_new_tokens": draw.choice((1, 2, 7, 16, 24, 48))} | KINDS[kind]
        params["max_new_tokens"] = max(params["max_new_tokens"], params.get("min_new_tokens", 0))
        if kind in _SEEDED:
            params["sampling_seed"] = draw.randrange(1 << 31)
        tasks.append(Task(number, kind, word, tuple(ids), params))
    return tasks


def answer_of(reply: dict[str, Any], **more: bool) -> Answer:
    """Of a reply of ``/generate``.

    Args:
        more: fields of ``Answer``.
    """
    meta = reply["meta_info"]
    return Answer(
        ids=list(reply["output_ids"]),
        text=reply["text"],
        finish=meta["finish_reason"],
        tokens=int(meta["completion_tokens"]),
        passes=int(meta.get("spec_verify_ct") or 0),
        logprobs=[float(entry[0]) for entry in meta.get("output_token_logprobs") or []],
        retractions=int(meta.get("num_retractions") or 0),
        **more,
    )


NOTHING = Answer([], "", None, 0, 0, [], whole=False)


def ask(http: httpx.Client, task: Task, how: How = "whole", after: int = 3) -> Answer:
    """Send one task.

    Args:
        how: "whole"; "stream" to the end; "hang-up" closes the connection after ``after`` chunks;
            "abort" streams and asks the server to abort the request after ``after`` chunks.

    Raises:
        httpx.HTTPError: the server did not answer as it should.
    """
    if how == "whole":
        reply = http.post("/generate", json=task.body())
        reply.raise_for_status()
        return answer_of(reply.json())
    rid = f"soak-{task.number}-{time.monotonic_ns()}"
    last, chunks, orderly = NOTHING, 0, True
    with http.stream("POST", "/generate", json=task.body() | {"stream": True, "rid": rid}) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise httpx.RemoteProtocolError(str(data["error"]))
            answer = answer_of(data)
            # A trailing piece of a character is replaced when the rest arrives.
            orderly &= answer.text.startswith(last.text.rstrip("\ufffd"))
            orderly &= answer.ids[: len(last.ids)] == last.ids
            last, chunks = answer, chunks + 1
            if chunks == after and answer.finish is None and how == "hang-up":
                break
            if chunks == after and answer.finish is None and how == "abort":
                http.post("/abort_request", json={"rid": rid}).raise_for_status()
    whole = last.finish is not None and last.finish.get("type") != "abort"
    return Answer(
        last.ids,
        last.text,
        last.finish,
        last.tokens,
        last.passes,
        last.logprobs,
        whole=whole,
        orderly=orderly,
        retractions=last.retractions,
    )


# Float32 sums in another order; a wrong token's log-probability is off by far more.
LOGPROB_TOLERANCE = 2e-3

_LONGEST_RUN = 16  # tokens of one step


def differences(task: Task, got: Answer, want: Answer | None) -> list[str]:
    """What is wrong with an answer, one line each; nothing if it is plain decoding's."""
    found = []
    if not got.orderly:
        found.append("a streamed chunk took back or repeated text")
    if got.whole and got.tokens != len(got.ids):
        found.append(f"usage says {got.tokens} tokens, {len(got.ids)} came")
    limit = task.most
    # SGLang does not cut an aborted answer at max_new_tokens (``Req.update_finish_state``): the last
    # step's accepted tokens are all there, and still the target's own.
    over = 0 if got.whole else _LONGEST_RUN
    if len(got.ids) > limit + over:
        found.append(f"{len(got.ids)} tokens, at most {limit} were asked for")
    if want is None:
        return found
    if not got.whole:
        shared = min(len(got.ids), len(want.ids))
        if got.ids[:shared] != want.ids[:shared]:
            found.append(f"an aborted answer is no prefix of plain decoding's: {got.ids} / {want.ids}")
        return found
    if got.ids != want.ids:
        found.append(f"tokens differ: {got.ids} / {want.ids}")
    elif got.text != want.text or got.finish != want.finish:
        found.append(f"text or finish differ: {got.text!r} {got.finish} / {want.text!r} {want.finish}")
    elif len(got.logprobs) != len(want.logprobs):
        found.append(f"{len(got.logprobs)} log-probabilities, not {len(want.logprobs)}")
    else:
        worst = max((abs(a - b) for a, b in zip(got.logprobs, want.logprobs, strict=True)), default=0.0)
        if worst > LOGPROB_TOLERANCE:
            found.append(f"a log-probability differs by {worst:.4f}")
    return found


def strangers(answer: Answer, task: Task, words: Sequence[str]) -> list[str]:
    """Other requests' words in this answer."""
    text = answer.text.lower()
    return [word for word in words if word != task.word and word.lower() in text]


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll ``condition``; False when it is not met in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
