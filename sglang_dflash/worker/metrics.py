"""The plugin's Prometheus metrics, on SGLang's own ``/metrics`` (docs/metrics.md).

SGLang runs prometheus_client in multi-process mode: what the scheduler's process observes, the HTTP
process serves.
"""

from __future__ import annotations

from collections.abc import Mapping

from sglang_dflash.step.report import FALLBACK, StepResult

ACCEPT_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
WIDTH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One process's metrics.

    Args:
        labels: name and value of each label, those of SGLang's scheduler metrics.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        # prometheus_client chooses its storage on import, after SGLang has set PROMETHEUS_MULTIPROC_DIR.
        from prometheus_client import Counter, Histogram

        names = list(labels)
        self._labels = dict(labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"sglang_dflash:{name}", text, names).labels(**labels)

        def histogram(name: str, text: str, buckets: tuple[int, ...]) -> Histogram:
            return Histogram(f"sglang_dflash:{name}", text, names, buckets=buckets).labels(**labels)

        self.accept_length = histogram(
            "accept_length", "Tokens a request got from one target pass, bonus included.", ACCEPT_BUCKETS
        )
        self.tree_width = histogram(
            "tree_width", "Tree nodes verified per request and step, root included.", WIDTH_BUCKETS
        )
        self.decode_steps = counter("decode_steps", "Decode steps of the whole batch.")
        self.width_steps = Counter(
            "sglang_dflash:width_steps",
            "Decode steps by width, nodes x block; 1x1 is plain decoding.",
            [*names, "width"],
        )
        self.drafted = counter(
            "drafted_tokens", "Depths that request steps had drafts for: the most each could have accepted."
        )
        self.off_spine_accepts = counter(
            "off_spine_accepts", "Request steps whose accepted path left the top-1 chain."
        )
        self.kv_rows_moved = counter("kv_rows_moved", "KV rows copied to their place after acceptance.")
        self.fallbacks = counter(
            "drafter_fallbacks", "Request steps without a usable draft (NaN): one verified token each."
        )
        self.drafter_seconds = counter("drafter_seconds", "Seconds of drafter passes, candidates included.")
        self.verify_seconds = counter("verify_seconds", "Seconds of target passes over trees.")
        self.commit_seconds = counter(
            "commit_seconds", "Seconds of moving accepted KV rows and of projecting features for the drafter."
        )

    def observe(self, result: StepResult) -> None:
        self.decode_steps.inc()
        self.width_steps.labels(**self._labels, width=str(result.width)).inc()
        for rows, committed in zip(result.rows, result.committed, strict=True):
            if not committed:
                continue  # ended before this step: nobody sees its tokens
            self.accept_length.observe(committed)
            self.tree_width.observe(result.width.nodes)
            self.drafted.inc(result.width.drafted)
            if rows == FALLBACK:
                self.fallbacks.inc()
            elif rows > 0:
                self.off_spine_accepts.inc()
                self.kv_rows_moved.inc(rows)
        if result.seconds is not None:
            counters = (self.drafter_seconds, self.verify_seconds, self.commit_seconds)
            for counter, seconds in zip(counters, result.seconds, strict=True):
                counter.inc(seconds)
