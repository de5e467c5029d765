"""Text to tokens: what V3 does to its corpus before the first matrix product (report section 4.1), on any text.

The problem: which text, which side of the split, which ids, which batch at step 1000 must come out the same on one
rank or on many, today or after a crash. So all of it is a pure function of the config; nothing remembers a position.

    documents --split--> train, val --tokenizer--> ids --FIM, boundary splits, packing--> one stream --> batch(step)

  documents   By default the Python standard library on this machine: offline, 10 MB, one file = one document. A hash of
              the NAME decides the side of the split, so adding a file never moves another one.
  tokenizer   Byte-level BPE, so that every text has an encoding. The pre-tokenizer is in the spirit of V3's: a token
              may join punctuation and line breaks (");\\n"), one punctuation mark may lead a word (".append"), digits
              go by threes. V3 has 128K tokens; --tokenizer=bpe trains config.vocab_size of them here, in seconds.
  FIM         A tenth of the documents is rearranged as prefix, suffix, middle (PSM), so that predicting the next token
              teaches filling a hole: <|fim_begin|> pre <|fim_hole|> suf <|fim_end|> mid <|eos_token|>
  boundaries  A token like ":\\n" hides the place between ":" and the line break. A prompt that ends in ":" is then a
              text the model has never seen (token boundary bias), so V3 splits some of these tokens at random.
  packing     Documents follow each other, each closed by eos, and sequences are cut from that stream. Attention
              crosses document borders: V3 masks nothing in pre-training.

Shapes: B sequences, T = seq_len tokens. A sequence is T+1+n_mtp ids long: T inputs, the target of the last one, and
what MTP depth k sees further ahead (section 2.2). Ids are int64 in a batch, uint16 or uint32 on disk.

Simplified: the corpus fits in memory; filtering and deduplication are left to whoever made it (of the standard library
NOT_STDLIB leaves out what repeats itself); the tokenizer is trained on the model's own training text.
"""
import contextlib
import difflib
import hashlib
import http.client
import json
import math
import os
import platform
import random
import shutil
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken; has \p{L}
import torch

from configs import UserError, one_line, say, tick
from tokenizer import PATTERN, fitting, get_tokenizer, load_tokenizer, special, tokenizer_json, train_bpe

# --- the corpus -------------------------------------------------------------------------------------------------------

URLS = {"shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "fineweb": "https://datasets-server.huggingface.co/rows?dataset=HuggingFaceFW%2Ffineweb&config=sample-10BT"
                   "&split=train&length=100&offset="}
FINEWEB_BYTES = 20_000_000
# Tests quote text of every kind; encodings/ is 120 generated tables that differ in few lines, a fifth of all tokens (V3
# also removes what its corpus says twice); the others are copies of packages that live elsewhere.
NOT_STDLIB = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "ensurepip", "_vendor",
              "__pycache__"}


def documents(source):
    """[(name, text)] in the order of the names, empty ones left out. `source` is a text file, a folder (every file in
    it but hidden ones, at any depth), or else stdlib, shakespeare or fineweb. UserError: not there, not text, empty."""
    path = Path(source)
    if os.path.isdir(path):
        docs = [(p.relative_to(path).as_posix(), read_text(p)) for p in walk(path) if p.is_file()]
    elif os.path.exists(path):
        if not path.is_file():
            raise UserError(f"data {source}: neither a file nor a folder; --data=PATH takes a text file or a folder")
        docs = [(path.name, read_text(path))]
    elif source == "stdlib":
        docs = standard_library()
    elif source == "shakespeare":
        docs = [(source, download(source, fetch).decode("utf-8"))]
    elif source == "fineweb":
        docs = json.loads(download(source, fineweb_rows))
    else:
        near = difflib.get_close_matches(source, ("stdlib", *URLS), 1)
        raise UserError(f"data {source!r}: no such file or folder"
                        + (f"; did you mean {near[0]!r}?" if near else ", nor one of stdlib, shakespeare, fineweb"))
    docs = sorted((name, text) for name, text in docs if text)
    if not docs:
        raise UserError(f"data {source}: empty, no text in it; --data=PATH takes a text file or a folder of them")
    return docs


