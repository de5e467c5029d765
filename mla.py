"""Multi-head Latent Attention (MLA): the report's section 2.1.1, equations 1-11.

The problem. To write its next token, a transformer reads the keys and values of every token before it. Multi-head
attention caches 2 * H * d numbers per token and layer; at V3's size (128 heads of 128 dims, 61 layers) that is 4 MB a
token, and reading it is what generation spends its time on. MLA caches one small vector from which all heads' keys and
values can be made again: 70 KB a token.

    x [D] --W_dkv--> c_kv [r_kv] --W_uk--> k_nope [H, d_n]         c_kv and k_rope are cached, nothing else;
      |                  `---------W_uv--> v      [H, d_v]         k_rope is ONE key for all heads, because a
      |--W_kr--> RoPE --> k_rope [d_r]                             rotation between W_uk and the query would keep
      `--W_q---> q_nope [H, d_n], RoPE --> q_rope [H, d_r]         W_uk from being moved to the query's side (below)

    score(i, j) = (q_nope_i . k_nope_j  +  q_rope_i . k_rope_j) * (d_n + d_r)^-1/2             (eq 10)
    o_i = sum_j softmax_j(score) v_j,   u_i = W_o o_i                                           (eq 10, 11)

The same layer in two orders of multiplication, equal in exact arithmetic:

    naive     k_nope = W_uk c_kv and v = W_uv c_kv for every token, then ordinary attention. Best when many queries
              share the keys: training and prefill.
    absorbed  q_nope . (W_uk c) = (W_uk^T q_nope) . c: the query moves into latent space, attention runs directly over
              the cache, where the keys and values of all heads are the SAME tile, and W_uv is applied to the result.
              Best when one query reads a long cache: decoding.

Shapes: B batch, T tokens, S cached tokens, D dim, H heads, r_q r_kv latent ranks, d_n d_r d_v head dims (nope, rope,
value). RoPE is interleaved as in the released checkpoints: pairs (x0, x1), (x2, x3), ...
Simplified against V3: nothing in the mathematics.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import backend
from fp8 import Linear

if backend.has_triton():                                       # macOS, Windows: the torch forms are all there is
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


# --- RMSNorm ----------------------------------------------------------------------------------------------------------

class Normalize(torch.autograd.Function):
    """x / rms(x) * weight, with the backward in four passes over memory where autograd would take ten."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / rms
        n = x * r
        ctx.save_for_backward(n, weight, r)
        return n * weight

    @staticmethod
    def backward(ctx, grad):
        n, weight, r = ctx.saved_tensors
        along = grad * n                                        # n has length sqrt(D): what changes only the length ...
        dx = (grad * weight).addcmul_(n, (along @ weight / -n.shape[-1]).unsqueeze(-1)).mul_(r)      # ... is taken out
        return dx, along.flatten(0, -2).sum(0), None


def rms_norm_torch(x, weight, eps):
    """x [..., D] / rms(x) * weight [D]: computed in float32 or better, returned in x's dtype."""
    high = torch.promote_types(x.dtype, torch.float32)
    if not torch.is_grad_enabled():                            # one operation where nobody wants a gradient
        return F.rms_norm(x.to(high), weight.shape, weight.to(high), eps).to(x.dtype)
    return Normalize.apply(x.to(high), weight.to(high), eps).to(x.dtype)


if backend.has_triton():
    @triton.jit
    def rms_norm_forward(x, weight, y, r, eps, D, stride, BLOCK: tl.constexpr):
        row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + cols, mask=cols < D, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
        w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
        tl.store(y + row * D + cols, (value * inverse * w).to(y.dtype.element_ty), mask=cols < D)
        tl.store(r + row, inverse)

    @triton.jit
    def rms_norm_backward(x, weight, r, dy, dx, dw, N, D, stride, stride_dy, BLOCK: tl.constexpr):
        """One program per row of dw [programs, D], for every so-many-th row of x: no atomics."""
        program, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for row in range(program, N, tl.num_programs(0)):
            inverse = tl.load(r + row)
            n = tl.load(x + row * stride + cols, mask=cols < D, other=0.0).to(tl.float32) * inverse
            g = tl.load(dy + row * stride_dy + cols, mask=cols < D, other=0.0).to(tl.float32)
            total += g * n
            g *= w
            g = (g - n * (tl.sum(g * n, 0) / D)) * inverse
            tl.store(dx + row * D + cols, g.to(dx.dtype.element_ty), mask=cols < D)
        tl.store(dw + program * D + cols, total, mask=cols < D)


