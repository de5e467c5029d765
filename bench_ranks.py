"""bench.py memory and scaling: what each rank of a run holds, against what --plan says; what many ranks, and one, cost.
"""
import contextlib
import gc
import io
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import cluster
import configs
import parallel
import ranks
import train
from configs import Config, UserError
from data import Data
from dualpipe import DualPipe
from fp8 import AtOnce
from measure import HERE, Allocated, lines, record
from model import V3

# --- memory -----------------------------------------------------------------------------------------------------------

SMALL = Config(                               # configs/bench_1b.py, each dim an eighth or a quarter, with MTP
    vocab_size=2048, dim=128, n_layers=4, n_dense_layers=1, inter_dim=352, moe_inter_dim=64, n_heads=4, q_lora_rank=64,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16,
    n_activated_experts=4, n_mtp=1, seq_len=128, batch_size=16, micro_batch_size=2, device="cpu", timeout=60)

# {name: (ranks, changes)}
LAYOUTS = {
    "one process": (1, {}),
    "BF16 moments": (1, dict(moments="bf16")),
    "recompute_mla": (1, dict(recompute_mla=True)),
    "recompute": (1, dict(recompute=True)),
    "the average on the CPU": (1, dict(ema_decay=0.9)),
    "BF16": (1, dict(precision="bf16")),
    "FP8 (the reference)": (1, dict(precision="fp8_reference", moments="bf16")),
    "dp2": (2, dict(zero1=False)),
    "dp2, ZeRO-1": (2, {}),
    "ep2, ZeRO-1": (2, dict(ep=2)),
    "pp2, 1F1B": (2, dict(pp=2, pipeline="1f1b")),
    "pp2, ZB1P": (2, dict(pp=2, pipeline="zb1p")),
    "pp2, DualPipe, ZeRO-1": (2, dict(pp=2)),
    "pp2 (DualPipeV) x ep2, FP8, all of it": (4, dict(pp=2, ep=2, pipeline="dualpipev", precision="fp8_reference",
                                                      moments="bf16", recompute_mla=True, ema_decay=0.9))}


