"""Generation: sampling, the two forms of attention around the cache, text that streams whole, and the command."""
import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GROUPS, YARN, build, lively, random_tokens, save_tokenizer, tiny

import backend
import configs
import mla
import parallel
import sample
from configs import Config, UserError
from model import V3, arithmetic, official_tensors, save_hf
from tokenizer import get_tokenizer, special, tokenizer_json

ROOT = Path(__file__).resolve().parent.parent
BYTES = get_tokenizer("bytes")                                                     # 256 bytes and 4 special tokens
EOS = special(BYTES, "eos")


def prompts_of(*lengths):
    return [random_tokens(n, seed=n).tolist() for n in lengths]


def greedy(v3, prompts, n, **more):
    return sample.generate(v3, prompts, n, temperature=0, **more)


def save_run(out_dir, step=7, more=None, state=None, **changes):
    """A run's folder with a checkpoint of a random model on bytes; returns the model."""
    config = tiny(vocab_size=260, **changes)
    v3 = lively(V3(config)).eval()
    parallel.write_checkpoint(out_dir, step, parallel.copied({**official_tensors(v3), **(more or {})}),
                              {"config": {**dataclasses.asdict(config), **(state or {})}, "data": {}},
                              tokenizer_json(BYTES).decode())
    return v3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "tiny"
    save_run(folder)
    return folder


@pytest.fixture
def command(capsys, monkeypatch):
    """command("--top_k=5", ...) -> (exit code, stdout, stderr): python sample.py, in this process."""
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
        with pytest.raises(SystemExit) as left:
            configs.cli(sample.main)
        return left.value.code, *capsys.readouterr()
    return call


# --- sampling ---------------------------------------------------------------------------------------------------------

ROW = torch.tensor([0.1, 0.5, 0.05, 0.15, 0.2]).log()


def test_top_p_keeps_the_smallest_set_that_reaches_p_in_each_row_on_its_own():
    kept = lambda p, logits=ROW: sample.distribution(logits[None], 1.0, 0, p)[0].nonzero()[:, 0].tolist()
    assert kept(0.45) == kept(0.01) == [1]
    assert kept(0.65) == [1, 4]
    assert kept(0.75) == [1, 3, 4]
    assert kept(1.0) == [0, 1, 2, 3, 4]
    flat = torch.zeros(5)
    both = sample.distribution(torch.stack([ROW, flat]), 1.0, 0, 0.65)
    torch.testing.assert_close(both[0], torch.tensor([0, 5 / 7, 0, 0, 2 / 7]))
    assert (both[1] > 0).sum() == 4                                                     # 3/5 < 0.65 <= 4/5


def test_top_k_comes_first_and_top_p_cuts_what_it_left():
    torch.testing.assert_close(sample.distribution(ROW[None], 1.0, 2, 1.0)[0], torch.tensor([0, 5 / 7, 0, 0, 2 / 7]))
    assert sample.distribution(ROW[None], 1.0, 2, 0.7)[0].tolist() == [0, 1, 0, 0, 0]           # 5/7 > 0.7
    torch.testing.assert_close(sample.distribution(ROW[None], 1.0, 99, 1.0)[0], ROW.exp())


def test_top_k_of_one_and_temperature_zero_take_the_likeliest_token():
    logits = torch.randn(50, 61, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample.sample_token(logits, 0), logits.argmax(1))
    assert torch.equal(sample.sample_token(logits, 5.0, top_k=1), logits.argmax(1))
    assert torch.equal(sample.sample_token(logits, 1e-38), logits.argmax(1))           # no overflow


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_tempered_softmax(temperature):
    draws, logits = 8000, torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4])
    generator = torch.Generator().manual_seed(1)
    tokens = sample.sample_token(logits.expand(draws, -1), temperature, 0, 1.0, generator)
    expected = (logits / temperature).exp() / (logits / temperature).exp().sum() * draws
    chi2 = ((torch.bincount(tokens, minlength=6) - expected) ** 2 / expected).sum().item()
    print(f"chi-square {chi2:.1f} with 5 degrees of freedom")
    assert chi2 < 20.5                                 # exceeded once in a thousand seeds


# --- generation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [dict(), dict(q_lora_rank=14, **YARN), GROUPS],
                         ids=["q direct", "q latent, YaRN", "expert groups"])
