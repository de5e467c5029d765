"""The routed experts' kernels against routed_torch: values, every gradient, the same bits twice, without host syncs.

On a GPU the tests run compiled, elsewhere in Triton's interpreter (in float32: its products of BF16 are wrong).
"""
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GPU, no_triton, off_hopper, tiny

import backend
import fp8
import fp8_gemm
import fp8_tiles
from experts import plan_triton
from experts_fp8 import (
    gather8_triton,
    routed_triton,
    rows8_hopper,
    rows8_triton,
    weight_grad8_hopper,
    weight_grad8_triton,
)
from moe import MoE, routed_torch

DEVICE = "cuda" if GPU else "cpu"
pytestmark = [no_triton, off_hopper]
KERNELS, REFERENCE = (fp8.Recipe(pow2=True, reference=reference) for reference in (False, True))
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")]
NAMES = "x", "gate weights", "w13", "w2"


def choices(N, E, K, load="even", elsewhere=0.0):
    """int64 [N, K]: K different experts of E for each token (-1 from where there are none left), and a share of the
    pairs `elsewhere`. load "hot": every token has expert 0, and the second half of the experts nobody."""
    liking = torch.rand(N, max(E, K))
    if load == "hot":
        liking[:, 0] += 1
        liking[:, E // 2 + 1:] -= 2
    indices = liking.topk(K).indices
    indices[indices >= (E // 2 + 1 if load == "hot" else E)] = -1
    return indices.masked_fill(torch.rand(N, K) < elsewhere, -1).to(DEVICE)


def inputs(N, E, K, D, F, dtype=torch.float32):
    """x, weights, w13, w2 in the scale that keeps activations near one, and a gradient of the output."""
    shapes = (N, D), (N, K), (E, 2 * F, D), (E, D, F), (N, D)
    x, weights, w13, w2, dout = (torch.randn(shape).to(DEVICE) for shape in shapes)
    leaves = x.to(dtype), weights.sigmoid(), w13 * D ** -0.5, w2 * F ** -0.5
    return [t.requires_grad_() for t in leaves], dout.to(dtype)


def run(form, leaves, indices, dout, *rest):
    x, weights, w13, w2 = leaves
    out = form(x, indices, weights, w13, w2, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)).item()


def compare(ours, theirs, limit):
    for name, a, b in zip(("output", *NAMES), ours, theirs):
        print(f"{name}: relative Frobenius error {error(a, b):.1e} (limit {limit:.0e})")
        assert a.shape == b.shape and error(a, b) <= limit, f"{name}: {error(a, b):.1e}, limit {limit:.0e}"


def same(ours, theirs):
    """Byte for byte."""
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def double(leaves):
    return [t.detach().double().requires_grad_() for t in leaves]


# --- the plan ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("N, E, K, load", [
    (50, 8, 2, "even"), (7, 1, 1, "even"), (33, 12, 6, "hot"), (5, 64, 8, "even"), (0, 4, 2, "even")])
def test_rows_are_sorted_by_expert_and_every_expert_begins_a_tile(N, E, K, load):
    indices, height = choices(N, E, K, load, elsewhere=0.2), 16
    plan = plan_triton(indices, E, height)
    flat, pair, start = indices.flatten().cpu(), plan.pair.cpu(), plan.start.tolist()
    for e in range(E):
        mine = (flat == e).nonzero().flatten().tolist()                                   # in the order of the tokens
        rows = pair[start[e]:start[e + 1]].tolist()
        assert rows == mine + [-1] * (-len(mine) % height)
        assert plan.expert[start[e] // height:start[e + 1] // height].tolist() == [e] * -(-len(mine) // height)
    assert (pair[start[E]:] == -1).all() and (plan.expert[start[E] // height:] == -1).all()
    assert [pair[r] if r >= 0 else -1 for r in plan.row.flatten().tolist()] \
        == [p if e >= 0 else -1 for p, e in enumerate(flat.tolist())]


def test_the_rows_that_may_be_needed_are_enough_for_the_worst_load():
    for pairs in (8, 24, 120):                              # each of eight experts begins a tile, and none is full
        plan = plan_triton(torch.arange(pairs, device=DEVICE).view(-1, 1) % 8, 8, 16)
        assert plan.start[-1] <= len(plan.pair) and sorted(plan.row.flatten().tolist()) \
            == (plan.pair >= 0).nonzero().flatten().tolist()


# --- values and gradients ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("N, E, K, D, F, load, elsewhere", [
    (37, 1, 1, 32, 16, "even", 0), (40, 8, 6, 40, 24, "even", 0), (19, 8, 8, 24, 36, "even", 0),
    (33, 8, 6, 16, 12, "hot", 0.3), (9, 64, 6, 16, 16, "hot", 0), (5, 256, 8, 16, 16, "even", 0)])
def test_the_kernels_equal_torch_in_values_and_gradients_and_themselves_bit_for_bit(N, E, K, D, F, load, elsewhere):
    indices, (leaves, dout) = choices(N, E, K, load, elsewhere), inputs(N, E, K, D, F)
    ours = run(routed_triton, leaves, indices, dout)
    compare(ours, run(routed_torch, double(leaves), indices, dout), 1e-6)
    again = run(routed_triton, leaves, indices, dout)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))


