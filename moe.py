"""DeepSeekMoE with auxiliary-loss-free balancing: the report's section 2.1.2, equations 12-20.

The problem. A token should pay for few parameters and choose among many. Each MoE layer holds E routed experts (small
FFNs) and one shared expert; a gate sends every token to K of the E. V3: E = 256, K = 8, so 671B parameters of which 37B
work on any one token. The danger is collapse: a gate that favours some experts trains them more and favours them more.

    s_i = sigmoid(x . e_i)                                   affinity of the token to expert i               (eq 15)
    chosen = top-K of s_i + b_i                              the bias b moves the SELECTION ...               (eq 16)
    g_i = s_i / sum of chosen s                              ... and never the weight                         (eq 13)
    h  = x + FFN_shared(x) + route_scale * sum_chosen g_i FFN_i(x)                                            (eq 12)

    after each optimizer step:  b_i += gamma * sign(mean load - load_i)                       overloaded experts sink

The bias takes the place of the large auxiliary loss that used to do this job and hurt the model by its gradient: b has
no gradient at all. A tiny sequence-wise loss (alpha 1e-4, eq 17-20) remains against extremes inside one sequence. No
token is ever dropped. Node-limited routing: experts come in groups, one per node, and a token may use only its best
n_limited_groups of them, so that it crosses the network at most that often.

Dataflow of one layer, N = B*T tokens, R = N*K rows, each row one (token, chosen expert) pair, sorted by expert:

    x [N, D] -gate-> indices, weights [N, K]
      `-dispatch-> rows [R, D] -experts-> rows [R, D] -combine-> [N, D]

`dispatch` copies each token to its K rows and `combine` sums the K rows of each token: each is the other's transpose,
and so each is the other's backward. The gate weight is multiplied in between, inside the expert (on its hidden
activation, which is exact because the second product is linear), so both are pure movement of rows.

Shapes: B batch, T tokens, N = B*T, D dim, F moe_inter_dim, E routed experts, K active experts, R = N*K rows.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import backend
from fp8 import Linear, weight_gradient

# --- the gate: who goes where -----------------------------------------------------------------------------------------

@dataclass
class Routing:
    """What a gate decided for B sequences of T tokens, and the numbers that balancing needs."""
    shape: tuple                              # (B, T)
    indices: torch.Tensor                     # int64 [N, K], the chosen experts
    weights: torch.Tensor                     # [N, K] float32 or better: gate weights, times route_scale
    load: torch.Tensor                        # int64 [E]: rows of each expert
    balance: torch.Tensor                     # scalar: balance loss, summed over the sequences


class Gate(nn.Module):
    """x [B, T, D] -> Routing (eq 13-16). All in float32 or better: BF16 scores tie, and ties pick the wrong experts.

    `bias` and `load` are buffers, not parameters: no gradient, no weight decay, no optimizer state. The gate only reads
    its bias; counting and updating are the caller's, after the forward pass, so that recomputing a layer counts nothing
    twice.
    """

    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.dim))                   # e_i, the expert centroids
        self.register_buffer("bias", torch.zeros(c.n_routed_experts, dtype=torch.float32))
        # Rows per expert in the step so far: empty between steps, so checkpoints don't hold it.
        self.register_buffer("load", torch.zeros(c.n_routed_experts, dtype=torch.int64), persistent=False)
        self.K, self.groups, self.limited = c.n_activated_experts, c.n_expert_groups, c.n_limited_groups
        self.route_scale, self.scope, self.balanced = c.route_scale, c.balance_scope, c.balance_alpha > 0

    def forward(self, x):
        high = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(high), self.weight.to(high)).sigmoid()                         # [B, T, E]
        flat = scores.flatten(0, 1)                                                           # [N, E]
        indices = select(flat.detach() + self.bias, self.K, self.groups, self.limited)        # [N, K]
        weights = flat.gather(1, indices)                                                     # s without the bias
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * self.route_scale
        load = torch.bincount(indices.flatten(), minlength=flat.shape[1])
        balance = balance_loss(scores, self.K, self.scope) if self.balanced and self.training else scores.new_zeros(())
        return Routing(x.shape[:2], indices, weights, load, balance)

    @torch.no_grad()
    def update_bias(self, gamma):
        """b_i += gamma * sign(mean load - load_i), from the load of one whole optimizer step; counting starts anew.

        In integers, sign(total - E * load_i): a mean in floating point is never quite equal to a balanced load.
        """
        self.bias += gamma * torch.sign(self.load.sum() - len(self.load) * self.load)
        self.load.zero_()


def select(choice, k, groups=1, limited=1):
    """Indices [N, K] of the top-K of `choice` [N, E], the biased scores, within each token's best `limited` groups.

    A group's score is the sum of its two best experts (section 2.1.2: the best K / limited_groups, two in V3). Experts
    of other groups are masked with -inf: with 0 they would win as soon as the biases of the others are negative.
    """
    if limited < groups:
        grouped = choice.unflatten(1, (groups, -1))                                           # [N, groups, E/groups]
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(limited, dim=-1).indices           # [N, limited]
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
        choice = grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)
    return choice.topk(k, dim=-1).indices


def balance_loss(scores, k, scope="sequence"):
    """Sequence-wise balance loss (eq 17-20) without alpha, summed over sequences: scores [B, T, E] -> scalar.

    f_i counts how often expert i is among the top-K of the plain scores, P_i averages its normalized score; their
    product is least when both are uniform. f is a count, so the gradient flows through P. scope "batch" takes f and P
    over all the sequences at once (the batch-wise loss of section 4.5.3), weighted like B sequences.
    """
    B, T, E = scores.shape
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(2, scores.topk(k, dim=-1).indices, True)
    share = scores / scores.sum(-1, keepdim=True)                                             # s_i' (eq 19)
    over = (0, 1) if scope == "batch" else 1
    f = chosen.to(scores.dtype).mean(over) * (E / k)                                          # [B, E] or [E] (eq 18)
    P = share.mean(over)                                                                      # [B, E] or [E] (eq 20)
    return (f * P).sum() * (B if scope == "batch" else 1)


# --- dispatch and combine: tokens to rows and back --------------------------------------------------------------------

def sort_rows(indices):
    """The R = N*K (token, choice) pairs sorted by expert: order [R], pair p = token * K + choice, and its inverse."""
    order = indices.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse


def gather_rows(x, order, k):
    return x.index_select(0, order // k if k > 1 else order)


def sum_rows(rows, inverse, k):
    # A gather and a sum in a fixed order, never a scatter with atomics: the same bits every time.
    return rows.index_select(0, inverse).unflatten(0, (-1, k)).sum(1)


class Dispatch(torch.autograd.Function):
    """x [N, D] -> rows [R, D]; the gradient of a token is the sum over its rows."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return gather_rows(x, order, k)

    @staticmethod
    def backward(ctx, grad):
        return sum_rows(grad, *ctx.saved_tensors, ctx.k), None, None, None