def walk(folder, leave_out=()):
    """The paths of all files below `folder`, hidden files and folders left out."""
    def unreadable(e):
        raise UserError(f"data {e.filename}: {e.strerror}; make it readable or leave it out")

    for base, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in leave_out]
        yield from (Path(base, f) for f in files if not f.startswith("."))


def read_text(path):
    """The file's text, line ends untouched."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"data {path}: {e.strerror}; make it readable or leave it out") from None
    if 0 in raw:
        raise UserError(f"data {path}: a NUL byte at byte offset {raw.index(0)}, so not a text file; leave it out")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"data {path}: not UTF-8 at byte offset {e.start}; convert it or leave it out") from None


def standard_library():
    """This Python's own library: each source file, and each topic of the language reference (kept as one dict in
    pydoc_data/topics.py). What the build wrote about this machine is left out."""
    folder, docs, skipped = Path(sysconfig.get_path("stdlib")), [], 0
    for path in walk(folder, NOT_STDLIB):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".py" and not name.startswith(("pydoc_data/topics", "_sysconfigdata", "config-")):
            try:
                docs.append((name, path.read_bytes().decode("utf-8")))
            except UnicodeDecodeError:                                                  # declares an older encoding
                skipped += 1
    if not docs:
        raise UserError(f"data stdlib: no Python sources in {folder}; --data=PATH takes a text file or a folder")
    try:
        from pydoc_data.topics import topics
        docs += [(f"reference/{name}.txt", text) for name, text in topics.items()]
    except ImportError:                                                                 # some distributions lack it
        say("data stdlib: no language reference here, sources only")
    if skipped:
        say(f"data stdlib: {skipped} files left out, not UTF-8")
    return docs


def fetch(url):
    """The bytes at `url`; three tries, since public servers say 'later' now and then."""
    for wait in (1, 5, None):
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return reply.read()
        except urllib.error.HTTPError as e:
            if wait is None or e.code not in (429, 500, 502, 503, 504):
                raise
            time.sleep(wait)


def fineweb_rows(url):
    """JSON list of [name, text]: pages of 100 rows, until there are FINEWEB_BYTES of text."""
    docs, size, offset = [], 0, 0
    while size < FINEWEB_BYTES:
        rows = json.loads(fetch(f"{url}{offset}"))["rows"]
        if not rows:
            break
        offset += len(rows)
        for row in rows:
            if not row.get("truncated_cells"):
                docs.append((f"fineweb/{row['row_idx']:06d}", row["row"]["text"]))
                size += len(docs[-1][1].encode())
        tick(f"data fineweb: {size / 1e6:.1f} of {FINEWEB_BYTES / 1e6:.0f} MB")
    return json.dumps(docs).encode()


def download(name, get):
    """get(URLS[name]), kept in the cache folder: one download per machine."""
    path = cache_folder() / f"{name}.download"
    if not path.exists():
        say(f"data {name}: downloading")
        try:
            raw = get(URLS[name])
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as e:
            raise UserError(f"data {name}: needs a network, and {URLS[name].split('?')[0]} gave {one_line(e)}; "
                            "--data=PATH takes any text file or folder, --data=stdlib needs no network") from None
        write(path, raw)
    return path.read_bytes()


def split(docs):
    """[(name, text)] -> (train, val), about a tenth of the names in val. One document alone is cut at nine tenths of
    its characters."""
    if len(docs) == 1:
        (name, text), = docs
        cut = len(text) * 9 // 10
        return [(name, text[:cut])], [(name, text[cut:])]

    def place(name):                                                                    # evenly spread over [0, 1)
        return int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16 ** 13

    # Few documents may all fall on one side; then the limit moves to the last of their places.
    places = sorted({place(name) for name, _ in docs})
    limit = 0.9 if places[0] < 0.9 <= places[-1] else places[-1]
    train, val = ([doc for doc in docs if (place(doc[0]) >= limit) == side] for side in (False, True))
    return (train, val) if train else (docs[:-1], docs[-1:])                            # two names at one place


# --- the streams ------------------------------------------------------------------------------------------------------

SPLIT_RATE = 0.1                                                                        # V3: "a certain proportion"


def boundary_splits(encoding):
    """{id: [ids, ids, ...]}: for each token that joins punctuation and a line break, its other spellings, one for each
    place where its text can be cut in two."""
    out = {}
    for token, i in encoding._mergeable_ranks.items():
        text = token.decode("utf-8", errors="ignore")
        if text.encode() == token and regex.search(r"[\p{P}\p{S}][\r\n]", text):
            out[i] = [encoding.encode_ordinary(text[:cut]) + encoding.encode_ordinary(text[cut:])
                      for cut in range(1, len(text))]
    return out


def training_ids(name, text, encoding, splits, config):
    """One document as the model trains on it: list of ids, eos last (section 4.1). The dice are seeded by (seed, name):
    a document comes out the same whatever stands beside it. Its bytes stay those of the text, or of its parts in PSM
    order."""
    dice, encode = random.Random(f"{config.seed} {name}"), encoding.encode_ordinary
    if dice.random() < config.fim_rate:
        a, b = sorted(dice.choices(range(len(text) + 1), k=2))
        begin, hole, end = (special(encoding, s) for s in ("fim_begin", "fim_hole", "fim_end"))
        ids = [begin, *encode(text[:a]), hole, *encode(text[b:]), end, *encode(text[a:b])]
    else:
        ids = encode(text)
    ids = [j for i in ids for j in (dice.choice(splits[i]) if i in splits and dice.random() < SPLIT_RATE else (i,))]
    return [*ids, special(encoding, "eos")]


def streams(train, val, encoding, config):
    """Both sides as packed ids (numpy uint16 or uint32). Validation is plain text, and an eos before it lets its first
    byte be predicted too."""
    dtype = np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32
    splits, eos, ids = boundary_splits(encoding), special(encoding, "eos"), []
    for i, (name, text) in enumerate(train):
        tick(f"tokens: document {i} of {len(train)}")
        ids.append(np.array(training_ids(name, text, encoding, splits, config), dtype))
    held_out = [[eos], *([*encoding.encode_ordinary(text), eos] for _, text in val)]
    return np.concatenate(ids), np.concatenate([np.array(i, dtype) for i in held_out])


# --- the cache --------------------------------------------------------------------------------------------------------
# One folder per result, named by a hash of everything that went into it, and complete from the moment it has its name.

FORMAT = 1                                                                              # raise it when the code changes


def sha256(*parts):
    """Hex digest of strings, each preceded by its length: ("ab", "c") is not ("a", "bc")."""
    h = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8")
        h.update(len(raw).to_bytes(8, "big") + raw)
    return h.hexdigest()


def fingerprint(encoding):
    """Hex digest of all that decides an encoding's ids."""
    ranks = sorted((i, t.hex()) for t, i in encoding._mergeable_ranks.items())
    return sha256(encoding._pat_str, str(ranks), str(sorted(encoding._special_tokens.items())))