class FusedNormalize(torch.autograd.Function):
    """rms_norm_triton: one pass forward, one backward; keeps x as it came, not its float32 copy."""
    PROGRAMS = 528                                              # of the backward: four for each of Hopper's 132 SMs

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        N, D = rows.shape
        y, r = x.new_empty(x.shape), torch.empty(N, dtype=torch.float32, device=x.device)
        rms_norm_forward[(N,)](rows, weight, y, r, eps, D, rows.stride(0), triton.next_power_of_2(D))
        ctx.save_for_backward(rows, weight, r)
        return y

    @staticmethod
    def backward(ctx, grad):
        rows, weight, r = ctx.saved_tensors
        (N, D), dy = rows.shape, grad.reshape(-1, rows.shape[1])
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        programs = min(N, FusedNormalize.PROGRAMS)
        dx, dw = grad.new_empty(grad.shape), torch.empty(programs, D, dtype=torch.float32, device=grad.device)
        rms_norm_backward[(programs,)](rows, weight, r, dy, dx, dw, N, D, rows.stride(0), dy.stride(0),
                                       triton.next_power_of_2(D), num_warps=8)
        return dx, dw.sum(0).to(weight.dtype), None


@torch.compiler.disable
def rms_norm_triton(x, weight, eps):
    """rms_norm_torch for x in float32 or less."""
    return FusedNormalize.apply(x, weight, eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; computed in float32 or better, returned in x's dtype."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        form = rms_norm_triton if backend.use_small_kernels(x) else rms_norm_torch
        return form(x, self.weight, self.eps)


# --- positions: RoPE, and YaRN for contexts longer than the trained one -----------------------------------------------

def yarn_mscale(c, mscale):
    """YaRN's attention temperature 0.1 * mscale * ln(s) + 1; 1 while YaRN is off (section 4.3)."""
    return 0.1 * mscale * math.log(c.rope_factor) + 1 if c.context > c.original_seq_len else 1.0


def rope_table(c):
    """exp(i * position * frequency) as complex64 [context, d_r/2]; `c` is a Config.

    With YaRN (on only when the context exceeds original_seq_len) the slow dims, those that turn less than beta_slow
    times over the trained length, are stretched by rope_factor, the fast ones (more than beta_fast turns) are left
    alone, and a ramp joins the two. The angles are formed in float64: at position 100,000 a float32 angle is off by
    0.004 rad; and on the CPU, because not every device has float64.
    """
    d, base = c.qk_rope_head_dim, c.rope_theta
    frequency = base ** -(torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d)                        # [d_r/2]
    if c.context > c.original_seq_len:
        def dim_with(turns):                                  # the (fractional) dim that turns so often over the length
            return d * math.log(c.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))
        low, high = max(math.floor(dim_with(c.beta_fast)), 0), min(math.ceil(dim_with(c.beta_slow)), d - 1)
        dims = torch.arange(d // 2, dtype=torch.float64, device="cpu")
        ramp = ((dims - low) / max(high - low, 0.001)).clamp(0, 1)                             # 0: keep, 1: stretch
        frequency = frequency * (1 - ramp) + frequency / c.rope_factor * ramp
    angle = torch.arange(c.context, dtype=torch.float64, device="cpu")[:, None] * frequency           # [context, d_r/2]
    length = yarn_mscale(c, c.mscale) / yarn_mscale(c, c.mscale_all_dim)                           # 1 in V3
    return torch.polar(torch.full_like(angle, length), angle).to(torch.complex64)


def apply_rope(x, rope):
    """Turn each pair (x0, x1) of the last dim: as a complex number, times exp(i * angle).

    x [B, T, H, d_r]; rope complex [T, d_r/2], or [B, T, d_r/2] where each row has its own positions.
    """
    high = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    pairs = torch.view_as_complex(high.unflatten(-1, (-1, 2)))                                 # [B, T, H, d_r/2]
    return torch.view_as_real(pairs * rope.unsqueeze(-2)).flatten(-2).to(x.dtype)


def split_rope_torch(x, H, rope):
    """Heads in two parts, the second rotated: x [B, T, H * (d + d_r)] -> [B, T, H, d], [B, T, H, d_r]; rope as for
    apply_rope. x itself may be changed."""
    d_r = 2 * rope.shape[-1]
    plain, turned = x.unflatten(-1, (H, -1)).split([x.shape[-1] // H - d_r, d_r], -1)
    return plain, apply_rope(turned, rope)


if backend.has_triton():
    @triton.jit
    def turn_heads(x, rope, H, D, positions, SIGN: tl.constexpr, D_R: tl.constexpr, BLOCK: tl.constexpr):
        """Turn the last D_R of each head's D dims of one token, in place; SIGN -1 turns back."""
        token = tl.program_id(0).to(tl.int64)
        heads, dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D_R)
        here = x + (token * H + heads[:, None]) * D + D - D_R + dims[None, :]
        pairs = tl.load(here, mask=heads[:, None] < H, other=0.0).to(tl.float32).reshape(BLOCK, D_R // 2, 2)
        a, b = tl.split(pairs)
        cos, sin = tl.split(tl.load(rope + (token % positions) * D_R + dims).reshape(D_R // 2, 2))
        cos, sin = cos[None, :], SIGN * sin[None, :]
        turned = tl.join(a * cos - b * sin, a * sin + b * cos).reshape(BLOCK, D_R)
        tl.store(here, turned.to(x.dtype.element_ty), mask=heads[:, None] < H)


def turn_in_place(x, H, rope, sign):
    """x [B, T, H * D], dense; the rows of rope are those of one sequence, or of all B * T tokens."""
    D, rope = x.shape[-1] // H, torch.view_as_real(rope).flatten(-2)                          # [T or B, T, d_r]
    block = min(16, triton.next_power_of_2(H))
    positions = rope.numel() // rope.shape[-1]
    turn_heads[(x.numel() // (H * D), triton.cdiv(H, block))](x, rope.contiguous(), H, D, positions, sign,
                                                              rope.shape[-1], block)
    return x


class Turn(torch.autograd.Function):
    """RoPE in place of a copy: nobody needs the projection's output as it was."""

    @staticmethod
    def forward(ctx, x, H, rope):
        ctx.H, ctx.rope = H, rope
        ctx.mark_dirty(x)
        return turn_in_place(x, H, rope, 1)

    @staticmethod
    def backward(ctx, grad):
        # In place here too: Split's backward made this gradient, for us alone.
        return turn_in_place(grad.contiguous(), ctx.H, ctx.rope, -1), None, None


class Split(torch.autograd.Function):
    """x [..., d + e] -> [..., d], [..., e]. Where the two gradients lie side by side in one buffer, as Attention's do,
    that buffer is the gradient; autograd's own split would copy them together."""

    @staticmethod
    def forward(ctx, x, d):
        return x[..., :d], x[..., d:]

    @staticmethod
    def backward(ctx, a, b):
        beside = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.stride() == b.stride() \
            and b.storage_offset() == a.storage_offset() + a.shape[-1] and a.stride(-1) == 1
        if not beside:
            return torch.cat([a, b], -1), None
        return a.as_strided((*a.shape[:-1], a.shape[-1] + b.shape[-1]), a.stride()), None


split_joined = torch.compiler.disable(Split.apply)             # the compiler can't follow where gradients lie


def split(x, d):
    """x [..., d + e] -> [..., d], [..., e]: by Split where kernels run."""
    return split_joined(x, d) if backend.use_small_kernels(x) else x.split([d, x.shape[-1] - d], -1)


@torch.compiler.disable
def split_rope_triton(x, H, rope):
    """split_rope_torch in x's own memory, for x in float32 or less and d_r a power of two."""
    d_r = 2 * rope.shape[-1]
    return Split.apply(Turn.apply(x, H, rope).unflatten(-1, (H, -1)), x.shape[-1] // H - d_r)


def split_rope(x, H, rope):
    """split_rope_torch, by the path that backend names."""
    fused = backend.use_small_kernels(x) and rope.shape[-1] & (rope.shape[-1] - 1) == 0 and x.is_contiguous()
    return (split_rope_triton if fused else split_rope_torch)(x, H, rope)


# --- the cache --------------------------------------------------------------------------------------------------------

class Fp8Latents(NamedTuple):
    """Latents [..., r_kv + d_r] in 656 bytes instead of 1152 (V3's dims): c_kv in E4M3, each 1x128 tile of a token with
    a scale of its own, as activations in section 3.3; the rotated key stays in BF16."""
    c_kv: torch.Tensor                                                                       # float8_e4m3fn [..., r_kv]
    scale: torch.Tensor                                                                      # float32 [..., tiles]
    k_rope: torch.Tensor                                                                     # bfloat16 [..., d_r]


def tiles(r_kv):
    """Tiles per token of an FP8 latent: one per 128 channels, or one in all where 128 doesn't divide them."""
    return r_kv // 128 if r_kv % 128 == 0 else 1


def quantize(latent, d_r):
    """[..., r_kv + d_r] -> Fp8Latents. A tile's scale is its largest value / 448, E4M3's largest (at least 1e-10 / 448:
    a tile of zeros stays zeros)."""
    c_kv, k_rope = latent.split([latent.shape[-1] - d_r, d_r], -1)
    c_kv = c_kv.float().unflatten(-1, (tiles(c_kv.shape[-1]), -1))                             # [..., tiles, 128]
    scale = c_kv.abs().amax(-1).clamp_min(1e-10) / 448
    c_kv = (c_kv / scale.unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)                    # [..., r_kv]
    return Fp8Latents(c_kv, scale, k_rope.to(torch.bfloat16))


def dequantize(latents, dtype):
    """Fp8Latents -> [..., r_kv + d_r] in dtype."""
    c_kv = latents.c_kv.float().unflatten(-1, (latents.scale.shape[-1], -1)) * latents.scale.unsqueeze(-1)
    return torch.cat([c_kv.flatten(-2).to(dtype), latents.k_rope.to(dtype)], -1)


class LatentCache:
    """What attention remembers of each token: [c_kv ; k_rope], r_kv + d_r numbers per layer (eq 1-3), for B sequences
    of different lengths.

    The buffer is allocated once for `capacity` tokens a row, so a new token costs the write of its own latents and
    never a copy of the old ones. `lengths` [B] counts the tokens each row has kept; what lies beyond it is overwritten
    later. That makes forgetting cheap: the tokens that a forward pass wrote and `advance` did not count are gone, and
    advancing by a negative count takes back more. dtype float8_e4m3fn: Fp8Latents, of which the last d_r of the width
    stay BF16. Raises ValueError when a row would grow past the capacity.

    The host keeps two numbers about the lengths, so that no layer waits for the device: how long the longest row is,
    and whether all are equally long. A CUDA graph is replayed without the host: once `static` is set, positions come
    from the device's lengths alone, attention is given the whole buffer (the kernel stops at each row's own length),
    and the capacity is no longer checked.
    """

    def __init__(self, layers, batch, capacity, width, device=None, dtype=torch.float32, d_r=0):
        parts = [(width, dtype)]
        if dtype == torch.float8_e4m3fn:
            parts = [(width - d_r, dtype), (tiles(width - d_r), torch.float32), (d_r, torch.bfloat16)]
        self.buffers = [torch.zeros(layers, batch, capacity, n, device=device, dtype=kind) for n, kind in parts]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity, self.d_r, self.longest, self.even, self.static = capacity, d_r, 0, True, False

    @property
    def latents(self):
        """[layers, B, capacity, r_kv + d_r], or Fp8Latents of that."""
        return Fp8Latents(*self.buffers) if len(self.buffers) > 1 else self.buffers[0]

    @property
    def bytes_per_token(self):
        return sum(b.shape[0] * b.shape[-1] * b.element_size() for b in self.buffers)

    def positions(self, tokens):
        """Positions of the next `tokens` tokens of every row: [T] where all rows are equally long, else [B, T]."""
        if not self.static and self.longest + tokens > self.capacity:
            raise ValueError(f"latent cache of {self.capacity} tokens is full: {self.longest} are held and {tokens} "
                             f"more were given; ask for a larger capacity or a shorter prompt")
        if self.even and not self.static:
            return torch.arange(self.longest, self.longest + tokens, device=self.lengths.device)
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def write(self, layer, positions, latent):
        """Put latent [B, T, r_kv + d_r] at `positions` [T] or [B, T]; returns the latents [B, S, r_kv + d_r] (or
        Fp8Latents) up to the longest row's last; what is beyond a row's own positions is not of its text."""
        parts = quantize(latent, self.d_r) if len(self.buffers) > 1 else [latent]
        rows, end = torch.arange(len(latent), device=latent.device)[:, None], self.longest + latent.shape[1]
        for buffer, part in zip(self.buffers, parts):
            if positions.ndim == 1:
                buffer[layer, :, self.longest:end] = part
            else:
                buffer[layer][rows, positions] = part
        seen = [buffer[layer] if self.static else buffer[layer, :, :end] for buffer in self.buffers]
        return Fp8Latents(*seen) if len(seen) > 1 else seen[0]

    def advance(self, counts):
        """Keep the first counts[b] of the tokens just written to row b, fewer where a row was padded or a draft
        rejected: int, or int64 [B] where rows differ (the host then reads the lengths, unless static)."""
        self.lengths += counts
        if torch.is_tensor(counts) and not self.static:
            lengths = self.lengths.tolist()
            self.longest, self.even = max(lengths), min(lengths) == max(lengths)
        elif not self.static:
            self.longest += counts


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


# --- attention over the cache -----------------------------------------------------------------------------------------

def decode_torch(q_latent, q_rope, latents, positions, scale):
    """Attention over the cache itself: one key of r_kv + d_r dims for all heads; its first r_kv dims are the value.

    q_latent [B, T, H, r_kv]; q_rope [B, T, H, d_r]; latents [B, S, r_kv + d_r] or Fp8Latents; positions int64 [B, T] of
    the queries, ascending in T: query t of row b sees keys 0..positions[b, t]. Softmax in float32 or better.
    -> [B, T, H, r_kv]
    """
    r_kv = q_latent.shape[-1]
    if isinstance(latents, Fp8Latents):
        latents = dequantize(latents, q_latent.dtype)
    scores = torch.einsum("bthr,bsr->bths", torch.cat([q_latent, q_rope], -1), latents) * scale
    future = torch.arange(latents.shape[1], device=latents.device) > positions[..., None, None]        # [B, T, 1, S]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(future, -math.inf)
    return torch.einsum("bths,bsr->bthr", scores.softmax(-1).to(latents.dtype), latents[..., :r_kv])


if backend.has_triton():
    # The kernel's time is the cache's way through memory, so a tile of it is loaded once and multiplied twice: as keys
    # by the queries, as values by the softmax. All T * H queries of a row read the same keys and together are the rows
    # of both products. One row of the batch would keep one multiprocessor busy, so its keys are cut into `splits` equal
    # shares, each with a softmax of its own, and a second kernel merges them. The shares are of the row's real length,
    # which only the device knows: a short row costs little, and a captured CUDA graph stays right while rows grow.

    @triton.jit
    def share(positions, row, T, splits, BLOCK_S: tl.constexpr):
        """(keys of a row, keys of each of its shares: whole blocks)."""
        length = tl.load(positions + row * T + T - 1).to(tl.int32) + 1
        return length, tl.cdiv(tl.cdiv(length, BLOCK_S), splits) * BLOCK_S

    @triton.jit
    def decode_kernel(q_latent, q_rope, c_kv, k_rope, positions, out, lse, scale, T, H, splits, c_row, c_token, k_row,
                      k_token, tile_scale, s_row, s_token, R: tl.constexpr, D_R: tl.constexpr, TILES: tl.constexpr,
                      BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr):
        """Up to BLOCK_Q of a row's queries over one share of its keys -> out [splits, B, T, H, R] and lse, to the base
        2, [splits, B, T, H]. scale: times log2(e). tile_scale: None, or the scales of an FP8 c_kv."""
        block, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        length, size = share(positions, row, T, splits, BLOCK_S)
        start = split * size
        end = tl.minimum(start + size, length)
        if start < end:                                                 # else nothing is written, nor read by the merge
            q, dims, turned = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, R), tl.arange(0, D_R)
            there = q < T * H                                                                           # [BLOCK_Q]
            at = row * T * H + q
            query = tl.load(q_latent + at[:, None] * R + dims[None, :], mask=there[:, None], other=0.0)
            query_rope = tl.load(q_rope + at[:, None] * D_R + turned[None, :], mask=there[:, None], other=0.0)
            last = tl.load(positions + row * T + q // H, mask=there, other=0).to(tl.int32)   # the last key it sees
            top = tl.full([BLOCK_Q], -1e30, tl.float32)                  # finite: -inf - -inf would be NaN
            total = tl.zeros([BLOCK_Q], tl.float32)
            acc = tl.zeros([BLOCK_Q, R], tl.float32)
            c_kv += row * c_row
            k_rope += row * k_row
            for s in tl.range(start, end, BLOCK_S, num_stages=STAGES):
                keys = s + tl.arange(0, BLOCK_S)
                inside = (keys < end)[:, None]           # beyond it anything may lie, NaN too, and 0 * NaN is not 0
                c = tl.load(c_kv + keys[:, None] * c_token + dims[None, :], mask=inside, other=0.0)       # [BLOCK_S, R]
                k = tl.load(k_rope + keys[:, None] * k_token + turned[None, :], mask=inside, other=0.0)
                if tile_scale is not None:
                    k = k.to(query.dtype)
                    cells = tile_scale + row * s_row + keys[:, None] * s_token + tl.arange(0, TILES)[None, :]
                    cells = tl.load(cells, mask=inside, other=0.0)[:, :, None]
                    c = tl.reshape(c.to(tl.float32), [BLOCK_S, TILES, R // TILES]) * cells
                    c = tl.reshape(c, [BLOCK_S, R]).to(query.dtype)
                scores = tl.dot(query, c.T, tl.dot(query_rope, k.T)) * scale                  # [BLOCK_Q, BLOCK_S]
                scores = tl.where(keys[None, :] <= last[:, None], scores, float("-inf"))
                high = tl.maximum(top, tl.max(scores, 1))
                p, shrink = tl.exp2(scores - high[:, None]), tl.exp2(top - high)
                total = total * shrink + tl.sum(p, 1)
                acc = tl.dot(p.to(c.dtype), c, acc * shrink[:, None])
                top = high
            at += split * tl.num_programs(2) * T * H
            seen = tl.where(total > 0, total, 1.0)                # a query of a draft may see no key of the last share
            tl.store(out + at[:, None] * R + dims[None, :], acc / seen[:, None], mask=there[:, None])
            tl.store(lse + at, tl.where(total > 0, top + tl.log2(seen), float("-inf")), mask=there)

    # The same with more queries, where the products take longer than the loads and the compiler's own schedule leaves
    # tensor cores idle: it lets both groups of four warps compute all the scores, and starts to load a tile when the
    # one before is nearly done. Gluon is Triton with layouts and waits written by hand: here each group computes the
    # scores of half the keys and the values of half the dims, and the next tile is on its way all the time.

    @gluon.jit
    def load_queries(query, base, start, end, WIDTH: gl.constexpr):
        """Start to copy 64 rows of base into shared memory, from `start` on; rows from `end` on become zeros. Without
        a descriptor, which takes the host longer to make than this takes."""
        lanes: gl.constexpr = min(WIDTH // 8, 32)
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [8, 1], [1, 0])
        rows, dims = start + gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
        at = base + rows[:, None] * WIDTH + dims[None, :]
        hopper.async_copy.async_copy_global_to_shared(query, at, mask=(rows < end)[:, None])

    @gluon.jit
    def load_keys(c_kv, k_rope, c, k, full, row, s, wanted):
        """Start to copy the 64 keys from s on into a slot."""
        mbarrier.expect(full, c_kv.block_type.nbytes + k_rope.block_type.nbytes, pred=wanted)
        tma_load(c_kv, [row, s, 0], full, c, pred=wanted)
        tma_load(k_rope, [row, s, 0], full, k, pred=wanted)

    @gluon.jit
    def wide_kernel(q_latent, q_rope, c_kv, k_rope, positions, out, lse, scale, T, H, splits, R: gl.constexpr):
        """decode_kernel for 64 queries and tiles of 64 keys, with 8 warps; R from 128 to 512, d_r = 64."""
        SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
        VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, R // 2, 16])
        LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
        SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
        block, split, row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
        length, size = share(positions, row.to(gl.int64), T, splits, 64)
        start = split * size
        end = gl.minimum(start + size, length)
        if start >= end:
            return
        query = gl.allocate_shared_memory(gl.bfloat16, [64, R], SHARED)
        query_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
        all_c = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 64, R], c_kv.layout)         # one in use, one on its way
        all_k = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 64, 64], k_rope.layout)
        weights = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
        full = barriers(2, 1)
        hopper.fence_async_shared()
        load_keys(c_kv, k_rope, all_c.index(0), all_k.index(0), full.index(0), row, start, True)
        at = row.to(gl.int64) * T
        load_queries(query, q_latent + at * H * R, block * 64, T * H, R)
        load_queries(query_rope, q_rope + at * H * 64, block * 64, T * H, 64)
        hopper.async_copy.commit_group()

        q = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        there = q < T * H
        last = gl.load(positions + at + q // H, mask=there, other=0).to(gl.int32)
        first = gl.load(positions + at).to(gl.int32)                                # the last key that all of them see
        top = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([64, 64], gl.float32, SCORES)                              # summed over keys at the end, once
        acc = hopper.warpgroup_mma_init(gl.zeros([64, R], gl.float32, VALUES))
        hopper.async_copy.wait_group(0)                                         # the compiler puts a barrier after it
        begin, turned = query.slice(0, 128, dim=1).load(LEFT), query_rope.load(LEFT)  # registers have room for so much
        hopper.fence_async_shared()
        for s in range(start, end, 64):
            n = (s - start) // 64
            here = n % 2
            acc = hopper.warpgroup_mma_wait(0, [acc])
            mbarrier.wait(full.index(here), n // 2 & 1)
            c, k = all_c.index(here).reshape([64, R]), all_k.index(here).reshape([64, 64])
            if s + 64 > end:                         # beyond it anything may lie, NaN too, and 0 * NaN is not 0
                inside = s + gl.arange(0, 64, gl.SliceLayout(1, ROWS)) < end
                for i in gl.static_range(0, R, 64):
                    part = c.slice(i, 64, dim=1)
                    part.store(gl.where(inside[:, None], part.load(ROWS), 0.0))
                hopper.fence_async_shared()
            scores = hopper.warpgroup_mma(turned, k.permute((1, 0)), gl.zeros([64, 64], gl.float32, SCORES),
                                          use_acc=False, is_async=True)
            scores = hopper.warpgroup_mma(begin, c.slice(0, 128, dim=1).permute((1, 0)), scores, is_async=True)
            for i in gl.static_range(128, R, 128):
                scores = hopper.warpgroup_mma(query.slice(i, 128, dim=1), c.slice(i, 128, dim=1).permute((1, 0)),
                                              scores, is_async=True)
            warps_meet()                                                            # all have read the tile before
            load_keys(c_kv, k_rope, all_c.index(1 - here), all_k.index(1 - here), full.index(1 - here), row, s + 64,
                      s + 64 < end)
            scores = hopper.warpgroup_mma_wait(0, [scores])
            if s + 63 > first:
                keys = s + gl.arange(0, 64, gl.SliceLayout(0, SCORES))
                scores = gl.where(keys[None, :] <= last[:, None], scores, float("-inf"))
            high = gl.maximum(top, gl.max(scores, 1) * scale)
            p, shrink = gl.exp2(scores * scale - high[:, None]), gl.exp2(top - high)
            total = total * shrink[:, None] + p
            top = high
            weights.store(p.to(gl.bfloat16))
            hopper.fence_async_shared()
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]
            acc = hopper.warpgroup_mma(weights, c, acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, [acc])
        total = gl.sum(total, 1)
        seen = gl.where(total > 0, total, 1.0)
        at = (split * gl.num_programs(2) + row).to(gl.int64) * T * H
        gl.store(lse + at + q, gl.where(total > 0, top + gl.log2(seen), float("-inf")), mask=there)
        acc = acc / gl.convert_layout(seen, gl.SliceLayout(1, VALUES))[:, None]
        q, dims = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, VALUES)), gl.arange(0, R, gl.SliceLayout(0, VALUES))
        gl.store(out + (at + q)[:, None] * R + dims[None, :], acc, mask=(q < T * H)[:, None])

    @triton.jit
    def merge_kernel(parts, lse, positions, out, T, H, splits, BLOCK_S: tl.constexpr, R: tl.constexpr,
                     SPLITS: tl.constexpr, BLOCK_R: tl.constexpr):
        """Softmaxes over shares -> softmax over all: weighted by exp(lse). One query, BLOCK_R of its dims."""
        query, dims = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        length, size = share(positions, query // (T * H), T, splits, BLOCK_S)
        split = tl.arange(0, SPLITS)
        used = split * size < length
        at = split * tl.num_programs(0).to(tl.int64) + query
        weight = tl.load(lse + at, mask=used, other=float("-inf"))
        weight = tl.exp2(weight - tl.max(weight, 0))
        part = tl.load(parts + at[:, None] * R + dims[None, :], mask=used[:, None], other=0.0)      # [SPLITS, BLOCK_R]
        tl.store(out + query * R + dims, tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0))


def decode_triton(q_latent, q_rope, latents, positions, scale, splits=None):
    """decode_torch in two kernels, without a host sync. latents may be a cache's whole buffer, strides and all: what
    lies beyond a row's last position is never read. r_kv and d_r: powers of two, from 16 up. splits: shares of a row's
    keys (None: as many as keep the GPU busy)."""
    B, T, H, R = q_latent.shape
    if isinstance(latents, Fp8Latents):
        c_kv, tile_scale, k_rope = latents
    else:
        latents = readable(latents)
        c_kv, tile_scale, k_rope = latents[..., :R], None, latents[..., R:]
    # Up to 16 queries: tensor cores idle anyway, and two small programs on each multiprocessor keep more bytes on the
    # way. More: 64 are what Hopper's wide products take, and one program fills a multiprocessor's shared memory.
    BLOCK_Q, BLOCK_S, stages, warps, programs = (16, 32, 3, 4, 2) if T * H <= 16 else (64, 64, 2, 8, 1)
    wide = BLOCK_Q == 64 and q_latent.is_cuda and tile_scale is None and R >= 128 and q_rope.shape[-1] == 64
    blocks = triton.cdiv(T * H, BLOCK_Q)
    if splits is None:
        splits = min(backend.multiprocessors(q_latent.device) * programs // (blocks * B), c_kv.shape[1] // 128)
        splits = max(splits, 1)
    out, positions = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device), positions.contiguous()
    parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device) if splits > 1 else out
    lse = torch.empty(splits, B, T, H, dtype=torch.float32, device=out.device)
    q_latent, q_rope, base2 = q_latent.contiguous(), q_rope.contiguous(), scale * math.log2(math.e)
    if wide:
        read = lambda x: GluonDescriptor(x, x.shape, x.stride(), [1, 64, x.shape[-1]], WIDE)
        wide_kernel[blocks, splits, B](q_latent, q_rope, read(c_kv), read(k_rope), positions, parts, lse, base2, T, H,
                                       splits, R, num_warps=warps)
    else:
        s_strides = (0, 0) if tile_scale is None else tile_scale.stride()[:2]
        decode_kernel[blocks, splits, B](q_latent, q_rope, c_kv, k_rope, positions, parts, lse, base2, T, H, splits,
                                         *c_kv.stride()[:2], *k_rope.stride()[:2], tile_scale, *s_strides, R=R,
                                         D_R=q_rope.shape[-1], TILES=tiles(R), BLOCK_Q=BLOCK_Q, BLOCK_S=BLOCK_S,
                                         STAGES=stages, num_warps=warps)
    if splits > 1:
        SPLITS = triton.next_power_of_2(splits)
        BLOCK_R = min(R, max(8192 // SPLITS, 16))
        merge_kernel[B * T * H, R // BLOCK_R](parts, lse, positions, out, T, H, splits, BLOCK_S, R, SPLITS, BLOCK_R)
    return out


def decode(q_latent, q_rope, latents, positions, scale):
    """Attention over the cache, see decode_torch, by the path that backend.latent_decode names."""
    path, _ = backend.latent_decode(q_latent.device, q_latent.dtype, q_latent.shape[-1], q_rope.shape[-1])
    wanted = torch.is_grad_enabled() and q_latent.requires_grad      # the kernels have no gradients
    run = decode_triton if path == "Triton" and not wanted else decode_torch
    return run(q_latent, q_rope, latents, positions, scale)


# --- the layer --------------------------------------------------------------------------------------------------------

class MLA(nn.Module):
    """The attention layer: x [B, T, D] -> [B, T, D], from a Config. Without a cache: naive, causal from position 0.
    With a LatentCache: after the tokens it holds, in the cheaper form."""

    def __init__(self, c):
        super().__init__()
        self.H, self.d_n, self.d_r, self.d_v = c.n_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.r_kv = c.kv_lora_rank
        self.scale = c.qk_head_dim ** -0.5 * yarn_mscale(c, c.mscale_all_dim) ** 2
        if c.q_lora_rank:
            self.wq_a = Linear(c.dim, c.q_lora_rank)                                          # W_dq
            self.q_norm = RMSNorm(c.q_lora_rank, c.norm_eps)
            self.wq_b = Linear(c.q_lora_rank, self.H * c.qk_head_dim)                         # W_uq and W_qr
        else:
            self.wq = Linear(c.dim, self.H * c.qk_head_dim)
        self.wkv_a = Linear(c.dim, self.r_kv + self.d_r)                                      # W_dkv and W_kr
        self.kv_norm = RMSNorm(self.r_kv, c.norm_eps)
        self.wkv_b = Linear(self.r_kv, self.H * (self.d_n + self.d_v))                        # W_uk and W_uv, per head
        self.wo = Linear(self.H * self.d_v, c.dim)

    def forward(self, x, rope, cache=None, layer=0, positions=None, starts=None, kept=None):
        """rope: rows of rope_table for these tokens, [T, d_r/2] or [B, T, d_r/2]. With a cache: its `layer` to write,
        and the `positions` [T] or [B, T] that it gave for these tokens. Without: `starts` of packed documents (see
        attention_torch), and a list `kept` where this runs under checkpoint (see Attention)."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if hasattr(self, "wq_a") else self.wq(x)
        q_nope, q_rope = split_rope(q, self.H, rope)                                          # [B, T, H, d_n], d_r
        c_kv, k_rope = split_rope(self.wkv_a(x), 1, rope)                                     # [B, T, 1, r_kv], d_r
        c_kv = self.kv_norm(c_kv.squeeze(-2))
        if cache is not None:
            latents = cache.write(layer, positions, torch.cat([c_kv, k_rope.squeeze(-2)], -1))     # [B, S, r_kv + d_r]
            T, S = x.shape[1], cache.longest + x.shape[1]
            if positions.ndim == 2 or S > T and not self.naive_is_cheaper(T, S):
                out = self.absorbed(q_nope, q_rope, latents, positions.expand(len(x), T))
                return self.wo(out.flatten(-2))
            if S > T:                                         # a later piece of a prompt: keys and values of all before
                if isinstance(latents, Fp8Latents):
                    latents = dequantize(latents, x.dtype)
                c_kv, k_rope = latents.unsqueeze(-2).split([self.r_kv, self.d_r], -1)
                c_kv = c_kv.squeeze(-2)
        k_nope, v = split(self.wkv_b(c_kv).unflatten(-1, (self.H, -1)), self.d_n)
        out = attention(q_nope, q_rope, k_nope, k_rope, v, self.scale, starts, kept)          # [B, T, H, d_v]
        return self.wo(out.flatten(-2))

    def naive_is_cheaper(self, queries, keys):
        """Which form multiplies less, per head: naive makes k_nope and v of every key, absorbed moves every query to
        latent space and its result back, and then works on wider vectors."""
        up, naive, absorbed = self.r_kv * (self.d_n + self.d_v), self.d_n + self.d_v, 2 * self.r_kv
        return keys * (up + queries * naive) < queries * (up + keys * absorbed)

    def absorbed(self, q_nope, q_rope, latents, positions):
        """W_uk moved onto the query, W_uv onto the output: [B, T, H, d_v]."""
        w_ukv = self.wkv_b.weight.to(q_nope.dtype).unflatten(0, (self.H, -1))                 # [H, d_n + d_v, r_kv]
        w_uk, w_uv = w_ukv.split([self.d_n, self.d_v], 1)
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, w_uk)
        out = decode(q_latent, q_rope, latents, positions, self.scale)                        # [B, T, H, r_kv]
        return torch.einsum("bthr,hvr->bthv", out, w_uv)
