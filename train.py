"""The story of a run: python train.py config/tiny.py

From text to a trained DeepSeek-V3, top to bottom: the schedules of section 4.2, the plan printed before any work, then
the loop: batch, forward, backward, clip, AdamW, and the gate biases from the load of the whole step.

One optimizer step sees batch_size sequences, in micro-batches of micro_batch_size. Every loss is a sum divided by the
step's global counts, so any cut into micro-batches gives the same gradient. The data of a step are a pure function of
(config, step) and the initial weights of (seed, name), so a run that was killed and resumed passes through the same
bits as one that was not (on a CPU; a GPU's atomics may reorder sums).

    torchrun --nproc-per-node=4 train.py config/tiny.py --ep=2

runs the same story on many ranks: each takes its part of every batch, and parallel.py says who sums what with whom. A
process on its own is a rank whose sums have one term.
"""
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

import backend
import cluster
import configs
import parallel
import ranks
from configs import MACHINE_FIELDS, UserError
from data import Data, batch_size_at
from fp8 import AdamW, AtOnce
from model import CrossEntropy, arithmetic, config_from_hf, official_tensors
from moe import max_vio
from tokenizer import special, tokenizer_json

MAX_SKIPS = 5                                      # non-finite steps in a row before the run gives up


# --- the schedules (section 4.2) --------------------------------------------------------------------------------------

def learning_rate(c, step):
    """Linear warmup to lr, constant until decay_start, cosine to min_lr at decay_end, constant, final_lr for the last
    third of what is left. V3: 2K steps; 10T tokens; 4.3T; 333B at min_lr; 167B at final_lr."""
    start, end = max(c.decay_start, c.warmup_steps), c.decay_end or c.max_steps
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    if step < start:
        return c.lr
    if step < end:
        return c.min_lr + (c.lr - c.min_lr) * 0.5 * (1 + math.cos(math.pi * (step - start) / (end - start)))
    return c.min_lr if step < end + (c.max_steps - end) * 2 / 3 else c.final_lr


def mtp_weight(c, step):
    """lambda: mtp_weight before decay_start, a third of it after (V3: 0.3 for 10T tokens, then 0.1); 0 keeps it."""
    return c.mtp_weight if step < c.decay_start or not c.decay_start else c.mtp_weight / 3


def bias_update_speed(c, step):
    """gamma: bias_update_speed until the cosine has ended, then 0 (V3: 0.001, and 0 for the last 500B tokens)."""
    return c.bias_update_speed if step < (c.decay_end or c.max_steps) else 0.0


# --- before the run ---------------------------------------------------------------------------------------------------