def test_the_weights_of_idle_experts_are_not_read_and_get_a_zero_gradient():
    indices, (leaves, dout) = choices(30, 8, 2, "hot"), inputs(30, 8, 2, 32, 16)
    with torch.no_grad():
        for w in leaves[2:]:
            w[5:] = torch.nan
    out, dx, dweights, dw13, dw2 = run(routed_triton, leaves, indices, dout)
    assert all(t.isfinite().all() for t in (out, dx, dweights, dw13, dw2))
    assert not dw13[5:].any() and not dw2[5:].any() and dw13[:5].any() and dw2[:5].any()


def test_no_tokens_and_tokens_without_an_expert_here_are_zeros():
    for N in (0, 5):
        leaves, dout = inputs(N, 4, 2, 16, 16)
        for t in run(routed_triton, leaves, torch.full((N, 2), -1, device=DEVICE), dout):
            assert not t.any()


def test_fewer_rows_are_held_where_the_caller_knows_how_many_there_are():
    indices, (leaves, dout) = choices(60, 4, 4, elsewhere=0.8), inputs(60, 4, 4, 32, 16)
    rows = int((indices >= 0).sum())
    ours = run(routed_triton, leaves, indices, dout, None, rows)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(routed_triton, leaves, indices, dout)))
    assert len(plan_triton(indices, 4, 16, rows).pair) < len(plan_triton(indices, 4, 16).pair)


def test_weight_gradients_can_be_put_off():
    indices, (leaves, dout) = choices(20, 4, 2), inputs(20, 4, 2, 32, 16)
    now = run(routed_triton, leaves, indices, dout)
    x, weights, w13, w2 = leaves
    w13.queue, w2.queue = [], []
    routed_triton(x, indices, weights, w13, w2).backward(dout)
    assert w13.grad is None and w2.grad is None and torch.equal(x.grad, now[1])
    routed_triton(x, indices, weights, w13, w2).backward(dout)
    for w, grad in ((w13, now[3]), (w2, now[4])):
        for times, later in enumerate(w.queue):                                           # of two micro-batches
            later()
            assert torch.equal(w.grad, grad * (times + 1))
        assert len(w.queue) == 2


def test_a_weight_that_was_written_to_is_cast_anew():
    leaves, indices = [t.detach().double() for t in inputs(20, 4, 2, 32, 16)[0]], choices(20, 4, 2)
    x, weights, w13, w2 = leaves
    form = lambda: routed_triton(x.float(), indices, weights, w13, w2)
    first, copy = form(), w13.low[1]
    form()
    assert w13.low[1] is copy
    w13.mul_(2)
    assert error(form(), routed_torch(x, indices, weights, w13, w2)) < 1e-6 and error(first, form()) > 0.1


# --- in FP8 -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def fp8_here(monkeypatch):
    """Weights quantized by kernels in the interpreter too; on a GPU the reference sums as its tensor cores do."""
    if GPU:
        monkeypatch.setattr(fp8_gemm, "gemm_torch", partial(fp8_gemm.gemm_torch, kept=14))
    else:
        monkeypatch.setattr(backend, "fp8_kernels", lambda device: ("Triton", "the interpreter"))


