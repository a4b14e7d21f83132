"""Times the kernels against their floor and against every other implementation in this process.

    python benchmarks/kernels.py                          # one CUDA GPU; out/kernels.jsonl and a table
    python benchmarks/kernels.py --bs 1 --ctx 32768 --nodes 32 --rivals ours,sglang
    python benchmarks/kernels.py --device cpu             # the torch implementations, small shapes

The floor of tree attention is the cached bytes read once at the copy bandwidth measured in the same run.
Every rival's output is compared with ours before it is timed. See docs/kernels.md for what to expect.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from dflash_kernels import Chain, KVCompactor, accept_tree, build_tree, draft_topk, recall
from kernel_model import predict
from kernel_rivals import LLAMA, QWEN_MOE, RIVALS, Heads, Problem, UnavailableError, draft_tree
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HEADS = {"llama": LLAMA, "qwen-moe": QWEN_MOE}
TOLERANCE = 3e-2  # two bf16 roundings of values near one


def timer(device: str) -> Callable[[Callable[[], object]], float]:
    """Median seconds of a call; on CUDA with the L2 cache flushed between calls."""
    if device == "cuda":
        return lambda call: triton.testing.do_bench(call, warmup=20, rep=100, return_mode="median") / 1e3

    def measure(call: Callable[[], object]) -> float:
        call()
        spent, times = 0.0, []
        while spent < 0.5 and len(times) < 50:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            spent += times[-1]
        return statistics.median(times)

    return measure


def graph_timer(device: str) -> Callable[[Callable[[], object]], float]:
    """As `timer`, but launches come from a captured CUDA graph: what a step of the server pays."""
    if device == "cuda":
        return lambda call: triton.testing.do_bench_cudagraph(call, rep=100, return_mode="median") / 1e3
    return timer(device)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of a large device copy."""
    size = (2 << 30) if device == "cuda" else (64 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timer(device)(lambda: target.copy_(source))


def environment(device: str) -> dict[str, str]:
    """What a number depends on."""
    from importlib import metadata

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"

    chip = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": chip,
        **{name: version(name) for name in ("torch", "triton", "sglang", "flashinfer-python")},
        "cuda": str(torch.version.cuda),
        "threads": str(torch.get_num_threads()),
    }


def attention_rows(
    grid: list[tuple[Heads, int, int, int, str]], rivals: list[str], device: str, bandwidth: float
) -> Iterator[dict]:
    """One row per shape: seconds of each rival, and reasons where there are none."""
    measure = timer(device)
    for heads, bs, ctx, nodes, kv in grid:
        row: dict = {
            "op": "tree_attention", "heads": heads.name, "bs": bs, "ctx": ctx, "nodes": nodes, "kv": kv,
            "model": predict(heads.q, heads.kv, heads.dim, bs, ctx, nodes, 1 if kv == "fp8" else 2).seconds,
            "seconds": {}, "missing": {},
        }  # fmt: skip
        need = Problem.bytes_needed(heads, bs, ctx, nodes, kv)
        if device == "cuda" and need > torch.cuda.mem_get_info()[0]:
            row["missing"] = dict.fromkeys(rivals, f"needs {need >> 30} GiB of device memory")
            yield row
            continue
        problem = Problem(heads, bs, ctx, nodes, kv, device)
        row["floor"] = problem.kv_bytes / bandwidth
        reference = RIVALS["ours"](problem)().float().reshape(-1)
        for name in rivals:
            try:
                call = RIVALS[name](problem)
                error = (call().float().reshape(-1) - reference).abs().max().item()
                if not error < TOLERANCE:
                    row["missing"][name] = f"answers differ from ours by {error:.3g}"
                    continue
                row["seconds"][name] = measure(call)
            except UnavailableError as reason:
                row["missing"][name] = str(reason)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                row["missing"][name] = f"{name}: {str(error).splitlines()[0][:120]}"
        del problem, reference
        yield row


