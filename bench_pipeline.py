"""bench.py pipeline and overlap: schedules carried out, and what a pair of chunks hides."""
import datetime
import itertools
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import configs
import dualpipe
import fp8
import model
import moe
from configs import UserError
from measure import record

# --- pipelines of stages that sleep -----------------------------------------------------------------------------------

class Sleep(torch.autograd.Function):
    """x, but F takes as long as I, and with a weight as W."""

    @staticmethod
    def forward(ctx, x, seconds, weight=None):
        ctx.weight, ctx.seconds = weight, seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        time.sleep(ctx.seconds)
        wgrad = lambda: time.sleep(ctx.seconds) or torch.zeros_like(ctx.weight)
        return dy, None, None if ctx.weight is None else fp8.weight_gradient(ctx.weight, wgrad)


class Sleeper(nn.Module):
    """A stage that does nothing for so long. local: with the local loss that DualPipe asks for."""

    def __init__(self, seconds, local=True):
        super().__init__()
        self.weight, self.seconds, self.local = nn.Parameter(torch.zeros(1)), seconds, local

    def forward(self, x):
        y = Sleep.apply(x, self.seconds, self.weight)
        return (y, None) if self.local else y

    def put_off(self):
        """torch's name for it is dw_builder: take what a backward has put off -> a function that does it."""
        later, self.weight.queue = self.weight.queue, []
        return lambda: [compute() for compute in later]


def our_pipeline(kind, ranks, rank, x, microbatches, seconds):
    _, here = dualpipe.layout(kind, ranks, rank)
    pipe = dualpipe.DualPipe(kind, [Sleeper(seconds) for _ in here], lambda y, labels: y.sum(), x[:1])
    return lambda: pipe.step(microbatches, x, x)


def torch_pipeline(schedule, ranks, rank, x, microbatches, seconds):
    from torch.distributed import pipelining
    single = issubclass(schedule, pipelining.schedules.PipelineScheduleSingle)
    stages = []
    for index in [rank] if single else [rank, 2 * ranks - 1 - rank]:
        sleeper = Sleeper(seconds, local=False)
        sleeper.weight.queue = []
        args = x[:1].clone().requires_grad_(index > 0)
        stages.append(pipelining.PipelineStage(sleeper, index, ranks if single else 2 * ranks, torch.device("cpu"),
                                               args, x[:1].clone().requires_grad_(), dw_builder=sleeper.put_off))
    pipe = schedule(stages[0] if single else stages, microbatches, lambda y, labels: y.sum(), scale_grads=False)
    inputs = [x] if stages[0].is_first else []
    target = {"target": x} if stages[-1].is_last else {}
    return lambda: pipe.step(*inputs, **target)


def sleep_in_turns(rank, ranks, folder, seconds, attempts):
    """What one rank does: every schedule on the same model, that of two stages a rank with stages of half the time."""
    from torch.distributed.pipelining import Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks,
                            timeout=datetime.timedelta(seconds=60))
    microbatches, rows = 5 * ranks // 2, []
    x = torch.zeros(microbatches, 8)
    for maker, kind in [*((our_pipeline, kind) for kind in dualpipe.KINDS), (torch_pipeline, Schedule1F1B),
                        (torch_pipeline, ScheduleZBVZeroBubble), (torch_pipeline, ScheduleDualPipeV)]:
        name = kind if isinstance(kind, str) else kind.__name__
        share = 0.5 if name == "dualpipev" or name.endswith(("V", "Bubble")) else 1.0
        step, times = maker(kind, ranks, rank, x, microbatches, share * seconds), []
        for _ in range(attempts):
            dist.barrier()
            began = time.perf_counter()
            step()
            took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times.append(took.item())
        row = {"by": maker.__name__.partition("_")[0], "schedule": name, "ranks": ranks, "microbatches": microbatches,
               "stage_seconds": share * seconds, "measured": times}
        if kind in dualpipe.KINDS:
            lists = [dualpipe.schedule(kind, ranks, r, microbatches) for r in range(ranks)]
            row["simulated"] = dualpipe.simulate(kind, lists)["makespan"] * share * seconds
        rows.append(row)
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def pipeline(options):
    """The schedules executed on 4 and 8 gloo processes, F = I = W, against what `simulate` says and against torch's."""
    rows, seconds, attempts = [], 0.05, int(options.get("repeats", 2))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (4, 8):
            processes = [context.Process(target=sleep_in_turns, args=(rank, ranks, folder, seconds, attempts))
                         for rank in range(ranks)]
            [p.start() for p in processes]
            [p.join(120) for p in processes]
            [p.kill() for p in processes if p.is_alive()]
            rows += json.loads(Path(folder, f"{ranks}.json").read_text())
    for row in rows:
        against = f", {min(row['measured']) / row['simulated'] - 1:+.1%} of simulated" if "simulated" in row else ""
        print(f"{row['by']:6} {row['schedule']:22} {row['ranks']} ranks: {min(row['measured']):.3f} s{against}")
    record("pipeline", "python bench.py pipeline", rows=rows)


