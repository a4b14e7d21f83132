"""Stream a reply with the ``openai`` client and print how many tokens each target pass gave.

    sglang-dflash serve                                  # in another terminal
    python examples/openai_stream.py "Write a Python function that reverses a list."

A server started with --api-key takes the key in SGLANG_API_KEY.

Nothing here is special to draft trees: the server speaks the usual protocol, and
``return_spec_tokens_details`` is SGLang's own request field for speculative decoding.
"""

from __future__ import annotations

import argparse
import os

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream one reply from a local SGLang server.")
    parser.add_argument("prompt", nargs="?", default="Explain what a draft tree is, in two sentences.")
    parser.add_argument("--url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()

    client = openai.OpenAI(base_url=args.url, api_key=os.environ.get("SGLANG_API_KEY", "none"))
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": args.prompt}],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        stream=True,
        extra_body={"return_spec_tokens_details": True},
    )
    details: dict = {}
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
        extension = (chunk.model_extra or {}).get("sglext") or {}
        details = extension.get("spec_tokens_details") or details
    print()
    if details:
        passes, drafts = details["spec_verify_ct"], details["spec_num_correct_drafts"]
        print(f"\n{passes} target passes, {1 + drafts / passes:.2f} tokens each")


if __name__ == "__main__":
    main()
