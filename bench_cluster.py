"""bench.py cluster: one run on several GPUs of a machine, or on two processes of a CPU, which show that it works.

    parity      train.py on every layout of the ranks against one rank: losses, weights, gradients
    exchange    what experts send: bytes a second, against the link
    overlap     what a pair of DualPipe's chunks hides of its exchanges
    scaling     tokens/s and memory of a training step on one GPU and on all of them
    restart     a rank is killed, torchrun starts again

A part is a function (job, case) that every rank calls, in processes that go from case to case. When a case fails, or
takes too long, they are ended, it is told, and new ones go on with the case after it.
"""
import gc
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import backend
import cluster
import configs
import dualpipe
import moe
import parallel
import ranks
import train
from bench_pipeline import Pairs, lanes, longest
from configs import UserError
from measure import HERE, chosen, kept, lines, record
from model import arithmetic, official_tensors
from parallel import write_atomic

# --- ranks that go from case to case ----------------------------------------------------------------------------------

PATIENCE = 60                                  # seconds that a rank waits for another


@dataclass
class Job:
    """What a rank of a part knows."""
    rank: int
    world: int
    device: torch.device
    store: object                              # torch's table, which all ranks reach
    folder: Path                               # of the whole command

    @property
    def small(self):
        return self.device.type == "cpu"

    def mesh(self, case):
        return parallel.Mesh(self.rank, self.world, self.rank, store=dist.PrefixStore(case, self.store),
                             timeout=PATIENCE)

    def connect(self, c, case):
        """The Mesh of all ranks, arranged and connected for a Config."""
        mesh = self.mesh(case).arrange(c, {c.batch_size})
        mesh.connect(mesh.device(self.device))
        return mesh

    def sync(self):
        if not self.small:
            torch.cuda.synchronize()

    def seconds(self, run, repeats=10):
        """Mean time of run(), on the rank that takes longest; connections are made and kernels compiled before."""
        for _ in range(3):
            run()
        self.sync()
        dist.all_reduce(torch.zeros(1))                                        # all begin together
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        self.sync()
        took = torch.tensor((time.perf_counter() - began) / repeats, dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return took.item()


def worker(part, cases, rank, world, gpu, port, folder, results):
    """What a process does: its cases {number: case}, one after the other; each result is a file. gpu: None on a CPU."""
    log = os.open(results / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      NANOV3_CACHE=str(folder / f"cache{rank}"))
    code = 1
    try:
        if gpu is None:
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(gpu)
        device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
        job = Job(rank, world, device, dist.TCPStore("127.0.0.1", port, world, False), folder)
        for number, case in cases.items():
            began = time.time()
            result = PARTS[part](job, case)
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()
            torch.cuda.empty_cache()
            write_atomic(results / f"{number}.{rank}.json", json.dumps(result))
            print(f"{case}: {time.time() - began:.1f} s")
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)                                                             # nobody waits for a rank that is gone


class Ranks:
    """The processes of a part, which work on some of its cases until `results` has been asked for."""

    def __init__(self, part, cases, world, device, folder, first=0):
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload([__name__])                         # torch is imported once
        self.cases, self.world, self.folder = cases, world, Path(tempfile.mkdtemp(prefix=part, dir=folder))
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.processes = []
        for rank in range(world):
            gpu = first + rank if device == "cuda" else None
            arguments = part, cases, rank, world, gpu, self.store.port, folder, self.folder
            self.processes.append(context.Process(target=worker, args=arguments, daemon=True))
            self.processes[-1].start()

    def results(self, patience):
        """{number: [the result of each rank]} of the cases that all ranks have finished, each in `patience` seconds,
        the first in twice as many."""
        done, until = {}, time.time() + 2 * patience
        files = lambda number: [self.folder / f"{number}.{rank}.json" for rank in range(self.world)]
        while True:
            over = [process.exitcode for process in self.processes]
            for number in self.cases:
                if number not in done and all(file.exists() for file in files(number)):
                    done[number] = [json.loads(file.read_text()) for file in files(number)]
                    until = time.time() + patience
            if len(done) == len(self.cases) or any(over) or time.time() > until:
                break
            time.sleep(0.05)
        for process in self.processes:
            process.join(10 if len(done) == len(self.cases) else 0.5)
            process.kill()
            process.join()
        if len(done) < len(self.cases):
            print(f"    {'took too long' if not any(over) else f'exit codes {over}'}; the last that a rank said:")
            for rank in range(self.world):
                log = (self.folder / f"{rank}.log").read_text(errors="replace")
                print(*(f"    {rank}: {line[:200]}" for line in log.splitlines()[-12:]), sep="\n", flush=True)
        return done


