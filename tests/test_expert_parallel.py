"""Experts on many ranks against the same layer, and the same V3, in one process; and what it costs to send."""
import datetime
import json
import multiprocessing
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import GPU, GROUPS, agree, build, lively, no_triton, random_tokens, run_ranks, tiny

import fp8
import parallel
from configs import UserError
from experts import sum_triton
from fp8_tiles import quantize
from model import V3, official_tensors, target_totals
from moe import ExpertRanks, Hop, MoE, Sent, joined, pack, parted, spread, unpack_torch, unpack_triton

DEVICE = "cuda" if GPU else "cpu"             # of kernels; ranks are on the CPU
LAYOUTS = {"1x2": (1, 2), "2x2": (2, 2), "2x4": (2, 4), "4x2": (4, 2)}                           # nodes x ranks of each


# --- what the ranks do ------------------------------------------------------------------------------------------------

def error(ours, theirs, whole=None):
    """Relative Frobenius error of ours; where `whole` is given, against its size."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / (theirs if whole is None else whole).norm().clamp_min(1e-30)).item()


def groups(nodes, locals):
    """(between, inside) of this rank."""
    out, rank = [None, None], dist.get_rank()
    for i, members in enumerate(([[n * locals + j for n in range(nodes)] for j in range(locals)],
                                 [[n * locals + j for j in range(locals)] for n in range(nodes)])):
        for ranks in members:
            group = dist.new_group(ranks)                                                 # every rank makes every group
            if rank in ranks and len(ranks) > 1:
                out[i] = group
    return out


def mixture(**changes):
    moe = lively(MoE(tiny(**changes)))
    torch.manual_seed(3)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return moe


def shares(total, world):
    """Tokens of each rank, very unequal; the first has none."""
    weights = [r * r for r in range(world)]
    sizes = [total * w // sum(weights) for w in weights]
    return sizes[:-1] + [total - sum(sizes[:-1])]


def summed(p, grad):
    """The gradient of a parameter that all ranks hold, of all ranks' tokens."""
    grad = torch.zeros_like(p) if grad is None else grad.clone()
    dist.all_reduce(grad)
    return grad


HOT, IDLE = 50.0, -50.0
CASES = {                                     # (changes of the Config, bias of the 16 experts)
    "groups": (GROUPS, None),
    "no groups": (dict(n_routed_experts=16, n_activated_experts=3), None),
    "all to one": (dict(n_routed_experts=16, n_activated_experts=1), [HOT] + [0.0] * 15),
    "half get nothing": (dict(n_routed_experts=16, n_activated_experts=4), [0.0] * 8 + [IDLE] * 8),
}


