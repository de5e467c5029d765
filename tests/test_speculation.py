"""Speculative decoding: the same text as plain decoding, the same distribution, and a cache without a trace of what was
rejected."""
import math
from collections import Counter

import pytest
import torch
from conftest import GROUPS, YARN, agree, build, lively, random_tokens, tiny

import sample
from model import V3


def learned(**changes):
    """A V3 in float64 that has half learned a chain of tokens: its drafts stand often, not always, and not in all rows
    alike."""
    generator = torch.Generator().manual_seed(1)
    v3 = lively(V3(tiny(**changes)))
    optimizer = torch.optim.AdamW(v3.parameters(), 1e-2)
    for _ in range(18):
        tokens = [torch.randint(61, (16,), generator=generator)]
        for _ in range(24):
            any_, astray = torch.randint(61, (16,), generator=generator), torch.rand(16, generator=generator) < 0.15
            tokens.append(torch.where(astray, any_, (2 * tokens[-1] + 7) % 61))
        v3.loss(torch.stack(tokens, 1))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return v3.eval().double()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return learned()


PROMPTS = [random_tokens(n, seed=n).tolist() for n in (3, 11, 1, 6)]


def write(v3, prompts=PROMPTS, n=20, drafts=0, **more):
    return sample.generate(v3, prompts, n, **{"temperature": 0, "drafts": drafts, **more})


def acceptance(v3, prompts, drafts, **more):
    tally = Counter()
    write(v3, prompts, drafts=drafts, tally=tally, **more)
    return tally["accepted"] / tally["forwards"] / drafts


# --- greedy: token by token what plain decoding writes ----------------------------------------------------------------

@pytest.mark.parametrize("drafts", [1, 2, 3, 6])
def test_greedy_speculation_writes_what_plain_decoding_writes_in_fewer_forward_passes(model, drafts):
    plain, tally = write(model), Counter()
    assert write(model, drafts=drafts, tally=tally) == plain
    # Drafts that stand beyond the 20 tokens of a row are counted too.
    assert 4 * 19 - tally["forwards"] <= tally["accepted"] <= 4 * 19 - tally["forwards"] + 4 * drafts
    assert tally["forwards"] < 0.7 * 4 * 19 and 0.2 < tally["accepted"] / tally["forwards"] / drafts < 0.95


@pytest.mark.parametrize("changes", [dict(q_lora_rank=14, **YARN), GROUPS, dict(n_mtp=2), dict(n_dense_layers=3)],
                         ids=["q latent, YaRN", "expert groups", "two MTP modules", "dense"])
@pytest.mark.parametrize("drafts", [1, 4])
def test_a_model_whose_drafts_nearly_always_fall_writes_the_same_text_up_to_the_end_of_its_context(changes, drafts):
    v3 = build(**changes).eval()
    plain = write(v3, n=100)
    assert write(v3, n=100, drafts=drafts) == plain and len(plain[1]) == v3.config.context + 1 - 11
    assert acceptance(v3, PROMPTS, drafts) < 0.2


def test_rows_whose_drafts_fare_differently_write_what_each_writes_alone(model):
    together = write(model, drafts=2)
    assert together == [write(model, [p], drafts=2)[0] for p in PROMPTS]
    assert len({acceptance(model, [p], 2) for p in PROMPTS}) > 2


def test_an_end_of_text_among_the_drafts_ends_its_row_and_no_other(model):
    plain = write(model)
    for eos in set(plain[0]) - {plain[0][0]}:
        ended = [row[:row.index(eos)] if eos in row else row for row in plain]
        assert write(model, drafts=3, eos=eos) == ended


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_row_gets_more_tokens_than_were_asked_for(model, n):
    heard = []
    assert write(model, n=n, drafts=5, on_token=lambda row, token: heard.append(row)) == write(model, n=n)
    assert Counter(heard) == dict.fromkeys(range(4), n)


def test_with_top_k_of_one_a_temperature_changes_nothing(model):
    assert write(model, drafts=2, temperature=3.0, top_k=1) == write(model)


# --- the drafts and the cache -----------------------------------------------------------------------------------------

