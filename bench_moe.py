"""bench.py moe, step and layer: the experts, and what a training step with them costs."""
import gc
import importlib.util
import statistics
import time

import torch

import backend
import configs
import experts
import experts_fp8
import fp8
import mla
import moe
from bench_fp8 import V3_LINEARS, fp8_prepare
from configs import UserError
from measure import chosen, compiled_beside, in_turn, kept, milliseconds, needs_fp8, record, replayed
from model import Block, arithmetic, hf_config
from parallel import Mesh
from train import Training, make_optimizer

# --- the experts on a GPU ---------------------------------------------------------------------------------------------

MOE_SHAPES = {                                # tokens, experts, chosen, dim, moe_inter_dim
    "V3": (32768, 4, 1, 7168, 2048),          # the four experts of one GPU of 64, and their rows
    "bench_1b": (32768, 64, 6, 1024, 512), "V2-Lite": (8192, 64, 6, 2048, 1408)}


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
    return {"compiled": torch.compile(grouped_experts, dynamic=False), "Triton": experts_fp8.routed_triton,
            "Triton, FP8": lambda *inputs: experts_fp8.routed_triton(*inputs, fp8.Recipe(pow2=True))}


def moe_layer(name):
    """Milliseconds of forward, and of forward and backward, and the bytes kept in between: casting and quantizing the
    weights included, as if each were an optimizer step."""
    torch.compiler.reset()                                     # each shape compiled for itself, as the first one is
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
    rows, rows8 = experts.gather_triton(x, plan), experts_fp8.gather8_triton(x, plan)[0]
    packed, ends = rows[plan.pair >= 0], torch.bincount(indices.flatten(), minlength=E).cumsum(0).to(torch.int32)
    runs = {"grouped_mm": lambda: torch.nn.functional.grouped_mm(packed, w.transpose(1, 2), offs=ends),
            "bf16": lambda: experts.rows_triton(rows, w, plan, False, experts.HOPPER),
            "fp8": lambda: experts_fp8.rows8(rows8, w8, plan, x.dtype),
            "fp8_quantizing": lambda: experts_fp8.rows8(experts_fp8.gather8_triton(x, plan)[0], w8, plan, x.dtype)}
    if tokens:                                                                             # compiled, and no more
        return [run() for run in runs.values()]
    r = {form: 4 * N * K * D * F / ms / 1e9 for form, ms in in_turn(runs, 3).items()}
    print(f"{name}, the first product alone: F.grouped_mm {r['grouped_mm']:.0f} TFLOP/s; " + ", ".join(
        f"{form} {r[form]:.0f} ({r[form] / r['grouped_mm']:.2f}x)" for form in list(runs)[1:]), flush=True)
    return {"name": name, **r}


def moe_prepare(name, form):
    """Compile what a form needs."""
    N, E, K, D, F = MOE_SHAPES[name]
    tokens = N if form == "compiled" else 4096                       # torch.compile compiles for a number of tokens
    x, indices, *rest = moe_inputs(tokens, E, K, D, F)
    leaves = [t.requires_grad_() for t in (x, *rest)]
    torch.autograd.grad(moe_forms()[form](leaves[0], indices, *leaves[1:]), leaves, torch.randn_like(x))
    if form == "Triton":
        moe_products(name, tokens)


def moe_on_a_gpu(options):
    names, measures = chosen(options, "shapes", MOE_SHAPES), {"products": moe_products, "layers": moe_layer}
    parts = chosen(options, "parts", measures)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, why = backend.experts(device, torch.bfloat16, (128, 128))
    if path != "Triton":
        raise UserError(f"bench.py moe: a Hopper GPU with Triton is needed ({why})")
    compiled_beside(moe_prepare, [(name, form) for form in moe_forms() for name in names])
    rows = {part: {row["name"]: row for row in kept("moe", part).get(part, ())} for part in measures}
    for name in names:
        for part in parts:
            rows[part][name] = measures[part](name)
            record("moe", "python bench.py moe", **{part: list(done.values()) for part, done in rows.items()})


# --- a training step, beside transformers' ----------------------------------------------------------------------------

def our_step(c, form):
    """-> (a training step on tokens [B, T+1+n_mtp], the weights): train.py's, the first after the warmup."""
    c, device = c.replace(graph=form == "graph", compile=form == "compiled"), torch.device("cuda")
    path, why = backend.training_graph(device, c)
    if form == "graph" and path != "CUDA graph":
        raise UserError(f"bench.py step: no CUDA graph here ({why}); --parts=launched,compiled run without")
    training = Training(c, device, Mesh())

    def step(tokens):
        training.forward_backward(tokens, c.warmup_steps)
        training.sum_gradients()
        training.update(c.warmup_steps)
    return step, list(training.modules[0].parameters())


