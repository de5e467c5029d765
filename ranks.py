"""What one rank of a run works on: V3 whole or the stages of a pipeline, with all of the experts or its share of them.

    python train.py                       one rank: V3
    torchrun --nproc-per-node=4 ...       dp = 4: V3 on each, a quarter of every batch
             ... --ep=2                   neighbours keep half of the experts each and send each other tokens (moe.py)
             ... --pp=2                   two pipelines of two ranks; a rank runs one or two stages (dualpipe.py)

This is the room where the model and the ranks meet: model.py knows no ranks, parallel.py no model. Whatever a rank
holds has the official names and, seeded by them, the values that it has in the whole model.
"""
import torch

import configs
import dualpipe
import parallel
from configs import UserError
from data import batch_size_at
from dualpipe import DualPipe
from model import V3, balanced, from_hf, official_tensors, shared, stages
from moe import ExpertRanks, spread


def check(c, mesh):
    """UserError where the layers or a batch can't go through the pipeline of the config."""
    if c.pp == 1:
        return
    if c.compile:
        raise UserError("--compile: not in a pipeline, which puts gradients off behind the compiler's back; leave out "
                        "one of --compile and --pp")
    balanced(c, dualpipe.layout(c.pipeline, c.pp, 0)[0])
    for step in range(c.batch_ramp + 1):
        share = batch_size_at(c, step) // mesh.dp
        if share % c.micro_batch_size:
            raise UserError(f"--micro_batch_size={c.micro_batch_size}: does not divide the {share} sequences that a "
                            f"pipeline gets in step {step + 1}")
        try:
            dualpipe.check(c.pipeline, c.pp, share // c.micro_batch_size)
        except UserError as e:
            raise UserError(f"--pp={c.pp} --pipeline={c.pipeline}: {e}; step {step + 1} has {share} sequences a "
                            f"pipeline: give another --micro_batch_size (now {c.micro_batch_size}) or --batch_size") \
                from None


def build(c, device, mesh, from_folder):
    """([the modules that this rank runs], the pipeline or None): V3 whole, or one or two stages of it. from_folder:
    with the weights of --init_from."""
    if mesh.pp == 1 and from_folder:
        v3 = from_hf(c.init_from, device, **{f: getattr(c, f) for f in configs.FIELDS if f != "device"})
        return spread_experts(c, [v3], mesh), None
    with torch.device(device):
        modules = parts(c, mesh, initialize=not from_folder)
    if mesh.pp == 1:
        return modules, None
    criterion = next((stage.criterion for stage in modules if stage.last), None)
    like = modules[0].like(c.micro_batch_size)
    pipe = DualPipe(c.pipeline, modules, criterion, like, mesh.pp_group)
    if from_folder:
        whole = official_tensors(from_hf(c.init_from, n_mtp=c.n_mtp))
        for stage in modules:
            for name, tensor in official_tensors(stage).items():
                tensor.detach().copy_(whole[name])
    return pipe.in_order, pipe


def parts(c, mesh, initialize=True, a=None):
    """[V3], or the stages of this rank, one for each direction of the pipeline; with its share of every layer's
    experts. a: model.arithmetic(c), where it is known."""
    if mesh.pp == 1:
        return spread_experts(c, [V3(c, initialize)], mesh)
    count, mine = dualpipe.layout(c.pipeline, mesh.pp, mesh.pp_rank)
    return spread_experts(c, stages(c, count, mine, initialize, a), mesh)


def spread_experts(c, modules, mesh):
    """Leave to this rank its share of every layer's experts; returns the modules."""
    if mesh.ep > 1:
        ranks = ExpertRanks(mesh.ep_nodes, mesh.ep // mesh.ep_nodes, mesh.ep_rank, mesh.between, mesh.inside,
                            c.precision.startswith("fp8"), next(modules[0].parameters()).device)
        for module in modules:
            spread(module, ranks)
    return modules


def held(c, mesh, modules):
    """{name: (parameter, (is it experts?, does another rank of the pipeline hold it too?))} of the modules."""
    copied = {id(p) for p in dualpipe.copied(c.pipeline, modules, shared(modules))} if mesh.pp > 1 else ()
    return {name: (p, (p.ndim == 3, id(p) in copied))                                 # of three dims: stacked experts
            for module in modules for name, p in module.named_parameters()}


def replicas(c, mesh, modules, pipe):
    """(parallel.Shares of the modules' parameters, the group whose counts of a gate's load belong together)."""
    groups = {name: (p, mesh.replicas.get(kind)) for name, (p, kind) in held(c, mesh, modules).items()}
    counters = mesh.replicas.get((False, bool(pipe) and c.pipeline == "dualpipe"))
    return parallel.Shares(groups, c.zero1, torch.bfloat16 if c.grad_sum == "bf16" else None), counters


def pipelined(c, pipe, batch, totals, weight):
    """Forward and backward of this pipeline's sequences; the parts of the loss that fall to this rank."""
    for stage in pipe.stages:
        stage.begin(totals, weight)
    pipe.step(len(batch) // c.micro_batch_size, batch, batch)
    return {name: sum(stage.parts[name] for stage in pipe.stages) for name in pipe.stages[0].parts}


@torch.no_grad()
def evaluate(c, pipe, data, mesh):
    """(nats per token, bits per byte) of the validation text, as train.evaluate, through the pipeline. Its batches all
    have one size: the last is filled up with windows of nothing."""
    T, total, count, micros = c.seq_len, 0.0, 0, 2 * mesh.pp
    for stage in pipe.stages:
        stage.eval()
    for tokens, valid in data.eval_windows(micros * c.micro_batch_size, mesh.dp_rank, mesh.dp):
        filled = torch.zeros(2, micros * c.micro_batch_size, tokens.shape[1], dtype=torch.int64)
        filled[1] = -1
        filled[0, :len(tokens)], filled[1, :len(tokens)] = tokens, torch.where(valid, tokens, ~tokens)
        for stage in pipe.stages:
            stage.begin(([1] * (c.n_mtp + 1), 1))
        loss = pipe.step(micros, *filled.to(pipe.like.device))
        total += loss if mesh.pp_rank == 0 else 0.0                                   # every rank of it has the same
        count += int(valid[:, 1:T + 1].sum()) if mesh.pp_rank == 0 else 0
    for stage in pipe.stages:
        stage.train()
    total, count = mesh.total({"nats": total, "tokens": count}).values()
    return total / count, data.bits_per_byte(total)
