"""Text to tokens: byte-level BPE, trained here or read from a file, as tiktoken encodes it (section 4.1)."""
import difflib
import heapq
import json
import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import regex  # comes with tiktoken; has \p{L}
import tiktoken

from configs import UserError, one_line, say, tick

# --- tokenizers -------------------------------------------------------------------------------------------------------

SPECIAL = {"eos": ("<|eos_token|>", "<｜end▁of▁sentence｜>", "<|endoftext|>"),         # ours, DeepSeek's, GPT-2's
           "fim_begin": ("<|fim_begin|>", "<｜fim▁begin｜>"),
           "fim_hole": ("<|fim_hole|>", "<｜fim▁hole｜>"),
           "fim_end": ("<|fim_end|>", "<｜fim▁end｜>")}
OURS = [names[0] for names in SPECIAL.values()]

# A text is first cut into pieces, and merges never cross a cut. In order: digits by threes; a punctuation mark leading
# an ASCII word; a word with the blank before it; punctuation, with line breaks and indentation after it; line breaks
# and indentation; other white space; whatever is left. White space leaves its last blank to the word behind it: so
# " return" is one token at any depth.
BREAK = r"[\r\n]+(?:[ \t]+(?!\S))?"
PATTERN = "|".join((r"\p{N}{1,3}", r"[!-/:-@\[-`{-~][A-Za-z]+", r"[^\r\n\p{L}\p{M}\p{N}\p{P}\p{S}]?[\p{L}\p{M}]+",
                    rf" ?[\p{{P}}\p{{S}}]+(?:{BREAK})?", rf"\s*{BREAK}", r"\s+(?!\S)", r"\s+", r"[\s\S]"))


def special(encoding, name):
    """Id of "eos", "fim_begin", "fim_hole" or "fim_end" in this encoding, or None."""
    return next((encoding._special_tokens[s] for s in SPECIAL[name] if s in encoding._special_tokens), None)


def get_tokenizer(name):
    """"bytes", a tiktoken name, a tokenizer.json or a folder with one -> tiktoken.Encoding. tiktoken's lack our special
    tokens and get them after their last id; a file is taken as it is: its ids belong to somebody's weights."""
    if name == "bytes":
        return build("bytes", r"[\s\S]", [bytes([b]) for b in range(256)])
    if os.path.exists(name):
        return load_tokenizer(name)
    names = ["bpe", "bytes", *tiktoken.list_encoding_names()]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise UserError(f"tokenizer {name!r}: no such file or folder"
                        + (f"; did you mean {near[0]!r}?" if near else f", nor one of {', '.join(names)}"))
    try:
        base = tiktoken.get_encoding(name)
    except (OSError, ValueError) as e:                                                  # requests' errors are OSErrors
        raise UserError(f"tokenizer {name}: tiktoken downloads it on first use and got {one_line(e)}; "
                        "--tokenizer=bpe and --tokenizer=bytes need no network") from None
    missing = [s for s in OURS if s not in base._special_tokens]
    return tiktoken.Encoding(name, pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks, special_tokens={
        **base._special_tokens, **{s: base.n_vocab + i for i, s in enumerate(missing)}})


def build(name, pattern, tokens):
    """Encoding of `tokens`, a list of bytes whose index is both id and rank, with our special tokens after them."""
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)},
                             special_tokens={s: len(tokens) + i for i, s in enumerate(OURS)})


def fitting(encoding, config):
    """The encoding, if the config can be trained with it. UserError: too many tokens, no eos, no tokens for FIM."""
    name, n = config.tokenizer, encoding.n_vocab
    if n > config.vocab_size:
        raise UserError(f"tokenizer {name}: {n} tokens, more than vocab_size = {config.vocab_size}; "
                        f"write --vocab_size={n} or more")
    if special(encoding, "eos") is None:
        raise UserError(f"tokenizer {name}: no token to end a document; add {' or '.join(SPECIAL['eos'])}")
    if config.fim_rate and None in (special(encoding, s) for s in ("fim_begin", "fim_hole", "fim_end")):
        raise UserError(f"tokenizer {name}: no tokens for fill-in-the-middle; write --fim_rate=0")
    return encoding