def run(part, cases, world, device, folder, patience=60, tries=4):
    """{case: [the result of each rank]}, of those that went well."""
    left, results = dict(enumerate(cases)), {}
    while left and tries:
        done = Ranks(part, left, world, device, folder).results(patience)
        results |= {left.pop(number): result for number, result in done.items()}
        if left:
            print(f"  {part}: {left.pop(min(left))}: FAILED", flush=True)
            tries -= 1
    return results


def shipped(name, **changes):
    """The Config of a file in configs/, changed."""
    return configs.Config(**{key: value for key, (value, _) in configs.read(HERE / "configs" / name).items()} | changes)


# --- parity -----------------------------------------------------------------------------------------------------------

PARITY = dict(
    dim=256, n_layers=3, n_heads=4, inter_dim=512, moe_inter_dim=128, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, n_activated_experts=4, n_expert_groups=1,
    n_limited_groups=1, vocab_size=260, tokenizer="bytes", seq_len=64, micro_batch_size=2, max_steps=20, warmup_steps=2,
    lr=1e-3, min_lr=5e-4, init_std=0.05, bias_update_speed=0.01, eval_interval=0, save_interval=0, timeout=PATIENCE)
SMALL = dict(dim=32, n_heads=2, inter_dim=64, moe_inter_dim=32, kv_lora_rank=16, seq_len=16, init_std=0.1)


def layouts(world):
    """{name: flags of train.py} for so many ranks."""
    dp = f", dp {world // 2}" if world > 2 else ""
    out = {f"dp {world}": [], f"ep {world}": [f"--ep={world}"]}
    out |= {f"pp 2 {kind}{dp}": ["--pp=2", f"--pipeline={kind}"] for kind in ("dualpipe", "dualpipev", "1f1b")}
    if world > 2:
        out |= {f"dp {world}, ep 2": ["--ep=2"], f"ep {world}, two hops": [f"--ep={world}", "--nodes=2"],
                f"pp 2 dualpipev, ep {world // 2}": ["--pp=2", "--pipeline=dualpipev", f"--ep={world // 2}"],
                "pp 4 dualpipe": ["--pp=4"]}
    return out


def prepare_parity(folder, world, small):
    """A text and a config in `folder`."""
    dice, words = random.Random(0), "the cat sees a dog and some bird near our house".split()
    (folder / "text.txt").write_text("".join(" ".join(dice.choices(words, k=6)) + ".\n" for _ in range(200)))
    c = {**PARITY, **(SMALL if small else {}), "data": str(folder / "text.txt"), "batch_size": 4 * world}
    (folder / "parity.py").write_text("".join(f"{key} = {value!r}\n" for key, value in c.items()))


def trained(job, mesh, name, *flags):
    """What `python train.py` does, in this process, as one rank of `mesh`, up to its last checkpoint; this rank's
    gradients of step 1 are kept beside it, summed and not yet clipped."""
    modules, grads, build, clip = [], {}, ranks.build, parallel.Shares.clip

    def building(*args):
        modules[:], pipe = build(*args)
        return modules, pipe

    def clipping(shares, *args):
        for part in modules if not grads else ():
            own = {name: p.grad for name, p in part.named_parameters() if name in shares.owned and p.grad is not None}
            grads.update(parallel.copied(official_tensors(part, own)))
        return clip(shares, *args)

    out = job.folder / name
    with mock.patch.object(ranks, "build", building), mock.patch.object(parallel.Shares, "clip", clipping), \
            mock.patch.object(train, "finish"):
        train.main([str(job.folder / "parity.py"), f"--out_dir={out}", f"--device={job.device.type}", *flags], mesh)
    save_file(grads, out / f"gradients_{mesh.rank}.safetensors")