def held_by(c, mesh, device):
    """{what: bytes} of this rank, by the names of cluster.memory, measured in one step of training on random tokens; on
    a GPU "most" too, its allocator's peak in such a step."""
    mesh.connect(device)
    training = train.Training(c, device, mesh)
    modules, pipe = training.modules, training.pipe
    parameters = list({p: None for module in modules for p in module.parameters()})
    tokens = torch.randint(c.vocab_size, (c.batch_size // mesh.dp, c.seq_len + 1 + c.n_mtp), device=device)
    most = [0]

    def gradients():
        return sum(p.grad.nbytes for p in parameters if p.grad is not None)

    def step(look):
        """Forward and backward of this rank's part of a batch; look() wherever a forward pass has ended."""
        if pipe:
            def forward(*what):
                yield from DualPipe.forward(pipe, *what)
                look()
            pipe.forward = forward
            return ranks.pipelined(c, pipe, tokens, training.totals(tokens), c.mtp_weight)

        def loss(*what, **more):
            out = V3.loss(modules[0], *what, **more)
            look()
            return out
        modules[0].loss = loss
        for micro in tokens.split(c.micro_batch_size):         # not forward_backward, from which gradients set off
            training.micro_batch(micro, training.totals(tokens), c.mtp_weight)

    step(lambda: None)                                         # which makes the copies of the weights
    training.zero_grad()
    peak = {}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(lambda: most.append(torch.cuda.memory_allocated() - before - gradients()))
        peak["most"] = torch.cuda.max_memory_allocated()
    else:
        with Allocated() as memory:
            step(lambda: most.append(memory.alive() - gradients()))
    copies = [t for p in parameters for t in ([p.fp8[1].values, p.fp8[1].scale] if hasattr(p, "fp8") else
                                              [p.low[1]] if hasattr(p, "low") else [])]
    return {"weights": sum(p.nbytes for p in parameters), "gradients": gradients(),
            "copies": sum(t.untyped_storage().nbytes() for t in copies), "activations": max(most),
            "moments": sum(s[m].nbytes for s in training.optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")),
            "average": sum(t.nbytes for t in training.ema.values()), **peak}


def one_rank(rank, world, port, c, folder):
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    mesh = parallel.Mesh(rank, world, rank, 1, dist.TCPStore("127.0.0.1", port, world, rank == 0))
    mesh.arrange(c, [c.batch_size])
    found = held_by(c, mesh, torch.device("cpu"))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    mesh.most(0)                                               # rank 0 keeps the store: it leaves last


def on_ranks(c, world, seconds=120):
    """[held_by of each of so many ranks, each a process on this machine], in their order."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        processes = [context.Process(target=one_rank, args=(rank, world, port, c, folder)) for rank in range(world)]
        [p.start() for p in processes]
        [p.join(seconds) for p in processes]
        [p.kill() or p.join() for p in processes if p.is_alive()]
        if any(p.exitcode for p in processes):
            raise UserError(f"bench.py memory: a rank of {world} failed")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def against_plan(name, world, changes):
    """{layout, ranks, and for each place in the pipeline and each thing the bytes, measured and planned: of the fullest
    of its ranks, and of activations, which are planned for balanced experts, the mean of its ranks}."""
    c = SMALL.replace(**changes)
    mesh = parallel.Mesh(world=world).arrange(c, [c.batch_size])
    found, rows = on_ranks(c, world), []
    for place in cluster.places(mesh):
        here, plan = found[place.rank:place.rank + mesh.dp], cluster.memory(c, place, False)
        of = {what: statistics.mean if what == "activations" else max for what in here[0]}
        rows.append({what: [of[what](f[what] for f in here), plan[what]] for what in of})
    return {"layout": name, "processes": world, "changes": changes, "rows": rows}


def off(row):
    """How far the plan is off, at most, of all that is there."""
    return max(abs(plan / real - 1) for stage in row["rows"] for real, plan in stage.values() if real)


GPU = {"one process": {}, "BF16 moments": dict(moments="bf16"), "recompute_mla": dict(recompute_mla=True),
       "recompute": dict(recompute=True), "four micro-batches": dict(micro_batch_size=4),
       "FP8, BF16 moments, recompute_mla": dict(precision="fp8", moments="bf16", recompute_mla=True)}


def memory_on_a_gpu():
    """configs/bench_1b.py on one GPU, whose allocator says what is there."""
    device, layouts = torch.device("cuda"), []
    for name, changes in GPU.items():
        c = configs.load(["configs/bench_1b.py", "--graph=False"]).replace(**changes)
        plan = cluster.memory(c, mesh := parallel.Mesh().arrange(c, [c.batch_size]), kernels=True)
        found = held_by(c, mesh, device)
        layouts.append({"layout": name, "changes": changes, "rows": [{w: [n, plan[w]] for w, n in found.items()}]})
        print(f"{name}: the plan is off by at most {off(layouts[-1]):.1%}: {layouts[-1]['rows'][0]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    record("memory_gpu", "python bench.py memory", layouts=layouts)


def memory(options):
    if torch.cuda.is_available():
        return memory_on_a_gpu()
    layouts = []
    for name, (world, changes) in LAYOUTS.items():
        layouts.append(against_plan(name, world, changes))
        print(f"{name}: the plan is off by at most {off(layouts[-1]):.1%}", flush=True)
    record("memory", "python bench.py memory", layouts=layouts)


# --- scaling ----------------------------------------------------------------------------------------------------------

SHORT = ["configs/tiny.py", "--save_interval=0", "--eval_stride=0"]


class Plain:
    """The loop that one writes for a single process, with the model, data and optimizer of train.py and nothing of
    ranks, schedules, checkpoints and logs."""

    def __init__(self, c):
        self.c, self.data, self.v3 = c, Data(c), V3(c)
        self.optimizer, self.batch = train.make_optimizer(c, self.v3.parameters()), Data.batch
        for p in self.v3.parameters():
            p.queue = AtOnce()

    def step(self, step):
        c, v3 = self.c, self.v3
        for micro in self.batch(self.data, step, 0, 1).split(c.micro_batch_size):
            loss, _ = v3.loss(micro, totals=([c.batch_size * c.seq_len] * (1 + c.n_mtp), c.batch_size))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(v3.parameters(), c.grad_clip)
        self.optimizer.step()
        for gate in v3.gates():
            gate.update_bias(c.bias_update_speed)
        self.optimizer.zero_grad()


def in_turns(steps):
    """(seconds of each step of a plain loop, of each step of train.py) in one process, a step of one and then of the
    other, so that whatever slows the machine slows both: train.py's asks for its batch, and gets it after the other's.
    """
    with tempfile.TemporaryDirectory() as folder:
        argv = [*SHORT, f"--max_steps={steps}", f"--out_dir={folder}/run"]
        with contextlib.redirect_stdout(io.StringIO()):
            plain, marks = Plain(configs.load(argv)), []

            def batch(data, step, *more):
                marks.append(time.perf_counter())
                plain.step(step)
                marks.append(time.perf_counter())
                return plain.batch(data, step, *more)
            with mock.patch.object(Data, "batch", batch):
                train.main(argv)
    return [end - start for start, end in zip(marks[:-2:2], marks[1::2])], \
        [end - start for start, end in zip(marks[1::2], marks[2::2])]


WEAK = {"one process": (1, []), "dp2": (2, ["--batch_size=64"]), "ep2": (2, ["--batch_size=64", "--ep=2"]),
        "pp2": (2, ["--batch_size=64", "--pp=2", "--micro_batch_size=8"])}


def trained(processes, steps, flags):
    """Seconds of each step of train.py on so many processes, of a thread each."""
    with tempfile.TemporaryDirectory() as folder:
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
        run = subprocess.run([sys.executable, *many, "train.py", *SHORT, f"--max_steps={steps}", *flags,
                              f"--out_dir={folder}/run"], cwd=HERE, capture_output=True, text=True, timeout=600,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        if run.returncode:
            raise UserError(f"train.py on {processes} processes failed: {run.stdout[-300:]} {run.stderr[-300:]}")
        rows, _ = lines(f"{folder}/run")
    return [processes * 32 * 128 / row["tokens_per_s"] for row in rows]


def scaling(options):
    """The default job, a thread a process: train.py against a plain loop, and with as much work for each of two."""
    steps, load = 40, os.getloadavg()[0]
    torch.set_num_threads(1)
    plain, composed = in_turns(steps)
    overhead = statistics.median(b / a for a, b in zip(plain, composed)) - 1
    print(f"train.py against a plain loop: {overhead:+.1%}", flush=True)
    runs = {name: [] for name in WEAK}
    for _ in range(int(options.get("repeats", 3))):
        for name, (processes, flags) in WEAK.items():
            times = trained(processes, steps, flags)
            runs[name].append(sorted(times)[len(times) // 10])                 # what others on the machine let through
        print({name: f"{times[-1] * 1e3:.1f} ms" for name, times in runs.items()}, flush=True)
    share = lambda name: statistics.median(one / many for one, many in zip(runs["one process"], runs[name]))
    record("scaling", "python bench.py scaling", steps=steps, load_before=load, overhead=overhead,
           plain_seconds=statistics.median(plain), composed_seconds=statistics.median(composed), seconds=runs,
           efficiency={name: share(name) for name in WEAK if name != "one process"})
