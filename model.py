"""V3: the blocks of mla.py and moe.py composed into DeepSeek-V3 (section 2), with multi-token prediction and its loss.

    tokens [B, T] -> embed -> n_layers x block -> norm -> head -> logits [B, T, vocab]

    block:  h = x + MLA(norm(x));   y = h + FFN(norm(h))            FFN: dense in the first layers, then a mixture

A block is written in four parts, attention | dispatch | experts | combine, because a pipeline that overlaps one
micro-batch's communication with another's arithmetic (section 3.2.1) needs to cut it there.

Multi-token prediction (MTP, section 2.2): depth k is one more block that, from the state of token i and the embedding
of token i+k, predicts token i+k+1:

    x_i = M_k [ norm(Emb(t_{i+k})) ; norm(h_i^{k-1}) ],  h^k = norm(block(x)),  logits = head(h^k)          (eq 21-23)

with the main model's embedding and head. The loss adds mtp_weight times the mean over depths (eq 24-25). It makes the
hidden states plan ahead, and at generation the module drafts tokens for the main model to verify.

The last chapter gives every tensor its official name, for Hugging Face folders and for our own checkpoints alike.

Shapes: B batch, T tokens, N = B*T, D dim, V vocabulary.
"""
import itertools
import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import backend
import fp8
from configs import Config, UserError, check, convert
from fp8 import HIGH, Linear
from fp8_tiles import Quantized, quantize_torch
from mla import MLA, RMSNorm, rope_table
from mla_decode import LatentCache
from moe import FFN, MoE

# --- the loss: cross-entropy without the [N, vocab] logits ------------------------------------------------------------

class CrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(h W^T)[target]; h [N, D], weight [V, D], targets int64 [N], -1 = no target.

    At V3's vocabulary the logits of one 4096-token sequence are 2 GB, and their gradient as much again. So a chunk of
    rows at a time: logits, loss, and at once the gradients of h and W, after which the chunk's logits are forgotten.
    """
    ROWS = 1024

    @staticmethod
    def forward(ctx, h, weight, targets):
        high = torch.promote_types(h.dtype, torch.float32)
        w, total = weight.to(h.dtype), torch.zeros((), dtype=high, device=h.device)
        backward = any(ctx.needs_input_grad)
        dh, dw = (torch.empty_like(h), torch.zeros_like(weight)) if backward else (None, None)
        for start in range(0, len(h), CrossEntropy.ROWS):
            rows, target = (t[start:start + CrossEntropy.ROWS] for t in (h, targets))
            logits = (rows @ w.t()).to(high)                                                  # [chunk, V]
            valid, at = (target >= 0)[:, None], target.clamp_min(0)[:, None]
            top, picked = logits.amax(1, keepdim=True), logits.gather(1, at)
            e = logits.sub_(top).exp_()                                                       # softmax = e / e's sum
            s = e.sum(1, keepdim=True)
            total += ((s.log() + top - picked) * valid).sum()
            if backward:
                # d loss / d logits = softmax - one-hot = (e - s * one-hot) / s: the division by s, and the zero of a
                # row without target, wait until the rows are D wide and not V.
                e, scale = e.scatter_add_(1, at, -s).to(h.dtype), (valid / s).to(h.dtype)
                torch.mm(e, w, out=dh[start:start + len(rows)]).mul_(scale)
                dw += e.t() @ (rows * scale)
        ctx.save_for_backward(dh, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        # In grad's float32: 1 / number of targets is no BF16 number.
        return (grad * dh.to(grad.dtype)).to(dh.dtype), grad.to(dw.dtype) * dw, None


# --- the model --------------------------------------------------------------------------------------------------------

# How checkpoint computes again in backward: nothing here draws random numbers whose state would have to be put back.
AGAIN = {"use_reentrant": False, "preserve_rng_state": False}


class Block(nn.Module):
    """One transformer layer: x [B, T, D] -> ([B, T, D], Routing or None)."""

    def __init__(self, c, dense):
        super().__init__()
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn = MLA(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.ffn = FFN(c.dim, c.inter_dim) if dense else MoE(c)
        self.recompute_mla = c.recompute_mla

    def attention(self, x, rope, **more):
        if self.recompute_mla and self.training and torch.is_grad_enabled():
            # Norms, latents, queries, keys and values are made again in backward (section 3.2.3); attention's own
            # output waits in `kept`, and the last product is not reached: checkpoint stops once it has what it needs.
            kept = []
            h = x + checkpoint(lambda x: self.attn(self.attn_norm(x), rope, kept=kept, **more), x, **AGAIN)
        else:
            h = x + self.attn(self.attn_norm(x), rope, **more)
        return h, self.ffn_norm(h)

    def dispatch(self, x):
        return self.ffn.dispatch(x)

    def experts(self, x, rows, sent):
        return self.ffn.experts(x, rows, sent)

    def combine(self, h, here, rows, sent):
        return h + self.ffn.combine(here, rows, sent)

    def segments(self, x, rope, run):
        """forward as a generator for a pipeline (dualpipe.in_segments): while tokens travel to and from the experts of
        other ranks it yields, and what it needs afterwards goes through the yield. run: as V3.run; it recomputes
        attention, and not the experts, whose tokens would have to travel again."""
        if not getattr(self.ffn, "ranks", None):
            return run(self, x, rope)
        h, x = run(self.attention, x, rope)
        rows, sent = self.dispatch(x)
        h, x, balance, *rows = yield h, x, sent.routing.balance, *rows
        here, rows = self.experts(x, rows, sent)
        h, here, balance, *rows = yield h, here, balance, *rows
        return self.combine(h, here, rows, sent), replace(sent.routing, balance=balance)

    def forward(self, x, rope, **cache):
        h, x = self.attention(x, rope, **cache)
        rows, sent = self.dispatch(x)
        here, rows = self.experts(x, rows, sent)
        return self.combine(h, here, rows, sent), sent and sent.routing


class MTP(nn.Module):
    """One prediction depth (eq 21-23): the previous depth's states h [B, T, D] and the embeddings of the tokens to be
    looked ahead over, emb [B, T, D] -> (states after the module's own norm [B, T, D], Routing or None)."""

    def __init__(self, c):
        super().__init__()
        self.enorm = RMSNorm(c.dim, c.norm_eps)
        self.hnorm = RMSNorm(c.dim, c.norm_eps)
        self.eh_proj = Linear(2 * c.dim, c.dim)
        self.block = Block(c, dense=c.n_dense_layers == c.n_layers)
        self.norm = RMSNorm(c.dim, c.norm_eps)

    def forward(self, h, emb, rope, **cache):
        # The report writes [h ; emb]; the released weights take [emb ; h], and the checkpoint wins.
        x = self.eh_proj(torch.cat([self.enorm(emb), self.hnorm(h)], -1))
        x, routing = self.block(x, rope, **cache)
        return self.norm(x), routing


class V3(nn.Module):
    """DeepSeek-V3 from a Config: tokens int64 [B, T] -> logits [B, T, vocab].

    Weights are float32 (or what .to() made of them); config.precision sets the dtype of the activations and so of the
    matrix products: float32, else BF16; with fp8 and fp8_reference most products run in FP8 (fp8.convert). Built under
    torch.device("meta") it costs no memory and is not initialized, nor is it with initialize=False, for whoever loads
    the weights.
    """

    def __init__(self, config, initialize=True):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c, dense=i < c.n_dense_layers) for i in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = Linear(c.dim, c.vocab_size)
        self.mtp = nn.ModuleList(MTP(c) for _ in range(c.n_mtp))
        self.finish(initialize)

    def finish(self, initialize):
        """What the modules need besides themselves: RoPE's table, the recipes of FP8, initial weights."""
        c, rope = self.config, rope_table(self.config).to(torch.get_default_device())
        self.register_buffer("rope", rope, persistent=False)                                # complex64 [context, d_r/2]
        self.converted = fp8.convert(self, c.precision == "fp8_reference") if c.precision.startswith("fp8") else None
        if initialize:
            self.init()

    @torch.no_grad()
    def init(self):
        """Normal weights, norms of one. Every official tensor has a generator of its own, seeded by its name: any
        layout of ranks that holds the tensor gives it the same values."""
        for name, tensor in official_tensors(self).items():
            if tensor.ndim > 1 and not tensor.is_meta:
                seed = zlib.crc32(f"{self.config.seed} {name}".encode())        # 32 bits: a CPU generator reads no more
                generator = torch.Generator(tensor.device).manual_seed(seed)
                tensor.normal_(0.0, self.config.init_std, generator=generator)

    def _apply(self, fn, recurse=True):
        # .to(dtype) means the weights. RoPE's table would lose its imaginary part, and BF16 gate biases choose other
        # experts.
        kept = [(module, dict(module._buffers)) for module in self.modules()]
        for module, _ in kept:
            module._buffers.clear()
        super()._apply(fn, recurse)
        device = next(self.parameters()).device
        for module, buffers in kept:
            module._buffers.update({name: torch.empty_like(b, device=device) if b.is_meta else b.to(device)
                                    for name, b in buffers.items()})
        return self

    def embedding(self, tokens):
        x = self.embed(tokens)
        return x if self.config.precision == "fp32" else x.to(torch.bfloat16)

    def run(self, module, *args):
        """module(*args); with config.recompute its activations are made again in backward instead of kept."""
        again = self.config.recompute and self.training
        return checkpoint(module, *args, **AGAIN) if again else module(*args)

    def place(self, T, cache):
        """Where the next T tokens of every row stand: the arguments of a block that writes `cache`."""
        positions = cache.positions(T)
        # Drafted tokens may stand beyond the context: tried there, never kept.
        return {"rope": self.rope[positions.clamp_max(len(self.rope) - 1)], "cache": cache, "positions": positions}

    def hidden(self, tokens, cache=None):
        """tokens [B, T] -> (states after the final norm [B, T, D], the Routing of each MoE layer).

        With a LatentCache the tokens follow those it holds; the caller then advances it by the tokens it wants to keep.
        """
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the context of {self.config.context}")
        x, routings = self.embedding(tokens), []
        where = self.place(tokens.shape[1], cache) if cache else None
        for i, block in enumerate(self.layers):
            x, routing = block(x, layer=i, **where) if cache else self.run(block, x, self.rope[:tokens.shape[1]])
            routings.append(routing)
        return self.norm(x), [r for r in routings if r]

    def lookahead(self, h, tokens, cache):
        """The first MTP module behind the main model, through the cache: h [B, T, D], the states at the next T places
        of `cache`, and tokens [B, T], the one after each -> states [B, T, D] whose logits predict the one after that.

        Its latents lie in a layer of their own, the cache's last, at the positions of h. `cache` is one for drafts."""
        where = self.place(tokens.shape[1], cache)
        return self.mtp[0](h, self.embedding(tokens), layer=self.config.n_layers, **where)[0]

    def logits(self, h):
        """States [..., D] -> logits [..., vocab] in float32 or better."""
        return self.head(h).to(torch.promote_types(h.dtype, torch.float32))

    def forward(self, tokens, cache=None):
        return self.logits(self.hidden(tokens, cache)[0])

    def draft(self, h, tokens):
        """The states of every MTP depth over a whole sequence: h [B, T, D] from `hidden`, tokens [B, >= T + n_mtp].

        Depth k reads Emb(t_{i+k}), an input of its own prediction and never the target. Returns a list of (states
        [B, T, D], Routing or None); logits of depth k predict t_{i+k+1}. Depth 2 and up take the state after the norm
        of the depth before, as the first takes the main model's.
        """
        T, out = h.shape[1], []
        for k, module in enumerate(self.mtp, 1):
            h, routing = self.run(module, h, self.embedding(tokens[:, k:T + k]), self.rope[:T])
            out.append((h, routing))
        return out

    def loss(self, tokens, valid=None, totals=None, mtp_weight=None):
        """The training loss of one micro-batch: (scalar, parts).

        tokens int64 [B, T+1+n_mtp]; valid bool of the same shape: which tokens count as targets (None: all).
        totals: (targets of each depth [1+n_mtp], sequences) of the whole optimizer step, None: of this micro-batch.
        Sums are divided by these global numbers, so the losses and gradients of micro-batches, ranks and pipeline
        stages add up to those of the whole batch. parts: loss (main model, nats per token), mtp_loss, balance_loss, of
        this share. While training, the gates' load counters grow by this micro-batch's.
        """
        c, T = self.config, tokens.shape[1] - 1 - self.config.n_mtp
        mtp_weight = c.mtp_weight if mtp_weight is None else mtp_weight
        targets = tokens if valid is None else tokens.masked_fill(~valid, -1)
        counts, sequences = totals or target_totals(targets, c.n_mtp)
        h, routings = self.hidden(tokens[:, :T])
        main, mtp, more = self.cross_entropies(h, self.draft(h, tokens), targets, counts)
        balance = self.balance(self.gates(), routings + more, sequences)
        parts = {"loss": main, "mtp_loss": mtp, "balance_loss": balance}
        return main + mtp_weight * mtp + balance, {name: torch.as_tensor(part).detach() for name, part in parts.items()}

    def cross_entropies(self, h, drafts, targets, counts):
        """(that of the main model's states h [B, T, D], the mean of those of its `drafts`, their Routings): against
        targets [B, > T], for each depth over its count of them."""
        states, T = [h, *(state for state, _ in drafts)], h.shape[1]
        head = self.head.weight if torch.is_grad_enabled() else self.head.weight.detach()     # evaluation: no gradients
        if self.config.bf16_head and torch.is_grad_enabled() and backend.fast_bf16(head.device):
            states = [h.to(torch.bfloat16) for h in states]             # the largest products of a small model
        main, *mtp = [CrossEntropy.apply(h.flatten(0, 1), head, targets[:, k + 1:T + k + 1].flatten()) / max(n, 1)
                      for k, (h, n) in enumerate(zip(states, counts))]
        return main, sum(mtp) / max(self.config.n_mtp, 1), [routing for _, routing in drafts if routing]

    def balance(self, gates, routings, sequences):
        """The balance loss of some layers; while training their gates count what they routed."""
        for gate, routing in zip(gates, routings) if self.training else ():
            gate.load += routing.load
        return self.config.balance_alpha * sum(r.balance for r in routings) / sequences

    def gates(self):
        """The gates of all MoE layers, the MTP modules' last."""
        blocks = [*self.layers.children(), *(m.block for m in self.mtp)]
        return [b.ffn.gate for b in blocks if isinstance(b.ffn, MoE)]

    def cache(self, batch, capacity, drafts=0, fp8=False):
        """An empty LatentCache for `batch` sequences of up to `capacity` tokens, with fp8 in 8 bits
        (mla_decode.Fp8Latents). To speculate with `drafts` tokens at a time: with room for them behind each row and a
        layer for the MTP module. ValueError if the capacity is beyond the context."""
        c = self.config
        if capacity > c.context:
            raise ValueError(f"a cache of {capacity} tokens is more than the context of {c.context}")
        dtype = self.embed.weight.dtype if c.precision == "fp32" else torch.bfloat16
        dtype, width = torch.float8_e4m3fn if fp8 else dtype, c.kv_lora_rank + c.qk_rope_head_dim
        return LatentCache(c.n_layers + bool(drafts), batch, capacity + drafts, width, self.embed.weight.device, dtype,
                           c.qk_rope_head_dim)

    @classmethod
    def from_hf(cls, folder, **changes):
        return from_hf(folder, **changes)


