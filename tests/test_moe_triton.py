"""Generation's kernels, the gate's choice, the experts and Linear of a few rows, against their plain-torch forms.

On a GPU the tests run compiled, elsewhere in Triton's interpreter.
"""
import pytest
import torch
from conftest import GPU, no_triton, tiny

import backend
from experts_few import MAX_TOKENS, experts_torch, experts_triton
from fp8 import linear_torch, linear_triton
from moe import MoE, max_vio, route, route_torch, route_triton

DEVICE = "cuda" if GPU else "cpu"

def random(*shape):
    return torch.randn(*shape).to(DEVICE)


def close(ours, theirs, limit, what):
    """The relative Frobenius error, printed, is at most `limit`."""
    assert ours.shape == theirs.shape
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    print(f"{what}: relative Frobenius error {error:.1e} (limit {limit:.0e})")
    assert error <= limit, f"{what}: relative Frobenius error {error:.1e}, limit {limit:.0e}"


# --- the gate ---------------------------------------------------------------------------------------------------------

def far_apart(N, E):
    """Logits [N, E]: each token's in another order, no two closer than rounding could bring together."""
    steps = torch.linspace(-3, 3, E)
    return torch.stack([steps[torch.randperm(E)] for _ in range(N)]).to(DEVICE)


@no_triton
@pytest.mark.parametrize("mean_bias", [0.0, -2.0])
@pytest.mark.parametrize("E, K, groups, limited",
                         [(1, 1, 1, 1), (8, 2, 1, 1), (60, 6, 1, 1), (64, 6, 1, 1), (12, 3, 4, 2), (64, 8, 8, 4)])
def test_the_gates_kernel_chooses_and_weighs_as_torch_does(E, K, groups, limited, mean_bias):
    logits, bias = far_apart(16, E), mean_bias + 0.1 * random(E)
    indices, weights = route_triton(logits, bias, K, groups, limited, 2.5)
    expected, theirs = route_torch(logits.sigmoid(), bias, K, groups, limited, 2.5)
    assert indices.dtype == torch.int64 and torch.equal(indices, expected)
    close(weights, theirs, 1e-6, "weights")


@no_triton
def test_training_chooses_by_the_kernel_and_its_weights_have_torchs_gradient(monkeypatch):
    monkeypatch.setattr(backend, "decode_kernels", lambda *_: ("Triton", "the interpreter"))
    logits, bias, dout = far_apart(16, 12).requires_grad_(), 0.1 * random(12), random(16, 3)
    indices, weights = route(logits, logits.sigmoid(), bias, 3, 4, 2, 2.5)
    expected, theirs = route_torch(logits.sigmoid(), bias, 3, 4, 2, 2.5)
    assert torch.equal(indices, expected) and torch.equal(weights, theirs)
    grads = [torch.autograd.grad(w, logits, dout)[0] for w in (weights, theirs)]
    assert torch.equal(*grads)


@no_triton
def test_of_experts_that_tie_the_lowest_is_chosen_first():
    logits = torch.zeros(1, 12, device=DEVICE)
    logits[0, 7] = 1.0
    bias = torch.zeros(12, device=DEVICE)
    assert route_triton(logits, bias, 3, 1, 1, 1.0)[0].tolist() == [[7, 0, 1]]
    # In groups of three, those of {6, 7, 8} and {0, 1, 2}.
    assert route_triton(logits, bias, 6, 4, 2, 1.0)[0].tolist() == [[7, 0, 1, 2, 6, 8]]


@no_triton
def test_a_gate_gone_nan_still_names_experts_that_exist():
    logits = torch.full((2, 6), torch.nan, device=DEVICE)
    indices, weights = route_triton(logits, torch.zeros(6, device=DEVICE), 4, 1, 1, 1.0)
    assert [sorted(row) for row in indices.tolist()] == [[0, 1, 2, 3]] * 2 and weights.isnan().all()


# --- the experts ------------------------------------------------------------------------------------------------------

def choices(N, E, K, favour=()):
    """int64 [N, K]: K different experts of E for each token, the `favour`ed ones first."""
    liking = torch.rand(N, E)
    liking[:, list(favour)] += 1
    return liking.topk(K).indices.to(DEVICE)


def layer(D, F, E, S, dtype=torch.float32):
    """Weights of E experts and S shared ones, in the scale that keeps activations near one."""
    w13, w2 = random(E, 2 * F, D) * D ** -0.5, random(E, D, F) * F ** -0.5
    shared = (random(2 * S * F, D) * D ** -0.5, random(D, S * F) * F ** -0.5) if S else None
    return w13.to(dtype), w2.to(dtype), shared and tuple(w.to(dtype) for w in shared)


@no_triton
@pytest.mark.parametrize("N, E, K, S, D, F", [
    (1, 8, 2, 1, 32, 16), (3, 64, 6, 1, 40, 12), (3, 8, 2, 0, 32, 16), (1, 1, 1, 1, 40, 12), (1, 8, 1, 2, 32, 16),
    (16, 1, 1, 0, 32, 16), (16, 64, 6, 2, 40, 24), (64, 8, 2, 1, 40, 24), (64, 64, 1, 0, 32, 16)])
