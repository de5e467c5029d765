"""bench.py cluster on two processes of the CPU; and, where there are several GPUs, every layout over NCCL."""
import sys

import pytest
import torch

import bench
import bench_cluster
import bench_readme
from configs import UserError

GPUS = torch.cuda.device_count()
WHAT = ("loss", "weights", "all_gradients", "gradients")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's groups of processes are not tried on Windows")


def test_what_fails_is_told_and_the_cases_behind_it_are_measured(tmp_path, capsys):
    done = bench_cluster.run("exchange", ["3 x 0, bf16", "link", "1 x 2, fp8"], 2, "cpu", tmp_path, patience=60)
    said = capsys.readouterr().out
    assert list(done) == ["link", "1 x 2, fp8"] and "3 x 0, bf16: FAILED" in said and "Error" in said
    assert len(done["link"]) == 2 and min(done["link"][0].values()) > 0
    sent = done["1 x 2, fp8"][0]["dispatch"]
    assert sent["bytes"] * 256 == sent["wire_bytes"] * (256 + 2 + 8 * (4 + 4))     # scales, weights, experts' numbers


def test_a_layout_is_compared_with_one_rank_and_the_readme_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_cluster, "layouts", lambda world: {"dp 2": []})
    parity = bench_cluster.measure_parity(2, "cpu", tmp_path)
    rows = {(r["precision"], r["layout"]): r for r in parity["rows"]}
    assert len(rows) == 4 and max(rows["fp32", "dp 2"][what] for what in WHAT) < 1e-5
    assert rows["bf16", "dp 2"]["gradients"] < 0.05
    text = bench_readme.many_ranks({"gpus": 2, "gpu": "GPU", "torch": "2", "parity": parity})
    assert text.startswith("2 x GPU") and text.count("\n| dp 2 | ") == 1
    wrong = bench_cluster.difference(tmp_path / "bf16 alone 1", tmp_path / "fp32 alone 0")
    assert min(wrong[what] for what in WHAT) > 1e-5                      # what differs is seen to


@pytest.mark.parametrize("argv, says", [
    (["--parts=exchange,overlop"], "no 'overlop'"), (["--device=tpu"], "there are cuda and cpu"),
    *([(["--device=cuda"], "at least 2 GPUs are needed")] if GPUS < 2 else [])], ids=str)
def test_a_mistake_is_one_line(argv, says):
    with pytest.raises(UserError, match=says) as e:
        bench.main(["cluster", *argv])
    assert "\n" not in str(e.value)


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason=f"needs at least 2 CUDA GPUs, and here is {GPUS}")
def test_every_layout_trains_the_model_of_one_gpu_over_nccl(tmp_path):
    world = max(n for n in (2, 4, 8) if n <= GPUS)
    rows = bench_cluster.measure_parity(world, "cuda", tmp_path)["rows"]
    assert len(rows) == 2 * (1 + len(bench_cluster.layouts(world)))
    noise = next(r for r in rows if r["precision"] == "bf16" and r["noise"])
    for row in rows:
        for what in WHAT if row["precision"] == "fp32" else WHAT[:3]:
            assert row[what] <= (1e-5 if row["precision"] == "fp32" else 3 * noise[what] + 1e-2), row
