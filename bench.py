"""Measured, not claimed: python bench.py SECTION writes results/SECTION.json, and the README's figures come from there.

    tiny        the default job: python train.py config/tiny.py, as a user runs it
    char        time to nanoGPT's final loss: python bench.py char --data=FILE --nanogpt=CLONE
    ablations   MTP, balancing, dense against a mixture, on char: python bench.py ablations --data=FILE
    speculation drafted against plain generation (sample.py --speculate), on held-out text, by a model trained first (on
                a GPU configs/bench_1b.py's, 1000 steps), or by the run --out_dir=RUN, of a context of 256 tokens
    loads       which experts work: over the steps of a training run, and on library code, tests and documentation
    decode      attention over the latent cache against torch.compile; tokens/s of generation (needs a GPU)
    attention   training attention, norm, RoPE and recomputation on a GPU: python bench.py attention
    moe         the routed experts against torch.compile of F.grouped_mm (a Hopper GPU); --shapes=V3,bench_1b,V2-Lite
                and --parts=products,layers run some of it
    step        a training step of configs/bench_1b.py on random tokens, beside transformers' (a GPU); --parts=graph,...
    fp8_error   what promotion to FP32 saves in a product of FP8 numbers, against its length K
    fp8_tiny    the default job's first 150 steps in FP32 and FP8 (the reference)
    moments     the default job's first 240 steps with AdamW's moments in FP32 and BF16
    fp8_loss    char in FP32, BF16 and FP8 (the reference): python bench.py fp8_loss --data=FILE
    pipeline    every schedule executed with stages that sleep, against its simulation and torch.distributed.pipelining
    overlap     what a pair of DualPipe's chunks hides on one GPU: V3's blocks, copies in place of the network
    cluster     2, 4 or 8 GPUs: parity, exchanges, overlap, scaling, a rank that dies; --parts=A,B takes some of these,
                --device=cpu shows on two processes that it runs
    fp8         FP8's quantization, products, Linears and optimizer against torch's, at V3's shapes (a Hopper GPU);
                --parts=products,few,linears,square,adamw,quantization runs some of it, and leaves the others' results
    layer       one MoE layer of V3 as one GPU of 64 has it: FP8 against BF16 (a Hopper GPU)
    fp8_quality configs/gpu.py in BF16 and FP8, two seeds each (a Hopper GPU); --steps=N, --parts=A,B: other runs
    memory      what each rank of a run holds, against the plan, by category: of small models on gloo; on a GPU of
                configs/bench_1b.py, with the allocator's peak
    scaling     a step of the default job: a plain loop, train.py on one process and on two, with as much work for each
    readme      put the results into the README's marked places, and draw its figures (needs matplotlib)

The sections of kernels, pipelines and tables are bench_*.py's; measure.py has what all of them measure with.

Every section runs the commands that a user would run, each in a process of its own, and records the device, the
versions, the command and the date beside what came out.
"""
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import backend
import configs
import sample
from bench_cluster import cluster_of_gpus
from bench_fp8 import fp8_error, fp8_loss, fp8_on_a_gpu, fp8_quality, fp8_tiny, moments
from bench_mla import attention, decode
from bench_moe import layer, moe_on_a_gpu, step
from bench_pipeline import overlap, pipeline
from bench_ranks import memory, scaling
from bench_readme import readme
from configs import UserError
from data import Data, documents, split
from experts_few import MAX_TOKENS
from measure import HERE, call, checkpoints_of, lines, record, train
from parallel import Mesh, latest, read_state
from train import Training

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
        run = lambda: step(batch, h, *kept)
        return batch.graph(run) if backend.use_graph(v3.config, batch.tokens, MAX_TOKENS) else run

    calls = {"plain": part(0, lambda batch, *_: batch.step()),
             "main": part(drafts, lambda batch, *_: v3.logits(v3.hidden(batch.tokens, batch.cache)[0]).argmax(-1)),
             "draft": part(drafts, lambda batch, *kept: batch.draft(*kept))}
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, run in calls.items():                        # in turn: what disturbs the machine disturbs all
            began = time.perf_counter()
            run()
            if v3.embed.weight.is_cuda:
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: min(t) for name, t in times.items()}


