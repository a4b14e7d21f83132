"""Plain decoding on the CPU platform, through the server, against Hugging Face ``generate``.

Same model, dtype, prompts and threads, one request at a time, greedy, in one run: each
prompt goes to the one and then to the other, so that a busy machine slows both.

    python benchmarks/cpu_plain_vs_hf.py --dtype bfloat16 --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from sglang_dflash.client.ports import free_port
from sglang_dflash.client.server import Server

DEFAULT_MODEL = Path.home() / ".cache/sglang-dflash/models/SmolLM2-135M-Instruct"
PROMPTS = Path(__file__).with_name("prompts.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per prompt")
    parser.add_argument("--out", type=Path, help="append the record here as a JSON line")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    model_path = options.model_path.expanduser()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, options.dtype)).eval()
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[: options.prompts]]

    def hugging_face(ids: list[int]) -> tuple[list[int], float]:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
                do_sample=False,
            )
        return out[0, len(ids) :].tolist(), time.perf_counter() - start

    log = Path(tempfile.mkdtemp()) / "server.log"
    arguments = ["--model-path", str(model_path), "--dtype", options.dtype, "--max-total-tokens", "8192"]
    with Server(arguments, port=free_port(), log=log) as server, httpx.Client(timeout=600) as http:

        def served(ids: list[int]) -> tuple[list[int], float]:
            params: dict[str, Any] = {
                "temperature": 0,
                "max_new_tokens": options.tokens,
                "min_new_tokens": options.tokens,
            }
            start = time.perf_counter()
            reply = http.post(f"{server.url}/generate", json={"input_ids": ids, "sampling_params": params})
            seconds = time.perf_counter() - start
            reply.raise_for_status()
            return reply.json()["output_ids"], seconds

        ratios, ours, theirs, same = [], [], [], 0
        for turn, prompt in enumerate([prompts[0], *prompts]):
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            expected, hf_seconds = hugging_face(ids)
            got, sglang_seconds = served(ids)
            if turn == 0:
                continue  # warm-up
            same += got == expected
            ours.append(options.tokens / sglang_seconds)
            theirs.append(options.tokens / hf_seconds)
            ratios.append(hf_seconds / sglang_seconds)
            print(f"{turn}: server {ours[-1]:.1f} tokens/s, Hugging Face {theirs[-1]:.1f} tokens/s")
    record = {
        "model": model_path.name,
        "dtype": options.dtype,
        "threads": options.threads,
        "server_tokens_per_s": round(statistics.median(ours), 2),
        "hugging_face_tokens_per_s": round(statistics.median(theirs), 2),
        "ratio": round(statistics.median(ratios), 3),
        "same_text": f"{same}/{len(ratios)}",
    }
    print(json.dumps(record))
    if options.out:
        with options.out.open("a") as sink:
            sink.write(json.dumps(record) + "\n")
    sys.exit(0 if record["ratio"] >= 0.8 else 1)


if __name__ == "__main__":
    main()
