"""What a step of training costs on a cluster, before anybody owns one: pipelines, experts and exchanges put together.

From the FLOPs and bytes of a Config and the speeds of some machines follow the times of a chunk's parts; from those, by
dualpipe.simulate, the step. Nothing here is measured: every assumption is a field of Cluster or a line of what `plan`
prints, to be replaced by one's own measurements.

    a chunk    a micro-batch in a stage, L layers of experts: F = I = W = a third of its training FLOPs / speed
    exchange   tokens * dim * bytes * copies / bandwidth, of the two hops (section 3.2.2) the slower one
    a pair     each exchange hides behind one segment of the other chunk (dualpipe.py, figure 4 of the report):
               combine B | attention F,  dispatch F | experts B and W,  dispatch B | experts F,  combine F | attention B
               and W; what doesn't fit is exposed. A chunk alone hides nothing.

DeepSeek-V3 itself: python train.py configs/v3_671b.py --plan --world=2048
"""
from dataclasses import dataclass

import dualpipe
from configs import UserError
from model import arithmetic, balanced, layer_of


@dataclass
class Cluster:
    """The machines: by default V3's, H800s, and what products reach on them."""
    per_node: int = 8                         # GPUs
    flops: float = 600e12                     # of one GPU, a second: in BF16 ...
    fp8_flops: float = 820e12                 # ... and with FP8 products, 37% more
    between: float = 50e9                     # bytes a second of a GPU to other nodes (InfiniBand) ...
    inside: float = 160e9                     # ... and inside its node (NVLink)