def target_totals(targets, n_mtp):
    """(targets of each depth, sequences) of targets [B, T+1+n_mtp], where -1 is no target."""
    T = targets.shape[1] - 1 - n_mtp
    return [int((targets[:, k + 1:T + k + 1] >= 0).sum()) for k in range(n_mtp + 1)], len(targets)


# --- V3 in the stages of a pipeline -----------------------------------------------------------------------------------

class Stage(V3):
    """The part of a V3 that a rank of a pipeline runs (dualpipe.py): some layers; in the first stage the embedding, in
    the last the final norm, the head and MTP. Every tensor has the name that it has in V3, and so its initial value and
    its official name.

    The first stage takes tokens int64 [B, > seq_len], the others x [B, T, D]; all are generators, to be cut where
    tokens travel, and return ([B, T, D], their balance loss or None). `criterion` makes the last one's output a loss.
    Before each optimizer step: `begin`. MTP's block, in the criterion, is not cut: its exchanges hide behind nothing.
    """

    def __init__(self, config, layers, first, last, initialize=True):
        nn.Module.__init__(self)
        c, self.first, self.last = config, first, last
        self.config = c
        if first or last and c.n_mtp:
            self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleDict({str(i): Block(c, dense=i < c.n_dense_layers) for i in layers})
        if last:
            self.norm = RMSNorm(c.dim, c.norm_eps)
            self.head = Linear(c.dim, c.vocab_size)
        self.mtp = nn.ModuleList(MTP(c) for _ in range(c.n_mtp if last else 0))
        self.finish(initialize)

    def begin(self, totals, mtp_weight=None):
        """Tell what the whole optimizer step divides its losses by (V3.loss), and start `parts`, its losses, anew."""
        self.totals, self.mtp_weight = totals, self.config.mtp_weight if mtp_weight is None else mtp_weight
        self.parts = {"loss": 0.0, "mtp_loss": 0.0, "balance_loss": 0.0}

    def note(self, **parts):
        for name, part in parts.items():
            self.parts[name] = self.parts[name] + torch.as_tensor(part).detach()

    def like(self, sequences):
        """A tensor like those that pass from stage to stage, for micro-batches of so many sequences."""
        c, weight = self.config, next(self.parameters())
        dtype = weight.dtype if c.precision == "fp32" else torch.bfloat16
        return torch.empty(sequences, c.seq_len, c.dim, dtype=dtype, device=weight.device)

    def forward(self, x):
        x, routings = self.embedding(x[:, :self.config.seq_len]) if self.first else x, []
        for block in self.layers.values():
            x, routing = yield from block.segments(x, self.rope[:x.shape[1]], self.run)
            routings += [routing] if routing else []
        balance = self.balance(self.gates(), routings, self.totals[1]) if routings and self.training else None
        if balance is not None:
            self.note(balance_loss=balance)
        return self.norm(x) if self.last else x, balance

    def criterion(self, h, labels):
        """The loss of states h [B, T, D] after the final norm. labels int64 [B, T+1+n_mtp]: the tokens, written as
        ~token where one is no target: MTP reads it all the same. In evaluation the main model's loss alone."""
        counts, sequences = self.totals
        drafts = self.draft(h, torch.where(labels < 0, ~labels, labels)) if self.training else []
        main, mtp, routings = self.cross_entropies(h, drafts, labels, counts)
        balance = self.balance(self.gates()[-len(routings):], routings, sequences) if routings else 0.0
        self.note(loss=main, mtp_loss=mtp, balance_loss=balance)
        return main + self.mtp_weight * mtp + balance


