"""The experts of few tokens, as generation brings them: chosen by index on the device, without sorting or waiting.

Shapes: N tokens, K choices, E experts, D dim, F moe_inter_dim, R = N*K rows.
"""
import torch
import torch.nn.functional as F

import backend
from fp8 import SwiGLU

if backend.has_triton():
    import triton
    import triton.language as tl


# --- the experts of few tokens ----------------------------------------------------------------------------------------
#
# Generation brings a layer one token of each sequence. Every weight that is read works once or a few times, so reading
# is what the time goes to, and next to it the start of each kernel: a microsecond or two, in which the GPU could have
# read megabytes. Hence no sorting and copying of rows: the chosen expert's number goes into the kernel, which reads its
# weights where they are, and the shared experts ride along as the experts E, E+1, ... that every token has chosen, with
# weight 1.
#
#   a few tokens   row_hidden [R, F] -> row_sum [N, D]                         a row reads its expert's weights
#   more           sort -> tile_hidden [R, F] -> tile_out [R, D] -> sum        an expert reads its weights, once

MAX_TOKENS = 128                              # on an H100; 256 tokens are faster as a grouped product


def experts_torch(x, indices, weights, w13, w2, shared=None):
    """What K experts a token make of it, by index: x [N, D], indices int64 and weights [N, K], w13 [E, 2F, D],
    w2 [E, D, F] -> [N, D], the weighted sum (eq 12). shared: (w13 [2SF, D], w2 [D, SF]) of S shared experts, added.

    Copies the weights of every row's expert: right for a handful of rows, and the specification of experts_triton.
    """
    chosen, K = indices.flatten(), indices.shape[1]
    rows = x.repeat_interleave(K, 0).unsqueeze(-1)                                             # [R, D, 1]
    h = torch.bmm(w13[chosen].to(x.dtype), rows).squeeze(-1)                                   # [R, 2F]
    hidden = SwiGLU.apply(h) * weights.flatten().to(x.dtype)[:, None]                          # [R, F]
    out = torch.bmm(w2[chosen].to(x.dtype), hidden.unsqueeze(-1)).view(-1, K, x.shape[1]).sum(1)
    if shared:
        up, down = (w.to(x.dtype) for w in shared)
        out = out + F.linear(SwiGLU.apply(F.linear(x, up)), down)
    return out