def copies(c, ep, per_node):
    """How many copies of a token leave its node, and how many go on to other GPUs there, if routing is balanced."""
    nodes, here = max(1, ep // per_node), min(ep, per_node)
    reachable = nodes * c.n_limited_groups / c.n_expert_groups if nodes > 1 else 1
    # K choices among n places fall on so many different ones:
    different = lambda n: n * (1 - (1 - 1 / n) ** c.n_activated_experts)
    return different(reachable) * (nodes - 1) / nodes, different(reachable * here) * (here - 1) / here


def parameters(c, a, cuts, ep):
    """For each stage: (the parameters that every rank of it holds, its share of the experts)."""
    out = [[0, 0] for _ in cuts[1:]]
    for name, n in a["sizes"].items():
        layer = layer_of(name) if layer_of(name) >= 0 else 0 if "embed" in name else c.n_layers        # the ends
        stage = next((s for s, stop in enumerate(cuts[1:]) if layer < stop), len(out) - 1)
        out[stage][".mlp.experts." in name] += n / (ep if ".mlp.experts." in name else 1)
    return out


def kept_bytes(c):
    """Bytes that a token leaves for backward in a layer of experts: the residuals, the latents, attention's output
    (with FP8 in E5M6, held in 16 bits, and in BF16: fp8.py), and the inputs of experts and SwiGLUs; norms,
    up-projections and SwiGLU's output are made again (section 3.2.3), or kept where the Config recomputes nothing."""
    high, low, output = {"fp32": (4, 4, 4), "bf16": (2, 2, 2)}.get(c.precision, (2, 1, 4))
    again = 2 * c.dim + c.n_heads * (2 * c.qk_head_dim + c.v_head_dim) \
        + (c.n_activated_experts + c.n_shared_experts) * c.moe_inter_dim
    kept = 0 if c.recompute or c.recompute_mla else high * again
    return kept + high * (2 * c.dim + c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim) \
        + output * c.n_heads * c.v_head_dim \
        + low * ((c.n_activated_experts + 1) * c.dim
                 + 2 * (c.n_activated_experts + c.n_shared_experts) * c.moe_inter_dim)


def plan(c, kind, pp, dp, ep, cluster=None, a=None):
    """A step of the Config on pp * dp GPUs: dp pipelines of a `kind`, every MoE layer's experts spread over ep ranks.

    -> (dict of numbers: seconds, bytes and shares, of one rank; [(what, text)] to print). UserError where there is no
    such pipeline. a: arithmetic(c), where it is known.
    """
    cluster, a = cluster or Cluster(), a or arithmetic(c)
    fp8, tokens = c.precision.startswith("fp8"), c.micro_batch_size * c.seq_len
    count, _ = dualpipe.layout(kind, pp, 0)
    held = [dualpipe.layout(kind, pp, rank)[1] for rank in range(pp)]
    M, rest = divmod(c.batch_size, c.micro_batch_size * dp)
    if rest:
        raise UserError(f"--micro_batch_size={c.micro_batch_size}: does not divide the {c.batch_size / dp:g} sequences "
                        f"of a pipeline")
    dualpipe.check(kind, pp, M)

    # Arithmetic: a chunk's, on the busiest rank, and that of a layer of experts by itself.
    speed = cluster.fp8_flops if fp8 else cluster.flops
    third = lambda flops: flops / 3 * tokens / speed
    cuts = balanced(c, count, a)
    stages = [sum(a["layers"][i:j]) for i, j in zip(cuts, cuts[1:])]
    stages[-1] += sum(a["layers"][c.n_layers:]) + a["end"]
    busiest = max(sum(stages[s] for s in mine) / len(mine) for mine in held)
    F, attention = third(busiest), third(a["attention"])
    experts = third(a["layers"][c.n_layers - 1]) - attention

    # Exchanges: of a layer, of a chunk with the most layers of experts.
    out_of_node, on = copies(c, ep, cluster.per_node)
    exchange = lambda width: tokens * c.dim * width * max(out_of_node / cluster.between, on / cluster.inside)
    wide = exchange(4 if c.precision == "fp32" else 2)
    dispatch, combine = exchange(1) if fp8 else wide, wide                      # and those of gradients: `wide`, twice
    widths = (1 if fp8 else 4 if c.precision == "fp32" else 2,) + 3 * (4 if c.precision == "fp32" else 2,)
    layers = max(sum(i >= c.n_dense_layers for i in range(start, stop)) for start, stop in zip(cuts, cuts[1:]))
    forth, back = layers * (dispatch + combine), layers * 2 * wide
    hides = [(wide, attention), (dispatch, 2 * experts), (wide, experts), (combine, 2 * attention)]
    exposed = layers * sum(max(0.0, travels - computes) for travels, computes in hides)

    # The step.
    lists = [dualpipe.schedule(kind, pp, rank, M) for rank in range(pp)]
    result = dualpipe.simulate(kind, lists, F=F + forth, B=2 * F + back, W=F, FB=3 * F + exposed,
                               p2p=tokens * c.dim * 2 / cluster.between)
    step, flying = result["makespan"], max(result["peak_activations"])
    pairs = min(sum(s.kind == "FB" for s in steps) for steps in lists)
    chunks = max(sum(part == "F" for s in steps for part, *_ in s.parts) for steps in lists)
    hidden = pairs * (forth + back - exposed)
    per_gpu = c.batch_size * c.seq_len / step / (pp * dp)

    # Memory of the fullest rank. Moments are sharded over the ranks with the same parameters (ZeRO-1), here as if
    # tensors could be cut: parallel.py gives each whole to one owner.
    same = 2 if kind == "dualpipe" else 1
    sizes, moments = parameters(c, a, cuts, ep), 2 * (4 if c.moments == "fp32" else 2)
    share = lambda replicas: moments / (replicas * same if c.zero1 else 1)
    weights = max(sum((8 + fp8 + share(dp)) * plain + (8 + fp8 + share(max(1, dp // ep))) * spread
                      for plain, spread in (sizes[s] for s in mine)) for mine in held)
    parameters_here = max(sum(map(sum, (sizes[s] for s in mine))) for mine in held)
    activations = flying * tokens * kept_bytes(c) * max(stop - start for start, stop in zip(cuts, cuts[1:]))

    numbers = {"step": step, "bubble": result["bubble"] / step, "pair": 3 * F + exposed, "travel": forth + back,
               "hidden": hidden, "exposed": chunks * (forth + back) - hidden, "weights": weights,
               "activations": activations, "tokens_per_s": per_gpu, "microbatches": M,
               "parameters": parameters_here,
               "between": out_of_node * (each := chunks * layers * tokens * c.dim * sum(widths)), "inside": on * each}
    ms, GB = (lambda t: f"{t * 1e3:.1f} ms"), (lambda n: f"{n / 1e9:.1f} GB")
    what = "FP8" if fp8 else c.precision.upper()
    rows = [
        ("cluster", f"{pp * dp:,} GPUs, {cluster.per_node} a node: {dp} pipelines of {pp} ranks ({kind}), experts over "
                    f"{ep} ranks on {max(1, ep // cluster.per_node)} nodes"),
        ("assumed", f"{speed / 1e12:.0f} TFLOP/s ({what}), a third of the work each for forward, input and weights; "
                    f"{cluster.between / 1e9:.0f} GB/s a GPU between nodes, {cluster.inside / 1e9:.0f} inside, the "
                    f"slower hop counts; balanced routing: {out_of_node:.2f} copies of a token leave its node, "
                    f"{on:.2f} its GPU; dispatch in {what}"),
        ("stages", f"of {' '.join(str(stop - start) for start, stop in zip(cuts, cuts[1:]))} layers, the last with "
                   f"head and MTP; the busiest rank works {busiest * count / sum(stages):.2f} of the mean"),
        ("a layer", f"forward: attention {ms(attention)}, experts {ms(experts)}, dispatch {ms(dispatch)}, combine "
                    f"{ms(combine)}; backward: {ms(wide)} for each of the two"),
        ("a pair", f"{ms(3 * F)} of arithmetic and {ms(forth + back)} of exchanges, {ms(exposed)} of them exposed"
                   if pairs else f"{kind} has none: {ms(forth + back)} of exchanges a micro-batch are exposed"),
        ("a step", f"{c.batch_size:,} sequences, {M} micro-batches a pipeline: {step:.2f} s, bubble "
                   f"{numbers['bubble']:.1%}; exchanges {hidden:.2f} s hidden, {numbers['exposed']:.2f} s exposed"),
        ("speed", f"{per_gpu:,.0f} tokens/s a GPU, {1e12 / per_gpu / 3.6e6:,.0f}K GPU hours per 1T tokens, without "
                  f"optimizer, data and faults"),
        ("a GPU holds", f"{GB(weights)} of FP32 weights and gradients, {'FP8 copies, ' if fp8 else ''}its share of the "
                        f"moments; {GB(activations)} of activations: {flying} chunks, {kept_bytes(c):,.0f} bytes a "
                        f"token and layer"),
    ]
    rows.append(("a GPU sends", f"in a step, for its experts: {GB(numbers['between'])} to other nodes and "
                 f"{GB(numbers['inside'])} inside its own; of gradients and new weights at most "
                 f"{GB(8 * parameters_here)}"))
    first, least = c.batch_size // 5 // (c.micro_batch_size * dp), 2 * pp
    if c.batch_ramp and kind.startswith("dualpipe") and first < least:
        rows.append(("ramp", f"the first batch, {c.batch_size // 5:,} sequences, is {first} micro-batches a pipeline, "
                             f"fewer than {kind}'s {least}, so training refuses it: give --batch_ramp=0 or "
                             f"--pipeline=1f1b"))
    return numbers, rows


def techniques(c, kind, pp, dp, ep):
    """((bytes of weights, of activations) of the fullest rank, {technique: bytes of both without it}), of all in this
    Config that saves memory."""
    a = arithmetic(c)

    def needs(kind=kind, ep=ep, **changes):
        numbers, _ = plan(c.replace(**changes), kind, pp, dp, ep, a=a)
        return numbers["weights"], numbers["activations"]

    with_all = needs()
    without = {"expert parallelism": ep > 1 and needs(ep=1),
               "ZeRO-1": c.zero1 and dp > 1 and needs(zero1=False),
               "BF16 moments": c.moments == "bf16" and needs(moments="fp32"),
               "FP8": c.precision.startswith("fp8") and needs(precision="bf16"),
               "recomputing": (c.recompute or c.recompute_mla) and needs(recompute=False, recompute_mla=False),
               "one copy of each stage (DualPipeV)": kind == "dualpipev" and needs(kind="dualpipe")}
    held = plan(c, kind, pp, dp, ep, a=a)[0]["parameters"]
    without["the average of the weights on the CPU"] = c.ema_decay > 0 and (with_all[0] + 4 * held, with_all[1])
    return with_all, {name: sum(bytes) for name, bytes in without.items() if bytes}


def report(c, pp, dp, ep, train_tokens):
    """What --plan prints of a layout: speed, cost of train_tokens, memory of a GPU with and without each technique."""
    numbers, rows = plan(c, c.pipeline, pp, dp, ep)
    hours = train_tokens / numbers["tokens_per_s"] / 3600
    rows.append(("cost", f"{train_tokens / 1e12:.3f}T tokens: {hours / 1e3:,.0f}K GPU hours, ${2 * hours / 1e6:.2f}M "
                         f"at $2 an hour (V3's 14.8T, with all that this leaves out: 2,664K, $5.33M)"))
    (weights, activations), without = techniques(c, c.pipeline, pp, dp, ep)
    rows.append(("fits 80 GB", f"{'yes' if weights + activations < 80e9 else 'no'}: {weights / 1e9:.1f} GB weights, "
                               f"gradients, moments + {activations / 1e9:.1f} GB activations on the fullest GPU; "
                               f"workspace not counted"))
    rows += [("without", f"{name}: {total / 1e9:.1f} GB") for name, total in without.items()]
    return "\n".join(f"  {what:13} {text}" for what, text in rows)