def human(n, unit=""):
    for size, letter in ((1e12, "T"), (1e9, "G" if unit == "B" else "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.2f} {letter}{unit}" if unit else f"{n / size:.3f}{letter}"
    return f"{n:.0f} {unit}".strip()


def plan(c, device, mesh, data=None):
    """Print what the run will cost and which path each mechanism takes. Returns arithmetic(c), with the run's "tokens"
    and the "memory" of a rank where `mesh` says."""
    a = arithmetic(c)
    everything = a["total"] + a["mtp"]
    dims = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    kernels = c.precision != "fp32" and backend.attention(device, torch.bfloat16, dims)[0] == "Triton"
    a["memory"] = m = cluster.memory(c, mesh, kernels, a)
    states = m["weights"] + m["copies"] + m["gradients"] + m["moments"]
    ramp = min(c.batch_ramp, c.max_steps)
    train_tokens = (sum(batch_size_at(c, s) for s in range(ramp)) + c.batch_size * (c.max_steps - ramp)) * c.seq_len
    a["tokens"] = train_tokens
    rows = [
        ("parameters", f"{human(a['total'])} total, {human(a['active'])} active per token, MTP {human(a['mtp'])} more"),
        ("work", f"{a['flops'] / 1e9:.3g} GFLOPs per training token; {c.max_steps} steps, "
                 f"{human(train_tokens)} tokens"),
        ("memory", f"{human(states, 'B')} weights, gradients, moments ({states / m['parameters']:.1f} bytes per "
                   f"parameter) + {human(m['activations'], 'B')} activations; in all about {human(m['most'], 'B')}"
                   + (" on the ranks like rank 0" if mesh.world > 1 else "")),
        ("latent cache", f"{a['cache_bytes']:,} bytes per token in BF16"),
        ("device", f"{backend.name(device)}, {c.precision}, torch {torch.__version__}"),
        *((what, f"{path} ({why})") for what, path, why in backend.table(device, c, mesh.world)),
    ]
    if a["converted"]:
        converted, left = a["converted"]
        kinds = {why: [name for name in left if left[name] == why] for why in left.values()}
        rows.append(("to FP8", f"{len(converted)} Linears and stacks of experts, {a['fp8'] / everything:.1%} of the "
                               f"parameters"))
        rows.append(("not to FP8", "; ".join(f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}"
                                             for why, names in kinds.items())))
    if data:
        i = data.identity
        rows.insert(2, ("data", f"{i['source']}: {i['documents']} documents, {human(i['train_tokens'])} tokens "
                                f"({train_tokens / i['train_tokens']:.1f} epochs)"))
    if c.plan and mesh.world > 1:                      # of Hopper GPUs, whose memory cluster.report tells rank by rank
        rows = [row for row in rows if row[0] != "memory"]
    print("\n".join(f"  {what:13} {text}" for what, text in rows), flush=True)
    return a


def model_config(c, argv):
    """With --init_from the model is the folder's: its config.json replaces the model fields, its tokenizer ours. Only
    the number of MTP depths may be given beside it: --n_mtp=0 leaves the module out."""
    if not c.init_from:
        return c
    config_from_hf(c.init_from)                                              # that it is one comes before all the rest
    fields = list(configs.FIELDS)
    first = fields.index("data")                                                   # the model's fields stand before it
    given = [arg[2:].partition("=")[0] for arg in argv[1:]]
    for key in given:
        if key in fields[:first] and key != "n_mtp" or key == "tokenizer":
            raise UserError(f"--{key}: model and tokenizer are those of --init_from={c.init_from}; leave it out")
    run = {f: getattr(c, f) for f in fields[first:]}
    run["tokenizer"] = str(Path(c.init_from) / "tokenizer.json")
    if Path(c.init_from, "config.json").is_file() and not Path(run["tokenizer"]).is_file():
        raise UserError(f"--init_from={c.init_from}: no tokenizer.json there; put the model's own beside config.json")
    if "n_mtp" in given:
        run["n_mtp"] = c.n_mtp
    print(f"init_from: the model and its tokenizer are those of {c.init_from}")
    return config_from_hf(c.init_from, **run)


def make_optimizer(c, params):
    """AdamW; weight decay on matrices only, embedding and head included, norms not."""
    moments, params = torch.bfloat16 if c.moments == "bf16" else None, list(params)     # None: as the weight
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": c.weight_decay},
              {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}]
    options = dict(lr=c.lr, betas=(c.beta1, c.beta2), eps=1e-8)
    optimizer = AdamW(groups, **options) if c.moments == "bf16" else \
        torch.optim.AdamW(groups, **options, fused=all(p.device.type in ("cpu", "cuda") for p in params))
    # The fused kernels write to the weights without saying so, and FP8 quantizes a weight anew when it has changed.
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(params))
    for p in params:                               # from the start, so that a checkpoint has somewhere to load them
        on_gpu = p.is_cuda and c.moments == "fp32"                             # where the fused kernel reads the step
        optimizer.state[p] = {"step": torch.zeros((), device=p.device if on_gpu else None),
                              "exp_avg": torch.zeros_like(p, dtype=moments),
                              "exp_avg_sq": torch.zeros_like(p, dtype=moments)}
    return optimizer


# --- forward and backward ---------------------------------------------------------------------------------------------

