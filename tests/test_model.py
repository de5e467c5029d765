"""The whole V3: loss, load, multi-token prediction, decoding, initialization, sizes, and folders under the official
names."""
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GROUPS, YARN, agree, build, gradients, lively, random_tokens, tiny
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from configs import Config, UserError, load
from model import (
    V3,
    CrossEntropy,
    arithmetic,
    balanced,
    config_from_hf,
    from_hf,
    official_tensors,
    save_hf,
    shared,
    stages,
    target_totals,
)

# --- cross-entropy without the logits ---------------------------------------------------------------------------------

@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(CrossEntropy, "ROWS", 8)


def cross_entropy_case(N, ignored, h=None):
    torch.manual_seed(N)
    h = torch.randn(N, 6, dtype=torch.float64) if h is None else h
    weight, targets = torch.randn(23, 6, dtype=torch.float64), torch.randint(23, (N,))
    targets[torch.rand(N) < ignored] = -1
    out = []
    for function in (CrossEntropy.apply, lambda h, w, t: F.cross_entropy(h @ w.T, t, ignore_index=-1, reduction="sum")):
        a, b = h.detach().requires_grad_(), weight.clone().requires_grad_()
        loss = function(a, b, targets)
        (0.37 * loss).backward()                                                   # as the training loss scales it
        out.append((loss, a.grad, b.grad))
    for what, ours, theirs in zip(("value", "gradient of h", "gradient of the head"), *out):
        agree(ours, theirs, 1e-12, what, least=1e-3)


@pytest.mark.parametrize("N", [1, 7, 8, 9, 16, 19])
@pytest.mark.parametrize("ignored", [0, 0.4, 1], ids=["all targets", "some ignored", "all ignored"])
def test_chunked_cross_entropy_equals_torchs_on_the_full_logits(small_chunks, N, ignored):
    cross_entropy_case(N, ignored)


def test_chunked_cross_entropy_takes_states_that_are_a_view(small_chunks):
    torch.manual_seed(0)
    cross_entropy_case(19, 0, torch.randn(19, 12, dtype=torch.float64)[:, 3:9])
    cross_entropy_case(19, 0, torch.randn(6, 19, dtype=torch.float64).T)
    cross_entropy_case(19, 0, torch.randn(25, 6, dtype=torch.float64)[5:24])


