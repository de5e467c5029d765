"""The plan of a cluster: its parts add up, at V3's own numbers it says what the report says, and its bytes are those
that training allocates."""
import random

import pytest
from conftest import GPU, no_triton, random_tokens, tiny

import backend
import bench_ranks
import cluster
from cluster import Cluster, copies, kept, memory, plan
from configs import UserError, load
from measure import Allocated
from model import V3 as Model
from model import arithmetic
from parallel import Mesh

V3 = load(["configs/v3_671b.py"]).replace(precision="fp8_reference", moments="bf16")
SMALL = V3.replace(n_layers=33, n_routed_experts=16)                  # as deep as the pipelines need, quick to count


def on(c, kind, pp, dp, ep):
    """A Config and the Mesh of its ranks, 8 on a machine."""
    c = c.replace(pipeline=kind, pp=pp, dp=dp, ep=ep)
    return c, Mesh(world=pp * dp, nodes=max(1, pp * dp // 8)).arrange(c, [c.batch_size])


def test_v3s_own_cluster():
    numbers, rows = plan(*on(V3, "dualpipe", 16, 128, 64))
    text = dict(rows)
    assert numbers["microbatches"] == 120 and "2,048 GPUs" in text["cluster"] and "on 8 nodes" in text["cluster"]
    assert "is 24 micro-batches" in text["ramp"] and "dualpipe's 32" in text["ramp"]
    assert 0.03 < numbers["bubble"] < 0.08
    assert 1543 < numbers["tokens_per_s"] < 3000                       # the report's, which is everything included
    assert numbers["hidden"] > 2 * numbers["exposed"] > 0
    assert all(word in text["assumed"] for word in ("820 TFLOP/s", "50 GB/s", "160 inside", "copies", "third"))


def test_only_a_pair_hides_exchanges():
    for kind in ("1f1b", "zb1p"):
        numbers, rows = plan(*on(SMALL, kind, 16, 128, 16))
        assert numbers["hidden"] == 0 and numbers["exposed"] == pytest.approx(120 * numbers["travel"])
        assert "has none" in dict(rows)["a pair"] and "ramp" not in dict(rows)


def test_with_a_perfect_network_the_bubble_is_the_published_form():
    from dualpipe import bubble
    perfect = Cluster(between=1e30, inside=1e30)
    for kind in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        numbers, _ = plan(*on(SMALL, kind, 8, 64, 16), perfect)
        F = numbers["pair"] / 3
        assert numbers["bubble"] * numbers["step"] == pytest.approx(bubble(kind, 8, F, 2 * F, F, 3 * F))
        assert numbers["travel"] < 1e-12


def test_a_slow_network_shows():
    slow = plan(*on(SMALL, "dualpipe", 16, 128, 16), Cluster(between=2.5e9))[0]
    fast = plan(*on(SMALL, "dualpipe", 16, 128, 16))[0]
    assert slow["exposed"] > 4 * fast["exposed"] and slow["step"] > fast["step"]
    assert plan(*on(SMALL, "dualpipe", 16, 128, 1))[0]["travel"] == 0


def test_without_a_pipeline_there_is_no_bubble_and_every_exchange_shows():
    numbers, rows = plan(*on(SMALL, "dualpipe", 1, 256, 16))
    assert numbers["bubble"] == numbers["hidden"] == numbers["passed"] == 0 and numbers["microbatches"] == 60
    assert numbers["exposed"] == pytest.approx(60 * numbers["travel"]) and numbers["step"] > numbers["exposed"] > 0
    assert "no pipeline, experts over 16 ranks on 2 nodes" in dict(rows)["cluster"]


@pytest.mark.parametrize("kind, pp, dp, ep", [("1f1b", 1, 1, 1), ("1f1b", 1, 8, 4), ("1f1b", 4, 2, 1),
                                              ("zb1p", 2, 4, 4), ("dualpipe", 4, 4, 2), ("dualpipev", 2, 2, 2)])
def test_the_ranks_of_any_layout_own_every_parameter_once(kind, pp, dp, ep):
    c, mesh = on(tiny(n_layers=6, batch_size=32, micro_batch_size=1), kind, pp, dp, ep)
    a, held = arithmetic(c), cluster.everywhere(c, mesh)
    assert sum(m["owned"] for m in held) == a["total"] + a["mtp"]
    without = cluster.everywhere(c.replace(zero1=False), mesh)
    assert all(m["moments"] == 8 * m["parameters"] for m in without)
    assert all((m["moments"] < all_["moments"]) == (dp > 1) for m, all_ in zip(held, without))


def test_copies_are_those_of_random_routing():
    draws, rng, left, on, there = 20_000, random.Random(0), 0, 0, 0
    for _ in range(draws):
        open_nodes = rng.sample(range(8), 4)                                                  # V3: 4 of 8 nodes
        experts = rng.sample([(node, i) for node in open_nodes for i in range(32)], 8)        # with 32 experts each
        ranks = {(node, i // 4) for node, i in experts}
        left += len({node for node, _ in ranks} - {0})
        on += len({(node, rank) for node, rank in ranks if rank != 0})
        there += len(ranks)
    assert copies(V3, 8, 8) == pytest.approx((left / draws, on / draws, there / draws), rel=0.02)
    assert copies(V3, 1, 1) == (0, 0, 1) and copies(V3, 1, 8)[0] == 0


def test_no_such_pipeline():
    with pytest.raises(UserError, match="at least 32 micro-batches"):
        plan(*on(SMALL, "dualpipe", 16, 960, 16))
    with pytest.raises(UserError, match="n_layers = 33 is too few"):
        plan(*on(SMALL, "dualpipev", 32, 128, 16))
    with pytest.raises(UserError, match="does not divide the 60 sequences that a rank gets"):
        plan(*on(SMALL.replace(micro_batch_size=7), "1f1b", 1, 256, 16))


# --- bytes: planned and allocated -------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=61, dim=128, n_layers=2, n_dense_layers=1, inter_dim=300, moe_inter_dim=64, n_heads=4,
             kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, n_mtp=1, n_activated_experts=2)


def left_by_a_forward(c, kernels):
    """(bytes that the forward pass of a micro-batch leaves, as planned)."""
    v3, tokens = Model(c), random_tokens(c.micro_batch_size, c.seq_len + 1 + c.n_mtp)
    v3.loss(tokens)                                                    # makes the copies of weights, which stay
    with Allocated() as memory_:
        loss, _ = v3.loss(tokens)
        return memory_.alive(), memory(c, Mesh(), kernels)["activations"]


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=48), dict(recompute=True), dict(recompute_mla=True)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8_reference"])
def test_a_forward_pass_leaves_what_the_plan_says(precision, changes):
    c = tiny(**{**SHAPE, "seq_len": 64, "batch_size": 4, "micro_batch_size": 4, "precision": precision, **changes})
    real, planned = left_by_a_forward(c, False)
    print(f"{real:,} bytes, planned {planned:,}: {planned / real - 1:+.2%}")
    assert planned == pytest.approx(real, rel=0.02)


@no_triton
@pytest.mark.skipif(GPU, reason="python bench.py memory asks the GPU's own allocator")
@pytest.mark.parametrize("precision, changes", [("bf16", dict(q_lora_rank=48)), ("fp8", dict(recompute_mla=True))])
def test_with_a_gpus_kernels_a_forward_pass_leaves_what_the_plan_says(precision, changes, monkeypatch):
    monkeypatch.setattr(backend, "use_small_kernels", lambda x: True)
    for choice in ("attention", "experts", "fp8_kernels"):
        monkeypatch.setattr(backend, choice, lambda *_: ("Triton", "a test"))
    c = tiny(**{**SHAPE, "seq_len": 16, "batch_size": 1, "micro_batch_size": 1, "n_routed_experts": 4,
                "precision": precision, "n_mtp": 0, **changes})
    real, planned = left_by_a_forward(c, True)
    print(f"{real:,} bytes, planned {planned:,}: {planned / real - 1:+.2%}")
    assert planned == pytest.approx(real, rel=0.02)


def test_without_recomputing_or_without_fp8_more_is_kept():
    c = V3.replace(recompute_mla=False)
    parts = lambda c: sum(kept(c, False, True, 64, 7.4))
    assert kept(V3, False, True, 64, 7.4)[0] < kept(c, False, True, 64, 7.4)[0]
    assert parts(V3) == pytest.approx(parts(c)) and parts(c) < parts(c.replace(precision="bf16"))
    assert kept(c.replace(recompute=True), False, True)[0] == 2 * c.dim


@pytest.mark.parametrize("layout", ["dp2, ZeRO-1", "pp2 (DualPipeV) x ep2, all of it"])
def test_what_each_rank_of_a_run_holds_is_within_5_percent_of_the_plan(layout):
    world, changes = {"dp2, ZeRO-1": (2, dict(moments="bf16", recompute=True)),
                      "pp2 (DualPipeV) x ep2, all of it": (4, dict(pp=2, ep=2, pipeline="dualpipev", ema_decay=0.9,
                                                                   recompute_mla=True))}[layout]
    measured = bench_ranks.against_plan(layout, world, changes)
    for stage in measured["rows"]:
        print({what: f"{real:,} {planned / real - 1:+.2%}" for what, (real, planned) in stage.items() if real})
        assert stage["weights"][0] and stage["moments"][0] and stage["activations"][0]
    assert bench_ranks.off(measured) < 0.05
