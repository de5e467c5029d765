"""bench.py fp8, fp8_error, fp8_tiny, fp8_loss and fp8_quality: what FP8 gains, and what it costs."""
import math
import os
import shlex
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import configs
import fp8
import fp8_gemm
import fp8_tiles
from configs import UserError
from data import Data
from measure import (
    checkpoints_of,
    chosen,
    compiled_beside,
    copy_rate,
    error,
    in_turn,
    kept,
    lines,
    milliseconds,
    needs_fp8,
    record,
    replayed_in_turn,
    train,
)
from model import V3, official_tensors
from parallel import Mesh, latest, load_checkpoint, read_state
from train import evaluate

# --- FP8 --------------------------------------------------------------------------------------------------------------

def fp8_error(options):
    """Products of two 64 x K matrices in E4M3: the relative error of what is summed in 14 bits, against float64."""
    out = []
    for kind, draw in (("normal", torch.randn), ("uniform in [0, 1]", torch.rand)):
        for K in (2**i for i in range(7, 15)):
            generator = torch.Generator().manual_seed(K)
            a, b = (fp8_tiles.quantize_torch(draw(64, K, generator=generator)) for _ in range(2))
            a, b = (fp8_tiles.Quantized(q.values, torch.ones_like(q.scale)) for q in (a, b))    # one scale for all of K
            exact = a.values.double() @ b.values.double().t()
            alone = fp8_gemm.dot_limited(a.values.float(), b.values.float(), torch.zeros(64, 64))
            out.append({"numbers": kind, "K": K, "promoted": error(fp8_gemm.gemm_torch(a, b, kept=14), exact),
                        "not_promoted": error(alone, exact), "float32": error(fp8_gemm.gemm_torch(a, b), exact)})
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


def tiny_runs(changes, forms):
    """The default job with `changes`, once for each of `forms`, {name: arguments}: -> (its data, {name: (train lines,
    eval lines)}), the same seed and data."""
    runs = {}
    for name, form in forms.items():
        with tempfile.TemporaryDirectory() as folder:
            train("configs/tiny.py", *changes, *form, f"--out_dir={folder}/run")
            runs[name], state = lines(f"{folder}/run"), read_state(latest(f"{folder}/run"))
    return state["data"], runs


def fp8_tiny(options):
    """The default job with a schedule of 150 steps, in FP32 and in FP8 (the reference): mean training loss of the last
    50 steps, and validation loss."""
    changes = ["--max_steps=150", "--decay_start=50", "--save_interval=0"]
    data, done = tiny_runs(changes, {name: [f"--precision={name}"] for name in ("fp32", "fp8_reference")})
    runs = [{"precision": name, "loss": statistics.mean(r["loss"] for r in rows[-50:]),
             "val_loss": evals[-1]["val_loss"], "losses": checkpoints_of(rows, (50, 100, 150)),
             "seconds": rows[-1]["time"]} for name, (rows, evals) in done.items()]
    record("fp8_tiny", "python bench.py fp8_tiny", changes=changes, data=data, runs=runs,
           difference=runs[1]["loss"] / runs[0]["loss"] - 1)


def moments(options, width=20):
    """The default job with a schedule of 240 steps, with AdamW's moments in FP32 and in BF16: the training loss over
    the steps, in means of `width`, and how far apart the two curves come."""
    changes = ["--max_steps=240", "--decay_start=80", "--save_interval=0"]
    data, done = tiny_runs(changes, {name: [f"--moments={name}"] for name in ("fp32", "bf16")})
    curves = {name: [statistics.mean(r["loss"] for r in rows[at:at + width]) for at in range(0, len(rows), width)]
              for name, (rows, _) in done.items()}
    apart = [b / a - 1 for a, b in zip(*curves.values())]
    record("moments", "python bench.py moments", changes=changes, data=data, width=width, curves=curves,
           most_apart=max(apart, key=abs), end=apart[-1],
           val_loss={name: evals[-1]["val_loss"] for name, (_, evals) in done.items()})


