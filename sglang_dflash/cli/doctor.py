"""``sglang-dflash doctor``: say what is wrong with this installation, or with a running server.

Exit code 0 only if all is well.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator

from rich.console import Console

from sglang_dflash.cli import findings
from sglang_dflash.cli.findings import Finding
from sglang_dflash.cli.options import parser_of
from sglang_dflash.client import memory
from sglang_dflash.client.access import OPTION_HELP
from sglang_dflash.client.flags import DEFAULT_HOST, DEFAULT_PORT
from sglang_dflash.models.registry import SMOLLM2


def _accelerator() -> bool:
    from sglang_dflash.platform.entry import has_accelerator

    return has_accelerator()


def installation(host: str, port: int) -> Iterator[Finding]:
    yield from findings.sglang_version()
    yield from findings.entry_points_visible()
    yield from findings.environment(_accelerator)
    yield from findings.settings()
    yield from findings.caches()
    yield from findings.hooks()
    yield from findings.platform()
    yield from findings.free_memory(memory.available())
    yield from findings.embedded_pair(SMOLLM2)
    yield from findings.port(host, port)


def report(found: Iterable[Finding], console: Console) -> int:
    """Print each finding as it comes; returns how many are bad."""
    bad = 0
    for finding in found:
        mark = "[green]ok  [/]" if finding.ok else "[red]BAD [/]"
        console.print(f"{mark} {finding.what}: ", end="", highlight=False)
        console.print(finding.text, markup=False, highlight=False)
        if not finding.ok:
            bad += 1
            console.print(f"     mend: {finding.mend}", markup=False, highlight=False)
    return bad


def main(argv: list[str]) -> int:
    parser = parser_of(__doc__, "sglang-dflash doctor")
    parser.add_argument("--url", help="look at a running server instead, for example http://127.0.0.1:30000")
    parser.add_argument("--api-key", help=OPTION_HELP)
    parser.add_argument("--host", default=DEFAULT_HOST, help="where serve would listen (%(default)s)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="where serve would listen (%(default)s)"
    )
    args = parser.parse_args(argv)
    # SGLang's own start-up chatter would bury the findings; the checks say what matters of it.
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console(soft_wrap=True)
    found = (
        findings.running_server(args.url, args.api_key) if args.url else installation(args.host, args.port)
    )
    bad = report(found, console)
    if bad:
        print(f"{bad} thing{'s' if bad > 1 else ''} to mend", file=sys.stderr)
        return 1
    print("all is well")
    return 0
