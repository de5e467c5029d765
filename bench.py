"""Measured, not claimed: python bench.py SECTION writes results/SECTION.json, and the README's figures come from there.

    tiny        the default job: python train.py config/tiny.py, as a user runs it
    char        time to nanoGPT's final loss: python bench.py char --data=FILE --nanogpt=CLONE
    ablations   MTP, balancing, dense against a mixture, on char: python bench.py ablations --data=FILE
    attention   training attention, norm, RoPE and recomputation on a GPU: python bench.py attention
    readme      put the results into the README's marked places, and draw its figure (needs matplotlib)

Every section runs the commands that a user would run, each in a process of its own, and records the device, the
versions, the command and the date beside what came out.
"""
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

import backend
import configs
import mla
from configs import UserError
from model import Block
from parallel import write_atomic

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


def train(*args, **env):
    """python train.py ARGS in a process of its own. UserError if it fails."""
    run = subprocess.run([sys.executable, "train.py", *args], cwd=HERE, timeout=1800, env={**os.environ, **env},
                         stdout=subprocess.DEVNULL if env else None)
    if run.returncode:
        raise UserError(f"train.py {' '.join(args)} ended with exit code {run.returncode}")


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
        sample = subprocess.run([sys.executable, "sample.py", f"--out_dir={folder}/tiny", "--prompt=class", "--seed=1",
                                 "--max_tokens=120"], cwd=HERE, capture_output=True, text=True, timeout=300, check=True)
    data, final = state["data"], evals[-1]
    record("tiny", "python train.py config/tiny.py", seconds=seconds, val_bpb=final["val_bpb"],
           xz_bpb=8 * data["val_xz_bytes"] / data["val_bytes"],
           ratio=final["val_bpb"] / (8 * data["val_xz_bytes"] / data["val_bytes"]), data=data,
           tokens_per_s=statistics.median(r["tokens_per_s"] for r in rows), steps=len(rows),
           peak_bytes=peak, losses=checkpoints_of(rows), final_loss=rows[-1]["loss"],
           evals=[{k: e[k] for k in ("step", "time", "val_loss", "val_bpb")} for e in evals], sample=sample.stdout,
           curve=[[r["step"], r["loss"], r["mtp_loss"], r["max_vio"]] for r in rows[::max(1, len(rows) // 200)]])


# --- char: against nanoGPT's CPU recipe -------------------------------------------------------------------------------

# The command that nanoGPT's README gives for a machine without a GPU.
NANOGPT = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
           "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
           "--lr_decay_iters=2000 --dropout=0.0")

# Its checkpoint on the whole held-out tenth, in non-overlapping windows of its own context.
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
    """Train nanoGPT's recipe on `data` in a copy of the clone: (wall seconds, nats per character)."""
    here = Path(folder) / "nanogpt"
    shutil.copytree(clone, here, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(data, here / "data/shakespeare_char/input.txt")
    run = lambda *command: subprocess.run([sys.executable, *command], cwd=here, check=True, capture_output=True,
                                          text=True, timeout=1800).stdout
    subprocess.run([sys.executable, "prepare.py"], cwd=here / "data/shakespeare_char", check=True, capture_output=True,
                   timeout=300)
    began = time.time()
    run("train.py", *NANOGPT.split())
    seconds = time.time() - began
    return seconds, float(run("-c", SCORE).split("SCORE")[1])


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
    record("char", "python bench.py char --data=FILE --nanogpt=CLONE", runs=runs, data=state["data"],
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
    record("ablations", "python bench.py ablations --data=FILE", data=state["data"], variants=out)


# --- training attention on a GPU --------------------------------------------------------------------------------------

def milliseconds(run):
    """Median time of run() on the GPU, in ms."""
    from triton.testing import do_bench
    return do_bench(run, warmup=25, rep=100, return_mode="median")


def forward_backward(form, inputs, gradient):
    """(forward ms, backward ms, peak bytes of one forward and backward, inputs included) of form(*inputs)."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    backward_of = lambda out: milliseconds(lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True))
    forward, backward = milliseconds(lambda: form(*inputs)), backward_of(form(*inputs))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(form(*inputs), inputs, gradient)
    return forward, backward, torch.cuda.max_memory_allocated() - before + sum(t.nbytes for t in inputs)


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
            return sdpa(*inputs)

    kernel = lambda *t: mla.attention_triton(*t, scale)
    measured = {
        "cuDNN, kernel": forward_backward(sdpa_kernel, whole, dout.transpose(1, 2)),
        "Triton, kernel": forward_backward(kernel, (*parts[:3], k_rope, parts[3]), dout),
        "cuDNN, block": forward_backward(sdpa_block, (q, kv, k_rope), dout),
        "Triton, block": forward_backward(block(mla.attention_triton, mla.Split.apply), (q, kv, k_rope), dout),
    }
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
        row = {}
        for path, form in forms.items():
            forward, backward, peak = forward_backward(form, inputs, gradients)
            row[path] = {"forward_ms": forward, "backward_ms": backward, "peak_bytes": peak}
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
    c, out = configs.load(["configs/v3_671b.py", "--seq_len=4096"]), {}
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
            step = lambda: torch.autograd.backward(block.attention(x.requires_grad_(), rope), (x, x))        # noqa: B023
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
    shapes = [attention_shape(*shape, (128, 64, 128)) for shape in ((1, 128, 4096), (4, 16, 2048))]
    record("attention", "python bench.py attention", shapes=shapes, small_ops=small_ops(),
           recomputation=recomputation())


# --- the README -------------------------------------------------------------------------------------------------------

def load(section):
    path = RESULTS / f"{section}.json"
    return json.loads(path.read_text()) if path.exists() else None


def tables():
    """{name of a marked place in the README: its text}, from the committed results."""
    t, c, a = load("tiny"), load("char"), load("ablations")
    mean = lambda runs, key: statistics.mean(r[key] for r in runs)
    spread = lambda runs, key: statistics.stdev(r[key] for r in runs) if len(runs) > 1 else 0.0
    vio = lambda runs: f"{mean(runs, 'max_vio'):.2f}" if mean(runs, "max_vio") else "-"
    out = {}
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
              f"| nanoV3, first evaluation at or under that | step {r['step']} | {r['seconds']:.1f} "
              f"({r['ratio']:.2f}x) |\n"
              f"| nanoV3, at its end | {r['final_loss']:.4f} | |" for r in c["runs"])])
    if a:
        out["ablations"] = "\n".join([
            "| variant | validation loss (mean ± std of the seeds) | MaxVio | seconds |", "|---|---|---|---|",
            *(f"| {name} | {mean(v['runs'], 'val_loss'):.4f} ± {spread(v['runs'], 'val_loss'):.4f} | "
              f"{vio(v['runs'])} | {mean(v['runs'], 'seconds'):.0f} |"
              for name, v in a["variants"].items())])
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


SECTIONS = {"tiny": tiny, "char": char, "ablations": ablations, "attention": attention, "readme": readme}


def main(argv):
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        return 0
    if argv[0] not in SECTIONS:
        raise UserError(f"bench.py {argv[0]}: there are the sections {', '.join(SECTIONS)}")
    options = {}
    for arg in argv[1:]:
        key, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals or key not in ("data", "nanogpt", "seeds", "repeats"):
            raise UserError(f"{arg}: options are --data=FILE --nanogpt=DIR --seeds=N --repeats=N")
        if key in ("seeds", "repeats") and not (value.isdigit() and int(value)):
            raise UserError(f"{arg}: a whole number from 1 up")
        options[key] = value
    SECTIONS[argv[0]](options)
    return 0


if __name__ == "__main__":
    configs.cli(main)