def started(v3, prompts, drafts, steps=20):
    batch = sample.Batch(v3, prompts, steps, (0,), None, drafts)
    return batch, [p + new for p, new in zip(prompts, batch.prefill().tolist())]


@pytest.mark.parametrize("on_device", [False, True], ids=["host knows the lengths", "as in a CUDA graph"])
@torch.inference_mode()
def test_after_every_step_cache_and_drafts_are_those_of_a_model_that_has_read_the_text_alone(model, on_device):
    batch, texts = started(model, PROMPTS, drafts=2)
    batch.cache.static = on_device
    rejected = 0
    for _ in range(6):
        for b, text in enumerate(texts):
            row, n = torch.tensor([text]), len(text) - 1                                # the newest is not read yet
            assert batch.tokens[b, 0] == text[-1] and batch.cache.lengths[b] == n
            alone = model.cache(1, n, drafts=1)
            h, _ = model.hidden(row[:, :-1], alone)
            model.lookahead(h, row[:, 1:], alone)
            agree(batch.cache.latents[:, b, :n], alone.latents[:, 0, :n], 1e-10, "latents")
            (state, _), *_ = model.draft(h, row)                                        # as in training
            assert batch.tokens[b, 1] == model.logits(state[0, -1]).argmax()
        new = batch.speculate().tolist()
        rejected += sum(row.count(-1) for row in new)
        texts = [text + [token for token in row if token >= 0] for text, row in zip(texts, new)]
    assert rejected > 5 and len(set(map(len, texts))) > 1


@torch.inference_mode()
def test_the_module_looks_ahead_through_the_cache_as_it_does_in_training(model):
    tokens, cache, states = random_tokens(2, 21), model.cache(2, 20, drafts=1), []
    for start, end in ((0, 9), (9, 10), (10, 20)):
        h, _ = model.hidden(tokens[:, start:end], cache)
        states.append(model.lookahead(h, tokens[:, start + 1:end + 1], cache))
        cache.advance(end - start)
    (whole, _), *_ = model.draft(model.hidden(tokens[:, :20])[0], tokens)
    agree(torch.cat(states, 1), whole, 1e-10)


@pytest.mark.parametrize("changes", [dict(), dict(kv_lora_rank=60, qk_nope_head_dim=6, v_head_dim=8)],
                         ids=["absorbed is cheaper", "naive is cheaper"])
@pytest.mark.parametrize("drafts", [0, 2])
@torch.inference_mode()
def test_prompts_read_in_pieces_leave_what_prompts_read_at_once_leave(changes, drafts, monkeypatch):
    v3 = build(**changes).eval()
    prompts = [random_tokens(n, seed=n).tolist() for n in (25, 7, 1, 18)]
    whole, texts = started(v3, prompts, drafts, steps=8)
    for piece in (60, 32, 4):                                                           # 15, 8 and 1 tokens of each row
        monkeypatch.setattr(sample, "PIECE", piece)
        shapes, hidden = [], v3.hidden
        monkeypatch.setattr(v3, "hidden", lambda tokens, cache: shapes.append(tokens.shape[1]) or hidden(tokens, cache))
        batch, others = started(v3, prompts, drafts, steps=8)
        monkeypatch.undo()
        assert max(shapes) == piece // 4 and sum(shapes) == 25
        assert others == texts and torch.equal(batch.tokens, whole.tokens)
        for b, prompt in enumerate(prompts):
            agree(batch.cache.latents[:, b, :len(prompt)], whole.cache.latents[:, b, :len(prompt)], 1e-10)


# --- with a temperature: the same distribution ------------------------------------------------------------------------

def test_what_falls_is_replaced_from_what_is_left_and_a_standing_row_gets_one_more():
    p = torch.tensor([[[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]]).expand(200, -1, -1)
    q = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]]).expand(200, -1, -1)
    drafts = torch.tensor([[1, 0]]).expand(200, -1)
    stand, token = sample.accept(p, q, drafts, torch.Generator().manual_seed(0))
    # The first draft always stands; the second half of the time: then comes p's third, else the only one left, 1.
    assert set(zip(stand.tolist(), token.tolist())) == {(2, 2), (1, 1)} and 70 < (stand == 2).sum() < 130
    never = torch.tensor([[[0.0, 0.0, 1.0]] * 3]).expand(200, -1, -1)
    stand, token = sample.accept(never, q, drafts)
    assert not stand.any() and (token == 2).all()


