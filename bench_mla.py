"""bench.py decode and attention: MLA on a GPU, against what torch gives."""
import statistics
import time
from unittest import mock

import torch

import backend
import configs
import mla
import mla_attention
import sample
from backend import has_triton
from configs import UserError
from measure import copy_rate, error, in_turn, milliseconds, record, replayed, seconds
from mla_decode import LatentCache, decode_torch, decode_triton, quantize
from model import V3, Block

# --- decode: attention over the latent cache --------------------------------------------------------------------------

def cache_per_token(c):
    """{kind of attention: bytes that the cache of a Config's shape holds for one token}, in BF16 where nothing is said.
    MHA keeps keys and values of d_n = d_v dims for every head, GQA-8 for eight groups of heads."""
    heads = lambda n: n * (c.qk_nope_head_dim + c.v_head_dim) * c.n_layers * 2
    width, d_r = c.kv_lora_rank + c.qk_rope_head_dim, c.qk_rope_head_dim
    latent = lambda dtype: LatentCache(c.n_layers, 1, 1, width, "meta", dtype, d_r).bytes_per_token
    return {"MHA": heads(c.n_heads), "GQA-8": heads(8), "MLA": latent(torch.bfloat16),
            "MLA, FP8": latent(torch.float8_e4m3fn)}


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

def forward_backward(forms, gradient):
    """{name: (forward ms, backward ms, peak bytes of one forward and backward, inputs included)} of {name: (form,
    inputs)}; gradient: of an output. Replayed from CUDA graphs, as train.py does; backward is both less forward."""
    forms = {name: (form, [t.detach().requires_grad_() for t in inputs]) for name, (form, inputs) in forms.items()}
    forward = in_turn({name: replayed(lambda f=form, x=inputs: f(*x)) for name, (form, inputs) in forms.items()})
    both, peak = in_turn({name: replayed(lambda f=form, x=inputs: torch.autograd.grad(f(*x), x, gradient))
                          for name, (form, inputs) in forms.items()}), {}
    backward = {name: both[name] - forward[name] for name in forms}
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
            return block(mla_attention.attention_torch, lambda x, d: x.split([d, x.shape[-1] - d], -1))(*inputs)

    def sdpa_kernel(*inputs):
        with cudnn():
            return sdpa(*inputs).transpose(1, 2)

    kernel = lambda *t: mla_attention.attention_triton(*t, scale)
    measured = forward_backward({
        "cuDNN, kernel": (sdpa_kernel, whole), "Triton, kernel": (kernel, (*parts[:3], k_rope, parts[3])),
        "cuDNN, block": (sdpa_block, (q, kv, k_rope)),
        "Triton, block": (block(mla_attention.attention_triton, mla.Split.apply), (q, kv, k_rope))}, dout)
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