class Largest(TorchDispatchMode):
    """Remembers the numel of the largest tensor that any operation returned."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if torch.is_tensor(t))])
        return out


def test_the_training_logits_never_exist_whole(small_chunks):
    v3, tokens = V3(tiny(vocab_size=3000)), random_tokens(4, 34, vocab=3000)
    whole = 4 * 32 * 3000
    with Largest() as training:
        v3.loss(tokens)[0].backward()
    with Largest() as sampling:
        v3(tokens[:, :32])
    print(f"largest tensor: {training.numel:,} numbers in training, {sampling.numel:,} where the logits are asked for")
    assert training.numel <= 3000 * 32 < whole == sampling.numel                        # the head itself is the largest


def test_no_gradient_is_computed_where_none_is_wanted(small_chunks, monkeypatch):
    v3, tokens = V3(tiny(vocab_size=3000)).eval(), random_tokens(4, 34, vocab=3000)
    made = []
    monkeypatch.setattr(torch, "zeros_like",
                        lambda t, *a, real=torch.zeros_like, **k: made.append(t.shape) or real(t, *a, **k))
    with torch.no_grad():
        v3.loss(tokens)
    assert torch.Size([3000, 32]) not in made                     # no room for the head's gradient: evaluation is cheap


# --- the loss ---------------------------------------------------------------------------------------------------------

def test_the_loss_is_the_main_models_plus_lambda_times_the_mean_mtp_plus_alpha_times_balance():
    v3 = build(n_mtp=2, mtp_weight=0.3, balance_alpha=0.01)
    T, tokens = 9, random_tokens(3, 12)
    total, parts = v3.loss(tokens)
    h, routings = v3.hidden(tokens[:, :T])
    drafts = v3.draft(h, tokens)
    ce = lambda h, k: F.cross_entropy(v3.logits(h).flatten(0, 1), tokens[:, k + 1:T + k + 1].flatten())
    main, mtp = ce(h, 0), (ce(drafts[0][0], 1) + ce(drafts[1][0], 2)) / 2           # depth k predicts t_{i+k+1} (eq 24)
    balance = 0.01 * sum(r.balance for r in [*routings, *(r for _, r in drafts)]) / 3
    assert len(routings) == 2 and balance > 0.03                                 # 4 gates, each at least 1 per sequence
    agree(total, main + 0.3 * mtp + balance, 1e-12, "total")
    for name, value in (("loss", main), ("mtp_loss", mtp), ("balance_loss", balance)):
        agree(parts[name], value, 1e-12, name)
    agree(v3.loss(tokens, mtp_weight=0.1)[0], main + 0.1 * mtp + balance, 1e-12, "another lambda")


def test_an_untrained_models_loss_is_ln_vocab():
    v3 = V3(tiny(init_std=0.006))
    _, parts = v3.loss(random_tokens(4, 34))
    assert parts["loss"].item() == pytest.approx(math.log(61), rel=1e-3)
    assert parts["mtp_loss"].item() == pytest.approx(math.log(61), rel=1e-3)


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masks of different counts"])
@pytest.mark.parametrize("changes", [dict(n_mtp=0), dict(n_mtp=2, q_lora_rank=14, balance_alpha=0.05)],
                         ids=["no MTP", "two depths"])
def test_losses_and_gradients_of_micro_batches_add_up_to_those_of_the_whole_batch(changes, masked):
    v3, n_mtp = build(**changes), changes["n_mtp"]
    tokens = random_tokens(4, 9 + n_mtp)
    chance = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2))
    valid = chance < torch.tensor([[.9], [.1], [.5], [.3]])
    valid = valid if masked else None
    loss, parts = v3.loss(tokens, valid)
    loss.backward()
    whole = gradients(v3)
    totals = target_totals(tokens if valid is None else tokens.masked_fill(~valid, -1), n_mtp)
    shares = []
    for rows in (slice(0, 1), slice(1, 4)):
        share, its_parts = v3.loss(tokens[rows], None if valid is None else valid[rows], totals)
        share.backward()
        shares.append({"loss": share.detach(), **{f"part {k}": p for k, p in its_parts.items()}})
    for name, value in {"loss": loss, **{f"part {k}": p for k, p in parts.items()}}.items():
        agree(sum(s[name] for s in shares), value, 1e-12, name)
    for name, gradient in gradients(v3).items():
        agree(gradient, whole[name], 1e-12, name, least=1e-3)


def test_a_masked_token_is_no_target_but_still_an_input():
    v3, tokens = build(), random_tokens(1, 10)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[0, 4] = False
    other = tokens.clone()
    other[0, 4] = (other[0, 4] + 1) % 61
    h = v3.hidden(tokens[:, :8])[0]
    each = F.cross_entropy(v3.logits(h)[0], tokens[0, 1:9], reduction="none")
    agree(v3.loss(tokens, valid)[1]["loss"], (each.sum() - each[3]) / 7, 1e-12)
    assert (v3.loss(other, valid)[1]["loss"] - v3.loss(tokens, valid)[1]["loss"]).abs() > 1e-4


def test_a_batch_without_a_single_target_has_loss_zero_and_no_nan():
    v3, tokens = build(balance_alpha=0.0), random_tokens(2, 10)
    loss, _ = v3.loss(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and all(g.eq(0).all() for g in gradients(v3).values())


def test_bf16_activations_train_towards_the_same_loss_with_float32_weights_and_gradients():
    low, high = lively(V3(tiny(precision="bf16"))), lively(V3(tiny()))
    tokens = random_tokens(2, 18)
    loss, _ = low.loss(tokens)
    loss.backward()
    assert low(tokens).dtype == loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in low.parameters())
    agree(loss, high.loss(tokens)[0], 0.02, "loss")


def test_a_bf16_head_rounds_the_training_loss_alone(monkeypatch):
    monkeypatch.setattr(model.backend, "fast_bf16", lambda device: True)
    low, high = lively(V3(tiny(bf16_head=True))), lively(V3(tiny()))
    tokens = random_tokens(4, 18)
    losses = [v3.loss(tokens)[0] for v3 in (low, high)]
    for loss in losses:
        loss.backward()
    assert losses[0] != losses[1]
    agree(*losses, 0.01, "loss")
    for ours, theirs in zip(gradients(low).values(), gradients(high).values()):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() <= 0.05 * theirs.norm()
    with torch.no_grad():
        assert low.loss(tokens)[0] == high.loss(tokens)[0] and low(tokens).equal(high(tokens))


# --- load and bias, in the model --------------------------------------------------------------------------------------

def counts(v3):
    out = [g.load.clone() for g in v3.gates()]
    for g in v3.gates():
        g.load.zero_()
    return out


def test_the_load_of_all_micro_batches_is_the_load_of_the_whole_batch():
    v3, tokens = build(), random_tokens(4, 10)
    v3.loss(tokens)
    whole = counts(v3)
    for row in tokens.split(1):
        v3.loss(row)
    assert [a.tolist() for a in counts(v3)] == [a.tolist() for a in whole]
    assert [a.sum() for a in whole] == [4 * 8 * 2] * 3                                 # two layers and the MTP module's


def test_recomputation_counts_no_token_twice_and_gives_the_same_gradients():
    tokens, out = random_tokens(2, 10), []
    for changes in ({}, {"recompute": True}, {"recompute_mla": True}):
        v3 = build(**changes, q_lora_rank=14, balance_alpha=0.01)
        loss, _ = v3.loss(tokens)
        loss.backward()
        out.append(([a.tolist() for a in counts(v3)], loss, gradients(v3)))
    load, loss, expected = out[0]
    for other in out[1:]:
        assert other[0] == load and torch.equal(other[1], loss)
        assert all(torch.equal(g, other[2][name]) for name, g in expected.items())


def test_recomputing_mla_keeps_its_input_and_its_output_only():
    kept = {}
    for recompute in (False, True):
        v3, held = build(recompute_mla=recompute, q_lora_rank=14), []
        x = torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
        block, saved = v3.layers[0], lambda t: held.append(t) or t
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
            block.attention(x, v3.rope[:8])
        weights = {p.data_ptr() for p in v3.parameters()}
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        kept[recompute] = sum(n for at, n in own.items() if at not in weights)
    print(f"bytes kept: {kept}")
    norm = 8 * (2 * 8 * 32 + 2 * 8)                                    # what the norm before the FFN keeps: n and 1/rms
    assert kept[True] <= norm + x.nbytes < kept[False] / 2


def test_evaluation_counts_no_load_and_moves_no_bias():
    v3, tokens = build().eval(), random_tokens(2, 10)
    before = [g.bias.clone() for g in v3.gates()]
    v3.loss(tokens)
    v3(tokens)
    for g in v3.gates():
        g.update_bias(0.1)
    assert all(torch.equal(g.bias, b) for g, b in zip(v3.gates(), before))


def test_the_mtp_modules_gate_is_counted_and_balanced_too():
    v3 = build(n_mtp=2)
    v3.loss(random_tokens(4, 11))
    gates = [m.block.ffn.gate for m in v3.mtp]
    assert v3.gates()[-2:] == gates and len(v3.gates()) == 4
    for gate in gates:
        before, load = gate.bias.clone(), gate.load.clone()
        assert load.sum() == 4 * 8 * 2
        gate.update_bias(0.25)
        agree(gate.bias - before, 0.25 * torch.sign(8 - load).float(), 1e-6)             # mean load 64 / 8 experts


def test_each_gate_is_given_its_own_layers_load():
    v3, tokens = build(), random_tokens(2, 10)
    h, routings = v3.hidden(tokens[:, :8])
    routings += [r for _, r in v3.draft(h, tokens)]
    v3.loss(tokens)
    loads = [a.tolist() for a in counts(v3)]
    assert loads == [r.load.tolist() for r in routings] and loads[0] != loads[1] != loads[2]


def test_weight_decay_and_optimizers_never_see_a_gate_bias():
    v3 = build()
    assert not [name for name, _ in v3.named_parameters() if "bias" in name or "load" in name]
    assert [name for name in v3.state_dict() if name.endswith("gate.bias")] and not \
        [name for name in v3.state_dict() if name.endswith("load")]


# --- causality, and multi-token prediction ----------------------------------------------------------------------------

def test_a_later_token_never_moves_an_earlier_logit_nor_mtp_state():
    v3, T = build(n_mtp=2), 8
    tokens = random_tokens(1, T + 2)
    run = lambda tokens: (h := v3.hidden(tokens[:, :T])[0], *(s for s, _ in v3.draft(h, tokens)))
    before = run(tokens)
    for p in range(T + 2):
        changed = tokens.clone()
        changed[0, p] = (changed[0, p] + 7) % 61
        for k, (a, b) in enumerate(zip(before, run(changed))):
            first = max(p - k, 0)                          # h^k_i has read the tokens up to t_{i+k}, and no further
            agree(b[:, :first], a[:, :first], 1e-12, f"token {p}, depth {k}") if first else None
            assert ((a[:, first:] - b[:, first:]).abs().amax(-1) > 1e-9).all()


def test_mtp_reads_the_next_token_and_never_the_one_it_predicts():
    v3, T = build(), 6
    tokens = random_tokens(1, T + 2)
    h = v3.hidden(tokens[:, :T])[0]
    state = lambda tokens, i: v3.draft(h, tokens)[0][0][0, i]
    for i in range(T):
        target, read = tokens.clone(), tokens.clone()
        target[0, i + 2] = (target[0, i + 2] + 7) % 61
        read[0, i + 1] = (read[0, i + 1] + 7) % 61
        agree(state(target, i), state(tokens, i), 1e-12, f"state {i}")
        assert (state(read, i) - state(tokens, i)).abs().max() > 1e-6


def test_mtp_depth_k_is_equation_21_on_the_normed_state_of_the_depth_before():
    v3, T = build(n_mtp=2), 7
    tokens = random_tokens(2, T + 2)
    before = v3.hidden(tokens[:, :T])[0]
    for k, (state, _) in enumerate(v3.draft(before, tokens), 1):
        m, emb = v3.mtp[k - 1], v3.embed.weight[tokens[:, k:T + k]]
        rms = lambda x, norm: x / (x.pow(2).mean(-1, keepdim=True) + v3.config.norm_eps).sqrt() * norm.weight
        # the released eh_proj: the embedding's half first, then the hidden state's
        x = rms(emb, m.enorm) @ m.eh_proj.weight[:, :32].T + rms(before, m.hnorm) @ m.eh_proj.weight[:, 32:].T
        expected = rms(m.block(x, v3.rope[:T])[0], m.norm)
        agree(state, expected, 1e-12, f"depth {k}")
        before = expected


def test_mtp_shares_the_embedding_and_the_head_and_its_loss_trains_them():
    v3, tokens = build(balance_alpha=0.0), random_tokens(2, 10)
    assert [n for n, p in v3.named_parameters() if 61 in p.shape] == ["embed.weight", "head.weight"]
    grads = []
    for weight in (0.0, 1.0):
        v3.loss(tokens, mtp_weight=weight)[0].backward()
        grads.append(gradients(v3))
    for name in ("embed.weight", "head.weight", "layers.0.attn.wo.weight", "mtp.0.eh_proj.weight", "norm.weight"):
        assert (grads[1][name] - grads[0][name]).abs().max() > 1e-6, name
    v3.draft(v3.hidden(tokens[:, :8])[0].detach(), tokens)[0][0].sum().backward()
    assert gradients(v3)["embed.weight"].abs().max() > 1e-6                          # through Emb(t_{i+1}) itself


def test_without_mtp_there_is_no_mtp_loss():
    v3, tokens = build(n_mtp=0), random_tokens(2, 9)
    loss, parts = v3.loss(tokens)
    assert parts["mtp_loss"] == 0 and len(v3.mtp) == 0 and len(v3.gates()) == 2
    agree(loss, parts["loss"] + parts["balance_loss"], 1e-12)


def test_a_model_of_dense_layers_only_has_no_gates_and_trains():
    v3 = build(n_dense_layers=3)
    loss, parts = v3.loss(random_tokens(2, 10))
    loss.backward()
    assert v3.gates() == [] and parts["balance_loss"] == 0


def test_the_logits_are_the_head_on_the_normed_sum_of_embedding_attentions_and_ffns():
    v3, tokens = build(), random_tokens(2, 6)
    norm = lambda x, m: x / (x.pow(2).mean(-1, keepdim=True) + v3.config.norm_eps).sqrt() * m.weight
    x = v3.embed.weight[tokens]
    for i, block in enumerate(v3.layers):
        x = x + block.attn(norm(x, block.attn_norm), v3.rope[:6])
        y = block.ffn(norm(x, block.ffn_norm))
        x = x + (y if i < 1 else y[0])                                         # the first is dense, the others mixtures
    agree(v3(tokens), norm(x, v3.norm) @ v3.head.weight.T, 1e-12)


def test_a_block_is_its_four_parts():
    v3, tokens = build(), random_tokens(2, 6)
    x = v3.embedding(tokens)
    for block in v3.layers:                                                              # a dense one and two mixtures
        h, y = block.attention(x, v3.rope[:6])
        rows, sent = block.dispatch(y)
        here, rows = block.experts(y, rows, sent)
        expected = block(x, v3.rope[:6])[0]
        assert torch.equal(block.combine(h, here, rows, sent), expected)
        x = expected


# --- decoding through the latent cache --------------------------------------------------------------------------------

CACHED = pytest.mark.parametrize("changes", [dict(), dict(q_lora_rank=14, **YARN), GROUPS],
                                 ids=["plain", "YaRN", "groups"])


@CACHED
@pytest.mark.parametrize("sizes", [[1] * 30, [12, 1, 1, 7, 9], [30]], ids=["token by token", "in chunks", "at once"])
def test_decoding_through_the_cache_equals_the_full_forward(changes, sizes):
    v3, tokens = build(**changes), random_tokens(2, 30)
    cache, out = v3.cache(2, 30), []
    for piece in tokens.split(sizes, 1):
        out.append(v3(piece, cache))
        cache.advance(piece.shape[1])
    agree(torch.cat(out, 1), v3(tokens), 1e-10)


def test_rows_of_different_lengths_decode_as_if_each_were_alone():
    v3, lengths = build(), torch.tensor([3, 6, 1])
    rows = random_tokens(3, 12)
    alone = [v3(rows[b:b + 1])[0] for b in range(3)]
    cache = v3.cache(3, 11)
    logits = v3(rows[:, :6], cache)                                  # beyond a row's length: padding, any token will do
    cache.advance(lengths)
    for b, n in enumerate(lengths.tolist()):
        agree(logits[b, :n], alone[b][:n], 1e-10, f"prompt {b}")
    for step in range(5):
        at = lengths + step
        logits = v3(rows[torch.arange(3), at][:, None], cache)
        cache.advance(1)
        for b in range(3):
            agree(logits[b, 0], alone[b][at[b]], 1e-10, f"row {b}, position {at[b]}")
    with pytest.raises(ValueError, match="of 11 tokens is full"):
        v3(rows[:, :1], cache)


def test_rejected_draft_tokens_are_forgotten():
    v3, tokens = build(), random_tokens(1, 8)
    cache = v3.cache(1, 16)
    v3(tokens[:, :4], cache)
    cache.advance(4)
    v3(random_tokens(1, 3, seed=9), cache)                              # three drafted tokens, of which one is kept
    cache.advance(torch.tensor([1]))
    accepted = torch.cat([tokens[:, :4], random_tokens(1, 3, seed=9)[:, :1], tokens[:, 4:]], 1)
    agree(v3(tokens[:, 4:], cache), v3(accepted)[:, 5:], 1e-10)


@pytest.mark.parametrize("precision, size", [("fp32", 4), ("bf16", 2)])
def test_the_models_cache_takes_the_bytes_that_its_arithmetic_says(precision, size):
    c = tiny(precision=precision, n_dense_layers=3)                     # in BF16 a near tie may pick another expert
    v3 = V3(c)
    assert v3.cache(1, 8).bytes_per_token == 3 * (16 + 10) * size == arithmetic(c)["cache_bytes"] * size // 2
    cache = v3.cache(2, 8)
    with torch.no_grad():
        full = v3(random_tokens(2, 8))
        first = v3(random_tokens(2, 8)[:, :7], cache)
        cache.advance(7)
        last = v3(random_tokens(2, 8)[:, 7:], cache)
    assert cache.latents.dtype == v3.embedding(random_tokens(1, 1)).dtype
    agree(torch.cat([first, last], 1), full, 1e-5 if size == 4 else 0.05)


# --- precision of the module itself -----------------------------------------------------------------------------------

@pytest.mark.parametrize("cast", [lambda m: m.double(), lambda m: m.to(torch.float64)], ids=["double()", "to(float64)"])
def test_a_float64_model_gives_the_float32_models_logits(cast):
    v3, tokens = lively(V3(tiny())), random_tokens(2, 12)
    low = v3(tokens)
    high = cast(v3)(tokens)
    assert high.dtype == torch.float64
    agree(low.double(), high, 1e-5)


def test_a_bf16_model_keeps_float32_gate_biases():
    v3 = lively(V3(tiny())).to(torch.bfloat16)                       # a step of 0.001 would vanish beside a bias of 0.5
    assert v3.head.weight.dtype == torch.bfloat16 and v3.rope.is_complex()
    assert {g.bias.dtype for g in v3.gates()} == {torch.float32}


# --- initialization ---------------------------------------------------------------------------------------------------

def test_a_tensor_has_the_same_initial_values_whatever_else_the_model_holds():
    small, large = (official_tensors(V3(tiny(n_layers=n, n_mtp=0, n_routed_experts=e))) for n, e in ((2, 8), (4, 16)))
    same = [name for name in small if "mlp.gate" not in name]
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in same
    assert all(torch.equal(small[name], large[name]) for name in same)


def test_initial_weights_are_normal_with_the_configs_deviation_and_all_different():
    v3 = V3(tiny(dim=128, vocab_size=200, init_std=0.006))
    tensors = official_tensors(v3)
    for name, t in tensors.items():
        if t.ndim == 2:
            assert t.std().item() == pytest.approx(0.006, rel=4 / t.numel() ** 0.5), name
            assert abs(t.mean().item()) < 4 * 0.006 / t.numel() ** 0.5, name
        else:
            assert t.eq(0 if name.endswith("_bias") else 1).all(), name
    firsts = [t.flatten()[:4].tolist() for t in tensors.values() if t.ndim == 2]
    assert len({tuple(f) for f in firsts}) == len(firsts)
    other = official_tensors(V3(tiny(dim=128, vocab_size=200, init_std=0.006, seed=1)))
    assert not torch.equal(other["lm_head.weight"], tensors["lm_head.weight"])


# --- sizes ------------------------------------------------------------------------------------------------------------

def v3_671b():
    path = Path(model.__file__).with_name("configs") / "v3_671b.py"
    if path.is_file():
        return load([str(path)])
    return Config(vocab_size=129280, dim=7168, n_layers=61, n_dense_layers=3, inter_dim=18432, moe_inter_dim=2048,
                  n_heads=128,
                  q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                  n_routed_experts=256, n_shared_experts=1, n_activated_experts=8, n_expert_groups=8,
                  n_limited_groups=4,
                  route_scale=2.5, init_std=0.006, seq_len=4096)


def test_v3_has_671_billion_parameters_of_which_37_work_on_a_token():
    sizes = arithmetic(v3_671b())                                       # the same code as tiny's, on the meta device
    assert round(sizes["total"] / 1e9, 3) == 671.026
    assert round(sizes["active"] / 1e9, 2) == 37.55
    assert round((sizes["active"] - 129280 * 7168) / 1e9, 2) == 36.63   # without the embedding, which is only looked up
    assert round(sizes["mtp"] / 1e9, 2) == 11.61
    assert sizes["cache_bytes"] == 70_272


def test_the_arithmetic_counts_what_a_model_holds():
    c = tiny(n_mtp=2)
    sizes, v3 = arithmetic(c), V3(c)
    mtp = sum(p.numel() for p in v3.mtp.parameters())
    assert sizes["mtp"] == mtp and sizes["total"] == sum(p.numel() for p in v3.parameters()) - mtp
    idle = 2 * 6 * 3 * 12 * 32                                     # two MoE layers, 6 of 8 experts, three [12, 32] each
    assert sizes["active"] == sizes["total"] - idle


def test_the_flops_are_six_per_active_weight_plus_attention():
    c = tiny(n_mtp=0, n_dense_layers=3)
    v3 = V3(c)
    products = sum(p.numel() for p in v3.parameters()) - v3.embed.weight.numel()
    attention = 3 * 3 * 2 * (34 + 20) * (32 + 1) / 2              # layers, heads, multiply-add, d_n + d_r and d_v, keys
    assert arithmetic(c)["flops"] == 6 * products + 3 * attention


# --- folders under the official names ---------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    v3 = lively(V3(tiny()))
    save_hf(v3, tmp_path / "hf")
    return tmp_path / "hf"


def shard(folder):
    return next(folder.glob("*.safetensors"))


def rewrite(folder, **changes):
    """Change tensors of a folder's only shard by name (double underscores are dots); None removes one."""
    tensors = load_file(shard(folder))
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name) if value is None else tensors.update({name: value})
    save_file(tensors, shard(folder))


