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
      `-gather-> rows [R, D] -W1, W3-> SwiGLU, times the weight [R, F] -W2-> rows [R, D] -sum-> [N, D]

The gather copies each token to its K rows and the sum adds up the K rows of each token: each is the other's transpose,
and so each is the other's backward. The gate weight is multiplied in between, on the hidden activation of the expert,
which is exact because the second product is linear: so both are pure movement of rows. On many ranks the same happens
once more around it: a token is copied to the ranks of its experts, and their sums are added up (expert parallelism).

Shapes: B batch, T tokens, N = B*T, D dim, F moe_inter_dim, E routed experts, K active experts, R = N*K rows.
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import backend
from configs import UserError
from experts import sum_triton
from experts_few import MAX_TOKENS, experts
from experts_fp8 import routed_triton
from fp8 import Linear, Products, SwiGLU, busy, linear, linear_triton, weight_gradient
from fp8_tiles import Quantized, bits, quantize

if backend.has_triton():
    import triton
    import triton.language as tl

# --- the gate: who goes where -----------------------------------------------------------------------------------------

@dataclass
class Routing:
    """What a gate decided for B sequences of T tokens, and the numbers that balancing needs."""
    shape: tuple                              # (B, T)
    indices: torch.Tensor                     # int64 [N, K], the chosen experts
    weights: torch.Tensor                     # [N, K] float32 or better: gate weights, times route_scale
    n_experts: int                            # E
    balance: torch.Tensor | float             # scalar: balance loss, summed over the sequences

    @cached_property
    def load(self):
        """int64 [E]: rows of each expert; counted when first asked for, and generation never asks."""
        return count(self.indices, self.n_experts)


def count(numbers, n):
    """int64 [n]: how often each of 0..n-1 is among `numbers`, which holds no others."""
    if numbers.is_cuda:                        # bincount would wait for the device to learn how long its answer is
        return torch.histc(numbers, n, 0, n)
    return torch.bincount(numbers.flatten(), minlength=n)


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
        limits = self.K, self.groups, self.limited, self.route_scale
        if backend.use_decode_kernels(x, MAX_TOKENS) and not self.training:
            logits = linear_triton(x.flatten(0, 1), self.weight, high)                        # [N, E]
            return Routing(x.shape[:2], *route_triton(logits, self.bias, *limits), len(self.weight), 0.0)
        logits = linear(x, self.weight, high)                                                 # [B, T, E]
        scores = logits.sigmoid()
        indices, weights = route(logits.flatten(0, 1), scores.flatten(0, 1), self.bias, *limits)
        balance = balance_loss(scores, self.K, self.scope) if self.balanced and self.training else scores.new_zeros(())
        return Routing(x.shape[:2], indices, weights, len(self.weight), balance)

    @torch.no_grad()
    def update_bias(self, gamma):
        """b_i += gamma * sign(mean load - load_i), from the load of one whole optimizer step; counting starts anew.

        In integers, sign(total - E * load_i): a mean in floating point is never quite equal to a balanced load.
        """
        self.bias += gamma * torch.sign(self.load.sum() - len(self.load) * self.load)
        self.load.zero_()


def route_torch(scores, bias, k, groups, limited, route_scale):
    """scores [N, E] -> the chosen experts, int64 [N, K], and their weights [N, K], which know no bias (eq 13-16)."""
    indices = select(scores.detach() + bias, k, groups, limited)
    return indices, weigh(scores, indices, route_scale)


def weigh(scores, indices, route_scale):
    """The plain scores of the chosen, over their sum: [N, K]."""
    weights = scores.gather(1, indices)
    return weights / (weights.sum(1, keepdim=True) + 1e-20) * route_scale


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


if backend.has_triton():
    @triton.jit
    def route_kernel(logits, bias, indices, weights, scale, E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
                     LIMITED: tl.constexpr, BLOCK: tl.constexpr):
        """One token. A chosen expert is taken out with -inf; those that may not be chosen are the lowest finite number,
        so that even of NaNs K different experts are chosen, and nobody reads beyond the weights."""
        n, e = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        s = tl.sigmoid(tl.load(logits + n * E + e, mask=e < E, other=0.0))
        LOWEST: tl.constexpr = -3e38
        choice = tl.maximum(s + tl.load(bias + e, mask=e < E, other=0.0), LOWEST)
        if LIMITED < GROUPS:
            group, score = e // (E // GROUPS), tl.full([BLOCK], float("-inf"), tl.float32)
            for g in tl.static_range(GROUPS):
                mine = tl.where(group == g, choice, float("-inf"))
                second = tl.where(e == tl.argmax(mine, 0), float("-inf"), mine)
                score = tl.where(group == g, tl.max(mine, 0) + tl.max(second, 0), score)      # the same for all of g
            is_open = e < 0
            for _ in tl.static_range(LIMITED):
                best = tl.argmax(score, 0) // (E // GROUPS)
                is_open = is_open | (group == best)
                score = tl.where(group == best, float("-inf"), score)
            choice = tl.where(is_open, choice, LOWEST)
        choice = tl.where(e < E, choice, float("-inf"))
        rank = tl.full([BLOCK], K, tl.int32)
        for k in tl.static_range(K):
            best = e == tl.argmax(choice, 0)
            rank, choice = tl.where(best, k, rank), tl.where(best, float("-inf"), choice)
        chosen = rank < K
        s = s / (tl.sum(tl.where(chosen, s, 0.0), 0) + 1e-20) * scale
        tl.store(indices + n * K + rank, e.to(tl.int64), mask=chosen)
        tl.store(weights + n * K + rank, s, mask=chosen)


def route_triton(logits, bias, k, groups, limited, route_scale):
    """route_torch from the logits float32 [N, E] in one kernel, without gradients. Of experts that tie, the lowest
    comes first, where torch leaves the order open."""
    N, E = logits.shape
    indices = torch.empty(N, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(N, k, dtype=logits.dtype, device=logits.device)
    route_kernel[(N,)](logits, bias, indices, weights, route_scale, E, k, groups, limited, triton.next_power_of_2(E),
                       num_warps=1)
    return indices, weights


def route(logits, scores, bias, k, groups, limited, route_scale):
    """route_torch of scores, the sigmoid of logits. On a GPU a kernel chooses: for 32K tokens among 256 experts in 8
    groups in 0.13 ms, for which torch takes 1.1 on an H100."""
    if backend.decode_kernels(logits.device, logits.dtype)[0] != "Triton":
        return route_torch(scores, bias, k, groups, limited, route_scale)
    indices, _ = route_triton(logits.detach(), bias, k, groups, limited, route_scale)
    return indices, weigh(scores, indices, route_scale)


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


# --- tokens to rows and back ------------------------------------------------------------------------------------------

def sort_rows(indices, experts):
    """The N*K (token, choice) pairs sorted by expert, those of an expert that lives elsewhere (-1) last: order
    int64 [N*K], pair p = token * K + choice; its inverse; load int64 [experts]."""
    expert = indices.flatten() % (experts + 1)                                                # -1 becomes `experts`
    order = expert.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse, count(expert, experts + 1)[:-1]


def gather_rows(x, order, k):
    return x.index_select(0, order // k if k > 1 else order)


def sum_rows(rows, inverse, k):
    # A gather and a sum in a fixed order, never a scatter with atomics: the same bits every time.
    if len(rows) < len(inverse):              # pairs without a row find a row of zeros
        rows, inverse = F.pad(rows, (0, 0, 0, 1)), inverse.clamp_max(len(rows))
    return rows.index_select(0, inverse).unflatten(0, (-1, k)).sum(1)


class Gather(torch.autograd.Function):
    """x [N, D] -> rows [R, D]; the gradient of a token is the sum over its rows."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return gather_rows(x, order, k)

    @staticmethod
    def backward(ctx, grad):
        return sum_rows(grad, *ctx.saved_tensors, ctx.k), None, None, None


class Sum(torch.autograd.Function):
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
        for e, rows in busy(ends):
            torch.mm(x[rows], w[e].t(), out=y[rows])
        return y

    @staticmethod
    def backward(ctx, dy):
        (x, w), ends, weight = ctx.saved_tensors, ctx.ends, ctx.weight
        dy, dx = dy.contiguous(), torch.empty_like(x)
        for e, rows in busy(ends):
            torch.mm(dy[rows], w[e], out=dx[rows])

        def wgrad():
            dw = torch.zeros_like(w)
            for e, rows in busy(ends):
                torch.mm(dy[rows].t(), x[rows], out=dw[e])
            return dw.to(weight.dtype)

        return dx, weight_gradient(weight, wgrad), None


def grouped_linear(x, w, ends, recipe=None, gate=None):
    """Each row of x times its expert's weight, in x's dtype: [R, in], w [E, out, in], ends (for each expert the end of
    its rows, a list; for F.grouped_mm an int32 tensor [E]) -> [R, out]. With the rows' gate weights [R]: of
    weighted_swiglu of x [R, 2 in]. With a Recipe in FP8 (fp8.py)."""
    if recipe:
        return Products.apply(x, w, ends, recipe, gate is not None, gate)
    x = x if gate is None else weighted_swiglu(x, gate)
    if torch.is_tensor(ends):
        return F.grouped_mm(x, w.to(x.dtype).transpose(1, 2), offs=ends)
    return GroupedLinear.apply(x, w, ends)


def weighted_swiglu(h, weight):
    """SwiGLU of each row, times its gate weight: h [R, 2F], weight [R] -> [R, F]."""
    return SwiGLU.apply(h) * weight[:, None]


def routed_torch(x, indices, weights, w13, w2, recipe=None, rows=None):
    """What the experts of this rank make of some tokens: for each the sum over its experts, times their weights
    (eq 12, without the shared ones).

    x [N, D], indices int64 [N, K] in 0..E-1, or -1 where an expert lives elsewhere, weights [N, K], w13 [E, 2F, D],
    w2 [E, D, F] -> [N, D], in x's dtype; differentiable in x, weights, w13 and w2. recipe: a fp8.Recipe, or None.
    rows: how many of the N*K pairs have their expert here, for whoever knows and wants no wait for the GPU.
    """
    k = indices.shape[1]
    order, inverse, load = sort_rows(indices, len(w13))
    ends = load.cumsum(0)
    if recipe or not backend.use_grouped_mm(x):
        ends = ends.tolist()
        rows = ends[-1]
    else:
        ends, rows = ends.to(torch.int32), int(ends[-1]) if rows is None else rows
    order = order[:rows]
    weight = weights.flatten().index_select(0, order).to(x.dtype)                             # [R]
    h = grouped_linear(Gather.apply(x, order, inverse, k), w13, ends, recipe)                 # [R, 2F]
    return Sum.apply(grouped_linear(h, w2, ends, recipe, weight), order, inverse, k)


def routed(x, indices, weights, w13, w2, recipe=None, rows=None):
    """routed_torch, on a Hopper GPU by kernels (experts.py)."""
    path, _ = backend.experts(x.device, x.dtype, w2.shape[1:], bool(recipe))
    kernels = path == "Triton" and not (recipe and recipe.reference)
    return (routed_triton if kernels else routed_torch)(x, indices, weights, w13, w2, recipe, rows)


# --- expert parallelism: the same layer on many ranks (section 3.2.2) -------------------------------------------------
#
# The experts of V3 are 97% of its weights: each of 64 ranks on 8 nodes holds 4 of a layer's 256, and all hold the gate
# and the shared expert. Between nodes the network is slow (InfiniBand, 50 GB/s in V3's cluster), inside a node it is
# fast (NVLink, 160 GB/s). So a token crosses to a node once, however many of its experts are there, to the rank with
# the same local index; that one hands it on, once to each rank of its node that holds one of its experts:
#
#     rank (node a, i) --between--> (node b, i) --inside--> (node b, j): its own experts' weighted sum
#         sum over the nodes <--between-- sum over the ranks <--inside--'
#
# Partial sums come back the same way, added up before they cross again. With 8 experts in at most 4 groups, groups
# being nodes, that is up to 4 copies between nodes instead of 8. The way there copies rows and the way back sums them:
# each is the other's transpose. So the backward of dispatch is the way back, and that of combine the way there.
#
# No rank has a capacity and no token is dropped. The worst case, every token of all `ep` ranks choosing the experts of
# one of them, brings that rank ep * N tokens [D], each once, and min(K, E/ep) hidden rows [F] of each.

@dataclass
class ExpertRanks:
    """The ranks among which every MoE layer's experts are spread; rank = node * locals + local index."""
    nodes: int
    locals: int                               # ranks of one node
    rank: int                                 # this one
    between: "dist.ProcessGroup" = None       # the ranks with its local index, one of each node; None: one node
    inside: "dist.ProcessGroup" = None        # the ranks of its node; None: one rank a node
    fp8: bool = False                         # the ways there in E4M3, scales powers of two (3.3.3); those back not
    device: torch.device = torch.device("cpu")                                                # where the tokens are
    bytes_sent: dict = field(default_factory=lambda: {"between": 0, "inside": 0})             # to others than oneself

    def __post_init__(self):
        # Exchanges run on a thread (and a GPU's stream) of their own, one after the other in the order in which they
        # are started, which is the same on all ranks. So a pipeline can compute meanwhile, and nobody else waits for
        # the GPU to say how many rows go where. A thread begins on the machine's first GPU, which may not be ours. The
        # stream goes before arithmetic that waits for a place on the GPU: an exchange takes little of it, and long.
        self.stream, ours = None, {}
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device, priority=-1)
            ours = {"initializer": torch.cuda.set_device, "initargs": (self.device,)}
        self.thread = ThreadPoolExecutor(1, **ours)


def tell(group, counts):
    """Row p of counts to rank p of a group -> what they tell this one, of the same shape."""
    if group is None:
        return counts
    out = counts.new_empty(counts.shape)       # dense, whatever the strides of counts
    dist.all_to_all_single(out, counts.contiguous(), group=group)
    return out


def pack(x):
    """x [N, D] -> its values in E4M3 and, of each 1x128 tile's scale 2^e, the 8 bits of e (UE8M0): uint8."""
    q = quantize(x, pow2=True)
    return q.values.view(torch.uint8), (bits(q.scale) >> 23).to(torch.uint8)


def unpack_torch(values, exponents, dtype):
    """What pack has made of [n, D] -> [n, D] in `dtype`."""
    scale = (exponents.to(torch.int32) << 23).view(torch.float32)
    return Quantized(values.view(torch.float8_e4m3fn), scale).dequantize().to(dtype)


if backend.has_triton():
    @triton.jit
    def unpack_kernel(values, exponents, out, D, TILES, BLOCK: tl.constexpr):
        """BLOCK numbers of one row."""
        n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        e = tl.load(exponents + n * TILES + d // 128, mask=d < D, other=0).to(tl.int32)
        x = tl.load(values + n * D + d, mask=d < D).to(tl.float32)
        tl.store(out + n * D + d, x * (e << 23).to(tl.float32, bitcast=True), mask=d < D)


def unpack_triton(values, exponents, dtype):
    """unpack_torch in one pass."""
    (n, D), BLOCK = values.shape, 1024
    out = torch.empty(n, D, dtype=dtype, device=values.device)
    unpack_kernel[n, triton.cdiv(D, BLOCK)](values.view(torch.float8_e4m3fn), exponents, out, D, exponents.shape[1],
                                            BLOCK)
    return out


def unpack(values, exponents, dtype):
    """unpack_torch, on a GPU by a kernel."""
    return (unpack_triton if backend.use_small_kernels(values) else unpack_torch)(values, exponents, dtype)


def joined(tensors):
    """Some [n, width] as one message of bytes: uint8 [n, all their bytes]. To send a tensor costs the host more than
    copying a small one."""
    return torch.cat([dense(t).view(torch.uint8) for t in tensors], 1)


def parted(message, tensors):
    """The message again as tensors like those that it was made of."""
    parts = message.split([t.shape[1] * t.element_size() for t in tensors], 1)
    return [dense(part).view(t.dtype) for part, t in zip(parts, tensors)]


def dense(t):
    """A copy of t in one piece, with strides that say so also where a size of 0 or 1 would allow any: `view` asks."""
    return t.clone(memory_format=torch.contiguous_format)


def visits(owner, n):
    """bool [N, n]: which of 0..n-1 are in each row of owner, int64 [N, K]; what lies outside counts nothing."""
    at = owner.clamp(-1, n) + 1
    return torch.zeros(len(at), n + 2, dtype=torch.bool, device=at.device).scatter_(1, at, True)[:, 1:-1]


class Hop:
    """Copies of rows to the ranks of one group, and their sums back: row n goes to each rank that to [n, ranks] names.
    """

    def __init__(self, ranks, name, to):
        self.ranks, self.name, self.n = ranks, name, len(to)
        self.order = torch.nonzero_static(to.t(), size=to.numel())[:, 1]                      # sorted by rank
        # Where among these each row's copies are: int32 [n, ranks], -1 for none.
        places = to.t().flatten().cumsum(0).sub(1).masked_fill(~to.t().flatten(), -1)
        self.row = places.view(to.shape[::-1]).t().to(torch.int32).contiguous()

    def sized(self, send, receive):
        """How many rows go to each rank and how many come from it, once the host knows it; returns itself."""
        self.send, self.receive = send, receive
        self.order = self.order[:sum(send)].clone()                 # and not all that nonzero_static made room for
        return self

    def exchange(self, t, send, receive):
        group, out = getattr(self.ranks, self.name), t.new_empty(sum(receive), *t.shape[1:])
        others = sum(send) - send[dist.get_rank(group)]
        self.ranks.bytes_sent[self.name] += others * t.shape[1:].numel() * t.element_size()
        dist.all_to_all_single(out, t.contiguous(), receive, send, group=group)
        return out

    def there(self, *tensors):
        """[n, ...] of each tensor -> [sum(receive), ...]."""
        return tuple(self.exchange(t.index_select(0, self.order), self.send, self.receive) for t in tensors)

    def back(self, *tensors):
        """[sum(receive), ...] of each tensor -> [n, ...], the sum of what comes back for each row."""
        return tuple(self.sum(self.exchange(t, self.receive, self.send)) for t in tensors)

    def sum(self, copies):
        if backend.use_small_kernels(copies):
            return sum_triton(copies, self)   # in one pass over memory, in the same order
        high = torch.promote_types(copies.dtype, torch.float32)
        out = torch.zeros(self.n, *copies.shape[1:], dtype=high, device=copies.device)
        for rows, part in zip(self.order.split(self.send), copies.split(self.send)):
            out[rows] += part                 # of one rank, so each row once; and the ranks always in the same order
        return out.to(copies.dtype)


class Sent:
    """Where the tokens of a micro-batch went, and their ways there and back. Without ranks they stay where they are.

    indices: int64 [n, K], the experts of the n tokens that are here now, counted from this rank's first, -1 for those
    of other ranks; rows: how many are not -1.
    """

    def __init__(self, routing, ranks=None):
        self.routing, self.ranks, self.indices, self.rows = routing, ranks, routing.indices, routing.indices.numel()

    def dispatch(self, x, weights):
        """This rank's tokens [N, D] and their gate weights [N, K] -> those [n, D], [n, K] that its experts work for."""
        ranks, nodes, locals = self.ranks, self.ranks.nodes, self.ranks.locals
        each = self.routing.n_experts // (nodes * locals)
        owner = self.indices // each                                                          # [N, K]: a rank
        to = visits(owner, nodes * locals).unflatten(1, (nodes, locals))
        tokens, *scales = pack(x) if ranks.fp8 else (x,)
        beside = weights, self.indices.to(torch.int32), *scales
        message, hops = (tokens, joined(beside)), []
        # All that can be made before the wait for the sizes is: afterwards the tokens should leave at once.
        if ranks.between:
            hops.append(Hop(ranks, "between", to.any(2)))
        elif ranks.inside:
            hops.append(Hop(ranks, "inside", to.flatten(1)))
        leave, arrive, on, come, (self.rows,) = self.sizes(to, count(owner, nodes * locals))
        if ranks.between:
            message = hops[0].sized(leave, arrive).there(*message)
            if ranks.inside:
                here = parted(message[1], beside)[1] // each - ranks.rank // locals * locals
                hops.append(Hop(ranks, "inside", visits(here.to(torch.int64), locals)))
        if ranks.inside:
            message = hops[-1].sized(on, come).there(*message)
        self.hops, (weights, indices, *scales) = hops, parted(message[1], beside)
        indices = indices.to(torch.int64) - ranks.rank * each
        self.indices = indices.masked_fill((indices < 0) | (indices >= each), -1)
        return unpack(message[0], *scales, x.dtype) if ranks.fp8 else message[0], weights

    def sizes(self, to, pairs):
        """to [N, nodes, locals], the ranks of each token; pairs [ranks], the (token, expert) pairs of each rank -> how
        many rows leave for each node, how many arrive from it, how many go on to each rank of this node, how many come
        from it, and with how many pairs: lists. One wait for the GPU: a rank is told beforehand what it will hand on.
        """
        ranks, (nodes, locals) = self.ranks, to.shape[1:]
        leaving = torch.cat([to.any(2).sum(0)[:, None], to.sum(0), pairs.view(nodes, locals)], 1)
        arriving = tell(ranks.between, leaving)                                               # [nodes, 1 + 2 locals]
        onward = arriving[:, 1:].sum(0).view(2, locals).t()                                   # [locals, 2]
        coming = tell(ranks.inside, onward)
        sizes = torch.cat([leaving[:, 0], arriving[:, 0], onward[:, 0], coming[:, 0], coming[:, 1:].sum(0)])
        return [part.tolist() for part in sizes.cpu().split([nodes, nodes, locals, locals, 1])]

    def there(self, gradient):
        """The tokens' way, for a gradient: in FP8 where they travel so."""
        message = pack(gradient) if self.ranks.fp8 else (gradient,)
        for hop in self.hops:
            message = hop.there(*message)
        return (unpack(*message, gradient.dtype),) if self.ranks.fp8 else message

    def back(self, *tensors):
        for hop in reversed(self.hops):
            tensors = hop.back(*tensors)
        return tensors

    # An exchange is under way between `start` and `finish`. Where they are in two parts of the layer, all that is
    # computed between the two hides it. What stands for it meanwhile is a tensor of no size, which ties their autograd
    # functions together: the backward of `finish` starts the exchange of the gradients, the transpose of the way, and
    # the backward of `start` waits for it.

    def start(self, way, *tensors):
        """Begin Sent.dispatch, there or back with some tensors."""
        return (Start.apply(self, way, *tensors),) if self.ranks else tensors

    def finish(self, transpose, tensors):
        """What `start` gave -> what has come; transpose: the way of the gradients."""
        return Finish.apply(self, transpose, *tensors) if self.ranks else tensors

    def begin(self, way, tensors):
        stream = self.ranks.stream
        ready = torch.cuda.current_stream().record_event() if stream else None

        @torch.no_grad()
        def run():
            if not stream:                    # nor torch.cuda.stream(None): it wakes a GPU, where there is one
                return way(self, *tensors), None
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                for t in tensors:
                    t.record_stream(stream)   # freed by its owner, it must outlive this
                return way(self, *tensors), stream.record_event()

        self.under_way = self.ranks.thread.submit(run)

    def end(self):
        (tensors, done), self.under_way = self.under_way.result(), None
        if done:
            torch.cuda.current_stream().wait_event(done)
            for t in (*tensors, self.indices):
                t.record_stream(torch.cuda.current_stream())
        return tensors


class Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sent, way, *tensors):
        ctx.sent = sent
        sent.begin(way, tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return None, None, *ctx.sent.end()


class Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sent, transpose, token):
        ctx.sent, ctx.transpose = sent, transpose
        ctx.save_for_backward(token)
        return sent.end()

    @staticmethod
    def backward(ctx, *grads):
        ctx.sent.begin(ctx.transpose, grads)
        return None, None, *ctx.saved_tensors             # a gradient of no size, so that Start's backward runs


def spread(model, ranks):
    """Leave each MoE layer of a model (or a MoE) its share of experts, E/ep from rank * E/ep on, and tell it the ranks
    that hold the others. UserError where experts, groups and ranks don't match."""
    ep = ranks.nodes * ranks.locals
    for moe in (m for m in model.modules() if isinstance(m, MoE)):
        E, groups, limited = len(moe.w13), moe.gate.groups, moe.gate.limited
        if E % ep:
            raise UserError(f"n_routed_experts = {E} can't be spread evenly over ep = {ep} ranks; give an --ep that "
                            f"divides it")
        if limited < groups and groups % ranks.nodes:
            raise UserError(f"n_expert_groups = {groups} can't be spread evenly over {ranks.nodes} nodes, and a token "
                            f"is limited to {limited} groups so that it visits few nodes; give --nodes that divide it")
        if ep > 1:
            moe.ranks, moe.first = ranks, ranks.rank * (E // ep)
            for name in ("w13", "w2"):
                weight = getattr(moe, name).detach()
                setattr(moe, name, nn.Parameter(weight[moe.first:moe.first + E // ep].clone()))


# --- the layers: a dense FFN and a mixture, in the same three parts ---------------------------------------------------

class FFN(nn.Module):
    """W2 (silu(W1 x) * W3 x): [..., D] -> [..., D]; W1 and W3 are one matrix, one product."""

    def __init__(self, dim, inter_dim):
        super().__init__()
        self.w13 = Linear(dim, 2 * inter_dim)
        self.w2 = Linear(inter_dim, dim)

    def forward(self, x):
        return self.w2(self.w13(x), swiglu=True)

    # The parts of MoE, for a layer that has nobody to send anything to.
    def dispatch(self, x):
        return None, None

    def experts(self, x, rows, sent):
        return self(x), None

    def combine(self, here, rows, sent):
        return here


class MoE(nn.Module):
    """One MoE layer, from a Config: x [B, T, D] -> (output [B, T, D] without the residual, Routing).

    In three parts, communication, arithmetic, communication, so that a pipeline can hide the movement of one
    micro-batch behind the arithmetic of another: an exchange that a part starts, forward or backward, is waited for in
    the next one. All that a part hands to the next and that has a gradient is in `rows` and `here`.
    """

    def __init__(self, c):
        super().__init__()
        E, D, F_ = c.n_routed_experts, c.dim, c.moe_inter_dim
        self.gate = Gate(c)
        self.w13 = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F_))
        self.shared = FFN(D, c.n_shared_experts * F_) if c.n_shared_experts else None
        self.recipe = None                    # a fp8.Recipe: the routed experts in FP8
        self.ranks, self.first = None, 0      # an ExpertRanks, and which of all experts is this rank's first (spread)

    def dispatch(self, x):
        """x [B, T, D] -> rows, Sent. rows: (tokens [N, D], their weights [N, K]), or what stands for them."""
        routing = self.gate(x)
        sent = Sent(routing, self.ranks)
        return sent.start(Sent.dispatch, x.flatten(0, 1), routing.weights), sent

    def experts(self, x, rows, sent):
        """here: the shared experts on this rank's tokens [B, T, D]; rows: (for each of them the weighted sum of the
        routed ones [N, D],), or what stands for it, or None where few tokens were better done together."""
        tokens, weights = sent.finish(Sent.back, rows)
        copied = weights.numel() * (self.w13[0].numel() + self.w2[0].numel())
        few = backend.use_decode_kernels(x, MAX_TOKENS) or backend.use_copied_experts(x, copied)
        if few and not self.ranks:
            shared = (self.shared.w13.weight, self.shared.w2.weight) if self.shared else None
            return experts(tokens, sent.indices, weights, self.w13, self.w2, shared).view_as(x), None
        out = routed(tokens, sent.indices, weights, self.w13, self.w2, self.recipe, sent.rows)
        rows = sent.start(Sent.back, out)
        return self.shared(x) if self.shared else 0, rows

    def combine(self, here, rows, sent):
        """here + the routed experts: [B, T, D]."""
        if rows is None:
            return here
        out, = sent.finish(Sent.there, rows)
        return here + out.unflatten(0, sent.routing.shape)

    def forward(self, x):
        rows, sent = self.dispatch(x)
        return self.combine(*self.experts(x, rows, sent), sent), sent.routing


def max_vio(load):
    """Largest load over the mean load, minus one (0 = perfect balance), per layer: load [..., E] -> [...]."""
    load = load.to(torch.float32)
    return load.amax(-1) / load.mean(-1).clamp_min(1e-9) - 1
