"""The plan of a cluster: its parts add up, and at V3's own numbers it says what the report says."""
import random

import pytest
from conftest import tiny

from cluster import Cluster, copies, kept_bytes, parameters, plan
from configs import UserError, load
from model import arithmetic, balanced

V3 = load(["configs/v3_671b.py"]).replace(precision="fp8_reference", moments="bf16")


SMALL = V3.replace(n_layers=33, n_routed_experts=16)                  # as deep as the pipelines need, quick to count


def test_v3s_own_cluster():
    numbers, rows = plan(V3, "dualpipe", 16, 128, 64)
    text = dict(rows)
    assert numbers["microbatches"] == 120 and "2,048 GPUs" in text["cluster"] and "on 8 nodes" in text["cluster"]
    assert "is 24 micro-batches" in text["ramp"] and "dualpipe's 32" in text["ramp"]
    assert numbers["weights"] + numbers["activations"] < 102e9 and 0.03 < numbers["bubble"] < 0.08
    assert 1543 < numbers["tokens_per_s"] < 3000                       # the report's, which is everything included
    assert numbers["hidden"] > 2 * numbers["exposed"] > 0
    assert all(word in text["assumed"] for word in ("820 TFLOP/s", "50 GB/s", "160 inside", "copies", "third"))


def test_only_a_pair_hides_exchanges():
    for kind in ("1f1b", "zb1p"):
        numbers, rows = plan(SMALL, kind, 16, 128, 16)
        assert numbers["hidden"] == 0 and numbers["exposed"] == pytest.approx(120 * numbers["travel"])
        assert "has none" in dict(rows)["a pair"] and "ramp" not in dict(rows)


def test_with_a_perfect_network_the_bubble_is_the_published_form():
    from dualpipe import bubble
    perfect = Cluster(between=1e30, inside=1e30)
    for kind in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        numbers, _ = plan(SMALL, kind, 8, 64, 16, perfect)
        F = numbers["pair"] / 3
        assert numbers["bubble"] * numbers["step"] == pytest.approx(bubble(kind, 8, F, 2 * F, F, 3 * F))
        assert numbers["travel"] < 1e-12


def test_a_slow_network_shows():
    slow = plan(SMALL, "dualpipe", 16, 128, 16, Cluster(between=5e9))[0]
    fast = plan(SMALL, "dualpipe", 16, 128, 16)[0]
    assert slow["exposed"] > 5 * fast["exposed"] and slow["step"] > fast["step"]
    one = plan(SMALL, "dualpipe", 16, 128, 1)[0]
    assert one["travel"] == 0 and one["weights"] > fast["weights"]


def test_the_stages_hold_the_whole_model():
    c = tiny(n_layers=6)
    a, cuts = arithmetic(c), balanced(tiny(n_layers=6), 4)
    assert sum(map(sum, parameters(c, a, cuts, 1))) == a["total"] + a["mtp"]
    whole, spread = parameters(c, a, cuts, 1), parameters(c, a, cuts, 4)
    assert [s[0] for s in whole] == [s[0] for s in spread] and [s[1] for s in whole] == [4 * s[1] for s in spread]
    assert kept_bytes(c.replace(precision="bf16")) * 2 == kept_bytes(c)


def test_copies_are_those_of_random_routing():
    draws, rng, left, on = 20_000, random.Random(0), 0, 0
    for _ in range(draws):
        open_nodes = rng.sample(range(8), 4)                                                  # V3: 4 of 8 nodes
        ranks = {(rng.choice(open_nodes), rng.randrange(8)) for _ in range(8)}               # 8 experts, with returning
        left += len({node for node, _ in ranks} - {0})
        on += len({(node, rank) for node, rank in ranks if rank != 0})
    assert copies(V3, 64, 8) == pytest.approx((left / draws, on / draws), rel=0.02)
    assert copies(V3, 1, 8) == (0, 0) and copies(V3, 8, 8)[0] == 0


def test_no_such_pipeline():
    with pytest.raises(UserError, match="at least 32 micro-batches"):
        plan(SMALL, "dualpipe", 16, 960, 16)
    with pytest.raises(UserError, match="n_layers = 33 is too few"):
        plan(SMALL, "dualpipev", 32, 128, 16)