@pytest.mark.parametrize("changes", [dict(), dict(q_lora_rank=14, n_mtp=2), dict(n_mtp=0, n_shared_experts=0), GROUPS,
                                     YARN,
                                     dict(n_dense_layers=3)],
                         ids=["plain", "two depths", "no MTP", "groups", "YaRN", "dense"])
def test_a_saved_folder_gives_the_same_model_back_bit_for_bit(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(model, "SHARD_BYTES", 40_000)
    v3 = lively(V3(tiny(**changes)))
    save_hf(v3, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    back = V3.from_hf(tmp_path / "hf")
    assert back.state_dict().keys() == v3.state_dict().keys()
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in v3.state_dict().items())
    tokens = random_tokens(2, 20)
    assert torch.equal(back(tokens), v3(tokens))


def test_each_official_name_holds_the_tensor_that_it_names(folder):
    v3, stored = from_hf(folder), load_file(shard(folder))
    dense, moe, mtp = v3.layers[0], v3.layers[2], v3.mtp[0]
    for name, tensor in {
            "model.embed_tokens.weight": v3.embed.weight, "lm_head.weight": v3.head.weight,
            "model.norm.weight": v3.norm.weight,
            "model.layers.0.input_layernorm.weight": dense.attn_norm.weight,
            "model.layers.0.post_attention_layernorm.weight": dense.ffn_norm.weight,
            "model.layers.0.self_attn.q_proj.weight": dense.attn.wq.weight,
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": dense.attn.wkv_a.weight,
            "model.layers.0.self_attn.kv_a_layernorm.weight": dense.attn.kv_norm.weight,
            "model.layers.0.self_attn.kv_b_proj.weight": dense.attn.wkv_b.weight,
            "model.layers.0.self_attn.o_proj.weight": dense.attn.wo.weight,
            "model.layers.0.mlp.gate_proj.weight": dense.ffn.w13.weight[:44],          # the half that silu takes
            "model.layers.0.mlp.up_proj.weight": dense.ffn.w13.weight[44:],
            "model.layers.0.mlp.down_proj.weight": dense.ffn.w2.weight,
            "model.layers.2.mlp.gate.weight": moe.ffn.gate.weight,
            "model.layers.2.mlp.gate.e_score_correction_bias": moe.ffn.gate.bias,
            "model.layers.2.mlp.experts.5.gate_proj.weight": moe.ffn.w13[5, :12],
            "model.layers.2.mlp.experts.5.up_proj.weight": moe.ffn.w13[5, 12:],
            "model.layers.2.mlp.experts.5.down_proj.weight": moe.ffn.w2[5],
            "model.layers.2.mlp.shared_experts.up_proj.weight": moe.ffn.shared.w13.weight[12:],
            "model.layers.3.enorm.weight": mtp.enorm.weight, "model.layers.3.hnorm.weight": mtp.hnorm.weight,
            "model.layers.3.eh_proj.weight": mtp.eh_proj.weight,
            "model.layers.3.shared_head.norm.weight": mtp.norm.weight,
            "model.layers.3.mlp.experts.0.down_proj.weight": mtp.block.ffn.w2[0],
            "model.layers.3.embed_tokens.weight": v3.embed.weight,
            "model.layers.3.shared_head.head.weight": v3.head.weight}.items():
        assert torch.equal(stored[name], tensor), name
    assert len({tuple(t.flatten()[:4].tolist()) for t in stored.values()}) == len(stored) - 2    # only those two repeat


def test_the_index_lists_every_tensor(folder):
    names = set(load_file(shard(folder)))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names and set(index["weight_map"].values()) == {shard(folder).name}


def test_the_released_config_json_is_the_671b_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({                      # as DeepSeek released it, with rope_scaling
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280}))
    released, ours = config_from_hf(tmp_path), v3_671b()
    for key in model.HF_FIELDS.keys() - {"init_std"} | {"rope_theta", "beta_fast", "beta_slow",
                                                        "mscale", "mscale_all_dim",
                                                       "rope_factor", "original_seq_len"}:
        assert getattr(released, key) == getattr(ours, key), key
    assert released.context == 163840
    assert config_from_hf(tmp_path, max_seq_len=4096).context == 4096       # served at 4K, YaRN is off


