"""Bodies made from SGLang's own OpenAPI: no 5xx that plain decoding does not give, no crash."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.server.support import Pair, Request, body_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

EXAMPLES = 25
SECONDS = 120
#: Fields that multiply work without limit; a test has to end.
AT_MOST = {"n": 3, "best_of": 3}


def tame(body: Any) -> None:
    if not isinstance(body, dict):
        return
    for name, limit in AT_MOST.items():
        if isinstance(body.get(name), int):
            body[name] = min(body[name], limit)


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_no_server_error(route: str, tiny_servers: Pair) -> None:
    schema = schemathesis.openapi.from_url(f"{tiny_servers.tree.server.url}/openapi.json")
    answers: Counter[int] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[route]["POST"].as_strategy())
    def send(case: schemathesis.Case) -> None:
        tame(case.body)
        reply = case.call(timeout=SECONDS)
        answers[reply.status_code] += 1
        if reply.status_code >= 500:
            upstream = case.call(base_url=tiny_servers.plain.server.url, timeout=SECONDS)
            print(f"{reply.status_code} (plain: {upstream.status_code}): {case.as_curl_command()}")
            assert upstream.status_code >= 500, f"only trees answer {reply.status_code}: {reply.text[:500]}"

    send()
    print(f"{route}: {dict(answers)}")
    assert answers[200] > 0


def test_the_server_still_serves(tiny_servers: Pair) -> None:
    """Runs after the bodies above, in this file's order."""
    assert tiny_servers.tree.server.alive()
    tiny_servers.compare([body_of(Request((5, 6, 7), 30), ignore_eos=True)], 1)