def step_rows(batches: list[int], nodes: list[int], layers: int, device: str) -> Iterator[dict]:
    """Tree build, accept and compaction: the fixed cost of a tree step, without attention."""
    measure = graph_timer(device)
    positions, candidates = 15, 16
    for bs, N in itertools.product(batches, nodes):
        logprobs = (2.0 * torch.randn(bs, positions, 512, device=device)).log_softmax(-1)
        top = logprobs.topk(candidates, dim=-1)
        anchor = torch.zeros(bs, dtype=torch.int64, device=device)
        tree = draft_tree(bs, N, device)
        # Targets that repeat a child's token half of the time, so paths leave the spine.
        target = tree.tokens.roll(-1, 1)
        lens = torch.full((bs,), 1000, dtype=torch.int64, device=device)
        caches = [torch.zeros(bs * N, 8, 128, dtype=torch.bfloat16, device=device) for _ in range(2 * layers)]
        compact = KVCompactor(caches)
        slots = torch.randperm(bs * N, device=device).view(bs, N)
        spine = torch.arange(positions + 1, dtype=torch.int32, device=device).expand(bs, -1).contiguous()
        full = torch.full((bs,), positions + 1, dtype=torch.int32, device=device)
        edges = torch.randn(bs, positions, candidates, candidates, device=device).log_softmax(-1)
        chain = Chain(tree.tokens, torch.full_like(tree.tokens, -1, dtype=torch.float32))
        text = torch.randint(0, 500, (bs, 8192), dtype=torch.int32, device=device)
        rows, ends = torch.arange(bs, device=device), torch.full((bs,), 8192, device=device)
        calls = {
            "build, chain": lambda a=anchor, t=top, n=N, c=chain: build_tree(
                a, t.values, t.indices, num_nodes=n, chain=c
            ),
            "build, edges": lambda a=anchor, t=top, n=N, e=edges: build_tree(
                a, t.values, t.indices, num_nodes=n, edges=e
            ),
            "recall, 8k tokens": lambda t=text, r=rows, e=ends, n=N: recall(
                t, r, e, count=n - 1, longest=8192
            ),
            "build": lambda a=anchor, t=top, n=N: build_tree(a, t.values, t.indices, num_nodes=n),
            "accept": lambda t=tree, g=target, p=lens: accept_tree(t, g, p, max_depth=positions),
            "compact, spine": lambda c=compact, s=slots, p=spine, f=full: c(s, p, f),
        }
        if positions + 1 < N:
            # The worst case: a full path of which nothing is in place but the root.
            path = spine + (N - positions - 1)
            path[:, 0] = 0
            calls["compact, all rows"] = lambda c=compact, s=slots, p=path, f=full: c(s, p, f)
        yield {
            "op": "step", "bs": bs, "nodes": N, "layers": layers,
            "seconds": {name: measure(call) for name, call in calls.items()},
        }  # fmt: skip


def topk_rows(shapes: list[tuple[int, int, int]], device: str, bandwidth: float) -> Iterator[dict]:
    """Draft top-K against the plain matmul, log-sum-exp and topk that it replaces."""
    measure = timer(device)
    for T, H, V in shapes:
        hidden = torch.randn(T, H, dtype=torch.bfloat16, device=device)
        head = torch.randn(V, H, dtype=torch.bfloat16, device=device) / H**0.5

        def plain(hidden=hidden, head=head) -> torch.Tensor:
            logits = (hidden @ head.t()).float()
            return logits.topk(16, dim=-1).values - logits.logsumexp(-1, keepdim=True)

        yield {
            "op": "draft_topk", "T": T, "H": H, "V": V, "floor": head.nbytes / bandwidth,
            "seconds": {
                "ours": measure(lambda hidden=hidden, head=head: draft_topk(hidden, head, 16)),
                "matmul+topk": measure(plain),
            },
        }  # fmt: skip


