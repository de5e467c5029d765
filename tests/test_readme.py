"""What the README says is checked: its files, commands, flags and figures."""
import dataclasses
import re
from pathlib import Path

import pytest

import bench
import bench_readme
import configs
import measure
import sample
from bench_fp8 import FP8_PARTS, QUALITY
from bench_moe import STEPS

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_every_file_that_the_readme_names_is_there():
    named = {*re.findall(r"`((?:tests/)?[a-z_]+\.py|configs/)`", README), *re.findall(r"\((results/[^)]+)\)", README)}
    assert {"mla.py", "moe.py", "model.py", "tests/test_hf.py", "results/tiny.png"} <= named
    assert not [name for name in named if not (HERE / name).exists()]


def test_every_config_that_the_readme_names_loads(capsys):
    named = set(re.findall(r"config/\w+\.py", README))
    assert {"config/tiny.py", "config/char.py", "config/gpu.py"} <= named
    for name in named:
        configs.load([name])


def test_every_flag_that_the_readme_names_exists():
    others = {"nproc", "nnodes", "max", "rdzv", "ntasks", "gpus"}       # of torchrun and SLURM, up to the first hyphen
    known = {*configs.FIELDS, *(f.name for f in dataclasses.fields(sample.Options)), "help", "nanogpt", *others}
    flags = set(re.findall(r"--(\w+)", re.sub(r"<!--.*?-->", "", README)))
    assert {"resume", "data", "prompt"} <= flags and flags <= known


def test_every_table_of_results_is_what_the_committed_results_say():
    assert bench_readme.fill(README) == README, "run: python bench.py readme"
    assert set(re.findall(r"<!-- (\w+) -->", README)) == set(bench_readme.tables())


def test_every_module_of_the_project_is_on_the_map():
    modules = {p.name for p in HERE.glob("*.py") if not p.name.startswith("bench")} - {"backend.py", "measure.py"}
    assert not [name for name in modules if f"`{name}`" not in README]


def test_the_commands_of_the_first_screen_are_those_that_ci_runs():
    script = (HERE / ".ci/run").read_text(encoding="utf-8")
    for command in ("pip install -r requirements.txt", "pip install -r requirements-extra.txt"):
        assert command in README and command.replace("install", "install -q") in script
    assert "\npytest\n" in README and "pytest" in script


@pytest.mark.parametrize("section", ["tiny", "char", "ablations"])
def test_a_result_says_where_it_comes_from(section):
    result = measure.load(section)
    assert {"command", "date", "python", "torch", "cpu"} <= result.keys() and result["data"]["corpus_sha256"]


@pytest.mark.parametrize("argv, said", [
    (["speed"], "sections"), (["char"], "--data"), (["char", "--data=README.md"], "--nanogpt"),
    (["fp8", "--parts=product"], "there are products, few"), (["moe", "--shapes=V4"], "there are V3"),
    (["step", "--parts=eager"], "graph"), (["tiny", "--fast=1"], "--fast"),
    (["ablations", "--data=nothing.txt"], "--data")])
def test_a_mistaken_bench_command_is_answered_in_one_line(argv, said):
    with pytest.raises(configs.UserError, match=said) as e:
        bench.main(argv)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("there", [FP8_PARTS, QUALITY, STEPS], ids=["fp8", "fp8_quality", "step"])
def test_every_part_of_a_section_can_be_chosen_alone_and_beside_others(there):
    assert all(measure.chosen({"parts": name}, "parts", there) == [name] for name in there)
    for options in ({}, {"parts": ",".join(there)}):
        assert measure.chosen(options, "parts", there) == list(there)


def test_a_run_of_some_parts_keeps_the_others_results_only_of_this_machine_and_day(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.record("section", "a command", first=1, second=2)
    assert measure.kept("section", "second", "third") == {"second": 2}
    monkeypatch.setattr(measure, "here", lambda: {"gpu": "another"})
    assert measure.kept("section", "second") == {}