def forward_backward(v3, tokens, totals, mtp_weight):
    """One micro-batch: its gradients are added to .grad; returns its share of the step's losses (V3.loss)."""
    loss, parts = v3.loss(tokens, totals=totals, mtp_weight=mtp_weight)
    loss.backward()
    return parts


class Recorded:
    """forward_backward from CUDA graphs. A micro-batch is a thousand kernels, many of some microseconds, and the host
    starts them more slowly than the GPU ends them; recorded once, they are started as one.

    There are two graphs. The first micro-batch of a step casts and quantizes the weights, which have changed, and
    writes their gradients; the others add to these. A graph finds and leaves everything in the same memory: tokens are
    copied to where it reads them, and its gradients are put in .grad again when a step has cleared that. The numbers
    that it was given are part of it, so with others it is recorded anew.
    """

    def __init__(self, v3):
        self.v3, self.params, self.key, self.graphs = v3, list(v3.parameters()), None, {}

    def __call__(self, tokens, totals, mtp_weight):
        key, first = (tokens.shape, totals, mtp_weight), self.params[0].grad is None        # as a step has left it
        if key != self.key or not (first or self.graphs):
            # A whole step without: kernels that are compiled, or choose their tiles, can't be recorded meanwhile.
            self.key, self.graphs = key, {}
            return forward_backward(self.v3, tokens, totals, mtp_weight)
        if first not in self.graphs:
            self.record(first, tokens, totals, mtp_weight)
        graph, parts, grads = self.graphs[first]
        self.tokens.copy_(tokens)
        graph.replay()
        for p, grad in zip(self.params, grads):
            p.grad = grad
        return parts

    def record(self, first, *arguments):
        graph, pool = torch.cuda.CUDAGraph(), None
        if first:
            self.tokens = arguments[0].clone()
            torch.autograd.graph.increment_version(self.params)     # their copies in BF16 or FP8 are old, it says
        else:
            pool = self.graphs[True][0].pool()                      # never under way at the same time: the same memory
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):          # NCCL has a thread too
            parts = forward_backward(self.v3, self.tokens, *arguments[1:])
        self.graphs[first] = graph, parts, [p.grad for p in self.params]


# --- a step -----------------------------------------------------------------------------------------------------------