def parity(job, case):
    """20 steps of a layout. The first case is one rank alone, and at the same time another one alone whose
    micro-batches are larger: the noise."""
    precision, name = case.split(" ", 1)
    if name != "alone":
        trained(job, job.mesh(case), case, f"--precision={precision}", *layouts(job.world)[name])
    elif job.rank < 2:
        trained(job, parallel.Mesh(), f"{case} {job.rank}", f"--precision={precision}",
                f"--micro_batch_size={(2, 4)[job.rank]}")


def tensors(folder, files):
    return {name: t for file in sorted(folder.glob(files)) for name, t in load_file(file).items()}


def difference(folder, whole):
    """How far a run is from another, relatively: the loss of the worst step; by Frobenius norms all weights after the
    last step, all gradients of the first, and the worst of these (one that is less than a thousandth of them all is
    compared with that thousandth)."""
    norm = lambda tensors: torch.stack([t.double().norm() for t in tensors]).norm().item()
    rows, theirs = (lines(f)[0] for f in (folder, whole))
    out = {"loss": max(abs(a[key] / b[key] - 1) for a, b in zip(rows, theirs, strict=True)
                       for key in ("loss", "mtp_loss"))}
    ours, theirs = (tensors(parallel.latest(f), "rank_*.safetensors") for f in (folder, whole))
    assert ours.keys() == theirs.keys()
    weights = [name for name in theirs if name.startswith(("model", "lm_head")) and not name.endswith("bias")]
    out["weights"] = norm([ours[n] - theirs[n] for n in weights]) / norm([theirs[n] for n in weights])
    ours, theirs = (tensors(f, "gradients_*.safetensors") for f in (folder, whole))
    assert theirs.keys() >= ours.keys()                                        # an idle expert's may be missing
    apart, size = {n: norm([ours.get(n, torch.zeros_like(t)) - t]) for n, t in theirs.items()}, norm(theirs.values())
    each = {n: apart[n] / max(norm([t]), size / 1000) for n, t in theirs.items()}
    worst = max(each, key=each.get)
    out["all_gradients"] = math.hypot(*apart.values()) / size
    return {**out, "gradients": each[worst], "worst gradient": worst}


def measure_parity(world, device, folder):
    prepare_parity(folder, world, device == "cpu")
    rows = []
    for precision in ("fp32", "bf16"):
        cases = [f"{precision} {name}" for name in ("alone", *layouts(world))]
        done = run("parity", cases, world, device, folder, 45)
        if cases[0] not in done:
            continue
        for name in ("alone 1", *(case.split(" ", 1)[1] for case in cases[1:] if case in done)):
            noise = name == "alone 1"
            rows.append({"precision": precision, "layout": "one rank, other micro-batches" if noise else name,
                         "noise": noise, **difference(folder / f"{precision} {name}", folder / f"{precision} alone 0")})
            r = rows[-1]
            print(f"  {precision} {r['layout']:32} loss {r['loss']:.1e}  weights {r['weights']:.1e}  gradients "
                  f"{r['all_gradients']:.1e}, worst {r['gradients']:.1e} {r['worst gradient']}", flush=True)
    return {"steps": PARITY["max_steps"], "rows": rows}


# --- exchange ---------------------------------------------------------------------------------------------------------

def exchange_cases(world):
    """The link, and experts on ranks of nodes x locals that we take these for."""
    return ["link", *(f"{n} x {world // n}, {what}" for what in ("bf16", "fp8") for n in range(1, world + 1)
                      if world % n == 0)]


