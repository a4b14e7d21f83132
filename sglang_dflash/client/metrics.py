"""A running server's ``/metrics``, read and added up (docs/metrics.md names what the plugin exports)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_dflash.client.info import ask, normalize_url
from sglang_dflash.errors import UserError

PREFIX = "sglang_dflash:"
#: Labels of ranks that work on the same requests (they all export with --enable-metrics-for-all-schedulers).
SAME_BATCH = ("tp_rank", "pp_rank", "moe_ep_rank")


@dataclass(frozen=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Scrape:
    """One reading. Names are Prometheus sample names, such as ``sglang_dflash:accept_length_sum``."""

    samples: list[Sample]

    def has(self, name: str) -> bool:
        return any(sample.name == name for sample in self.samples)

    def _of(self, name: str, labels: dict[str, str]) -> Iterator[Sample]:
        return (s for s in self.samples if s.name == name and labels.items() <= s.labels.items())

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series of ``name`` with these labels; 0 where there is none.

        Data-parallel ranks do different work and add up. The ranks that share one batch all count the
        same: the first speaks for them.
        """
        first: dict[frozenset[tuple[str, str]], tuple[list[int], float]] = {}
        for sample in self._of(name, labels):
            ranks = [int(sample.labels.get(rank) or 0) for rank in SAME_BATCH]
            others = frozenset(pair for pair in sample.labels.items() if pair[0] not in SAME_BATCH)
            if others not in first or ranks < first[others][0]:
                first[others] = (ranks, sample.value)
        return sum(value for _, value in first.values())

    def greatest(self, name: str) -> float:
        """The greatest series of ``name``, for shares, of which a sum says nothing; 0 where there is none."""
        return max((sample.value for sample in self._of(name, {})), default=0.0)

    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}


def parse(text: str) -> Scrape:
    """Read Prometheus' text format; raises ValueError where it is not that."""
    from prometheus_client.parser import text_string_to_metric_families

    return Scrape(
        [
            Sample(sample.name, dict(sample.labels), float(sample.value))
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    )


def read_metrics(url: str, timeout: float = 10.0, api_key: str | None = None) -> Scrape:
    """Ask a running server; raises :class:`UserError` when it is not there or exports no metrics."""
    reply = ask(url, "/metrics", timeout, api_key)
    if reply.status_code == 404:
        raise UserError(f"{normalize_url(url)} exports no metrics; start the server with --enable-metrics")
    if reply.status_code != 200:
        raise UserError(f"{reply.url} answered {reply.status_code}; is this an SGLang server?")
    try:
        return parse(reply.text)
    except ValueError as error:
        raise UserError(f"{reply.url} is not Prometheus text; is this an SGLang server?") from error
