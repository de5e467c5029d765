"""What a step of training costs on a cluster, before anybody owns one: pipelines, experts and exchanges put together.

From the FLOPs and bytes of a Config and the speeds of some machines follow the times of a chunk's parts; from those, by
dualpipe.simulate, the step. No time here is measured: every assumption is a field of Cluster or a line of what `report`
prints, to be replaced by one's own measurements.

    a chunk    a micro-batch in a stage, L layers of experts: F = I = W = a third of its training FLOPs / speed
    exchange   tokens * dim * bytes * copies / bandwidth, of the two hops (section 3.2.2) the slower one
    a pair     each exchange hides behind one segment of the other chunk (dualpipe.py, figure 4 of the report):
               combine B | attention F,  dispatch F | experts B and W,  dispatch B | experts F,  combine F | attention B
               and W; what doesn't fit is exposed. A chunk alone hides nothing. Without a pipeline there are no pairs.

Bytes are counted, not assumed: the modules of every rank are built on the meta device by the functions that build them
for training (ranks.parts), cut and owned as there (parallel.owners); and what a token leaves for backward is summed up
part by part in `kept`. tests/test_cluster.py holds both against what training allocates.

DeepSeek-V3 itself: python train.py configs/v3_671b.py --plan --world=2048
"""
import math
from dataclasses import dataclass, replace
from math import comb, prod

import torch

import dualpipe
import parallel
import ranks
from configs import UserError
from model import CrossEntropy, arithmetic, balanced
from moe import FFN


@dataclass
class Cluster:
    """The machines: by default V3's, H800s, and what products reach on them."""
    per_node: int = 8                         # GPUs, where the command line doesn't say (--nodes)
    flops: float = 600e12                     # of one GPU, a second: in BF16 ...
    fp8_flops: float = 820e12                 # ... and with FP8 products, 37% more
    between: float = 50e9                     # bytes a second of a GPU to other nodes (InfiniBand) ...
    inside: float = 160e9                     # ... and inside its node (NVLink)