def test_the_experts_kernels_equal_the_experts_in_torch_and_themselves_bit_for_bit(N, E, K, S, D, F):
    x, indices, weights = random(N, D), choices(N, E, K), torch.rand(N, K).to(DEVICE)
    w13, w2, shared = layer(D, F, E, S)
    ours = experts_triton(x, indices, weights, w13, w2, shared)
    close(ours, experts_torch(x, indices, weights, w13, w2, shared), 1e-5, "output")
    assert torch.equal(ours, experts_triton(x, indices, weights, w13, w2, shared))


@no_triton
@pytest.mark.parametrize("N", [3, 50])
def test_all_tokens_may_choose_the_same_experts_and_the_others_idle(N):
    x, indices, weights = random(N, 32), choices(N, 8, 2, favour=(3, 6)), torch.rand(N, 2).to(DEVICE)
    w13, w2, shared = layer(32, 16, 8, 1)
    assert max_vio(torch.bincount(indices.flatten(), minlength=8)) == 3
    for idle in (0, 1, 2, 4, 5, 7):
        w13[idle] = torch.nan                                                             # nobody may read these
    theirs = experts_torch(x, indices, weights, w13, w2, shared)
    close(experts_triton(x, indices, weights, w13, w2, shared), theirs, 1e-5, "output")


@no_triton
@pytest.mark.parametrize("N, OUT, IN", [(1, 37, 100), (2, 8, 64), (3, 64, 1500), (4, 5, 3), (17, 64, 40)])
def test_the_product_of_few_rows_is_the_product(N, OUT, IN):
    x, w = random(N, IN), random(OUT, IN)
    close(linear_triton(x, w), linear_torch(x, w), 1e-5, "float32")
    low = x.to(torch.bfloat16)
    close(linear_triton(low, w, torch.float32), linear_torch(low, w, torch.float32), 1e-5, "BF16 times float32")
    assert linear_triton(low[None], w).shape == (1, N, OUT) and linear_triton(low, w).dtype == torch.bfloat16


# --- in the layer -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [dict(), dict(n_shared_experts=2), dict(n_shared_experts=0)])
def test_on_a_cpu_few_tokens_get_copies_of_their_experts_and_the_same_output(changes):
    moe = MoE(tiny(**changes)).double().eval()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    many = x.repeat(1, 400, 1)
    with torch.no_grad():
        assert parts(moe, x)[1] is None and parts(moe, many)[1] is not None
        few = moe(x)[0]
    assert parts(moe, x)[1] is not None                                                   # with gradients: the long way
    close(few, moe(x)[0].detach(), 1e-14, "output")


def parts(moe, x):
    """What the experts give: (here, rows)."""
    return moe.experts(x, *moe.dispatch(x))


def bench_layer():
    """One MoE layer of configs/bench_1b.py, in BF16 as sample.py loads it."""
    c = tiny(dim=1024, moe_inter_dim=512, n_routed_experts=64, n_activated_experts=6, precision="bf16")
    moe = MoE(c).eval().cuda()
    for name, p in moe.named_parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        if name != "gate.weight":
            p.data = p.data.to(torch.bfloat16)
    return moe


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or not backend.has_triton(), reason="needs a CUDA GPU and Triton")
@pytest.mark.parametrize("N", [1, 2, 8, 9, 64, 128])
def test_in_bf16_the_kernels_are_no_further_from_float32_than_torch_is(N):
    x, indices, weights = random(N, 512).bfloat16(), choices(N, 16, 4), torch.rand(N, 4).to(DEVICE)
    w13, w2, shared = layer(512, 256, 16, 1, torch.bfloat16)
    exact = experts_torch(*(t.double() if t.is_floating_point() else t for t in (x, indices, weights, w13, w2)),
                          [w.double() for w in shared])
    kernels, torchs = (((out(x, indices, weights, w13, w2, shared) - exact).norm() / exact.norm()).item()
                       for out in (experts_triton, experts_torch))
    print(f"relative Frobenius error: kernels {kernels:.1e}, torch {torchs:.1e}")
    assert kernels <= torchs


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or not backend.has_triton(), reason="needs a CUDA GPU and Triton")
@pytest.mark.parametrize("N", [1, 64, MAX_TOKENS, MAX_TOKENS + 1])
def test_a_layer_of_the_model_is_captured_as_a_cuda_graph(N):
    moe, x, y = bench_layer(), random(N, 1, 1024).bfloat16(), random(N, 1, 1024).bfloat16()
    with torch.no_grad():
        moe(x)                                                                            # compile outside of the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, routing = moe(x)                                                         # a host sync would raise here
            load = routing.load
        x.copy_(y)
        graph.replay()
        expected, routing = moe(y)
    assert torch.equal(out, expected)
    assert torch.equal(load.cpu(), torch.bincount(routing.indices.flatten().cpu(), minlength=64))
    assert parts(moe, x)[1] is not None                                          # with gradients: training's path