class Combine(torch.autograd.Function):
    """rows [R, D] -> [N, D], the sum of each token's rows; the gradient of a row is its token's."""

    @staticmethod
    def forward(ctx, rows, order, inverse, k):
        ctx.save_for_backward(order)
        ctx.k = k
        return sum_rows(rows, inverse, k)

    @staticmethod
    def backward(ctx, grad):
        return gather_rows(grad, *ctx.saved_tensors, ctx.k), None, None, None


# --- the experts ------------------------------------------------------------------------------------------------------

class GroupedLinear(torch.autograd.Function):
    """y_r = W[expert of row r] x_r for rows sorted by expert.

    x [R, in], weight [E, out, in], ends (for each expert, the end of its rows) -> [R, out], in x's dtype

    One product per busy expert, written into one buffer; idle experts cost nothing and get a zero gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, ends):
        w = weight.to(x.dtype)
        ctx.save_for_backward(x, w)
        ctx.weight, ctx.ends = weight, ends
        y = x.new_empty(len(x), w.shape[1])
        for e, start, end in busy(ends):
            torch.mm(x[start:end], w[e].t(), out=y[start:end])
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, w), ends, weight = ctx.saved_tensors, ctx.ends, ctx.weight
        dy, dx = dy.contiguous(), torch.empty_like(x)
        for e, start, end in busy(ends):
            torch.mm(dy[start:end], w[e], out=dx[start:end])

        def wgrad():
            dw = torch.zeros_like(w)
            for e, start, end in busy(ends):
                torch.mm(dy[start:end].t(), x[start:end], out=dw[e])
            return dw.to(weight.dtype)

        return dx, weight_gradient(weight, wgrad), None


def busy(ends):
    """(expert, first row, end) of each expert that has rows."""
    return [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]


def grouped_linear(x, w, load):
    """Each row times its expert's weight, in x's dtype: x [R, in], w [E, out, in], load int64 [E] -> [R, out]."""
    ends = load.cumsum(0)
    if backend.use_grouped_mm(x):
        return F.grouped_mm(x, w.to(x.dtype).transpose(1, 2), offs=ends.to(torch.int32))
    return GroupedLinear.apply(x, w, ends.tolist())


class SwiGLU(torch.autograd.Function):
    """silu(a) * b for h = [a, b]: [N, 2F] -> [N, F]. By hand because autograd would keep silu(a), and pad and add the
    gradients of the two halves: four passes over memory for nothing."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        a, b = h.chunk(2, -1)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        a, b = h.chunk(2, -1)
        dh = torch.empty_like(h)
        da, db = dh.chunk(2, -1)
        torch.mul(grad, F.silu(a), out=db)
        torch.ops.aten.silu_backward.grad_input(grad * b, a, grad_input=da)
        return dh


