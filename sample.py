"""Generation: python sample.py --prompt="class Queue" goes on writing, with the newest checkpoint in out/tiny.

The problem. Tokens come one at a time, and each needs the whole model: every active weight is read from memory for one
multiplication and one addition. A processor does tens to hundreds of those in the time of one read, so decoding waits
for memory: time per token = (active weights + cache) / bandwidth. Two remedies. A batch reads the weights once for all
of its rows. The cache is each row's own, there only a smaller one helps: MLA keeps r_kv + d_r numbers per token and
layer instead of the keys and values of every head, in V3 576 instead of 128 * (128 + 128) = 32,768.

Latent attention runs in both of its forms (mla.py), each where it is cheap:

    prefill   prompts [B, T] --naive-----> h [B, T, D], of each row the last --head--> [B, V] --sample--> token [B]
              in pieces         `-> T latents a row go to the cache
    decode    token [B, 1] ---absorbed---> h [B, 1, D] --head--> [B, V] --sample--> token [B], and so on
                                `-> one latent more a row; its query reads all S of them as they are

The prompts of a batch may differ in length: they are padded on the right, where causal attention never looks, and each
row's next token overwrites its padding.

A third remedy: several tokens for one read of the weights. V3's MTP module, trained to predict the token after the next
one (section 2.2), drafts K tokens, and the main model reads them all in ONE forward pass, for little more than the
price of one token (--speculate=K). As far as it agrees they stand; where it doesn't, its own token takes their place
and the rest is forgotten. The text, or with a temperature its distribution, is exactly that of plain decoding.

                   .-------------------------- K drafts of the MTP module <--------------------------.
                   v                                                                                 |
    [newest, K drafts] --main model--> h [B, 1+K, D] --head--> which drafts stand, one token more --MTP(h, tokens)

Shapes: B rows, T prompt tokens, S cached tokens, K drafted tokens, D dim, V vocabulary.
"""
import codecs
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import backend
import configs
import parallel
from configs import MACHINE_FIELDS, Config, UserError, param
from experts_few import MAX_TOKENS
from model import V3, config_from_hf, from_hf, official_tensors
from tokenizer import load_tokenizer, special

# --- from logits to a token -------------------------------------------------------------------------------------------

def distribution(logits, temperature, top_k=0, top_p=1.0):
    """What is sampled from: logits [..., V] -> probabilities [..., V], each row on its own. temperature > 0.

    In this order: divide by the temperature, keep the top_k likeliest tokens (0: all), and of these the nucleus, the
    smallest set whose probabilities reach top_p. The tail is long: each token in it is unlikely and wrong, and together
    they would be drawn often.
    """
    V = logits.shape[-1]
    top, ids = logits.topk(min(top_k or V, V))                                   # likeliest first, [..., k]
    probs = ((top - top[..., :1]) / temperature).softmax(-1)                     # the best at 0: no overflow when cold
    if top_p < 1:
        # Walk down the row: a token stays as long as those before it have not reached top_p. The first always stays.
        before = probs.cumsum(-1) - probs
        probs = probs * (before < top_p)
        probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, ids, probs)                      # back in the vocabulary's order


def draw(probs, generator=None):
    """One token per row: probs [..., V], which need not add up to one -> int64 [...].

    A race: with exponential times e_i, the largest p_i / e_i is i's with probability p_i. Unlike torch.multinomial it
    asks the host for nothing, so a CUDA graph can hold it.
    """
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


def sample_token(logits, temperature=0.8, top_k=0, top_p=0.95, generator=None):
    """logits [..., V] -> one token per row, int64 [...]: the likeliest at temperature 0, else drawn with `generator`
    (on the logits' device)."""
    if temperature == 0:
        return logits.argmax(-1)
    return draw(distribution(logits, temperature, top_k, top_p), generator)


