"""data.py: the text of a run, its tokens, and which of them make the batch of a step. No network."""
import functools
import http.server
import json
import math
import random
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import requests
import tiktoken
import torch
from conftest import save_tokenizer

import data
from configs import Config, UserError
from data import Data
from tokenizer import (
    DEEPSEEK_V3,
    OURS,
    PATTERN,
    SPECIAL,
    get_tokenizer,
    last_merge,
    load_tokenizer,
    special,
    tokenizer_json,
    train_bpe,
)

SOURCE = Path(data.__file__).read_text(encoding="utf-8")
# Where pre-tokenizers and their imitations part: runs of blanks before digits and words, scripts that meet, characters
# that are neither letter nor mark nor white space.
TRICKY = list("ab é1 2  \n\r\t.,(_:'ー中文あア・゠゛𠮷①½٣"
              "👩\u200d💻\u0301\ufe0f\x1b\x07\u3040|^~`\u2028\xa0\u00ad가")
TEXTS = ["def f(x):\n    return x.append(12345)  # é\n", "It's 10 o'clock,  isn't it?\r\n\r\n",
         "   12 中文abc、あア・イ 　12",
         "👩\u200d💻 naïve \x1b[0m\x07", "<|eos_token|> is text here"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOV3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@functools.cache
def small_bpe():
    return train_bpe([SOURCE, *TEXTS * 3], 700)


def folder(path, documents):
    for name, text in documents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def numbered(path, count=40):
    """A folder of short documents that all differ."""
    return folder(path, {f"{i:02d}.txt": f"document {i}:\n" + "".join(f"  line {i}.{j};\n" for j in range(i % 7 + 3))
                         for i in range(count)})


def config(source, **changes):
    return Config(**{**dict(data=str(source), tokenizer="bytes", vocab_size=300, seq_len=16, n_mtp=2, fim_rate=0.0,
                            batch_size=6), **changes})


def text_of(encoding, ids):
    """Ids decoded, special tokens by their names."""
    return encoding.decode([int(i) for i in ids])


def split_stream(encoding, ids):
    """The documents of a packed stream, each without its eos."""
    ids, eos = np.asarray(ids), special(encoding, "eos")
    ends = np.flatnonzero(ids == eos)
    return [ids[a:b] for a, b in zip([0, *ends + 1], ends)]


# --- the corpus -------------------------------------------------------------------------------------------------------

def test_the_standard_library_is_sources_and_reference_without_tests_or_vendored_packages():
    docs = data.documents("stdlib")
    names = [name for name, _ in docs]
    assert names == sorted(set(names)) and 5e6 < sum(len(text) for _, text in docs) < 3e7
    assert {"argparse.py", "json/decoder.py", "reference/for.txt"} <= set(names)
    assert not any(part in data.NOT_STDLIB for name in names for part in name.split("/"))
    assert not any("generated from 'MAPPINGS" in text[:200] for _, text in docs)         # the encodings' tables
    assert not any(name.startswith(("pydoc_data/topics", "_sysconfigdata")) for name in names)
    train, val = data.split(docs)
    assert sorted(train + val) == docs and 0.05 < sum(len(t) for _, t in val) / sum(len(t) for _, t in docs) < 0.15


def test_a_folder_gives_every_file_by_its_name_and_leaves_hidden_and_empty_ones_out(tmp_path):
    source = folder(tmp_path / "d", {"b.txt": "B", "a/z.md": "Z", ".git/config": "no", "a/.hidden": "no", "empty": ""})
    assert data.documents(source) == [("a/z.md", "Z"), ("b.txt", "B")]


def test_a_single_file_is_cut_at_nine_tenths_of_its_characters_and_keeps_every_byte(tmp_path):
    text = "é中👩x\r\n" * 33
    source = folder(tmp_path, {"book.txt": text})
    (train,), (val,) = data.split(data.documents(str(Path(source, "book.txt"))))
    assert train[1] + val[1] == text and len(train[1]) == len(text) * 9 // 10


def test_a_document_keeps_its_side_when_others_are_added():
    many = [(f"{i}.py", "text") for i in range(500)]
    few = many[::7]
    sides = {name: side for side, docs in enumerate(data.split(many)) for name, _ in docs}
    assert all(sides[name] == side for side, docs in enumerate(data.split(few)) for name, _ in docs)
    assert 25 < sum(sides.values()) < 80


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_however_few_the_documents_both_sides_get_one(count):
    docs = [(str(i), "text") for i in range(count)]
    train, val = data.split(docs)
    assert train and val and sorted(train + val) == docs


# --- what a user gets wrong -------------------------------------------------------------------------------------------

NINES = {"x.txt": "x" * 99}
WRONG = {  # the files there are, the config, what the message must say
    "a path that is not there": ({}, dict(source="no/such.txt"), "no/such.txt"),
    "a misspelt name": ({}, dict(source="stdlibb"), "did you mean 'stdlib'"),
    "an empty file": ({"x.txt": ""}, dict(source="x.txt"), "x.txt: empty"),
    "a folder without files": ({"d/.hidden": "x"}, dict(source="d"), "data d: empty"),
    "a file not UTF-8": ({"d/ok": "a", "d/b.txt": b"caf\xe9"}, dict(source="d"), "b.txt: not UTF-8 at byte offset 3"),
    "a binary file": ({"d/ok": "a", "d/x.bin": b"ab\0\0"}, dict(source="d"), "x.bin: a NUL byte at byte offset 2"),
    "too little text": ({"x.txt": "y" * 30}, dict(seq_len=26), "28 training tokens; seq_len = 26 needs 29"),
    "too little text for a bpe": ({"x.txt": "ab ab ab " * 9}, dict(tokenizer="bpe", vocab_size=999), "--vocab_size=26"),
    "a misspelt tokenizer": (NINES, dict(tokenizer="gpt22"), "did you mean 'gpt2'"),
    "a tokenizer that is not there": (NINES, dict(tokenizer="no/tokenizer.json"), "'no/tokenizer.json'"),
    "a folder without a tokenizer": ({**NINES, "hf/config.json": "{}"}, dict(tokenizer="hf"), "hf/tokenizer.json"),
    "a vocabulary smaller than the tokenizer's": (NINES, dict(vocab_size=259), "--vocab_size=260"),
    "a vocabulary too small for any bpe": (NINES, dict(tokenizer="bpe", vocab_size=9), "--vocab_size=260"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_gets_one_line_that_names_it_and_nothing_is_written(mistake, tmp_path, monkeypatch, cache):
    files, changes, words = WRONG[mistake]
    folder(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        Data(config(**{"source": "x.txt", **changes}))
    assert words in str(e.value) and "\n" not in str(e.value) and not cache.exists()


def test_a_tokenizer_without_eos_or_fim_tokens_is_refused_with_the_remedy(tmp_path):
    source = numbered(tmp_path / "d")
    ranks = {bytes([b]): b for b in range(256)}
    for specials, words in (({}, "<|endoftext|>"), ({"<|endoftext|>": 256}, "--fim_rate=0")):
        encoding = tiktoken.Encoding("x", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=specials)
        save_tokenizer(encoding, tmp_path / "tokenizer.json")
        with pytest.raises(UserError, match=words):
            Data(config(source, tokenizer=str(tmp_path / "tokenizer.json"), fim_rate=0.5))
    assert len(Data(config(source, tokenizer=str(tmp_path / "tokenizer.json"))).train)


# --- sets that are downloaded -----------------------------------------------------------------------------------------

@pytest.fixture
def server(monkeypatch):
    """A local web server: server[path] = bytes to send, or an error code; server["seen"] lists the requests."""
    pages = {"seen": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            pages["seen"].append(self.path)
            page = pages.get(self.path, 404)
            self.send_response(200 if isinstance(page, bytes) else page)
            self.end_headers()
            self.wfile.write(page if isinstance(page, bytes) else b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        root = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(data, "URLS", {"shakespeare": f"{root}/input.txt", "fineweb": f"{root}/rows?offset="})
        yield pages
        httpd.shutdown()


def test_shakespeare_is_downloaded_once_and_a_local_path_of_that_name_wins(server, tmp_path, monkeypatch):
    server["/input.txt"] = b"First Citizen:\nSpeak, speak.\n"
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert data.documents("shakespeare") == [("shakespeare", "First Citizen:\nSpeak, speak.\n")]
    assert server["seen"] == ["/input.txt"]
    folder(tmp_path, {"shakespeare": "mine"})
    assert data.documents("shakespeare") == [("shakespeare", "mine")]


def test_fineweb_comes_in_pages_until_there_is_enough_and_cut_rows_are_left_out(server, monkeypatch):
    def page(offset):
        rows = [{"row_idx": i, "row": {"text": f"row {i} é"}, "truncated_cells": ["text"] * (i == 3)}
                for i in range(offset, offset + 4)]
        return json.dumps({"rows": rows}).encode()

    server.update({"/rows?offset=0": page(0), "/rows?offset=4": page(4), "/rows?offset=8": page(8)})
    monkeypatch.setattr(data, "FINEWEB_BYTES", 40)
    assert [name for name, _ in data.documents("fineweb")] == [f"fineweb/{i:06d}" for i in (0, 1, 2, 4, 5, 6, 7)]
    assert server["seen"] == ["/rows?offset=0", "/rows?offset=4"]


@pytest.mark.parametrize("name", ["shakespeare", "fineweb"])
def test_without_a_network_a_named_set_says_so_and_what_else_there_is(name, server, monkeypatch, cache):
    for url in (data.URLS[name], "http://127.0.0.1:9/nobody"):                          # not found; nobody there
        monkeypatch.setitem(data.URLS, name, url)
        with pytest.raises(UserError) as e:
            data.documents(name)
        assert all(words in str(e.value) for words in (f"data {name}: needs a network", "--data=PATH")), e.value
        assert "\n" not in str(e.value) and not cache.exists()


# --- tokenizers -------------------------------------------------------------------------------------------------------

def obvious_bpe(text, vocab_size):
    """Merges one after the other, each after a count of the whole text."""
    words = [list(piece.encode()) for piece in regex.findall(PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 4:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            for j in range(len(word)):
                if word[j:j + 2] == [a, b]:
                    word[j:j + 2] = [len(tokens)]
        tokens.append(tokens[a] + tokens[b])
    return tokens


RUNS = " aaaa aaaaaaa aab" * 5


@pytest.mark.parametrize("text, vocab_size", [(SOURCE[:6000], 400), ("".join(TEXTS) * 3, 300), (RUNS, 266)],
                         ids=["source", "many scripts", "runs"])
def test_the_fast_trainer_finds_the_merges_of_the_obvious_one(text, vocab_size):
    encoding = train_bpe([text], vocab_size)
    assert encoding.n_vocab == vocab_size
    assert sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get) == obvious_bpe(text, vocab_size)


def test_bpe_depends_on_the_text_alone_not_on_the_order_of_the_documents():
    parts = SOURCE[:9000].split("\n\n")
    there, back = train_bpe(parts, 500), train_bpe(parts[::-1], 500)
    assert data.fingerprint(there) == data.fingerprint(back)


def test_the_largest_vocabulary_that_the_message_names_can_be_had():
    with pytest.raises(UserError) as e:
        train_bpe([SOURCE[:3000]], 4096)
    most = int(regex.search(r"--vocab_size=(\d+)", str(e.value))[1])
    assert train_bpe([SOURCE[:3000]], most).n_vocab == most
    with pytest.raises(UserError, match="--vocab_size=262 "):
        train_bpe([" ab ab cd"], 263)                                              # " a", " ab"; "cd" only once


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_any_text_and_any_bytes_come_back(name):
    encoding = small_bpe() if name == "bpe" else get_tokenizer("bytes")
    every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert encoding.decode(encoding.encode_ordinary(every)) == every
    assert all(encoding.decode_single_token_bytes(b) == bytes([b]) for b in range(256))
    noise = random.Random(0).randbytes(1000)                                            # mostly invalid UTF-8
    assert encoding.decode_bytes([encoding.encode_single_token(bytes([b])) for b in noise]) == noise


def test_pieces_are_the_ones_that_the_pre_tokenizer_promises():
    text = "def f(self, x):\n        return x.append(12345)\n\n\nclass A:  # é_name\n"
    assert regex.findall(PATTERN, text) == [
        "def", " f", "(self", ",", " x", "):\n       ", " return", " x", ".append", "(", "123", "45", ")\n\n\n",
        "class", " A", ":", " ", " #", " é", "_name", "\n"]


def test_the_special_tokens_are_the_reports_and_are_never_read_from_text():
    for encoding in (get_tokenizer("bytes"), small_bpe()):
        ids = [special(encoding, name) for name in ("eos", "fim_begin", "fim_hole", "fim_end")]
        assert encoding.decode(ids) == "<|eos_token|><|fim_begin|><|fim_hole|><|fim_end|>"
        assert ids == list(range(encoding.n_vocab - 4, encoding.n_vocab))
        assert not set(ids) & set(encoding.encode_ordinary("<|eos_token|>"))


def test_a_tiktoken_encoding_keeps_its_ids_and_gets_our_special_tokens_behind_them(monkeypatch):
    base = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks={bytes([b]): b for b in range(256)},
                             special_tokens={"<|endoftext|>": 256, "<|fim_hole|>": 300})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": base}.get)
    encoding = get_tokenizer("gpt2")
    assert [special(encoding, name) for name in SPECIAL] == [301, 302, 300, 303] and encoding.n_vocab == 304
    assert encoding.encode_ordinary("hello") == base.encode_ordinary("hello")


def test_a_tiktoken_encoding_that_cannot_be_downloaded_is_one_line(monkeypatch):
    def unreachable(name):
        raise requests.exceptions.ConnectionError("no\nroute")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(UserError, match="tokenizer cl100k_base: .*no route.*--tokenizer=bpe"):
        get_tokenizer("cl100k_base")


# --- tokenizer.json ---------------------------------------------------------------------------------------------------

def deepseek_file(encoding, stages=DEEPSEEK_V3, use_regex=False, merge_text=True):
    """A tokenizer.json as DeepSeek-V3's is made: three special tokens first, others last, several Splits in turn."""
    file = json.loads(tokenizer_json(encoding))
    first, last = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"], \
                  ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
    ordinary = [t for t in file["model"]["vocab"] if t not in OURS]
    ids = {t: i for i, t in enumerate(first + ordinary + last)}
    file["added_tokens"] = [{**file["added_tokens"][0], "content": t, "id": ids[t]} for t in first + last]
    file["normalizer"] = {"type": "Sequence", "normalizers": []}
    file["pre_tokenizer"]["pretokenizers"] = [
        *({"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in stages),
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}]
    file["model"] = {**file["model"], "ignore_merges": False, "vocab": {t: ids[t] for t in first + ordinary},
                     "merges": [" ".join(m) if merge_text else m for m in file["model"]["merges"]]}
    return file


def real_line_breaks(stages):
    return [s.replace(r"\r", "\r").replace(r"\n", "\n") for s in stages]


FILES = {"ours": lambda e: json.loads(tokenizer_json(e)),
         "bytes": lambda e: json.loads(tokenizer_json(get_tokenizer("bytes"))),
         "DeepSeek-V3": deepseek_file,
         "DeepSeek-V3, respelt": lambda e: deepseek_file(e, real_line_breaks(DEEPSEEK_V3), merge_text=False),
         "GPT-2": lambda e: deepseek_file(e, [], use_regex=True)}


@pytest.mark.parametrize("kind", FILES)
def test_a_tokenizer_file_that_is_read_and_written_again_gives_the_same_ids(kind, tmp_path):
    folder(tmp_path, {"a.json": json.dumps(FILES[kind](small_bpe())), "hf/config.json": "{}"})
    once = load_tokenizer(tmp_path / "a.json")
    save_tokenizer(once, tmp_path / "hf")
    assert data.fingerprint(load_tokenizer(tmp_path / "hf")) == data.fingerprint(once)
    for text in TEXTS:
        assert once.decode(once.encode_ordinary(text)) == text


def test_what_was_trained_and_what_is_loaded_again_are_the_same_encoding(tmp_path):
    save_tokenizer(small_bpe(), tmp_path / "t.json")
    assert data.fingerprint(load_tokenizer(tmp_path / "t.json")) == data.fingerprint(small_bpe())


def test_a_token_that_no_merge_makes_is_written_without_one():
    ranks = {**{bytes([b]): b for b in range(256)}, b"abcd": 256, b"ab": 257, b"cd": 258, b"abc": 259}
    assert [last_merge(token, ranks) for token in (b"abcd", b"ab", b"abc")] == [None, [b"a", b"b"], [b"ab", b"c"]]


def test_deepseeks_special_tokens_are_known_by_their_names(tmp_path):
    folder(tmp_path, {"t.json": json.dumps(deepseek_file(small_bpe()))})
    encoding = load_tokenizer(tmp_path / "t.json")
    n = encoding.n_vocab
    assert [special(encoding, name) for name in ("eos", "fim_hole", "fim_begin", "fim_end")] == [1, n - 3, n - 2, n - 1]


@pytest.mark.extra
@pytest.mark.parametrize("kind", FILES)
def test_hugging_faces_tokenizers_gives_the_same_ids(kind, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r requirements-extra.txt")
    chance = random.Random(0)
    texts = [*TEXTS, SOURCE, *("".join(chance.choices(TRICKY, k=chance.randrange(1, 40))) for _ in range(1000))]
    encoding = train_bpe([SOURCE, *texts[len(TEXTS) + 1:]], 1500)                  # merges across the odd places
    folder(tmp_path, {"theirs.json": json.dumps(FILES[kind](encoding))})
    ours = load_tokenizer(tmp_path / "theirs.json")
    save_tokenizer(ours, tmp_path / "ours.json")
    for path in ("theirs.json", "ours.json"):
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / path))
        assert all(theirs.token_to_id(s) == i for s, i in ours._special_tokens.items())
        for text in texts:
            assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text, allowed_special="all"), text


BROKEN = {"not JSON": (lambda f: None, "not a tokenizer.json"),
          "no model": (lambda f: f.pop("model"), "not a tokenizer.json"),
          "another model": (lambda f: f["model"].update(type="Unigram"), "a Unigram model, not BPE"),
          "merges out of order": (lambda f: f["model"]["merges"].reverse(), "not in the order of their ids"),
          "a merge into nothing": (lambda f: f["model"]["merges"].append(["Q", "Q"]), "not a tokenizer.json"),
          "a missing byte": (lambda f: f["model"]["vocab"].pop("!"), "byte"),
          "words for tokens": (lambda f: f["model"]["vocab"].update({"▁the": 9999}), "byte"),
          "an id twice": (lambda f: f["model"]["vocab"].update({"!": 34}), "the same id"),
          "a normalizer": (lambda f: f.update(normalizer={"type": "NFKC"}), "normalizer NFKC"),
          "a strange pre-tokenizer": (lambda f: f.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
          "a Split that drops text": (lambda f: first_split(f).update(behavior="Removed"), "Removed"),
          "a pattern that is none": (lambda f: first_split(f)["pattern"].update(Regex="("), "compile")}


def first_split(file):
    return file["pre_tokenizer"]["pretokenizers"][0]


@pytest.mark.parametrize("defect", BROKEN)
def test_a_tokenizer_file_that_would_give_other_ids_is_refused(defect, tmp_path):
    file = json.loads(tokenizer_json(small_bpe()))
    BROKEN[defect][0](file)
    folder(tmp_path, {"t.json": "{" if defect == "not JSON" else json.dumps(file)})
    with pytest.raises(UserError) as e:
        load_tokenizer(tmp_path / "t.json")
    assert "t.json" in str(e.value) and BROKEN[defect][1] in str(e.value) and "\n" not in str(e.value)


# --- the streams ------------------------------------------------------------------------------------------------------

def test_with_bytes_and_without_fim_the_streams_are_the_files_bytes_and_eos(tmp_path):
    text = "été\n" * 100
    folder(tmp_path, {"x.txt": text})
    d = Data(config(tmp_path / "x.txt"))
    raw, eos = text.encode(), special(d.tokenizer, "eos")
    cut = len(raw) * 9 // 10                                                            # 360 characters, 540 bytes
    assert d.train.tolist() == [*raw[:cut], eos] and d.train.dtype == np.uint16
    assert d.val.tolist() == [eos, *raw[cut:], eos] and d.val_bytes == len(raw) - cut


def test_fim_writes_prefix_suffix_middle_and_every_character_once(tmp_path):
    c, encoding = config("", fim_rate=1.0), small_bpe()
    begin, hole, end, eos = (special(encoding, s) for s in ("fim_begin", "fim_hole", "fim_end", "eos"))
    places = set()
    for i in range(50):
        text = SOURCE[i * 40:i * 40 + 200]
        ids = data.training_ids(f"{i}", text, encoding, {}, c)
        assert ids[0] == begin and ids[-1] == eos and ids.count(hole) == ids.count(end) == 1
        pre, suf = encoding.decode(ids[1:ids.index(hole)]), encoding.decode(ids[ids.index(hole) + 1:ids.index(end)])
        mid = encoding.decode(ids[ids.index(end) + 1:-1])
        assert pre + mid + suf == text
        places.add((len(pre), len(mid)))
    assert len(places) > 40


def test_fim_takes_its_share_of_the_training_documents_and_leaves_validation_alone(tmp_path):
    d = Data(config(numbered(tmp_path / "d", 1000), fim_rate=0.3))
    begin = special(d.tokenizer, "fim_begin")
    docs = split_stream(d.tokenizer, d.train)
    assert abs(sum(doc[0] == begin for doc in docs) / len(docs) - 0.3) < 0.05
    assert begin not in d.val


def test_boundary_splits_change_the_ids_and_not_the_bytes():
    encoding = small_bpe()
    splits = data.boundary_splits(encoding)
    joined = {i: encoding.decode([i]) for i in splits}
    assert ":\n       " in joined.values()
    assert all(regex.search(r"[\p{P}\p{S}][\r\n]", text) for text in joined.values())
    for i, others in splits.items():
        assert len(others) == len(joined[i]) - 1
        assert all(encoding.decode(ids) == joined[i] and i not in ids for ids in others)
    plain, ids = encoding.encode_ordinary(SOURCE), data.training_ids("x", SOURCE, encoding, splits, config(""))
    assert encoding.decode(ids[:-1]) == SOURCE
    before, after = (sum(i in splits for i in some) for some in (plain, ids))
    assert 0.8 < after / before < 0.97                                                  # SPLIT_RATE is a tenth


def test_a_training_stream_decodes_to_its_documents_and_validation_is_encoded_plainly(tmp_path):
    docs = {f"{i}.py": part for i, part in enumerate(SOURCE.split("\n\n\n"))}
    d = Data(config(folder(tmp_path / "d", docs), tokenizer="bpe", vocab_size=600))
    train, val = data.split(data.documents(str(tmp_path / "d")))
    assert [text_of(d.tokenizer, ids) for ids in split_stream(d.tokenizer, d.train)] == [text for _, text in train]
    assert [ids.tolist() for ids in split_stream(d.tokenizer, d.val[1:])] == [
        d.tokenizer.encode_ordinary(text) for _, text in val]


def test_a_document_becomes_the_same_ids_whatever_stands_beside_it(tmp_path):
    docs = {f"{i}.py": part for i, part in enumerate(SOURCE.split("\n\n\n"))}
    save_tokenizer(small_bpe(), tmp_path / "t.json")
    c = dict(tokenizer=str(tmp_path / "t.json"), vocab_size=700, fim_rate=0.5)
    some = dict(list(docs.items())[5:25])
    streams = [Data(config(folder(tmp_path / name, kept), **c)) for name, kept in (("all", docs), ("some", some))]
    every, few = ({tuple(ids.tolist()) for ids in split_stream(d.tokenizer, d.train)} for d in streams)
    assert few <= every and few
    other = Data(config(tmp_path / "all", seed=7, **c))
    assert {tuple(ids.tolist()) for ids in split_stream(other.tokenizer, other.train)} != every


# --- the cache --------------------------------------------------------------------------------------------------------

def test_a_second_run_reads_the_cache_and_gets_the_same(tmp_path, cache, monkeypatch):
    c = config(numbered(tmp_path / "d"), tokenizer="bpe", vocab_size=280, fim_rate=0.2)
    first = Data(c)
    files = sorted(cache.rglob("*"))
    monkeypatch.setattr(data, "train_bpe", None)
    monkeypatch.setattr(data, "streams", None)
    second = Data(c)
    assert sorted(cache.rglob("*")) == files and not [f for f in files if f.name.endswith(".tmp")]
    assert first.identity == second.identity and np.array_equal(first.train, second.train)
    assert first.tokenizer.encode_ordinary(SOURCE) == second.tokenizer.encode_ordinary(SOURCE)
    json.dumps(first.identity)


@pytest.mark.parametrize("change", [dict(fim_rate=0.3), dict(seed=8), dict(tokenizer="bpe"), "the text", "a name"])
def test_the_cache_is_keyed_by_all_that_makes_the_tokens(change, tmp_path, cache):
    source = numbered(tmp_path / "d")
    first = Data(config(source))
    folders = len(list(cache.glob("tokens-*")))
    if change == "the text":
        folder(tmp_path / "d", {"05.txt": "another text"})
    elif change == "a name":
        (tmp_path / "d" / "05.txt").rename(tmp_path / "d" / "05_.txt")
    second = Data(config(source, **(change if isinstance(change, dict) else {})))
    assert len(list(cache.glob("tokens-*"))) == folders + 1
    assert (first.identity["corpus_sha256"] == second.identity["corpus_sha256"]) == isinstance(change, dict)


def test_other_sequence_lengths_and_batches_share_the_tokens(tmp_path, cache):
    source = numbered(tmp_path / "d")
    for changes in ({}, dict(seq_len=9), dict(batch_size=3), dict(n_mtp=0)):
        Data(config(source, **changes))
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", ["a byte changed", "cut short", "gone", "sidecar gone", "sidecar empty"])
@pytest.mark.parametrize("kind", ["tokens", "bpe"])
def test_a_damaged_cache_is_refused_and_the_message_says_what_to_delete(kind, damage, tmp_path, cache):
    c = config(numbered(tmp_path / "d"), tokenizer="bpe", vocab_size=280)
    Data(c)
    where, = cache.glob(f"{kind}-*")
    path = where / ("meta.json" if "sidecar" in damage else "train.bin" if kind == "tokens" else "tokenizer.json")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes({"a byte changed": raw, "cut short": raw[:-2]}.get(damage, b""))
    if "gone" in damage:
        path.unlink()
    with pytest.raises(UserError) as e:
        Data(c)
    assert str(path) in str(e.value) and f"delete the folder {where}" in str(e.value)


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    c = config(numbered(tmp_path / "d"))
    whole = Path.write_bytes

    def full(self, raw):
        whole(self, bytes(raw)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot write .*No space left on device.*NANOV3_CACHE"):
        Data(c)
    assert list(cache.iterdir()) == []


def test_processes_that_build_at_once_agree(tmp_path, cache):
    c = config(numbered(tmp_path / "d"), fim_rate=0.2)
    made = [None] * 6
    threads = [threading.Thread(target=lambda i=i: made.__setitem__(i, Data(c))) for i in range(6)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(d and d.identity == made[0].identity and np.array_equal(d.train, made[0].train) for d in made)
    assert len(list(cache.iterdir())) == 1


# --- batches ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def ring(tmp_path):
    """Data over a training stream in which every id is its own position: a window shows where it was cut."""
    def make(n, **changes):
        d = Data(config(numbered(tmp_path / "d"), **changes))
        d.train = np.arange(n, dtype=np.uint32)
        return d
    return make


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 65, 1000])
def test_the_shuffle_is_a_permutation_and_depends_on_its_keys(n):
    keys = [np.random.SeedSequence(seed).generate_state(4, np.uint64) for seed in range(3)]
    orders = [data.shuffle(np.arange(n, dtype=np.uint64), n, k).tolist() for k in keys]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n > 16:
        assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(n))
        steps = Counter(b - a for a, b in zip(orders[0], orders[0][1:]))
        assert max(steps.values()) <= max(3, n // 20)                                   # no stride, no long run


@pytest.mark.parametrize("n", [16 * 40, 16 * 40 + 11])
def test_an_epoch_visits_each_window_once_and_another_epoch_cuts_elsewhere(n, ring):
    d = ring(n, batch_size=8)
    for epoch in range(3):
        windows = torch.cat([d.batch(step) for step in range(epoch * 5, epoch * 5 + 5)])   # 40 windows, 5 steps of 8
        inputs = windows[:, :16].flatten().tolist()
        assert len(inputs) == len(set(inputs)) == 640
        assert torch.equal(windows, (windows[:, :1] + torch.arange(19)) % n)            # contiguous, around the ring
    assert len({int(d.batch(step)[0, 0]) % 16 for step in (0, 5, 10, 15, 20)}) > 1


def test_a_batch_may_span_the_end_of_an_epoch(ring):
    d = ring(16 * 5, batch_size=7)
    starts = torch.cat([d.batch(step) for step in range(5)])[:, 0].tolist()              # 35 sequences, 7 epochs of 5
    assert all(len({s % 80 for s in starts[i:i + 5]}) == 5 for i in range(0, 35, 5))


def test_a_batch_is_a_function_of_config_and_step_alone(tmp_path):
    c = config(numbered(tmp_path / "d"), fim_rate=0.2)
    there, back = Data(c), Data(c)
    forward = [there.batch(step) for step in range(9)]
    assert all(torch.equal(back.batch(step), forward[step]) for step in reversed(range(9)))
    assert forward[0].shape == (6, 19) and forward[0].dtype == torch.int64
    plain, other = (Data(config(tmp_path / "d", seed=seed)) for seed in (1, 2))         # the same stream, another order
    assert np.array_equal(plain.train, other.train) and not torch.equal(plain.batch(0), other.batch(0))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_the_ranks_parts_put_together_are_the_batch(ranks, tmp_path):
    d = Data(config(numbered(tmp_path / "d"), batch_size=7, batch_ramp=5))
    for step in range(9):
        parts = [d.batch(step, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), d.batch(step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_batch_grows_from_a_fifth_as_v3s_and_no_sequence_is_skipped_or_repeated(ring):
    v3 = config("", batch_size=15360, batch_ramp=1000)
    sizes = [data.batch_size_at(v3, step) for step in range(1200)]
    assert sizes[0] == 3072 and sizes[500] == 9216 and set(sizes[1000:]) == {15360} and sizes == sorted(sizes)
    assert data.batch_size_at(config("", batch_size=3, batch_ramp=10), 0) == 1
    d = ring(16 * 100, batch_size=20, batch_ramp=4)                                      # 4 8 12 16 20 20 ...
    starts = torch.cat([d.batch(step) for step in range(7)])[:, 0].tolist()
    assert len(starts) == len(set(starts)) == 100


# --- evaluation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 16, 17, 18, 19, 33, 34, 100])
@pytest.mark.parametrize("b", [1, 4])
def test_evaluation_predicts_every_token_but_the_first_exactly_once(n, b, ring):
    d = ring(100)
    d.val, T, n_mtp = np.arange(1000, 1000 + n), 16, 2
    seen = [[] for _ in range(1 + n_mtp)]
    for tokens, valid in d.eval_windows(b):
        assert tokens.shape == valid.shape and tokens.shape[1] == 19 and tokens.dtype == torch.int64
        assert len(tokens) <= b and not valid[:, 0].any() and valid[:, 1].all()
        assert (tokens[:, 1:][~valid[:, 1:]] == 0).all()
        for k in range(1 + n_mtp):
            seen[k] += tokens[:, 1 + k:T + k + 1][valid[:, 1 + k:T + k + 1]].tolist()
            context = tokens[:, k:T + k][valid[:, 1 + k:T + k + 1]]                      # the token before each target
            assert (context + 1 == tokens[:, 1 + k:T + k + 1][valid[:, 1 + k:T + k + 1]]).all()
    assert all(seen[k] == list(range(1001 + k, 1000 + n)) for k in range(1 + n_mtp))


@pytest.mark.parametrize("n", [2, 17, 18, 21, 22, 23, 100])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_overlapping_windows_score_every_token_once_and_with_the_context_they_promise(n, stride, ring):
    d = ring(100, eval_stride=stride)
    d.val, T, seen = np.arange(1000, 1000 + n), 16, []
    for tokens, valid in d.eval_windows(4):
        for row, mask in zip(tokens[:, :T + 1], valid[:, :T + 1]):
            at = mask.nonzero()[:, 0].tolist()
            seen += row[mask].tolist()
            assert at and (row[0] == 1000 or min(at) > T - stride)
    assert seen == list(range(1001, 1000 + n))


def test_a_uniform_model_over_260_bytes_needs_a_little_more_than_eight_bits(tmp_path):
    folder(tmp_path, {"x.txt": "abcdefghij" * 100})
    d = Data(config(tmp_path / "x.txt"))
    targets = sum(int(valid[:, 1:17].sum()) for _, valid in d.eval_windows(3))
    assert targets == 101                                                                # 100 bytes and their eos
    assert d.bits_per_byte(targets * math.log(260)) == pytest.approx(1.01 * math.log2(260))


def test_the_identity_says_which_data_it_was(tmp_path):
    import lzma
    text = "été\n" * 100
    folder(tmp_path, {"x.txt": text})
    identity = Data(config(tmp_path / "x.txt")).identity
    assert [identity[key] for key in ("documents", "train_tokens", "val_tokens", "val_bytes")] == [1, 541, 62, 60]
    assert identity["val_xz_bytes"] == len(lzma.compress(text[360:].encode(), preset=9 | lzma.PRESET_EXTREME))
    assert identity["python"] is None and identity["source"] == str(tmp_path / "x.txt")
