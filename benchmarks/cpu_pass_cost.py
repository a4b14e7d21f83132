"""Cost of one target pass on the CPU platform, by the number of rows it verifies.

The table decides how wide a draft tree pays on a machine: a pass over N rows has to cost
less than the accepted tokens save. Runs the real model runner of SGLang in this process,
without a server, so the figures hold no scheduling.

    python benchmarks/cpu_pass_cost.py --model-path ~/.cache/sglang-dflash/models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

DEFAULT_MODEL = Path.home() / ".cache/sglang-dflash/models/SmolLM2-135M-Instruct"


def load_runner(model: Path, dtype: str, page_size: int, max_tokens: int) -> Any:
    """SGLang's model runner for ``model`` on the CPU platform, in this process."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    args = ServerArgs(
        model_path=str(model),
        dtype=dtype,
        page_size=page_size,
        max_total_tokens=max_tokens,
        max_running_requests=64,
        log_level="error",
    )
    args.resolve_once()
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    one_batch._init_process_global_configs()
    runner, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    return runner.torch_runner


class Passes:
    """Hand-built forward passes over requests that all hold ``context`` cached tokens.

    The requests' slots are interleaved, as they are when requests decode side by side.
    """

    def __init__(self, runner: Any, requests: int, context: int, max_rows: int) -> None:
        import torch

        self.runner, self.requests, self.context = runner, requests, context
        span = context + max_rows
        vocab = runner.model_config.vocab_size
        self.ids = torch.randint(0, vocab, (requests, span), generator=torch.Generator().manual_seed(0))
        order = torch.arange(1, requests * span + 1).view(span, requests).T
        page = runner.page_size
        self.slots = page + order if requests == 1 or page == 1 else page + order.sort(dim=1).values
        runner.req_to_token_pool.req_to_token[:requests, :span] = self.slots.int()
        self.rows_in_use = torch.arange(requests)

    def verify(self, rows: int) -> ForwardBatch:
        """A pass over ``rows`` rows per request, as the DFLASH worker builds it; 1 row decodes."""
        import torch
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
        from sglang.srt.speculative.dflash_info import DFlashVerifyInput
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        prefix = torch.full((self.requests,), self.context, dtype=torch.int64)
        columns = slice(self.context, self.context + rows)
        ids, slots = self.ids[:, columns].reshape(-1), self.slots[:, columns].reshape(-1)
        positions = (prefix[:, None] + torch.arange(rows)).reshape(-1)
        decode = rows == 1
        info = None
        if not decode:
            info = DFlashVerifyInput(
                draft_token=ids,
                positions=positions,
                draft_token_num=rows,
                custom_mask=None,
                capture_hidden_mode=CaptureHiddenMode.NULL,
            )
        lens = prefix + 1 if decode else prefix
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.TARGET_VERIFY,
            batch_size=self.requests,
            input_ids=ids,
            req_pool_indices=self.rows_in_use,
            seq_lens=lens,
            seq_lens_cpu=lens.clone(),
            seq_lens_sum=int(lens.sum()),
            out_cache_loc=slots,
            positions=positions,
            spec_algorithm=SpeculativeAlgorithm.NONE if decode else SpeculativeAlgorithm.DFLASH,
            spec_info=info,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )

    def fill(self) -> None:
        """Put the context into the cache, in verify passes of up to 128 rows."""
        whole, step = self.context, 128
        for start in range(0, whole, step):
            self.context = start
            self.run(min(step, whole - start))
        self.context = whole

    def run(self, rows: int) -> torch.Tensor:
        """Logits ``[requests * rows, vocab]`` of one pass."""
        import torch

        with torch.inference_mode():
            return self.runner.forward(self.verify(rows)).logits_output.next_token_logits

    def cost_ms(self, rows: int, repeats: int) -> dict[str, float]:
        """Milliseconds of a pass: median by the clock, median and least of processor time.

        Building the batch is not counted. Where other processes want the core the clock
        counts their turns, and the least processor time is the best estimate.
        """
        import torch

        wall, cpu = [], []
        for turn in range(repeats + 2):
            batch = self.verify(rows)
            start, start_cpu = time.perf_counter(), time.thread_time()
            with torch.inference_mode():
                self.runner.forward(batch)
            if turn >= 2:
                wall.append((time.perf_counter() - start) * 1e3)
                cpu.append((time.thread_time() - start_cpu) * 1e3)
        return {
            "ms": round(statistics.median(wall), 2),
            "cpu_ms": round(statistics.median(cpu), 2),
            "least_cpu_ms": round(min(cpu), 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--requests", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=256, help="cached tokens per request")
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--profile", action="store_true", help="print torch's operator table per width")
    options = parser.parse_args()

    tokens = max(options.requests) * (options.context + max(options.rows) + 64) + 256
    runner = load_runner(options.model_path.expanduser(), options.dtype, options.page_size, tokens)
    import torch

    for requests in options.requests:
        passes = Passes(runner, requests, options.context, max(max(options.rows), 128))
        passes.fill()
        for rows in options.rows:
            record = {
                "model": options.model_path.name,
                "dtype": options.dtype,
                "threads": torch.get_num_threads(),
                "requests": requests,
                "context": options.context,
                "rows": rows,
                **passes.cost_ms(rows, options.repeats),
            }
            print(json.dumps(record), flush=True)
            if options.out:
                with options.out.open("a") as sink:
                    sink.write(json.dumps(record) + "\n")
            if options.profile:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    for _ in range(5):
                        passes.run(rows)
                print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
