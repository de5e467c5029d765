"""The latent cache, and attention over it: how MLA generates (equations 1-3, and 10 in the absorbed order).

Of each token and layer the cache keeps c_kv and k_rope, r_kv + d_r numbers for all heads together. Attention runs over
them as they lie: one tile of the cache is the keys of every head and, but for its last d_r dims, their values too.

Shapes: B batch, T new tokens, S cached tokens, H heads, r_kv latent rank, d_r rope dims.
"""
import math
from typing import NamedTuple

import torch

import backend
from mla_attention import readable

if backend.has_triton():
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from mla_attention import WIDE, barriers, tma_load, warps_meet


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