def stages(config, count, mine, initialize=True, a=None):
    """[Stage]: those with the numbers `mine` of a V3 cut into `count` stages (dualpipe.layout gives both numbers). a:
    arithmetic(config), where it is known.

    Where the first and the last are both here, as in DualPipe, they share the embedding, which MTP reads; elsewhere
    (1F1B) both ends hold one, and their gradients are summed (`shared`). UserError if the layers are too few.
    """
    cuts = balanced(config, count, a)
    out = {i: Stage(config, range(*cuts[i:i + 2]), i == 0, i == count - 1, initialize) for i in mine}
    if config.n_mtp and count - 1 in out and 0 in out:
        out[count - 1].embed = out[0].embed
    return [out[i] for i in mine]


def shared(stages):
    """What the last stage of these, or of a pipeline's other end, uses of the first (dualpipe.copied)."""
    return list({s.embed.weight: None for s in stages if s.config.n_mtp and (s.first or s.last)})


def balanced(config, count, a=None):
    """[0, ..., n_layers], where to cut the layers so that the costliest of `count` stages costs least (and, among such
    cuts, the squares of the costs add up to least). The last stage also computes the head and MTP, which in V3 is the
    work of four layers; it alone may have no layer of its own. a: arithmetic(config), where it is known."""
    n, a = config.n_layers, a or arithmetic(config)
    if count > n + 1:
        raise UserError(f"n_layers = {n} is too few for {count} stages of a pipeline; give a smaller --pp")
    before = [0.0, *itertools.accumulate(a["layers"][:n])]                     # the cost of the layers before each
    end = sum(a["layers"][n:]) + a["end"]

    def with_stage(best, start, cost):
        (most, squares), cuts = best
        return (max(most, cost), squares + cost ** 2), [*cuts, start]

    best = {0: ((0.0, 0.0), [])}              # of the first stages, up to a layer: (costs, where each one starts)
    for s in range(1, count):
        best = {stop: min(with_stage(best[start], start, before[stop] - before[start])
                          for start in best if start < stop) for stop in range(s, n + 1)}
    return min(with_stage(best[start], start, before[n] - before[start] + end) for start in best)[1] + [n]