def test_greedy_generation_with_the_cache_is_recomputing_the_whole_sequence_for_every_token(changes):
    v3 = build(**changes).eval()
    tokens = prompts_of(5)[0]
    for _ in range(20):
        with torch.no_grad():
            tokens = tokens + [int(v3(torch.tensor([tokens]))[0, -1].argmax())]
    assert greedy(v3, [tokens[:5]], 20)[0] == tokens[5:]


def test_prefill_is_naive_and_every_token_after_it_is_absorbed(monkeypatch):
    v3, calls = build().eval(), []
    for form in ("attention", "decode"):
        original = getattr(mla, form)
        monkeypatch.setattr(mla, form, lambda q, *rest, form=form, original=original:
                            calls.append((form, q.shape[1])) or original(q, *rest))
    greedy(v3, prompts_of(5), 3)
    assert calls == [("attention", 5)] * 3 + [("decode", 1)] * 6                        # 3 layers


def test_a_batch_of_ragged_prompts_gives_what_each_prompt_gives_alone():
    v3, prompts = build().eval(), prompts_of(3, 11, 1, 6)
    assert greedy(v3, prompts, 15) == [greedy(v3, [p], 15)[0] for p in prompts]


def test_a_row_ends_at_end_of_text_which_it_keeps_to_itself_and_the_others_go_on():
    v3, prompts, heard = build().eval(), prompts_of(3, 7, 5), [[], [], []]
    free = greedy(v3, prompts, 12)
    eos = next(token for token in free[0][3:] if token not in free[1])                  # ends row 0 and not row 1
    ended = greedy(v3, prompts, 12, eos=eos, on_token=lambda row, token: heard[row].append(token))
    assert ended == [row[:row.index(eos)] if eos in row else row for row in free] == heard
    assert len(ended[0]) < 12 == len(ended[1])


def test_nothing_is_computed_once_every_row_has_ended(monkeypatch):
    v3 = build().eval()
    steps, logits = [], V3.logits
    monkeypatch.setattr(V3, "logits", lambda self, h: steps.append(h.shape) or logits(self, h))
    first = greedy(v3, prompts_of(4), 1)[0][0]
    assert greedy(v3, prompts_of(4), 20, eos=first) == [[]]
    assert steps == [(1, 32), (1, 32)]                 # one step each, and the head sees the last position only


def test_the_same_seed_gives_the_same_tokens_and_another_seed_gives_others():
    v3, prompts = build().eval(), prompts_of(3, 5)
    draw = lambda seed: sample.generate(v3, prompts, 12, generator=torch.Generator().manual_seed(seed))
    assert draw(1) == draw(1) != draw(2)


def test_generation_ends_with_the_context_and_a_longer_prompt_is_refused():
    v3 = build().eval()                                                                 # a context of 32 tokens
    assert [len(greedy(v3, prompts_of(n), 50)[0]) for n in (1, 30, 32)] == [32, 3, 1]
    assert len(greedy(v3, prompts_of(30, 4), 50)[1]) == 3
    with pytest.raises(UserError, match="33 tokens.* at most 32.*seq_len"):
        greedy(v3, prompts_of(33), 5)


def test_an_empty_prompt_and_a_model_in_training_mode_are_refused():
    with pytest.raises(ValueError, match="empty"):
        greedy(build().eval(), [[3], []], 5)
    with pytest.raises(ValueError, match="eval"):
        greedy(build().train(), [[3]], 5)


# --- text -------------------------------------------------------------------------------------------------------------

TEXT = "naïve 日本語 🙂 e\u0301"


def test_characters_arrive_whole_and_half_of_one_is_never_shown():
    next_token = sample.characters(BYTES)
    pieces = [next_token(token) for token in BYTES.encode_ordinary(TEXT + "🙂")[:-1]]
    assert "".join(pieces) == TEXT and "\ufffd" not in "".join(pieces)
    assert sample.characters(BYTES)(999) == "\ufffd"                                    # an id that is no token