def blocks_by_hand(weight, scale):
    """weight[i, j] * scale[i // 128, j // 128], an element at a time where it matters."""
    out = weight.to(torch.float64).clone()
    for i in range(weight.shape[0]):
        for b in range(scale.shape[1]):
            out[i, 128 * b:128 * (b + 1)] *= scale[i // 128, b].double()
    return out


def fp8_folder(tmp_path):
    """A folder as DeepSeek releases it: FP8 weights with one scale per 128x128 block, here with partial last blocks."""
    v3 = lively(V3(tiny(dim=160, inter_dim=200, moe_inter_dim=136, kv_lora_rank=48, n_layers=2)))
    save_hf(v3, tmp_path / "hf")
    quantized = {}
    for name, t in load_file(shard(tmp_path / "hf")).items():
        if "_proj" in name and "eh_proj" not in name:
            rows, columns = (-(-n // 128) for n in t.shape)
            scale = torch.rand(rows, columns) * 1e-3 + 1e-4
            spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:t.shape[0], :t.shape[1]]
            quantized[name] = (t / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scale
    rewrite(tmp_path / "hf", **{n: w for n, (w, _) in quantized.items()},
            **{n + "_scale_inv": s for n, (_, s) in quantized.items()})
    return tmp_path / "hf", quantized


def test_fp8_weights_are_multiplied_by_their_block_scales_on_the_way_in(tmp_path):
    folder, quantized = fp8_folder(tmp_path)
    ours = official_tensors(from_hf(folder))
    assert {tuple(w.shape) for w, _ in quantized.values()} >= {(200, 160), (160, 200), (136, 160),
                                                               (160, 136), (132, 48)}
    assert {tuple(s.shape) for _, s in quantized.values()} >= {(2, 2), (2, 1)}
    for name, (weight, scale) in quantized.items():
        agree(ours[name].double(), blocks_by_hand(weight, scale), 1e-6, name)
    agree(ours["lm_head.weight"], load_file(shard(folder))["lm_head.weight"], 0, "what is not FP8")


def refuse(folder, *words, **changes):
    """from_hf gives a UserError of one line that holds all the words."""
    with pytest.raises(UserError) as error:
        from_hf(folder, **changes)
    message = str(error.value)
    print(message)
    assert "\n" not in message and str(folder) in message
    for word in words:
        assert word in message


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def test_a_folder_without_config_json_is_refused(tmp_path):
    refuse(tmp_path, "no config.json")
    refuse(tmp_path / "nothing", "no config.json")


@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_a_config_json_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refuse(folder, "config.json")


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="llama"), ["model_type", "'llama'", "deepseek_v3"]),
    (dict(model_type="absent"), ["model_type"]),
    (dict(hidden_size="absent"), ["'hidden_size' is missing"]),
    (dict(hidden_size="wide"), ["'wide'"]),
    (dict(n_group=None), ["n_expert_groups"]),
    (dict(n_group=3), ["n_expert_groups", "does not divide"]),
    (dict(tie_word_embeddings=True), ["tie_word_embeddings"]),
    (dict(scoring_func="softmax"), ["scoring_func", "'softmax'"]),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), ["'llama3'"]),
    (dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2}), ["'linear'"]),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ["factor"]),
], ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_a_foreign_or_broken_config_json_is_refused(folder, changes, words):
    edit_config(folder, **changes)
    refuse(folder, "config.json", *words)


