"""Config: which value wins, and what each mistake is told, on one line and before anything is written."""
import subprocess
import sys
from pathlib import Path

import pytest

import configs
import train
from configs import FIELDS, MACHINE_FIELDS, Config, UserError, load, usage
from data import batch_size_at
from train import bias_update_speed, learning_rate, mtp_weight

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")


@pytest.fixture
def file(tmp_path):
    """file("lr = 1") -> the path of a config with that text (or those bytes)."""
    def write(text):
        path = tmp_path / "mine.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)
    return write


def refused(*argv):
    """What `load` says to these arguments: one line."""
    with pytest.raises(UserError) as e:
        load(argv)
    assert "\n" not in str(e.value)
    return str(e.value)


# --- which value wins -------------------------------------------------------------------------------------------------

def test_the_command_line_beats_the_file_and_the_file_beats_the_defaults(file):
    mine = file("dim = 64\nlr = 1e-2\n")
    c = load([mine, "--lr=5e-3", "--n_heads=2", "--n_heads=8"])
    assert (c.dim, c.lr, c.n_heads, c.n_layers) == (64, 5e-3, 8, Config().n_layers)
    assert load([]).dim == Config().dim


def test_each_override_is_echoed_and_nothing_else(file, capsys):
    load([file("dim = 64\n"), "--lr=2e-2", "--recompute", "--data=a b.txt", "--max_steps=1e3"])
    assert capsys.readouterr().out.splitlines() == [
        "config: lr = 0.02", "config: recompute = True", "config: data = 'a b.txt'", "config: max_steps = 1000"]


def test_later_lines_of_a_file_do_arithmetic_on_earlier_ones(file):
    c = load([file('"""A docstring."""\nseq_len = 2 ** 7 - 1   # a comment\nmax_steps = -(-1_000_000 // seq_len)\n'
                   "lr = 3e-3 * 4 / 2\nmin_lr = lr / 8\nfinal_lr = min_lr\ndecay_end = max_steps\nrecompute = True\n"
                   "data = 'x'\nseq_len = seq_len + 1\n")])
    assert (c.seq_len, c.max_steps, c.lr, c.final_lr, c.decay_end, c.recompute, c.data) \
        == (128, 7875, 6e-3, 7.5e-4, 7875, True, "x")


def test_values_come_out_in_their_declared_types():
    c = load(["--max_steps=2e3", "--batch_size=1_000", "--seed=9007199254740993", "--lr=1", "--compile=1",
              "--resume=false", "--data=123"])
    assert (c.max_steps, c.batch_size, c.seed, c.compile, c.resume, c.data) \
        == (2000, 1000, 9007199254740993, True, False, "123")
    assert all(type(getattr(c, key)) is f.type for key, f in FIELDS.items())


def test_a_shipped_config_has_three_names_and_its_run_goes_to_a_folder_of_its_name(tmp_path, monkeypatch):
    for cwd in (ROOT, tmp_path):
        monkeypatch.chdir(cwd)
        assert load(["tiny"]) == load(["config/tiny.py"]) == load(["configs/tiny.py"])
    assert Path(load(["tiny"]).out_dir) == Path("out/tiny") and load(["tiny", "--out_dir=x"]).out_dir == "x"


def test_a_path_that_is_not_there_never_turns_into_a_shipped_config_of_the_same_name(tmp_path):
    assert "not found" in refused(str(tmp_path / "tiny.py"))
    assert "not found" in refused("experiments/tiny.py")
    (tmp_path / "tiny.py").write_text("dim = 640\n")
    assert load([str(tmp_path / "tiny.py")]).dim == 640


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_passes_the_check(path, capsys):
    c = load([str(path)])
    configs.check(c)
    assert c == load([path.stem]) and capsys.readouterr().out == ""


def test_what_may_differ_on_resume_is_a_set_of_fields():
    assert MACHINE_FIELDS < FIELDS.keys()
    assert not MACHINE_FIELDS & {"lr", "seed", "batch_size", "data", "max_steps", "dim", "ema_decay", "precision"}


# --- what a mistake is told -------------------------------------------------------------------------------------------

