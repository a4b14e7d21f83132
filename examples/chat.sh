#!/usr/bin/env bash
# One greedy chat request to a running server: examples/chat.sh "Why is the sky blue?" [http://127.0.0.1:30000]
# A server started with --api-key takes the key in SGLANG_API_KEY.
set -euo pipefail
prompt=${1:-What is the capital of France?}
url=${2:-http://127.0.0.1:30000}
body=$(python3 -c 'import json, sys; print(json.dumps({
    "model": "default", "temperature": 0, "max_tokens": 128,
    "messages": [{"role": "user", "content": sys.argv[1]}]}))' "$prompt")
curl -sS "$url/v1/chat/completions" ${SGLANG_API_KEY:+-H "Authorization: Bearer $SGLANG_API_KEY"} -H 'Content-Type: application/json' -d "$body" |
  python3 -c 'import json, sys; reply = json.load(sys.stdin); print(reply["choices"][0]["message"]["content"] if "choices" in reply else reply)'