def link(job):
    """Bytes that a rank sends to others, and bytes a second."""
    each = 2**16 if job.small else 2**28
    mine, theirs = (torch.zeros(job.world * each, dtype=torch.uint8, device=job.device) for _ in range(2))
    after, before = (job.rank + 1) % job.world, (job.rank - 1) % job.world

    def around():
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine[:each], after),
                                            dist.P2POp(dist.irecv, theirs[:each], before)]):
            work.wait()

    both = job.seconds(lambda: dist.all_to_all_single(theirs, mine))
    return {"all_to_all": (job.world - 1) * each / both, "send_receive": each / job.seconds(around), "bytes": each}


def experts_of(job, nodes):
    """(between, inside) of this rank, all ranks being `nodes` machines."""
    locals, found = job.world // nodes, []
    for members in ([list(range(j, job.world, locals)) for j in range(locals)],
                    [list(range(n * locals, (n + 1) * locals)) for n in range(nodes)]):
        groups = [(line, dist.new_group(line)) for line in members if len(line) > 1]     # by every rank
        found.append(next((group for line, group in groups if job.rank in line), None))
    return found


def exchange(job, case):
    """A dispatch and a combine of V3's: milliseconds, bytes sent to others, and of these the all-to-all alone."""
    c = shipped("v3_671b.py", batch_size=job.world, batch_ramp=0, pp=1, ep=1)
    N, D = (64, 256) if job.small else (c.seq_len, c.dim)
    job.connect(c, case)
    if case == "link":
        return link(job)
    shape, what = case.split(", ")
    nodes, locals = map(int, shape.split(" x "))
    members = moe.ExpertRanks(nodes, locals, job.rank, *experts_of(job, nodes), what == "fp8", job.device)
    generator = torch.Generator(job.device).manual_seed(job.rank)
    x = torch.randn(N, D, device=job.device, generator=generator).to(torch.bfloat16)
    scores = torch.rand(N, c.n_routed_experts, device=job.device, generator=generator)
    indices = moe.select(scores, c.n_activated_experts, c.n_expert_groups, c.n_limited_groups)
    routing = moe.Routing((1, N), indices, torch.rand(indices.shape, device=job.device), c.n_routed_experts, 0.0)

    def dispatched():
        sent = moe.Sent(routing, members)
        return sent, sent.dispatch(x, routing.weights)

    def alone(sent, there):
        """The same numbers of bytes, as one message a hop, packed already."""
        messages = []
        for hop in sent.hops:
            n, width = sum(hop.send if there else hop.receive), D * (1 if there and members.fp8 else 2)
            messages.append((hop, torch.zeros(n, width, dtype=torch.uint8, device=job.device)))
        return lambda: [hop.exchange(t, *((hop.send, hop.receive) if there else (hop.receive, hop.send)))
                        for hop, t in messages]

    sent, (tokens, _) = dispatched()
    ways, out = [("dispatch", dispatched, alone(sent, True))], {}
    if not members.fp8:                                                        # a combine is in BF16 either way
        ways.append(("combine", lambda: sent.back(tokens), alone(sent, False)))
    for name, run, wire in ways:
        before = sum(members.bytes_sent.values())
        run()
        out[name] = {"bytes": sum(members.bytes_sent.values()) - before, "seconds": job.seconds(run)}
        before = sum(members.bytes_sent.values())
        wire()
        out[name] |= {"wire_bytes": sum(members.bytes_sent.values()) - before, "wire_seconds": job.seconds(wire)}
    return out