def run_layer(case, ranks, world, dtype, low=False):
    """Values and all gradients of one layer, whole and spread; and in three parts cut from each other, with the weight
    gradients put off."""
    (changes, bias), rank = CASES[case], ranks.rank
    whole, mine = mixture(**changes).to(dtype), mixture(**changes).to(dtype)
    for moe in (whole, mine):
        moe.gate.bias.copy_(moe.gate.bias if bias is None else torch.tensor(bias))
        if low:
            fp8.convert(moe, reference=True)
    spread(mine, ranks)
    N, D = 37, whole.w2.shape[1]
    x, dy = torch.randn(2, 1, N, D, dtype=dtype, generator=torch.Generator().manual_seed(7))
    x.requires_grad_()
    y, routing = whole(x)
    y.backward(dy)

    sizes = shares(N, world)
    here, dy = (t.split(sizes, 1)[rank] for t in (x.detach(), dy))
    out = {}
    for way in ("whole", "parts"):
        mine.zero_grad()
        own = here.clone().requires_grad_()
        if way == "whole":
            ours, _ = mine(own)
            ours.backward(dy)
        else:
            mine.w13.queue, mine.w2.queue = [], []
            cut = lambda t: t.detach().requires_grad_()
            rows, sent = mine.dispatch(own)
            rows_in = tuple(map(cut, rows))
            shared, back = mine.experts(own, rows_in, sent)
            shared_in, back_in = cut(shared), tuple(map(cut, back))
            ours = mine.combine(shared_in, back_in, sent)
            ours.backward(dy)
            torch.autograd.backward([shared, *back], [shared_in.grad, *(t.grad for t in back_in)])
            torch.autograd.backward(rows, [t.grad for t in rows_in])
            out["queued"] = len(mine.w13.queue) == len(mine.w2.queue) == 1 and mine.w13.grad is None
            with torch.no_grad():
                mine.w13.queue.pop()(), mine.w2.queue.pop()()
            out["tokens here"] = len(sent.indices)
            assert sent.rows == (sent.indices >= 0).sum()
        experts = slice(mine.first, mine.first + len(mine.w13))
        out[way] = {"y": error(ours.detach(), y.detach().split(sizes, 1)[rank]),
                    "x": error(own.grad, x.grad.split(sizes, 1)[rank])}
        for (name, p), q in zip(mine.named_parameters(), whole.parameters()):
            if name in ("w13", "w2"):
                out[way][name] = error(p.grad, q.grad[experts], q.grad)                   # an idle one's is zero
            elif changes["n_activated_experts"] > 1 or name != "gate.weight":             # K = 1: its gradient vanishes
                out[way][name] = error(summed(p, p.grad), q.grad)
    out["busy"] = int(routing.load.count_nonzero())
    return out


def run_model(ranks, world, dtype, steps=3, **changes):
    """Steps of descent of a whole V3, each rank with its own sequence: losses, gradients, loads and biases."""
    changes = dict(balance_alpha=0.1, init_std=0.1, **GROUPS, **changes)
    whole, mine = build(**changes).to(dtype), build(**changes).to(dtype)
    spread(mine, ranks)
    out = {"loss": 0.0, "grads": 0.0, "loads": True, "biases": True, "own loads": True, "moved": 0.0}
    for step in range(steps):
        tokens = random_tokens(world, 9 + 2, seed=step)
        totals = target_totals(tokens, 1)
        want = [whole.loss(sequence, totals=totals)[0] for sequence in tokens.split(1)]
        for share in want:
            share.backward()
        want = sum(share.item() for share in want)
        loss, _ = mine.loss(tokens[ranks.rank:ranks.rank + 1], totals=totals)
        loss.backward()
        out["loss"] = max(out["loss"], abs(summed(loss, loss.detach()).item() / want - 1))
        own = [gate.load.clone() for gate in mine.gates()]
        parallel.add([gate.load for gate in mine.gates()], dist.group.WORLD)           # one exchange, of integers
        theirs = official_tensors(whole, {name: p.grad for name, p in whole.named_parameters()})
        grads = {name: p.grad if p.ndim == 3 else summed(p, p.grad) for name, p in mine.named_parameters()}
        ours = official_tensors(mine, grads)
        out["grads"] = max(out["grads"], *(error(grad, theirs[name]) if theirs[name].abs().max() > 1e-6 else 0.0
                                           for name, grad in ours.items()))
        for a, b, alone in zip(mine.gates(), whole.gates(), own):
            out["loads"] &= torch.equal(a.load, b.load)
            out["own loads"] &= torch.equal(alone, a.load)
        for model, gradients in ((whole, None), (mine, grads)):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p -= 0.05 * (p.grad if gradients is None else gradients[name])
            for gate in model.gates():
                gate.update_bias(0.01)
            model.zero_grad()
        out["biases"] &= all(torch.equal(a.bias, b.bias) for a, b in zip(mine.gates(), whole.gates()))
    out["moved"] = min((a.bias - b.bias).abs().max().item() for a, b in zip(mine.gates(), build(**changes).gates()))
    return out


