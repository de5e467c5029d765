"""Latent attention (report 2.1.1): the equations, the two orders of multiplication, positions, and the cache."""
import math

import pytest
import torch
from conftest import YARN, agree, lively, tiny

import configs
from mla import MLA, RMSNorm, apply_rope, rope_table
from mla_attention import attention_torch
from mla_decode import LatentCache, decode_torch

VARIANTS = pytest.mark.parametrize("changes", [dict(), dict(q_lora_rank=14), dict(q_lora_rank=14, **YARN)],
                                   ids=["q direct", "q latent", "q latent, YaRN"])


def layer(c):
    mla = MLA(c)
    for p in mla.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return lively(mla).double()


def latents_of(mla, c, batch, capacity):
    return LatentCache(1, batch, capacity, c.kv_lora_rank + c.qk_rope_head_dim, dtype=torch.float64)


def feed(mla, c, x, sizes):
    """x [B, T, D] through a fresh cache, in pieces of the given sizes -> [B, T, D]."""
    cache, out = latents_of(mla, c, len(x), x.shape[1]), []
    for piece in x.split(sizes, 1):
        positions = cache.positions(piece.shape[1])
        out.append(mla(piece, rope_table(c)[positions], cache, 0, positions))
        cache.advance(piece.shape[1])
    return torch.cat(out, 1)


# --- the equations ----------------------------------------------------------------------------------------------------

def turn(x, position, c):
    """RoPE by hand on one vector [d_r]: pair (x0, x1) turns by position * theta^(-0/d), (x2, x3) by the next
    frequency."""
    out = x.clone()
    for j in range(0, len(x), 2):
        a = position * c.rope_theta ** (-j / len(x))
        out[j] = x[j] * math.cos(a) - x[j + 1] * math.sin(a)
        out[j + 1] = x[j] * math.sin(a) + x[j + 1] * math.cos(a)
    return out


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


@pytest.mark.parametrize("r_q", [0, 14])
def test_the_layer_is_equations_1_to_11_written_out(r_q):
    c = tiny(q_lora_rank=r_q)
    mla, T = layer(c), 6
    x = torch.randn(T, c.dim, dtype=torch.float64)
    d_n, d_r, d_v, H = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.n_heads
    q_nope, q_rope, k_nope, k_rope, v = [], [], [], [], []
    for t in range(T):
        q = mla.wq_b.weight @ rms(mla.wq_a.weight @ x[t], mla.q_norm.weight, c.norm_eps) if r_q \
            else mla.wq.weight @ x[t]
        q = q.view(H, d_n + d_r)                                                        # eq 6-9
        q_nope.append(q[:, :d_n])
        q_rope.append(torch.stack([turn(q[h, d_n:], t, c) for h in range(H)]))
        down = mla.wkv_a.weight @ x[t]
        c_kv = rms(down[:c.kv_lora_rank], mla.kv_norm.weight, c.norm_eps)               # eq 1
        k_rope.append(turn(down[c.kv_lora_rank:], t, c))                                # eq 3: one for all heads
        up = (mla.wkv_b.weight @ c_kv).view(H, d_n + d_v)                               # eq 2, 5
        k_nope.append(up[:, :d_n])
        v.append(up[:, d_n:])
    for t in range(T):
        o = []
        for h in range(H):                                                              # eq 10
            scores = torch.stack([q_nope[t][h] @ k_nope[j][h] + q_rope[t][h] @ k_rope[j] for j in range(t + 1)])
            weights = (scores / math.sqrt(d_n + d_r)).softmax(0)
            o.append(sum(w * v[j][h] for j, w in enumerate(weights)))
        agree(mla(x[None], rope_table(c)[:T])[0, t], mla.wo.weight @ torch.cat(o), 1e-6, f"token {t}")    # eq 11