# --- arithmetic -------------------------------------------------------------------------------------------------------

def arithmetic(c):
    """What a Config costs, counted on the meta device: a dict of
    total (parameters of the main model), active (those that work on one token, embedding and head included), mtp (the
    MTP modules' own), flops (training FLOPs per token: forward and backward, MTP included, attention at the mean causal
    length), layers and end (those of each layer, the MTP modules' last, and those of the head with the final norm),
    attention (those of a layer's attention), sizes ({official name: numbers in it}),
    cache_bytes (latent cache per token in BF16), fp8 (parameters whose products are converted), converted (what
    fp8.convert said, or None)."""
    with torch.device("meta"):
        v3 = V3(c)
    sizes = {name: tensor.numel() for name, tensor in official_tensors(v3).items() if not name.endswith("_bias")}
    moe_share = c.n_activated_experts / c.n_routed_experts
    own = lambda name: layer_of(name) < c.n_layers
    work = {name: n * (moe_share if ".mlp.experts." in name else 1) for name, n in sizes.items()}
    scores = 2 * c.n_heads * (c.qk_head_dim + c.v_head_dim) * (c.seq_len + 1) / 2
    layers = [3 * scores + 6 * sum(n for name, n in work.items() if layer_of(name) == layer)
              for layer in range(c.n_layers + c.n_mtp)]
    attention = 3 * scores + 6 * sum(n for name, n in work.items() if name.startswith("model.layers.0.self_attn."))
    # An embedding is looked up, which is no product; the head works for every depth.
    end = 6 * (sizes["model.norm.weight"] + (1 + c.n_mtp) * sizes["lm_head.weight"])
    return {"total": sum(n for name, n in sizes.items() if own(name)),
            "active": round(sum(n for name, n in work.items() if own(name))),
            "mtp": sum(n for name, n in sizes.items() if not own(name)),
            "flops": round(sum(layers) + end), "layers": layers, "end": end,
            "attention": attention, "sizes": sizes,
            "cache_bytes": (c.kv_lora_rank + c.qk_rope_head_dim) * c.n_layers * 2, "converted": v3.converted,
            "fp8": sum(p.numel() for m in v3.modules() if getattr(m, "recipe", None) for p in m.parameters(False))}


