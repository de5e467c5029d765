"""Measured, not claimed: python bench.py SECTION writes results/SECTION.json, and the README's figures come from there.

    tiny        the default job: python train.py config/tiny.py, as a user runs it
    char        time to nanoGPT's final loss: python bench.py char --data=FILE --nanogpt=CLONE
    ablations   MTP, balancing, dense against a mixture, on char: python bench.py ablations --data=FILE
    speculation drafted against plain generation (sample.py --speculate), on held-out text; --out_dir=RUN takes a run
                that is there, of a context of 256 tokens, in place of training one
    loads       which experts work: over the steps of a training run, and on library code, tests and documentation
    decode      attention over the latent cache against torch.compile; tokens/s of generation (needs a GPU)
    attention   training attention, norm, RoPE and recomputation on a GPU: python bench.py attention
    moe         the routed experts against torch.compile of F.grouped_mm (a Hopper GPU)
    step        a training step of configs/bench_1b.py on random tokens, eager and compiled (a GPU)
    fp8_error   what promotion to FP32 saves in a product of FP8 numbers, against its length K
    fp8_tiny    the default job's first 150 steps in FP32 and FP8 (the reference)
    fp8_loss    char in FP32, BF16 and FP8 (the reference): python bench.py fp8_loss --data=FILE
    pipeline    every schedule executed with stages that sleep, against its simulation and torch.distributed.pipelining
    overlap     what a pair of DualPipe's chunks hides on one GPU: V3's blocks, copies in place of the network
    fp8         FP8's quantization, products, Linears and optimizer against torch's, at V3's shapes (a Hopper GPU)
    layer       one MoE layer of V3 as one GPU of 64 has it: FP8 against BF16 (a Hopper GPU)
    fp8_quality 1000 steps of configs/gpu.py in BF16, BF16 with another seed, and FP8 (a Hopper GPU)
    readme      put the results into the README's marked places, and draw its figures (needs matplotlib)

Every section runs the commands that a user would run, each in a process of its own, and records the device, the
versions, the command and the date beside what came out.
"""
import datetime
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import backend
import cluster
import configs
import dualpipe
import experts
import fp8
import mla
import model
import moe
import sample
from backend import has_triton, use_graph
from configs import UserError
from data import Data, documents, split
from mla import LatentCache, decode_torch, decode_triton, quantize
from model import V3, Block, arithmetic
from moe import MAX_TOKENS
from parallel import latest, read_state, write_atomic
from train import make_optimizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


# --- running and recording --------------------------------------------------------------------------------------------

def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def record(section, command, **numbers):
    """Write results/<section>.json: the numbers and where they come from."""
    where = {"command": command, "date": datetime.date.today().isoformat(), "python": platform.python_version(),
             "torch": torch.__version__, "cpu": f"{processor()}, {os.cpu_count()} cores",
             "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    if "data" in numbers:
        numbers["data"]["source"] = Path(numbers["data"]["source"]).name            # not where it lies on this machine
    RESULTS.mkdir(exist_ok=True)
    write_atomic(RESULTS / f"{section}.json", json.dumps({**where, **numbers}, indent=1) + "\n")
    print(f"wrote results/{section}.json")


def lines(out_dir):
    """metrics.jsonl -> (train lines, eval lines)."""
    rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]


def train(*args, limit=1800, **env):
    """python train.py ARGS in a process of its own, for up to `limit` seconds. UserError if it fails."""
    run = subprocess.run([sys.executable, "train.py", *args], cwd=HERE, timeout=limit, env={**os.environ, **env},
                         stdout=subprocess.DEVNULL if env else None)
    if run.returncode:
        raise UserError(f"train.py {' '.join(args)} ended with exit code {run.returncode}")