def cache_folder(kind="", *parts):
    """$NANOV3_CACHE (default ~/.cache/nanov3), or in it the folder of what `parts` lead to."""
    root = Path(os.environ.get("NANOV3_CACHE") or Path.home() / ".cache" / "nanov3")
    return root / f"{kind}-{sha256(*map(str, (FORMAT, *parts)))[:32]}" if kind else root


@contextlib.contextmanager
def becoming(path):
    """A temporary name that turns into `path` when the block ends well; else nothing is left of it."""
    temp = Path(f"{path}.{os.getpid()}.{time.time_ns()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        try:
            os.replace(temp, path)
        except OSError:
            if not path.is_dir():                                                       # else another process was first
                raise                                                                   # with the same folder: take it
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; make room there, "
                        "or set NANOV3_CACHE to another folder") from None
    finally:
        if temp.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
        temp.unlink(missing_ok=True)


def write(path, raw):
    with becoming(path) as temp:
        temp.write_bytes(raw)


def store(folder, meta, files):
    """files: {name: bytes or array}. A sidecar meta.json keeps their sizes and hashes beside `meta`."""
    with becoming(folder) as temp:
        temp.mkdir()
        for name, raw in files.items():
            (temp / name).write_bytes(raw)
        sums = {name: [memoryview(raw).nbytes, hashlib.sha256(raw).hexdigest()] for name, raw in files.items()}
        (temp / "meta.json").write_text(json.dumps({**meta, "files": sums}, indent=1))


