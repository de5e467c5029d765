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
Simplified against V3: nothing in the mathematics. The attention itself is torch's scaled_dot_product_attention.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from fp8 import Linear


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


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; computed in float32 or better, returned in x's dtype."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        high = torch.promote_types(x.dtype, torch.float32)
        if not torch.is_grad_enabled():                        # one operation where nobody wants a gradient
            return F.rms_norm(x.to(high), self.weight.shape, self.weight.to(high), self.eps).to(x.dtype)
        return Normalize.apply(x.to(high), self.weight.to(high), self.eps).to(x.dtype)


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


# --- the cache --------------------------------------------------------------------------------------------------------

class LatentCache:
    """What attention remembers of each token: [c_kv ; k_rope], r_kv + d_r numbers per layer (eq 1-3), for B sequences
    of different lengths.

    The buffer is allocated once for `capacity` tokens a row, so a new token costs the write of its own latents and
    never a copy of the old ones. `lengths` [B] counts the tokens each row has kept; what lies beyond it is overwritten
    later. That makes forgetting cheap: the tokens that a forward pass wrote and `advance` did not count are gone, and
    advancing by a negative count takes back more. Raises ValueError when a row would grow past the capacity.

    The host keeps two numbers about the lengths, so that no layer waits for the device: how long the longest row is,
    and whether all are equally long. A CUDA graph is replayed without the host: once `static` is set, positions come
    from the device's lengths alone, attention is given the whole buffer, and the capacity is no longer checked.
    """

    def __init__(self, layers, batch, capacity, width, device=None, dtype=torch.float32):
        self.latents = torch.zeros(layers, batch, capacity, width, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity, self.longest, self.even, self.static = capacity, 0, True, False

    @property
    def bytes_per_token(self):
        layers, _, _, width = self.latents.shape
        return layers * width * self.latents.element_size()

    def positions(self, tokens):
        """Positions of the next `tokens` tokens of every row: [T] where all rows are equally long, else [B, T]."""
        if not self.static and self.longest + tokens > self.capacity:
            raise ValueError(f"latent cache of {self.capacity} tokens is full: {self.longest} are held and {tokens} "
                             f"more were given; ask for a larger capacity or a shorter prompt")
        if self.even and not self.static:
            return torch.arange(self.longest, self.longest + tokens, device=self.lengths.device)
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def write(self, layer, positions, latent):
        """Put latent [B, T, r_kv + d_r] at `positions` [T] or [B, T]; returns the latents up to the longest row's last
        [B, S, r_kv + d_r]; what is beyond a row's own positions is not of its text."""
        latents, end = self.latents[layer], self.longest + latent.shape[1]
        if positions.ndim == 1:
            latents[:, self.longest:end] = latent
        else:
            latents[torch.arange(len(latent), device=latent.device)[:, None], positions] = latent
        return latents if self.static else latents[:, :end]

    def advance(self, counts):
        """Keep the first counts[b] of the tokens just written to row b: int, or int64 [B] where rows differ (the host
        then reads the lengths, unless static)."""
        self.lengths += counts
        if torch.is_tensor(counts) and not self.static:
            lengths = self.lengths.tolist()
            self.longest, self.even = max(lengths), min(lengths) == max(lengths)
        elif not self.static:
            self.longest += counts


# --- attention --------------------------------------------------------------------------------------------------------

def attention_naive(q_nope, q_rope, k_nope, k_rope, v, scale):
    """Causal attention with keys and values made for every head (eq 10); the queries are the last T of S tokens.

    q_nope [B, T, H, d_n]; q_rope [B, T, H, d_r]; k_nope [B, S, H, d_n]; k_rope [B, S, 1, d_r]; v [B, S, H, d_v]
    -> [B, T, H, d_v]
    """
    T, S = q_nope.shape[1], k_nope.shape[1]
    q = torch.cat([q_nope, q_rope], -1)                                                       # [B, T, H, d_n + d_r]
    k = torch.cat([k_nope, k_rope.expand(-1, -1, q.shape[2], -1)], -1)                        # [B, S, H, d_n + d_r]
    past = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=past,
                                         is_causal=past is None, scale=scale)                 # [B, H, T, d_v]
    return out.transpose(1, 2)