def call(arguments, folder):
    """The standard output of python ARGUMENTS, run in `folder`. UserError with its last line if it fails."""
    run = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=1800)
    if run.returncode:
        raise UserError(f"{' '.join(arguments)[:60]} ended with exit code {run.returncode}: "
                        f"{(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return run.stdout


def checkpoints_of(rows, steps=(100, 200, 400, 500, 1000)):
    """Training loss around each of `steps`, the mean of the ten steps up to it."""
    return {step: statistics.mean(r["loss"] for r in rows[step - 10:step]) for step in steps if step <= len(rows)}


# --- tiny: the default job --------------------------------------------------------------------------------------------

def tiny(options):
    import resource  # not on Windows
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        train("configs/tiny.py", f"--out_dir={folder}/tiny")
        seconds, peak = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        rows, evals = lines(f"{folder}/tiny")
        state = json.loads(next(Path(folder, "tiny").glob("step_*/state.json")).read_text())
        sample = call(["sample.py", f"--out_dir={folder}/tiny", "--prompt=def __init__(self", "--seed=1",
                       "--max_tokens=120"], HERE)
    data, final = state["data"], evals[-1]
    record("tiny", "python train.py config/tiny.py", seconds=seconds, val_bpb=final["val_bpb"],
           xz_bpb=8 * data["val_xz_bytes"] / data["val_bytes"],
           ratio=final["val_bpb"] / (8 * data["val_xz_bytes"] / data["val_bytes"]), data=data,
           tokens_per_s=statistics.median(r["tokens_per_s"] for r in rows), steps=len(rows),
           peak_bytes=peak, losses=checkpoints_of(rows), final_loss=rows[-1]["loss"],
           evals=[{k: e[k] for k in ("step", "time", "val_loss", "val_bpb")} for e in evals], sample=sample,
           curve=[[r["step"], r["loss"], r["mtp_loss"], r["max_vio"]] for r in rows[::max(1, len(rows) // 200)]])


# --- char: against nanoGPT's CPU recipe -------------------------------------------------------------------------------

# The command that nanoGPT's README gives for a machine without a GPU.
NANOGPT = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
           "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
           "--lr_decay_iters=2000 --dropout=0.0")

# Its checkpoint on the whole held-out tenth, in non-overlapping windows of its own context: nats per character.
SCORE = """
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"])).eval()
model.load_state_dict(saved["model"])
val = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
T = saved["model_args"]["block_size"]
n = (len(val) - 1) // T
with torch.no_grad():
    losses = [model(val[i * T:i * T + T][None], val[i * T + 1:i * T + T + 1][None])[1].item() for i in range(n)]
print("SCORE", sum(losses) / n)
"""


def nanogpt(clone, data, folder):
    """Train nanoGPT's recipe on `data` in a copy of the clone: (wall seconds, nats per byte)."""
    here = Path(folder) / "nanogpt"
    shutil.copytree(clone, here, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(data, here / "data/shakespeare_char/input.txt")
    call(["prepare.py"], here / "data/shakespeare_char")
    began = time.time()
    call(["train.py", *NANOGPT.split()], here)
    seconds = time.time() - began
    held_out = (text := Path(data).read_text(encoding="utf-8"))[len(text) * 9 // 10:]
    return seconds, float(call(["-c", SCORE], here).split("SCORE")[1]) * len(held_out) / len(held_out.encode())


def time_to(target, data, folder, *args):
    """Seconds from the start of python train.py configs/char.py to its first evaluation at or under `target` nats per
    byte, and that evaluation; the run goes on to its end."""
    command = [sys.executable, "train.py", "configs/char.py", f"--data={data}", f"--out_dir={folder}/char", *args]
    metrics, began, reached = Path(folder) / "char/metrics.jsonl", time.time(), None
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            time.sleep(0.05)
            if reached is None and metrics.exists():
                hit = [e for e in lines(metrics.parent)[1] if e["val_bpb"] * math.log(2) <= target]
                reached = hit and (time.time() - began, hit[0]) or None
            if time.time() - began > 1800:
                run.kill()
    if run.returncode:
        raise UserError(f"{' '.join(command[1:])} ended with exit code {run.returncode}")
    return reached


def char(options):
    clone, data = options.get("nanogpt"), options.get("data")
    if not data or not Path(data).is_file():
        raise UserError("bench.py char: --data=FILE names an English text of about 1 MB, such as tiny Shakespeare")
    if not clone or not Path(clone, "train.py").is_file():
        raise UserError("bench.py char: --nanogpt=DIR names a clone of nanoGPT, to run its recipe beside ours")
    data, runs = str(Path(data).resolve()), []
    for _ in range(int(options.get("repeats", 1))):
        with tempfile.TemporaryDirectory() as folder:
            theirs, target = nanogpt(clone, data, folder)
            print(f"nanoGPT: {target:.4f} nats per byte after {theirs:.1f} s", flush=True)
            reached = time_to(target, data, folder)
            rows, evals = lines(f"{folder}/char")
            state = json.loads(next(Path(folder, "char").glob("step_*/state.json")).read_text())
        ours = reached and reached[0]
        print(f"nanoV3: step {reached[1]['step']} after {ours:.1f} s" if ours else "nanoV3: not reached", flush=True)
        runs.append({"nanogpt_seconds": theirs, "nanogpt_loss": target, "seconds": ours,
                     "step": ours and reached[1]["step"], "ratio": ours and ours / theirs,
                     "final_loss": evals[-1]["val_bpb"] * math.log(2)})
    command = f"python bench.py char --data={Path(data).name} --nanogpt={Path(clone).name}"
    record("char", command, runs=runs, data=state["data"],
           losses=checkpoints_of(rows), evals=[[e["step"], e["val_bpb"] * math.log(2)] for e in evals])


# --- ablations --------------------------------------------------------------------------------------------------------

def variants():
    c = configs.load(["configs/char.py"])
    # The dense first layer, then the K + shared experts and the gate of each mixture (MTP's too), spread evenly.
    width = c.moe_inter_dim * (c.n_shared_experts + c.n_activated_experts) + c.n_routed_experts / 3
    sparse = c.n_layers - c.n_dense_layers + c.n_mtp
    dense = round((c.n_dense_layers * c.inter_dim + sparse * width) / (c.n_layers + c.n_mtp))
    return {
        "V3: bias balancing, MTP": [],
        "without MTP": ["--n_mtp=0"],
        "auxiliary loss 0.01, sequence-wise": ["--bias_update_speed=0", "--balance_alpha=0.01"],
        "auxiliary loss 0.01, batch-wise": ["--bias_update_speed=0", "--balance_alpha=0.01", "--balance_scope=batch"],
        "no balancing": ["--bias_update_speed=0", "--balance_alpha=0"],
        "dense, equal active FLOPs": [f"--n_dense_layers={c.n_layers}", f"--inter_dim={dense}"],
    }


def ablations(options):
    data = options.get("data")
    if not data or not Path(data).is_file():
        raise UserError("bench.py ablations: --data=FILE names an English text of about 1 MB, such as tiny Shakespeare")
    seeds = range(1, 1 + int(options.get("seeds", 3)))

    def one(job):
        name, changes, seed = job
        with tempfile.TemporaryDirectory() as folder:
            train("configs/char.py", f"--data={Path(data).resolve()}", f"--seed={seed}", f"--out_dir={folder}/run",
                  *changes, OMP_NUM_THREADS="1")
            rows, evals = lines(f"{folder}/run")
            state = json.loads(next(Path(folder, "run").glob("step_*/state.json")).read_text())
        result = {"seed": seed, "val_loss": evals[-1]["val_bpb"] * math.log(2),
                  "max_vio": statistics.mean(r["max_vio"] for r in rows[-100:]), "seconds": rows[-1]["time"]}
        print(f"{name}: {result}", flush=True)
        return name, result, state

    # As many at a time as there are cores, one thread each: together faster than one after the other.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(one, [(name, changes, seed) for name, changes in variants().items() for seed in seeds]))
    out = {name: {"changes": changes, "runs": [result for other, result, _ in done if other == name]}
           for name, changes in variants().items()}
    state = done[0][2]
    record("ablations", f"python bench.py ablations --data={Path(data).name}", data=state["data"], variants=out)


# --- speculation ------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def parts_of_a_step(v3, prompt, drafts, repeats=48):
    """Least milliseconds of a plain step, and of the two parts of a speculative one: the main model's forward pass over
    the newest token and the drafts, and the drafting."""
    def part(drafts, step):
        batch = sample.Batch(v3, [prompt], repeats + 2, (0,), None, drafts)
        batch.prefill()
        h = v3.hidden(batch.tokens, batch.cache)[0]
        kept = batch.tokens.clone(), torch.ones_like(batch.lengths)                      # a step's tokens: one stands
        call = lambda: step(batch, h, *kept)
        return batch.graph(call) if use_graph(v3.config, batch.tokens, MAX_TOKENS) else call

    calls = {"plain": part(0, lambda batch, *_: batch.step()),
             "main": part(drafts, lambda batch, *_: v3.logits(v3.hidden(batch.tokens, batch.cache)[0]).argmax(-1)),
             "draft": part(drafts, lambda batch, *kept: batch.draft(*kept))}
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():                       # in turn: what disturbs the machine disturbs all
            began = time.perf_counter()
            call()
            if v3.embed.weight.is_cuda:
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: min(t) for name, t in times.items()}


def speculation(options):
    """The first 64 bytes of each of 50 held-out documents and the 128 tokens behind them, greedily, one by one."""
    with tempfile.TemporaryDirectory() as folder:
        out_dir = options.get("out_dir", f"{folder}/run")
        if "out_dir" not in options:                           # twice the default's context, for as many tokens a step
            train("configs/tiny.py", "--seq_len=256", "--batch_size=16", "--micro_batch_size=16",
                  f"--out_dir={out_dir}")
        state = read_state(latest(out_dir))
        v3, tokenizer, _ = sample.load(out_dir)
    if not v3.mtp:
        raise UserError(f"bench.py speculation: the model in {out_dir} has no MTP module to draft with (n_mtp is 0)")
    _, held_out = split(documents(v3.config.data))
    texts = [text for _, text in held_out[::max(1, len(held_out) // 50)]][:50]
    prompts = [sample.encode(tokenizer, text.encode()[:64].decode(errors="ignore")) for text in texts]
    if sample.room(v3.config, prompts) < 128:
        raise UserError(f"bench.py speculation: the context of {out_dir}, {v3.config.context} tokens, is too short for "
                        f"a prompt and 128 more; train with --seq_len=256")
    if v3.embed.weight.device.type == "cpu":
        torch.set_num_threads(1)                                                           # as sample.py does

    def continued(prompt, drafts):
        """The tokens, the seconds from the first of them to the last (not those of the prompt and of capturing a CUDA
        graph, which a longer text pays once), and what became of the drafts."""
        tally, at = Counter(), []
        (tokens,) = sample.generate(v3, [prompt], 128, temperature=0, drafts=drafts, tally=tally,
                                    on_token=lambda *_: at.append(time.perf_counter()))
        return tokens, at[-1] - at[0], tally

    most = 3
    for drafts in range(most + 1):
        continued(prompts[0], drafts)                                                      # warm
    rows = [[continued(prompt, drafts) for drafts in range(most + 1)] for prompt in prompts]
    tokens, plain = sum(len(row[0][0]) - 1 for row in rows), sum(row[0][1] for row in rows)
    modes = []
    for drafts in range(1, most + 1):
        seconds, tally = sum(row[drafts][1] for row in rows), sum((row[drafts][2] for row in rows), Counter())
        accepted, ms = tally["accepted"] / tally["forwards"], parts_of_a_step(v3, prompts[0], drafts)
        modes.append({"drafts": drafts, "identical": sum(row[drafts][0] == row[0][0] for row in rows),
                      "acceptance": accepted / drafts, "tokens_per_forward": 1 + accepted, "milliseconds": ms,
                      "draft_over_plain": ms["draft"] / ms["plain"], "tokens_per_s": tokens / seconds,
                      "speedup": plain / seconds,
                      "of_ideal": plain / seconds / ((1 + accepted) / (1 + ms["draft"] / ms["plain"]))})
        print(modes[-1], flush=True)
    cuda, given = v3.embed.weight.is_cuda, f" --out_dir={Path(out_dir).name}" if "out_dir" in options else ""
    record("speculation_gpu" if cuda else "speculation", "python bench.py speculation" + given, prompts=len(prompts),
           tokens=tokens,
           config={"dim": v3.config.dim, "n_layers": v3.config.n_layers, "precision": v3.config.precision,
                   "steps": state["step"]}, plain_tokens_per_s=tokens / plain, modes=modes, data=state["data"])


# --- loads: which experts work ----------------------------------------------------------------------------------------

def kinds_of_text():
    """{kind: text}, none of it trained on: of Python's own library the held-out sources, in two halves (what differs
    between these is chance), the held-out topics of its reference, and its tests, which are not in the corpus."""
    _, held_out = split(documents("stdlib"))
    sources = [text for name, text in held_out if not name.startswith("reference/")]
    tests = sorted(Path(sysconfig.get_path("stdlib"), "test").glob("test_*.py"))
    out = {"library": sources[::2], "library, other files": sources[1::2],
           "reference": [text for name, text in held_out if name.startswith("reference/")],
           "tests": [path.read_text(encoding="utf-8", errors="ignore") for path in tests[::10]]}
    return {kind: "\n".join(texts) for kind, texts in out.items() if texts}


@torch.inference_mode()
def load_of(v3, tokenizer, text, sequences=64):
    """Share of the rows of each expert on the beginning of a text: [layers (MTP's last)][experts], 1 = the mean."""
    T, n_mtp = v3.config.seq_len, v3.config.n_mtp
    ids = sample.encode(tokenizer, text)[:sequences * (T + n_mtp)]
    tokens = torch.tensor(ids[:len(ids) // (T + n_mtp) * (T + n_mtp)]).view(-1, T + n_mtp)
    h, routings = v3.hidden(tokens[:, :T])
    loads = torch.stack([r.load for r in [*routings, *(r for _, r in v3.draft(h, tokens) if r)]]).double()
    return (loads / loads.mean(1, keepdim=True)).tolist()


def loads(options):
    """The default job, with half of its steps unless --out_dir names a run made with --log_load=True."""
    with tempfile.TemporaryDirectory() as folder:
        out_dir = options.get("out_dir", f"{folder}/run")
        if "out_dir" not in options:
            train("configs/tiny.py", "--max_steps=475", "--decay_start=140", "--log_load=True", f"--out_dir={out_dir}")
        rows, _ = lines(out_dir)
        v3, tokenizer, _ = sample.load(out_dir, "cpu")
    if "load" not in rows[0] or not rows[0]["load"]:
        raise UserError(f"bench.py loads: {out_dir} has no loads in its metrics; train with --log_load=True")
    rows = rows[::-(-len(rows) // 80)]
    steps = torch.tensor([row["load"] for row in rows], dtype=torch.float64)                  # [steps, layers, E]
    shares = (steps / steps.mean(2, keepdim=True)).round(decimals=2)
    layers = [f"layer {i}" for i in range(v3.config.n_dense_layers, v3.config.n_layers)]
    layers += [f"MTP {i + 1}" for i in range(steps.shape[1] - len(layers))]
    record("loads", "python bench.py loads", layers=layers, steps=[row["step"] for row in rows],
           shares=shares.tolist(), kinds={kind: load_of(v3, tokenizer, text) for kind, text in kinds_of_text().items()})


def draw_loads(pyplot):
    """results/loads.png: both pictures, as shares of the mean load; blue is idle, red is busy."""
    r = load("loads")
    layers, steps = len(r["layers"]), torch.tensor(r["shares"])                               # [steps, layers, E]
    colours = dict(cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    figure, axes = pyplot.subplots(2, layers, figsize=(9, 4.2), squeeze=False, height_ratios=(3, 2),
                                   layout="constrained")
    for i, (above, below) in enumerate(axes.T):
        image = above.imshow(steps[:, i].T, extent=(r["steps"][0], r["steps"][-1], steps.shape[2] - 0.5, -0.5),
                             **colours)
        above.set(title=r["layers"][i], xlabel="step", yticks=range(steps.shape[2]))
        below.imshow([loads[i] for loads in r["kinds"].values()], **colours)
        below.set(xlabel="expert", xticks=range(steps.shape[2]), yticks=range(len(r["kinds"])),
                  yticklabels=list(r["kinds"]) if i == 0 else [])
    axes[0, 0].set_ylabel("expert")
    figure.colorbar(image, ax=axes, label="load / mean load")
    figure.savefig(RESULTS / "loads.png", dpi=110)


# --- decode: attention over the latent cache --------------------------------------------------------------------------

def cache_per_token(c):
    """{kind of attention: bytes that the cache of a Config's shape holds for one token}, in BF16 where nothing is said.
    MHA keeps keys and values of d_n = d_v dims for every head, GQA-8 for eight groups of heads."""
    heads = lambda n: n * (c.qk_nope_head_dim + c.v_head_dim) * c.n_layers * 2
    width, d_r = c.kv_lora_rank + c.qk_rope_head_dim, c.qk_rope_head_dim
    latent = lambda dtype: LatentCache(c.n_layers, 1, 1, width, "meta", dtype, d_r).bytes_per_token
    return {"MHA": heads(c.n_heads), "GQA-8": heads(8), "MLA": latent(torch.bfloat16),
            "MLA, FP8": latent(torch.float8_e4m3fn)}


def seconds(function, *args, graph=True):
    """Median seconds of function(*args), L2 cold. With graph captured once and replayed, as generation does it: without
    the host's launches, which are most of the time where the work is small."""
    from triton.testing import do_bench
    run = lambda: function(*args)
    run()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    return do_bench(run, warmup=20, rep=100, return_mode="median") / 1e3


def decode_inputs(B, H, S, T=1, r_kv=512, d_r=64):
    """Random q_latent, q_rope, latents and positions of rows that all hold S tokens, V3's dims, in BF16."""
    random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(S - T, S, device="cuda").expand(B, T).contiguous()
    return 0.3 * random(B, T, H, r_kv), random(B, T, H, d_r), random(B, S, r_kv + d_r), positions


def decode_shape(B, H, S, T):
    """The decode kernels against torch.compile of their torch form: time, bytes of cache and FLOPs per second."""
    torch.compiler.reset()
    args, compiled, scale = decode_inputs(B, H, S, T), torch.compile(decode_torch, dynamic=False), 192 ** -0.5
    packed = quantize(args[2], 64)
    ours, theirs = seconds(decode_triton, *args, scale), seconds(compiled, *args, scale)
    fp8 = seconds(decode_triton, *args[:2], packed, args[3], scale)
    launched = [seconds(f, *args, scale, graph=False) for f in (decode_triton, compiled)]
    row = {"batch": B, "heads": H, "tokens": S, "queries": T, "us": ours * 1e6, "compiled_us": theirs * 1e6,
           "speedup": theirs / ours, "launched_us": launched[0] * 1e6, "compiled_launched_us": launched[1] * 1e6,
           "fp8_us": fp8 * 1e6, "cache_tb_s": args[2].nbytes / ours / 1e12,
           "tflops": 2 * B * S * T * H * (576 + 512) / ours / 1e12}
    print(row, flush=True)
    return row


def decode_ragged(scale=192 ** -0.5):
    """Rows of any length in one cache."""
    q_latent, q_rope, latents, _ = decode_inputs(64, 16, 4096)
    lengths = torch.randint(1, 4096, (64, 1), generator=torch.Generator().manual_seed(1)).cuda()
    ours = seconds(decode_triton, q_latent, q_rope, latents, lengths - 1, scale)
    return {"mean_tokens": lengths.float().mean().item(), "us": ours * 1e6,
            "cache_tb_s": int(lengths.sum()) * 1152 / ours / 1e12}


def decode_errors(scale=192 ** -0.5):
    """The error of BF16 and of the FP8 cache against float64."""
    q_latent, q_rope, latents, positions = decode_inputs(4, 128, 2000)
    packed = quantize(latents, 64)
    exact = decode_torch(q_latent.double(), q_rope.double(), latents.double(), positions, scale)
    run = lambda form, cache: error(form(q_latent, q_rope, cache, positions, scale), exact)
    return {"torch": run(decode_torch, latents), "triton": run(decode_triton, latents),
            "torch_fp8": run(decode_torch, packed), "triton_fp8": run(decode_triton, packed),
            "fp8_in_float64": error(decode_torch(q_latent.double(), q_rope.double(), packed, positions, scale), exact)}


def copy_rate():
    """Bytes per second, read and written, of a copy on this GPU: what a kernel that waits for memory could reach."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(200):                                       # the first ones find the memory's clock asleep
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * len(source) / statistics.median(times[100:])


def bytes_per_step(v3, batch, length):
    """Bytes that a decode step of `batch` rows has to read: the weights that work, of the experts those that somebody
    chose when all are chosen equally often, and `length` cached tokens a row."""
    c = v3.config
    idle = (1 - c.n_activated_experts / c.n_routed_experts) ** batch                       # share of experts
    sizes = {name: p.numel() * p.element_size() * (1 - idle if p.ndim == 3 else 1) for name, p in v3.named_parameters()}
    return sum(sizes.values()) - sizes["embed.weight"] + batch * length * v3.cache(1, 1).bytes_per_token


def generation(batches=(1, 64), prompt=64, short=64, long=576):
    """Greedy tokens/s of configs/bench_1b.py with random weights. Two lengths are generated and their difference
    counted, so that prompts and preparations fall out; of three such pairs the median."""
    config, rate, out = configs.load(["configs/bench_1b.py"]), copy_rate(), []
    with torch.device("cuda"):
        v3 = sample.cast(V3(config)).eval()
    for batch in batches:
        prompts, times = torch.randint(config.vocab_size, (batch, prompt)).tolist(), {short: [], long: []}
        for _ in range(4):
            for tokens, runs in times.items():
                began = time.perf_counter()
                sample.generate(v3, prompts, tokens, temperature=0)
                runs.append(time.perf_counter() - began)
        _, *pairs = zip(*times.values())                                                   # the first compiles kernels
        per_step = statistics.median(more - less for less, more in pairs) / (long - short)
        needed = bytes_per_step(v3, batch, prompt + (short + long) / 2)
        out.append({"batch": batch, "tokens_per_s": batch / per_step, "limit_tokens_per_s": batch * rate / needed,
                    "bytes_per_step": needed, "copy_bytes_per_s": rate})
        print("batch {batch}: {tokens_per_s:,.0f} tokens/s; reading {bytes_per_step:.3g} bytes a step allows "
              "{limit_tokens_per_s:,.0f}".format(**out[-1]), flush=True)
    return out


def decode(options):
    if not torch.cuda.is_available() or not has_triton():
        raise UserError("bench.py decode: needs a CUDA GPU and Triton")
    copied = seconds(torch.clone, torch.empty(2 ** 30, dtype=torch.uint8, device="cuda"))
    attention = {"copy_tb_s": 2 * 2 ** 30 / copied / 1e12, "error": decode_errors(), "ragged": decode_ragged(),
                 "shapes": []}
    print(attention, flush=True)
    out = {"attention": attention, "generation": generation()}
    for shape in [(64, 16, 4096, 1), (64, 16, 32768, 1), (64, 128, 4096, 1), (1, 128, 32768, 1), (8, 16, 4096, 1),
                  (64, 16, 4096, 2), (64, 16, 4096, 4)]:
        attention["shapes"].append(decode_shape(*shape))
        record("decode", "python bench.py decode", **out)      # what there is, should the rest not come


# --- training attention on a GPU --------------------------------------------------------------------------------------

def milliseconds(run, rep=100):
    """Median time of run() on the GPU, L2 cold, in ms; measured for `rep` ms."""
    from triton.testing import do_bench
    return do_bench(run, warmup=rep // 4, rep=rep, return_mode="median")


def in_turn(runs, rounds=5):
    """{name: median time of run(), in ms} of {name: run}: in rounds, so that a GPU that grows warm and slow does so to
    all of them."""
    times = [{name: milliseconds(run, 20) for name, run in runs.items()} for _ in range(rounds)]
    return {name: statistics.median(row[name] for row in times) for name in runs}


def forward_backward(forms, gradient):
    """{name: (forward ms, backward ms, peak bytes of one forward and backward, inputs included)} of {name: (form,
    inputs)}; gradient: of an output."""
    forms = {name: (form, [t.detach().requires_grad_() for t in inputs]) for name, (form, inputs) in forms.items()}
    forward = in_turn({name: lambda f=form, x=inputs: f(*x) for name, (form, inputs) in forms.items()})

    def backward_of(form, inputs):
        out = form(*inputs)
        return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)

    backward, peak = in_turn({name: backward_of(*form) for name, form in forms.items()}), {}
    for name, (form, inputs) in forms.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(form(*inputs), inputs, gradient)
        peak[name] = torch.cuda.max_memory_allocated() - before + sum(t.nbytes for t in inputs)
    return {name: (forward[name], backward[name], peak[name]) for name in forms}


def attention_shape(B, H, T, dims):
    """Attention kernels alone, and from what the projections put out (q, kv and the one k_rope) to those gradients."""
    d_n, d_r, d_v = dims
    scale = (d_n + d_r) ** -0.5
    random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    q, kv, k_rope, dout = random(B, T, H, d_n + d_r), random(B, T, H, d_n + d_v), random(B, T, 1, d_r), \
        random(B, T, H, d_v)
    parts = (*q.split([d_n, d_r], -1), *kv.split([d_n, d_v], -1))
    whole = [torch.cat(parts[:2], -1), torch.cat([parts[2], k_rope.expand_as(parts[1])], -1), parts[3]]
    whole = [t.transpose(1, 2) for t in whole]
    sdpa = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    def block(form, split):
        def run(q, kv, k_rope):
            (q_nope, q_rope), (k_nope, v) = split(q, d_n), split(kv, d_n)
            return form(q_nope, q_rope, k_nope, k_rope, v, scale)
        return run

    def sdpa_block(*inputs):
        with cudnn():
            return block(mla.attention_torch, lambda x, d: x.split([d, x.shape[-1] - d], -1))(*inputs)

    def sdpa_kernel(*inputs):
        with cudnn():
            return sdpa(*inputs).transpose(1, 2)

    kernel = lambda *t: mla.attention_triton(*t, scale)
    measured = forward_backward({
        "cuDNN, kernel": (sdpa_kernel, whole), "Triton, kernel": (kernel, (*parts[:3], k_rope, parts[3])),
        "cuDNN, block": (sdpa_block, (q, kv, k_rope)),
        "Triton, block": (block(mla.attention_triton, mla.Split.apply), (q, kv, k_rope))}, dout)
    flops = B * H * T * T * (d_n + d_r + d_v)                                          # half of the square, 2 a product
    out = {"B": B, "H": H, "T": T, "dims": dims}
    for name, (forward, backward, peak) in measured.items():
        out[name] = {"forward_ms": forward, "backward_ms": backward, "forward_tflops": flops / forward / 1e9,
                     "backward_tflops": 2.5 * flops / backward / 1e9, "peak_bytes": peak}
    for what in ("kernel", "block"):
        ours, theirs = measured[f"Triton, {what}"], measured[f"cuDNN, {what}"]
        out[f"{what}, times cuDNN"] = {"forward": theirs[0] / ours[0], "backward": theirs[1] / ours[1],
                                       "memory": ours[2] / theirs[2]}
        print(f"B{B} H{H} T{T} {what}: forward {theirs[0] / ours[0]:.2f}x cuDNN ({ours[0]:.3f} ms, "
              f"{flops / ours[0] / 1e9:.0f} TFLOP/s), backward {theirs[1] / ours[1]:.2f}x ({ours[1]:.3f} ms), "
              f"memory {ours[2] / theirs[2]:.2f}x", flush=True)
    return out


def cudnn():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION])


def small_ops():
    """RMSNorm and RoPE: one kernel against torch eager and compiled, forward and backward, and the bytes kept."""
    def compare(name, forms, inputs, gradients):
        measured = forward_backward({path: (form, inputs) for path, form in forms.items()}, gradients)
        row = {path: dict(zip(("forward_ms", "backward_ms", "peak_bytes"), m)) for path, m in measured.items()}
        print(f"{name}: " + ", ".join(f"{p} {r['forward_ms']:.3f} + {r['backward_ms']:.3f} ms" for p, r in row.items()),
              flush=True)
        return row

    random, out = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16), {}
    torch._functorch.config.donated_buffer = False                # a compiled backward may be timed again and again
    plain = lambda x, w: torch.nn.functional.rms_norm(x.float(), w.shape, w, 1e-6).to(x.dtype)
    norms = {"torch": lambda x, w: mla.rms_norm_torch(x, w, 1e-6), "compiled": torch.compile(plain),
             "Triton": lambda x, w: mla.rms_norm_triton(x, w, 1e-6)}
    for N, D in ((8192, 7168), (8192, 1024)):
        inputs = random(N, D), torch.ones(D, device="cuda")
        out[f"RMSNorm {N} x {D}"] = compare(f"RMSNorm {N} x {D}", norms, inputs, random(N, D))
    T, H = 4096, 128
    rope = torch.polar(torch.ones(T, 32, device="cuda"), torch.rand(T, 32, device="cuda"))
    turn = lambda form: lambda x: form(x * 1, H, rope)            # x * 1: in place on a tensor that the caller made
    turns = {"torch": turn(mla.split_rope_torch), "compiled": torch.compile(turn(mla.split_rope_torch)),
             "Triton": turn(mla.split_rope_triton)}
    out["RoPE 4096 x 128, with a copy"] = compare("RoPE 4096 x 128, with a copy", turns, (random(1, T, H * 192),),
                                                  random(1, T, H, 192).split([128, 64], -1))
    return out


def recomputation():
    """Bytes that one attention layer of V3's dims keeps for backward (BF16, 4096 tokens), and its time."""
    c, out = configs.load(["configs/v3_671b.py", "--seq_len=4096", "--recompute_mla=False"]), {}
    x = torch.randn(1, 4096, c.dim, device="cuda", dtype=torch.bfloat16)
    rope = mla.rope_table(c)[:4096].cuda()
    for name, changes, fused in (("torch norms and RoPE", {}, False), ("kernels", {}, True),
                                 ("kernels, recompute_mla", {"recompute_mla": True}, True)):
        with torch.device("meta"):
            block = Block(c.replace(inter_dim=64, **changes), dense=True)
        block = block.to_empty(device="cuda").to(torch.bfloat16)
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.02)
        with mock.patch.object(backend, "use_small_kernels", lambda x, fused=fused: fused):
            step = lambda: torch.autograd.backward(block.attention(x.requires_grad_(), rope), (x, x))       # noqa: B023
            step()
            before = torch.cuda.memory_allocated()
            h, y = block.attention(x, rope)
            kept = torch.cuda.memory_allocated() - before - h.nbytes - y.nbytes
            del h, y
            out[name] = {"kept_bytes": kept, "ms": milliseconds(step)}
        print(f"{name}: keeps {kept / 2**20:.0f} MiB, forward and backward {out[name]['ms']:.2f} ms", flush=True)
    return out


def attention(options):
    path, why = backend.attention(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16,
                                  (128, 64, 128))
    if path != "Triton":
        raise UserError(f"bench.py attention: a Hopper GPU with Triton is needed ({why})")
    out = {"shapes": [attention_shape(*shape, (128, 64, 128)) for shape in ((1, 128, 4096), (4, 16, 2048))],
           "small_ops": {}, "recomputation": {}}
    for part, measure in (("recomputation", recomputation), ("small_ops", small_ops)):
        record("attention", "python bench.py attention", **out)                # what there is, should the rest not come
        out[part] = measure()
    record("attention", "python bench.py attention", **out)


# --- the experts on a GPU ---------------------------------------------------------------------------------------------

MOE_SHAPES = {                                # tokens, experts, chosen, dim, moe_inter_dim
    "bench_1b": (32768, 64, 6, 1024, 512), "V2-Lite": (8192, 64, 6, 2048, 1408),
    "4 experts of V3": (32768, 4, 1, 7168, 2048)}


def moe_inputs(N, E, K, D, F):
    """x, indices, gate weights, w13, w2 as training has them: BF16 tokens, FP32 masters, an even load."""
    random = lambda *shape: torch.randn(*shape, device="cuda")
    return random(N, D).to(torch.bfloat16), random(N, E).topk(K).indices, random(N, K).sigmoid(), \
        random(E, 2 * F, D) * D ** -0.5, random(E, D, F) * F ** -0.5


def grouped_experts(x, indices, weights, w13, w2):
    """What one would write and have compiled: the rows sorted by expert, two grouped products, the rows added up."""
    grouped_mm, silu = torch.nn.functional.grouped_mm, torch.nn.functional.silu
    chosen, K, E = indices.flatten(), indices.shape[1], len(w13)
    order = chosen.argsort(stable=True)
    ends = torch.histc(chosen.float(), E, 0, E).cumsum(0).to(torch.int32)
    a, b = grouped_mm(x[order // K], w13.to(x.dtype).transpose(1, 2), offs=ends).chunk(2, -1)
    hidden = silu(a) * b * weights.flatten()[order].to(x.dtype)[:, None]
    rows = grouped_mm(hidden, w2.to(x.dtype).transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add(0, order // K, rows)


def moe_forms():
    return {"compiled": torch.compile(grouped_experts), "Triton": experts.routed_triton,
            "Triton, FP8": lambda *inputs: experts.routed_triton(*inputs, fp8.Recipe())}


def moe_layer(name):
    """Milliseconds of forward, and of forward and backward, and the bytes kept in between: casting and quantizing the
    weights included, as if each were an optimizer step."""
    N, E, K, D, F = MOE_SHAPES[name]
    x, indices, *rest = moe_inputs(N, E, K, D, F)
    leaves, dout = [t.requires_grad_() for t in (x, *rest)], torch.randn_like(x)
    out = {"name": name, "tokens": N, "experts": E, "chosen": K, "dim": D, "inter": F}
    for form, run in moe_forms().items():
        def forward():
            for w in leaves[2:]:
                torch.autograd.graph.increment_version(w)
            return run(leaves[0], indices, *leaves[1:])                                                # noqa: B023

        def both():
            torch.autograd.grad(forward(), leaves, dout)                                               # noqa: B023
        times = milliseconds(forward), milliseconds(both)
        for w in leaves[2:]:
            vars(w).clear()                                        # the copy in BF16 or FP8 that stays with a parameter
        before = torch.cuda.memory_allocated()
        y = forward()
        out[form] = {"forward_ms": times[0], "both_ms": times[1], "kept_bytes": torch.cuda.memory_allocated() - before,
                     "tflops": 18 * N * K * D * F / times[1] / 1e9}
        del y
        ours, theirs = out[form], out["compiled"]
        print(f"{name}, {form}: forward {times[0]:.2f} ms ({theirs['forward_ms'] / times[0]:.2f}x), "
              f"both {times[1]:.2f} ms ({theirs['both_ms'] / times[1]:.2f}x, {ours['tflops']:.0f} TFLOP/s), "
              f"keeps {ours['kept_bytes'] / 1e6:.0f} MB ({ours['kept_bytes'] / theirs['kept_bytes']:.2f}x)", flush=True)
    return out


def moe_products(name, tokens=None):
    """The first product of the experts alone, TFLOP/s: F.grouped_mm, and ours in BF16 and FP8, with and without the
    quantization of the activations."""
    N, E, K, D, F = MOE_SHAPES[name]
    N = tokens or N
    x, indices, _, w13, _ = moe_inputs(N, E, K, D, F)
    plan, w, w8 = experts.plan_triton(indices, E), w13.to(x.dtype), fp8.quantized(w13, False)
    rows, rows8 = experts.gather_triton(x, plan), experts.gather8_triton(x, plan)[0]
    packed, ends = rows[plan.pair >= 0], torch.bincount(indices.flatten(), minlength=E).cumsum(0).to(torch.int32)
    rate = lambda run: 4 * N * K * D * F / milliseconds(run, 40) / 1e9
    out = {"name": name,
           "grouped_mm": rate(lambda: torch.nn.functional.grouped_mm(packed, w.transpose(1, 2), offs=ends)),
           "bf16": rate(lambda: experts.rows_triton(rows, w, plan, False, experts.HOPPER)),
           "fp8": rate(lambda: experts.rows8(rows8, w8, plan, x.dtype)),
           "fp8_quantizing": rate(lambda: experts.rows8(experts.gather8_triton(x, plan)[0], w8, plan, x.dtype))}
    if not tokens:
        print({key: value if key == "name" else round(value) for key, value in out.items()}, flush=True)
    return out


def moe_prepare(name, form):
    """In a process of its own: compile what a form needs, into the caches on disk."""
    N, E, K, D, F = MOE_SHAPES[name]
    tokens = N if form == "compiled" else 4096                       # torch.compile compiles for a number of tokens
    x, indices, *rest = moe_inputs(tokens, E, K, D, F)
    leaves = [t.requires_grad_() for t in (x, *rest)]
    torch.autograd.grad(moe_forms()[form](leaves[0], indices, *leaves[1:]), leaves, torch.randn_like(x))
    if form == "Triton":
        moe_products(name, tokens)


def moe_on_a_gpu(options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, why = backend.experts(device, torch.bfloat16, (128, 128))
    if path != "Triton":
        raise UserError(f"bench.py moe: a Hopper GPU with Triton is needed ({why})")
    jobs = [(name, form) for form in moe_forms() for name in MOE_SHAPES]
    with ProcessPoolExecutor(len(jobs), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(moe_prepare, *zip(*jobs)))
    layers, products = [], []
    for name in MOE_SHAPES:
        products.append(moe_products(name))
        layers.append(moe_layer(name))
        record("moe", "python bench.py moe", layers=layers, products=products)


def training_step(compiled, batch=16, steps=8):
    """Tokens/s and peak bytes of whole training steps of configs/bench_1b.py on random tokens."""
    c = configs.load(["configs/bench_1b.py", "--bf16_head=True"])
    with torch.device("cuda"):
        v3 = V3(c).train()
    for block in v3.layers if compiled else ():
        block.compile()
    optimizer, times = make_optimizer(c, v3.parameters()), []
    tokens = torch.randint(c.vocab_size, (batch, c.seq_len + 1), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        began = time.perf_counter()
        v3.loss(tokens, totals=([batch * c.seq_len], batch))[0].backward()
        torch.nn.utils.clip_grad_norm_(v3.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    out = {"compiled": compiled, "tokens": batch * c.seq_len, "peak_bytes": torch.cuda.max_memory_allocated(),
           "tokens_per_s": batch * c.seq_len / statistics.median(times[steps // 2:])}
    print(f"{'compiled' if compiled else 'eager'}: {out['tokens_per_s']:,.0f} tokens/s, "
          f"{out['peak_bytes'] / 1e9:.1f} GB", flush=True)
    return out


def step(options):
    if not torch.cuda.is_available():
        raise UserError("bench.py step: a GPU is needed")
    runs = []
    for compiled in (False, True):
        runs.append(training_step(compiled))
        record("step", "python bench.py step", runs=runs)


# --- FP8 --------------------------------------------------------------------------------------------------------------

def error(y, exact):
    """Relative Frobenius error."""
    return ((y.double() - exact).norm() / exact.norm()).item()


def fp8_error(options):
    """Products of two 64 x K matrices in E4M3: the relative error of what is summed in 14 bits, against float64."""
    out = []
    for kind, draw in (("normal", torch.randn), ("uniform in [0, 1]", torch.rand)):
        for K in (2**i for i in range(7, 15)):
            generator = torch.Generator().manual_seed(K)
            a, b = (fp8.quantize_torch(draw(64, K, generator=generator)) for _ in range(2))
            a, b = (fp8.Quantized(q.values, torch.ones_like(q.scale)) for q in (a, b))     # the same scale for all of K
            exact = a.values.double() @ b.values.double().t()
            alone = fp8.dot_limited(a.values.float(), b.values.float(), torch.zeros(64, 64))
            out.append({"numbers": kind, "K": K, "promoted": error(fp8.gemm_torch(a, b, kept=14), exact),
                        "not_promoted": error(alone, exact), "float32": error(fp8.gemm_torch(a, b), exact)})
            print(out[-1], flush=True)
    record("fp8_error", "python bench.py fp8_error", errors=out)


def fp8_loss(options):
    """The same seed and data in three precisions: mean training loss of the last 100 steps, and validation loss."""
    data = options.get("data")
    if not data or not Path(data).is_file():
        raise UserError("bench.py fp8_loss: --data=FILE names an English text of about 1 MB, such as tiny Shakespeare")
    changes, runs = ["--max_steps=300", "--decay_start=100"], []
    for seed in range(1, 1 + int(options.get("seeds", 2))):
        for precision in ("fp32", "bf16", "fp8_reference"):
            with tempfile.TemporaryDirectory() as folder:
                train("configs/char.py", f"--data={Path(data).resolve()}", f"--seed={seed}", *changes,
                      f"--precision={precision}", f"--out_dir={folder}/run", OMP_NUM_THREADS="1")
                rows, evals = lines(f"{folder}/run")
                state = read_state(latest(f"{folder}/run"))
            runs.append({"seed": seed, "precision": precision, "val_loss": evals[-1]["val_bpb"] * math.log(2),
                         "loss": statistics.mean(r["loss"] for r in rows[-100:]), "seconds": rows[-1]["time"]})
            print(runs[-1], flush=True)
    record("fp8_loss", f"python bench.py fp8_loss --data={Path(data).name}", changes=changes, data=state["data"],
           runs=runs)


def fp8_tiny(options):
    """The default job with a schedule of 150 steps, in FP32 and in FP8 (the reference), the same seed and data: mean
    training loss of the last 50 steps, and validation loss."""
    changes, runs = ["--max_steps=150", "--decay_start=50", "--save_interval=0"], []
    for precision in ("fp32", "fp8_reference"):
        with tempfile.TemporaryDirectory() as folder:
            train("configs/tiny.py", *changes, f"--precision={precision}", f"--out_dir={folder}/run")
            rows, evals = lines(f"{folder}/run")
            state = read_state(latest(f"{folder}/run"))
        runs.append({"precision": precision, "loss": statistics.mean(r["loss"] for r in rows[-50:]),
                     "val_loss": evals[-1]["val_loss"], "losses": checkpoints_of(rows, (50, 100, 150)),
                     "seconds": rows[-1]["time"]})
        print(runs[-1], flush=True)
    record("fp8_tiny", "python bench.py fp8_tiny", changes=changes, data=state["data"], runs=runs,
           difference=runs[1]["loss"] / runs[0]["loss"] - 1)


V3_LINEARS = {                                # in, out: section 4.2's dims
    "q_a": (7168, 1536), "q_b": (1536, 24576), "kv_a": (7168, 576), "kv_b": (512, 32768), "o": (16384, 7168),
    "gate/up": (7168, 4096), "down": (2048, 7168)}


def cublas(a, b, dtype=torch.bfloat16):
    """A function that multiplies as fp8.gemm_torch does, by cuBLASLt. It wants the block scales of b along K, in
    multiples of four: laid out here, once."""
    tile, block = torch.nn.functional.ScalingType.BlockWise1x128, torch.nn.functional.ScalingType.BlockWise128x128
    kind, scale = tile, b.scale
    if len(b.scale) < len(b.values):
        k = scale.shape[1]
        kind, scale = block, scale.new_empty(len(scale), -(-k // 4) * 4).t()                  # [k, n]
        scale[:k] = b.scale.t()
    return lambda: torch.nn.functional.scaled_mm(a.values, b.values.t(), a.scale, tile, scale, kind, output_dtype=dtype)


def operands(M, N, K):
    """Random x [M, K] and w [N, K] in BF16, x in 1x128 tiles, w in blocks and in 1x128 tiles."""
    x, w = (torch.randn(n, K, device="cuda", dtype=torch.bfloat16) for n in (M, N))
    return x, w, fp8.quantize_triton(x)[0], fp8.blocks_triton(w[None])[0], fp8.quantize_triton(w)[0]


def fp8_products(name, inner, outer, N=4096):
    """Fprop's product of N tokens and Wgrad's on the same FP8 operands: TFLOP/s of our kernel, cuBLASLt's and BF16's,
    in turn; Fprop's error against float64. Wgrad is added to an FP32 gradient, which cuBLASLt does in a second pass."""
    x, w, a, b, _ = operands(N, outer, inner)
    y, theirs = x.new_empty(N, outer), cublas(a, b)
    exact = a[:256].dequantize().double() @ b.dequantize().double().t()
    out = {"name": name, "M": N, "N": outer, "K": inner, "triton_error": error(fp8.gemm_triton(a, b, y)[:256], exact)}
    runs = {"triton": lambda: fp8.gemm_triton(a, b, y), "gemm": lambda: fp8.gemm(a, b, y), "bf16": lambda: x @ w.t()}
    if outer % 128 == 0:                                                       # kv_a's 576 are not whole blocks
        out["cublas_error"], runs["cublas"] = error(theirs()[:256], exact), theirs
    dy, xt, columns, _, x_columns = operands(outer, inner, N)                      # [out, tokens], [in, tokens]
    dw, wgrad_cublas = torch.zeros(outer, inner, device="cuda"), cublas(columns, x_columns, torch.float32)
    runs |= {"wgrad_triton": lambda: fp8.gemm_triton(columns, x_columns, dw), "wgrad_cublas": wgrad_cublas,
             "wgrad_bf16": lambda: dy @ xt.t(), "wgrad_cublas_add": lambda: dw.add_(wgrad_cublas()),
             "wgrad_triton_add": lambda: fp8.gemm_triton(columns, x_columns, dw, True)}
    r = {run: 2 * N * outer * inner / ms / 1e9 for run, ms in in_turn(runs, rounds=3).items()}
    against = lambda ours, theirs: f"{r[ours] / r[theirs]:.2f}x" if theirs in r else "-"
    print(f"{name}: {r['triton']:.0f} TFLOP/s, {against('triton', 'cublas')} cuBLASLt, "
          f"{against('triton', 'bf16')} BF16; fp8.gemm {r['gemm']:.0f}; Wgrad {r['wgrad_triton']:.0f}, "
          f"{against('wgrad_triton', 'wgrad_cublas')} cuBLASLt, {against('wgrad_triton', 'wgrad_bf16')} BF16; "
          f"added to a gradient {r['wgrad_triton_add']:.0f}, {against('wgrad_triton_add', 'wgrad_cublas_add')}",
          flush=True)
    return out | r


def fp8_few(M, N, K):
    """Microseconds of a product of M rows, L2 cold, as a CUDA graph."""
    x, w, a, b, _ = operands(M, N, K)
    y = x.new_empty(M, N)
    runs = {"triton": lambda: fp8.gemm_triton(a, b, y), "cublas": cublas(a, b), "bf16": lambda: x @ w.t()}
    out = {"M": M, "N": N, "K": K} | {name: seconds(run) * 1e6 for name, run in runs.items()}
    out["weight_tb_s"] = N * K / out["triton"] / 1e6
    print(f"{M} rows, {N} x {K}: {out['triton']:.1f} us, {out['cublas'] / out['triton']:.2f}x cuBLASLt, "
          f"{out['bf16'] / out['triton']:.2f}x BF16, weights at {out['weight_tb_s']:.2f} TB/s", flush=True)
    return out


def fp8_linear(inner, outer, N=4096):
    """Milliseconds of forward and backward of a Linear with an FP32 weight, quantization and casts included, the
    weight's too: as if each micro-batch were an optimizer step."""
    layer, out = fp8.Linear(inner, outer).cuda(), {"in": inner, "out": outer}
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(N, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(N, outer, device="cuda", dtype=torch.bfloat16)

    def step():
        torch.autograd.graph.increment_version(layer.weight)
        torch.autograd.grad(layer(x), (x, layer.weight), dy)
    for name, recipe in (("bf16", None), ("fp8", fp8.Recipe())):
        layer.recipe = recipe
        out[name] = milliseconds(step)
    return out


def fp8_quantization(M=8192, K=7168, F=2048):
    """Bytes read and written per second of what our kernels do in one pass, and of torch.compile of the same: of
    RMSNorm and SwiGLU as users have it, which write BF16, and quantize that."""
    x, h, w, weight, gate = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
                             for shape in ((M, K), (M, 2 * F), (1, M, K), (K,), (M,)))
    w = w.float()
    kept, blocks = fp8.quantize_triton(x)[0], fp8.blocks_triton(w)

    def rows(x):
        tiles = x.float().unflatten(-1, (-1, 128))
        scale = (tiles.abs().amax(-1, keepdim=True) / 448).clamp_min(fp8.LEAST)
        return (tiles / scale).to(torch.float8_e4m3fn).flatten(-2), scale.squeeze(-1)

    def both(x):
        return *rows(x), *rows(x.t().contiguous())

    def norm(x):
        return torch.nn.functional.rms_norm(x.float(), (K,), weight.float(), 1e-6).to(x.dtype)

    def swiglu(h):
        a, b = h.chunk(2, -1)
        return torch.nn.functional.silu(a) * b * gate[:, None]

    row, pair, normed, gated = (torch.compile(f, dynamic=False) for f in (rows, both, norm, swiglu))
    passes = {
        "rows": (3 * M * K, lambda: fp8.quantize_triton(x), lambda: row(x)),
        "rows and columns": (4 * M * K, lambda: fp8.quantize_triton(x, columns=True), lambda: pair(x)),
        "FP8 rows to columns": (2 * M * K, lambda: fp8.quantize_triton(kept, rows=False, columns=True), None),
        "RMSNorm, rows": (3 * M * K, lambda: fp8.norm_quantize_triton(x, weight, 1e-6), lambda: row(normed(x))),
        "RMSNorm, rows and columns": (4 * M * K, lambda: fp8.norm_quantize_triton(x, weight, 1e-6, columns=True),
                                      lambda: pair(normed(x))),
        "SwiGLU, rows": (5 * M * F, lambda: fp8.swiglu_quantize_triton(h, gate), lambda: row(gated(h))),
        "SwiGLU, rows and columns": (6 * M * F, lambda: fp8.swiglu_quantize_triton(h, gate, columns=True), None),
        "blocks": (5 * M * K, lambda: fp8.blocks_triton(w), None),
        "transpose of blocks": (2 * M * K, lambda: fp8.transpose_triton(blocks), None)}
    out = {"copy": copy_rate(), "passes": {}}
    for name, (moved, ours, theirs) in passes.items():
        times = in_turn({"triton": ours, **({"compiled": theirs} if theirs else {})}, rounds=3)
        r = out["passes"][name] = {form: moved / ms * 1e3 for form, ms in times.items()}
        print(f"{name}: {r['triton'] / 1e12:.2f} TB/s, {r['triton'] / out['copy']:.2f}x a copy"
              + (f", {r['triton'] / r['compiled']:.2f}x compiled" if theirs else ""), flush=True)
    return out


def fp8_adamw():
    """A step of the optimizer over one V3 layer's matrices (V3_LINEARS): milliseconds, and bytes read and written per
    second, of torch's fused AdamW and of ours with moments of both dtypes."""
    weights = [torch.nn.Parameter(torch.randn(shape[::-1], device="cuda")) for shape in V3_LINEARS.values()]
    for p in weights:
        p.grad = torch.randn_like(p)
    options, out = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), {}
    for name, dtype, make in (("torch, FP32", torch.float32, lambda: torch.optim.AdamW(weights, fused=True, **options)),
                              ("ours, FP32", torch.float32, lambda: fp8.AdamW(weights, **options)),
                              ("ours, BF16", torch.bfloat16, lambda: fp8.AdamW(weights, **options))):
        optimizer = make()
        for p in weights:
            optimizer.state[p] = {"step": torch.zeros((), device="cuda" if "torch" in name else None),
                                  "exp_avg": torch.zeros_like(p, dtype=dtype),
                                  "exp_avg_sq": torch.zeros_like(p, dtype=dtype)}
        ms, moved = milliseconds(optimizer.step), (12 + 4 * dtype.itemsize) * sum(p.numel() for p in weights)
        out[name] = {"ms": ms, "bytes_per_s": moved / ms * 1e3}
    return out


def needs_fp8(section):
    path, why = backend.fp8_kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if path != "Triton":
        raise UserError(f"bench.py {section}: a Hopper GPU with Triton is needed ({why})")


def shown(row):
    print({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    return row


def fp8_on_a_gpu(options):
    needs_fp8("fp8")
    parts = {
        "products": lambda: [fp8_products(name, *dims) for name, dims in V3_LINEARS.items()]
        + [fp8_products("square", 8192, 8192, 8192)],
        "few": lambda: [fp8_few(M, *V3_LINEARS[name][::-1]) for M in (16, 64, 128) for name in ("q_a", "gate/up", "o")],
        "linears": lambda: [shown({"name": name, **fp8_linear(*dims)}) for name, dims in V3_LINEARS.items()],
        "square": lambda: [shown(fp8_linear(dim, dim)) for dim in (256, 512, 1024, 2048, 4096, 8192)],  # where it pays
        "adamw": lambda: shown(fp8_adamw()), "quantization": fp8_quantization}
    out = {}
    for name, measure in parts.items():
        out[name] = measure()
        record("fp8", "python bench.py fp8", **out)                            # what there is, should the rest not come


# --- one layer of V3 as one GPU of 64 has it --------------------------------------------------------------------------

class Arrive(torch.autograd.Function):
    """Rows that other GPUs send: a buffer that comes to be now. What is the rows' gradient is sent back and gone."""

    @staticmethod
    def forward(ctx, tie, wire):
        return wire.clone()

    @staticmethod
    def backward(ctx, drows):
        return drows.new_zeros(()), None


class Leave(torch.autograd.Function):
    """Rows that are sent, and gone; their gradient arrives in backward."""

    @staticmethod
    def forward(ctx, rows, wire):
        ctx.wire = wire
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.wire.clone(), None


class Slice(torch.nn.Module):
    """One MoE layer of V3 on one GPU of 64: attention, norms, gate and shared expert for its own sequence, and 4 of the
    256 experts for the rows that all GPUs send it: 8 experts a token, so as many rows as it sends itself. The rows and
    their gradients come from `wire`, which stands for the network, and cost a copy."""

    def __init__(self, c, experts=4):
        super().__init__()
        with torch.device("meta"):
            self.block = Block(c, dense=False)
            ffn = self.block.ffn
            ffn.w13, ffn.w2 = (torch.nn.Parameter(w[:experts]) for w in (ffn.w13, ffn.w2))
        if c.precision == "fp8":
            fp8.convert(self.block)
        self.to_empty(device="cuda")
        for p in self.parameters():
            torch.nn.init.normal_(p, std=0.006) if p.ndim > 1 else torch.nn.init.ones_(p)
        ffn.gate.bias.zero_()
        rows = c.seq_len * c.n_activated_experts
        random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        self.wire, self.gates = [random(rows, c.dim) for _ in range(2)], torch.rand(rows, 1, device="cuda")
        self.indices = torch.arange(rows, device="cuda")[:, None] * experts // rows           # [R, 1], as many for each
        self.x, self.dy, self.rope = random(1, c.seq_len, c.dim), random(1, c.seq_len, c.dim), mla.rope_table(c).cuda()

    def forward(self):
        """-> (the tensors that backward begins from, their gradients)."""
        ffn = self.block.ffn
        h, x = self.block.attention(self.x.requires_grad_(), self.rope[:self.x.shape[1]])
        routing = ffn.gate(x)
        tie = torch.zeros((), device="cuda", requires_grad=True)
        sent = Leave.apply(moe.routed(Arrive.apply(tie, self.wire[0]), self.indices, self.gates, ffn.w13, ffn.w2,
                                      ffn.recipe, len(self.indices)), self.wire[1])
        roots = h + ffn.shared(x), routing.weights, routing.balance, sent
        return roots, (self.dy, routing.weights.detach(), None, None)


def layer_in(precision, moments):
    """A step (forward, backward, optimizer) of the Slice: milliseconds, the peak of memory, and what it is made of."""
    c = configs.load(["configs/v3_671b.py", "--recompute_mla=True", f"--precision={precision}", f"--moments={moments}"])
    torch.cuda.empty_cache()
    nothing = torch.cuda.memory_allocated()
    part = Slice(c).train()
    weights = list(part.parameters())
    optimizer = make_optimizer(c, weights)
    wire, size = sum(t.nbytes for t in part.wire), lambda tensors: sum(t.nbytes for t in tensors)
    held = lambda: torch.cuda.memory_allocated() - nothing - wire
    bytes_ = {"weights": size(weights), "moments": size(t for s in optimizer.state.values() for t in s.values()
                                                        if t.is_cuda and t.ndim)}

    def step():
        torch.autograd.backward(*part())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        part.x.grad = None
    step()
    bytes_["FP8 copies"] = size(t for p in weights if hasattr(p, "fp8") for t in (p.fp8[1].values, p.fp8[1].scale))
    bytes_["BF16 copies"] = size(p.low[1] for p in weights if hasattr(p, "low"))
    before = held()
    roots = part()
    bytes_["saved activations"] = held() - before
    torch.autograd.backward(*roots)
    del roots
    bytes_["gradients"] = size(p.grad for p in weights if p.grad is not None)
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - nothing - wire
    ms = milliseconds(step, 400)
    out = {"precision": precision, "moments": moments, "parameters": sum(p.numel() for p in weights), "ms": ms,
           "tokens_per_s": c.seq_len / ms * 1e3, "peak_bytes": peak, "bytes": bytes_}
    rows = part.wire[0].shape[0]
    expert = part.block.ffn.w13.numel() + part.block.ffn.w2.numel()
    products = c.seq_len * (sum(p.numel() for p in weights) - expert) + rows * expert // len(part.block.ffn.w13)
    attention = 2 * c.n_heads * (c.qk_head_dim + c.v_head_dim) * (c.seq_len + 1) / 2 * c.seq_len
    out["flops"] = 6 * products + 3 * attention
    out["tflops"] = out["flops"] / ms / 1e9
    out["gpu_hours_per_trillion_tokens"] = 1e12 * arithmetic(c)["flops"] / (out["tflops"] * 1e12) / 3600
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in out.items()}, flush=True)
    return out


def layer(options):
    needs_fp8("layer")
    half, eight = layer_in("bf16", "fp32"), layer_in("fp8", "bf16")
    record("layer", "python bench.py layer", runs=[half, eight], speedup=half["ms"] / eight["ms"],
           memory=eight["peak_bytes"] / half["peak_bytes"])


# --- the quality of FP8 -----------------------------------------------------------------------------------------------

def torch_sources(folder):
    """The Python sources of the installed torch, some 45 MB of text that every machine of ours has, as a folder."""
    root = Path(torch.__file__).parent
    for path in root.rglob("*.py"):
        target = Path(folder) / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def fp8_quality(options, limit=285):
    """configs/gpu.py, 32 sequences a step, in BF16, in BF16 with another seed (what a difference may be worth), and in
    FP8 with moments in BF16, at the same time on one GPU: the training loss, and its mean over the last 100 steps that
    all three have done within `limit` seconds. --data=FOLDER: other text than torch's own sources."""
    needs_fp8("fp8_quality")
    jobs = {"BF16": ["--precision=bf16"], "BF16, another seed": ["--precision=bf16", "--seed=1338"],
            "FP8": ["--precision=fp8", "--moments=bf16"]}
    with tempfile.TemporaryDirectory() as folder:
        data = options.get("data") or torch_sources(f"{folder}/torch")
        common = ["configs/gpu.py", f"--data={data}", "--batch_size=32", "--eval_interval=0", "--save_interval=0"]

        def one(job):
            number, changes = job
            try:
                train(*common, *changes, f"--out_dir={folder}/{number}", limit=limit, OMP_NUM_THREADS="4")
            except subprocess.TimeoutExpired:
                print(f"{' '.join(changes)}: cut off after {limit} s", flush=True)
            return lines(f"{folder}/{number}")
        with ThreadPoolExecutor(len(jobs)) as pool:
            done = list(pool.map(one, enumerate(jobs.values())))
        identity = Data(configs.load(common)).identity                                         # from the cache by now
    steps, runs = min(len(rows) for rows, _ in done), []
    for (name, changes), (rows, evals) in zip(jobs.items(), done):
        loss = statistics.mean(r["loss"] for r in rows[:steps][-100:])
        first = runs[0]["loss"] if runs else loss
        runs.append({"name": name, "changes": changes, "loss": loss, "difference": loss / first - 1,
                     "val_loss": evals[-1]["val_loss"] if evals else None, "seconds": rows[-1]["time"],
                     "tokens_per_s": statistics.median(r["tokens_per_s"] for r in rows),
                     "curve": [round(r["loss"], 5) for r in rows[:steps]]})
        print({k: v for k, v in runs[-1].items() if k != "curve"}, flush=True)
    record("fp8_quality", "python bench.py fp8_quality", steps=steps, data=identity, runs=runs)


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
    """A chrome trace -> [{"stream", "what", "start", "end"} of each kernel and copy] in ms from the first."""
    events = [e for e in json.loads(Path(trace).read_text())["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy")]
    began = min(e["ts"] for e in events)
    return [{"stream": e["args"]["stream"], "what": e["cat"], "start": (e["ts"] - began) / 1e3,
             "end": (e["ts"] - began + e["dur"]) / 1e3} for e in sorted(events, key=lambda e: e["ts"])]


def covered(spans, by):
    """How much of some [(start, end)] others lie over."""
    total, ends = 0.0, -math.inf
    for start, end in sorted(by):                                              # joined, so that nothing counts twice
        start, ends = max(start, ends), max(end, ends)
        total += sum(max(0.0, min(end, e) - max(start, s)) for s, e in spans)
    return total


def lanes(timeline):
    """What `intervals` found -> the spans of kernels on the stream that has most of them and of copies on others, and
    how much of these lies under those."""
    main = Counter(e["stream"] for e in timeline if e["what"] == "kernel").most_common(1)[0][0]
    kernels = [(e["start"], e["end"]) for e in timeline if e["what"] == "kernel" and e["stream"] == main]
    copies = [(e["start"], e["end"]) for e in timeline if e["what"] == "gpu_memcpy" and e["stream"] != main]
    return {"under_kernels": covered(copies, kernels) / sum(end - start for start, end in copies),
            **{name: [[round(t, 3) for t in span] for span in joined(spans)]
               for name, spans in (("kernels", kernels), ("copies", copies))}}


def pair(c, device, detours=(2, 3, 5, 1)):
    """Yields, as they come: (ms of a pair of chunks of two blocks each whose exchanges take no time; for each number of
    detours a row: ms in turns and one after the other, and the share that turns hide; on a GPU the timeline of a pair
    in turns)."""
    tokens, ranks = torch.randint(c.vocab_size, (4, c.seq_len + 1), device=device), moe.ExpertRanks(1, 1, 0)
    with device:
        stages = model.stages(c, 2, [0, 1])
    for block in (block for s in stages for block in s.layers.values()):
        block.ffn.ranks = ranks
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step(overlap, watch):
        """One batch, its pairs run by watch(run, step)."""
        pipe = dualpipe.DualPipe("dualpipev", stages, stages[1].criterion, stages[0].like(1), overlap=overlap)
        run = pipe.run
        pipe.run = lambda step: watch(run, step) if step.kind == "FB" else run(step)
        for s in stages:
            s.begin(([len(tokens) * c.seq_len], len(tokens)))
            s.zero_grad()
        pipe.step(len(tokens), tokens, tokens)

    def milliseconds(overlap):
        times = []

        def watch(run, step):
            sync()
            began = time.perf_counter()
            run(step)
            sync()
            times.append((time.perf_counter() - began) * 1e3)

        step(overlap, watch)
        return statistics.median(times)

    Detour.times = 0
    milliseconds(True)                                                         # kernels are compiled
    without, rows, timeline = milliseconds(True), [], []
    for Detour.times in detours:
        turns, apart = milliseconds(True), milliseconds(False)
        rows.append({"detours": Detour.times, "in_turns_ms": turns, "one_after_the_other_ms": apart,
                     "travel_ms": apart - without, "hidden": 1 - (turns - without) / (apart - without)})
        yield without, rows, timeline
    if device.type == "cuda":
        # An exchange for each segment, half as long: what V3 has on its own cluster (cluster.py).
        Detour.times = min(rows, key=lambda row: abs(row["travel_ms"] / without - 0.5))["detours"]

        def watch(run, step):
            with torch.profiler.profile() as profiler:
                run(step)
                sync()
            with tempfile.TemporaryDirectory() as folder:
                profiler.export_chrome_trace(f"{folder}/trace.json")
                timeline[:] = intervals(f"{folder}/trace.json")

        step(True, watch)
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
                numbers["timeline"] = {"detours": Detour.times, **lanes(timeline)}
                print(f"timeline: {numbers['timeline']['under_kernels']:.1%} of the copies under kernels", flush=True)
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


# --- the README -------------------------------------------------------------------------------------------------------

def load(section):
    path = RESULTS / f"{section}.json"
    return json.loads(path.read_text()) if path.exists() else None


def clusters():
    """V3's own 2048 GPUs under each schedule, as cluster.py plans them."""
    v3 = configs.read(HERE / "configs/v3_671b.py")
    v3 = configs.Config(**{key: value for key, (value, _) in v3.items()}).replace(precision="fp8", moments="bf16")
    a, lines = arithmetic(v3), ["| schedule | a step, s | bubble | exchanges hidden, s | exposed | tokens/s a GPU | "
                                "weights, gradients, moments, GB | activations |", "|---|---|---|---|---|---|---|---|"]
    for kind in dualpipe.KINDS:
        n, _ = cluster.plan(v3, kind, 16, 128, 64, a=a)
        lines.append(f"| {kind} | {n['step']:.1f} | {n['bubble']:.1%} | {n['hidden']:.1f} | {n['exposed']:.1f} | "
                     f"{n['tokens_per_s']:,.0f} | {n['weights'] / 1e9:.0f} | {n['activations'] / 1e9:.0f} |")
    return "\n".join(lines)


def tables():
    """{name of a marked place in the README: its text}, from the committed results."""
    t, c, a, d, s = load("tiny"), load("char"), load("ablations"), load("decode"), load("speculation")
    attention, low, eight, part, quality = (load(n) for n in ("attention", "fp8_loss", "fp8", "layer", "fp8_quality"))
    p, o, small = load("pipeline"), load("overlap"), load("fp8_tiny")
    mean = lambda runs, key: statistics.mean(r[key] for r in runs)
    spread = lambda runs, key: statistics.stdev(r[key] for r in runs) if len(runs) > 1 else 0.0
    vio = lambda runs: f"{mean(runs, 'max_vio'):.2f}" if mean(runs, "max_vio") else "-"
    out = {"dualpipe": f"```\n{dualpipe.table(dualpipe.parse([]))}\n```", "cluster": clusters()}
    if t:
        out["tiny"] = (
            f"| | |\n|---|---|\n| time, process start to last line | {t['seconds'] / 60:.1f} minutes "
            f"({t['tokens_per_s']:,.0f} tokens/s) |\n| validation | {t['val_bpb']:.3f} bits per byte, "
            f"{t['ratio']:.3f}x of `xz -9e` ({t['xz_bpb']:.3f}) |\n"
            f"| peak memory | {t['peak_bytes'] / 1e9:.2f} GB |\n| machine | {t['cpu']}, torch {t['torch']} |")
        out["sample"] = "```python\n" + t["sample"].strip() + "\n```"
    if t and c:
        row = lambda name, r, final: f"| {name} | " + " | ".join(
            f"{r['losses'][s]:.2f}" if s in r["losses"] else "" for s in ("100", "200", "400", "500", "1000")) \
            + f" | {final} | {r['python']} | `{r['data']['corpus_sha256'][:12]}` |"
        out["normal"] = "\n".join([
            "| config | step 100 | 200 | 400 | 500 | 1000 | validation | Python | corpus sha256 |",
            "|---|---|---|---|---|---|---|---|---|",
            row("tiny", t, f"{t['val_bpb']:.3f} bits per byte"),
            row("char (tiny Shakespeare)", c, f"{c['runs'][0]['final_loss']:.3f} nats per byte")])
    if c:
        out["char"] = "\n".join([
            "| | validation loss, nats per byte | seconds |", "|---|---|---|",
            *(f"| nanoGPT, 2000 steps | {r['nanogpt_loss']:.4f} | {r['nanogpt_seconds']:.1f} |\n"
              f"| nanoV3, step {r['step']}, its first evaluation at or under that | "
              f"{dict(map(tuple, c['evals']))[r['step']]:.4f} | {r['seconds']:.1f} ({r['ratio']:.2f}x) |"
              for r in c["runs"])])
    if a:
        out["ablations"] = "\n".join([
            "| variant | validation loss (mean ± std of the seeds) | MaxVio | seconds |", "|---|---|---|---|",
            *(f"| {name} | {mean(v['runs'], 'val_loss'):.4f} ± {spread(v['runs'], 'val_loss'):.4f} | "
              f"{vio(v['runs'])} | {mean(v['runs'], 'seconds'):.0f} |"
              for name, v in a["variants"].items())])
    if attention:
        cell = lambda r, way: " | ".join(
            f"{r['Triton, ' + way][key + '_ms']:.2f} ({r[way + ', times cuDNN'][key]:.2f}x)"
            for key in ("forward", "backward"))
        out["attention"] = "\n".join([
            "| batch, heads, tokens | forward, ms | backward, ms | kernel alone: forward | backward | memory |",
            "|---|---|---|---|---|---|",
            *(f"| {r['B']}, {r['H']}, {r['T']:,} | {cell(r, 'block')} | {cell(r, 'kernel')} | "
              f"{r['block, times cuDNN']['memory']:.2f}x |" for r in attention["shapes"]), "",
            f"{attention['gpu']}, dims {'/'.join(map(str, attention['shapes'][0]['dims']))}, BF16. In brackets: speed "
            f"against cuDNN; memory: the peak of the attention block, against the same. A V3 attention layer of 4,096 "
            f"tokens keeps " + "; ".join(f"{r['kept_bytes'] / 1e6:,.0f} MB with {name} ({r['ms']:.1f} ms)"
                                         for name, r in attention["recomputation"].items()) + ".", "",
            "| | torch: forward, backward, ms | torch.compile | Triton |", "|---|---|---|---|",
            *(f"| {name} | " + " | ".join(f"{r['forward_ms']:.3f}, {r['backward_ms']:.3f}" for r in forms.values())
              + " |" for name, forms in attention["small_ops"].items())])
    if d:
        shapes, error = d["attention"]["shapes"], d["attention"]["error"]
        out["decode"] = "\n".join([
            "| batch, heads, tokens held, queries | replayed, us | torch.compile | launched, us | torch.compile | "
            "cache, TB/s | TFLOP/s | FP8 cache |", "|---|---|---|---|---|---|---|---|",
            *(f"| {r['batch']}, {r['heads']}, {r['tokens']:,}, {r['queries']} | {r['us']:.0f} | "
              f"{r['compiled_us']:.0f} ({r['speedup']:.1f}x) | {r['launched_us']:.0f} | "
              f"{r['compiled_launched_us']:.0f} ({r['compiled_launched_us'] / r['launched_us']:.1f}x) | "
              f"{r['cache_tb_s']:.2f} | {r['tflops']:.0f} | {r['fp8_us']:.0f} |" for r in shapes), "",
            f"{d['gpu']}, V3's dims. Relative error: {error['triton']:.1e} (plain torch in BF16 {error['torch']:.1e}), "
            f"with an FP8 cache {error['triton_fp8']:.1e}.", "",
            "| generation, `config/bench_1b.py`, random weights | tokens/s | if it only read its weights and cache |",
            "|---|---|---|",
            *(f"| batch {g['batch']} | {g['tokens_per_s']:,.0f} | {g['limit_tokens_per_s']:,.0f} |"
              for g in d["generation"])])
    if low:
        of = lambda precision, key: [r[key] for r in low["runs"] if r["precision"] == precision]
        against = lambda precision: statistics.mean(of(precision, "loss")) / statistics.mean(of("bf16", "loss")) - 1
        names = {"fp32": "FP32", "bf16": "BF16", "fp8_reference": "FP8, the reference"}
        out["fp8_loss"] = "\n".join([
            "| products | training loss, last 100 steps, of each seed | against BF16 | validation loss |",
            "|---|---|---|---|",
            *(f"| {name} | {', '.join(f'{x:.4f}' for x in of(key, 'loss'))} | {against(key):+.2%} | "
              f"{', '.join(f'{x:.4f}' for x in of(key, 'val_loss'))} |" for key, name in names.items())])
    if eight and "quantization" in eight:
        ratio = lambda r, ours, theirs, what: f"{r[ours]:.0f}" + (
            f" ({r[ours] / r[theirs]:.2f}x {what})" if theirs in r else "")
        copy = eight["quantization"]["copy"]
        out["fp8_kernels"] = "\n".join([
            "| Linear: tokens, in, out | Fprop, TFLOP/s | against BF16 | Wgrad | added to a gradient |",
            "|---|---|---|---|---|",
            *(f"| {r['name']}: {r['M']}, {r['K']}, {r['N']} | {ratio(r, 'triton', 'cublas', 'cuBLASLt')} | "
              f"{r['triton'] / r['bf16']:.2f}x | {ratio(r, 'wgrad_triton', 'wgrad_cublas', 'cuBLASLt')} | "
              f"{ratio(r, 'wgrad_triton_add', 'wgrad_cublas_add', 'cuBLASLt and a sum')} |" for r in eight["products"]),
            "", "| few rows: rows, in, out | microseconds | cuBLASLt | BF16 |", "|---|---|---|---|",
            *(f"| {r['M']}, {r['K']}, {r['N']} | {r['triton']:.1f} | {r['cublas']:.1f} | {r['bf16']:.1f} |"
              for r in eight["few"]),
            "", "| in one pass | TB/s | against a copy | against torch.compile |", "|---|---|---|---|",
            *(f"| {name} | {r['triton'] / 1e12:.2f} | {r['triton'] / copy:.2f}x | "
              + (f"{r['triton'] / r['compiled']:.2f}x" if "compiled" in r else "") + " |"
              for name, r in eight["quantization"]["passes"].items())])
    if eight and "adamw" in eight:
        row = lambda what, r: f"| {what} | {r['bf16']:.3f} | {r['fp8']:.3f} | {r['bf16'] / r['fp8']:.2f}x |"
        every = {key: sum(r[key] for r in eight["linears"]) for key in ("bf16", "fp8")}
        out["fp8_linears"] = "\n".join([
            "| Linear: in, out | BF16, ms | FP8, ms | speed |", "|---|---|---|---|",
            *(row(f"{r['name']}: {r['in']}, {r['out']}", r) for r in eight["linears"]), row("together", every),
            *(row(f"{r['in']}, {r['out']}", r) for r in eight["square"]), "",
            f"{eight['gpu']}. AdamW, bytes read and written per second: " + "; ".join(
                f"{name} moments {r['bytes_per_s'] / 1e12:.2f} TB/s ({r['ms']:.2f} ms)"
                for name, r in eight["adamw"].items()) + "."])
    if part:
        sides, GB = part["runs"], lambda size: f"{size / 1e9:.2f}"
        line = lambda name, value: f"| {name} | " + " | ".join(map(value, sides)) + " |"
        out["layer"] = "\n".join([
            line("", lambda r: f"{r['precision'].upper()}, {r['moments'].upper()} moments"), "|---|---|---|",
            line("ms a step, 4096 tokens", lambda r: f"{r['ms']:.1f}"),
            line("tokens/s", lambda r: f"{r['tokens_per_s']:,.0f}"),
            line("TFLOP/s of the model", lambda r: f"{r['tflops']:.0f}"),
            line("GPU hours per trillion tokens", lambda r: f"{r['gpu_hours_per_trillion_tokens'] / 1e3:.0f}K"),
            line("peak memory, GB", lambda r: GB(r["peak_bytes"])),
            *(line(f"... {what}", lambda r, what=what: GB(r["bytes"][what])) for what in sides[0]["bytes"]), "",
            f"{part['gpu']}. FP8 against BF16: {part['speedup']:.2f}x the speed, {part['memory']:.2f}x the memory."])
    if quality:
        out["fp8_quality"] = "\n".join([
            "| | training loss, mean of the last 100 steps | against the first | validation loss | tokens/s |",
            "|---|---|---|---|---|",
            *(f"| {r['name']} | {r['loss']:.4f} | {r['difference']:+.2%} | "
              + (f"{r['val_loss']:.4f}" if r["val_loss"] else "-") + f" | {r['tokens_per_s']:,.0f} |"
              for r in quality["runs"]), "",
            f"{quality['gpu']}, the three at once, {quality['steps']} steps of 32 sequences.", "",
            "![loss in BF16 and FP8, and their distance](results/fp8_quality.png)"])
    if small:
        whole, low8 = small["runs"]
        out["fp8_tiny"] = (
            f"The default job, cut to 150 steps: {whole['loss']:.4f} nats per token in FP32 and {low8['loss']:.4f} in "
            f"FP8 ({small['difference']:+.2%}), training loss of the last 50 steps.")
    for place, section in {"fp8_kernels": "fp8", "fp8_linears": "fp8", "layer": "layer", "fp8_quality": "fp8_quality",
                           "fp8_tiny": "fp8_tiny"}.items():
        out.setdefault(place, f"(Not measured yet: `python bench.py {section}`.)")
    if p:
        cell = lambda r: "" if r is None else f"{min(r['measured']):.2f}" + (
            f" ({min(r['measured']) / r['simulated'] - 1:+.1%})" if "simulated" in r else "")
        find = lambda name, ranks: next((r for r in p["rows"] if (r["schedule"], r["ranks"]) == (name, ranks)), None)
        theirs = {"1f1b": "Schedule1F1B", "dualpipev": "ScheduleDualPipeV", "zbv": "ScheduleZBVZeroBubble"}
        out["pipeline"] = "\n".join([
            "| schedule | 4 ranks, 10 micro-batches: simulated, s | ours | torch's "
            "| 8 ranks, 20 micro-batches: simulated | ours | torch's |", "|---|---|---|---|---|---|---|",
            *(f"| {kind} | " + " | ".join(
                f"{'%.2f' % r['simulated'] if (r := find(kind, ranks)) else ''} | {cell(r)} | "
                f"{cell(find(theirs.get(kind), ranks))}" for ranks in (4, 8)) + " |"
              for kind in (*dualpipe.KINDS, "zbv"))])
    if o:
        out["overlap"] = "\n".join([
            "| exchanges / arithmetic | no exchanges, ms | one after the other | in turns | hidden |",
            "|---|---|---|---|---|",
            *(f"| {r['travel_ms'] / o['without_ms']:.2f} | {o['without_ms']:.1f} | {r['one_after_the_other_ms']:.1f} | "
              f"{r['in_turns_ms']:.1f} | {r['hidden']:.0%} |" for r in sorted(o["rows"], key=lambda r: r["travel_ms"])),
            "", f"{o['gpu']}, two of {o['shape']}, in each chunk." + (
                f" In the figure {o['timeline']['under_kernels']:.0%} of the copies lie under kernels."
                if "timeline" in o else "")])
    if m := load("moe"):
        times = lambda r, form: (r[form]["forward_ms"], r[form]["both_ms"])
        cell = lambda r, form: "{:.2f}, {:.2f}".format(*times(r, form))
        beside = lambda r, form: f"{cell(r, form)} ({{:.2f}}x, {{:.2f}}x) | {{:.2f}}x".format(
            *(theirs / ours for theirs, ours in zip(times(r, "compiled"), times(r, form))),
            r[form]["kept_bytes"] / r["compiled"]["kept_bytes"])
        out["moe"] = "\n".join([
            "| tokens, experts, active, dim, inter | torch.compile: forward, both, ms | BF16 | kept | FP8 | kept |",
            "|---|---|---|---|---|---|",
            *(f"| {r['name']}: {r['tokens']:,}, {r['experts']}, {r['chosen']}, {r['dim']}, {r['inter']} | "
              f"{cell(r, 'compiled')} | {beside(r, 'Triton')} | {beside(r, 'Triton, FP8')} |" for r in m["layers"]), "",
            "| TFLOP/s of the first product alone | F.grouped_mm | BF16 | FP8 | FP8 and quantizing |",
            "|---|---|---|---|---|",
            *(f"| {r['name']} | {r['grouped_mm']:.0f} | {r['bf16']:.0f} | {r['fp8']:.0f} | {r['fp8_quantizing']:.0f} |"
              for r in m["products"]), "", f"{m['gpu']}, {m['torch']}; casting and quantizing the weights included."])
    if m := load("step"):
        out["step"] = "\n".join([
            "| a training step of config/bench_1b.py | tokens/s | peak memory, GB |", "|---|---|---|",
            *(f"| {'--compile=True' if r['compiled'] else 'eager'} | {r['tokens_per_s']:,.0f} | "
              f"{r['peak_bytes'] / 1e9:.1f} |" for r in m["runs"]), "",
            f"{m['gpu']}, {m['runs'][0]['tokens']:,} tokens."])
    if s:
        rows = lambda s: "\n".join([
            "| drafts | of them accepted | tokens per forward pass | time of the drafts / of a plain step | tokens/s | "
            "the same text |", "|---|---|---|---|---|---|",
            f"| 0 | | 1 | | {s['plain_tokens_per_s']:,.0f} | |",
            *(f"| {m['drafts']} | {m['acceptance']:.0%} | {m['tokens_per_forward']:.2f} | "
              f"{m['draft_over_plain']:.2f} | {m['tokens_per_s']:,.0f} ({m['speedup']:.2f}x) | "
              f"{m['identical']} of {s['prompts']} |"
              for m in s["modes"])])
        out["speculation"] = rows(s)
        if on_gpu := load("speculation_gpu"):
            of = on_gpu["config"]
            out["speculation"] += (f"\n\nThe same on an {on_gpu['gpu']}, {of['n_layers']} layers of {of['dim']} dims, "
                                   f"trained for {of['steps']} steps:\n\n{rows(on_gpu)}")
    return out


def fill(text):
    """The README with each marked place filled from the results."""
    for name, table in tables().items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = text.split(start)
        text = head + start + "\n" + table + "\n" + end + rest.split(end)[1]
    return text


def readme(options):
    path = HERE / "README.md"
    write_atomic(path, fill(path.read_text(encoding="utf-8")))
    print("README.md: filled from results/")
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figure needs matplotlib: pip install -r requirements-extra.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    t = load("tiny")
    if not t:
        raise UserError("no results/tiny.json: python bench.py tiny makes it")
    step, loss, mtp, vio = zip(*t["curve"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    left.plot(step, loss, label="next token", linewidth=1)
    left.plot(step, mtp, label="the token after (MTP)", linewidth=1)
    left.set(xlabel="step", ylabel="nats per token", title="python train.py config/tiny.py: loss")
    left.legend()
    right.plot(step, vio, linewidth=1, color="tab:green")
    right.set(xlabel="step", ylabel="busiest expert / mean - 1", title="load, balanced by the gate bias",
              ylim=(0, None))
    figure.tight_layout()
    figure.savefig(RESULTS / "tiny.png", dpi=110)

    sizes = cache_per_token(configs.load(["configs/v3_671b.py"]))
    figure, axes = pyplot.subplots(figsize=(6, 1.8))
    bars = axes.barh(list(sizes), [size / 1e3 for size in sizes.values()])
    axes.bar_label(bars, [f"{size / 1e3:,.0f} KB" for size in sizes.values()], padding=4)
    axes.set(title="cache per token, DeepSeek-V3's shape", xscale="log", xlim=(10, 20_000))
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(RESULTS / "cache.png", dpi=110)
    call(["dualpipe.py", f"--png={RESULTS / 'dualpipe.png'}"], HERE)

    if "timeline" in (o := load("overlap") or {}):
        figure, axes = pyplot.subplots(figsize=(8, 1.6))
        for row, (name, color) in enumerate((("kernels", "tab:blue"), ("copies", "tab:orange"))):
            axes.broken_barh([(start, end - start) for start, end in o["timeline"][name]], (0.6 - row, 0.8),
                             color=color)
        axes.set(yticks=[1, 0], yticklabels=["arithmetic", "exchanges"], xlabel="ms",
                 title="a forward and a backward chunk in turns")
        figure.tight_layout()
        figure.savefig(RESULTS / "overlap.png", dpi=110)

    figure, axes = pyplot.subplots(figsize=(6, 3))
    errors = load("fp8_error")["errors"]
    for numbers, style in zip(dict.fromkeys(r["numbers"] for r in errors), ("-", "--")):
        rows = [r for r in errors if r["numbers"] == numbers]
        for key, color in (("not_promoted", "tab:red"), ("promoted", "tab:blue")):
            axes.plot([r["K"] for r in rows], [r[key] for r in rows], style, color=color,
                      label=f"{key.replace('_', ' ')}, {numbers}")
    axes.set(yscale="log", xlabel="length of the product (K)", ylabel="relative error",
             title="FP8 products summed in 14 bits")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "fp8_error.png", dpi=110)
    if load("loads"):
        draw_loads(pyplot)

    if quality := load("fp8_quality"):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
        curves = {r["name"]: r["curve"] for r in quality["runs"]}
        for name, curve in curves.items():
            left.plot(curve, label=name, linewidth=0.7)
        left.set(xlabel="step", ylabel="nats per token", title="config/gpu.py: training loss")
        left.legend()
        smooth = lambda curve: [statistics.mean(curve[i - 50:i]) for i in range(50, len(curve) + 1)]
        first, *others = (smooth(curve) for curve in curves.values())
        for name, other in zip(list(curves)[1:], others):
            right.plot(range(50, 50 + len(first)), [100 * (b / a - 1) for a, b in zip(first, other)], label=name)
        right.axhspan(-0.25, 0.25, color="0.9")
        right.set(xlabel="step", ylabel="% above BF16, mean of 50 steps", title="and its distance from BF16")
        right.legend()
        figure.tight_layout()
        figure.savefig(RESULTS / "fp8_quality.png", dpi=110)


SECTIONS = {"tiny": tiny, "char": char, "ablations": ablations, "speculation": speculation, "loads": loads,
            "attention": attention, "decode": decode, "moe": moe_on_a_gpu, "step": step, "fp8_error": fp8_error,
            "fp8_tiny": fp8_tiny, "fp8_loss": fp8_loss, "fp8": fp8_on_a_gpu, "layer": layer,
            "fp8_quality": fp8_quality, "pipeline": pipeline, "overlap": overlap, "readme": readme}


def main(argv):
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        return 0
    if argv[0] not in SECTIONS:
        raise UserError(f"bench.py {argv[0]}: there are the sections {', '.join(SECTIONS)}")
    options = {}
    for arg in argv[1:]:
        key, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals or key not in ("data", "nanogpt", "out_dir", "seeds", "repeats"):
            raise UserError(f"{arg}: options are --data=FILE --nanogpt=DIR --out_dir=RUN --seeds=N --repeats=N")
        if key in ("seeds", "repeats") and not (value.isdigit() and int(value)):
            raise UserError(f"{arg}: a whole number from 1 up")
        options[key] = value
    SECTIONS[argv[0]](options)
    return 0


if __name__ == "__main__":
    configs.cli(main)