def test_a_missing_shard_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "SHARD_BYTES", 100_000)
    save_hf(V3(tiny()), tmp_path / "hf")
    lost = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    lost.unlink()
    refuse(tmp_path / "hf", lost.name, "missing")


def test_a_folder_without_any_weights_is_refused(folder):
    shard(folder).unlink()
    (folder / "model.safetensors.index.json").unlink()
    refuse(folder, "model.safetensors", "missing")


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_a_truncated_shard_is_named(folder, keep):
    shard(folder).write_bytes(shard(folder).read_bytes()[:keep])
    refuse(folder, shard(folder).name, "damaged")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    refuse(folder, "model.safetensors.index.json")


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, model__layers__2__mlp__experts__3__up_proj__weight=None)
    refuse(folder, "model.layers.2.mlp.experts.3.up_proj.weight is missing")


def test_an_unknown_tensor_is_named(folder):
    rewrite(folder, model__layers__9__mlp__up_proj__weight=torch.zeros(2))
    refuse(folder, shard(folder).name, "unknown tensor model.layers.9.mlp.up_proj.weight")
    with pytest.raises(UserError, match="unknown tensor model.layers.9"):                      # nor with fewer depths
        from_hf(folder, n_mtp=0)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    rewrite(folder, model__layers__0__self_attn__o_proj__weight=torch.zeros(60, 32))
    refuse(folder, shard(folder).name, "model.layers.0.self_attn.o_proj.weight", "[60, 32]", "[32, 60]")


