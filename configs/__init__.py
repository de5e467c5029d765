"""Config: every number that shapes a model or a run, in one typed dataclass.

    python train.py config/tiny.py --lr=2e-3

takes the defaults below, then the assignments in configs/tiny.py, then the command line, each over the one before. A
config file holds assignments and arithmetic and nothing else; it is parsed, never executed. Model fields carry the
names of the official inference code, so a Hugging Face config.json and the report's section 4.2 read the same here.

A mistake of the user (a misspelt key, a number out of range, dims that don't divide) raises UserError: `cli` turns it
into one line on stderr and exit code 2.
"""
import ast
import dataclasses
import difflib
import math
import operator
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can mend: one line that names the input and the remedy."""


def param(default, help, low=None, high=None, choices=None):
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass
class Config:
    # --- the model ----------------------------------------------------------------------------------------------------
    vocab_size: int = param(4096, "rows of the embedding; a trained tokenizer gets exactly this many tokens", 2)
    dim: int = param(256, "width of the residual stream (D)", 1)
    n_layers: int = param(4, "transformer blocks of the main model", 1, 10_000)
    n_dense_layers: int = param(1, "first blocks with a dense FFN instead of experts", 0)
    inter_dim: int = param(704, "hidden width of a dense FFN", 1)
    moe_inter_dim: int = param(256, "hidden width of one expert", 1)
    n_heads: int = param(4, "attention heads (H)", 1)
    q_lora_rank: int = param(0, "rank of the query latent (r_q); 0 = no compression", 0)
    kv_lora_rank: int = param(64, "rank of the key-value latent (r_kv), the part that is cached", 1)
    qk_nope_head_dim: int = param(32, "per-head query/key dims without position (d_n)", 1)
    qk_rope_head_dim: int = param(32, "query/key dims with RoPE (d_r); the key's are shared by all heads", 2)
    v_head_dim: int = param(64, "per-head value dims (d_v)", 1)
    n_routed_experts: int = param(8, "routed experts (E)", 1)
    n_shared_experts: int = param(1, "shared experts, as one FFN of n_shared_experts * moe_inter_dim", 0)
    n_activated_experts: int = param(2, "routed experts each token visits (K)", 1)
    n_expert_groups: int = param(1, "groups of experts, one per node", 1)
    n_limited_groups: int = param(1, "groups a token may choose its experts from", 1)
    route_scale: float = param(1.0, "factor on the normalized gate weights", 0.0)
    n_mtp: int = param(1, "multi-token prediction depths", 0)
    norm_eps: float = param(1e-6, "epsilon of every RMSNorm", 0.0)
    init_std: float = param(0.02, "standard deviation of the initial weights (V3: 0.006)", 0.0)
    rope_theta: float = param(10000.0, "base of RoPE's frequencies", 1.0)
    max_seq_len: int = param(0, "longest context served; YaRN is on when it exceeds original_seq_len; 0 = seq_len", 0)
    original_seq_len: int = param(4096, "context of pre-training, before YaRN", 1)
    rope_factor: float = param(40.0, "YaRN: how far the context is stretched (s)", 1.0)
    beta_fast: float = param(32.0, "YaRN: dims that turn more often than this keep their frequency", 0.0)
    beta_slow: float = param(1.0, "YaRN: dims that turn less often than this are stretched fully", 0.0)
    mscale: float = param(1.0, "YaRN: attention temperature, cos/sin part", 0.0)
    mscale_all_dim: float = param(1.0, "YaRN: attention temperature, softmax part", 0.0)

    # --- the data -----------------------------------------------------------------------------------------------------
    data: str = param("stdlib", "stdlib (this Python's own library), a text file or folder, shakespeare, fineweb")
    tokenizer: str = param("bpe", "bpe (trained here, vocab_size tokens), bytes, a tiktoken name, or a tokenizer.json")
    seq_len: int = param(256, "tokens per training sequence (T)", 1)
    fim_rate: float = param(0.1, "share of documents rearranged for fill-in-the-middle (section 4.1)", 0.0, 1.0)

    # --- the optimization ---------------------------------------------------------------------------------------------
    batch_size: int = param(16, "sequences per optimizer step, over all ranks", 1, 10_000_000)
    micro_batch_size: int = param(16, "sequences per forward/backward pass on one rank", 1)
    max_steps: int = param(1000, "optimizer steps of the whole run", 1)
    lr: float = param(3e-3, "peak learning rate", 0.0)
    min_lr: float = param(3e-4, "learning rate at the end of the cosine", 0.0)
    final_lr: float = param(3e-4, "learning rate of the last third after decay_end (V3: 7.3e-6)", 0.0)
    warmup_steps: int = param(50, "steps of linear warmup", 0)
    decay_start: int = param(0, "step at which the cosine begins; the MTP weight falls to a third here", 0)
    decay_end: int = param(0, "step at which the cosine ends and the bias update stops; 0 = max_steps", 0)
    batch_ramp: int = param(0, "steps over which the batch grows from a fifth to batch_size; 0 = none", 0, 1_000_000)
    batch_multiple: int = param(1, "batches on the way are multiples of this, so that dp divides them", 1)
    weight_decay: float = param(0.1, "AdamW's decay, on matrices only", 0.0)
    beta1: float = param(0.9, "AdamW's first decay rate", 0.0, 1.0)
    beta2: float = param(0.95, "AdamW's second decay rate", 0.0, 1.0)
    grad_clip: float = param(1.0, "largest global gradient norm; 0 = no clipping", 0.0)
    mtp_weight: float = param(0.3, "weight of the MTP loss (lambda, eq 25)", 0.0)
    bias_update_speed: float = param(0.001, "step of the gate bias (gamma); 0 = no bias balancing", 0.0)
    balance_alpha: float = param(1e-4, "weight of the balance loss (alpha, eq 17); 0 = none", 0.0)
    balance_scope: str = param("sequence", "the balance loss looks at each sequence, or at the whole micro-batch",
                               choices=("sequence", "batch"))
    ema_decay: float = param(0.0, "decay of the weight average kept on the CPU; 0 = none", 0.0, 1.0)
    seed: int = param(1337, "seed of initialization and data order", 0)

    # --- the machine --------------------------------------------------------------------------------------------------
    device: str = param("auto", "where to run; auto = cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = param("fp32", "of the matrix products; weights stay fp32; fp8 wants a GPU that has it, "
                           "fp8_reference is the same on plain torch", choices=("fp32", "bf16", "fp8", "fp8_reference"))
    moments: str = param("fp32", "dtype of AdamW's two moments", choices=("fp32", "bf16"))
    bf16_head: bool = param(False, "the products of the head in the training loss in BF16, where the processor has it")
    recompute: bool = param(False, "recompute each block in backward instead of keeping its activations")
    recompute_mla: bool = param(False, "recompute MLA's norms and projections, not its output (section 3.2.3)")
    compile: bool = param(False, "torch.compile the model")
    graph: bool = param(True, "start a micro-batch's kernels as one CUDA graph, where none of them waits for the host")

    # --- the ranks: processes that torchrun starts, pp * dp of them (parallel.py) -------------------------------------
    dp: int = param(0, "ranks that share out each batch; 0 = all there are / pp", 0)
    pp: int = param(1, "ranks of the pipeline that the layers are cut for", 1)
    pipeline: str = param("dualpipe", "its schedule (dualpipe.py)", choices=("dualpipe", "dualpipev", "1f1b", "zb1p"))
    ep: int = param(1, "neighbours among the dp ranks that share out the experts", 1)
    nodes: int = param(0, "machines that the ranks stand on; 0 = as torchrun says", 0)
    zero1: bool = param(True, "each of the ranks with the same weights updates a part of them (ZeRO-1)")
    grad_sum: str = param("fp32", "dtype in which gradients are summed over ranks", choices=("fp32", "bf16"))
    timeout: int = param(600, "seconds after which a rank that waits for another gives up", 1, 10_000_000)

    # --- the run ------------------------------------------------------------------------------------------------------
    out_dir: str = param("", "folder of checkpoints and metrics; empty = out/<name of the config file>")
    eval_interval: int = param(250, "steps between evaluations; 0 = only at the end", 0)
    eval_stride: int = param(0, "tokens between the starts of evaluation windows; 0 = seq_len: they don't overlap", 0)
    save_interval: int = param(250, "steps between checkpoints; 0 = only at the end", 0)
    resume: bool = param(False, "go on from the newest checkpoint in out_dir")
    init_from: str = param("", "a Hugging Face folder: continue pre-training from its weights")
    eval_only: str = param("", "a checkpoint or Hugging Face folder: print its loss and bits per byte and leave")
    log_load: bool = param(False, "write the load of every expert in each step into metrics.jsonl (of rank 0's layers)")
    profile: bool = param(False, "trace a few steps for the torch profiler's viewers, then leave")
    plan: bool = param(False, "print the plan table and leave")
    world: int = param(0, "--plan for so many ranks", 0)

    # Derived numbers that several files need.
    @property
    def qk_head_dim(self):
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def context(self):
        """Longest context in tokens."""
        return self.max_seq_len or self.seq_len

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
# What may differ when a run is resumed: where and how it runs, not what it computes.
MACHINE_FIELDS = {"micro_batch_size", "device", "compile", "graph", "recompute", "recompute_mla", "dp", "pp",
                  "pipeline", "ep", "nodes", "zero1", "timeout", "out_dir", "eval_interval", "eval_stride",
                  "save_interval", "resume", "init_from", "eval_only", "log_load", "profile", "plan", "world"}


# --- from text to a checked Config ------------------------------------------------------------------------------------

def load(argv):
    """['configs/tiny.py', '--lr=1e-3', ...] -> Config. Each override is echoed. Raises UserError."""
    values, where, name = {}, {}, "run"
    for i, arg in enumerate(argv):
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            key = known(key, f"--{key}")
            if not equals:
                if FIELDS[key].type is not bool:
                    raise UserError(f"--{key}: write --{key}=VALUE")
                text = "True"
            values[key], where[key] = convert(key, text, arg), arg
            print(f"config: {key} = {values[key]!r}")
        elif i == 0:
            path = find(arg)
            name = path.stem
            for key, (value, place) in read(path).items():
                known(key, place)
                values[key], where[key] = convert(key, value, place), place
        else:
            raise UserError(f"{arg!r}: one config file, then --key=value (did you mean --{arg}?)")
    config = Config(**values)
    config.out_dir = config.out_dir or os.path.join("out", name)
    check(config, where)
    return config


def find(name):
    """'configs/tiny.py', 'config/tiny.py' or 'tiny' -> the path of the file."""
    shipped = [HERE / Path(name).name, HERE / (Path(name).name + ".py")]
    for path in (Path(name), *(shipped if str(Path(name).parent) in (".", "config", "configs") else ())):
        if path.is_file() and path.suffix == ".py" and path.name != "__init__.py":
            return path
    have = sorted(p.stem for p in HERE.glob("*.py") if p.stem != "__init__")
    near = difflib.get_close_matches(Path(name).stem, have, 1)
    raise UserError(f"config {name!r} not found; "
                    + (f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(have)}"))


def read(path):
    """{key: (value, 'file:line')} of a file of assignments; later lines may use earlier names in arithmetic."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"config {path}: {e.strerror}; make it readable") from None
    except (SyntaxError, ValueError) as e:
        raise UserError(f"config {path}: not valid Python: {e}") from None
    values, out = {}, {}
    for node in tree.body:
        place = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue                                                                    # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{place}: a config holds assignments only, 'key = value'")
        key = node.targets[0].id
        values[key] = evaluate(node.value, values, place)
        out[key] = values[key], place
    return out


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}