BASE = "n_layers = 4\nn_routed_experts = 16\nn_activated_experts = 2\nseq_len = 256\n"
BAD = {                                                                                 # over that file
    "--batch_sise=4": "--batch_sise: unknown key 'batch_sise'; did you mean 'batch_size'?",
    "--zzzz=4": "--help lists them",
    "--=4": "unknown key ''",
    "--lr": "write --lr=VALUE",
    "lr=3": "did you mean --lr=3?",
    "--dim=wide": "--dim=wide: dim must be int, not 'wide'",
    "--dim=2.5": "dim must be int",
    "--dim=": "dim must be int, not ''",
    "--dim=True": "dim must be int",
    "--batch_size=inf": "batch_size must be int",
    "--batch_size=nan": "batch_size must be int",
    "--lr=fast": "lr must be float",
    "--recompute=perhaps": "recompute must be True or False",
    "--dim=0": "--dim=0: dim = 0 is out of range: at least 1",
    "--warmup_steps=-1": "at least 0",
    "--lr=-1e-3": "at least 0",
    "--fim_rate=1.5": "at most 1",
    "--seed=18446744073709551616": "seed = 18446744073709551616 is out of range: at most",
    "--lr=nan": "lr = nan is not a finite number",
    "--lr=inf": "lr = inf is not a finite number",
    "--rope_theta=-inf": "is not a finite number",
    "--device=tpu": "is not one of auto, cpu, cuda, mps",
    "--precision=fp16": "is not one of",
    "--balance_scope=token": "is not one of sequence, batch",
    "--qk_rope_head_dim=7": "must be even",
    "--n_dense_layers=5": "is more than n_layers = 4",
    "--n_expert_groups=3": "--n_expert_groups=3: n_expert_groups = 3 does not divide n_routed_experts = 16",
    "--n_expert_groups=4 --n_limited_groups=5": "n_limited_groups = 5 is more than n_expert_groups = 4",
    "--n_expert_groups=8 --n_activated_experts=3": "is more than the 2 experts in n_limited_groups = 1",
    "--n_activated_experts=17": "is more than the 16 experts",
    "--n_expert_groups=16 --n_limited_groups=16": "groups of one expert",
    "--max_seq_len=8": "is shorter than seq_len = 256",
    "--beta2=1": "must be below 1",
    "--ema_decay=1": "must be below 1",
    "--decay_start=9 --decay_end=5": "decay_start = 9 is after decay_end = 5",
    "--min_lr=1": "min_lr = 1.0 is more than lr",
    "--data=": "data = '' is empty",
}


@pytest.mark.parametrize("flags, says", BAD.items(), ids=BAD)
def test_a_mistake_on_the_command_line_is_named_with_its_remedy(flags, says, file):
    assert says in refused(file(BASE), *flags.split())


@pytest.mark.parametrize("name, near", [
    ("tiney", "tiny"), ("config/tine.py", "tiny"), ("v3_617b", "v3_671b"), ("xx", None), ("", None),
    ("configs/__init__.py", None), ("README.md", None), ("tests", None)])
def test_a_config_that_is_not_found_names_the_nearest_or_all_there_are(name, near):
    message = refused(name)
    assert repr(name) in message and "not found" in message
    assert f"did you mean {near!r}?" in message if near else all(path.stem in message for path in SHIPPED)


BAD_FILES = {
    "lr = 1e-3\nbatch_sise = 4": ":2: unknown key 'batch_sise'; did you mean 'batch_size'?",
    "\n\ndim = 'wide'": ":3: dim must be int, not 'wide'",
    "dim = 2.5": ":1: dim must be int",
    "dim = True": ":1: dim must be int",
    "dim = None": ":1: dim must be int",
    "lr = False": ":1: lr must be float",
    "data = 3": ":1: data must be str, not 3",
    "recompute = 2": ":1: recompute must be True or False, not 2",
    "dim = 0": ":1: dim = 0 is out of range",
    "dim = 10 ** 400": ":1: dim",
    "lr = 10 ** 400": ":1: lr must be float",
    "lr = 1e999": ":1: lr = inf is not a finite number",
    "lr = (-8) ** 0.5": ":1: lr must be float",
    "qk_rope_head_dim = 7": ":1: qk_rope_head_dim = 7 must be even",
    "import os": ":1: a config holds assignments only",
    "dim = 8\ndim += 8": ":2: a config holds assignments only",
    "dim = n_heads = 8": ":1: a config holds assignments only",
    "dim, n_heads = 8, 8": ":1: a config holds assignments only",
    "if True:\n dim = 8": ":1: a config holds assignments only",
    "print(1)": ":1: a config holds assignments only",
    "dim = open('x')": ":1: a value is a number",
    "dim = [8]": ":1: a value is a number",
    "dim = width + 1": ":1: a value is a number, a string, True/False or arithmetic on names above it",
    "dim = 8 << 2": ":1: a value is a number",
    "dim = 8 / 0": ":1: division by zero",
    "lr = 10.0 ** 400": ":1: ",
    "dim = 'a' - 1": ":1: unsupported operand",
    "dim = -'a'": ":1: bad operand",
    "dim = (": "not valid Python: ",
    "dim = 8 8": "line 1",
    b"dim = 8 # \xe9": "not valid Python: ",
    b"dim = 8\x00": "not valid Python: ",
}


@pytest.mark.parametrize("text, says", BAD_FILES.items(), ids=map(repr, BAD_FILES))
def test_a_mistake_in_a_file_is_named_with_its_line(text, says, file):
    message = refused(file(text))
    assert says in message and message.removeprefix("config ").startswith(file(text)), message


def test_a_file_is_parsed_and_never_executed(file, tmp_path):
    refused(file(f"data = __import__('pathlib').Path({str(tmp_path / 'ran')!r}).write_text('')"))
    assert not (tmp_path / "ran").exists()