# --- the layers: a dense FFN and a mixture, in the same three parts ---------------------------------------------------

class FFN(nn.Module):
    """W2 (silu(W1 x) * W3 x): [..., D] -> [..., D]; W1 and W3 are one matrix, one product."""

    def __init__(self, dim, inter_dim):
        super().__init__()
        self.w13 = Linear(dim, 2 * inter_dim)
        self.w2 = Linear(inter_dim, dim)

    def forward(self, x):
        return self.w2(SwiGLU.apply(self.w13(x)))

    # The parts of MoE, for a layer that has nobody to send anything to.
    def dispatch(self, x):
        return None, None

    def experts(self, x, rows, sent):
        return self(x), None

    def combine(self, here, rows, sent):
        return here


@dataclass
class Sent:
    """How rows were dispatched, to send them back."""
    routing: Routing
    order: torch.Tensor                       # int64 [R]: the (token, choice) pair of each row
    inverse: torch.Tensor                     # int64 [R]: the row of each pair


class MoE(nn.Module):
    """One MoE layer, from a Config: x [B, T, D] -> (output [B, T, D] without the residual, Routing).

    In three parts, so that a pipeline can hide the movement of one micro-batch behind the arithmetic of another.
    """

    def __init__(self, c):
        super().__init__()
        E, D, F_ = c.n_routed_experts, c.dim, c.moe_inter_dim
        self.K = c.n_activated_experts
        self.gate = Gate(c)
        self.w13 = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F_))
        self.shared = FFN(D, c.n_shared_experts * F_) if c.n_shared_experts else None

    def dispatch(self, x):
        """x [B, T, D] -> rows [R, D], Sent."""
        routing = self.gate(x)
        order, inverse = sort_rows(routing.indices)
        return Dispatch.apply(x.flatten(0, 1), order, inverse, self.K), Sent(routing, order, inverse)

    def experts(self, x, rows, sent):
        """The shared experts on the tokens [B, T, D], and each row [R, D] through its expert, times its gate weight."""
        here = self.shared(x) if self.shared else 0
        weight = sent.routing.weights.flatten().index_select(0, sent.order).to(rows.dtype)     # [R]
        hidden = SwiGLU.apply(grouped_linear(rows, self.w13, sent.routing.load)) * weight[:, None]       # [R, F]
        return here, grouped_linear(hidden, self.w2, sent.routing.load)

    def combine(self, here, rows, sent):
        """here + the sum of each token's rows: [B, T, D]."""
        routed = Combine.apply(rows, sent.order, sent.inverse, self.K)                         # [N, D]
        return here + routed.unflatten(0, sent.routing.shape)

    def forward(self, x):
        rows, sent = self.dispatch(x)
        return self.combine(*self.experts(x, rows, sent), sent), sent.routing


def max_vio(load):
    """Largest load over the mean load, minus one (0 = perfect balance), per layer: load [..., E] -> [...]."""
    load = load.to(torch.float32)
    return load.amax(-1) / load.mean(-1).clamp_min(1e-9) - 1
