"""Generation: python sample.py --prompt="class Queue" goes on writing, with the newest checkpoint in out/tiny.

The problem. Tokens come one at a time, and each needs the whole model: every active weight is read from memory for one
multiplication and one addition. A processor does tens to hundreds of those in the time of one read, so decoding waits
for memory: time per token = (active weights + cache) / bandwidth. Two remedies. A batch reads the weights once for all
of its rows. The cache is each row's own, there only a smaller one helps: MLA keeps r_kv + d_r numbers per token and
layer instead of the keys and values of every head, in V3 576 instead of 128 * (192 + 128) = 40,960.

Latent attention runs in both of its forms (mla.py), each where it is cheap:

    prefill   prompts [B, T] --naive-----> h [B, T, D], of each row the last --head--> [B, V] --sample--> token [B]
                                `-> T latents a row go to the cache
    decode    token [B, 1] ---absorbed---> h [B, 1, D] --head--> [B, V] --sample--> token [B], and so on
                                `-> one latent more a row; its query reads all S of them as they are

The prompts of a batch may differ in length: they are padded on the right, where causal attention never looks, and each
row's next token overwrites its padding.

Shapes: B rows, T prompt tokens, S cached tokens, D dim, V vocabulary.
"""
import codecs
import dataclasses
import difflib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import backend
import configs
import parallel
from configs import MACHINE_FIELDS, Config, UserError, param
from data import load_tokenizer, special
from model import V3, config_from_hf, from_hf, official_tensors

# --- from logits to a token -------------------------------------------------------------------------------------------

def distribution(logits, temperature, top_k=0, top_p=1.0):
    """What is sampled from: logits [B, V] -> probabilities [B, V], each row on its own. temperature > 0.

    In this order: divide by the temperature, keep the top_k likeliest tokens (0: all), and of these the nucleus, the
    smallest set whose probabilities reach top_p. The tail is long: each token in it is unlikely and wrong, and together
    they would be drawn often.
    """
    V = logits.shape[1]
    top, ids = logits.topk(min(top_k or V, V))                                   # likeliest first, [B, k]
    probs = ((top - top[:, :1]) / temperature).softmax(1)                        # the best at 0: no overflow when cold
    if top_p < 1:
        # Walk down the row: a token stays as long as those before it have not reached top_p. The first always stays.
        before = probs.cumsum(1) - probs
        probs = probs * (before < top_p)
        probs = probs / probs.sum(1, keepdim=True)
    return torch.zeros_like(logits).scatter(1, ids, probs)                       # back in the vocabulary's order


def sample_token(logits, temperature=0.8, top_k=0, top_p=0.95, generator=None):
    """logits [B, V] -> one token per row, int64 [B]: the likeliest at temperature 0, else drawn with `generator`."""
    if temperature == 0:
        return logits.argmax(1)
    return torch.multinomial(distribution(logits, temperature, top_k, top_p), 1, generator=generator)[:, 0]


# --- from prompts to continuations ------------------------------------------------------------------------------------

def room(config, prompts):
    """How many tokens the context leaves after the longest of the prompts (the last one is never read, so it may stand
    just outside). UserError where a prompt alone is too long."""
    longest = max(map(len, prompts))
    if longest > config.context:
        raise UserError(f"the prompt has {longest} tokens, this model reads at most {config.context}: shorten "
                        f"--prompt, or train with a larger --seq_len")
    return config.context + 1 - longest