# --- a pair of chunks on one GPU --------------------------------------------------------------------------------------

class Detour(moe.Sent):
    """Tokens that travel to pinned memory of the host and back, some times, in place of other ranks: the GPU's copy
    engines carry them, and so its processors are as free as they are while a network card works."""
    times, host = 0, {}

    def travel(self, *tensors):
        for i, t in enumerate(tensors):
            key = i, t.shape, t.dtype
            if key not in self.host:
                self.host[key] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            for _ in range(self.times):
                self.host[key].copy_(t, non_blocking=True)
                t = torch.empty_like(t).copy_(self.host[key], non_blocking=True)
        return tensors

    def dispatch(self, *tensors):
        return self.travel(*tensors)

    there = back = dispatch


def intervals(trace):
    """A chrome trace -> [{"stream", "what", "name", "start", "end"} of each kernel and copy] in ms from the first."""
    events = [e for e in json.loads(Path(trace).read_text())["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy")]
    began = min(e["ts"] for e in events)
    return [{"stream": e["args"]["stream"], "what": e["cat"], "name": e["name"], "start": (e["ts"] - began) / 1e3,
             "end": (e["ts"] - began + e["dur"]) / 1e3} for e in sorted(events, key=lambda e: e["ts"])]


def covered(spans, by):
    """How much of some [(start, end)] others lie over."""
    total, ends = 0.0, -math.inf
    for start, end in sorted(by):                                              # joined, so that nothing counts twice
        start, ends = max(start, ends), max(end, ends)
        total += sum(max(0.0, min(end, e) - max(start, s)) for s, e in spans)
    return total