def test_a_draft_that_falls_by_rounding_alone_is_not_replaced_by_a_token_that_cannot_be():
    q = torch.tensor([[[0.0, 0.0, 1.0]]]).expand(4000, -1, -1)
    p = torch.cat([0.99 * q, q], 1)                                 # the same but for rounding, here a large one
    stand, token = sample.accept(p, q, torch.full((4000, 1), 2), torch.Generator().manual_seed(0))
    assert 10 < (stand == 0).sum() < 90 and (token == 2).all()


VOCAB, LENGTH, ROWS = 5, 4, 10000
SAMPLING = dict(temperature=1.3, top_k=4, top_p=0.95)


@pytest.fixture(scope="module")
def small():
    """A random V3 with 5 tokens, whose MTP module thinks otherwise, and the exact probability of each text of 4 tokens
    behind the prompt."""
    v3, prompt = build(vocab_size=VOCAB, seed=3).eval(), [1, 3, 2]
    texts = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)                       # [V^4, 4]
    with torch.no_grad():
        logits = v3(torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], 1))[:, len(prompt) - 1:-1]
    probs = sample.distribution(logits, **SAMPLING).gather(2, texts.unsqueeze(2)).squeeze(2).prod(1)
    agree(probs.sum(), torch.ones((), dtype=torch.float64), 1e-6)
    return v3, prompt, probs


def surprise(small, drafts):
    """Chi-square of ROWS sampled texts against their probabilities, over its limit, which one seed in 10,000 exceeds.
    Also the share of drafts that stood."""
    v3, prompt, probs = small
    tally = Counter()
    rows = sample.generate(v3, [prompt] * ROWS, LENGTH, **SAMPLING, generator=torch.Generator().manual_seed(4),
                           drafts=drafts, tally=tally)
    index = torch.tensor(rows) @ VOCAB ** torch.arange(LENGTH - 1, -1, -1)
    seen, expected = torch.bincount(index, minlength=len(probs)).double(), probs * ROWS
    if seen[probs == 0].any():                                                          # a text that truncation forbids
        return math.inf, math.nan
    common = expected >= 5                                                              # the rare ones in one cell
    cell = lambda counts: torch.cat([counts[common], counts[~common].sum()[None]])
    chi2 = ((cell(seen) - cell(expected)) ** 2 / cell(expected).clamp_min(1e-9)).sum().item()
    n = int(common.sum())                                                               # degrees of freedom
    limit = n * (1 - 2 / (9 * n) + 3.72 * math.sqrt(2 / (9 * n))) ** 3                  # Wilson and Hilferty
    print(f"{drafts} drafts: chi-square {chi2:.0f} with {n} degrees of freedom, limit {limit:.0f}; "
          f"{tally['accepted'] / max(tally['forwards'] * drafts, 1):.0%} stood")
    return chi2 / limit, tally["accepted"] / max(tally["forwards"] * drafts, 1)


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
def test_speculation_keeps_the_distribution(small, drafts):
    excess, stood = surprise(small, drafts)
    assert excess < 1 and (not drafts or 0.2 < stood < 0.9)


def always(p, q, drafts, generator):
    return torch.full((len(p),), drafts.shape[1]), sample.draw(p[:, -1], generator)


def replaced_from_p(p, q, drafts, generator):
    stand, _ = RULE(p, q, drafts, generator)
    return stand, sample.draw(p[torch.arange(len(p)), stand], generator)


def against_the_likeliest(p, q, drafts, generator):
    return RULE(p, torch.ones_like(q), drafts, generator)                               # as if q were certain


RULE = sample.accept


@pytest.mark.parametrize("rule", [always, replaced_from_p, against_the_likeliest])
def test_a_wrong_acceptance_rule_shows_in_the_distribution(small, rule, monkeypatch):
    monkeypatch.setattr(sample, "accept", rule)
    assert surprise(small, 1)[0] > 1.5