def measure_exchange(world, device, folder):
    done = run("exchange", exchange_cases(world), world, device, folder)
    out = {"tokens": 64 if device == "cpu" else 4096, "rows": []}
    if "link" in done:
        out["link"] = {key: min(r[key] for r in done["link"]) for key in done["link"][0]}
        print(f"  the link: all-to-all {out['link']['all_to_all'] / 1e9:.1f} GB/s a rank, send and receive "
              f"{out['link']['send_receive'] / 1e9:.1f}", flush=True)
    for case, results in done.items():
        for name in results[0] if case != "link" else ():
            r = {key: max(result[name][key] for result in results) for key in results[0][name]}
            shape, dtype = case.split(", ")
            out["rows"].append({"shape": shape, "what": name, "dtype": dtype, **r})
            print(f"  {case:12} {name:9} {r['bytes'] / 1e6:7.2f} MB  {r['seconds'] * 1e3:6.3f} ms  "
                  f"{r['bytes'] / r['seconds'] / 1e9:6.1f} GB/s; the all-to-all alone {r['wire_seconds'] * 1e3:6.3f} "
                  f"ms, {r['wire_bytes'] / r['wire_seconds'] / 1e9:6.1f} GB/s", flush=True)
    return out


# --- overlap ----------------------------------------------------------------------------------------------------------

