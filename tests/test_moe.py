"""DeepSeekMoE (report 2.1.2): who goes where, how the load is balanced, and that every token gets its experts' sum."""
import pytest
import torch
import torch.nn.functional as F
from conftest import GROUPS, agree, gradients, lively, tiny

from moe import FFN, Gate, Gather, MoE, Sum, balance_loss, max_vio, routed_torch, sort_rows


def gate(experts, k, bias=None, **changes):
    """A gate with unit vectors for centroids: the affinities are then ours to choose, s = sigmoid(x)."""
    g = Gate(tiny(dim=experts, n_routed_experts=experts, n_activated_experts=k, **changes)).double()
    with torch.no_grad():
        g.weight.copy_(torch.eye(experts))
        if bias is not None:
            g.bias.copy_(torch.as_tensor(bias))
    return g


def route(g, s):
    """The Routing of tokens with affinities s [T, E] or [B, T, E]."""
    s = torch.as_tensor(s, dtype=torch.float64)
    return g(torch.logit(s if s.ndim == 3 else s[None]))


def random_affinities(tokens, experts):
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.9 + 0.05


# --- the gate: selection and weights ----------------------------------------------------------------------------------

def test_the_bias_moves_the_selection_and_never_the_weight():
    s = [[0.9, 0.8, 0.3, 0.2]]
    plain, moved = route(gate(4, 2), s), route(gate(4, 2, bias=[-1.0, 0.0, 1.0, 0.0]), s)
    assert set(plain.indices[0].tolist()) == {0, 1} and set(moved.indices[0].tolist()) == {1, 2}
    for routing, expected in ((plain, {0: 0.9 / 1.7, 1: 0.8 / 1.7}), (moved, {1: 0.8 / 1.1, 2: 0.3 / 1.1})):
        for expert, weight in zip(routing.indices[0].tolist(), routing.weights[0].tolist()):
            assert weight == pytest.approx(1.7 * expected[expert], rel=1e-12)          # 1.7 is the config's route_scale


def test_the_same_bias_for_all_experts_changes_nothing():
    s = random_affinities(50, 8)
    plain, lifted = route(gate(8, 3), s), route(gate(8, 3, bias=torch.full((8,), 0.75)), s)
    assert torch.equal(plain.indices, lifted.indices) and torch.equal(plain.weights, lifted.weights)


def test_the_weights_of_a_token_sum_to_route_scale():
    weights = route(gate(16, 4, bias=torch.randn(16), route_scale=2.5), random_affinities(200, 16)).weights
    agree(weights.sum(1), torch.full((200,), 2.5, dtype=torch.float64), 1e-12)


def test_bias_and_load_are_buffers_that_no_gradient_and_no_optimizer_sees():
    g = gate(8, 2, bias=torch.randn(8))
    assert dict(g.named_parameters()).keys() == {"weight"}
    assert {name: b.dtype for name, b in Gate(tiny()).named_buffers()} == {"bias": torch.float32, "load": torch.int64}
    assert g.state_dict().keys() == {"weight", "bias"}                # a checkpoint holds the bias; counts are per step
    routing = route(g, random_affinities(20, 8))
    ((routing.weights ** 2).sum() + routing.balance).backward()
    assert g.bias.grad is None and not g.bias.requires_grad
    assert g.weight.grad.abs().sum() > 0


def test_bf16_activations_are_routed_in_float32():
    g = Gate(tiny(dim=16))
    torch.nn.init.normal_(g.weight)
    x = torch.randn(1, 100, 16).bfloat16()
    low, high = g(x), g(x.float())
    assert low.weights.dtype == torch.float32
    assert torch.equal(low.indices, high.indices) and torch.equal(low.weights, high.weights)


# --- node-limited routing ---------------------------------------------------------------------------------------------