def test_an_fp8_weight_without_its_scales_or_with_too_few_is_refused(tmp_path):
    folder, _ = fp8_folder(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, **{name + "_scale_inv": torch.ones(1, 1)})
    refuse(folder, name + "_scale_inv", "[1, 1]", "[2, 2]")
    rewrite(folder, **{name + "_scale_inv": None})
    refuse(folder, name + "_scale_inv", "missing")


def test_saving_never_overwrites_a_folder(folder):
    before = shard(folder).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        save_hf(V3(tiny()), folder)
    assert shard(folder).read_bytes() == before


@pytest.mark.parametrize("shards_written", [0, 2])
def test_a_full_disk_leaves_no_half_folder(tmp_path, monkeypatch, shards_written):
    written = []

    def full(tensors, path, metadata=None):
        if len(written) == shards_written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(model, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(model, "save_file", full)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'hf'))}.*No space left") as error:
        save_hf(V3(tiny()), tmp_path / "hf")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


# --- the stages of a pipeline -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_stages_hold_the_whole_model_once_with_its_names_and_initial_values(count):
    c = tiny(n_layers=6)
    whole, parts = V3(c).state_dict(), [s.state_dict() for s in stages(c, count, range(count))]
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted([*whole] + ["embed.weight"] * (count > 1))                 # MTP's, at the far end
    assert all(torch.equal(tensor, whole[name]) for part in parts for name, tensor in part.items())


