"""Training attention of MLA: every token a query, keys and values made for every head (equations 10 and 11).

attention_torch says what is computed, in two lines around torch's own attention. Then the same in Triton, forward and
backward, and for Hopper's tensor cores the forward pass once more in Gluon. A first reading takes the torch form and
the comment before the kernels.

Shapes: B batch, T queries, S keys, H heads, d_n d_r d_v head dims (nope, rope, value).
"""
import math

import torch
import torch.nn.functional as F

import backend

if backend.has_triton():
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor
    WIDE = gl.NVMMASharedLayout(128, 16, rank=3)               # of BF16 tiles [1, rows, d] that tensor cores read
    tma_load = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared    # newer Triton, 3.6
    warps_meet = getattr(gl, "barrier", None) or gl.thread_barrier
    tma_store = getattr(hopper.tma, "async_store", None) or hopper.tma.async_copy_shared_to_global


# --- attention --------------------------------------------------------------------------------------------------------

def attention_torch(q_nope, q_rope, k_nope, k_rope, v, scale, starts=None):
    """Causal attention with keys and values made for every head (eq 10); the queries are the last T of S tokens.

    q_nope [B, T, H, d_n]; q_rope [B, T, H, d_r]; k_nope [B, S, H, d_n]; k_rope [B, S, 1, d_r]; v [B, S, H, d_v]
    -> [B, T, H, d_v]. starts int32 [B, T], with S = T: where each token's document begins; query i sees the keys
    starts[i]..i. None: 0..i.
    """
    q = torch.cat([q_nope, q_rope], -1)                                                       # [B, T, H, d_n + d_r]
    k = torch.cat([k_nope, k_rope.expand(-1, -1, q.shape[2], -1)], -1)                        # [B, S, H, d_n + d_r]
    T, S, seen = q.shape[1], k.shape[1], None
    if S > T or starts is not None:
        index = torch.arange(S, device=q.device)
        seen = index <= index[S - T:, None]                                                   # [T, S]
        seen = seen if starts is None else (seen & (index >= starts[..., None])).unsqueeze(1)           # [B, 1, T, T]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen,
                                         is_causal=seen is None, scale=scale)                 # [B, H, T, d_v]
    return out.transpose(1, 2)


def document_starts(tokens, eos):
    """Where each token's document begins, for documents packed one after the other, each ended by `eos`: tokens
    [B, T] -> int32 [B, T]. Pre-training masks nothing (section 4.1); fine-tuning's samples must not see each other."""
    index = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    first = torch.where(tokens[:, :-1] == eos, index[1:], 0)
    return F.pad(first, (1, 0)).cummax(1).values


# --- the same in Triton: training attention for Hopper ----------------------------------------------------------------
#
# What torch's kernels make us pay for: they want one query and one key per head, so q_nope|q_rope are copied together
# and the one k_rope is copied to all heads, forward, and its gradient summed over them, backward. Here the scores are
# two products, and every operand is read where the projections left it, by tile descriptors (TMA).
#
# One program owns BM queries (or, for the gradients of keys and values, BN keys) of one head and walks over the tiles
# on the other side. Scores live in base 2 (exp2 is the hardware's). Two things make it fast on tensor cores, which
# work beside the rest of the SM and must not wait for it: loads run STAGES tiles ahead, and the forward pass multiplies
# the probabilities of the tile BEFORE with V while this tile's softmax is computed. A tile that lies on the diagonal
# or touches a document's boundary needs a mask; the others, nearly all, run in a loop of their own without it.
# Nothing is added atomically: the same bits every time.