def accept(p, q, drafts, generator=None):
    """The rejection rule of speculative sampling: drafts that were drawn from q become draws from p.

    p [B, 1+K, V], the main model's distributions at the drafts and behind them; q [B, K, V]; drafts int64 [B, K] -> how
    many of the drafts stand, int64 [B] in 0..K, and the token that follows them [B].

    Draft x stands with probability min(1, p(x) / q(x)). The first that falls, and with it all behind it, is replaced by
    a draw from max(p - q, 0): x is then written with probability min(p, q)(x) + max(p - q, 0)(x) = p(x). Where all
    stand, p behind them gives one more.
    """
    chosen = lambda probs: probs.gather(2, drafts.unsqueeze(2)).squeeze(2)                         # [B, K]
    u = torch.rand(drafts.shape, generator=generator, device=p.device, dtype=p.dtype)
    stand = (u * chosen(q) < chosen(p[:, :-1])).long().cumprod(1).sum(1)                           # [B]
    rows = torch.arange(len(p), device=p.device)
    here = p[rows, stand]                                                                          # [B, V]
    rest = (here - F.pad(q, (0, 0, 0, 1))[rows, stand]).clamp_min(0)               # behind the last draft q is nothing
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, here)                  # p = q, and a draft fell by rounding
    return stand, draw(rest, generator)


# --- a batch and its steps --------------------------------------------------------------------------------------------

PIECE = 8192                                  # tokens, of all rows together, that prefill reads at once: for its memory