class Training:
    """A Config's model on this rank, and all that changes it. One step, of a run and of what bench.py measures, is

        parts = training.forward_backward(batch, step)         gradients, and the losses, of this rank's sequences
        norm = training.sum_gradients()                        over the ranks; clipped
        training.update(step)                                  or, where these are not finite, training.skip()

    from_folder: the weights are those of --init_from.
    """

    def __init__(self, c, device, mesh, from_folder=False):
        self.c, self.mesh, self.updates, self.hooks = c, mesh, 0, []
        self.modules, self.pipe = ranks.build(c, device, mesh, from_folder)                   # one process: [V3], None
        self.shares, self.counters = ranks.replicas(c, mesh, self.modules, self.pipe)
        self.gates = [gate for module in self.modules for gate in module.gates()]
        self.optimizer = make_optimizer(c, self.shares.updated.values())
        averaged = self.shares.owned if c.ema_decay else {}
        self.ema = {name: p.detach().to("cpu", copy=True) for name, p in averaged.items()}
        if self.pipe:                              # which has queues of its own, and sends no gradient early
            return
        v3 = self.modules[0]
        if c.compile:
            for block in [*v3.layers, *(m.block for m in v3.mtp)]:
                block.compile()
        else:
            for p in v3.parameters():
                p.queue = AtOnce()                 # later micro-batches add to .grad inside the product
        if mesh.world > 1:                         # called too where a queue has added the gradient
            self.hooks = [p.register_post_accumulate_grad_hook(self.shares.arrived) for p in v3.parameters()]
        recorded = backend.training_graph(device, c, mesh.world)[0] == "CUDA graph"
        self.micro_batch = Recorded(v3) if recorded else partial(forward_backward, v3)

    def totals(self, batch):
        """What a step divides its losses by (V3.loss), where this rank's part of its sequences is `batch`."""
        size = len(batch) * self.mesh.dp
        return [size * self.c.seq_len] * (self.c.n_mtp + 1), size

    def forward_backward(self, batch, step):
        """Of this rank's sequences of a step, int64 [n, T+1+n_mtp], micro-batch by micro-batch: their gradients are in
        .grad, or on their way to be summed; returns their share of the step's losses."""
        c, totals, weight = self.c, self.totals(batch), mtp_weight(self.c, step) if self.c.n_mtp else 0.0
        if self.pipe:
            return ranks.pipelined(c, self.pipe, batch, totals, weight)
        micros, parts = batch.split(c.micro_batch_size), {"loss": 0.0, "mtp_loss": 0.0, "balance_loss": 0.0}
        self.shares.expect(len(micros))
        for micro in micros:
            share = self.micro_batch(micro, totals, weight)
            parts = {name: parts[name] + share[name] for name in parts}
        return parts

    def sum_gradients(self):
        """Sum a step's gradients over the ranks and clip them, and sum the gates' loads; returns the gradients' norm
        before clipping, the same on every rank."""
        self.shares.sum_gradients()
        norm = self.shares.clip(self.c.grad_clip or math.inf, self.mesh)
        parallel.add([gate.load for gate in self.gates], self.counters)
        return norm

    def update(self, step):
        """AdamW, and what follows the weights: their copies on other ranks, the gates' biases, the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.c, step)
        self.optimizer.step()
        self.updates += 1
        self.shares.send_updated()
        for gate in self.gates:
            gate.update_bias(bias_update_speed(self.c, step))
        for name, average in self.ema.items():
            average.lerp_(self.shares.owned[name].detach().cpu(), 1 - self.c.ema_decay)
        self.shares.receive_updated()
        self.zero_grad()

    def skip(self):
        """Forget a step."""
        for gate in self.gates:
            gate.load.zero_()
        self.zero_grad()

    def zero_grad(self):
        for module in self.modules:
            module.zero_grad(set_to_none=True)

    def tensors(self, owned=False):
        """Everything of this rank that a checkpoint holds: {name: tensor}, under official names. owned: what it saves,
        which is the parameters that it owns, and a gate's bias with the gate's weight."""
        out = {}
        for module in self.modules:
            named, state = dict(module.named_parameters()), self.optimizer.state
            kinds = {"": dict(module.state_dict()), "ema/": {n: self.ema[n] for n in named if n in self.ema}}
            for kind in ("exp_avg", "exp_avg_sq"):
                kinds[kind + "/"] = {n: state[p][kind] for n, p in named.items() if p in state}
            for prefix, tensors in kinds.items():
                if owned:
                    tensors = {n: t for n, t in tensors.items()
                               if n.replace("gate.bias", "gate.weight") in self.shares.owned}
                out |= {prefix + n: t for n, t in official_tensors(module, tensors).items()}
        return out

    def resume(self, folder, state):
        """Go on from a checkpoint: every tensor of this rank, and how often AdamW has worked on it."""
        parallel.load_tensors(folder, state, self.tensors())
        self.updates = state["updates"]
        for p in self.shares.updated.values():
            self.optimizer.state[p]["step"].fill_(self.updates)


# --- during the run ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(v3, data, mesh):
    """(nats per token, bits per byte) over the whole validation text, in windows of seq_len (eval_stride)."""
    v3.eval()
    T, device, total, count = v3.config.seq_len, v3.embed.weight.device, 0.0, 0
    for tokens, valid in data.eval_windows(max(1, 16384 // T), mesh.rank, mesh.world):
        targets = tokens.masked_fill(~valid, -1)[:, 1:T + 1].flatten().to(device)
        h, _ = v3.hidden(tokens[:, :T].to(device))
        total += CrossEntropy.apply(h.flatten(0, 1), v3.head.weight.detach(), targets).item()
        count += int((targets >= 0).sum())
    v3.train()
    total, count = mesh.total({"nats": total, "tokens": count}).values()
    return total / count, data.bits_per_byte(total)


def report(step, training, data, log):
    """Evaluate, into the log and onto the terminal."""
    pipe, mesh = training.pipe, training.mesh
    loss, bpb = ranks.evaluate(training.c, pipe, data, mesh) if pipe else evaluate(training.modules[0], data, mesh)
    log.write(step=step, time=time.time() - log.began, val_loss=loss, val_bpb=bpb)
    xz = data.identity["val_xz_bytes"]
    against = f", {bpb / (8 * xz / data.val_bytes):.3f}x of xz -9e" if xz else ""
    print(f"step {step}: val loss {loss:.4f} nats per token, {bpb:.4f} bits per byte{against}", flush=True)


class Interrupt:
    """Ctrl-C and SIGTERM set a flag that the loop looks at between steps; a second Ctrl-C is not waited for."""

    def __enter__(self):
        self.code = 0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = 128 + number                   # 130 and 143
        print(f"\n{signal.Signals(number).name}: saving after this step", flush=True)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def number(x):
    """Seven significant digits, so that a learning rate of 7.3e-6 keeps its own; null for nan, which JSON lacks."""
    return float(f"{x:.7g}") if math.isfinite(x) else None


class Log:
    """metrics.jsonl, one object a line, and the progress line on the terminal. peak: the tokens/s of devices that do
    nothing but multiply, or None."""

    def __init__(self, c, start_step, peak, rank=0):
        self.path, self.peak = Path(c.out_dir) / "metrics.jsonl", peak
        self.first, self.last = start_step + 1, c.max_steps
        self.began, self.shown, self.at, self.busy, self.seen = time.time(), 0.0, start_step, 0.0, 0
        if rank:                                   # rank 0 keeps the book
            self.path = Path(os.devnull)
            return
        old = self.path.read_text(encoding="utf-8", errors="replace") if start_step and self.path.exists() else ""
        # Later steps will be run again, and so will the last evaluation. A crash may have cut the last line.
        kept = []
        for line in old.splitlines():
            try:
                row = json.loads(line)
                again = row["step"] > start_step or "val_loss" in row and row["step"] == c.max_steps
                kept += [] if again or "time" not in row else [line]
            except (ValueError, KeyError, TypeError):                                       # no line of ours, or a part
                continue
        parallel.write_atomic(self.path, "".join(line + "\n" for line in kept))
        self.began -= json.loads(kept[-1])["time"] if kept else 0

    def write(self, **numbers):
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps({k: number(v) if isinstance(v, float) else v for k, v in numbers.items()}) + "\n")
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); free some space and go on with --resume") \
                from None

    def progress(self, step, tokens, seconds, losses):
        """After a step of so many tokens and seconds; the line comes every five seconds."""
        self.busy, self.seen = self.busy + seconds, self.seen + tokens
        if step not in (self.first, self.last) and time.time() - self.shown < 5:
            return
        speed, left = self.seen / self.busy, clock((self.last - step) * self.busy / (step - self.at))
        mfu = f"  MFU {speed / self.peak:.1%}" if self.peak else ""
        print(f"step {step}/{self.last}  {losses}  {speed:,.0f} tokens/s{mfu}  {left} left", flush=True)
        self.shown, self.at, self.busy, self.seen = time.time(), step, 0.0, 0


# --- the run ----------------------------------------------------------------------------------------------------------

def main(argv, mesh=None):
    if "--help" in argv or "-h" in argv:
        print(__doc__.splitlines()[0], configs.usage("train.py"), sep="\n\n")
        return 0
    if not argv or argv[0].startswith("--"):
        raise UserError("give a config first: python train.py config/tiny.py [--key=value ...]; --help lists the keys")
    c = model_config(configs.load(argv), argv)
    if c.world and not c.plan:
        raise UserError(f"--world={c.world}: only --plan takes it; torchrun --nproc-per-node=N starts ranks")
    if c.plan and c.world:
        each = cluster.Cluster.per_node
        mesh = parallel.Mesh(world=c.world, nodes=c.world // each if c.world % each == 0 else 1)
    mesh = (mesh or parallel.Mesh()).arrange(c, {batch_size_at(c, step) for step in range(c.batch_ramp + 1)})
    device = mesh.device(backend.device(c.device))
    backend.keep_freed_memory()
    if c.plan:
        a = plan(c, device, mesh)
        if mesh.world > 1:
            print(cluster.report(c, mesh, a["tokens"], a))
        return 0
    if c.precision == "fp8" and backend.fp8_kernels(device)[0] == "torch":
        raise UserError(f"--precision=fp8: {backend.fp8_kernels(device)[1]}; --precision=fp8_reference computes the "
                        f"same on plain torch, slowly")
    if not c.eval_only:
        ranks.check(c, mesh)
    mesh.connect(device)
    mesh.same("config", dataclasses.asdict(c))
    if c.eval_only:
        return eval_only(c, mesh)
    if c.profile and c.max_steps < 6:
        raise UserError(f"--profile traces steps 4 to 6 of a run, and max_steps = {c.max_steps}; give --max_steps=6")
    have = parallel.checkpoints(c.out_dir)
    if os.path.exists(c.out_dir) and not os.path.isdir(c.out_dir):
        raise UserError(f"{c.out_dir}: a file and not a folder; give another --out_dir")
    if parallel.restarts():
        c.resume = bool(have)
    if have and not c.resume:
        raise UserError(f"{c.out_dir}: holds a run, at {have[-1].name}; go on with --resume, or give another --out_dir")
    if c.resume and not have:
        raise UserError(f"--resume: {c.out_dir} has no checkpoint (one comes every {c.save_interval or c.max_steps} "
                        f"steps); leave out --resume to start")
    newest = newest_whole(c, have, mesh) if c.resume else None
    try:
        again = shlex.join(a for a in argv if a.partition("=")[0] not in ("--resume", "--out_dir"))
        with parallel.claimed(c.out_dir, mesh):
            return run(c, device, mesh, newest, again)
    except (MemoryError, RuntimeError) as e:
        if backend.out_of_memory(e):
            raise UserError(f"out of memory: lower --micro_batch_size (now {c.micro_batch_size}; the result stays the "
                            f"same) or set --recompute=True; if the model alone is too large, --dim or --n_layers") \
                from None
        raise


def newest_whole(c, have, mesh):
    """(folder, state) of the newest of the checkpoints `have` that is not damaged. UserError if there is none, or it is
    of another run."""
    for folder in reversed(have):
        try:
            state = parallel.checked(folder, mesh)
            if not isinstance(state.get("updates"), int) or "source" not in (state.get("data") or {}):
                raise UserError(f"{folder}/state.json: not a run's, or damaged; remove its folder and go on from the "
                                f"one before")
        except UserError as e:
            if folder == have[0]:
                raise
            print(f"refused: {e}", flush=True)
        else:
            check_resume(c, state)
            return folder, state


def check_resume(c, state):
    """What a run computes may not change when it is resumed; where and how it runs may."""
    now = dataclasses.asdict(c)
    free = MACHINE_FIELDS - ({"micro_batch_size"} if c.balance_scope == "batch" else set())     # its batch is the micro
    for key, then in state["config"].items():
        if key in now and key not in free and now[key] != then:
            raise UserError(f"--resume: {key} was {then!r} and is now {now[key]!r}; give the run's own value, or start "
                            f"another with --out_dir")


def check_text(data, folder, state):
    """A run goes on with the text and the tokenizer that it began with."""
    if any(state["data"][key] != data.identity[key] for key in ("corpus_sha256", "tokenizer_sha256")):
        raise UserError(f"--resume: the text or the tokenizer is not that of {folder} (its sha256 differs); give its "
                        f"--data, {state['data']['source']}, or start another run with --out_dir")


def eval_only(c, mesh):
    """On many ranks each holds the whole model, and takes its part of the text."""
    import sample
    v3, _, what = sample.load(c.eval_only, c.device)
    folder = Path(c.eval_only) if (Path(c.eval_only) / "tokenizer.json").is_file() else parallel.latest(c.eval_only)
    T = min(c.seq_len, v3.config.context)
    v3.config = v3.config.replace(seq_len=T, eval_stride=min(c.eval_stride, T), data=c.data,
                                  tokenizer=str(folder / "tokenizer.json"), fim_rate=c.fim_rate)
    loss, bpb = evaluate(v3, mesh.one_first(lambda: Data(v3.config)), mesh)
    print(f"{what}: val loss {loss:.4f} nats per token, {bpb:.4f} bits per byte")
    return 0


def run(c, device, mesh, newest, command):
    # Everything that can be wrong with the input is found here, before the first long work.
    data = mesh.one_first(lambda: Data(c))
    mesh.same("data", data.identity)
    if newest:
        check_text(data, *newest)
    a, peak = plan(c, device, mesh, data), backend.peak_flops(device, c.precision)
    training, start = Training(c, device, mesh, c.init_from and not newest), 0
    if newest:
        folder, state = newest
        training.resume(folder, state)
        start = state["step"]
        print(f"resumed from {folder} at step {start}")
    tokenizer = tokenizer_json(data.tokenizer).decode()
    profiler = profile(c, mesh) if c.profile else None
    skipped, saved = 0, start
    with parallel.Saver(c.out_dir, mesh) as saver, Interrupt() as interrupt:
        log = Log(c, start, peak and peak * mesh.world / a["flops"], mesh.rank)
        for step in range(start, c.max_steps):
            began, size = time.time(), batch_size_at(c, step)
            batch = data.batch(step, mesh.dp_rank, mesh.dp).to(device)                # [size / dp, T+1+n_mtp]
            parts = training.forward_backward(batch, step)
            norm = training.sum_gradients()
            loads = [gate.load for gate in training.gates]
            logged = {"load": [load.tolist() for load in loads]} if c.log_load else {}
            sums = {**parts, "max_vio": sum(map(max_vio, loads)), "gates": len(loads)}
            sums = mesh.total({name: float(value) for name, value in sums.items()})
            parts, vio = {name: sums[name] for name in parts}, sums["max_vio"] / max(sums["gates"], 1)
            if math.isfinite(norm) and all(map(math.isfinite, parts.values())):         # the same answer on every rank
                training.update(step)
                skipped = 0
            else:
                training.skip()
                skipped += 1
                print(f"step {step + 1}: loss {parts['loss']} or gradient norm {norm} is not finite; step skipped "
                      f"({skipped} in a row)", flush=True)
                if skipped == MAX_SKIPS:
                    raise UserError(f"{MAX_SKIPS} steps in a row were not finite: start again with a lower --lr "
                                    f"(now {c.lr}) and another --out_dir; the last checkpoint is step {saved}")

            done, tokens, spent = step + 1, size * c.seq_len, time.time() - began
            log.write(step=done, time=time.time() - log.began, **parts, max_vio=vio, lr=learning_rate(c, step),
                      grad_norm=norm, tokens_per_s=tokens / spent, **logged)
            log.progress(done, tokens, spent, f"loss {parts['loss']:.4f}  mtp {parts['mtp_loss']:.4f}  "
                                              f"max_vio {vio:.2f}")
            if profiler and profiler(done):
                return 0
            if c.eval_interval and done % c.eval_interval == 0 and done < c.max_steps:
                report(done, training, data, log)
            code = int(mesh.most(interrupt.code))                                     # a signal may reach one rank only
            if code or c.save_interval and done % c.save_interval == 0 or done == c.max_steps:
                saver.save(done, training.tensors(owned=True),
                           {"config": dataclasses.asdict(c), "data": data.identity, "updates": training.updates,
                            "rng": None, "torch": torch.__version__}, tokenizer)
                saved = done
            if code:
                break
        else:
            code = 0
    if code:
        python = "python" if mesh.world == 1 else \
            f"torchrun --nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', mesh.world)}"
        print(f"saved {parallel.latest(c.out_dir)}; go on with: {python} train.py {command} --resume "
              f"--out_dir={shlex.quote(c.out_dir)}")
        return code
    report(c.max_steps, training, data, log)                   # all is saved: whoever interrupts this loses nothing
    finish(c, training.modules[0], data, log, mesh, device)
    return 0


def profile(c, mesh):
    """Trace steps 4 to 6 of the run; the returned function is told of each finished step, and says when to leave."""
    path = os.path.join(c.out_dir, f"trace_{mesh.rank}.json" if mesh.rank else "trace.json")

    def ready(p):
        p.export_chrome_trace(path)
        print(p.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
        print(f"wrote {path}: open it in chrome://tracing or Perfetto")

    tracer = torch.profiler.profile(schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
                                    on_trace_ready=ready, record_shapes=True)
    tracer.start()
    first = []

    def stepped(step):
        first.append(step)
        tracer.step()
        if len(first) == 6 or step == c.max_steps:
            tracer.stop()
            return True
        return False
    return stepped


# --- after the run ----------------------------------------------------------------------------------------------------

def finish(c, v3, data, log, mesh, device):
    """Measured numbers beside the planned ones, the figure, a sample, and what to try next."""
    import sample
    steps = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    speeds = sorted(s["tokens_per_s"] for s in steps if "tokens_per_s" in s) or [0]
    print(f"measured: {clock(time.time() - log.began)} in all, {speeds[len(speeds) // 2]:,.0f} tokens/s (median step), "
          f"peak memory {human(backend.peak_memory(device), 'B')}")
    figure = draw(log.path) if mesh.rank == 0 else None
    print(f"figure: {figure}" if figure else "no figure: pip install -r requirements-extra.txt brings matplotlib")
    eos = special(data.tokenizer, "eos")
    if mesh.pp > 1 or mesh.ep > 1:                 # no rank has the whole model; sample.py does, from the checkpoint
        print(f"next: python sample.py --out_dir={c.out_dir}")
        return
    v3.eval()
    prompt = "def" if c.data == "stdlib" else ""
    tokens = [eos] + data.tokenizer.encode_ordinary(prompt)
    generator = torch.Generator(device).manual_seed(c.seed)
    if c.context > len(tokens):
        ids = sample.generate(v3, [tokens], min(120, c.context - len(tokens)), generator=generator, eos=eos)[0]
        text = prompt + "".join(map(sample.characters(data.tokenizer), ids))
        encoding = sys.stdout.encoding or "utf-8"         # a terminal that can't show a character gets a question mark
        print("--- sample ---\n" + text.encode(encoding, "replace").decode(encoding) + "\n--------------")
    print(f"next: python sample.py --out_dir={c.out_dir} --prompt=import"
          if c.data == "stdlib" else f"next: python sample.py --out_dir={c.out_dir}")


def draw(path):
    """metrics.png beside metrics.jsonl: loss and expert load over the steps. None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    train, val = [r for r in lines if "loss" in r], [r for r in lines if "val_loss" in r]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for key in ("loss", "mtp_loss"):
        left.plot([r["step"] for r in train], [r[key] for r in train], label=key, linewidth=0.8)
    left.plot([r["step"] for r in val], [r["val_loss"] for r in val], "o-", label="val_loss", color="black")
    left.set(xlabel="step", ylabel="nats per token")
    left.legend()
    right.plot([r["step"] for r in train], [r["max_vio"] for r in train], linewidth=0.8)
    right.set(xlabel="step", ylabel="MaxVio (busiest expert / mean - 1)", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)
    return path.with_suffix(".png")


if __name__ == "__main__":
    parallel.cli(main)