@pytest.mark.parametrize("N, E, K, D, F, load, elsewhere", [
    (40, 2, 2, 144, 128, "even", 0), (33, 3, 2, 160, 128, "hot", 0.3), (150, 1, 1, 128, 256, "even", 0)])
def test_in_fp8_the_kernels_equal_the_reference_and_themselves_bit_for_bit(N, E, K, D, F, load, elsewhere, fp8_here):
    indices, (leaves, dout) = choices(N, E, K, load, elsewhere), inputs(N, E, K, D, F)
    ours = run(routed_triton, leaves, indices, dout, KERNELS)
    # Where a sum rounds otherwise, a number moves now and then to the neighbouring one of E4M3, 6% away. That a GPU's
    # sums have 14 bits moves so many that the reference with such sums is 1e-3 to 6e-3 from itself without; in what is
    # left, its own exp, it is a few.
    compare(ours, run(routed_torch, leaves, indices, dout, REFERENCE), 2e-3 if GPU else 1e-6)
    exact = run(routed_torch, double(leaves), indices, dout)
    assert all(0.01 < error(a, b) < 0.1 for a, b in zip(ours, exact))                       # it is FP8, and no worse
    again = run(routed_triton, leaves, indices, dout, KERNELS)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))


@pytest.mark.parametrize("D", [144, 256])
def test_the_rows_of_the_experts_are_quantized_as_the_reference_does_bit_for_bit(D, fp8_here):
    N, E, K = 60, 3, 2
    x, plan = torch.randn(N, D).to(DEVICE), plan_triton(choices(N, E, K, elsewhere=0.2), E)
    there, tiles = plan.pair >= 0, plan.expert >= 0
    kept = fp8_tiles.quantize_triton(x, pow2=True)[0]
    for source, plain in ((x, x), (kept, kept.dequantize())):
        rows = torch.zeros(len(plan.pair), D, device=DEVICE)
        rows[there] = plain[plan.pair[there] // K]
        row, column = gather8_triton(source, plan, columns=True)
        alone = gather8_triton(source, plan, rows=False, columns=True)[1]
        # A quantized token's bytes are taken as they are: its largest number may be so small now that another power of
        # two would do too.
        values = kept.values[plan.pair[there] // K] if source is kept else \
            fp8_tiles.quantize_torch(rows, pow2=True).values[there]
        assert same(row[0][there], values)
        expected = fp8_tiles.quantize_torch(rows.t(), pow2=True)
        for values, scale in (column, alone):
            assert torch.equal(scale[tiles], expected.scale.t()[tiles])
            assert same(values.unflatten(1, (-1, 128))[:, tiles], expected.values.unflatten(1, (-1, 128))[:, tiles])


# --- at real sizes ----------------------------------------------------------------------------------------------------

BENCH = 64, 6, 1024, 512                                                                  # configs/bench_1b.py
REAL = [(4096, *BENCH, "even", 0), (3000, 64, 6, 1024, 512, "hot", 0), (3001, 256, 8, 512, 256, "even", 0.3),
        (2500, 8, 1, 520, 136, "even", 0), (777, 1, 1, 1024, 512, "even", 0)]


@pytest.mark.parametrize("N, E, K, D, F, load, elsewhere", [pytest.param(*shape, marks=gpu) for shape in REAL])
def test_in_bf16_the_kernels_are_no_further_from_float64_than_torch_is(N, E, K, D, F, load, elsewhere):
    indices, (leaves, dout) = choices(N, E, K, load, elsewhere), inputs(N, E, K, D, F, torch.bfloat16)
    exact = run(routed_torch, double(leaves), indices, dout)
    ours, torchs = (run(form, leaves, indices, dout) for form in (routed_triton, routed_torch))
    for name, a, b, c in zip(("output", *NAMES), ours, torchs, exact):
        print(f"{name}: relative Frobenius error: kernels {error(a, c):.1e}, torch {error(b, c):.1e}")
        assert error(a, c) <= 1.02 * error(b, c)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(routed_triton, leaves, indices, dout)))


@pytest.mark.parametrize("N, E, K, D, F", [pytest.param(*shape, marks=gpu) for shape in (
    (4096, *BENCH), (1000, 8, 1, 512, 1408), (500, 4, 8, 7168, 256))])