def test_a_prompt_starts_a_document_and_special_tokens_in_it_are_plain_text():
    assert sample.encode(BYTES, "ab") == [EOS, 97, 98]
    assert sample.encode(BYTES, "") == [EOS]
    assert sample.encode(BYTES, "<|eos_token|>").count(EOS) == 1
    deepseek = type(BYTES)("t", pat_str=BYTES._pat_str, mergeable_ranks=BYTES._mergeable_ranks,
                           special_tokens={"<｜begin▁of▁sentence｜>": 256, "<｜end▁of▁sentence｜>": 257})
    assert sample.encode(deepseek, "a") == [256, 97]


def test_filling_in_the_middle_puts_prefix_and_suffix_in_the_order_of_training():
    begin, hole, end = (special(BYTES, f"fim_{part}") for part in ("begin", "hole", "end"))
    assert sample.encode(BYTES, "ab", "c") == [EOS, begin, 97, 98, hole, 99, end]
    plain = type(BYTES)("t", pat_str=BYTES._pat_str, mergeable_ranks=BYTES._mergeable_ranks, special_tokens={})
    with pytest.raises(UserError, match="--suffix"):
        sample.encode(plain, "ab", "c")
    with pytest.raises(UserError, match="--prompt is empty"):
        sample.encode(plain, "")


# --- folders ----------------------------------------------------------------------------------------------------------

def test_load_gives_the_model_of_a_run_of_one_checkpoint_and_of_a_hugging_face_folder(tmp_path):
    save_run(tmp_path / "run", 3, seed=1)
    v3 = save_run(tmp_path / "run", 5, seed=2)
    save_hf(v3, tmp_path / "hf")
    save_tokenizer(BYTES, tmp_path / "hf")
    for folder, step in (("run", "5 of"), ("run/step_00000005", "5 of"), ("run/step_00000003", "3 of"), ("hf", "hf")):
        found, tokenizer, what = sample.load(tmp_path / folder, "cpu")
        same = all(torch.equal(t, found.state_dict()[name]) for name, t in v3.state_dict().items())
        assert not found.training and tokenizer.n_vocab == 260 and step in what
        assert same == ("3" not in folder)


def test_where_a_run_ran_and_what_another_version_wrote_are_no_part_of_the_model(tmp_path):
    save_run(tmp_path, state={"device": "cuda", "resume": True, "recompute": True, "pipeline_of_tomorrow": 3})
    config = sample.look(tmp_path)[1]
    assert config == tiny(vocab_size=260)
    assert config.device == Config().device


def test_ema_samples_from_the_averaged_weights_and_the_runs_own_gate_biases(tmp_path):
    averages = {f"ema/{name}": t + 1 for name, t in official_tensors(V3(tiny(vocab_size=260))).items()
                if not name.endswith("_bias")}
    v3 = save_run(tmp_path, more=averages, ema_decay=0.9)
    found, _, what = sample.load(tmp_path, "cpu", ema=True)
    assert "averaged" in what
    for name, tensor in official_tensors(found).items():
        assert torch.equal(tensor, averages.get(f"ema/{name}", official_tensors(v3)[name]))


def test_a_bf16_model_keeps_one_copy_of_its_matrices_and_the_same_bits(tmp_path, monkeypatch):
    v3 = save_run(tmp_path, precision="bf16")
    for native in (True, False):
        monkeypatch.setattr(backend, "native_bf16", lambda: native)
        found, tokens = sample.load(tmp_path, "cpu")[0], random_tokens(2, 9)
        assert found.config.precision == ("bf16" if native else "fp32")
        assert found.layers[1].ffn.w13.dtype == (torch.bfloat16 if native else torch.float32)
        assert found.layers[1].ffn.gate.weight.dtype == found.layers[1].ffn.gate.bias.dtype == torch.float32
        assert torch.equal(found(tokens), v3(tokens)) == native
        greedy(found, prompts_of(3), 4)


# --- the command ------------------------------------------------------------------------------------------------------

def test_the_command_prints_the_document_and_one_line_on_what_it_took(run, command):
    code, out, err = command(f"--out_dir={run}", "--prompt=ab", "--max_tokens=9", "--seed=3")
    assert code == 0 and out.startswith("ab") and err.count("\n") == 1
    v3 = sample.load(run, "cpu")[0]
    per_token = 3 * (16 + 10) * 4                      # layers * (r_kv + d_r) * float32
    assert "[9 tokens in " in err and "tokens/s" in err and "trained for 7 of 1000 steps" in err
    assert f"{per_token:,} bytes a token, {per_token * (3 + 9) / 1e6:.2f} MB in all" in err
    assert f"{arithmetic(v3.config)['total'] / 1e6:.2f}M parameters" in err
    assert command(f"--out_dir={run}", "--prompt=ab", "--max_tokens=9", "--seed=3", "--stream=False")[1] == out
    assert command(f"--out_dir={run}", "--prompt=ab", "--max_tokens=9", "--seed=4")[1] != out