# --- official names: Hugging Face folders and checkpoints -------------------------------------------------------------

LAYER_NAMES = {                               # ours -> official, inside a layer
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn.wq": "self_attn.q_proj", "attn.wq_a": "self_attn.q_a_proj", "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.wq_b": "self_attn.q_b_proj", "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm", "attn.wkv_b": "self_attn.kv_b_proj", "attn.wo": "self_attn.o_proj",
    "ffn.gate.weight": "mlp.gate.weight", "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.w13": "mlp.", "ffn.w2": "mlp.",
    "ffn.shared.w13": "mlp.shared_experts.", "ffn.shared.w2": "mlp.shared_experts."}
MTP_NAMES = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
TOP_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def official_index(v3):
    """{official name: (our name, index)}: tensor[index] of our parameter or buffer is the official tensor, as a view.

    Two of ours hold several official ones: w13 is gate_proj over up_proj, and the experts' are stacked.
    """
    index = {}
    for ours, tensor in v3.state_dict().items():
        parts = ours.removesuffix(".weight").split(".")
        if parts[0] in TOP_NAMES:
            index[TOP_NAMES[parts[0]] + ".weight"] = ours, ()
            continue
        layer = int(parts[1]) + (v3.config.n_layers if parts[0] == "mtp" else 0)
        rest = ".".join(parts[3:] if parts[2] == "block" else parts[2:])
        if parts[0] == "mtp" and rest in MTP_NAMES:
            index[f"model.layers.{layer}.{MTP_NAMES[rest]}.weight"] = ours, ()
            continue
        if rest == "ffn.gate":
            rest = "ffn.gate.weight"
        name = f"model.layers.{layer}.{LAYER_NAMES[rest]}"
        if not name.endswith("."):
            index[name if "mlp.gate" in name else name + ".weight"] = ours, ()
        else:
            half = tensor.shape[-2] // 2
            pieces = {"gate_proj": slice(0, half), "up_proj": slice(half, None)} if rest.endswith("w13") \
                else {"down_proj": slice(None)}
            for piece, rows in pieces.items():
                if tensor.ndim == 3:                                                           # [E, out, in]
                    first = v3.get_submodule(ours.rpartition(".")[0]).first
                    index.update({f"{name}experts.{first + e}.{piece}.weight": (ours, (e, rows))
                                  for e in range(len(tensor))})
                else:
                    index[f"{name}{piece}.weight"] = ours, (rows,)
    return index


def official_tensors(v3, tensors=None):
    """{official name: view} of the model's weights and gate biases, or of `tensors` {our name: tensor of the same
    shape} (optimizer moments, averages); names that `tensors` lacks are left out."""
    tensors = v3.state_dict() if tensors is None else tensors
    return {name: tensors[ours][index] for name, (ours, index) in official_index(v3).items() if ours in tensors}


HF_FIELDS = {                                 # Config field: config.json key
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace", "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_heads": "num_attention_heads", "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim", "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
    "n_routed_experts": "n_routed_experts", "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor", "n_mtp": "num_nextn_predict_layers", "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range"}
HF_FIXED = {                                  # the same in every model of this kind
    "hidden_act": "silu", "scoring_func": "sigmoid", "norm_topk_prob": True, "attention_bias": False,
    "tie_word_embeddings": False, "rope_interleave": True}