def test_in_fp8_at_real_sizes_the_kernels_are_as_near_as_the_reference(N, E, K, D, F):
    indices, (leaves, dout) = choices(N, E, K), inputs(N, E, K, D, F, torch.bfloat16)
    exact = run(routed_torch, double(leaves), indices, dout)
    ours = run(routed_triton, leaves, indices, dout, KERNELS)
    reference = run(routed_torch, leaves, indices, dout, REFERENCE)
    for name, a, b, c in zip(("output", *NAMES), ours, reference, exact):
        print(f"{name}: relative Frobenius error: kernels {error(a, c):.3e}, reference {error(b, c):.3e}")
        assert error(a, c) <= 1.02 * error(b, c)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(routed_triton, leaves, indices, dout, KERNELS)))


@pytest.mark.parametrize("N, E, K, D, F", [pytest.param(*shape, marks=gpu) for shape in (
    (3000, 16, 3, 1024, 512), (1000, 8, 1, 512, 1408))])
def test_the_products_for_hopper_equal_the_plain_ones(N, E, K, D, F):
    indices, ((x, _, w13, _), _) = choices(N, E, K, elsewhere=0.1), inputs(N, E, K, D, F, torch.bfloat16)
    plan, w = plan_triton(indices.masked_fill(indices == 1, -1), E), fp8.quantized(w13, False)       # 1 is idle
    here = slice(int(plan.start[-1]))
    rows, turned = gather8_triton(x.detach(), plan, columns=True)
    h = rows8_hopper(rows, w, plan, x.dtype)
    assert torch.equal(h[here], rows8_triton(rows, w, plan, x.dtype)[here])
    token = h.new_zeros(N * K, 2 * F)                                                     # a row of h for every pair
    token[plan.pair[plan.pair >= 0].long()] = h[plan.pair >= 0]
    each = replace(plan, row=plan.row.view(-1, 1))
    back, h_turned = gather8_triton(token, each, columns=True)
    w = fp8_tiles.transpose(w)
    assert torch.equal(rows8_hopper(back, w, plan, x.dtype)[here], rows8_triton(back, w, plan, x.dtype)[here])
    ours, plain = (form(h_turned, turned, plan, w13) for form in (weight_grad8_hopper, weight_grad8_triton))
    print(f"Wgrad: relative Frobenius error {error(ours, plain):.1e}")
    assert error(ours, plain) < 1e-6 and not ours[1].any()


def layer():
    E, K, D, F = BENCH
    moe = MoE(tiny(dim=D, moe_inter_dim=F, n_routed_experts=E, n_activated_experts=K)).cuda()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return moe


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=gpu) for r in (None, KERNELS)], ids=["bf16", "fp8"])
def test_forward_and_backward_are_captured_as_a_cuda_graph(recipe):
    indices, (leaves, dout) = choices(1000, 64, 6), inputs(1000, *BENCH, torch.bfloat16)
    expected = run(routed_triton, leaves, indices, dout, recipe)                     # compiles outside of the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(routed_triton, leaves, indices, dout, recipe)                           # a host sync would raise here
    other = choices(1000, 64, 6, "hot")
    indices.copy_(other)
    graph.replay()
    for a, b in zip(out, run(routed_triton, leaves, other, dout, recipe)):
        assert torch.equal(a, b)
    assert not torch.equal(out[0], expected[0])


@pytest.mark.parametrize("compiled", [pytest.param(c, marks=gpu) for c in (False, True)], ids=["eager", "compiled"])
def test_a_layer_trains_without_waiting_for_the_device_also_under_torch_compile(compiled):
    moe, x = layer(), torch.randn(2, 500, BENCH[2], device="cuda").bfloat16().requires_grad_()
    assert backend.experts(x.device, x.dtype, BENCH[2:])[0] == "Triton"
    form = torch.compile(lambda x: moe(x)[0]) if compiled else lambda x: moe(x)[0]
    form(x).square().sum().backward()
    plain = [moe.w13.grad.clone(), moe.w2.grad.clone(), moe.gate.weight.grad.clone(), x.grad.clone()]
    for t in (moe.w13, moe.w2, moe.gate.weight, x):
        t.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        form(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip((moe.w13.grad, moe.w2.grad, moe.gate.weight.grad, x.grad), plain):
        assert error(a, b) < 1e-5