class Stay(moe.Sent):
    """Tokens that travel nowhere: every rank works for its own, and for as many as it would otherwise."""

    def dispatch(self, x, weights):
        self.indices = self.indices % (self.routing.n_experts // (self.ranks.nodes * self.ranks.locals))
        return x, weights

    def there(self, *tensors):
        return tensors

    back = there


def v3_layers(small, case, experts):
    """V3 with four layers of fewer experts, for a case of "PRECISION, N x 4,096 tokens"."""
    precision, sequences = case.split(", ")[0], int(case.split(", ")[1][0])
    c = shipped("v3_671b.py", n_layers=4, n_dense_layers=0, n_routed_experts=experts, n_expert_groups=1,
                n_limited_groups=1, n_mtp=0, vocab_size=1024, precision=precision, batch_size=experts, batch_ramp=0,
                micro_batch_size=sequences, pp=1, ep=1)
    return c.replace(dim=128, moe_inter_dim=64, n_heads=2, q_lora_rank=32, kv_lora_rank=32, seq_len=64) if small else c


def overlap(job, case):
    """Pairs of chunks whose experts are spread over all ranks: milliseconds in turns, one chunk after the other, and
    without exchanges; and what lies under what in the timeline of one."""
    c = v3_layers(job.small, case, 8 * job.world)
    job.connect(c, case)
    _, inside = experts_of(job, 1)
    members = moe.ExpertRanks(1, job.world, job.rank, None, inside, c.precision == "fp8", job.device)
    alone = [dist.new_group([rank]) for rank in range(job.world)][job.rank]
    pairs = Pairs(c, members, job.device, alone)
    pairs.milliseconds(True)                                                   # kernels are compiled
    out = {"in_turns_ms": pairs.milliseconds(True), "one_after_the_other_ms": pairs.milliseconds(False)}
    if not job.small:
        spans = pairs.timeline()
        out |= lanes(spans, lambda e: "nccl" in e["name"].lower(), Pairs.TRACED)
        out["longest"] = longest(spans)
    with mock.patch.object(moe, "Sent", Stay):
        pairs.milliseconds(True)
        out["without_ms"] = pairs.milliseconds(True)
    return out


def overlap_cases(device):
    fp8 = device == "cuda" and backend.fp8_kernels(torch.device("cuda"))[0] == "Triton"
    return [f"{precision}, {n} x 4,096 tokens" for precision in ("bf16", *["fp8"] * fp8) for n in (1, 2)]


def measure_overlap(world, device, folder):
    done, out = run("overlap", overlap_cases(device), world, device, folder, 90), {"rows": []}
    for case, results in done.items():
        r = {key: max(result[key] for result in results) for key in results[0] if key.endswith("ms")}
        precision, sequences = case.split(", ")
        travel = r["one_after_the_other_ms"] - r["without_ms"]
        r |= {"precision": precision, "sequences": int(sequences[0]), "travel_ms": travel,
              "hidden": 1 - (r["in_turns_ms"] - r["without_ms"]) / travel if travel else 0.0}
        shares = [result["under_kernels"] for result in results if "under_kernels" in result]
        if shares:
            r["under_kernels"] = min(shares)
            out["timeline"] = {"precision": precision, **{key: results[0][key] for key in ("kernels", "copies")}}
        out["rows"].append(r)
        print(f"  {case}: a pair {r['in_turns_ms']:.1f} ms in turns, {r['one_after_the_other_ms']:.1f} one after the "
              f"other, {r['without_ms']:.1f} without exchanges: {r['hidden']:.1%} hidden"
              + (f"; {min(shares):.1%} of the exchanges under kernels" if shares else ""), flush=True)
        for kernel, ms in results[0].get("longest", []):
            print(f"    {ms:8.2f} ms {kernel[:100]}", flush=True)
    return out


# --- scaling ----------------------------------------------------------------------------------------------------------

SIBLING = dict(n_routed_experts=256, n_layers=13, moments="bf16")


def scaling_cases(world):
    """{case: (model, layout)}, each as changes of configs/bench_1b.py."""
    pipelines = {f"pp 2 {kind}" + (f", dp {world // 2}" if world > 2 else ""): dict(pp=2, pipeline=kind)
                 for kind in ("dualpipe", "dualpipev", "1f1b")}
    spread = {f"dp {world}": {}, f"ep {world}": dict(ep=world)}
    large = {**spread, **dict(list(pipelines.items())[1:2])}
    return {"1 GPU": ({}, {}), **{name: ({}, layout) for name, layout in (spread | pipelines).items()},
            f"dp {world}, one micro-batch a step": ({}, {}),
            "4x, 1 GPU": (SIBLING, {}), **{f"4x, {name}": (SIBLING, layout) for name, layout in large.items()}}


def scaling_config(small, world, case):
    """A rank has four micro-batches of a step to itself, or one."""
    large, layout = scaling_cases(world)[case]
    tiny = dict(dim=64, n_heads=2, n_layers=3, vocab_size=512, seq_len=32, micro_batch_size=1, n_routed_experts=8,
                moe_inter_dim=32, precision="fp32") if small else {}
    c = shipped("bench_1b.py", **{**large, **layout, **tiny})
    many = 1 if "one micro-batch" in case else 4
    return c.replace(batch_size=many * c.micro_batch_size * (1 if case.endswith("1 GPU") else world))


def step(job, training, tokens):
    """train.run's step on random tokens, the first after the warmup: (seconds, seconds of forward and backward)."""
    mesh, number = training.mesh, training.c.warmup_steps
    mesh.most(0)
    began = time.perf_counter()
    training.forward_backward(tokens, number)
    job.sync()
    computed = time.perf_counter() - began
    training.sum_gradients()
    training.update(number)
    job.sync()
    return mesh.most(time.perf_counter() - began), mesh.most(computed)


def timed_steps(pipe, device):
    """Let the pipeline note its steps: a list that grows by (kind, function that gives its milliseconds)."""
    spans, run = [], pipe.run

    def noted(step):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(step)
            end.record()
            spans.append((step.kind, lambda: start.elapsed_time(end)))
        else:
            began = time.perf_counter()
            run(step)
            took = (time.perf_counter() - began) * 1e3
            spans.append((step.kind, lambda: took))

    pipe.run = noted
    return spans


def scaling(job, case):
    """A few training steps: seconds, the peak of memory; of a pipeline what it took and what `simulate` says of the
    mean durations of each rank's steps. Alone: bench_1b on the GPU of rank 0 and, at the same time, its sibling on that
    of rank 1."""
    if case == "4x, 1 GPU" or case == "1 GPU" and job.rank > 1:
        return None
    alone = case == "1 GPU"
    c = scaling_config(job.small, job.world, "4x, 1 GPU" if alone and job.rank else case)
    mesh = parallel.Mesh().arrange(c, {c.batch_size}) if alone else job.connect(c, case)
    ranks.check(c, mesh)
    device, steps = job.device, 1 if job.small else 3
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    training = train.Training(c, device, mesh)
    tokens = torch.randint(c.vocab_size, (c.batch_size // mesh.dp, c.seq_len + 1 + c.n_mtp), device=device)
    for _ in range(2):                         # kernels are compiled, memory is taken, then graphs are recorded
        step(job, training, tokens)
    spans = timed_steps(training.pipe, device) if training.pipe else []
    times = [step(job, training, tokens) for _ in range(steps)]
    seconds, computed = (statistics.median(column) for column in zip(*times))
    out = {"seconds": seconds, "computed": computed, "tokens": c.batch_size * c.seq_len,
           "peak_bytes": backend.peak_memory(device) - before}
    for hook in training.hooks:                      # or parameters and shares, which hold each other, outlive the case
        hook.remove()
    if training.pipe:
        mean = {kind: statistics.mean(ms() for k, ms in spans if k == kind) / 1e3 for kind in {k for k, _ in spans}}
        out["durations"] = mesh.gather(mean)[::mesh.dp]                        # of each rank of the first pipeline
        F, B, W, FB = ([mean.get(kind) for mean in out["durations"]] for kind in ("F", "B", "W", "FB"))
        lists = [dualpipe.schedule(c.pipeline, c.pp, r, len(tokens) // c.micro_batch_size) for r in range(c.pp)]
        out["simulated"] = dualpipe.simulate(c.pipeline, lists, F, B, [w or 0.0 for w in W], FB)["makespan"]
    return out


def measure_scaling(world, device, folder):
    rows, peak = [], backend.peak_flops(torch.device(device), "bf16")
    done = run("scaling", scaling_cases(world), world, device, folder)
    if "1 GPU" in done:
        done["4x, 1 GPU"] = done["1 GPU"][1:2]
    for case, results in done.items():
        if results[0]:
            c, gpus = scaling_config(device == "cpu", world, case), 1 if case.endswith("1 GPU") else world
            r = {**results[0], "model": "4x" if "4x" in case else "bench_1b", "layout": case.removeprefix("4x, "),
                 "gpus": gpus, "parameters": (a := arithmetic(c))["total"]}
            if gpus > 1:
                r["peak_bytes"] = max(result["peak_bytes"] for result in results)
            r["tokens_per_s"] = r["tokens"] / r["seconds"]
            r["mfu"] = peak and r["tokens_per_s"] * a["flops"] / peak / gpus
            r["planned_bytes"] = cluster.fullest(c, parallel.Mesh(world=gpus).arrange(c, {c.batch_size}), a)["most"]
            alone = next((row for row in rows if (row["gpus"], row["model"]) == (1, r["model"])), None)
            r["efficiency"] = alone and r["tokens_per_s"] / gpus / alone["tokens_per_s"]
            rows.append(r)
            print(f"  {r['model']:8} {r['layout']:32} {r['tokens_per_s']:9,.0f} tokens/s"
                  + (f"  MFU {r['mfu']:.1%}" if r["mfu"] else "")
                  + (f"  {r['efficiency']:.1%} of one GPU's" if r["efficiency"] else "")
                  + f"  {r['peak_bytes'] / 1e9:.1f} GB, planned {r['planned_bytes'] / 1e9:.1f}"
                  + (f"  makespan {r['computed'] / r['simulated'] - 1:+.1%} of simulated" if "simulated" in r else ""),
                  flush=True)
    return {"rows": rows}


# --- restart ----------------------------------------------------------------------------------------------------------

DIES_ONCE = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import parallel, train
batch = train.Data.batch
def once(self, step, *more):
    if step == 12 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, step, *more)
train.Data.batch, train.finish = once, lambda *_: None
parallel.cli(train.main)
"""


def measure_restart(world, device, folder, limit=150):
    """torchrun's job whose second rank is killed in step 13, against the run of one rank that `parity` made."""
    if not (folder / "parity.py").exists():
        prepare_parity(folder, world, device == "cpu")
    (folder / "dies_once.py").write_text(DIES_ONCE)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "--max-restarts=1",
               folder / "dies_once.py", folder / "parity.py", f"--out_dir={folder / 'restart'}", f"--device={device}",
               "--precision=fp32", "--save_interval=5", "--timeout=15"]
    began = time.time()
    # What doesn't answer SIGTERM, because it waits for the dead rank on its GPU, is killed after these seconds.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NANOV3_CACHE": str(folder / "cache"),
           "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    with open(folder / "restart.log", "w") as log, \
            subprocess.Popen([sys.executable, *map(str, command)], env=env, stdout=log, stderr=log, cwd=HERE,
                             start_new_session=True) as torchrun:
        try:
            code = torchrun.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(torchrun.pid, 9)
            code = "took too long"
    said = (folder / "restart.log").read_text(errors="replace")
    out = {"seconds": time.time() - began, "code": code,
           "resumed": next((line for line in said.splitlines() if "resumed from" in line), "").rpartition(" at ")[2]}
    if code == 0 and (folder / "fp32 alone 0").exists():
        rows, theirs = (lines(f)[0] for f in (folder / "restart", folder / "fp32 alone 0"))
        out["loss"] = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows, theirs, strict=True))
    if code:
        print(*said.splitlines()[-25:], sep="\n    ")
    print(f"  exit code {code} after {out['seconds']:.0f} s, resumed at {out['resumed'] or 'nothing'}"
          + (f"; losses of all steps equal one rank's to {out['loss']:.1e}" if "loss" in out else ""), flush=True)
    return out