class Batch:
    """B texts between two steps: their latents in the cache, and the tokens that are not in it yet, the newest of each
    row and K drafts behind it. A step needs nothing from the host and changes only these tensors, so that a CUDA graph
    can repeat it.

    `lengths` [B] of the prompts; `sampling` (temperature, top_k, top_p). Rows write `steps` tokens at most: one that
    has is held where it stands until the others are done.
    """

    def __init__(self, v3, prompts, steps, sampling, generator, drafts):
        B, T, device = len(prompts), max(map(len, prompts)), v3.embed.weight.device
        self.v3, self.sampling, self.generator, self.K = v3, sampling, generator, drafts
        self.prompts = torch.tensor([p + [0] * (T + 1 - len(p)) for p in prompts]).to(device)      # [B, T+1], padded
        self.lengths = torch.tensor([len(p) for p in prompts]).to(device)
        # A row's last token is drawn when all but two of its tokens are cached: the last one itself is never read, and
        # the one before it goes in with the step that draws it.
        self.end = self.lengths + steps - 2
        self.rows = torch.arange(B, device=device)
        self.cache = v3.cache(B, T + steps - 1, drafts)        # the last token is made and never read
        self.tokens = torch.zeros(B, 1 + drafts, dtype=torch.int64, device=device)
        sampled, high = drafts if sampling[0] else 0, torch.promote_types(v3.embed.weight.dtype, torch.float32)
        self.q = torch.zeros(B, sampled, v3.config.vocab_size, dtype=high, device=device)    # they are drawn from this

    def prefill(self):
        """Read the prompts: the first token of every row [B, 1]."""
        B, T = len(self.prompts), self.prompts.shape[1] - 1
        size, last = max(1, PIECE // B), 0
        for start in range(0, T, size):
            n = min(size, T - start)
            h, _ = self.v3.hidden(self.prompts[:, start:start + n], self.cache)                    # [B, n, D]
            at = self.lengths[:, None] - 1 - start                                                 # last token of a row
            last = torch.where((at >= 0) & (at < n), h[self.rows, at[:, 0].clamp(0, n - 1)], last)         # [B, D]
            if self.K:                                         # the module's own latents; a row's last are made again
                self.v3.lookahead(h, self.prompts[:, start + 1:start + n + 1], self.cache)
            self.cache.advance(n)
        self.cache.advance(self.lengths - T)                   # the padding is forgotten
        first = sample_token(self.v3.logits(last), *self.sampling, generator=self.generator)[:, None]
        if self.K:
            self.cache.advance(-1)                             # back to the place of `last`
            self.draft(last[:, None], first, torch.ones_like(self.lengths))
        else:
            self.tokens.copy_(first)
        return first

    def step(self):
        """Plain decoding: the next token of every row [B, 1]."""
        h, _ = self.v3.hidden(self.tokens, self.cache)
        self.cache.advance(1)
        return self.tokens.copy_(sample_token(self.v3.logits(h), *self.sampling, generator=self.generator))

    def speculate(self):
        """One forward pass of the main model over the newest token and the drafts: the next tokens [B, 1+K], as many
        as stand; -1 in the place of the others."""
        h, _ = self.v3.hidden(self.tokens, self.cache)                                             # [B, 1+K, D]
        logits, drafts = self.v3.logits(h), self.tokens[:, 1:]
        if self.sampling[0] == 0:
            new = logits.argmax(-1)                            # its own choice after each: right as far as drafts are
            stand = (new[:, :-1] == drafts).long().cumprod(1).sum(1)                               # [B]
        else:
            stand, token = accept(distribution(logits, *self.sampling), self.q, drafts, self.generator)
            new = F.pad(drafts, (0, 1)).scatter(1, stand[:, None], token[:, None])
        self.draft(h, new, stand + 1)
        return new.masked_fill(torch.arange(1 + self.K, device=new.device) > stand[:, None], -1)

    def draft(self, h, new, count):
        """Keep count [B] of the tokens new [B, n], which follow the states h [B, n, D], and draft K tokens behind them.
        The module's latents are one more layer of the same cache, at the places of h: one count serves both models.

        The MTP module reads h_i and t_{i+1} at position i and predicts t_{i+2}. The main model has no h yet for what
        comes after that: the module's own state, from which the same head predicts the same token, stands in for it.
        """
        states = self.v3.lookahead(h, new, self.cache)                                             # [B, n, D]
        self.cache.advance(torch.minimum(count, self.end - self.cache.lengths))
        last = self.rows, count - 1
        state, tokens = states[last][:, None], [new[last][:, None]]                                # [B, 1, D], [B, 1]
        for k in range(self.K):
            if k:
                state = self.v3.lookahead(state, tokens[-1], self.cache)
                self.cache.advance(1)
            logits = self.v3.logits(state)                                                         # [B, 1, V]
            if self.sampling[0]:
                probs = distribution(logits, *self.sampling)
                self.q[:, k] = probs[:, 0]
            tokens.append(draw(probs, self.generator) if self.sampling[0] else logits.argmax(-1))
        self.cache.advance(1 - self.K)                         # the K - 1 places that drafting went on are not text
        torch.cat(tokens, 1, out=self.tokens)

    def graph(self, step):
        """`step` as a CUDA graph (backend.captured). From here on the host knows nothing of the lengths."""
        self.cache.static = True
        return backend.captured(step, (self.tokens, self.q, self.cache.lengths), self.generator)


# --- from prompts to continuations ------------------------------------------------------------------------------------

def room(config, prompts):
    """How many tokens the context leaves after the longest of the prompts (the last one is never read, so it may stand
    just outside). UserError where a prompt alone is too long."""
    longest = max(map(len, prompts))
    if longest > config.context:
        raise UserError(f"the prompt has {longest} tokens, this model reads at most {config.context}: shorten "
                        f"--prompt, or train with a larger --seq_len")
    return config.context + 1 - longest


def rounds(batch, steps):
    """The tokens of each step in turn, as lists: the one time a step that the host waits for the device."""
    on_host = backend.on_host
    ready, step = on_host(batch.prefill()), batch.speculate if batch.K else batch.step
    if not backend.use_graph(batch.v3.config, batch.tokens, MAX_TOKENS):
        for _ in range(steps - 1):
            yield ready()
            ready = on_host(step())
    elif steps > 1:
        step = batch.graph(step)
        for _ in range(steps - 1):                             # the device works on the next step while the host reads
            ready, last = on_host(step()), ready
            yield last()
    yield ready()


@torch.inference_mode()
def generate(v3, prompts, max_tokens, temperature=0.8, top_k=0, top_p=0.95, generator=None, eos=None, on_token=None,
             drafts=0, tally=None):
    """Continue a batch of prompts (lists of token ids, none empty) -> a list of lists: the new tokens of each.

    At most max_tokens per row, fewer where the context ends (`room`); a row stops at `eos`, which it doesn't return.
    generator: on v3's device. on_token(row, token) is told of each token as it is made. drafts: how many tokens the MTP
    module drafts for each forward pass of the main model, 0 = none; tally: a Counter of what came of it, "forwards" and
    "accepted" over all rows. ValueError if v3 is in training mode (its layers may recompute then, and don't write the
    cache), for an empty prompt, and for drafts without an MTP module.
    """
    if v3.training:
        raise ValueError("generate: call v3.eval() first")
    if not all(prompts):
        raise ValueError("generate: a prompt is empty")
    if max_tokens < 1:
        raise ValueError(f"generate: max_tokens is {max_tokens}, it must be at least 1")
    if drafts and not v3.mtp:
        raise ValueError("generate: drafts need an MTP module, and n_mtp is 0")
    steps, tally = min(max_tokens, room(v3.config, prompts)), Counter() if tally is None else tally
    batch = Batch(v3, prompts, steps, (temperature, top_k, top_p), generator, drafts)
    out, going = [[] for _ in prompts], set(range(len(prompts)))
    for n, tokens in enumerate(rounds(batch, steps)):
        for row in sorted(going):                              # rows that have ended run along until the last has
            tally.update(forwards=1 if drafts and n else 0)    # the first token is the prompt's
            for k, token in enumerate(token for token in tokens[row] if token >= 0):
                tally.update(accepted=1 if k else 0)
                if token != eos:
                    out[row].append(token)
                    if on_token:
                        on_token(row, token)
                if token == eos or len(out[row]) == steps:
                    going.discard(row)
                    break
        if not going:
            break
    return out


# --- text in, text out ------------------------------------------------------------------------------------------------

def encode(tokenizer, text, suffix=""):
    """The ids of a prompt. Text that looks like a special token is text (encode_ordinary).

    In training every document follows the eos of the one before it. So an eos in front says that the text starts here
    and is not the middle of something, and alone it asks for a new document. DeepSeek's own models have a token for it.
    With a suffix the model fills the hole between the two, in the order it was trained on (PSM, section 4.1).
    """
    bos = "<｜begin▁of▁sentence｜>"
    start = tokenizer.encode_single_token(bos) if bos in tokenizer.special_tokens_set else special(tokenizer, "eos")
    ids = [] if start is None else [start]
    if suffix:
        begin, hole, end = (special(tokenizer, f"fim_{part}") for part in ("begin", "hole", "end"))
        if None in (begin, hole, end):
            raise UserError("--suffix: this model's tokenizer has no tokens for filling in the middle; leave it out")
        ids += [begin, *tokenizer.encode_ordinary(text), hole, *tokenizer.encode_ordinary(suffix), end]
    else:
        ids += tokenizer.encode_ordinary(text)
    if not ids:
        raise UserError("--prompt is empty, and no token of this model's tokenizer starts a document; give some text")
    return ids


def characters(tokenizer):
    """A function from the next token to the characters that it completes. A token may end inside the bytes of one: they
    wait for the next token, and are not shown if none comes."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def completed_by(token):
        try:
            return utf8.decode(tokenizer.decode_single_token_bytes(token))
        except KeyError:                                       # a row of the embedding that has no token
            return utf8.decode("\ufffd".encode())
    return completed_by


# --- from a folder to a model -----------------------------------------------------------------------------------------

def is_hf(folder):
    return (folder / "config.json").is_file()


def look(path, ema=False):
    """(folder, Config, tokenizer, what it is) of a run's newest checkpoint, one checkpoint or a Hugging Face folder.
    The weights are not touched: what is wrong with the input shows before the long work. UserError."""
    if not path:
        raise UserError("--out_dir is empty: give a run's folder, a checkpoint or a Hugging Face folder")
    folder = Path(path)
    if is_hf(folder):
        config, what = config_from_hf(folder), f"{folder}"
    else:
        folder = parallel.latest(folder)
        state = parallel.read_state(folder)
        # Where and how the run ran is no part of the model, and what another version's fields mean we can't know.
        config = Config(**{key: configs.convert(key, value, f"{folder}/state.json")
                           for key, value in state["config"].items() if key in configs.FIELDS.keys() - MACHINE_FIELDS})
        configs.check(config)
        what = f"{folder}, trained for {state['step']} of {config.max_steps} steps"
    if ema and not config.ema_decay:
        raise UserError(f"--ema: {folder} keeps no average of its weights (ema_decay is 0); leave it out")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json there; put the model's own beside its config.json")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.n_vocab} tokens, the model only {config.vocab_size}; "
                        f"it belongs to another model")
    return folder, config, tokenizer, what + (", averaged weights" if ema else "")


def weights(folder, config, device, ema=False):
    """V3 in eval mode with the weights of what `look` found."""
    if is_hf(folder):
        bf16 = device.type == "cuda"
        v3 = from_hf(folder, device, precision="bf16" if bf16 else "fp32")
    else:
        # A run on a GPU may be sampled on a laptop, where BF16 is emulated and slow.
        bf16 = config.precision != "fp32" and (device.type != "cpu" or backend.native_bf16())
        with torch.device(device):
            v3 = V3(config.replace(precision="bf16" if bf16 else "fp32"))
        averaged = lambda name: ema and not name.endswith("_bias")               # gate biases are steps, not averages
        parallel.load_checkpoint(folder, {("ema/" if averaged(name) else "") + name: tensor
                                          for name, tensor in official_tensors(v3).items()})
    return (cast(v3) if bf16 else v3).eval()


def cast(v3):
    """The matrices in BF16, the dtype of their products: FP32 masters would be read and cast again for every token. The
    gate keeps its own, because BF16 scores tie."""
    for name, p in v3.named_parameters():
        if p.ndim > 1 and not name.endswith("gate.weight"):
            p.data = p.data.to(torch.bfloat16)
    return v3


def load(path, device="auto", ema=False):
    """(V3 in eval mode, tokenizer, what it is) of a checkpoint or Hugging Face folder, to generate and evaluate with,
    not to train: BF16 models come without their FP32 masters. ema: the averaged weights. UserError."""
    folder, config, tokenizer, what = look(path, ema)
    return weights(folder, config, backend.device(device), ema), tokenizer, what


# --- the command ------------------------------------------------------------------------------------------------------

@dataclass
class Options:
    out_dir: str = param("out/tiny", "a run's folder, one of its checkpoints, or a Hugging Face folder")
    prompt: list = param((), "text to continue; repeat it for a batch. No blank at its end: that belongs to the next "
                             "word. Default: 'def' for a model of Python, else a new document")
    suffix: str = param("", "text that comes after: fill in between the prompt and it")
    max_tokens: int = param(200, "most tokens to generate per sequence", 1)
    temperature: float = param(0.8, "0 = always the likeliest token, 1 = as the model thinks", 0.0)
    top_k: int = param(0, "sample among this many likeliest tokens; 0 = all", 0)
    top_p: float = param(0.95, "sample among the fewest likeliest tokens that together have this probability", 0.0, 1.0)
    seed: int = param(1337, "seed of the sampling", 0, 2**63 - 1)
    num_samples: int = param(1, "sequences per prompt", 1)
    speculate: int = param(0, "tokens that the MTP module drafts for each step of the model; 0 = none", 0, 8)
    interactive: bool = param(False, "prompt after prompt from the terminal; an empty line ends")
    stream: bool = param(True, "print tokens as they come, where there is one sequence")
    ema: bool = param(False, "use the averaged weights of a run with ema_decay")
    device: str = param("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))


def parse(argv):
    o = configs.options(Options, "sample.py", argv)
    if o.top_p == 0:
        raise UserError("--top_p=0: nothing would be left to sample; always the likeliest token is --temperature=0")
    return o


def size(v3):
    """Parameters of the main model, the part that works here: MTP modules only draft."""
    return sum(p.numel() for name, p in v3.named_parameters() if not name.startswith("mtp."))


def fit(v3, rows, tokens, drafts):
    """UserError where `rows` sequences of so many tokens cannot be in memory: their latents and one step's logits, of
    which sampling keeps a few sorted copies."""
    per_row = v3.cache(1, 1, drafts).bytes_per_token * tokens + 6 * 4 * v3.config.vocab_size * (1 + drafts)
    need, free = rows * per_row, backend.free_memory(v3.embed.weight.device)
    if free is not None and need > free:
        raise UserError(f"a batch of {rows:,} sequences of {tokens:,} tokens takes {need / 1e9:,.1f} GB, "
                        f"{free / 1e9:,.1f} GB are free: ask for fewer --num_samples or --max_tokens")


def respond(v3, tokenizer, prompts, o, generator, what):
    """Print what the model makes of each prompt, then one line on what it took. Returns the exit code."""
    ids = [encode(tokenizer, prompt, o.suffix) for prompt in prompts]
    steps = min(o.max_tokens, room(v3.config, ids))
    tokens = max(map(len, ids)) + steps
    fit(v3, len(ids) * o.num_samples, tokens, o.speculate)
    prompts, ids = ([each for each in all_ for _ in range(o.num_samples)] for all_ in (prompts, ids))
    live, code, tally = o.stream and len(prompts) == 1, 0, Counter()
    decoders, pieces = [characters(tokenizer) for _ in prompts], [[] for _ in prompts]

    def on_token(row, token):
        pieces[row].append(decoders[row](token))
        if live:
            print(pieces[row][-1], end="", flush=True)

    print(prompts[0] if live else "", end="", flush=True)
    began = time.perf_counter()
    try:
        generate(v3, ids, steps, o.temperature, o.top_k, o.top_p, generator, special(tokenizer, "eos"), on_token,
                 drafts=o.speculate, tally=tally)
    except KeyboardInterrupt:                                  # what there is by now is printed all the same
        code = 130
    seconds = time.perf_counter() - began
    for row, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"--- {row + 1} of {len(prompts)} ---")
        print(("" if live else prompt + "".join(pieces[row])) + o.suffix, flush=True)

    # The last line goes to stderr, apart from the text, which may go to a file.
    count, per_token = sum(map(len, pieces)), v3.cache(1, 1, o.speculate).bytes_per_token
    line = f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s; latent cache {per_token:,} bytes a " \
           f"token, {per_token * len(ids) * tokens / 1e6:.2f} MB in all; {what}, {size(v3) / 1e6:.2f}M parameters"
    if tally["forwards"]:
        accepted = tally["accepted"] / tally["forwards"]                # of each forward pass
        line += f"; {accepted / o.speculate:.0%} of the drafts accepted, {1 + accepted:.2f} tokens per forward pass"
    if max(map(len, pieces)) == steps < o.max_tokens:
        line += f"; the context of {v3.config.context} tokens had room for {steps} new ones, not {o.max_tokens}"
    print(f"[{line}]", file=sys.stderr, flush=True)
    return code


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(configs.options_usage(Options, "sample.py", __doc__.splitlines()[0]))
        return 0
    o = parse(argv)
    try:
        return run(o)
    except KeyboardInterrupt:
        print()
        return 130
    except (MemoryError, RuntimeError) as e:
        if not backend.out_of_memory(e):
            raise
        raise UserError("out of memory: ask for fewer --num_samples or --max_tokens, or use --device=cpu") from None


def run(o):
    if o.interactive and (o.prompt or o.suffix):
        raise UserError("--interactive reads its prompts from the terminal: leave out --prompt and --suffix")
    device = backend.device(o.device)
    folder, config, tokenizer, what = look(o.out_dir, o.ema)
    if o.suffix and not config.fim_rate:
        raise UserError("--suffix: this model never saw a hole to fill (it was trained with fim_rate 0); leave it out")
    if o.speculate and not config.n_mtp:
        raise UserError("--speculate: this model has no MTP module to draft with (n_mtp is 0); leave it out")
    prompts = o.prompt or ["def" if config.data == "stdlib" and not is_hf(folder) else ""]
    room(config, [encode(tokenizer, prompt, o.suffix) for prompt in prompts])
    v3 = weights(folder, config, device, o.ema)
    if device.type == "cpu" and size(v3) < 1e8:
        # One token is little work: threads would wait for each other more than they help, on a busy machine for long.
        torch.set_num_threads(1)
    generator = torch.Generator(device).manual_seed(o.seed)
    # A terminal that can't show a character gets a question mark, not a traceback.
    sys.stdout.reconfigure(errors="replace")
    if not o.interactive:
        return respond(v3, tokenizer, prompts, o, generator, what)
    while True:
        try:
            line = input("> ")
        except EOFError:                                       # Ctrl-D
            return print() or 0
        if not line:
            return 0
        try:
            code = respond(v3, tokenizer, [line], o, generator, what)
        except UserError as e:                                 # this line was too long; the next may not be
            print(f"error: {e}", file=sys.stderr)
            continue
        if code:
            return code


if __name__ == "__main__":
    configs.cli(main)