V3_LINEARS = {                                # in, out: section 4.2's dims
    "q_a": (7168, 1536), "q_b": (1536, 24576), "kv_a": (7168, 576), "kv_b": (512, 32768), "o": (16384, 7168),
    "gate/up": (7168, 4096), "down": (2048, 7168)}


def cublas(a, b, dtype=torch.bfloat16):
    """A function that multiplies as fp8_gemm.gemm_torch does, by cuBLASLt. It wants the block scales of b along K, in
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
    return x, w, fp8_tiles.quantize_triton(x)[0], fp8_tiles.blocks_triton(w[None])[0], fp8_tiles.quantize_triton(w)[0]


def fp8_products(name, inner, outer, N=4096):
    """Fprop's product of N tokens and Wgrad's on the same FP8 operands: TFLOP/s of our kernel, cuBLASLt's and BF16's,
    in turn, as CUDA graphs; Fprop's error against float64. Wgrad is added to an FP32 gradient, which cuBLASLt does in a
    second pass."""
    x, w, a, b, _ = operands(N, outer, inner)
    y, theirs = x.new_empty(N, outer), cublas(a, b)
    exact = a[:256].dequantize().double() @ b.dequantize().double().t()
    out = {"name": name, "M": N, "N": outer, "K": inner,
           "triton_error": error(fp8_gemm.gemm_triton(a, b, y)[:256], exact)}
    runs = {"triton": lambda: fp8_gemm.gemm_triton(a, b, y), "gemm": lambda: fp8_gemm.gemm(a, b, y),
            "bf16": lambda: x @ w.t()}
    if outer % 128 == 0:                                                       # kv_a's 576 are not whole blocks
        out["cublas_error"], runs["cublas"] = error(theirs()[:256], exact), theirs
    dy, xt, columns, _, x_columns = operands(outer, inner, N)                      # [out, tokens], [in, tokens]
    dw, wgrad_cublas = torch.zeros(outer, inner, device="cuda"), cublas(columns, x_columns, torch.float32)
    runs |= {"wgrad_triton": lambda: fp8_gemm.gemm_triton(columns, x_columns, dw), "wgrad_cublas": wgrad_cublas,
             "wgrad_bf16": lambda: dy @ xt.t(), "wgrad_cublas_add": lambda: dw.add_(wgrad_cublas()),
             "wgrad_triton_add": lambda: fp8_gemm.gemm_triton(columns, x_columns, dw, True)}
    r = {run: 2 * N * outer * inner / ms / 1e9 for run, ms in replayed_in_turn(runs).items()}
    against = lambda ours, theirs: f"{r[ours] / r[theirs]:.2f}x" if theirs in r else "-"
    print(f"{name}: {r['triton']:.0f} TFLOP/s, {against('triton', 'cublas')} cuBLASLt, "
          f"{against('triton', 'bf16')} BF16; gemm {r['gemm']:.0f}; Wgrad {r['wgrad_triton']:.0f}, "
          f"{against('wgrad_triton', 'wgrad_cublas')} cuBLASLt, {against('wgrad_triton', 'wgrad_bf16')} BF16; "
          f"added to a gradient {r['wgrad_triton_add']:.0f}, {against('wgrad_triton_add', 'wgrad_cublas_add')}",
          flush=True)
    return out | r


def fp8_few(M, N, K):
    """Microseconds of a product of M rows, as generation has them: in a CUDA graph one product follows the other, each
    with a weight of its own, and no cache holds them all."""
    layers = [operands(M, N, K)[:4] for _ in range(-(-2**28 // (N * K)))]                  # of 256 MB or more in FP8
    y = layers[0][0].new_empty(M, N)
    each = lambda product: [product(*layer) for layer in layers]
    theirs = [cublas(a, b) for _, _, a, b in layers]
    runs = {"triton": lambda: each(lambda x, w, a, b: fp8_gemm.gemm_triton(a, b, y)),
            "cublas": lambda: [product() for product in theirs], "bf16": lambda: each(lambda x, w, a, b: x @ w.t())}
    out = {"M": M, "N": N, "K": K} | {name: ms * 1e3 / len(layers)
                                      for name, ms in replayed_in_turn(runs, times=1).items()}
    out["weight_tb_s"] = N * K / out["triton"] / 1e6
    print(f"{M} rows, {N} x {K}: {out['triton']:.1f} us, {out['cublas'] / out['triton']:.2f}x cuBLASLt, "
          f"{out['bf16'] / out['triton']:.2f}x BF16, weights at {out['weight_tb_s']:.2f} TB/s", flush=True)
    return out


def linear_step(inner, outer, recipe, N=4096):
    """A function that runs a Linear forward and backward, N tokens, casts or quantization included, the weight's too:
    as if each micro-batch were an optimizer step."""
    layer = fp8.Linear(inner, outer).cuda()
    torch.nn.init.normal_(layer.weight)
    layer.recipe = recipe
    x = torch.randn(N, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(N, outer, device="cuda", dtype=torch.bfloat16)

    def step():
        torch.autograd.graph.increment_version(layer.weight)
        torch.autograd.grad(layer(x), (x, layer.weight), dy)
    return step


def fp8_linear(name, inner, outer):
    """Milliseconds of linear_step in BF16 and FP8: replayed from a CUDA graph, the GPU's time, and launched from
    Python, where short ones wait for the host."""
    steps = {form: linear_step(inner, outer, recipe) for form, recipe in (("bf16", None), ("fp8", fp8.Recipe()))}
    out = {"name": name, "in": inner, "out": outer, "launched": in_turn(steps, 3), **replayed_in_turn(steps, times=2)}
    print(f"{name}: {inner} -> {outer}: BF16 {out['bf16']:.3f} ms, FP8 {out['fp8']:.3f}, "
          f"{out['bf16'] / out['fp8']:.2f}x; launched {out['launched']['bf16']:.3f}, {out['launched']['fp8']:.3f}",
          flush=True)
    return out


def passes(M=32768, K=7168, F=2048):
    """{name: (bytes read and written, our kernel, torch.compile of the same or None)}: quantization, and RMSNorm and
    SwiGLU with it; as users have these they write BF16, and quantize that."""
    x, h, w, weight, gate = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
                             for shape in ((M, K), (M, 2 * F), (1, M, K), (K,), (M,)))
    w = w.float()
    kept, blocks = fp8_tiles.quantize_triton(x)[0], fp8_tiles.blocks_triton(w)

    def rows(x):
        tiles = x.float().unflatten(-1, (-1, 128))
        scale = (tiles.abs().amax(-1, keepdim=True) / 448).clamp_min(fp8_tiles.LEAST)
        return (tiles / scale).to(torch.float8_e4m3fn).flatten(-2), scale.squeeze(-1)

    def both(x):
        return *rows(x), *rows(x.t().contiguous())

    def norm(x):
        return torch.nn.functional.rms_norm(x.float(), (K,), weight.float(), 1e-6).to(x.dtype)

    def swiglu(h):
        a, b = h.chunk(2, -1)
        return torch.nn.functional.silu(a) * b * gate[:, None]

    row, pair, normed, gated = (torch.compile(f, dynamic=False) for f in (rows, both, norm, swiglu))
    return {
        "rows": (3 * M * K, lambda: fp8_tiles.quantize_triton(x), lambda: row(x)),
        "rows and columns": (4 * M * K, lambda: fp8_tiles.quantize_triton(x, columns=True), lambda: pair(x)),
        "FP8 rows to columns": (2 * M * K, lambda: fp8_tiles.quantize_triton(kept, rows=False, columns=True), None),
        "RMSNorm, rows": (3 * M * K, lambda: fp8_tiles.norm_quantize_triton(x, weight, 1e-6), lambda: row(normed(x))),
        "RMSNorm, rows and columns": (4 * M * K, lambda: fp8_tiles.norm_quantize_triton(x, weight, 1e-6, columns=True),
                                      lambda: pair(normed(x))),
        "SwiGLU, rows": (5 * M * F, lambda: fp8_tiles.swiglu_quantize_triton(h, gate), lambda: row(gated(h))),
        "SwiGLU, rows and columns": (6 * M * F, lambda: fp8_tiles.swiglu_quantize_triton(h, gate, columns=True), None),
        "blocks": (5 * M * K, lambda: fp8_tiles.blocks_triton(w), None),
        "transpose of blocks": (2 * M * K, lambda: fp8_tiles.transpose_triton(blocks), None)}


def fp8_quantization():
    """Bytes read and written per second by each of `passes`, of 32,768 rows, as CUDA graphs."""
    out = {"copy": copy_rate(), "passes": {}}
    for name, (moved, ours, theirs) in passes().items():
        times = replayed_in_turn({"triton": ours, **({"compiled": theirs} if theirs else {})})
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
        print(f"AdamW, {name} moments: {ms:.2f} ms, {moved / ms / 1e9:.2f} TB/s", flush=True)
    return out


SQUARES = {f"square {dim}": (dim, dim) for dim in (256, 512, 1024, 2048, 4096, 8192)}               # where FP8 pays
FEW_ROWS = [(M, *V3_LINEARS[name][::-1]) for M in (16, 64, 128) for name in ("q_a", "gate/up", "o")]
FP8_PARTS = {
    "products": lambda: [fp8_products(name, *dims) for name, dims in V3_LINEARS.items()]
    + [fp8_products("square", 8192, 8192, 8192)],
    "few": lambda: [fp8_few(*shape) for shape in FEW_ROWS],
    "linears": lambda: [fp8_linear(name, *dims) for name, dims in V3_LINEARS.items()],
    "square": lambda: [fp8_linear(name, *dims) for name, dims in SQUARES.items()],
    "adamw": fp8_adamw, "quantization": fp8_quantization}


def fp8_prepare(part, *dims):
    """What a part launches, once: its kernels are compiled then."""
    if part == "quantization":
        for _, *runs in passes().values():
            [run() for run in runs if run]
    elif part == "few":
        _, _, a, b, _ = operands(*dims)
        fp8_gemm.gemm_triton(a, b, torch.empty(dims[0], dims[1], device="cuda", dtype=torch.bfloat16))
    elif part == "products":
        inner, outer = dims
        _, _, a, b, _ = operands(4096, outer, inner)
        fp8_gemm.gemm_triton(a, b, torch.empty(4096, outer, device="cuda", dtype=torch.bfloat16))
        _, _, a, _, b = operands(outer, inner, 4096)
        for add in (False, True):
            fp8_gemm.gemm_triton(a, b, torch.zeros(outer, inner, device="cuda"), add)
    else:
        linear_step(*dims, fp8.Recipe())()


def fp8_on_a_gpu(options):
    parts = chosen(options, "parts", FP8_PARTS)
    needs_fp8("fp8")
    jobs = {"products": [*V3_LINEARS.values(), (8192, 8192)], "few": FEW_ROWS[::3], "linears": V3_LINEARS.values(),
            "square": SQUARES.values(), "quantization": [()]}
    compiled_beside(fp8_prepare, [(part, *dims) for part in parts for dims in jobs.get(part, ())])
    out = kept("fp8", *FP8_PARTS)
    for part in parts:
        out[part] = FP8_PARTS[part]()
        record("fp8", "python bench.py fp8", **out)                            # what there is, should the rest not come


# --- the quality of FP8 -----------------------------------------------------------------------------------------------

def installed_sources(folder):
    """The Python sources of the installed packages, as a folder: with torch and transformers 180 MB of text, so that
    1000 steps see little of it twice."""
    root = Path(torch.__file__).parent.parent
    for path in root.rglob("*.py"):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:                                                         # declares an older encoding
            continue
        target = Path(folder, path.relative_to(root))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace("\0", ""), encoding="utf-8")
    return folder


QUALITY = {"BF16": [], "BF16, another seed": ["--seed=1338"], "FP8": ["--precision=fp8", "--moments=bf16"],
           "FP8, another seed": ["--precision=fp8", "--moments=bf16", "--seed=1338"],
           "BF16, BF16 moments": ["--moments=bf16"], "FP8, FP32 moments": ["--precision=fp8"]}
LONG = 2000                                   # steps; config/gpu.py's own are 1000


def as_trained(folder, data, config, precision):
    """Validation loss of a run's model, multiplied in another precision than it was trained in."""
    with torch.device("cuda"):
        v3 = V3(config.replace(precision=precision))
    load_checkpoint(latest(folder), official_tensors(v3))
    return evaluate(v3, data, Mesh())[0]