# --- all of it --------------------------------------------------------------------------------------------------------

def warm(job, case):
    """Compile into Triton's cache on disk what the later parts run; the results are nobody's."""
    if case == "bench_1b":
        training = train.Training(c := shipped("bench_1b.py", n_layers=2, moments="bf16"), job.device, parallel.Mesh())
        step(job, training, torch.randint(c.vocab_size, (c.micro_batch_size, c.seq_len + 1), device=job.device))
    else:
        dist.init_process_group("gloo", store=dist.PrefixStore(case, job.store), rank=0, world_size=1)
        c = v3_layers(False, case, 8).replace(n_layers=2)
        Pairs(c, moe.ExpertRanks(1, 1, 0, device=job.device), job.device, microbatches=3).milliseconds(True)


PARTS = {"parity": parity, "exchange": exchange, "overlap": overlap, "scaling": scaling, "warm": warm}
SECTIONS = {"parity": measure_parity, "exchange": measure_exchange, "overlap": measure_overlap,
            "scaling": measure_scaling, "restart": measure_restart}


def cluster_of_gpus(options):
    device = options.get("device", "cuda")
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device={device}: there are cuda and cpu")
    parts, name = chosen(options, "parts", SECTIONS), "cluster" if device == "cuda" else "cluster_cpu"
    have = torch.cuda.device_count() if device == "cuda" else 2
    world = max((n for n in (2, 4, 8) if n <= have), default=0)
    if not world:
        raise UserError(f"bench.py cluster: at least 2 GPUs are needed, and here is {have}; --device=cpu shows it on "
                        f"two processes")
    numbers = kept(name, *(part for part in SECTIONS if part not in parts))
    with tempfile.TemporaryDirectory() as folder:
        folder, began, failed = Path(folder), time.time(), []
        warming = [Ranks("warm", {i: case}, 1, device, folder, i % world) for i, case in
                   enumerate(("bench_1b", *overlap_cases(device)[::2]))] if device == "cuda" else []
        for part in parts:
            started = time.time()
            print(f"{part}, from second {started - began:.0f}:", flush=True)
            if part in ("exchange", "overlap", "scaling"):                     # which are timed
                while warming:
                    warming.pop().results(60)
            try:
                numbers[part] = SECTIONS[part](world, device, folder)
            except Exception:
                traceback.print_exc()
                failed.append(part)
                continue
            numbers[part]["took"] = time.time() - started
            record(name, "python bench.py cluster", gpus=world, **numbers)
        while warming:
            warming.pop().results(1)
        print(f"{time.time() - began:.0f} s in all")
    if failed:
        raise UserError(f"bench.py cluster: {', '.join(failed)} failed, as told above; try again with "
                        f"--parts={','.join(failed)}")
