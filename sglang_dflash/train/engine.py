"""SGLang's offline engine in the place of our batched generator: what answers prompts on a GPU.

The engine batches by itself and serves every model SGLang serves; it keeps no features, so training
computes them by prefill (``features.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sglang_dflash.errors import UserError
from sglang_dflash.train.generate import Done, Job

PAGE = 64  # the largest page a sequence's end may leave half empty


class EngineGenerator:
    """Decodes jobs with at most ``width`` in flight, each of at most ``max_len`` tokens.

    Args:
        target: the model's folder.
        stop: token ids that end a sequence (kept as its last token).
        seed: of the sampled jobs; a job's own is made of it and the job's number.
        flags: further arguments of ``sglang.Engine``.
    """

    def __init__(
        self, target: Path, stop: set[int], *, width: int, max_len: int, seed: int = 0, **flags: Any
    ) -> None:
        self.target, self.stop, self.width, self.max_len, self.seed = target, stop, width, max_len, seed
        # Room for all in flight and no more: SGLang's default is most of the memory, on a CPU everybody's.
        room = {"max_running_requests": width, "max_total_tokens": width * (max_len + PAGE)}
        self.flags = {"log_level": "warning", "sleep_on_idle": True, **room, **flags}
        self.jobs = 0

    def run(self, source: Callable[[int], list[Job]]) -> Iterator[Done]:
        """Continue jobs until ``source(n)`` (at most n jobs) is dry and all have ended.

        At the end SGLang kills every child of this process, not only its own.

        Raises:
            UserError: SGLang does not start or refuses a job.
        """
        engine = self._start()
        try:
            yield from self._drain(engine, source)
        finally:
            engine.shutdown()

    def _start(self) -> Any:
        try:
            import sglang

            return sglang.Engine(model_path=str(self.target), **self.flags)
        except (Exception, SystemExit) as error:
            raise UserError(f"SGLang's engine does not start on {self.target}: {error}") from error

    def _drain(self, engine: Any, source: Callable[[int], list[Job]]) -> Iterator[Done]:
        pending: dict[asyncio.Task, Job] = {}
        dry = False
        while pending or not dry:
            while not dry and len(pending) < self.width:
                jobs = source(self.width - len(pending))
                dry = not jobs
                for job in jobs:
                    pending[engine.loop.create_task(self._ask(engine, job))] = job
            if not pending:
                return
            ended, _ = engine.loop.run_until_complete(
                asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            )
            for task in ended:
                yield self._done(pending.pop(task), task.result())

    async def _ask(self, engine: Any, job: Job) -> dict[str, Any]:
        self.jobs += 1
        sampling: dict[str, Any] = {
            "temperature": job.temperature,
            "max_new_tokens": min(job.max_new, self.max_len - len(job.prompt)),
            "stop_token_ids": sorted(self.stop),
        }
        if job.temperature > 0:
            sampling["sampling_seed"] = (self.seed * 1_000_003 + self.jobs) % (1 << 31)
        return await engine.async_generate(input_ids=job.prompt, sampling_params=sampling)

    def _done(self, job: Job, reply: dict[str, Any]) -> Done:
        finish = reply["meta_info"]["finish_reason"]
        if finish["type"] == "abort":
            raise UserError(f"SGLang gave up a prompt of {len(job.prompt)} tokens: {finish.get('message')}")
        tokens = [*job.prompt, *reply["output_ids"]]
        return Done(job, tokens, stopped=tokens[-1] in self.stop)