def evaluate(node, names, place):
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    try:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -evaluate(node.operand, names, place)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](evaluate(node.left, names, place), evaluate(node.right, names, place))
    except (ArithmeticError, TypeError) as e:
        raise UserError(f"{place}: {e}") from None
    raise UserError(f"{place}: a value is a number, a string, True/False or arithmetic on names above it")


def known(key, place):
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, 1)
        raise UserError(f"{place}: unknown key {key!r}; "
                        + (f"did you mean {near[0]!r}?" if near else "python train.py --help lists them"))
    return key


def convert(key, value, place):
    """The value of `key` in its declared type: command lines give text, files give Python values."""
    kind = FIELDS[key].type
    try:
        if kind is bool:
            return {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}[str(value)]
        if kind is int:
            number = float(value) if not isinstance(value, int) else value              # 1e6 and 2_000 are integers too
            if isinstance(value, bool) or number != int(number):
                raise ValueError
            return int(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else int(number)
        if kind is float and isinstance(value, bool) or kind is str and not isinstance(value, str):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(f"{place}: {key} must be {'True or False' if kind is bool else kind.__name__}, "
                        f"not {value!r}") from None


def check(c, where=None):
    """Ranges, choices and dims that must fit each other. Raises UserError naming the key and where it was set."""
    def wrong(key, message):
        raise UserError(f"{(where or {}).get(key, 'config')}: {key} = {getattr(c, key)!r} {message}")

    for key, f in FIELDS.items():
        value, low, high, choices = getattr(c, key), *(f.metadata[k] for k in ("low", "high", "choices"))
        if choices and value not in choices:
            wrong(key, f"is not one of {', '.join(choices)}")
        if f.type is int and high is None:
            high = 2**63 - 1                                                            # what torch and numpy can hold
        if f.type is float and not math.isfinite(value):
            wrong(key, "is not a finite number")
        if low is not None and value < low:
            wrong(key, f"is out of range: at least {low}")
        if high is not None and value > high:
            wrong(key, f"is out of range: at most {high}")
    if c.qk_rope_head_dim % 2:
        wrong("qk_rope_head_dim", "must be even: RoPE turns pairs")
    if c.n_dense_layers > c.n_layers:
        wrong("n_dense_layers", f"is more than n_layers = {c.n_layers}")
    if c.n_routed_experts % c.n_expert_groups:
        wrong("n_expert_groups", f"does not divide n_routed_experts = {c.n_routed_experts}")
    if c.n_limited_groups > c.n_expert_groups:
        wrong("n_limited_groups", f"is more than n_expert_groups = {c.n_expert_groups}")
    reachable = c.n_routed_experts // c.n_expert_groups * c.n_limited_groups
    if c.n_activated_experts > reachable:
        wrong("n_activated_experts", f"is more than the {reachable} experts in n_limited_groups = {c.n_limited_groups}")
    if c.n_expert_groups > 1 and c.n_routed_experts // c.n_expert_groups < 2:
        wrong("n_expert_groups", "leaves groups of one expert; a group's score is the sum of its best two")
    if c.max_seq_len and c.max_seq_len < c.seq_len:
        wrong("max_seq_len", f"is shorter than seq_len = {c.seq_len}")
    for key, least in dict(rope_theta=1, beta_fast=0, beta_slow=0).items():
        if getattr(c, key) == least:
            wrong(key, f"must be above {least}")
    if c.beta1 == 1 or c.beta2 == 1:
        wrong("beta1" if c.beta1 == 1 else "beta2", "must be below 1")
    if c.ema_decay == 1:
        wrong("ema_decay", "must be below 1")
    if c.decay_end and c.decay_start > c.decay_end:
        wrong("decay_start", f"is after decay_end = {c.decay_end}")
    if c.min_lr > c.lr:
        wrong("min_lr", f"is more than lr = {c.lr}; give both")
    if c.batch_size % c.batch_multiple:
        wrong("batch_multiple", f"does not divide batch_size = {c.batch_size}")
    if c.eval_stride > c.seq_len:
        wrong("eval_stride", f"is more than seq_len = {c.seq_len}: it would leave tokens out")
    if c.compile and c.precision.startswith("fp8"):
        wrong("compile", f"does not go with precision = {c.precision!r}: torch.compile cannot trace a weight that "
                         f"keeps its FP8 copy from step to step")
    if not c.data:
        wrong("data", "is empty")


# --- the command line -------------------------------------------------------------------------------------------------

def usage(command):
    """--help: every key with its default and meaning."""
    lines = [f"usage: python {command} CONFIG [--key=value ...]", "",
             "CONFIG: " + ", ".join(sorted(p.stem for p in HERE.glob("*.py") if p.stem != "__init__"))
             + ", or the path of a file of assignments", ""]
    for f in FIELDS.values():
        choices = f.metadata["choices"]
        lines.append(f"  --{f.name + '=' + str(f.default):32} {f.metadata['help']}"
                     + (f" ({', '.join(choices)})" if choices else ""))
    return "\n".join(lines)


def options_usage(Options, command, what):
    """--help of a command whose flags are the fields of the dataclass Options."""
    lines = [what, "", f"usage: python {command} [--key=value ...]", ""]
    for f in dataclasses.fields(Options):
        default = "" if f.type is list or f.default is None else f.default
        lines.append(f"  --{f.name}={default}".ljust(24) + f.metadata["help"])
    return "\n".join(lines)


def options(Options, command, argv):
    """['--top_k=5', ...] -> Options, a dataclass of `param`s; a list's flag may be repeated. UserError names the flag
    and what it takes."""
    flags, values = {f.name: f for f in dataclasses.fields(Options)}, {}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in flags:
            near = difflib.get_close_matches(name, flags, 1)
            raise UserError(f"{arg}: unknown; flags are written --key=value, "
                            + (f"did you mean --{near[0]}?" if near else f"python {command} --help lists them"))
        kind, (low, high, choices) = flags[name].type, (flags[name].metadata[k] for k in ("low", "high", "choices"))
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
        if low is not None and not (low <= value <= (math.inf if high is None else high) and value != math.inf):
            raise UserError(f"{arg}: out of range: at least {low}" + (f", at most {high:g}" if high else ""))
        if choices and value not in choices:
            raise UserError(f"{arg}: not one of {', '.join(choices)}")
        values[name] = value
    return Options(**values)


def say(text, end="\n"):
    """A line of progress; of torchrun's many processes only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end=end, flush=True)


def tick(text):
    """A line that the next one overwrites; nothing where nobody watches."""
    if sys.stdout.isatty():
        say(f"{text:60}", end="\r")


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def cli(main):
    """Run main(sys.argv[1:]); a UserError becomes one line and exit code 2."""
    try:
        code = main(sys.argv[1:])
    except UserError as e:
        print("error:", str(e).replace("\n", " "), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:                                                             # `| head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