def layer_of(name):
    """Layer number in an official name; -1 where it has none."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def repeated(c):
    """{official name: that of the same tensor in the main model}: what released checkpoints repeat in MTP layers."""
    return {f"model.layers.{c.n_layers + k}.{name}.weight": f"{main}.weight" for k in range(c.n_mtp)
            for name, main in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head"))}


def hf_config(c):
    """Config -> the dict of a Hugging Face config.json."""
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.context > c.original_seq_len:
        rope.update(rope_type="yarn", type="yarn", factor=c.rope_factor, beta_fast=c.beta_fast, beta_slow=c.beta_slow,
                    mscale=c.mscale, mscale_all_dim=c.mscale_all_dim,
                    original_max_position_embeddings=c.original_seq_len)
    return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
            **{theirs: getattr(c, ours) for ours, theirs in HF_FIELDS.items()},
            "q_lora_rank": c.q_lora_rank or None, "num_key_value_heads": c.n_heads,
            "max_position_embeddings": c.context,
            "rope_parameters": rope, "rope_theta": c.rope_theta,
            "rope_scaling": rope if rope["rope_type"] == "yarn" else None, "topk_method": "noaux_tc", **HF_FIXED,
            "torch_dtype": "float32"}


def config_from_hf(folder, **changes):
    """The Config of a Hugging Face folder; changes override run fields. UserError names what is foreign or missing."""
    path = Path(folder) / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json there; give a Hugging Face folder of a DeepSeek-V3 model") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: not readable as JSON: {e}") from None
    if not isinstance(hf, dict):
        raise UserError(f"{path}: not a JSON object; give a Hugging Face folder of a DeepSeek-V3 model")
    if hf.get("model_type") != "deepseek_v3":
        raise UserError(f"{path}: model_type is {hf.get('model_type')!r}; only 'deepseek_v3' is this model")
    for key, value in HF_FIXED.items():
        if hf.get(key, value) != value:
            raise UserError(f"{path}: {key} = {hf[key]!r} is not supported, only {value!r}")
    optional = ("n_mtp", "init_std", "q_lora_rank")
    missing = [key for ours, key in HF_FIELDS.items() if key not in hf and ours not in optional]
    if missing:
        raise UserError(f"{path}: {missing[0]!r} is missing")
    values = {ours: hf[theirs] or 0 if ours == "q_lora_rank" else hf[theirs]
              for ours, theirs in HF_FIELDS.items() if theirs in hf}
    rope = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta", 10000.0)}
    if not isinstance(rope, dict) or any(not isinstance(rope.get(key, 1), (int, float)) for key in (
            "rope_theta", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")):
        raise UserError(f"{path}: the RoPE parameters are not an object of numbers: {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(f"{path}: rope type {kind!r} is not supported, only 'default' and 'yarn'")
    longest = hf.get("max_position_embeddings", 4096)
    values.update(rope_theta=float(rope.get("rope_theta", 10000.0)), max_seq_len=longest, original_seq_len=longest)
    if kind == "yarn":
        if "factor" not in rope:
            raise UserError(f"{path}: YaRN without its 'factor'")
        both = "mscale" in rope and "mscale_all_dim" in rope
        values.update(rope_factor=float(rope["factor"]), beta_fast=float(rope.get("beta_fast", 32)),
                      beta_slow=float(rope.get("beta_slow", 1)), mscale=float(rope["mscale"]) if both else 1.0,
                      mscale_all_dim=float(rope["mscale_all_dim"]) if both else 0.0,
                      original_seq_len=rope.get("original_max_position_embeddings", 4096))
    values = {key: convert(key, value, str(path)) for key, value in values.items()}
    values["seq_len"] = min(values["original_seq_len"], values["max_seq_len"], 4096)
    config = Config(**{**values, **changes})
    check(config, dict.fromkeys(values, str(path)))
    return config


def from_hf(folder, device="cpu", **changes):
    """V3 with the weights of a Hugging Face folder (DeepSeek-V3's own, or what save_hf and transformers write).

    FP8 weights are multiplied by their 128x128 block scales on the way in. UserError names the first missing or unknown
    tensor, a missing shard, a wrong shape.
    """
    folder = Path(folder)
    config = config_from_hf(folder, **changes)
    index = folder / "model.safetensors.index.json"
    try:
        files = ["model.safetensors"]
        if index.is_file():
            files = sorted({str(f) for f in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{index}: not a safetensors index: {e!r}") from None
    absent = [f for f in files if not (folder / f).is_file()]
    if absent:
        raise UserError(f"{folder}: shard {absent[0]} is missing ({len(absent)} of {len(files)}); download it again")
    with torch.device(device):
        v3 = V3(config, initialize=False)
    wanted, saved_mtp = official_tensors(v3), config_from_hf(folder).n_mtp
    stored, scales, copies = {}, {}, repeated(config)
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as f:
                for name in f.keys():
                    if name.endswith("_scale_inv"):
                        scales[name.removesuffix("_scale_inv")] = f.get_tensor(name)
                    elif name in wanted:
                        stored[name] = file
                    elif config.n_layers + config.n_mtp <= layer_of(name) < config.n_layers + saved_mtp:
                        continue                                              # the caller wants fewer MTP modules
                    elif name not in copies and not name.endswith("rotary_emb.inv_freq"):
                        raise UserError(f"{folder / file}: unknown tensor {name}; is config.json the right one?")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{folder / file}: damaged: {e}; download it again") from None
    missing = sorted(set(wanted) - set(stored))
    if missing:
        hint = "; n_mtp=0 leaves the MTP module out" if layer_of(missing[0]) >= config.n_layers else ""
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all){hint}")
    for file in files:
        with safe_open(folder / file, framework="pt") as f:
            for name in (n for n in stored if stored[n] == file):
                tensor = f.get_tensor(name)
                if tensor.shape != wanted[name].shape:
                    raise UserError(f"{folder / file}: {name} has shape {list(tensor.shape)}, config.json asks for "
                                    f"{list(wanted[name].shape)}")
                blocks = [-(-n // 128) for n in tensor.shape]
                if name not in scales and tensor.dtype == torch.float8_e4m3fn:
                    raise UserError(f"{folder / file}: {name}_scale_inv is missing: the weight is FP8")
                if name in scales and list(scales[name].shape) != blocks:
                    raise UserError(f"{folder}: {name}_scale_inv has shape {list(scales[name].shape)}, not {blocks}")
                with torch.no_grad():
                    wanted[name].copy_(Quantized(tensor, scales[name]).dequantize() if name in scales else tensor)
    return v3


SHARD_BYTES = 5 * 10**9


def released(name, tensor, eight):
    """{name: tensor} as the released checkpoint stores it: the matrices that run in FP8 (`eight`) as E4M3 and one scale
    per 128x128 block, the rest in BF16, except a gate's bias: BF16 would choose other experts."""
    if eight:
        q = quantize_torch(tensor, 128)
        return {name: q.values, name + "_scale_inv": q.scale}
    return {name: tensor if name.endswith("_bias") else tensor.to(torch.bfloat16)}


def save_hf(v3, folder, tokenizer=None, fp8=False):
    """Write config.json and sharded safetensors under the official names, which transformers' from_pretrained reads,
    and tokenizer.json where its content is given (tokenizer.tokenizer_json).

    fp8: the format of the released checkpoint, about a byte per parameter: each official matrix (gate_proj and up_proj
    each for itself) in blocks of its own. Everything goes to a temporary folder first, which is renamed when it is
    whole. UserError if the folder exists.
    """
    folder, c = Path(folder), v3.config
    if folder.exists():
        raise UserError(f"{folder}: exists already; give another name or remove it")
    tensors = official_tensors(v3)
    tensors |= {name: tensors[main] for name, main in repeated(c).items()}
    eight = {name for name, (ours, _) in official_index(v3).items()
             if fp8 and tensors[name].ndim == 2 and not ours.removesuffix(".weight").endswith(tuple(HIGH))}
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * (1 if name in eight else 2) if fp8 else tensor.nbytes
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        where, total = {}, 0
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            stored = {n: tensors[n] for n in names}
            if fp8:
                stored = {key: t for n in names for key, t in released(n, tensors[n], n in eight).items()}
            save_file({n: t.clone().contiguous() for n, t in stored.items()}, temporary / file,
                      metadata={"format": "pt"})
            where.update(dict.fromkeys(stored, file))
            total += sum(t.nbytes for t in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config = {**hf_config(c), "torch_dtype": str(v3.head.weight.dtype).removeprefix("torch.")}
        if fp8:
            config |= {"torch_dtype": "bfloat16", "quantization_config": {
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}}
        (temporary / "config.json").write_text(json.dumps(config, indent=1))
        if tokenizer:
            (temporary / "tokenizer.json").write_bytes(tokenizer)
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder}: could not be written: {e}") from None