def test_a_range_that_the_command_line_broke_is_not_blamed_on_the_file(file):
    mine = file("n_expert_groups = 4\nn_limited_groups = 4\n")
    assert refused(mine, "--n_limited_groups=5").startswith("--n_limited_groups=5: ")
    assert refused(mine, "--n_routed_experts=9").startswith(f"{mine}:1: n_expert_groups = 4 does not divide")


def call(capsys, monkeypatch, *argv):
    """(exit code, stdout, stderr) of python train.py, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as left:
        configs.cli(train.main)
    return left.value.code, *capsys.readouterr()


@pytest.mark.parametrize("argv, says", [
    ((), "python train.py config/tiny.py"), (("--lr=1",), "give a config first"), (("tiny", "--dimm=3"), "'dim'"),
    (("tiney",), "'tiny'"), (("tiny", "--lr=1\n2"), "lr must be float"), (("tiny", "--lr=nan", "--plan"), "finite")])
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(argv, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, monkeypatch, *argv)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv, says", [((), "give a config first"), (("bad.py",), "bad.py:1: division by zero"),
                                        (("tiny", "--batch_sise=4"), "did you mean 'batch_size'?")])
def test_a_mistake_in_a_real_process_leaves_no_traceback_and_no_file(argv, says, tmp_path):
    (tmp_path / "bad.py").write_text("dim = 1 / 0\n")
    done = subprocess.run([sys.executable, ROOT / "train.py", *argv], cwd=tmp_path, text=True, capture_output=True,
                          timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.py"]


def test_help_lists_every_field_with_its_default_its_meaning_and_its_choices(capsys, monkeypatch):
    for argv in (["--help"], ["-h"], ["tiny", "--lr=1e-3", "--help"]):
        code, out, err = call(capsys, monkeypatch, *argv)
        assert code == 0 and err == "" and usage("train.py") in out
    lines = out.splitlines()
    for f in FIELDS.values():
        line, = (line for line in lines if line.startswith(f"  --{f.name}={f.default} "))
        assert len(f.metadata["help"]) > 8 and f.metadata["help"] in line
        assert f"({', '.join(f.metadata['choices'] or ())})" in line or not f.metadata["choices"]
    assert all(path.stem in out for path in SHIPPED)


# --- V3's own schedule (section 4.2) ----------------------------------------------------------------------------------

def test_v3s_schedule_in_steps_is_the_reports_in_tokens():
    c = load(["v3_671b"])
    ramp = sum(batch_size_at(c, step) for step in range(c.batch_ramp)) * c.seq_len
    tokens = lambda step: ramp + (step - c.batch_ramp) * c.batch_size * c.seq_len       # a closed sum after the ramp
    assert tokens(c.batch_ramp) == pytest.approx(469e9, rel=1e-3)                       # "the first 469B tokens"
    assert batch_size_at(c, 0) == 3072 and batch_size_at(c, c.batch_ramp) == 15360
    assert tokens(c.decay_start) == pytest.approx(10e12, rel=1e-3)                      # constant until 10T
    assert tokens(c.decay_end) - tokens(c.decay_start) == pytest.approx(4.3e12, rel=1e-3)
    assert tokens(c.max_steps) == pytest.approx(14.8e12, rel=1e-3)
    final = next(step for step in range(c.decay_end, c.max_steps) if learning_rate(c, step) == c.final_lr)
    assert tokens(final) - tokens(c.decay_end) == pytest.approx(333e9, rel=2e-3)
    assert tokens(c.max_steps) - tokens(final) == pytest.approx(167e9, rel=3e-3)


def test_v3s_learning_rate_passes_the_reports_points():
    c = load(["v3_671b"])
    at = lambda step: learning_rate(c, step)
    assert at(0) == pytest.approx(2.2e-4 / 2000) and at(999) == pytest.approx(1.1e-4) and at(1999) == at(2000) == 2.2e-4
    assert at(c.decay_start - 1) == 2.2e-4 == at(c.decay_start)
    assert at((c.decay_start + c.decay_end) // 2) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-4)
    assert at(c.decay_end - 1) == pytest.approx(2.2e-5, rel=1e-6) and at(c.decay_end) == 2.2e-5
    assert at(c.max_steps - 1) == 7.3e-6
    decay = [at(step) for step in range(c.decay_start, c.decay_end, 100)]
    assert decay == sorted(decay, reverse=True)


def test_v3s_mtp_weight_falls_to_a_tenth_at_10t_tokens_and_the_bias_stops_for_the_last_500b():
    c = load(["v3_671b"])
    assert mtp_weight(c, 0) == mtp_weight(c, c.decay_start - 1) == 0.3
    assert mtp_weight(c, c.decay_start) == mtp_weight(c, c.max_steps - 1) == pytest.approx(0.1)
    assert bias_update_speed(c, 0) == bias_update_speed(c, c.decay_end - 1) == 0.001
    assert bias_update_speed(c, c.decay_end) == bias_update_speed(c, c.max_steps - 1) == 0