def test_rmsnorm_computes_in_float32_whatever_comes_in():
    norm, x = RMSNorm(33, 1e-6), torch.randn(4, 33).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    high = x.float()
    expected = high / (high.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert torch.equal(norm(x), expected.bfloat16())
    assert norm(x * 1e-9).float().abs().max() < 1e-4                       # epsilon keeps a zero vector near zero


# --- positions --------------------------------------------------------------------------------------------------------

def test_rope_turns_interleaved_pairs():
    c = tiny()
    x = torch.randn(1, 7, 2, c.qk_rope_head_dim, dtype=torch.float64)
    expected = torch.stack([torch.stack([turn(x[0, t, h], t, c) for h in range(2)]) for t in range(7)])[None]
    agree(apply_rope(x, rope_table(c)[:7]), expected, 1e-6)


def test_only_the_distance_between_two_positions_matters():
    c = tiny(max_seq_len=64, original_seq_len=64)
    q, k = torch.randn(2, 1, 1, 1, c.qk_rope_head_dim, dtype=torch.float64)
    rope = rope_table(c)
    score = lambda i, j: (apply_rope(q, rope[i:i + 1]) * apply_rope(k, rope[j:j + 1])).sum()
    agree(torch.stack([score(5 + s, 2 + s) for s in range(50)]), score(3, 0).expand(50), 1e-6,
          least=(q.norm() * k.norm()).item())
    assert (score(6, 2) - score(5, 2)).abs() > 1e-3


def test_each_row_of_a_batch_may_have_its_own_positions():
    c = tiny()
    x, rope = torch.randn(2, 3, 1, c.qk_rope_head_dim), rope_table(c)
    both = apply_rope(x, rope[torch.tensor([[0, 1, 2], [7, 8, 9]])])
    agree(both[0], apply_rope(x[:1], rope[:3])[0], 1e-6)
    agree(both[1], apply_rope(x[1:], rope[7:10])[0], 1e-6)


def test_yarn_is_off_while_the_context_is_the_original_one():
    plain, same = tiny(seq_len=16), tiny(**{**YARN, "max_seq_len": 16})
    assert torch.equal(rope_table(plain), rope_table(same))
    assert MLA(same).scale == MLA(plain).scale == 34 ** -0.5
    assert MLA(tiny(**YARN)).scale != MLA(plain).scale
    assert not torch.allclose(rope_table(tiny(**YARN))[:16], rope_table(plain))


def yarn_by_hand(d, base, original, factor, fast, slow):
    """Frequencies as YaRN's paper words them: a pair that turns often over the original length keeps its frequency, one
    that turns less than once is slowed by `factor`; in between, linear in the pair's number between two rounded
    ends."""
    ends = []
    for turns, rounded in ((fast, math.floor), (slow, math.ceil)):
        pair = d / 2 * math.log(original / (2 * math.pi * turns)) / math.log(base)   # solve original * f / 2 pi = turns
        ends.append(rounded(pair))
    low, high = max(ends[0], 0), min(ends[1], d - 1)
    out = []
    for i in range(d // 2):
        f = base ** (-2 * i / d)
        stretched = min(max((i - low) / (high - low), 0), 1)
        out.append((1 - stretched) * f + stretched * f / factor)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("d, original, context, factor", [(64, 4096, 163840, 40), (10, 16, 64, 4), (32, 256, 1024, 8)])
def test_the_yarn_table_equals_an_independent_formula(d, original, context, factor):
    c = tiny(qk_rope_head_dim=d, original_seq_len=original, max_seq_len=context, rope_factor=float(factor))
    table = rope_table(c)
    frequencies = yarn_by_hand(d, c.rope_theta, original, factor, c.beta_fast, c.beta_slow)
    assert table.shape == (context, d // 2)
    for position in (1, 2, original + 3, context - 1):
        agree(torch.view_as_real(table[position]),
              torch.stack([(position * frequencies).cos(), (position * frequencies).sin()], -1).float(), 1e-6,
              f"at {position}")


def test_yarn_at_v3s_own_numbers_keeps_the_fast_pairs_and_slows_the_slow_ones_forty_times():
    c = tiny(qk_rope_head_dim=64, original_seq_len=4096, max_seq_len=163840)
    plain = torch.pow(10000.0, -torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ratio = rope_table(c)[1].to(torch.complex128).angle() / plain
    agree(ratio[:11], torch.ones(11, dtype=torch.float64), 1e-6, "more than 32 turns in 4096 tokens")
    agree(ratio[23:], torch.full((9,), 1 / 40, dtype=torch.float64), 1e-3, "less than one turn")
    assert (ratio.diff() < 1e-3).all()


def test_yarn_multiplies_the_softmax_scale_by_mscale_squared():
    c = tiny(**YARN, rope_factor=40.0)
    m = 0.1 * math.log(40) + 1
    assert math.isclose(MLA(c).scale, m * m / math.sqrt(34))
    assert math.isclose(MLA(tiny(**YARN, mscale_all_dim=0.0)).scale, 1 / math.sqrt(34))


def test_yarn_multiplies_cos_and_sin_by_the_ratio_of_the_two_mscales():
    m = lambda k: 0.1 * k * math.log(40) + 1
    assert torch.allclose(rope_table(tiny(**YARN)).abs(), torch.ones(()))                                 # 1 in V3
    assert torch.allclose(rope_table(tiny(**YARN, mscale=0.7, mscale_all_dim=0.3)).abs(), torch.tensor(m(.7) / m(.3)))


# --- naive and absorbed -----------------------------------------------------------------------------------------------

@VARIANTS
def test_absorbed_attention_equals_naive_attention(changes):
    c = tiny(**changes)
    mla, T = layer(c), 15
    x = torch.randn(2, T, c.dim, dtype=torch.float64)
    naive = mla(x, rope_table(c)[:T])
    agree(feed(mla, c, x, [1] * T), naive, 1e-10, "token by token")
    agree(feed(mla, c, x, [5, 1, 9]), naive, 1e-10, "in chunks")


def test_absorption_is_an_identity_of_the_formulas_themselves():
    B, T, H, d_n, d_r, d_v, r_kv = 2, 9, 3, 7, 4, 5, 6
    rand = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    q_nope, q_rope, c_kv, k_rope = rand(B, T, H, d_n), rand(B, T, H, d_r), rand(B, T, r_kv), rand(B, T, d_r)
    w_uk, w_uv = rand(H, d_n, r_kv), rand(H, d_v, r_kv)
    naive = attention_torch(q_nope, q_rope, torch.einsum("hnr,btr->bthn", w_uk, c_kv), k_rope.unsqueeze(2),
                            torch.einsum("hvr,btr->bthv", w_uv, c_kv), 0.3)
    latent = decode_torch(torch.einsum("bthn,hnr->bthr", q_nope, w_uk), q_rope, torch.cat([c_kv, k_rope], -1),
                                torch.arange(T).expand(B, T), 0.3)
    agree(torch.einsum("bthr,hvr->bthv", latent, w_uv), naive, 1e-10)


@pytest.mark.parametrize("cached", [False, True], ids=["naive", "absorbed"])
def test_a_later_token_never_moves_an_earlier_output(cached):
    c = tiny()
    mla, T = layer(c), 8
    x = torch.randn(1, T, c.dim, dtype=torch.float64)
    run = (lambda x: feed(mla, c, x, [1, T - 1])) if cached else (lambda x: mla(x, rope_table(c)[:T]))
    before = run(x)
    for p in range(1, T):
        changed = x.clone()
        changed[:, p] += 1
        after = run(changed)
        assert torch.equal(after[:, :p], before[:, :p])
        assert (after[:, p:] != before[:, p:]).any(-1).all()


# --- the cache --------------------------------------------------------------------------------------------------------

def test_the_cache_holds_the_normed_latent_and_one_turned_key_and_nothing_else():
    c = tiny()
    mla = layer(c)
    x = torch.randn(1, 3, c.dim, dtype=torch.float64)
    cache = latents_of(mla, c, 1, 4)
    positions = cache.positions(3)
    mla(x, rope_table(c)[positions], cache, 0, positions)
    cache.advance(3)
    down = x @ mla.wkv_a.weight.T
    c_kv, k_rope = down.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    expected = torch.cat([mla.kv_norm(c_kv), torch.stack([turn(k_rope[0, t], t, c) for t in range(3)])[None]], -1)
    agree(cache.latents[0, :, :3], expected, 1e-6)
    assert cache.latents.numel() == 4 * (16 + 10) and cache.lengths.tolist() == [3]


def test_a_full_cache_refuses_more_names_its_capacity_and_keeps_what_it_has():
    cache = LatentCache(1, 2, 7, 5)
    cache.write(0, cache.positions(6), torch.ones(2, 6, 5))
    cache.advance(torch.tensor([6, 2]))
    with pytest.raises(ValueError, match="7 tokens is full: 6 are held and 2 more"):
        cache.positions(2)
    assert cache.lengths.tolist() == [6, 2] and cache.positions(1).tolist() == [[6], [2]]


def test_a_padded_row_overwrites_its_padding():
    cache = LatentCache(1, 2, 4, 3)
    cache.write(0, cache.positions(3), torch.ones(2, 3, 3))
    cache.advance(torch.tensor([3, 1]))                                                   # row 1: two tokens of padding
    seen = cache.write(0, cache.positions(1), torch.full((2, 1, 3), 2.0))
    assert seen[:, :, 0].tolist() == [[1, 1, 1, 2], [1, 2, 1, 0]]


def test_the_host_knows_the_lengths_unless_the_cache_is_static():
    cache = LatentCache(1, 2, 5, 3)
    assert cache.positions(2).tolist() == [0, 1] and cache.even                         # the same for all rows
    cache.advance(torch.tensor([2, 2]))
    assert cache.even and cache.longest == 2
    cache.advance(torch.tensor([0, 1]))
    assert not cache.even and cache.longest == 3 and cache.positions(1).tolist() == [[2], [3]]
    cache.static = True
    cache.advance(torch.tensor([1, 2]))
    assert cache.positions(1).tolist() == [[3], [5]] and cache.longest == 3             # from the lengths alone
    cache.advance(-1)
    seen = cache.write(0, cache.positions(1), torch.ones(2, 1, 3))
    assert seen[:, :, 0].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]                 # the whole buffer


def test_bytes_per_token_is_the_arithmetic_of_the_report():
    assert LatentCache(61, 1, 2, 512 + 64, dtype=torch.bfloat16).bytes_per_token == 70_272
    small = LatentCache(3, 5, 11, 26)
    assert small.bytes_per_token == 3 * 26 * 4 == small.latents.nbytes / (5 * 11)


def test_multi_head_attention_would_cache_57_times_as_much():
    ordinary = 61 * 128 * (128 + 128) * 2                                    # every head's key and value, in BF16
    assert round(ordinary / LatentCache(61, 1, 1, 576, dtype=torch.bfloat16).bytes_per_token) == 57


# --- prompts in pieces ------------------------------------------------------------------------------------------------

def test_the_last_queries_over_all_keys_are_the_tail_of_the_whole():
    B, S, H, d_n, d_r, d_v = 2, 9, 3, 24, 10, 20
    shapes = (B, S, H, d_n), (B, S, H, d_r), (B, S, H, d_n), (B, S, 1, d_r), (B, S, H, d_v)
    q_nope, q_rope, k_nope, k_rope, v = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    whole = attention_torch(q_nope, q_rope, k_nope, k_rope, v, 0.2)
    for T in (1, 4, 8):
        agree(attention_torch(q_nope[:, -T:], q_rope[:, -T:], k_nope, k_rope, v, 0.2), whole[:, -T:], 1e-12)


def test_a_later_piece_of_a_prompt_is_naive_where_it_has_many_queries_and_absorbed_where_it_has_few():
    with torch.device("meta"):
        mla = MLA(configs.load(["v3_671b"]))
    # Per head a key costs 512 * 256 products to unpack, and 1024 - 256 fewer for each query that then reads it.
    assert [mla.naive_is_cheaper(T, T + 4096) for T in (1, 128, 164, 165, 512)] == [False] * 3 + [True] * 2
    assert not mla.naive_is_cheaper(1, 2) and mla.naive_is_cheaper(512, 100_000)