if backend.has_triton():
    @triton.jit
    def up_weights(e, w13, shared, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, S: tl.constexpr):
        """Where W1 [F, D] and W3 [F, D] of expert e begin."""
        w1, w3 = w13 + e * (2 * F * D), w13 + e * (2 * F * D) + F * D
        if e >= E:
            w1, w3 = shared + (e - E) * (F * D), shared + (e - E + S) * (F * D)
        return w1, w3

    @triton.jit
    def down_weights(e, w2, shared, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, S: tl.constexpr):
        """Where W2 [D, F] of expert e begins, and from one of its rows to the next."""
        w = w2 + e * (D * F)
        if e >= E:
            w = shared + (e - E) * F
        return w, tl.where(e >= E, S * F, F)

    @triton.jit
    def row_hidden_kernel(x, indices, weights, w13, shared, hidden, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
                          K: tl.constexpr, S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr):
        """BLOCK_F hidden units of one row: weight * silu(w1 x) * w3 x."""
        r, f = tl.program_id(0), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        n, k = r // (K + S), r % (K + S)
        e = tl.load(indices + n * K + k, mask=k < K, other=E - K + k)             # k = K, K+1, ...: E, E+1, ..., shared
        weight = tl.load(weights + n * K + k, mask=k < K, other=1.0)
        w1, w3 = up_weights(e, w13, shared, D, F, E, S)
        a = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
        b = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            at, inside = f[:, None] * D + d[None, :], (f < F)[:, None] & (d < D)[None, :]
            value = tl.load(x + n * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            a += tl.load(w1 + at, mask=inside, other=0.0).to(tl.float32) * value
            b += tl.load(w3 + at, mask=inside, other=0.0).to(tl.float32) * value
        a, b = tl.sum(a, 1), tl.sum(b, 1)
        tl.store(hidden + r * F + f, a * tl.sigmoid(a) * b * weight, mask=f < F)

    @triton.jit
    def row_sum_kernel(hidden, indices, w2, shared, out, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
                       K: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr):
        """BLOCK_D outputs of one token: the sum over its rows of w2 hidden, always in the same order."""
        n, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
        for k in tl.static_range(K + S):
            e = tl.load(indices + n * K + k, mask=k < K, other=E - K + k)
            w, stride = down_weights(e, w2, shared, D, F, E, S)
            for start in range(0, F, BLOCK_F):
                f = start + tl.arange(0, BLOCK_F)
                h = tl.load(hidden + (n * (K + S) + k) * F + f, mask=f < F, other=0.0).to(tl.float32)
                inside = (d < D)[:, None] & (f < F)[None, :]
                down = tl.load(w + d[:, None] * stride + f[None, :], mask=inside, other=0.0).to(tl.float32)
                total += down * h[None, :]
        tl.store(out + n * D + d, tl.sum(total, 1), mask=d < D)

    @triton.jit
    def sort_kernel(indices, order, starts, counts, R, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
                    BLOCK: tl.constexpr):
        """One expert finds its rows: how many come before them, how many there are, and which (token, choice) pairs."""
        expert, r = tl.program_id(0), tl.arange(0, BLOCK)
        n, k = r // (K + S), r % (K + S)
        e = tl.load(indices + n * K + k, mask=(k < K) & (r < R), other=E - K + k)
        e = tl.where(r < R, e, E + S)
        mine = (e == expert).to(tl.int32)
        start = tl.sum((e < expert).to(tl.int32), 0)
        tl.store(starts + expert, start)
        tl.store(counts + expert, tl.sum(mine, 0))
        tl.store(order + start + tl.cumsum(mine, 0) - 1, r, mask=mine == 1)

    @triton.jit
    def tile_hidden_kernel(x, order, starts, counts, weights, w13, shared, hidden, D: tl.constexpr, F: tl.constexpr,
                           E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr,
                           BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr):
        """BLOCK_F hidden units of all the rows of one expert, BLOCK_R at a time. The shared experts, which have the
        most, come first; an idle expert's program has nothing to do."""
        e, f = (E + S - 1 - tl.program_id(0)).to(tl.int64), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        first, count = tl.load(starts + e), tl.load(counts + e)
        w1, w3 = up_weights(e, w13, shared, D, F, E, S)
        for tile in range(0, count, BLOCK_R):
            i = tile + tl.arange(0, BLOCK_R)
            r = tl.load(order + first + i, mask=i < count, other=0)
            n, k = r // (K + S), r % (K + S)
            a = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
            b = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                rows = tl.load(x + n[:, None] * D + d[None, :], mask=(i < count)[:, None] & (d < D)[None, :], other=0.0)
                at, inside = f[:, None] * D + d[None, :], (f < F)[:, None] & (d < D)[None, :]
                gate = tl.load(w1 + at, mask=inside, other=0.0).to(rows.dtype)
                up = tl.load(w3 + at, mask=inside, other=0.0).to(rows.dtype)
                a = tl.dot(rows, gate.T, a, input_precision="ieee")
                b = tl.dot(rows, up.T, b, input_precision="ieee")
            weight = tl.load(weights + n * K + k, mask=(i < count) & (k < K), other=1.0)
            h = a * tl.sigmoid(a) * b * weight[:, None]
            tl.store(hidden + r[:, None] * F + f[None, :], h, mask=(i < count)[:, None] & (f < F)[None, :])

    @triton.jit
    def tile_out_kernel(hidden, order, starts, counts, w2, shared, out, D: tl.constexpr, F: tl.constexpr,
                        E: tl.constexpr, S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
                        BLOCK_F: tl.constexpr):
        """BLOCK_D outputs of all the rows of one expert: w2 hidden."""
        e, d = (E + S - 1 - tl.program_id(0)).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first, count = tl.load(starts + e), tl.load(counts + e)
        w, stride = down_weights(e, w2, shared, D, F, E, S)
        for tile in range(0, count, BLOCK_R):
            i = tile + tl.arange(0, BLOCK_R)
            r = tl.load(order + first + i, mask=i < count, other=0)
            y = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
            for start in range(0, F, BLOCK_F):
                f = start + tl.arange(0, BLOCK_F)
                inside = (i < count)[:, None] & (f < F)[None, :]
                h = tl.load(hidden + r[:, None] * F + f[None, :], mask=inside, other=0.0)
                inside = (d < D)[:, None] & (f < F)[None, :]
                down = tl.load(w + d[:, None] * stride + f[None, :], mask=inside, other=0.0).to(h.dtype)
                y = tl.dot(h, down.T, y, input_precision="ieee")
            tl.store(out + r[:, None] * D + d[None, :], y, mask=(i < count)[:, None] & (d < D)[None, :])


def experts_triton(x, indices, weights, w13, w2, shared=None):
    """experts_torch in two kernels, or from a few tokens up in four; without gradients. The products are summed in
    float32, the hidden activations kept in x's dtype; the same bits every time."""
    (N, D), K, (E, _, F_), power = x.shape, indices.shape[1], w2.shape, triton.next_power_of_2
    shared13, shared2 = shared or (w13, w2)                                                    # unread where S is 0
    S = shared2.shape[1] // F_ if shared else 0
    R = N * (K + S)
    x, hidden = x.contiguous(), x.new_empty(R, F_)
    if N <= 8:                                # as many rows seldom share an expert, and two kernels start sooner
        out = torch.empty_like(x)
        row_hidden_kernel[R, triton.cdiv(F_, 8)](x, indices, weights, w13, shared13, hidden, D, F_, E, K, S,
                                                 BLOCK_F=8, BLOCK_D=min(1024, power(D)), num_warps=8)
        row_sum_kernel[N, triton.cdiv(D, 4)](hidden, indices, w2, shared2, out, D, F_, E, K, S,
                                             BLOCK_D=4, BLOCK_F=min(512, power(F_)), num_warps=4)
        return out
    order, starts, counts = torch.empty(R + 2 * (E + S), dtype=torch.int32, device=x.device).split([R, E + S, E + S])
    sort_kernel[E + S,](indices, order, starts, counts, R, E, K, S, BLOCK=power(R), num_warps=4)
    BLOCK_R, out = 16 if N <= 16 else 32, x.new_empty(R, D)
    most = 128 if w13.element_size() == x.element_size() == 2 else 32              # FP32 tiles must fit small GPUs too
    tile_hidden_kernel[E + S, triton.cdiv(F_, 32)](
        x, order, starts, counts, weights, w13, shared13, hidden, D, F_, E, K, S,
        BLOCK_R, BLOCK_F=32, BLOCK_D=min(most, max(16, power(D))), num_warps=4, num_stages=4)
    tile_out_kernel[E + S, triton.cdiv(D, 64)](
        hidden, order, starts, counts, w2, shared2, out, D, F_, E, S,
        BLOCK_R, BLOCK_D=64, BLOCK_F=min(128, max(16, power(F_))), num_warps=4, num_stages=3)
    return out.view(N, K + S, D).sum(1)


def experts(x, indices, weights, w13, w2, shared=None):
    """experts_torch, on a GPU by experts_triton: 14 microseconds a token instead of 91, at configs/bench_1b.py's sizes
    on an H100; 64 tokens 97 instead of 191 (against the rows sorted for F.grouped_mm)."""
    pick = experts_triton if backend.use_decode_kernels(x, MAX_TOKENS) else experts_torch
    return pick(x, indices, weights, w13, w2, shared)