def checked(folder):
    """The sidecar of a stored folder, after a look at every file it names."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        for name, (size, digest) in meta["files"].items():
            path = folder / name
            raw = np.memmap(path, np.uint8, "r")
            if raw.nbytes != size or hashlib.sha256(raw).hexdigest() != digest:
                raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: stale or damaged token cache; delete the folder {folder} and run again") from None
    return meta


def xz_bytes(raw):
    """Size under xz -9e: what a good general compressor needs, a yardstick for bits per byte. None without lzma."""
    try:
        import lzma
    except ImportError:
        return None
    return len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))


# --- batches ----------------------------------------------------------------------------------------------------------

def batch_size_at(config, step):
    """Sequences in the batch of `step`: from a fifth of batch_size, growing evenly (V3: 3072 -> 15360, section 4.2), in
    multiples of batch_multiple."""
    if step >= config.batch_ramp:
        return config.batch_size
    multiple = config.batch_multiple
    size = config.batch_size * (config.batch_ramp + 4 * step) // (5 * config.batch_ramp)
    return max(multiple, (size + multiple // 2) // multiple * multiple)


def shuffle(x, n, keys):
    """Where a permutation of range(n), chosen by `keys`, sends each number of x (uint64 array); it is never listed.

    A Feistel network: (left, right) -> (right, left ^ hash(right)) can be undone whatever the hash is, so a few rounds
    of it permute all numbers of 2 * half bits. A number that lands at n or above is sent on until it lands below (cycle
    walking), and that is a permutation of range(n)."""
    half = ((n - 1).bit_length() + 1) // 2

    def rounds(x):
        left, right = x >> half, x & ((1 << half) - 1)
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15                                  # wraps around at 2^64
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 >> 32
            left, right = right, left ^ mixed & ((1 << half) - 1)
        return left << half | right

    x = rounds(x)
    while (outside := x >= n).any():
        x[outside] = rounds(x[outside])
    return x


class Data:
    """Both token streams of a run, from the cache or built now (stdlib: five seconds), and the batches cut from them.

    tokenizer: tiktoken.Encoding. train, val: memory-mapped ids. val_bytes: UTF-8 bytes of the validation text.
    identity: JSON-able, says which data this was. UserError: a mistake in data, tokenizer, vocab_size or seq_len."""

    def __init__(self, config):
        start, self.config = time.time(), config
        encoding = None if config.tokenizer == "bpe" else fitting(get_tokenizer(config.tokenizer), config)
        docs = documents(config.data)
        train, val = split(docs)
        corpus = sha256(*(part for doc in docs for part in doc))
        val_text = "".join(text for _, text in val).encode("utf-8")
        say(f"data {config.data}: {len(docs)} documents, {sum(len(text) for _, text in docs) / 1e6:.2f}M characters")

        bpe_at = cache_folder("bpe", corpus, config.vocab_size, PATTERN)
        if encoding is None and bpe_at.exists():
            checked(bpe_at)
            encoding = load_tokenizer(bpe_at)
        trained = encoding is None
        if trained:
            encoding = fitting(train_bpe([text for _, text in train], config.vocab_size), config)
            say(f"tokenizer bpe: {encoding.n_vocab} tokens trained in {time.time() - start:.1f} s")
        self.tokenizer = encoding

        tokens_at = cache_folder("tokens", corpus, fingerprint(encoding), config.fim_rate, config.seed, SPLIT_RATE)
        cached = tokens_at.exists()
        if cached:
            meta = checked(tokens_at)
        else:
            ids, val_ids = streams(train, val, encoding, config)
            meta = {"dtype": ids.dtype.name, "train_tokens": len(ids), "val_tokens": len(val_ids)}
        need = config.seq_len + 1 + config.n_mtp
        if meta["train_tokens"] < need:
            raise UserError(f"data {config.data}: too short for one sequence: {meta['train_tokens']} training tokens; "
                            f"seq_len = {config.seq_len} needs {need}; take more text or a smaller --seq_len")
        if trained:
            store(bpe_at, {}, {"tokenizer.json": tokenizer_json(encoding)})
        if not cached:
            tick("tokens: validation text under xz -9e, a yardstick")
            meta["val_xz_bytes"] = xz_bytes(val_text)
            store(tokens_at, meta, {"train.bin": ids, "val.bin": val_ids})
        self.train, self.val = (np.memmap(tokens_at / f"{side}.bin", meta["dtype"], "r") for side in ("train", "val"))
        say(f"tokens: {len(self.train):,} training, {len(self.val):,} validation ({len(val_text) / 1e6:.2f} MB), "
            f"{'from the cache' if cached else 'built'} in {time.time() - start:.1f} s")

        python = platform.python_version() if config.data == "stdlib" and not os.path.exists("stdlib") else None
        self.val_bytes = len(val_text)
        self.identity = {"source": config.data, "python": python, "corpus_sha256": corpus, "documents": len(docs),
                         "train_tokens": len(self.train), "val_tokens": len(self.val), "val_bytes": self.val_bytes,
                         "val_xz_bytes": meta["val_xz_bytes"], "tokenizer_sha256": fingerprint(encoding)}
        # How many sequences came before each step of the ramp.
        self.before = np.cumsum([0, *(batch_size_at(config, step) for step in range(config.batch_ramp))])

    def batch(self, step, rank=0, ranks=1):
        """int64 [n, T+1+n_mtp]: this rank's part of the batch of `step`, a pure function of (config, step).

        The sequences of a run are numbered throughout. A step's are contiguous and so are a rank's of these: sizes
        differ by at most one, and with more ranks than sequences some get none."""
        c, size = self.config, batch_size_at(self.config, step)
        first = int(self.before[min(step, c.batch_ramp)]) + max(0, step - c.batch_ramp) * c.batch_size
        starts = self.starts(np.arange(first + size * rank // ranks, first + size * (rank + 1) // ranks))
        where = (starts[:, None] + np.arange(c.seq_len + 1 + c.n_mtp)) % len(self.train)
        return torch.from_numpy(self.train[where].astype(np.int64))

    def starts(self, numbers):
        """Numbers of sequences -> where their windows start in the training stream (int64 arrays).

        The stream is a ring. An epoch cuts it into windows of T tokens from a place of its own (borders differ between
        epochs) and visits each window once, in an order of its own."""
        n, windows = len(self.train), len(self.train) // self.config.seq_len
        epochs, out = numbers // windows, np.empty_like(numbers)
        for epoch in np.unique(epochs):
            *keys, shift = np.random.SeedSequence([self.config.seed, int(epoch)]).generate_state(5, np.uint64)
            order = shuffle((numbers[epochs == epoch] % windows).astype(np.uint64), windows, keys).astype(np.int64)
            out[epochs == epoch] = (order * self.config.seq_len + int(shift) % n) % n
        return out

    def eval_windows(self, batch_size, rank=0, ranks=1):
        """Iterator of (tokens int64 [b, T+1+n_mtp], valid bool, same shape), b <= batch_size: the validation stream in
        windows of T that begin every eval_stride tokens (0: every T). valid marks the tokens that are there to be
        predicted. The main model's are in columns 1..T, and every token of the stream but the first is so once: where
        windows overlap, in the first that holds it, with the most context. Padding is id 0. Ranks take batches in turn,
        each as many: where they don't come out even, some end with one of which nothing is valid."""
        c, n = self.config, len(self.val)
        T, stride = c.seq_len, c.eval_stride or c.seq_len
        starts = np.arange(0, max(n - 1 - (T - stride), 1), stride)[:, None]
        columns = np.arange(T + 1 + c.n_mtp)
        rounds = -(-len(starts) // (batch_size * ranks))
        for i in range(batch_size * rank, batch_size * ranks * rounds, batch_size * ranks):
            beyond = i >= len(starts)
            start = starts[:1] if beyond else starts[i:i + batch_size]
            where = start + columns
            tokens = np.where(where < n, self.val[np.minimum(where, n - 1)], 0).astype(np.int64)
            new = columns > np.where(start > 0, T - stride, 0)
            yield torch.from_numpy(tokens), torch.from_numpy((where < n) & new & (not beyond))

    def bits_per_byte(self, total_nats):
        """Cross-entropy summed over the validation stream (nats, each eos included) -> bits per byte of its text, which
        unlike a loss per token can be compared between tokenizers."""
        return total_nats / math.log(2) / self.val_bytes