def their_step(c, form):
    """The same of transformers' DeepseekV3, as its users train it: weights, gradients and moments in BF16, half the
    bytes of ours, and grouped_mm for the experts."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(DeepseekV3Config(**hf_config(c)), dtype=torch.bfloat16,
                                                 experts_implementation="grouped_mm").train()
    forward = torch.compile(model, dynamic=False) if form == "compiled" else model

    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=c.lr, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, fused=True)

    def step(tokens):                                                                      # the model shifts the labels
        forward(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, weights


STEPS = {                                     # the model, how it is started, what its Config changes
    "launched": (our_step, "launched", {}), "graph": (our_step, "graph", {}), "compiled": (our_step, "compiled", {}),
    "graph, FP8": (our_step, "graph", {"precision": "fp8", "moments": "bf16"}),
    "transformers": (their_step, "launched", {}), "transformers, compiled": (their_step, "compiled", {})}


def training_step(name, c, steps=8):
    """Tokens/s and peak bytes of whole training steps of a Config's model on random tokens."""
    make, form, changes = STEPS[name]
    (step, weights), times = make(c.replace(**changes), form), []
    tokens = torch.randint(c.vocab_size, (c.micro_batch_size, c.seq_len + 1 + c.n_mtp), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        began = time.perf_counter()
        step(tokens)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    size = c.micro_batch_size * c.seq_len
    out = {"name": name, "tokens": size, "parameters": sum(p.numel() for p in weights),
           "peak_bytes": torch.cuda.max_memory_allocated(),
           "tokens_per_s": size / statistics.median(times[steps // 2:])}
    print(f"{name}: {out['tokens_per_s']:,.0f} tokens/s, {out['peak_bytes'] / 1e9:.1f} GB "
          f"(first step {times[0]:.0f} s)", flush=True)
    return out


def step(options):
    names = chosen(options, "parts", ["small", *STEPS])
    if not torch.cuda.is_available():
        raise UserError("bench.py step: a GPU is needed")
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not here to be compared with: pip install -r requirements-extra.txt", flush=True)
        names = [name for name in names if "transformers" not in name]
    large, small = (configs.load([f"configs/{name}.py", "--bf16_head=True"]) for name in ("bench_1b", "gpu"))
    jobs = [("small", name, small) for name in ("launched", "graph", "graph, FP8")]
    jobs += [("runs", name, large) for name in STEPS]
    done = kept("step", "small", "runs")
    for where, name, c in jobs:
        if (name if where == "runs" else where) in names:
            gc.collect()                                                                   # the model before
            torch.cuda.empty_cache()
            others = [r for r in done.get(where, ()) if r["name"] != name]
            done[where] = [*others, training_step(name, c)]
            record("step", "python bench.py step", **done)


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
    """A step (forward, backward, optimizer) of the Slice: milliseconds, as a CUDA graph and launched from Python, the
    peak of memory, and what it is made of."""
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
    step()                                                                                 # compiles what is not yet
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
    launched = milliseconds(step, 400)
    for group in optimizer.param_groups:
        group["capturable"] = True                             # torch's own AdamW wants to be told that it is recorded
    ms = milliseconds(replayed(step), 400)
    out = {"precision": precision, "moments": moments, "parameters": sum(p.numel() for p in weights), "ms": ms,
           "launched_ms": launched, "tokens_per_s": c.seq_len / ms * 1e3, "peak_bytes": peak, "bytes": bytes_}
    rows = part.wire[0].shape[0]
    expert = part.block.ffn.w13.numel() + part.block.ffn.w2.numel()
    products = c.seq_len * (sum(p.numel() for p in weights) - expert) + rows * expert // len(part.block.ffn.w13)
    attention = 2 * c.n_heads * (c.qk_head_dim + c.v_head_dim) * (c.seq_len + 1) / 2 * c.seq_len
    out["flops"] = 6 * products + 3 * attention
    out["tflops"] = out["flops"] / ms / 1e9
    out["gpu_hours_per_trillion_tokens"] = 1e12 * arithmetic(c)["flops"] / (out["tflops"] * 1e12) / 3600
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in out.items()}, flush=True)
    return out


def layer_prepare(part, *args):
    """Compile what a part of the Slice needs."""
    if part == "experts":
        return moe_prepare(*args)
    if part == "Linear":
        return fp8_prepare("linears", *args)
    part = Slice(configs.load(["configs/v3_671b.py", "--precision=bf16"])).train()
    torch.autograd.backward(part.block.attention(part.x.requires_grad_(), part.rope[:part.x.shape[1]]),
                            (part.dy, part.dy))


def layer(options):
    needs_fp8("layer")
    compiled_beside(layer_prepare, [("attention",), ("experts", "V3", "Triton"), ("experts", "V3", "Triton, FP8"),
                                    *(("Linear", *dims) for dims in V3_LINEARS.values())])
    half, eight = layer_in("bf16", "fp32"), layer_in("fp8", "bf16")
    record("layer", "python bench.py layer", runs=[half, eight], speedup=half["ms"] / eight["ms"],
           memory=eight["peak_bytes"] / half["peak_bytes"])