def train_bpe(texts, vocab_size):
    """Encoding with exactly `vocab_size` tokens: 256 bytes, merges, our special tokens. Ties: smaller ids first.

    The obvious trainer counts all pairs of the corpus before each merge. Here the corpus is a table of distinct pieces
    and how often each occurs; an index tells which pieces hold a pair; and a heap gives the most frequent pair. Once a
    pair exists its count can only fall, so an entry of the heap may be too high but never too low: it is mended when it
    comes up. A merge then costs what it touches."""
    pieces = Counter()
    for text in texts:
        pieces.update(regex.findall(PATTERN, text))
    spelling, times = [list(piece.encode()) for piece in pieces], list(pieces.values())
    counts, where = Counter(), defaultdict(set)                                         # pair -> number; pair -> pieces
    for i, ids in enumerate(spelling):
        for pair in zip(ids, ids[1:]):
            counts[pair] += times[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) + len(OURS) < vocab_size:
        while heap and -heap[0][0] > counts[heap[0][1]]:
            heapq.heapreplace(heap, (-counts[heap[0][1]], heap[0][1]))
        if not heap or heap[0][0] > -2:                                                 # a pair seen once: no merge
            most = len(tokens) + len(OURS)
            raise UserError(f"vocab_size = {vocab_size}: this text is too small, BPE finds {most} tokens in it; "
                            f"write --vocab_size={most} or less, or take more text")
        a, b = merged = heapq.heappop(heap)[1]
        new, fresh = len(tokens), set()
        tokens.append(tokens[a] + tokens[b])
        for i in where.pop(merged):
            ids, n, j = spelling[i], times[i], 0
            while j < len(ids) - 1:
                if ids[j] == a and ids[j + 1] == b:
                    ids[j:j + 2] = [new]
                    # x a b y -> x new y, where there are neighbours
                    for gone, come in ([((x, a), (x, new)) for x in ids[max(j - 1, 0):j]]
                                       + [((b, y), (new, y)) for y in ids[j + 1:j + 2]]):
                        counts[gone] -= n
                        counts[come] += n
                        where[come].add(i)
                        fresh.add(come)
                j += 1
        for pair in fresh:
            heapq.heappush(heap, (-counts[pair], pair))
        if new % 64 == 0:
            tick(f"tokenizer bpe: {new} of {vocab_size} tokens")
    return build("bpe", PATTERN, tokens)


# --- tokenizer.json, the file of Hugging Face -------------------------------------------------------------------------
# Its BPE is tiktoken's in other words: tokens are spelt in an alphabet with a visible character for each byte, and the
# order of the tokens is told as a list of merges.