def lanes(timeline, travels, pairs):
    """What `intervals` found of so many pairs -> the spans of kernels on the stream that works most and of what
    `travels` on others, and how much of these lies under those: from the second pair on, for when the first one began
    the host was not ahead."""
    since = [e["start"] for e in timeline if travels(e)]
    timeline, work = [e for e in timeline if e["start"] >= since[len(since) // pairs]], Counter()
    for e in timeline:
        work[e["stream"]] += (e["end"] - e["start"]) * (e["what"] == "kernel" and not travels(e))
    main = work.most_common(1)[0][0]
    kernels = [(e["start"], e["end"]) for e in timeline if e["what"] == "kernel" and e["stream"] == main]
    copies = [(e["start"], e["end"]) for e in timeline if e["stream"] != main and travels(e)]
    return {"under_kernels": covered(copies, kernels) / sum(end - start for start, end in copies),
            **{name: [[round(t, 3) for t in span] for span in joined(spans)]
               for name, spans in (("kernels", kernels), ("copies", copies))}}


class Pairs:
    """DualPipeV on one rank, of two chunks of some V3 blocks each, whose tokens go through `ranks` (a moe.ExpertRanks):
    pairs of a forward and a backward that exchange with no stage of another rank. group: one of this rank alone."""
    TRACED = 3                                 # pairs in a timeline

    def __init__(self, c, ranks, device, group=None, microbatches=6):
        self.size, self.microbatches, self.group = c.micro_batch_size, microbatches, group
        self.tokens = torch.randint(c.vocab_size, (microbatches * self.size, c.seq_len + 1), device=device)
        with device:
            self.stages = model.stages(c, 2, [0, 1])
        self.device = self.tokens.device
        moe.spread(nn.ModuleList(self.stages), ranks)
        for block in (block for s in self.stages for block in s.layers.values()):
            block.ffn.ranks = ranks                                            # also where there is one rank

    def sync(self):
        """Nothing is left to do, here and on the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))

    def step(self, overlap, watch):
        """One batch; its pairs, which follow each other without a break, are run by watch(number, run, step)."""
        stages, tokens, number = self.stages, self.tokens, itertools.count()
        pipe = dualpipe.DualPipe("dualpipev", stages, stages[1].criterion, stages[0].like(self.size),
                                 self.group, overlap=overlap)
        run = pipe.run
        pipe.run = lambda step: watch(next(number), run, step) if step.kind == "FB" and step.mb[0] > 1 else run(step)
        for s in stages:
            s.begin(([tokens.numel() - len(tokens)], len(tokens)))
            s.zero_grad()
        pipe.step(self.microbatches, tokens, tokens)

    def milliseconds(self, overlap):
        """Mean time of a pair, in turns or one chunk after the other. The first one is not counted: the host is then
        ahead of the GPU, as in the midst of a training step."""
        pairs, began = 2 * (self.microbatches - 2), []

        def watch(number, run, step):
            if number == 0:
                self.sync()
            run(step)
            if number == 0:
                began.append(self.mark())
            elif number == pairs - 1:
                began.append(self.mark())
                self.sync()

        self.step(overlap, watch)
        first, last = began
        return (first.elapsed_time(last) if self.device.type == "cuda" else (last - first) * 1e3) / (pairs - 1)

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timeline(self):
        """`intervals` of some pairs in turns, one behind the other."""
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

        def watch(number, run, step):
            if number == 0:
                profiler.start()
                self.sync()
            run(step)
            if number == self.TRACED - 1:
                self.sync()
                profiler.stop()

        self.step(True, watch)
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            return intervals(f"{folder}/trace.json")


def longest(timeline, most=10):
    """[(name of a kernel, its ms)] of those that take longest in what `intervals` found."""
    work = Counter()
    for e in timeline:
        work[e["name"]] += e["end"] - e["start"]
    return work.most_common(most)


def pair(c, device, detours=(3, 2, 5, 1)):
    """Yields, as they come: (ms of a pair of chunks of two blocks each whose exchanges take no time; for each number of
    detours a row: ms in turns and one after the other, and the share that turns hide; on a GPU the timeline of a pair
    in turns)."""
    ranks = moe.ExpertRanks(1, 1, 0, device=torch.empty(0, device=device).device)
    pairs, times, rows, timeline = Pairs(c, ranks, device), [], [], []

    def measured(detours, overlap=True):
        Detour.times = detours
        return pairs.milliseconds(overlap)

    measured(0)                                                                # kernels are compiled
    for n in detours:
        times.append(measured(0))                          # anew, beside what it is compared with, and then the least
        turns, apart, without = measured(n), measured(n, False), min(times)
        rows.append({"detours": n, "in_turns_ms": turns, "one_after_the_other_ms": apart,
                     "travel_ms": apart - without, "hidden": 1 - (turns - without) / (apart - without)})
        yield without, rows, timeline
    if device.type == "cuda":
        # An exchange for each segment, half as long: what V3 has on its own cluster (cluster.py).
        Detour.times = min(rows, key=lambda row: abs(row["travel_ms"] / without - 0.5))["detours"]
        timeline += pairs.timeline()
        yield without, rows, timeline


def overlap(options):
    if not torch.cuda.is_available():
        raise UserError("bench.py overlap: needs a CUDA GPU; tests/test_dualpipe.py measures the same on a CPU")
    c = configs.load(["configs/v3_671b.py"]).replace(
        n_layers=4, n_dense_layers=0, n_routed_experts=16, n_expert_groups=1, n_limited_groups=1, n_mtp=0,
        vocab_size=1024, recompute=False, seq_len=4096)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(moe, "Sent", Detour):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for without, rows, timeline in pair(c, torch.device("cuda")):
            numbers = {"shape": "V3's layer with 16 experts, 4,096 tokens", "without_ms": without, "rows": rows}
            if timeline:
                numbers["timeline"] = {"detours": Detour.times,
                                       **lanes(timeline, lambda e: e["what"] == "gpu_memcpy", Pairs.TRACED)}
                print(f"timeline: {numbers['timeline']['under_kernels']:.1%} of the copies under kernels; longest:",
                      *(f"{ms:8.2f} ms {name[:100]}" for name, ms in longest(timeline)), sep="\n", flush=True)
            else:
                print(f"{rows[-1]['travel_ms'] / without:.2f} of the arithmetic travels: {rows[-1]['hidden']:.1%} "
                      f"hidden  {rows[-1]}", flush=True)
            record("overlap", "python bench.py overlap", **numbers)
        dist.destroy_process_group()


def joined(spans, gap=0.02):
    """Sorted spans, those with less than a gap between them made one."""
    out = []
    for start, end in sorted(spans):
        if out and start - out[-1][1] < gap:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    return out