def test_both_ends_on_one_rank_share_the_embedding():
    first, last = stages(tiny(), 4, [0, 3])
    assert first.embed is last.embed and shared([first, last]) == [first.embed.weight]
    middle, last = stages(tiny(n_mtp=0), 4, [2, 3])                                  # nobody there reads tokens
    assert not hasattr(last, "embed") and shared([middle, last]) == []


@pytest.mark.parametrize("changes", [dict(), dict(n_mtp=0), dict(inter_dim=500), dict(vocab_size=6100)])
def test_the_costliest_stage_costs_as_little_as_it_can(changes):
    c = tiny(n_layers=7, n_dense_layers=3, **changes)
    a = arithmetic(c)
    end = sum(a["layers"][7:]) + a["end"]                                                     # MTP and the head
    assert sum(a["layers"][:7]) + end == pytest.approx(a["flops"])

    def worst(cuts):
        costs = [sum(a["layers"][start:stop]) for start, stop in zip(cuts, cuts[1:])]
        return max([*costs[:-1], costs[-1] + end])

    for count in range(1, 9):
        every = [[0, *inner, 7] for inner in itertools.combinations(range(1, 8), count - 1)]
        assert balanced(c, count) in every
        assert worst(balanced(c, count)) == pytest.approx(min(map(worst, every)))
    with pytest.raises(UserError, match="n_layers = 7 is too few for 9 stages"):
        balanced(c, 9)


def test_v3_in_16_stages():
    cuts = balanced(v3_671b(), 16)
    assert [stop - start for start, stop in zip(cuts, cuts[1:])] == [4] * 15 + [1]  # the head and MTP are four layers'