def test_several_prompts_and_samples_are_one_batch(run, command):
    code, out, err = command(f"--out_dir={run}", "--prompt=ab", "--prompt=", "--num_samples=2", "--max_tokens=4")
    assert code == 0 and "[16 tokens" in err
    assert [f"--- {i} of 4 ---" in out for i in (1, 2, 3, 4)] == [True] * 4 and out.count(" ---\nab") == 2


def test_the_last_line_says_when_the_context_was_shorter_than_what_was_asked(run, command):
    code, out, err = command(f"--out_dir={run}", "--prompt=" + 27 * "a", "--temperature=0")  # with eos: 28 of 32 tokens
    assert code == 0 and "[5 tokens" in err and "context of 32 tokens had room for 5 new ones, not 200" in err


def test_the_middle_is_printed_between_prompt_and_suffix(run, command):
    code, out, err = command(f"--out_dir={run}", "--prompt=ab", "--suffix=yz", "--max_tokens=5")
    assert code == 0 and out.startswith("ab") and out.endswith("yz\n") and len(out) > 5


def test_streamed_text_grows_by_whole_characters(run, command, capsys, monkeypatch):
    shown = []

    def generate(v3, prompts, max_tokens, *sampling, **drafting):
        for token in BYTES.encode_ordinary(TEXT):
            sampling[-1](0, token)
            shown.append(capsys.readouterr().out)
    monkeypatch.setattr(sample, "generate", generate)
    command(f"--out_dir={run}", "--prompt=>")
    assert "".join(shown) == ">" + TEXT and shown.count("") == len(TEXT.encode()) - len(TEXT)


def test_speculation_writes_the_same_text_and_says_what_it_was_worth(run, command):
    argv = f"--out_dir={run}", "--prompt=ab", "--prompt=xyz", "--max_tokens=20", "--temperature=0"
    code, out, err = command(*argv, "--speculate=2")
    assert code == 0 and out == command(*argv)[1] and "drafts" not in command(*argv)[2]
    said = re.search(r"(\d+)% of the drafts accepted, (\d.\d\d) tokens per forward pass", err)
    assert abs(float(said[2]) - (1 + 2 * int(said[1]) / 100)) < 0.02
    assert f"{4 * (16 + 10) * 4:,} bytes a token" in err                                # 3 layers and the MTP module's
    assert command(f"--out_dir={run}", "--speculate=3", "--seed=5", "--stream=False")[0] == 0


def test_a_model_without_an_mtp_module_is_not_asked_to_speculate(tmp_path, command, monkeypatch):
    save_run(tmp_path, n_mtp=0)
    monkeypatch.setattr(sample, "weights", None)
    code, out, err = command(f"--out_dir={tmp_path}", "--speculate=1")
    assert code == 2 and not out and err.count("\n") == 1 and "--speculate" in err and "n_mtp is 0" in err


def test_a_batch_that_memory_cannot_hold_is_refused_with_the_knob_to_turn(run, command, monkeypatch):
    per_row = 3 * (16 + 10) * 4 * (3 + 20) + 6 * 4 * 260                                # latents, and some logits
    argv = f"--out_dir={run}", "--prompt=ab", "--max_tokens=20"
    monkeypatch.setattr(backend, "free_memory", lambda device: 10 * per_row)
    assert command(*argv, "--num_samples=10")[0] == 0
    code, out, err = command(*argv, "--num_samples=11")
    assert code == 2 and not out and err.count("\n") == 1 and "11 sequences of 23 tokens" in err
    assert "--num_samples or --max_tokens" in err
    assert command(*argv, "--num_samples=10", "--speculate=1")[0] == 2
    monkeypatch.undo()
    assert command(*argv, "--num_samples=1000000000000")[0] == 2 or backend.free_memory(torch.device("cpu")) is None