if backend.has_triton():
    SIZES = ["T", "H", "BH", "group", "stride_l"]              # one compiled kernel serves every length and batch

    @triton.jit
    def place(tiles, BH, group):
        """(tile, batch * H + head) of this program. `group` heads at a time: enough to fill the GPU, few enough that
        what they read stays in its cache."""
        pid = tl.program_id(0)
        first = pid // (group * tiles) * group
        width = tl.minimum(group, BH - first)
        rest = pid - first * tiles
        return rest // width, first + rest % width

    @triton.jit
    def visible(rows, cols, first, DOCS: tl.constexpr):
        """Which keys `cols` the queries `rows` see, whose documents begin at `first`; they broadcast."""
        return (cols <= rows) & (cols >= first) if DOCS else cols <= rows

    @triton.jit
    def attend(n0, rows, first, q_nope, q_rope, k_nope, k_rope, v, b, at_k, at_v, acc, p, alpha, top, total, scale,
               BN: tl.constexpr, MASKED: tl.constexpr, DOCS: tl.constexpr):
        """One tile of keys, n0 and up: its scores; the output of the tile before (n0 + BN), whose p is at hand; then
        the running softmax, with `top` the largest score of each row so far and `total` its sum.

            tile    n0 + BN          n0               n0 - BN
            scores  S  softmax -> p  S  softmax -> p  S ...
            output                   P V of n0 + BN   P V of n0 ...           beside the softmax, not before it

        The first call finds p = 0, so whatever lies behind the diagonal adds nothing; the caller multiplies the last.
        """
        k_nope = k_nope.load([b, n0, at_k]).reshape(BN, q_nope.shape[1])
        k_rope = k_rope.load([b, n0, 0]).reshape(BN, q_rope.shape[1])
        v = v.load([b, n0 + BN, at_v]).reshape(BN, acc.shape[1])
        s = tl.dot(q_nope, k_nope.T, tl.dot(q_rope, k_rope.T))                                # [BM, BN]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        if MASKED:
            cols = n0 + tl.arange(0, BN)
            s = tl.where(visible(rows[:, None], cols[None, :], first[:, None], DOCS), s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        alpha = tl.exp2(top - higher)
        return acc, p, alpha, higher, total * alpha + tl.sum(p, 1)

    @triton.jit(do_not_specialize=SIZES)
    def attention_forward(q_nope, q_rope, k_nope, k_rope, v, out, lse, starts, T, H, BH,
                          head_qn, head_qr, head_kn, head_v, scale, stride_l, group,
                          D_N: tl.constexpr, D_R: tl.constexpr, D_V: tl.constexpr, DOCS: tl.constexpr,
                          BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
        tiles = tl.cdiv(T, BM)
        tile, bh = place(tiles, BH, group)
        m0, b, h = (tiles - 1 - tile) * BM, bh // H, bh % H                 # the longest rows first, short ones fill up
        rows = m0 + tl.arange(0, BM)
        first = tl.load(starts + b * T + rows, mask=rows < T, other=0) if DOCS else rows
        low = tl.load(starts + b * T + m0) // BN * BN if DOCS else 0
        q_nope = q_nope.load([b, m0, h * head_qn]).reshape(BM, D_N)
        q_rope = q_rope.load([b, m0, h * head_qr]).reshape(BM, D_R)
        top, total = tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)       # finite: inf - inf is no number
        alpha, p = tl.full([BM], 1.0, tl.float32), tl.zeros([BM, BN], tl.float32)
        acc = tl.zeros([BM, D_V], tl.float32)
        for n0 in tl.range(m0 + BM - BN, (low if DOCS else m0) - 1, -BN, num_stages=STAGES):
            acc, p, alpha, top, total = attend(n0, rows, first, q_nope, q_rope, k_nope, k_rope, v, b, h * head_kn,
                                               h * head_v, acc, p, alpha, top, total, scale, BN, True, DOCS)
        if not DOCS:
            for n0 in tl.range(m0 - BN, -1, -BN, num_stages=STAGES):
                acc, p, alpha, top, total = attend(n0, rows, first, q_nope, q_rope, k_nope, k_rope, v, b, h * head_kn,
                                                   h * head_v, acc, p, alpha, top, total, scale, BN, False, DOCS)
        v = v.load([b, low, h * head_v]).reshape(BN, D_V)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None]) / total[:, None]
        out.store([b, m0, h * D_V], acc.to(out.dtype).reshape(1, BM, D_V))
        tl.store(lse + bh * stride_l + rows, top + tl.log2(total), mask=rows < T)

    # Nearly all of pre-training is V3's dims and texts without boundaries, and for those the same again, faster. Above,
    # all warps do everything in turn, and tensor cores idle while they compute a softmax. Gluon is Triton with layouts,
    # slots and waits written by hand: here the warps have jobs of their own.
    #
    #     1 warp        K V  K V  K V ...                            loads tiles into two slots, as these become free
    #     4 warps       S0 | softmax   | S1 + P0 V0 | softmax   ...  64 queries
    #     4 warps            S0 | softmax   | S1 + P0 V0 | softmax   64 more, which multiply while the others do softmax
    #
    # They meet at barriers in shared memory. A round of a barrier is complete when so many bytes have come, or so many
    # groups have arrived; then the next begins. One waits for a round by its parity; a new barrier has completed a 1.

    @gluon.jit
    def barriers(number: gl.constexpr, arrivals: gl.constexpr):
        new = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(number):
            mbarrier.init(new.index(i), count=arrivals)
        return new

    @gluon.jit
    def load_tiles(sources, columns, slots, gates, b, m0):
        """The loading warp: the queries, then keys and values, from the diagonal's to the first."""
        q_nope, q_rope, k_nope, k_rope, v = sources
        at_qn, at_qr, at_kn, at_v = columns
        all_qn, all_qr, all_kn, all_kr, all_v = slots
        q_full, k_full, v_full, k_free, v_free = gates
        mbarrier.expect(q_full.index(0), 2 * (q_nope.block_type.nbytes + q_rope.block_type.nbytes))
        for half in gl.static_range(2):
            tma_load(q_nope, [b, m0 + 64 * half, at_qn], q_full.index(0), all_qn.index(half))
            tma_load(q_rope, [b, m0 + 64 * half, at_qr], q_full.index(0), all_qr.index(half))
        for n in range(m0 // 128 + 1):
            slot, done, n0 = n % 2, n // 2 & 1 ^ 1, m0 - 128 * n
            mbarrier.wait(k_free.index(slot), done)
            mbarrier.expect(k_full.index(slot), k_nope.block_type.nbytes + k_rope.block_type.nbytes)
            tma_load(k_nope, [b, n0, at_kn], k_full.index(slot), all_kn.index(slot))
            tma_load(k_rope, [b, n0, 0], k_full.index(slot), all_kr.index(slot))
            mbarrier.wait(v_free.index(slot), done)
            mbarrier.expect(v_full.index(slot), v.block_type.nbytes)
            tma_load(v, [b, n0, at_v], v_full.index(slot), all_v.index(slot))

    @gluon.jit
    def start_scores(q_nope, q_rope, k_nope, k_rope):
        zeros = gl.zeros([64, 128], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
        s = hopper.warpgroup_mma(q_rope, k_rope.reshape([128, 64]).permute((1, 0)), zeros, use_acc=False, is_async=True)
        return hopper.warpgroup_mma(q_nope, k_nope.reshape([128, 128]).permute((1, 0)), s, is_async=True)

    @gluon.jit
    def soften(s, top, total, scale):
        """The running softmax: a tile's weights, the factor for all before it, and its largest score and sum so far."""
        higher = gl.maximum(top, gl.max(s, 1) * scale)
        p, shrink = gl.exp2(s * scale - higher[:, None]), gl.exp2(top - higher)
        return p, shrink, higher, total * shrink + gl.sum(p, 1)

    @gluon.jit
    def attend_half(half: gl.constexpr, slots, gates, turn, out, lse, b, at_out, m0, T, scale):
        """Four warps: 64 queries. `turn`: whose products may start, those of the other half having started."""
        TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])       # of scores, and of output
        ROWS: gl.constexpr = gl.SliceLayout(1, TILE)
        LEFT: gl.constexpr = gl.DotOperandLayout(0, TILE, 2)                                # p stays in registers
        all_qn, all_qr, all_kn, all_kr, all_v = slots
        q_full, k_full, v_full, k_free, v_free = gates
        q_nope, q_rope = all_qn.index(half).reshape([64, 128]), all_qr.index(half).reshape([64, 64])
        rows, cols = m0 + 64 * half + gl.arange(0, 64, ROWS), m0 + gl.arange(0, 128, gl.SliceLayout(0, TILE))
        top, total = gl.full([64], -1e30, gl.float32, ROWS), gl.zeros([64], gl.float32, ROWS)
        acc = gl.zeros([64, 128], gl.float32, TILE)

        mbarrier.wait(q_full.index(0), 0)
        mbarrier.wait(k_full.index(0), 0)
        s = hopper.warpgroup_mma_wait(0, [start_scores(q_nope, q_rope, all_kn.index(0), all_kr.index(0))])
        mbarrier.arrive(k_free.index(0), count=1)
        s = gl.where(cols[None, :] <= rows[:, None], s, -float("inf"))
        p, shrink, top, total = soften(s, top, total, scale)
        p = gl.convert_layout(p.to(gl.bfloat16), LEFT)
        for n in range(1, m0 // 128 + 1):
            here, before = n % 2, (n - 1) % 2
            mbarrier.wait(v_full.index(before), (n - 1) // 2 & 1)
            mbarrier.wait(k_full.index(here), n // 2 & 1)
            mbarrier.wait(turn.index(half), n & 1 ^ half)                                   # the first half goes first
            s = start_scores(q_nope, q_rope, all_kn.index(here), all_kr.index(here))
            acc = hopper.warpgroup_mma(p, all_v.index(before).reshape([128, 128]), acc, is_async=True)
            mbarrier.arrive(turn.index(1 - half), count=1)
            s = hopper.warpgroup_mma_wait(1, [s])                                           # all but the last product
            mbarrier.arrive(k_free.index(here), count=1)
            weights, shrink, top, total = soften(s, top, total, scale)
            acc, p = hopper.warpgroup_mma_wait(0, [acc, p])
            mbarrier.arrive(v_free.index(before), count=1)
            acc *= shrink[:, None]
            p = gl.convert_layout(weights.to(gl.bfloat16), LEFT)
        last = m0 // 128
        mbarrier.wait(v_full.index(last % 2), last // 2 & 1)
        acc = hopper.warpgroup_mma(p, all_v.index(last % 2).reshape([128, 128]), acc, is_async=True)
        acc, p = hopper.warpgroup_mma_wait(0, [acc, p])

        gl.store(lse + rows, top + gl.log2(total), mask=rows < T)
        q_nope.store((acc / total[:, None]).to(gl.bfloat16))                                # nobody reads it any more
        hopper.fence_async_shared()
        tma_store(out, [b, m0 + 64 * half, at_out], all_qn.index(half))
        hopper.tma.store_wait(0)

    @gluon.jit(do_not_specialize=SIZES)
    def attention_forward_wide(q_nope, q_rope, k_nope, k_rope, v, out, lse, T, H, BH, head_qn, head_qr, head_kn, head_v,
                               scale, stride_l, group):
        """attention_forward for dims 128, 64, 128 and one text a row: 128 queries of a head, tiles of 128 keys."""
        tile, bh = place(gl.cdiv(T, 128), BH, group)
        m0, b, h = (gl.cdiv(T, 128) - 1 - tile) * 128, bh // H, bh % H
        LAYOUT: gl.constexpr = k_nope.layout
        slots = (gl.allocate_shared_memory(gl.bfloat16, [2, 1, 64, 128], LAYOUT),           # q_nope of both halves
                 gl.allocate_shared_memory(gl.bfloat16, [2, 1, 64, 64], LAYOUT),            # q_rope
                 gl.allocate_shared_memory(gl.bfloat16, [2, 1, 128, 128], LAYOUT),          # k_nope of two tiles
                 gl.allocate_shared_memory(gl.bfloat16, [2, 1, 128, 64], LAYOUT),           # k_rope
                 gl.allocate_shared_memory(gl.bfloat16, [2, 1, 128, 128], LAYOUT))          # v
        gates = (barriers(1, 1), barriers(2, 1), barriers(2, 1),                            # q, k, v are there
                 barriers(2, 2), barriers(2, 2))                                            # k, v: both halves are done
        turn = barriers(2, 1)
        hopper.fence_async_shared()
        sources, columns = (q_nope, q_rope, k_nope, k_rope, v), (h * head_qn, h * head_qr, h * head_kn, h * head_v)
        half = (slots, gates, turn, out, lse + bh * stride_l, b, h * 128, m0, T, scale)
        gl.warp_specialize([(attend_half, (gl.constexpr(0),) + half), (attend_half, (gl.constexpr(1),) + half),
                            (load_tiles, (sources, columns, slots, gates, b, m0))], [4, 1], [240, 24])

    @triton.jit
    def keys_step(m0, cols, k_nope, k_rope, v, q_nope, q_rope, dout, lse, delta, starts, b, bh, at_qn, at_qr, at_o,
                  T, dk_nope, dk_rope, dv, scale, BM: tl.constexpr, MASKED: tl.constexpr, DOCS: tl.constexpr):
        """What the queries m0 and up add to the gradients of a tile of keys. All transposed: keys are the rows."""
        q_nope = q_nope.load([b, m0, at_qn]).reshape(BM, k_nope.shape[1])
        q_rope = q_rope.load([b, m0, at_qr]).reshape(BM, k_rope.shape[1])
        dout = dout.load([b, m0, at_o]).reshape(BM, v.shape[1])
        lse, delta = lse.load([bh, m0]).reshape(BM), delta.load([bh, m0]).reshape(BM)
        s = tl.dot(k_nope, q_nope.T, tl.dot(k_rope, q_rope.T))                                # [BN, BM]
        p = tl.exp2(s * scale - lse[None, :])
        if MASKED:
            rows = m0 + tl.arange(0, BM)
            first = tl.load(starts + b * T + rows, mask=rows < T, other=0) if DOCS else rows
            p = tl.where(visible(rows[None, :], cols[:, None], first[None, :], DOCS), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        ds = (p * (tl.dot(v, dout.T) - delta[None, :])).to(q_nope.dtype)
        return tl.dot(ds, q_nope, dk_nope), tl.dot(ds, q_rope, dk_rope), dv

    @triton.jit(do_not_specialize=SIZES)
    def attention_backward_keys(q_nope, q_rope, k_nope, k_rope, v, dout, lse, delta, dk_nope, dk_rope, dv, starts, ends,
                                T, H, BH, head_qn, head_qr, head_kn, head_v, head_o, scale, scale_log2, group,
                                D_N: tl.constexpr, D_R: tl.constexpr, D_V: tl.constexpr, DOCS: tl.constexpr,
                                BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
        """dk_nope, dv and this head's share of dk_rope, for BN keys."""
        tile, bh = place(tl.cdiv(T, BN), BH, group)                         # early keys have the most queries: first
        n0, b, h = tile * BN, bh // H, bh % H
        cols = n0 + tl.arange(0, BN)
        high = tl.load(ends + b * T + min(n0 + BN, T) - 1) if DOCS else T
        k_nope = k_nope.load([b, n0, h * head_kn]).reshape(BN, D_N)
        k_rope = k_rope.load([b, n0, 0]).reshape(BN, D_R)
        v = v.load([b, n0, h * head_v]).reshape(BN, D_V)
        gn, gr, gv = (tl.zeros([BN, D_N], tl.float32), tl.zeros([BN, D_R], tl.float32), tl.zeros([BN, D_V], tl.float32))
        for m0 in tl.range(n0, high if DOCS else n0 + BN, BM, num_stages=STAGES):
            gn, gr, gv = keys_step(m0, cols, k_nope, k_rope, v, q_nope, q_rope, dout, lse, delta, starts, b, bh,
                                   h * head_qn, h * head_qr, h * head_o, T, gn, gr, gv, scale_log2, BM, True, DOCS)
        if not DOCS:
            for m0 in tl.range(n0 + BN, T, BM, num_stages=STAGES):
                gn, gr, gv = keys_step(m0, cols, k_nope, k_rope, v, q_nope, q_rope, dout, lse, delta, starts, b, bh,
                                       h * head_qn, h * head_qr, h * head_o, T, gn, gr, gv, scale_log2, BM, False, DOCS)
        dk_nope.store([b, n0, h * (D_N + D_V)], (gn * scale).to(dk_nope.dtype).reshape(1, BN, D_N))
        dk_rope.store([b, n0, h * D_R], (gr * scale).to(dk_rope.dtype).reshape(1, BN, D_R))
        dv.store([b, n0, h * (D_N + D_V)], gv.to(dv.dtype).reshape(1, BN, D_V))

    @triton.jit
    def queries_step(n0, rows, first, q_nope, q_rope, dout, lse, delta, k_nope, k_rope, v, b, at_k, at_v, dq_nope,
                     dq_rope, scale, BN: tl.constexpr, MASKED: tl.constexpr, DOCS: tl.constexpr):
        k_nope = k_nope.load([b, n0, at_k]).reshape(BN, q_nope.shape[1])
        k_rope = k_rope.load([b, n0, 0]).reshape(BN, q_rope.shape[1])
        v = v.load([b, n0, at_v]).reshape(BN, dout.shape[1])
        s = tl.dot(q_nope, k_nope.T, tl.dot(q_rope, k_rope.T))                                # [BM, BN]
        dp = tl.dot(dout, v.T)
        p = tl.exp2(s * scale - lse[:, None])
        if MASKED:
            cols = n0 + tl.arange(0, BN)
            p = tl.where(visible(rows[:, None], cols[None, :], first[:, None], DOCS), p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k_nope.dtype)
        return tl.dot(ds, k_nope, dq_nope), tl.dot(ds, k_rope, dq_rope)

    @triton.jit(do_not_specialize=SIZES)
    def attention_backward_queries(q_nope, q_rope, k_nope, k_rope, v, dout, out, lse, delta, dq_nope, dq_rope, starts,
                                   T, H, BH, head_qn, head_qr, head_kn, head_v, head_o, scale, scale_log2,
                                   stride_l, group,
                                   D_N: tl.constexpr, D_R: tl.constexpr, D_V: tl.constexpr, DOCS: tl.constexpr,
                                   BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
        """dq_nope and dq_rope, for BM queries; and delta, the sum over d_v of out * dout, which the softmax's backward
        subtracts in each row, here and in the keys' kernel."""
        tiles = tl.cdiv(T, BM)
        tile, bh = place(tiles, BH, group)
        m0, b, h = (tiles - 1 - tile) * BM, bh // H, bh % H
        rows = m0 + tl.arange(0, BM)
        first = tl.load(starts + b * T + rows, mask=rows < T, other=0) if DOCS else rows
        low = tl.load(starts + b * T + m0) // BN * BN if DOCS else m0
        q_nope = q_nope.load([b, m0, h * head_qn]).reshape(BM, D_N)
        q_rope = q_rope.load([b, m0, h * head_qr]).reshape(BM, D_R)
        dout = dout.load([b, m0, h * head_o]).reshape(BM, D_V)
        out = out.load([b, m0, h * D_V]).reshape(BM, D_V)
        row_delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        tl.store(delta + bh * stride_l + rows, row_delta, mask=rows < T)
        lse = tl.load(lse + bh * stride_l + rows, mask=rows < T, other=0.0)
        gn, gr = tl.zeros([BM, D_N], tl.float32), tl.zeros([BM, D_R], tl.float32)
        for n0 in tl.range(low, m0 + BM, BN, num_stages=STAGES):
            gn, gr = queries_step(n0, rows, first, q_nope, q_rope, dout, lse, row_delta, k_nope, k_rope, v, b,
                                  h * head_kn, h * head_v, gn, gr, scale_log2, BN, True, DOCS)
        if not DOCS:
            for n0 in tl.range(0, m0, BN, num_stages=STAGES):
                gn, gr = queries_step(n0, rows, first, q_nope, q_rope, dout, lse, row_delta, k_nope, k_rope, v, b,
                                      h * head_kn, h * head_v, gn, gr, scale_log2, BN, False, DOCS)
        dq_nope.store([b, m0, h * (D_N + D_R)], (gn * scale).to(dq_nope.dtype).reshape(1, BM, D_N))
        dq_rope.store([b, m0, h * (D_N + D_R)], (gr * scale).to(dq_rope.dtype).reshape(1, BM, D_R))


def readable(x):
    """x, or a copy of it where a tile descriptor could not read it: the last dim must be dense, and the address and the
    other strides must be multiples of 16 bytes."""
    steps = [s * x.element_size() for s in x.stride()[:-1]]
    dense = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)
    return x if dense else x.clone(memory_format=torch.contiguous_format)


def heads(x, rows, gluon=False):
    """A descriptor that loads tiles [rows, d] of one head from x [B, T, H, d]: the heads lie one after the other in its
    last dim, head h at column h * x.stride(2). What is beyond T reads as zero and is not written."""
    B, T, H, d = x.shape
    args = x, [B, T, (H - 1) * x.stride(2) + d], [*x.stride()[:2], 1], [1, rows, d]
    return GluonDescriptor(*args, WIDE) if gluon else TensorDescriptor(*args)


class Attention(torch.autograd.Function):
    """attention_triton: the kernels and what backward needs: the operands, the output and the log-sum-exp.

    Tiles, stages and warps are the fastest, measured on an H100, of those whose registers don't spill into memory. So
    are the heads that run together: 32768 / T of them forward, fewer backward, where each reads more.

    `kept` is None or a list. Under checkpoint, forward runs a second time to make the operands again: the first run
    leaves output and log-sum-exp in the list, the second finds them there and computes nothing.
    """

    @staticmethod
    def forward(ctx, q_nope, q_rope, k_nope, k_rope, v, scale, starts, kept):
        B, T, H, d_n = q_nope.shape
        d_r, d_v, padded = q_rope.shape[-1], v.shape[-1], T + -T % 4        # a descriptor's rows: multiples of 16 bytes
        q_nope, q_rope, k_nope, k_rope, v = map(readable, (q_nope, q_rope, k_nope, k_rope, v))
        starts = starts if starts is None else starts.contiguous()
        if kept:
            out, lse = kept.pop()
        else:
            out = torch.empty(B, T, H, d_v, dtype=v.dtype, device=v.device)
            lse = torch.empty(B * H, padded, dtype=torch.float32, device=v.device)
            numbers = (T, H, B * H, *(t.stride(2) for t in (q_nope, q_rope, k_nope, v)), scale * math.log2(math.e),
                       padded, max(1, 32768 // T))
            if starts is None and (d_n, d_r, d_v) == (128, 64, 128) and v.is_cuda:
                attention_forward_wide[(triton.cdiv(T, 128) * B * H,)](
                    heads(q_nope, 64, True), heads(q_rope, 64, True), heads(k_nope, 128, True),
                    heads(k_rope, 128, True), heads(v, 128, True), heads(out, 64, True), lse, *numbers, num_warps=4)
            else:
                BM, BN, STAGES, warps = 128, 64, 4, 8
                attention_forward[(triton.cdiv(T, BM) * B * H,)](
                    *(heads(t, BM) for t in (q_nope, q_rope)), *(heads(t, BN) for t in (k_nope, k_rope, v)),
                    heads(out, BM), lse, starts, *numbers, d_n, d_r, d_v, starts is not None,
                    BM, BN, STAGES, num_warps=warps)
            if kept is not None:
                kept.append((out.detach(), lse))
        ctx.save_for_backward(q_nope, q_rope, k_nope, k_rope, v, out, lse, starts)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q_nope, q_rope, k_nope, k_rope, v, out, lse, starts = ctx.saved_tensors
        B, T, H, d_n = q_nope.shape
        d_r, d_v, padded, docs = q_rope.shape[-1], v.shape[-1], lse.shape[1], starts is not None
        scale, dout, delta = ctx.scale, readable(dout), torch.empty_like(lse)
        ends = torch.searchsorted(starts, starts, right=True, out_int32=True) if docs else None   # of token's document

        # The pairs side by side, as the projections made them: autograd need not copy them together again.
        dq, dkv = out.new_empty(B, T, H, d_n + d_r), out.new_empty(B, T, H, d_n + d_v)
        (dq_nope, dq_rope), (dk_nope, dv) = dq.split([d_n, d_r], -1), dkv.split([d_n, d_v], -1)
        dk_rope = out.new_empty(B, T, H, d_r)                                                 # each head's share
        numbers = (T, H, B * H, *(t.stride(2) for t in (q_nope, q_rope, k_nope, v, dout)), scale,
                   scale * math.log2(math.e))

        BM, BN, STAGES, warps = 128, 64, 3, 8
        attention_backward_queries[(triton.cdiv(T, BM) * B * H,)](
            heads(q_nope, BM), heads(q_rope, BM), heads(k_nope, BN), heads(k_rope, BN), heads(v, BN), heads(dout, BM),
            heads(out, BM), lse, delta, heads(dq_nope, BM), heads(dq_rope, BM), starts, *numbers, padded,
            max(1, 8192 // T), d_n, d_r, d_v, docs, BM, BN, STAGES, num_warps=warps)

        BM, BN, STAGES, warps = 32, 64, 3, 4
        rows = lambda x: TensorDescriptor(x, [B * H, T], [padded, 1], [1, BM])
        attention_backward_keys[(triton.cdiv(T, BN) * B * H,)](
            heads(q_nope, BM), heads(q_rope, BM), heads(k_nope, BN), heads(k_rope, BN), heads(v, BN), heads(dout, BM),
            rows(lse), rows(delta), heads(dk_nope, BN), heads(dk_rope, BN), heads(dv, BN), starts, ends, *numbers,
            max(1, 16384 // T), d_n, d_r, d_v, docs, BM, BN, STAGES, num_warps=warps)
        return dq_nope, dq_rope, dk_nope, dk_rope.sum(2, keepdim=True), dv, None, None, None


@torch.compiler.disable
def attention_triton(q_nope, q_rope, k_nope, k_rope, v, scale, starts=None, kept=None):
    """attention_torch by the kernels above: BF16 on a Hopper GPU, head dims as backend.attention says (the interpreter
    takes float32 too). kept: see Attention."""
    return Attention.apply(q_nope, q_rope, k_nope, k_rope, v, scale, starts, kept)


def attention(q_nope, q_rope, k_nope, k_rope, v, scale, starts=None, kept=None):
    """attention_torch, by the path that backend names for these tensors; the kernels want as many keys as queries."""
    dims = q_nope.shape[-1], q_rope.shape[-1], v.shape[-1]
    path, _ = backend.attention(q_nope.device, q_nope.dtype, dims)
    if path == "Triton" and k_nope.shape[1] == q_nope.shape[1]:
        return attention_triton(q_nope, q_rope, k_nope, k_rope, v, scale, starts, kept)
    return attention_torch(q_nope, q_rope, k_nope, k_rope, v, scale, starts)