# --- BF16: where the paths may part -----------------------------------------------------------------------------------

@torch.inference_mode()
def test_in_bf16_the_paths_part_only_where_two_tokens_are_closer_than_the_error():
    """Alone and in a batch, plain and drafted: in BF16 each adds up in another order. The error of the logits there is
    measured against the same weights in float64, through the cache and without it."""
    v3 = lively(V3(tiny(precision="bf16", seq_len=64))).eval()
    for name, p in v3.named_parameters():
        if not name.endswith("gate.weight"):
            p.data = p.data.to(torch.bfloat16)
    exact = lively(V3(tiny(seq_len=64))).double().eval()
    exact.load_state_dict({name: t.double() for name, t in v3.state_dict().items()})
    prompts = [random_tokens(n, seed=n).tolist() for n in range(1, 13)]
    plain = write(v3, prompts, 50)
    parted = 0
    for other in (write(v3, prompts, 50, drafts=1), write(v3, prompts, 50, drafts=3),
                  [write(v3, [p], 50)[0] for p in prompts]):
        for prompt, ours, theirs in zip(prompts, plain, other):
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
            if at is None:
                assert ours == theirs
                continue
            text = torch.tensor([prompt + ours[:at]])
            truth, parted = exact(text)[0, -1], parted + 1
            cache, steps = v3.cache(1, len(text[0])), []
            for token in text.T[:, None]:
                steps.append(v3(token, cache)[0, -1].double())
                cache.advance(1)
            error = max((steps[-1] - truth).abs().max(), (v3(text)[0, -1].double() - truth).abs().max()).item()
            gap = (truth.max() - truth[[ours[at], theirs[at]]]).max().item()
            print(f"parted after {at} tokens: gap {gap:.4f}, error {error:.4f}")
            assert gap <= 2 * error
    print(f"{parted} of {3 * len(prompts)} texts parted")


# --- mistakes ---------------------------------------------------------------------------------------------------------

def test_a_model_without_an_mtp_module_cannot_draft():
    with pytest.raises(ValueError, match="n_mtp is 0"):
        write(build(n_mtp=0).eval(), drafts=1)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("drafts, temperature", [(0, 0), (0, 0.8), (2, 0), (2, 0.8)])
@torch.inference_mode()
def test_the_graph_of_a_step_writes_what_the_step_writes(drafts, temperature):
    """Greedy: bit by bit the same. With a temperature the graph draws what its generator gives it: repeatable, and
    other numbers at every step."""
    config = tiny(precision="bf16", dim=64, n_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
                  v_head_dim=32, inter_dim=64, moe_inter_dim=32, seq_len=128)
    v3 = sample.cast(lively(V3(config))).cuda().eval()

    def text(graph, seed=1):
        generator = torch.Generator("cuda").manual_seed(seed) if temperature else None
        batch = sample.Batch(v3, PROMPTS, 40, (temperature, 0, 1.0), generator, drafts)
        batch.prefill()
        batch.cache.static, step = True, batch.speculate if drafts else batch.step
        step = batch.graph(step) if graph else step
        return torch.cat([step().clone() for _ in range(12)], 1)

    if temperature == 0:
        assert torch.equal(text(True), text(False))
    else:
        first = text(True)
        assert torch.equal(text(True), first) and not torch.equal(text(True, seed=2), first)
        assert len(set(first[0].tolist())) > 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@torch.inference_mode()
def test_on_a_gpu_the_host_waits_once_a_step(monkeypatch):
    config = tiny(precision="bf16", dim=64, n_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
                  v_head_dim=32, inter_dim=64, moe_inter_dim=32, seq_len=128)
    v3 = sample.cast(lively(V3(config))).cuda().eval()
    batch = sample.Batch(v3, PROMPTS, 40, (0,), None, 2)
    batch.prefill()
    batch.cache.static = True
    batch.speculate()                                                                  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.speculate()
    finally:
        torch.cuda.set_sync_debug_mode("default")