def chosen_by_hand(s, bias, k, groups, limited, closed=float("-inf")):
    """One token in plain Python: its best groups by the sum of their best two, then the best k experts of those groups.
    `closed` is what the experts of the other groups are worth."""
    biased, size = (s + bias).tolist(), len(s) // groups
    score = [sum(sorted(biased[g * size:(g + 1) * size])[-2:]) for g in range(groups)]
    open_groups = sorted(range(groups), key=lambda g: -score[g])[:limited]
    value = [b if i // size in open_groups else closed for i, b in enumerate(biased)]
    return set(sorted(range(len(s)), key=lambda i: -value[i])[:k])


@pytest.mark.parametrize("mean_bias", [0.0, -0.6])
def test_a_token_visits_the_best_experts_of_at_most_n_limited_groups(mean_bias):
    noise = torch.randn(16, generator=torch.Generator().manual_seed(2)).double()
    s, bias = random_affinities(300, 16), mean_bias + 0.1 * noise
    routing = route(gate(16, 4, bias=bias, **{k: v for k, v in GROUPS.items() if k.endswith("groups")}), s)
    assert max(len(set((row // 4).tolist())) for row in routing.indices) == 2
    assert [set(row.tolist()) for row in routing.indices] == [chosen_by_hand(t, bias, 4, 4, 2) for t in s]


def test_masking_closed_groups_with_zero_would_misroute_once_biases_are_negative():
    s = random_affinities(300, 16)
    for mean_bias, low, high in ((0.0, 0.0, 0.0), (-0.6, 0.2, 1.0)):
        bias = torch.full((16,), mean_bias, dtype=torch.float64)
        wrong = sum(chosen_by_hand(t, bias, 4, 4, 2, closed=0.0) !=
                    chosen_by_hand(t, bias, 4, 4, 2) for t in s) / len(s)
        print(f"mean bias {mean_bias}: {wrong:.0%} of the tokens misrouted by a mask of 0")
        assert low <= wrong <= high
        routing = route(gate(16, 4, bias=bias, n_expert_groups=4, n_limited_groups=2), s)
        assert all(set(row.tolist()) == chosen_by_hand(t, bias, 4, 4, 2) for row, t in zip(routing.indices, s))


def test_a_groups_score_is_the_sum_of_its_best_two():
    s = [[0.9, 0.1, 0.1,   0.7, 0.6, 0.1,   0.5, 0.5, 0.49]]  # best one: group 0; best two: group 1; all three: group 2
    assert set(route(gate(9, 2, n_expert_groups=3), s).indices[0].tolist()) == {3, 4}


def test_the_bias_counts_in_a_groups_score():
    s = [[0.6, 0.6, 0.5, 0.5]]
    groups = dict(n_expert_groups=2)
    assert set(route(gate(4, 2, **groups), s).indices[0].tolist()) == {0, 1}
    assert set(route(gate(4, 2, bias=[0, 0, 0.2, 0.2], **groups), s).indices[0].tolist()) == {2, 3}


# --- balancing without a loss: load and bias --------------------------------------------------------------------------

def test_the_load_counts_the_tokens_of_each_expert():
    routing = route(gate(4, 2), [[.9, .8, .1, .2], [.9, .1, .8, .2], [.9, .8, .2, .1]])
    assert routing.load.dtype == torch.int64 and routing.load.tolist() == [3, 2, 1, 0]


def test_the_gate_works_in_float32_and_keeps_its_input_as_it_came():
    g, kept = Gate(tiny(dim=48)), []
    torch.nn.init.normal_(g.weight)
    x = torch.randn(2, 5, 48).to(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        routing = g(x)
    assert [t.dtype for t in kept if t.shape[-1] == 48 and t.shape != g.weight.shape] == [torch.bfloat16]
    dy = torch.randn(10, 2)
    routing.weights.backward(dy)
    dx, dw = x.grad, g.weight.grad
    x.grad = g.weight.grad = None
    scores = F.linear(x.float(), g.weight).flatten(0, 1).sigmoid()
    picked = scores.gather(1, routing.indices)
    assert torch.equal(routing.weights, picked / (picked.sum(1, keepdim=True) + 1e-20) * g.route_scale)
    (picked / (picked.sum(1, keepdim=True) + 1e-20) * g.route_scale).backward(dy)
    agree(dx, x.grad, 1e-2, "dx in BF16")
    agree(dw, g.weight.grad, 1e-6, "dW")


def test_the_gate_only_counts_when_it_is_told_to():
    g = gate(4, 2)
    route(g, random_affinities(9, 4))
    assert g.load.tolist() == [0, 0, 0, 0]                     # or recomputing the layer in backward would count twice


def test_an_overloaded_experts_bias_sinks_and_an_idle_ones_rises_by_gamma():
    g = gate(4, 2, bias=[0.5, 0.0, 0.0, -0.5])
    g.load.copy_(torch.tensor([5, 2, 1, 0]))                   # mean 2: the second is exactly balanced and stays
    g.update_bias(0.25)
    assert g.bias.tolist() == [0.25, 0.0, 0.25, -0.25]
    assert g.load.tolist() == [0, 0, 0, 0]                     # the next step counts anew
    g.update_bias(0.25)
    assert g.bias.tolist() == [0.25, 0.0, 0.25, -0.25]         # nothing counted, nothing moved


def test_an_exactly_balanced_load_moves_no_bias_because_the_sign_is_taken_in_integers():
    load = torch.full((3,), 5_592_407)
    assert (load.float().mean() < load).all()                  # a mean in float32 finds all three overloaded
    g = gate(3, 1)
    g.load.copy_(load)
    g.update_bias(0.001)
    assert g.bias.tolist() == [0, 0, 0]
    g.load.copy_(load + torch.tensor([1, 0, -1]))
    g.update_bias(1.0)
    assert g.bias.tolist() == [-1, 0, 1]


def test_updating_the_bias_evens_out_the_load():
    s = (torch.rand(400, 8, generator=torch.Generator().manual_seed(3)) * 0.3 + torch.linspace(0.1, 0.6, 8)).double()
    g = gate(8, 2)
    before = max_vio(route(g, s).load)
    for _ in range(200):
        g.load += route(g, s).load
        g.update_bias(0.01)
    after = max_vio(route(g, s).load)
    print(f"max_vio {before:.2f} -> {after:.2f}")
    assert before > 2 and after < 0.3


def test_max_vio_is_the_largest_load_over_the_mean_minus_one():
    load = torch.tensor([[6, 2, 4, 0], [3, 3, 3, 3]])
    assert max_vio(load).tolist() == [1.0, 0.0]                # mean 3: 6 / 3 - 1


# --- the balance loss (eq 17-20) --------------------------------------------------------------------------------------

# Two sequences of two tokens, E = 2, K = 1.
#   sequence A: s  = (.6, .2), (.6, .4)       top-1 is expert 0 twice: f = 2/(1*2) * (2, 0) = (2, 0)
#               s' = (.75, .25), (.6, .4)     P = (.75 + .6, .25 + .4) / 2 = (.675, .325)
#               loss = 2 * .675 + 0 * .325 = 1.35
#   sequence B: s  = (.2, .8), (.3, .6)       top-1 is expert 1 twice: f = (0, 2)
#               s' = (.2, .8), (1/3, 2/3)     P_1 = (.8 + 2/3) / 2 = 11/15
#               loss = 0 + 2 * 11/15 = 22/15
A, B = [[0.6, 0.2], [0.6, 0.4]], [[0.2, 0.8], [0.3, 0.6]]
LOSS_A, LOSS_B = 1.35, 22 / 15
# Over the whole batch: f = 2/(1*4) * (2, 2) = (1, 1), so the loss is P_0 + P_1 = 1, the least there is: each sequence
# is as unbalanced as can be and the batch-wise loss does not see it. It is weighted like two sequences.
LOSS_BATCH = 2 * 1.0


def test_the_sequence_wise_balance_loss_equals_the_numbers_worked_out_by_hand():
    assert route(gate(2, 1), [A]).balance.item() == pytest.approx(LOSS_A, rel=1e-12)
    assert route(gate(2, 1), [A, B]).balance.item() == pytest.approx(LOSS_A + LOSS_B, rel=1e-12)


def test_the_batch_wise_balance_loss_does_not_see_an_unbalanced_sequence():
    assert route(gate(2, 1, balance_scope="batch"), [A, B]).balance.item() == pytest.approx(LOSS_BATCH, rel=1e-12)
    assert route(gate(2, 1, balance_scope="batch"), [A]).balance.item() == pytest.approx(LOSS_A, rel=1e-12)


def test_the_balance_loss_counts_the_top_k_of_the_plain_affinities():
    biased = route(gate(2, 1, bias=[-10.0, 0.0]), [A])
    assert biased.load.tolist() == [0, 2]
    assert biased.balance.item() == pytest.approx(LOSS_A, rel=1e-12)


def test_a_uniform_load_has_the_least_balance_loss_whatever_e_and_k_are():
    s = 0.5 + 1e-9 * torch.stack([torch.arange(8).roll(t) for t in range(8)]).double()       # every expert in turn
    for k in (1, 2, 4):
        assert route(gate(8, k), [s.tolist()]).balance.item() == pytest.approx(1.0, rel=1e-6)


def test_the_gradient_of_the_balance_loss_flows_through_p():
    s = torch.tensor([A], dtype=torch.float64, requires_grad=True)
    balance_loss(s, 1).backward()
    # d/ds of 2 * mean_t s_0 / (s_0 + s_1): for a token (a, b) it is (b, -a) / (a + b)^2, f being a count
    expected = torch.tensor([[[0.2 / 0.64, -0.6 / 0.64], [0.4, -0.6]]], dtype=torch.float64)
    agree(s.grad, expected, 1e-12, "by hand")
    torch.autograd.gradcheck(lambda s: balance_loss(s, 2), torch.rand(2, 5, 6, dtype=torch.float64, requires_grad=True))
    g = gate(2, 1)
    route(g, [A]).balance.backward()
    assert g.weight.grad.abs().min() > 0                                                  # and so reaches the centroids


def test_no_balance_loss_in_evaluation_nor_at_alpha_zero():
    assert route(gate(2, 1).eval(), [A]).balance == 0
    assert route(gate(2, 1, balance_alpha=0.0), [A]).balance == 0


# --- the layer --------------------------------------------------------------------------------------------------------

def mixture(bias=None, **changes):
    moe = lively(MoE(tiny(**changes))).double()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if bias is not None:
        moe.gate.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return moe


def swiglu(x, w13, w2):
    a, b = (w13 @ x).chunk(2)
    return w2 @ (a * a.sigmoid() * b)


def by_hand(moe, c, x):
    """Equation 12, a token at a time: the shared experts, and each chosen one times its weight."""
    out = []
    for token in x.flatten(0, 1):
        s = (moe.gate.weight @ token).sigmoid()
        chosen = chosen_by_hand(s.detach(), moe.gate.bias, c.n_activated_experts, c.n_expert_groups, c.n_limited_groups)
        total = sum(s[i] for i in chosen)
        y = sum(c.route_scale * s[i] / total * swiglu(token, moe.w13[i], moe.w2[i]) for i in chosen)
        out.append(y + swiglu(token, moe.shared.w13.weight, moe.shared.w2.weight) if moe.shared else y)
    return torch.stack(out).view_as(x)


HOT, IDLE = 50.0, -50.0


@pytest.mark.parametrize("changes, bias, load", [
    (dict(), None, None),
    (dict(), [HOT] + [IDLE] * 3 + [0.0] * 4, {0: 15, 1: 0, 2: 0, 3: 0}),
    (dict(n_activated_experts=1), [HOT] + [0.0] * 7, {0: 15, **dict.fromkeys(range(1, 8), 0)}),
    (dict(n_shared_experts=0), None, None),
    (dict(n_shared_experts=2), None, None),
    (GROUPS, [-0.6] * 16, None),
], ids=["8 experts", "one hot, three idle", "all to one", "no shared expert",
        "two shared experts", "4 groups, bias -0.6"])
def test_the_mixture_equals_a_slow_loop_over_tokens_in_values_and_all_gradients(changes, bias, load):
    c, moe = tiny(**changes), mixture(bias, **changes)
    x = torch.randn(3, 5, c.dim, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, c.dim, dtype=torch.float64)
    y, routing = moe(x)
    for expert, rows in (load or {}).items():
        assert routing.load[expert] == rows
    assert routing.load.sum() == 15 * c.n_activated_experts                               # no token is ever dropped
    y.backward(dy)
    ours, dx = gradients(moe), x.grad
    x.grad = None
    expected = by_hand(moe, c, x)
    expected.backward(dy)
    agree(y, expected, 1e-12, "output")
    agree(dx, x.grad, 1e-12, "gradient of x")
    for name, gradient in gradients(moe).items():
        agree(ours[name], gradient, 1e-12, f"gradient of {name}", least=1.0)             # K = 1: the gate's vanishes
    for expert, rows in (load or {}).items():
        assert rows or not ours["w13"][expert].any()


def test_gather_and_sum_are_each_others_transposes():
    N, K, E = 18, 2, 8
    indices = torch.stack([torch.randperm(E)[:K] for _ in range(N)])
    order, inverse, _ = sort_rows(indices, E)
    x = torch.randn(N, 32, dtype=torch.float64, requires_grad=True)
    rows = Gather.apply(x, order, inverse, K)
    r = torch.randn_like(rows, requires_grad=True)
    summed = Sum.apply(r, order, inverse, K)
    assert rows.shape == (N * K, 32)
    agree((summed * x).sum(), (r * rows).sum(), 1e-12, "<sum(rows), y> and <rows, gather(y)>")
    dx, = torch.autograd.grad(rows, x, r.detach())
    agree(dx, summed, 1e-12, "backward of gather and sum")
    dr, = torch.autograd.grad(summed, r, x.detach())
    agree(dr, rows, 0, "backward of sum and gather")
    agree(Sum.apply(rows, order, inverse, K), 2 * x, 1e-12, "there and back: K times the token")


def test_rows_are_sorted_by_expert_and_those_of_experts_elsewhere_come_last():
    indices = torch.tensor([[1, -1], [2, 0], [-1, -1], [0, 2]])
    order, inverse, load = sort_rows(indices, 4)
    assert load.tolist() == [2, 1, 2, 0]
    assert order.tolist() == [3, 6, 0, 2, 7, 1, 4, 5]                          # pair p is choice p % 2 of token p // 2
    assert order[inverse].tolist() == list(range(8))


@pytest.mark.parametrize("here", [range(0, 4), range(6, 8), range(3, 4)], ids=str)
def test_experts_elsewhere_add_nothing_and_the_shares_of_all_ranks_add_up(here):
    moe, (first, last) = mixture(), (here.start, here.stop)
    x = torch.randn(15, 32, dtype=torch.float64, requires_grad=True)
    routing = moe.gate(x[None])
    weights = routing.weights.detach().requires_grad_()
    indices = torch.where((routing.indices >= first) & (routing.indices < last), routing.indices - first, -1)
    dy, inputs = torch.randn(15, 32, dtype=torch.float64), (x, weights, moe.w13, moe.w2)
    ours = routed_torch(x, indices, weights, moe.w13[first:last], moe.w2[first:last])
    mask = torch.zeros(8, dtype=torch.float64)
    mask[first:last] = 1
    expected = sum(weights[:, k, None] * mask[routing.indices[:, k], None] * torch.stack(
        [swiglu(t, moe.w13[e], moe.w2[e]) for t, e in zip(x, routing.indices[:, k])]) for k in range(2))
    agree(ours, expected, 1e-12, "output")
    for name, a, b in zip(("x", "weights", "w13", "w2"), torch.autograd.grad(ours, inputs, dy),
                          torch.autograd.grad(expected, inputs, dy)):
        agree(a, b, 1e-12, f"gradient of {name}")


def test_the_three_parts_are_the_layer():
    moe = mixture()
    x = torch.randn(2, 4, 32, dtype=torch.float64)
    rows, sent = moe.dispatch(x)
    assert torch.equal(moe.combine(*moe.experts(x, rows, sent), sent), moe(x)[0])


def test_the_ffn_is_w2_of_silu_w1_times_w3_in_values_and_gradients():
    ffn = FFN(7, 5).double()
    for p in ffn.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(11, 7, dtype=torch.float64)
    y = ffn(x)
    y.backward(dy)
    ours, dx = gradients(ffn), x.grad
    x.grad = None
    a, b = F.linear(x, ffn.w13.weight).chunk(2, -1)
    expected = F.linear(F.silu(a) * b, ffn.w2.weight)
    expected.backward(dy)
    agree(y, expected, 1e-12, "output")
    agree(dx, x.grad, 1e-12, "gradient of x")
    for name, gradient in gradients(ffn).items():
        agree(ours[name], gradient, 1e-12, f"gradient of {name}")


def test_bf16_activations_give_the_float32_layer_to_bf16s_precision():
    c = tiny(n_activated_experts=1)
    moe = lively(MoE(c))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 8, c.dim).bfloat16()
    low, high = moe(x), moe(x.float())
    assert low[0].dtype == torch.bfloat16 and torch.equal(low[1].indices, high[1].indices)
    error = ((low[0].float() - high[0]).norm() / high[0].norm()).item()
    print(f"relative Frobenius error {error:.1e}")
    assert error < 0.01