@torch.inference_mode()
def generate(v3, prompts, max_tokens, temperature=0.8, top_k=0, top_p=0.95, generator=None, eos=None, on_token=None):
    """Continue a batch of prompts (lists of token ids, none empty) -> a list of lists: the new tokens of each.

    At most max_tokens per row, fewer where the context ends (`room`); a row stops at `eos`, which it doesn't return.
    generator: on v3's device. on_token(row, token) is told of each token as it is made. ValueError if v3 is in training
    mode: its layers may recompute then, and don't write the cache.
    """
    if v3.training or not all(prompts):
        raise ValueError("generate: call v3.eval() first" if v3.training else "generate: a prompt is empty")
    B, steps, device = len(prompts), min(max_tokens, room(v3.config, prompts)), v3.embed.weight.device
    lengths = torch.tensor([len(p) for p in prompts])
    T = int(lengths.max())
    tokens = torch.tensor([p + [0] * (T - len(p)) for p in prompts]).to(device)          # [B, T], padded on the right
    lengths = lengths.to(device)

    cache = v3.cache(B, T + steps - 1)                         # the last token is made and never read
    h, _ = v3.hidden(tokens, cache)                                                      # prefill: [B, T, D]
    cache.advance(lengths)
    h = h[torch.arange(B, device=device), lengths - 1]                                   # at each last token: [B, D]
    out, going = [[] for _ in prompts], set(range(B))
    for step in range(steps):
        if step:
            h, _ = v3.hidden(tokens[:, None], cache)                                     # decode: [B, 1, D]
            cache.advance(1)
            h = h[:, 0]
        tokens = sample_token(v3.logits(h), temperature, top_k, top_p, generator)        # [B]
        # The one time a step that the host waits for the device. Rows that have ended run along until the last has.
        for row, token in enumerate(tokens.tolist()):
            if token == eos:
                going.discard(row)
            if row in going:
                out[row].append(token)
                if on_token:
                    on_token(row, token)
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
    interactive: bool = param(False, "prompt after prompt from the terminal; an empty line ends")
    stream: bool = param(True, "print tokens as they come, where there is one sequence")
    ema: bool = param(False, "use the averaged weights of a run with ema_decay")
    device: str = param("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))


FLAGS = {f.name: f for f in dataclasses.fields(Options)}


def usage():
    lines = [__doc__.splitlines()[0], "", "usage: python sample.py [--key=value ...]", ""]
    for name, f in FLAGS.items():
        lines.append(f"  --{name}={'' if f.type is list else f.default}".ljust(24) + f.metadata["help"])
    return "\n".join(lines)


def parse(argv):
    """['--top_k=5', ...] -> Options. UserError names the flag and what it takes."""
    values = {}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in FLAGS:
            near = difflib.get_close_matches(name, FLAGS, 1)
            raise UserError(f"{arg}: unknown; flags are written --key=value, "
                            + (f"did you mean --{near[0]}?" if near else "python sample.py --help lists them"))
        kind, (low, high, choices) = FLAGS[name].type, (FLAGS[name].metadata[k] for k in ("low", "high", "choices"))
        if not equals and kind is not bool:
            raise UserError(f"{arg}: write {arg}=VALUE")
        try:
            if kind is bool:
                value = {"": True, "true": True, "1": True, "false": False, "0": False}[text.lower()]
            else:
                value = [*values.get(name, ()), text] if kind is list else kind(text)
        except (ValueError, KeyError):
            raise UserError(f"{arg}: {name} must be {'True or False' if kind is bool else kind.__name__}, "
                            f"not {text!r}") from None
        # The comparison also refuses nan, for which none holds.
        if low is not None and not low <= value <= (math.inf if high is None else high):
            raise UserError(f"{arg}: out of range: at least {low}" + (f", at most {high}" if high else ""))
        if name == "top_p" and value == 0:
            raise UserError(f"{arg}: nothing would be left to sample; always the likeliest token is --temperature=0")
        if choices and value not in choices:
            raise UserError(f"{arg}: not one of {', '.join(choices)}")
        values[name] = value
    return Options(**values)


def size(v3):
    """Parameters of the main model, the part that works here: MTP modules only draft."""
    return sum(p.numel() for name, p in v3.named_parameters() if not name.startswith("mtp."))


def respond(v3, tokenizer, prompts, o, generator, what):
    """Print what the model makes of each prompt, then one line on what it took. Returns the exit code."""
    prompts = [prompt for prompt in prompts for _ in range(o.num_samples)]
    ids = [encode(tokenizer, prompt, o.suffix) for prompt in prompts]
    steps = min(o.max_tokens, room(v3.config, ids))
    live, code = o.stream and len(prompts) == 1, 0
    decoders, pieces = [characters(tokenizer) for _ in prompts], [[] for _ in prompts]

    def on_token(row, token):
        pieces[row].append(decoders[row](token))
        if live:
            print(pieces[row][-1], end="", flush=True)

    print(prompts[0] if live else "", end="", flush=True)
    began = time.perf_counter()
    try:
        generate(v3, ids, steps, o.temperature, o.top_k, o.top_p, generator, special(tokenizer, "eos"), on_token)
    except KeyboardInterrupt:                                  # what there is by now is printed all the same
        code = 130
    seconds = time.perf_counter() - began
    for row, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"--- {row + 1} of {len(prompts)} ---")
        print(("" if live else prompt + "".join(pieces[row])) + o.suffix, flush=True)

    # The last line goes to stderr, apart from the text, which may go to a file.
    count, per_token = sum(map(len, pieces)), v3.cache(1, 1).bytes_per_token
    cache = per_token * len(ids) * (max(map(len, ids)) + steps)
    line = f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s; latent cache {per_token:,} bytes a " \
           f"token, {cache / 1e6:.2f} MB in all; {what}, {size(v3) / 1e6:.2f}M parameters"
    if max(map(len, pieces)) == steps < o.max_tokens:
        line += f"; the context of {v3.config.context} tokens had room for {steps} new ones, not {o.max_tokens}"
    print(f"[{line}]", file=sys.stderr, flush=True)
    return code


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(usage())
        return 0
    o = parse(argv)
    try:
        return run(o)
    except KeyboardInterrupt:
        print()
        return 130
    except torch.OutOfMemoryError:
        raise UserError("out of memory: ask for fewer --num_samples or --max_tokens, or use --device=cpu") from None


def run(o):
    if o.interactive and (o.prompt or o.suffix):
        raise UserError("--interactive reads its prompts from the terminal: leave out --prompt and --suffix")
    device = backend.device(o.device)
    folder, config, tokenizer, what = look(o.out_dir, o.ema)
    if o.suffix and not config.fim_rate:
        raise UserError("--suffix: this model never saw a hole to fill (it was trained with fim_rate 0); leave it out")
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
