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
Training's attention is mla_attention.py's, the cache and attention over it are mla_decode.py's.
Simplified against V3: nothing in the mathematics.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import backend
from fp8 import Linear
from mla_attention import attention
from mla_decode import Fp8Latents, LatentCache, decode, dequantize  # noqa: F401  (LatentCache is MLA's interface)

if backend.has_triton():                                       # macOS, Windows: the torch forms are all there is
    import triton
    import triton.language as tl


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