def run_bytes(ranks, world):
    """Bytes that one forward sends, in all; and the same counted by hand from who chose whom."""
    moe = mixture(**GROUPS).double()
    spread(moe, ranks)
    x = torch.randn(1, 50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(ranks.rank))
    rows, sent = moe.dispatch(x)
    tokens, _ = sent.finish(Sent.back, rows)
    there = dict(ranks.bytes_sent)
    sent.finish(Sent.there, sent.start(Sent.back, tokens))
    node, local, out = ranks.rank // ranks.locals, ranks.rank % ranks.locals, dict(nodes=0, inside=0, pairs=0, most=0)
    for chosen in sent.routing.indices.tolist():
        to = {e // (16 // world) for e in chosen}
        nodes = {rank // ranks.locals for rank in to}
        out["nodes"] += len(nodes - {node})
        out["inside"] += sum(rank % ranks.locals != local for rank in to)
        out["pairs"] += sum(e // (16 // ranks.nodes) != node for e in chosen)
        out["most"] = max(out["most"], len(nodes))
    out |= {"sent between": there["between"], "sent inside": there["inside"],
            "back between": ranks.bytes_sent["between"] - there["between"],
            "back inside": ranks.bytes_sent["inside"] - there["inside"]}
    every = [None] * world
    dist.all_gather_object(every, out)
    return {key: (max if key == "most" else sum)(o[key] for o in every) for key in out}


def run_fp8(nodes, locals, rank, between, inside):
    """V3's width, few tokens: what the ways there send in FP8, against BF16, and what arrives."""
    x = torch.randn(1, 6, 7168, generator=torch.Generator().manual_seed(rank)).bfloat16()
    arrived, sent, grads, gradients_sent = [], [], [], []
    for low in (False, True):
        moe = MoE(tiny(dim=7168, moe_inter_dim=4, n_routed_experts=16, n_activated_experts=8, n_expert_groups=8,
                       n_limited_groups=4, n_shared_experts=0))
        torch.manual_seed(3)
        for p in moe.parameters():
            torch.nn.init.normal_(p, std=0.02)
        ranks = ExpertRanks(nodes, locals, rank, between, inside, fp8=low)
        spread(moe, ranks)
        own = x.clone().requires_grad_()
        rows, there = moe.dispatch(own)
        tokens, weights = there.finish(Sent.back, rows)
        sent.append(sum(ranks.bytes_sent.values()))
        # Its backward is that of BF16: the gradient doesn't know of the rounding.
        torch.autograd.backward([tokens, weights], [torch.ones_like(tokens), torch.zeros_like(weights)])
        arrived.append(tokens.detach().float())
        grads.append(own.grad)
        before = sum(ranks.bytes_sent.values())
        same = torch.equal(there.there(x[0])[0], tokens)                      # a gradient goes the tokens' way
        gradients_sent.append(sum(ranks.bytes_sent.values()) - before)
    plain, low = arrived
    return {"ratio": sent[1] / sent[0] if sent[0] else 0.5, "grads": torch.equal(*grads), "same": same,
            "gradients": gradients_sent[1] / gradients_sent[0] if gradients_sent[0] else 0.5,
            "error": ((low - plain).norm() / plain.norm()).item() if len(plain) else 0.03, "dtype": str(own.grad.dtype)}


def run_overlap(ranks, world, late=1.0):
    """The last rank is late. How long the others are in each part, forward and backward."""
    moe, last, out = mixture(**GROUPS), ranks.rank == world - 1, {}
    spread(moe, ranks)
    x = torch.randn(1, 4, 32, requires_grad=True)
    cut = lambda t: t.detach().requires_grad_()

    def timed(name, part, *arguments):
        if last and name in ("dispatch", "combine backward"):
            time.sleep(late)
        began = time.time()
        result = part(*arguments)
        out[name] = time.time() - began
        return result

    dist.barrier()
    rows, sent = timed("dispatch", moe.dispatch, x)
    rows_in = tuple(map(cut, rows))
    here, back = timed("experts", moe.experts, x, rows_in, sent)
    here_in, back_in = cut(here), tuple(map(cut, back))
    y = timed("combine", moe.combine, here_in, back_in, sent)
    dist.barrier()
    timed("combine backward", y.backward, torch.ones_like(y))
    timed("experts backward", torch.autograd.backward, [here, *back], [here_in.grad, *(t.grad for t in back_in)])
    timed("dispatch backward", torch.autograd.backward, rows, [t.grad for t in rows_in])
    return out


def rank_main(rank, layout, folder):
    torch.set_num_threads(1)
    nodes, locals = LAYOUTS[layout]
    world = nodes * locals
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{layout}", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=30))
    between, inside = groups(nodes, locals)
    ranks = ExpertRanks(nodes, locals, rank, between, inside)
    out = {case: run_layer(case, ranks, world, torch.float64) for case in CASES}
    out["float32"] = run_layer("groups", ranks, world, torch.float32)
    low = ExpertRanks(nodes, locals, rank, between, inside, fp8=True)
    out["experts in fp8"] = run_layer("groups", low, world, torch.float32, low=True)
    out["model"] = run_model(ranks, world, torch.float64)
    out["model, recomputed"] = run_model(ranks, world, torch.float64, steps=1, recompute=True)
    out["model, float32"] = run_model(ranks, world, torch.float32, steps=1)
    out["bytes"] = run_bytes(ExpertRanks(nodes, locals, rank, between, inside), world)
    out["fp8"] = run_fp8(nodes, locals, rank, between, inside)
    out["overlap"] = run_overlap(ranks, world) if layout == "2x2" else None
    (folder / f"{layout}.{rank}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    # One process imports torch; on Linux its ranks are forks of it, before it has started any thread.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for layout, (nodes, locals) in LAYOUTS.items():
        processes = [context.Process(target=rank_main, args=(r, layout, Path(sys.argv[1])))
                     for r in range(nodes * locals)]
        [p.start() for p in processes]
        [p.join() for p in processes]


# --- what is asked of them --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{layout: the results of its ranks}, of one run of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_ranks(__file__, folder, timeout=240)
    out = {layout: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{layout}.*.json"))]
           for layout in LAYOUTS}
    assert {layout: len(results) for layout, results in out.items()} == \
        {layout: nodes * locals for layout, (nodes, locals) in LAYOUTS.items()}, done.stderr
    return out


EVERY = pytest.mark.parametrize("layout", LAYOUTS)


@EVERY
@pytest.mark.parametrize("case", [*CASES, "float32"])
def test_a_layer_on_many_ranks_is_the_layer_in_values_and_every_gradient(case, layout, ranks):
    limit = 1e-6 if case == "float32" else 1e-13
    for result in ranks[layout]:
        result = result[case]
        for way in ("whole", "parts"):
            assert max(result[way].values()) < limit, result[way]
        assert result["queued"]


@EVERY
def test_experts_in_fp8_that_also_travel_in_fp8_are_the_same_on_many_ranks_but_for_the_tiles_of_wgrad(layout, ranks):
    for result in ranks[layout]:
        numbers = result["experts in fp8"]["whole"]
        assert max(numbers[name] for name in ("y", "x", "gate.weight")) < 1e-6, numbers
        assert max(numbers.values()) < 0.05, numbers                           # scales are of 128 tokens of a rank


@EVERY
def test_a_rank_may_have_no_tokens_or_get_none_or_all(layout, ranks):
    here = {case: [result[case]["tokens here"] for result in ranks[layout]] for case in CASES}
    assert here["all to one"] == [37] + [0] * (len(ranks[layout]) - 1)         # the first has no tokens of its own
    assert not any(here["half get nothing"][len(ranks[layout]) // 2:])
    assert ranks[layout][0]["all to one"]["busy"] == 1 and min(here["groups"]) > 0


@EVERY
def test_v3_on_many_ranks_is_v3_in_loss_gradients_loads_and_biases(layout, ranks):
    for result in ranks[layout]:
        # Whose sums float32 rounds in another order: 1.06e-6 on one machine.
        for name, limit in (("model", 1e-11), ("model, recomputed", 1e-11), ("model, float32", 3e-6)):
            numbers = result[name]
            print(f"{layout} {name}: loss {numbers['loss']:.1e}, gradients {numbers['grads']:.1e}")
            assert max(numbers["loss"], numbers["grads"]) < limit, numbers
            assert numbers["loads"] and numbers["biases"] and numbers["moved"] > 0.005
            assert not numbers["own loads"]                       # its own counts would move the biases otherwise


@EVERY
def test_a_token_crosses_to_a_node_once_and_there_goes_to_a_rank_once(layout, ranks):
    sent = ranks[layout][0]["bytes"]
    token, sums = 32 * 8 + 4 * (8 + 4), 32 * 8                    # x with 4 weights and experts' numbers; what returns
    assert sent["sent between"] == token * sent["nodes"] and sent["sent inside"] == token * sent["inside"]
    assert sent["back between"] == sums * sent["nodes"] and sent["back inside"] == sums * sent["inside"]
    assert sent["most"] <= min(2, LAYOUTS[layout][0])                                     # n_limited_groups
    if LAYOUTS[layout][0] > 1:
        print(f"{layout}: {sent['nodes']} copies between nodes for {sent['pairs']} (token, expert) pairs there: "
              f"{sent['nodes'] / sent['pairs']:.0%}")
        assert 0 < sent["nodes"] < 0.75 * sent["pairs"]


@EVERY
def test_tokens_and_gradients_go_there_in_half_of_bf16s_bytes_scales_included(layout, ranks):
    for result in ranks[layout]:
        result = result["fp8"]
        print(f"{layout}: {result['ratio']:.4f} of the bytes, error {result['error']:.1e}")
        assert result["ratio"] <= 0.52 and result["gradients"] <= 0.52 and 0.01 < result["error"] < 0.04
        assert result["same"]
        assert result["grads"] and result["dtype"] == "torch.bfloat16"


def test_an_exchange_is_waited_for_in_the_next_part_forward_and_backward(ranks):
    for result in ranks["2x2"][:3]:                                                       # the fourth is a second late
        times = result["overlap"]
        assert times["dispatch"] < 0.5 < times["experts"]
        assert times["combine backward"] < 0.5 < times["experts backward"]


def test_an_exchange_on_the_cpu_leaves_a_gpu_of_the_machine_alone(monkeypatch):
    def asked(*_):
        raise RuntimeError("torch.cuda was asked")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", asked)
    x, sent = torch.randn(3, requires_grad=True), SimpleNamespace(ranks=ExpertRanks(1, 1, 0))
    Sent.begin(sent, lambda _, x: 2 * x, (x,))
    y = Sent.end(sent)
    assert torch.equal(y, 2 * x) and not y.requires_grad
    sent.ranks.thread.shutdown()


@no_triton
def test_the_kernel_adds_up_what_comes_back_as_torch_does():
    to = torch.rand(37, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    to[3], to[:, 2] = False, False                                             # a row for nobody, a rank for no row
    hop, there = (Hop(None, "inside", t).sized(to.sum(0).tolist(), None) for t in (to, to.to(DEVICE)))
    for width, dtype in ((300, torch.float32), (8, torch.bfloat16)):
        copies = torch.randn(len(hop.order), width).to(dtype)
        ours = sum_triton(copies.to(DEVICE), there).cpu()
        agree(ours.float(), hop.sum(copies).float(), 1e-6 if dtype == torch.float32 else 8e-3)


@no_triton
def test_the_kernel_unpacks_what_was_packed_to_the_same_bits():
    for shape in ((5, 384), (3, 200), (0, 256)):
        x = torch.randn(shape) * torch.logspace(-30, 3, shape[1])
        packed = pack(x.to(DEVICE))
        assert torch.equal(unpack_triton(*packed, torch.bfloat16), unpack_torch(*packed, torch.bfloat16))
    low = unpack_triton(*pack(x := torch.randn(4, 256, device=DEVICE)), torch.float32)
    assert 0.01 < ((low - x).norm() / x.norm()).item() < 0.05


def test_a_message_is_parted_into_what_it_was_joined_of():
    for n in (0, 1, 7):
        tensors = torch.randn(n, 3), torch.arange(5 * n).int().view(n, 5), torch.ones(n, 2, dtype=torch.uint8)
        message = joined(tensors)
        assert message.shape == (n, 12 + 20 + 2)
        for ours, theirs in zip(parted(message, tensors), tensors):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("names", [("between",), ("inside",), ("between", "inside")], ids="+".join)
def test_on_a_gpu_a_rank_that_sends_to_itself_computes_the_layer(names, tmp_path):
    """Thread, stream and hops, by NCCL; memory that is let go of is spoilt at once."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        moe = mixture(dim=256, moe_inter_dim=64, **GROUPS).cuda()
        x, dy = torch.randn(2, 1, 2000, 256, device="cuda").bfloat16()
        results = []
        here = dict(dict.fromkeys(names, dist.group.WORLD), device=x.device)
        for ranks in (None, ExpertRanks(1, 1, 0, **here)):
            moe.ranks = ranks
            for _ in range(5 if ranks else 1):
                moe.zero_grad()
                own = x.clone().requires_grad_()
                y, _ = moe(own)
                spoilt = [torch.full_like(x, torch.nan) for _ in range(3)]
                y.backward(dy)
                del spoilt
                results.append([y.detach(), own.grad, *(p.grad for p in moe.parameters())])
        for ours in results[1:]:
            for a, b in zip(ours, results[0]):
                assert ((a - b).float().norm() / b.float().norm()).item() < 1e-2
            assert all(torch.equal(a, b) for a, b in zip(ours, results[1]))
    finally:
        dist.destroy_process_group()


# --- mistakes ---------------------------------------------------------------------------------------------------------

def test_experts_that_cannot_be_spread_are_named():
    with pytest.raises(UserError, match=r"n_routed_experts = 8 .* ep = 3 .*--ep"):
        spread(MoE(tiny()), ExpertRanks(3, 1, 0))
    with pytest.raises(UserError, match=r"n_expert_groups = 4 .* 8 nodes.*--nodes"):
        spread(MoE(tiny(**GROUPS)), ExpertRanks(8, 1, 0))
    spread(MoE(tiny(n_routed_experts=16)), ExpertRanks(8, 1, 0))                          # no limit, nothing to match


def test_the_names_of_all_ranks_are_those_of_the_model_and_so_are_the_values():
    whole, found = official_tensors(V3(tiny())), {}
    for rank in range(4):
        mine = V3(tiny())
        spread(mine, ExpertRanks(2, 2, rank))
        found |= official_tensors(mine)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_one_rank_keeps_its_experts_and_sends_nothing():
    moe = MoE(tiny())
    spread(moe, ExpertRanks(1, 1, 0))
    x = torch.randn(1, 3, 32)
    (tokens, _), sent = moe.dispatch(x)
    assert moe.ranks is None and tokens.data_ptr() == x.data_ptr() and len(moe.w13) == 8


def test_what_arrived_in_fp8_is_quantized_again_without_loss():
    x = torch.randn(5, 384) * torch.logspace(-30, 3, 384)
    came = unpack_torch(*pack(x), torch.bfloat16)
    again = quantize(came, pow2=True)
    assert torch.equal(again.dequantize(), came.float())
    assert not torch.equal(quantize(came).dequantize(), came.float())          # with scales of any size it would be