def copies(c, nodes, here):
    """With experts on `nodes` machines, `here` ranks on each: how many copies of a token leave its machine, how many go
    on to other ranks there, and on how many ranks it is in the end, if routing is balanced."""
    open_share = c.n_limited_groups / c.n_expert_groups if nodes > 1 else 1          # of nodes and their experts
    E, K = round(c.n_routed_experts * open_share), c.n_activated_experts

    def different(places):
        """Of so many places with as many experts each, how many hold one of the K."""
        return places * (1 - comb(E - max(1, E // places), K) / comb(E, K))

    reachable = max(1, round(nodes * open_share))
    there = different(reachable * here)
    return different(reachable) * (nodes - 1) / nodes, there * (here - 1) / here, there


def pipeline(c, mesh):
    """The schedule's name: without a pipeline that of 1F1B with one rank, where a backward follows each forward."""
    return c.pipeline if mesh.pp > 1 else "1f1b"


def whole_micro_batches(c, mesh):
    """The Config with micro-batches no larger than a rank's part of a batch."""
    return c.replace(micro_batch_size=min(c.micro_batch_size, max(1, c.batch_size // mesh.dp)))


# --- memory -----------------------------------------------------------------------------------------------------------

def kept(c, dense, kernels, ep=1, arrive=1.0, cut=False):
    """(bytes that a token leaves for backward in one layer, bytes that backward makes again besides).

    kernels: what those of a Hopper GPU keep in BF16 and FP8; else what torch's operations do, with an attention that
    keeps no scores. The experts stand on ep ranks, and copies of the token `arrive` on so many. cut: in a pipeline.
    """
    fp8, high = c.precision.startswith("fp8"), 4 if c.precision == "fp32" else 2
    D, H, K, E, F = c.dim, c.n_heads, c.n_activated_experts, c.n_routed_experts, c.moe_inter_dim
    S, r = c.n_shared_experts, c.kv_lora_rank
    # What RMSNorm keeps of n numbers: they and 1/rms; torch's form the normalized ones, in FP32. And of the input of a
    # Linear: with FP8, 8 bits and a scale for each 128; hidden: of the SwiGLU before it, whose output FP8 makes again.
    norm = lambda n: (high if kernels else 4) * n + 4
    linear = lambda n: n + 4 * -(-n // 128) if fp8 else high * n
    hidden = lambda n: linear(2 * n) + (0 if fp8 else high * n)

    q, kv, out = H * c.qk_head_dim, H * (c.qk_nope_head_dim + c.v_head_dim), high * H * c.v_head_dim + 4 * H
    attention = norm(D) + linear(D) * (2 if fp8 else 1) \
        + (norm(c.q_lora_rank) + linear(c.q_lora_rank) if c.q_lora_rank else 0) \
        + (high * (r + c.qk_rope_head_dim) + 4 if kernels else norm(r)) + linear(r) \
        + high * (q + kv if kernels else 2 * q + kv) + out              # torch's attention wants queries and keys whole
    if dense:
        ffn = norm(D) + linear(D) + hidden(c.inter_dim)
    else:
        gate = high * D + 4 * E + 16 * K + 8                                           # input, scores, choice, weights
        shared = (linear(D) if fp8 else 0) + hidden(S * F) if S else 0
        if kernels:
            tokens = c.micro_batch_size * c.seq_len
            rows = (tokens * K // 128 + E // ep) * 128 / tokens                        # of each expert whole tiles
            routed = arrive * (linear(D) if fp8 or ep > 1 else 0) + rows * (2 * linear(F) + 4) + 4 * K * arrive
        else:
            routed = K * (linear(D) + (hidden(F) if fp8 else hidden(F) + high * F) + high) + 16 * K * arrive
        ffn = norm(D) + gate + shared + routed + (arrive * (12 * K + 16) if ep > 1 else 0)     # whence they came
    if c.recompute and not (ep > 1 and cut):
        return high * D, attention + ffn - high * D
    if c.recompute:                                    # in a pipeline tokens don't travel a second time (model.Block)
        return high * D + ffn - norm(D), attention + norm(D) - high * D
    if c.recompute_mla:
        left = high * D + (out if kernels else 0)
        return left + ffn, attention - left
    return attention + ffn, 0


def chunk(c, mesh, module, kernels):
    """(bytes that a micro-batch leaves for backward in V3 or a Stage of it; at most those that wait between I and W;
    most bytes there for a moment: a layer made again, some rows' logits, the head's gradient)."""
    tokens, high = c.micro_batch_size * c.seq_len, 4 if c.precision == "fp32" else 2
    *_, arrive = copies(c, mesh.ep_nodes, mesh.ep // mesh.ep_nodes)
    cut, last, total, again, passing = mesh.pp > 1, hasattr(module, "head"), 0, 0, 0
    layers = module.layers.values() if cut else module.layers
    norm = (high if kernels else 4) * c.dim + 4
    for block, apart in (*((block, cut) for block in layers), *((m.block, False) for m in module.mtp)):
        left, remade = kept(c, isinstance(block.ffn, FFN), kernels, mesh.ep, arrive, apart)
        total, again, passing = total + tokens * left, again + tokens * remade, max(passing, tokens * remade)
        if c.precision == "bf16" and not kernels and not c.recompute:          # a copy of the experts, for each chunk
            total += 2 * sum(p.numel() for p in block.parameters() if p.ndim == 3)
    losses = 0
    if last:                                           # the norm, and of each loss the gradients of states and head
        losses = (1 + c.n_mtp) * (tokens * (high * c.dim + 8) + 4 * c.vocab_size * c.dim)
        total += tokens * norm + losses
        total += c.n_mtp * tokens * (high * c.dim if c.recompute else 3 * norm + 2 * high * c.dim)
        rows = min(tokens, CrossEntropy.ROWS)
        passing = max(passing, (8 * rows + high * c.dim) * c.vocab_size, 4 * c.dim * c.vocab_size)
    if cut and not kernels and not (layers and (c.recompute or c.recompute_mla)):
        total += tokens * high * c.dim                 # what the stage before has sent; elsewhere the first layer's own
    return total, total - losses + again, passing      # an I makes at most that of what W needs


def owned(mesh, held):
    """[how many numbers each of the dp ranks at this place of the pipeline owns] of ranks.held. mesh: of the first."""
    out = [0] * mesh.dp
    for (experts, copied), those in mesh.sharers().items():
        sizes = {name: p.numel() for name, (p, kind) in held.items() if kind == (experts, copied)}
        load = [0] * len(those)
        for name, owner in parallel.owners(sizes, len(those)).items():
            load[owner] += sizes[name]
        for rank in range(mesh.dp):
            out[rank] += load[those.index(mesh.rank) + rank // (mesh.ep if experts else 1)]
    return out


def copied_weights(c, modules, kernels):
    """Bytes of the copies that are made of weights once a step: in FP8 with their scales, or of experts in BF16."""
    if c.precision == "bf16":
        return 2 * sum(p.numel() for module in modules for p in module.parameters() if p.ndim == 3 and kernels)
    eight = {p for part in modules for m in part.modules() if getattr(m, "recipe", None)
             for p in m.parameters(recurse=False)}
    return sum(p.numel() + 4 * prod(p.shape[:-2]) * prod(-(-n // 128) for n in p.shape[-2:]) for p in eight)


def memory(c, mesh, kernels, a=None):
    """What the ranks that stand where `mesh` does in a pipeline hold, the fullest of them: a dict of bytes: "weights"
    (FP32), "copies" (of them, in FP8 or BF16), "gradients", "moments", "activations" (of all chunks that are under way
    at once), "passing" (there for a moment, see `chunk`), "most" (all that may be there at once) and "average" (on the
    CPU). "between" and "inside": what it sends in a step to other machines and inside its own for the sums of gradients
    and the new weights, each at most once for every parameter that others hold too. Besides "parameters", how many it
    holds, and "owned", how many all of these ranks own, each parameter once. a: arithmetic(c), where it is known.
    UserError where there is no such pipeline."""
    mesh, c = replace(mesh, rank=mesh.pp_rank * mesh.dp), whole_micro_batches(c, mesh)         # the first of them
    with torch.device("meta"):
        modules = ranks.parts(c, mesh, initialize=False, a=a)
    held, sent = ranks.held(c, mesh, modules), {"between": 0, "inside": 0}
    mine, here = owned(mesh, held), sum(p.numel() for p, _ in held.values())
    for kind, those in mesh.sharers().items():
        machines = {rank // (mesh.world // mesh.nodes) for rank in those}
        each = (2 if c.grad_sum == "bf16" else 4) + 4 if len(those) > 1 else 0
        sent["between" if len(machines) > 1 else "inside"] += each * sum(
            p.numel() for p, k in held.values() if k == kind)
    sizes, late, passing = zip(*(chunk(c, mesh, module, kernels) for module in modules))
    micro_batches = math.ceil(c.batch_size / (mesh.dp * c.micro_batch_size))
    under_way = activations = 0
    for step in dualpipe.schedule(pipeline(c, mesh), mesh.pp, mesh.pp_rank, micro_batches):
        for part, dir, _ in reversed(step.parts):                                      # a pair begins with its backward
            under_way += {"F": sizes[dir], "B": -sizes[dir], "I": late[dir] - sizes[dir], "W": -late[dir]}[part]
            activations = max(activations, under_way)
    out = {"weights": 4 * here, "copies": copied_weights(c, modules, kernels), "gradients": 4 * here,
           "moments": 2 * (4 if c.moments == "fp32" else 2) * (max(mine) if c.zero1 else here),
           "activations": activations, "passing": max(passing)}
    # The gradients of a single micro-batch come as its activations go.
    once = max(out["gradients"], activations) if micro_batches == 1 else out["gradients"] + activations
    out |= {"most": sum(out[what] for what in ("weights", "copies", "moments", "passing")) + once,
            "average": 4 * max(mine) if c.ema_decay else 0, "parameters": here, "owned": sum(mine), **sent}
    return {what: round(n) for what, n in out.items()}


# --- time -------------------------------------------------------------------------------------------------------------

def places(mesh):
    """[every rank of a pipeline, as the first rank of its stage]."""
    return [replace(mesh, rank=rank * mesh.dp) for rank in range(mesh.pp)]


def plan(c, mesh, cluster=None, a=None):
    """A step of the Config on the ranks of a mesh.

    -> (dict of numbers: seconds, bytes and shares, of one rank; [(what, text)] to print). UserError where there is no
    such pipeline. a: arithmetic(c), where it is known.
    """
    cluster, a, kind, pp, dp = cluster or Cluster(), a or arithmetic(c), pipeline(c, mesh), mesh.pp, mesh.dp
    c = whole_micro_batches(c, mesh)
    fp8, tokens, high = c.precision.startswith("fp8"), c.micro_batch_size * c.seq_len, 4 if c.precision == "fp32" else 2
    count, _ = dualpipe.layout(kind, pp, 0)
    mine = [dualpipe.layout(kind, pp, rank)[1] for rank in range(pp)]
    M, rest = divmod(c.batch_size, c.micro_batch_size * dp)
    if rest:
        raise UserError(f"--micro_batch_size={c.micro_batch_size}: does not divide the {c.batch_size / dp:g} sequences "
                        f"that {'a pipeline' if pp > 1 else 'a rank'} gets of --batch_size={c.batch_size}")
    dualpipe.check(kind, pp, M)

    # Arithmetic: a chunk's, on the busiest rank, and that of a layer of experts by itself.
    speed = cluster.fp8_flops if fp8 else cluster.flops
    third = lambda flops: flops / 3 * tokens / speed
    cuts = balanced(c, count, a)
    stages = [sum(a["layers"][i:j]) for i, j in zip(cuts, cuts[1:])]
    stages[-1] += sum(a["layers"][c.n_layers:]) + a["end"]
    busiest = max(sum(stages[s] for s in those) / len(those) for those in mine)
    F, attention = third(busiest), third(a["attention"])
    experts = third(a["layers"][c.n_layers - 1]) - attention

    # Exchanges: of a layer, of a chunk with the most layers of experts.
    out_of_node, on, _ = copies(c, mesh.ep_nodes, mesh.ep // mesh.ep_nodes)
    exchange = lambda width: tokens * c.dim * width * max(out_of_node / cluster.between, on / cluster.inside)
    wide = exchange(high)
    dispatch, combine = exchange(1) if fp8 else wide, wide                      # forward; backward the other way round
    layers = max(sum(i >= c.n_dense_layers for i in range(start, stop)) for start, stop in zip(cuts, cuts[1:]))
    forth = back = layers * (dispatch + combine)
    hides = [(dispatch, attention), (dispatch, 2 * experts), (combine, experts), (combine, 2 * attention)]
    exposed = layers * sum(max(0.0, travels - computes) for travels, computes in hides)

    # The step.
    lists = [dualpipe.schedule(kind, pp, rank, M) for rank in range(pp)]
    passed = tokens * c.dim * high                                              # from stage to stage
    result = dualpipe.simulate(kind, lists, F=F + forth, B=2 * F + back, W=F, FB=3 * F + exposed,
                               p2p=passed / cluster.between)
    step = result["makespan"]
    pairs = min(sum(s.kind == "FB" for s in steps) for steps in lists)
    chunks = max(sum(part == "F" for s in steps for part, *_ in s.parts) for steps in lists)
    hidden = pairs * (forth + back - exposed)
    per_gpu = c.batch_size * c.seq_len / step / mesh.world
    each = chunks * layers * tokens * c.dim * 2 * ((1 if fp8 else high) + high)
    numbers = {"step": step, "bubble": result["bubble"] / step, "pair": 3 * F + exposed, "travel": forth + back,
               "hidden": hidden, "exposed": chunks * (forth + back) - hidden, "tokens_per_s": per_gpu,
               "microbatches": M, "between": out_of_node * each, "inside": on * each,
               "passed": 2 * chunks * passed if pp > 1 else 0}
    ms = lambda t: f"{t * 1e3:.1f} ms"
    what = "FP8" if fp8 else c.precision.upper()
    ways = f"{dp} pipelines of {pp} ranks ({kind})" if pp > 1 else "no pipeline"
    rows = [
        ("cluster", f"{mesh.world:,} GPUs, {mesh.world // mesh.nodes} a node: {ways}, experts over {mesh.ep} "
                    f"rank{'s' * (mesh.ep > 1)} on {mesh.ep_nodes} node{'s' * (mesh.ep_nodes > 1)}"),
        ("assumed", f"{speed / 1e12:.0f} TFLOP/s ({what}), a third of the work each for forward, input and weights; "
                    f"{cluster.between / 1e9:.0f} GB/s a GPU between nodes, {cluster.inside / 1e9:.0f} inside, the "
                    f"slower hop counts; balanced routing: {out_of_node:.2f} copies of a token leave its node, "
                    f"{on:.2f} its GPU; dispatch in {what}"),
        ("a layer", f"forward: attention {ms(attention)}, experts {ms(experts)}, dispatch {ms(dispatch)}, combine "
                    f"{ms(combine)}; their gradients as much, the other way round"),
        ("a step", f"{c.batch_size:,} sequences, {M} micro-batches a {'pipeline' if pp > 1 else 'rank'}: {step:.3g} s, "
                   f"bubble {numbers['bubble']:.1%}; exchanges {hidden:.3g} s hidden, {numbers['exposed']:.3g} s "
                   f"exposed"),
        ("speed", f"{per_gpu:,.0f} tokens/s a GPU, {per_gpu * a['flops'] / 1e12:,.0f} TFLOP/s of the model's own; "
                  f"{1e12 / per_gpu / 3.6e6:,.1f}K GPU hours per 1T tokens, without optimizer, data and faults"),
    ]
    if pp > 1:
        rows[2:2] = [("stages", f"of {' '.join(str(stop - start) for start, stop in zip(cuts, cuts[1:]))} layers, the "
                                f"last with head and MTP; the busiest rank works {busiest * count / sum(stages):.2f} "
                                f"of the mean")]
        rows[4:4] = [("a pair", f"{ms(3 * F)} of arithmetic and {ms(forth + back)} of exchanges, {ms(exposed)} of them "
                                f"exposed" if pairs else
                      f"{kind} has none: {ms(forth + back)} of exchanges a micro-batch are exposed")]
    first, least = c.batch_size // 5 // (c.micro_batch_size * dp), 2 * pp
    if c.batch_ramp and kind.startswith("dualpipe") and first < least:
        rows.append(("ramp", f"the first batch, {c.batch_size // 5:,} sequences, is {first} micro-batches a pipeline, "
                             f"fewer than {kind}'s {least}, so training refuses it: give --batch_ramp=0 or "
                             f"--pipeline=1f1b"))
    return numbers, rows


# --- what --plan prints -----------------------------------------------------------------------------------------------

def everywhere(c, mesh, a=None):
    """[memory of the ranks at each place of a pipeline], on the kernels of a Hopper GPU if the precision is theirs."""
    return [memory(c, place, c.precision != "fp32", a) for place in places(mesh)]


def fullest(*args):
    return max(everywhere(*args), key=lambda m: m["most"])


def techniques(c, mesh, a):
    """{what saves memory in this Config: `memory` of the fullest rank without it}."""
    without = {
        "expert parallelism": mesh.ep > 1 and (c, replace(mesh, ep=1, ep_nodes=1), a),
        "ZeRO-1": c.zero1 and mesh.world > mesh.pp and (c.replace(zero1=False), mesh, a),
        "BF16 moments": c.moments == "bf16" and (c.replace(moments="fp32"), mesh, a),
        "FP8": c.precision.startswith("fp8") and (c.replace(precision="bf16"), mesh, a),
        "recomputing": (c.recompute or c.recompute_mla) and (c.replace(recompute=False, recompute_mla=False), mesh, a),
        "one copy of each stage": pipeline(c, mesh) == "dualpipev" and (c.replace(pipeline="dualpipe"), mesh, a)}
    found = {name: fullest(*args) for name, args in without.items() if args}
    if c.ema_decay:
        m = fullest(c, mesh, a)
        found["the average on the CPU"] = {**m, "most": m["most"] + m["average"]}
    return found


def layers(c, mesh, a):
    """[which layers the ranks hold] at each place of a pipeline, of both directions."""
    count, _ = dualpipe.layout(pipeline(c, mesh), mesh.pp, 0)
    cuts = balanced(c, count, a)

    def stage(s):
        first, last = cuts[s], cuts[s + 1] - 1
        return ", ".join(["embedding"] * (s == 0) + [f"{first}-{last}" if last > first else f"{last}"] * (last >= first)
                         + ["head"] * (s == count - 1) + ["MTP"] * (s == count - 1 and c.n_mtp > 0))
    return [" | ".join(map(stage, dualpipe.layout(pipeline(c, mesh), mesh.pp, rank)[1])) for rank in range(mesh.pp)]


COLUMNS = {"weights": "weights", "copies": "copies", "gradients": "gradients", "moments": "moments",
           "activations": "activations", "passing": "passing", "most": "in all"}


def report(c, mesh, train_tokens, a):
    """What --plan prints of a layout: speed, cost of train_tokens, and what each rank sends and holds, with and without
    each technique."""
    numbers, rows = plan(c, mesh, a=a)
    held, hours = everywhere(c, mesh, a), train_tokens / numbers["tokens_per_s"] / 3600
    top, most = max(held, key=lambda m: m["most"]), {what: max(m[what] for m in held) for what in held[0]}
    size, unit = (1e9, "GB") if top["most"] > 1e10 else (1e6, "MB")
    GB = lambda n: f"{n / size:,.1f} {unit}"
    rows += [
        ("a GPU sends", f"in a step: for its experts {GB(numbers['between'])} to other nodes and "
                        f"{GB(numbers['inside'])} inside its own; from stage to stage {GB(numbers['passed'])}; for "
                        f"gradients and new weights at most {GB(most['between'])} between and {GB(most['inside'])} "
                        f"inside nodes"),
        ("cost", f"{train_tokens / 1e9:,.1f}B tokens: {hours:,.1f} GPU hours, ${2 * hours:,.1f} at $2 an hour"),
        ("V3's own", "14.8T tokens 2,664K hours, long contexts 119K, post-training 5K: 2,788K hours, $5.576M, with all "
                     "that this leaves out (section 1)"),
        ("all ranks", f"own {sum(m['owned'] for m in held) / 1e9:.3f}B parameters, each once"),
        ("fits 80 GB", f"{'yes' if top['most'] < 80e9 else 'no'}: {GB(top['most'])} on the fullest GPU, of them "
                       f"{GB(top['activations'])} of activations; other workspace not counted"),
    ]
    names = [f"rank {rank}: {own}" if mesh.pp > 1 else own for rank, own in enumerate(layers(c, mesh, a))]
    without = {f"  without {name}": m for name, m in techniques(c, mesh, a).items()}
    wide = 3 + max(map(len, (*names, *without)))
    table = [f"  {unit + ' of a rank' + ' of the pipeline' * (mesh.pp > 1):{wide}}{'parameters':>10}"
             + "".join(f"{column:>13}" for column in COLUMNS.values())]
    table += [f"  {name:{wide}}{m['parameters'] / 1e9:9.3f}B" + "".join(f"{m[what] / size:13,.1f}" for what in COLUMNS)
              for name, m in (*zip(names, held), *without.items())]
    return "\n".join([*(f"  {what:13} {text}" for what, text in rows), "", *table, f"""
  Of the ranks at each place in the pipeline the fullest; without a technique, the fullest of all. Weights and
  gradients are FP32, copies of weights FP8, or the experts' BF16; moments are those of the parameters that a rank
  owns. Activations are what the chunks under way leave for backward on a Hopper GPU's kernels. Passing: a layer
  made again in backward, some rows' logits, the head's gradient. On the CPU: {GB(most['average'])} of averages."""])