def attention_absorbed(q_latent, q_rope, latents, positions, scale):
    """Attention over the cache itself: one key of r_kv + d_r dims for all heads; its first r_kv dims are the value.

    q_latent [B, T, H, r_kv]; q_rope [B, T, H, d_r]; latents [B, S, r_kv + d_r]; positions [B, T] of the queries: query
    t of row b sees keys 0..positions[b, t]. Softmax in float32 or better. -> [B, T, H, r_kv]
    """
    r_kv = q_latent.shape[-1]
    scores = torch.einsum("bthr,bsr->bths", torch.cat([q_latent, q_rope], -1), latents) * scale
    future = torch.arange(latents.shape[1], device=latents.device) > positions[..., None, None]        # [B, T, 1, S]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(future, -math.inf)
    return torch.einsum("bths,bsr->bthr", scores.softmax(-1).to(latents.dtype), latents[..., :r_kv])


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

    def forward(self, x, rope, cache=None, layer=0, positions=None):
        """rope: rows of rope_table for these tokens, [T, d_r/2] or [B, T, d_r/2]. With a cache: its `layer` to write,
        and the `positions` [T] or [B, T] that it gave for these tokens."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if hasattr(self, "wq_a") else self.wq(x)
        q_nope, q_rope = q.unflatten(-1, (self.H, -1)).split([self.d_n, self.d_r], -1)        # [B, T, H, d_n], d_r
        q_rope = apply_rope(q_rope, rope)
        c_kv, k_rope = self.wkv_a(x).split([self.r_kv, self.d_r], -1)                         # [B, T, r_kv], d_r
        c_kv = self.kv_norm(c_kv)
        k_rope = apply_rope(k_rope.unsqueeze(-2), rope)                                       # [B, T, 1, d_r]
        if cache is not None:
            latents = cache.write(layer, positions, torch.cat([c_kv, k_rope.squeeze(-2)], -1))     # [B, S, r_kv + d_r]
            T, S = x.shape[1], latents.shape[1]
            if positions.ndim == 2 or S > T and not self.naive_is_cheaper(T, S):
                out = self.absorbed(q_nope, q_rope, latents, positions.expand(len(x), T))
                return self.wo(out.flatten(-2))
            if S > T:                                         # a later piece of a prompt: keys and values of all before
                c_kv, k_rope = latents.unsqueeze(-2).split([self.r_kv, self.d_r], -1)
                c_kv = c_kv.squeeze(-2)
        k_nope, v = self.wkv_b(c_kv).unflatten(-1, (self.H, -1)).split([self.d_n, self.d_v], -1)
        return self.wo(attention_naive(q_nope, q_rope, k_nope, k_rope, v, self.scale).flatten(-2))

    def naive_is_cheaper(self, queries, keys):
        """Which form multiplies less, per head: naive makes k_nope and v of every key, absorbed moves every query to
        latent space and its result back, and then works on wider vectors."""
        up, naive, absorbed = self.r_kv * (self.d_n + self.d_v), self.d_n + self.d_r + self.d_v, 2 * self.r_kv + self.d_r
        return keys * (up + queries * naive) < queries * (up + keys * absorbed)

    def absorbed(self, q_nope, q_rope, latents, positions):
        """W_uk moved onto the query, W_uv onto the output: [B, T, H, d_v]."""
        w_ukv = self.wkv_b.weight.to(q_nope.dtype).unflatten(0, (self.H, -1))                 # [H, d_n + d_v, r_kv]
        w_uk, w_uv = w_ukv.split([self.d_n, self.d_v], 1)
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, w_uk)
        out = attention_absorbed(q_latent, q_rope, latents, positions, self.scale)            # [B, T, H, r_kv]
        return torch.einsum("bthr,hvr->bthv", out, w_uv)