def trained_here(c):
    """A Config's model after all its steps, and its Data: train.run's loop without a checkpoint, which for
    configs/bench_1b.py would be 10 GB and take longer than the training."""
    data, device = Data(c), backend.device(c.device)
    training = Training(c, device, Mesh())
    for i in range(c.max_steps):
        parts = training.forward_backward(data.batch(i).to(device), i)
        training.sum_gradients()
        training.update(i)
        if (i + 1) % 100 == 0:
            print(f"step {i + 1}: loss {parts['loss'].item():.3f}, mtp {parts['mtp_loss'].item():.3f}", flush=True)
    return training.modules[0].eval(), data


def speculation(options):
    """The first 64 bytes of each of 50 held-out documents and the 128 tokens behind them, greedily, one by one: by the
    model of a run, or by one that is trained first, on a GPU configs/bench_1b.py's with MTP."""
    out_dir = options.get("out_dir", "a model trained here")
    if "out_dir" in options:
        state = read_state(latest(out_dir))
        v3, tokenizer, _ = sample.load(out_dir)
        steps, identity = state["step"], state["data"]
    else:                                                      # twice the default's context, for as many tokens a step
        flags = ["configs/bench_1b.py", "--vocab_size=8192", "--n_mtp=1", "--moments=bf16", "--batch_size=4",
                 "--micro_batch_size=4"] if torch.cuda.is_available() else \
            ["configs/tiny.py", "--seq_len=256", "--batch_size=16", "--micro_batch_size=16"]
        v3, data = trained_here(configs.load(flags))
        v3 = sample.cast(v3) if torch.cuda.is_available() else v3                        # as sample.py would load it
        tokenizer, steps, identity = data.tokenizer, v3.config.max_steps, data.identity
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
                   "steps": steps}, plain_tokens_per_s=tokens / plain, modes=modes, data=identity)


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


SECTIONS = {"tiny": tiny, "char": char, "ablations": ablations, "speculation": speculation, "loads": loads,
            "attention": attention, "decode": decode, "moe": moe_on_a_gpu, "step": step, "fp8_error": fp8_error,
            "fp8_tiny": fp8_tiny, "moments": moments, "fp8_loss": fp8_loss, "fp8": fp8_on_a_gpu, "layer": layer,
            "fp8_quality": fp8_quality, "pipeline": pipeline, "overlap": overlap, "cluster": cluster_of_gpus,
            "memory": memory, "scaling": scaling, "readme": readme}
OPTIONS = {"data": "FILE", "nanogpt": "DIR", "out_dir": "RUN", "seeds": "N", "repeats": "N", "parts": "A,B",
           "shapes": "A,B", "steps": "N", "device": "cpu"}

TAKES = {"char": ("data", "nanogpt", "repeats"), "ablations": ("data", "seeds"), "fp8_loss": ("data", "seeds"),
         "fp8_quality": ("data", "parts", "steps"), "speculation": ("out_dir",), "loads": ("out_dir",),
         "pipeline": ("repeats",),
         "scaling": ("repeats",), "moe": ("parts", "shapes"), "step": ("parts",), "fp8": ("parts",),
         "cluster": ("parts", "device")}


def main(argv):
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        return 0
    if argv[0] not in SECTIONS:
        raise UserError(f"bench.py {argv[0]}: there are the sections {', '.join(SECTIONS)}")
    options = {}
    for arg in argv[1:]:
        key, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals or key not in OPTIONS:
            raise UserError(f"{arg}: options are {' '.join(f'--{name}={value}' for name, value in OPTIONS.items())}")
        if key not in TAKES.get(argv[0], ()):
            takes = " ".join(f"--{name}={OPTIONS[name]}" for name in TAKES.get(argv[0], ()))
            raise UserError(f"{arg}: bench.py {argv[0]} takes {takes or 'no options'}")
        if key in ("seeds", "repeats", "steps") and not (value.isdigit() and int(value)):
            raise UserError(f"{arg}: a whole number from 1 up")
        options[key] = value
    SECTIONS[argv[0]](options)
    return 0


if __name__ == "__main__":
    configs.cli(main)