def byte_alphabet():
    """{byte: character}, GPT-2's: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {**{b: chr(b) for b in visible}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


def tokenizer_json(encoding):
    alphabet, ranks = byte_alphabet(), dict(sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]))
    spell = {t: "".join(alphabet[b] for b in t) for t in ranks}
    merges = filter(None, (last_merge(t, ranks) for t in ranks if len(t) > 1))
    specials = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    # Like tiktoken, ignore_merges takes a piece that is a token as it is. The special tokens stand in the vocabulary
    # too: `tokenizers` numbers those anew that don't.
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for s, i in specials],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {**{spell[t]: i for t, i in ranks.items()}, **dict(specials)},
                  "merges": [[spell[a], spell[b]] for a, b in merges]},
    }, ensure_ascii=False, indent=1).encode("utf-8")


def last_merge(token, ranks):
    """The two tokens that merge into this one: what it falls into when only lower ranks may merge."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1))
        if rank >= ranks[token]:
            return None                                                                 # never merged, only found whole
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def load_tokenizer(path):
    """A tokenizer.json (or its folder) -> Encoding with the same ids. All added tokens become special tokens.
    UserError: no byte-level BPE, merges out of id order (tiktoken's ranks are ids), a part that tiktoken lacks."""
    path = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)

    def wrong(why):
        return UserError(f"tokenizer {path}: {why}; --tokenizer=bpe trains one")

    try:
        file = json.loads(path.read_bytes())
        model, added = file["model"], {t["content"]: t["id"] for t in file.get("added_tokens") or []}
        if model["type"] != "BPE":
            raise wrong(f"a {model['type']} model, not BPE")
        vocab, merges = model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        made = [vocab[a + b] for a, b in merges]
        pattern = one_pattern(cuts(file.get("pre_tokenizer") or {}, wrong))
    except OSError as e:
        raise wrong(e.strerror) from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise wrong(f"not a tokenizer.json ({one_line(e)})") from None
    if (file.get("normalizer") or {"normalizers": []}).get("normalizers") != []:
        raise wrong(f"normalizer {file['normalizer']['type']} is not supported")
    if any(a > b for a, b in zip(made, made[1:])):
        raise wrong("its merges are not in the order of their ids")
    to_byte = {c: b for b, c in byte_alphabet().items()}
    ranks = {bytes(to_byte[c] for c in t): i for t, i in vocab.items() if t not in added and to_byte.keys() >= set(t)}
    if len(ranks) < len(vocab.keys() - added.keys()) or not all(bytes([b]) in ranks for b in range(256)):
        raise wrong("not a byte-level BPE: its tokens are not spelt in bytes, or some byte is no token")
    if len({*ranks.values(), *added.values()}) < len(ranks) + len(added):
        raise wrong("two tokens have the same id")
    try:
        return tiktoken.Encoding(str(path), pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
    except ValueError as e:
        raise wrong(f"its pattern does not compile ({one_line(e)})") from None


def cuts(pre, wrong):
    """The regular expressions of a pre_tokenizer, in the order in which they cut."""
    kind = pre.get("type")
    if kind == "Sequence":
        return [expression for part in pre["pretokenizers"] for expression in cuts(part, wrong)]
    if kind == "Split" and pre["behavior"] == "Isolated" and not pre.get("invert"):
        return [pre["pattern"].get("Regex") or re.escape(pre["pattern"]["String"])]
    if kind == "Digits":
        return [r"\p{N}" if pre["individual_digits"] else r"\p{N}+"]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        return [gpt2] if pre.get("use_regex", True) else []
    raise wrong(f"pre_tokenizer {({k: v for k, v in pre.items() if k != 'pattern'})} is not supported")


CJK = "一-龥぀-ゟ゠-ヿ"
DEEPSEEK_V3 = [r"\p{N}{1,3}", f"[{CJK}]+",
               r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
               r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""]
DEEPSEEK_V3_AS_ONE = "|".join((
    r"\p{N}{1,3}",
    rf"[[^\p{{L}}\p{{P}}\p{{S}}]&&[{CJK}]]?[[\p{{L}}\p{{M}}]&&[{CJK}]]+", rf"[[\p{{P}}\p{{S}}]&&[{CJK}]]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+", rf"[^\r\n\p{{L}}\p{{N}}\p{{P}}\p{{S}}{CJK}]?[[\p{{L}}\p{{M}}]&&[^{CJK}]]+",
    rf" ?[[\p{{P}}\p{{S}}]&&[^{CJK}]]+[\r\n]*", r"\s*[\r\n]+", rf"\s+(?![\S&&[^\p{{N}}{CJK}]])", r"\s+"))


def one_pattern(stages):
    """Expressions, each cutting the pieces of the one before -> one expression, which is what tiktoken takes.

    Joined with | they are not quite the same. DeepSeek cuts out digits, then CJK, then words: with | a word would run
    on into the CJK after it, and (?!\\S) would see the digit at which its piece has already ended. V3's are joined by
    hand, exactly. Others are joined with |, which may give other (never wrong) ids at such places, and that is said."""
    if [s.replace("\r", r"\r").replace("\n", r"\n") for s in stages] == DEEPSEEK_V3:
        stages = [DEEPSEEK_V3_AS_ONE]
    elif len(stages) > 1:
        say(f"tokenizer: its {len(stages)} pre-tokenizers are joined into one; ids may differ where two of them meet")
    joined = "|".join(stages)
    if joined.endswith(r"[\s\S]"):                                                      # leaves nothing out, like ours
        return joined
    # Hugging Face keeps what matches nothing as a piece; tiktoken would drop it. So it must match something.
    return rf"{joined}|(?:(?!{joined})[\s\S])+|[\s\S]" if joined else r"[\s\S]+|[\s\S]"