BAD = {
    "--speculate=9": "at most 8",
    "--max_token=3": "did you mean --max_tokens?",
    "out/tiny": "--key=value",
    "--prompt": "write --prompt=VALUE",
    "--max_tokens=many": "max_tokens must be int, not 'many'",
    "--stream=perhaps": "must be True or False",
    "--max_tokens=0": "at least 1",
    "--num_samples=-1": "at least 1",
    "--temperature=-0.5": "at least 0",
    "--temperature=nan": "out of range",
    "--top_p=0": "--temperature=0",
    "--top_p=1.5": "at most 1",
    "--top_k=-1": "at least 0",
    "--device=tpu": "auto, cpu, cuda, mps",
    "--prompt=" + "a" * 40: "41 tokens, this model reads at most 32",
    "--ema": "ema_decay",
    "--out_dir=nowhere": "nowhere: no checkpoint there",
    "--out_dir=tests": "tests: no checkpoint there",
}


@pytest.mark.parametrize("flag, says", BAD.items(), ids=[flag[:24] for flag in BAD])
def test_a_mistake_is_one_line_and_exit_code_2_before_any_weights_are_read(flag, says, run, command, monkeypatch):
    monkeypatch.setattr(sample, "weights", None)
    code, out, err = command(f"--out_dir={run}", flag)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err and not out, err


def test_suffix_is_refused_for_a_model_that_never_filled_a_hole_and_for_interactive_use(tmp_path, run, command):
    save_run(tmp_path, fim_rate=0.0)
    assert "fim_rate 0" in command(f"--out_dir={tmp_path}", "--suffix=x")[2]
    assert "--interactive" in command(f"--out_dir={run}", "--suffix=x", "--interactive")[2]


def test_a_folder_without_its_tokenizer_or_with_anothers_is_refused(tmp_path, command):
    v3 = V3(tiny(vocab_size=250))
    save_hf(v3, tmp_path / "hf")
    assert "no tokenizer.json there" in command(f"--out_dir={tmp_path / 'hf'}")[2]
    save_tokenizer(BYTES, tmp_path / "hf")
    code, _, err = command(f"--out_dir={tmp_path / 'hf'}")
    assert code == 2 and "260 tokens, the model only 250" in err


def test_a_damaged_checkpoint_is_refused(tmp_path, command):
    save_run(tmp_path)
    file = tmp_path / "step_00000007" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, err = command(f"--out_dir={tmp_path}")
    assert code == 2 and err.count("\n") == 1 and "truncated" in err


def test_help_lists_every_flag_with_its_default(command):
    code, out, _ = command("--help")
    flags = [f.name for f in dataclasses.fields(sample.Options)]
    assert code == 0 and all(f"--{name}=" in out for name in flags) and "--top_p=0.95 " in out


def process(*argv, **more):
    return subprocess.Popen([sys.executable, ROOT / "sample.py", *argv], text=True, encoding="utf-8", errors="replace",
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def test_python_sample_py_alone_samples_from_out_tiny_or_says_how_to_make_it(tmp_path):
    first = process(cwd=tmp_path)
    out, err = first.communicate(timeout=60)
    assert (first.returncode, out, err.count("\n")) == (2, "", 1) and "python train.py config/tiny.py" in err
    save_run(tmp_path / "out" / "tiny")
    second = process(cwd=tmp_path)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and out.startswith("def") and "tokens/s" in err, err


def test_a_conversation_survives_a_prompt_that_is_too_long_and_ends_with_an_empty_line(run):
    p = process("--interactive", f"--out_dir={run}", "--max_tokens=5")
    out, err = p.communicate("ab\n" + "a" * 40 + "\ncd\n\nnever\n", timeout=60)
    assert p.returncode == 0 and out.startswith("> ab") and "\n> > cd" in out and "never" not in out
    assert err.count("tokens/s") == 2 and err.count("error:") == 1 and "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="a process on Windows gets no SIGINT from outside")
def test_ctrl_c_stops_the_stream_and_leaves_with_130(tmp_path):
    save_run(tmp_path, seq_len=20000)
    p = process(f"--out_dir={tmp_path}", "--prompt=ab", "--max_tokens=20000", "--temperature=0")
    assert p.stdout.read(4)[:2] == "ab"                                                 # it has begun to stream
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "tokens/s" in err and "Traceback" not in err, err