def show(console: Console, rows: list[dict], rivals: list[str]) -> None:
    """The tables."""
    attention = [r for r in rows if r["op"] == "tree_attention"]
    if attention:
        table = Table(title="Tree attention, one layer, microseconds (of the floor's bandwidth)")
        for column in ("heads", "bs", "ctx", "N", "KV", "floor", "H200 model", *rivals):
            table.add_column(column, justify="right")
        for r in attention:
            floor = r.get("floor")
            cells = []
            for name in rivals:
                s = r["seconds"].get(name)
                share = f" ({floor / s:.0%})" if s and floor else ""
                cells.append(f"{s * 1e6:.1f}{share}" if s else "-")
            head = (r["heads"], str(r["bs"]), str(r["ctx"]), str(r["nodes"]), r["kv"])
            table.add_row(*head, f"{floor * 1e6:.1f}" if floor else "-", f"{r['model'] * 1e6:.1f}", *cells)
        console.print(table)
        for reason in sorted({m for r in attention for m in r["missing"].values()}):
            console.print(f"  missing: {reason}")
    for op, keys in (("step", ("bs", "nodes")), ("draft_topk", ("T", "H", "V"))):
        group = [r for r in rows if r["op"] == op]
        if not group:
            continue
        names = list(dict.fromkeys(name for r in group for name in r["seconds"]))
        table = Table(title=f"{op}, microseconds")
        for column in (*keys, *names):
            table.add_column(column, justify="right")
        for r in group:
            times = (f"{r['seconds'][n] * 1e6:.1f}" if n in r["seconds"] else "-" for n in names)
            table.add_row(*(str(r[k]) for k in keys), *times)
        console.print(table)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; their defaults depend on the device."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--bs", type=_numbers)
    p.add_argument("--ctx", type=_numbers)
    p.add_argument("--nodes", type=_numbers)
    p.add_argument("--kv", default=None, help="bf16,fp8")
    p.add_argument("--heads", default=None, help="llama,qwen-moe")
    p.add_argument("--rivals", default=None, help=",".join(RIVALS))
    p.add_argument("--layers", type=int, default=32, help="layers of the compaction row")
    p.add_argument("--only", choices=("attention", "step", "topk"), help="one table")
    p.add_argument("--out", type=Path, default=Path("out/kernels.jsonl"))
    args = p.parse_args(argv)
    gpu = args.device == "cuda"
    args.bs = args.bs or ([1, 4, 16, 64] if gpu else [1, 4])
    args.ctx = args.ctx or ([1024, 8192, 32768, 131072] if gpu else [256, 1024])
    args.nodes = args.nodes or ([16, 32, 64] if gpu else [16, 32])
    args.kv = (args.kv or ("bf16,fp8" if gpu else "bf16")).split(",")
    args.heads = (args.heads or ("llama,qwen-moe" if gpu else "llama")).split(",")
    args.rivals = (args.rivals or ("ours,sglang,flashinfer,flex" if gpu else "ours,sdpa")).split(",")
    unknown = (
        (set(args.rivals) - set(RIVALS)) | (set(args.heads) - set(HEADS)) | (set(args.kv) - {"bf16", "fp8"})
    )
    if unknown:
        p.error(f"unknown: {', '.join(sorted(unknown))}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console()
    if args.device == "cuda" and not torch.cuda.is_available():
        console.print("no CUDA device here; --device cpu times the torch implementations", style="red")
        return 1
    torch.set_grad_enabled(False)
    bandwidth = copy_bandwidth(args.device)
    about = environment(args.device)
    console.print("  ".join(f"{k} {v}" for k, v in about.items()), highlight=False)
    console.print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s", highlight=False)
    grid = [
        (HEADS[h], bs, ctx, n, kv)
        for h, kv, bs, ctx, n in itertools.product(args.heads, args.kv, args.bs, args.ctx, args.nodes)
    ]
    shapes = [(t, 4096, 151936) for t in (15, 60, 240)] if args.device == "cuda" else [(7, 576, 49152)]
    parts: list[tuple[int, Iterator[dict]]] = []
    if args.only in (None, "attention"):
        parts.append((len(grid), attention_rows(grid, args.rivals, args.device, bandwidth)))
    if args.only in (None, "step"):
        budgets = [n for n in args.nodes if n >= 16]
        parts.append((len(args.bs) * len(budgets), step_rows(args.bs, budgets, args.layers, args.device)))
    if args.only in (None, "topk"):
        parts.append((len(shapes), topk_rows(shapes, args.device, bandwidth)))
    rows: list[dict] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as log, Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=sum(n for n, _ in parts))
        for row in itertools.chain.from_iterable(source for _, source in parts):
            rows.append(row)
            log.write(json.dumps({**row, "bandwidth": bandwidth, **about}) + "\n")
            log.flush()
            progress.advance(task)
    show(console, rows, args.rivals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