def fp8_quality(options, each=220):
    """configs/gpu.py with 32 sequences a step, in BF16 and FP8, each with two seeds (what a difference may be worth),
    all at the same time, spread over the GPUs that there are: the training loss, and its mean over the last 100 steps;
    then the validation loss of the first BF16 model in FP8, without training. A run may take `each` seconds for 1000
    steps, and as much more as there are runs on its GPU. --parts: other runs, --steps: 1000 is the config's own number;
    --data=FOLDER: other text than the sources of the installed packages."""
    needs_fp8("fp8_quality")
    names, steps = chosen(options, "parts", QUALITY), int(options.get("steps", LONG))
    names = names if "parts" in options else names[:4]
    count = torch.cuda.device_count()
    limit = each * steps / 1000 * -(-len(names) // count)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    with tempfile.TemporaryDirectory() as folder:
        data = options.get("data") or installed_sources(f"{folder}/installed")
        common = ["configs/gpu.py", f"--data={data}", "--batch_size=32", "--eval_interval=0", "--save_interval=0",
                  "--eval_stride=1024", f"--max_steps={steps}", f"--decay_start={steps * 2 // 5}"]
        # Once, for all to find: a seed decides too how a text is cut into tokens.
        text = {name: Data(configs.load([*common, *QUALITY[name]])) for name in names}[names[0]]

        def one(job):
            number, name = job
            try:
                train(*common, *QUALITY[name], f"--out_dir={folder}/{number}", limit=limit, OMP_NUM_THREADS="4",
                      CUDA_VISIBLE_DEVICES=gpus[number % count])
            except subprocess.TimeoutExpired:
                print(f"{name}: cut off after {limit:.0f} s, and left out", flush=True)
                return None
            return lines(f"{folder}/{number}")
        with ThreadPoolExecutor(len(names)) as pool:
            done = {name: run for name, run in zip(names, pool.map(one, enumerate(names))) if run}
        if not done:
            raise UserError(f"bench.py fp8_quality: no run ended within {limit:.0f} s; take fewer --parts at a time")
        runs = [{"name": name, "changes": QUALITY[name], "loss": statistics.mean(r["loss"] for r in rows[-100:]),
                 "val_loss": evals[-1]["val_loss"], "seconds": rows[-1]["time"],
                 "tokens_per_s": statistics.median(r["tokens_per_s"] for r in rows),
                 "curve": [round(r["loss"], 5) for r in rows]} for name, (rows, evals) in done.items()]
        for run in runs:
            print({k: v for k, v in run.items() if k != "curve"}, flush=True)
        numbers = dict(steps=steps, gpus=min(count, len(names)), data=text.identity, runs=runs)
        if "BF16" in done:
            config = configs.load([*common, *QUALITY["BF16"]])
            numbers["bf16_in_fp8"] = as_trained(f"{folder}/{names.index('BF16')}", text, config, "fp8")
            print(f"BF16's model in FP8: validation {numbers['bf16_in_fp8']:.4f}", flush=True)
    given = (f"--{key}={value}" for key, value in options.items() if key != "data")
    command = shlex.join(["python", "bench.py", "fp8_quality", *given])
    record("fp8_quality" if steps == LONG else f"fp8_quality_{steps}", command, **numbers)
