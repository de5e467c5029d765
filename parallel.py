"""One run on many ranks: who stands where, what they sum, who updates what; and checkpoints that no crash can halve.

The mesh (section 3.2). torchrun starts the processes, `ranks`, and tells each its number. The config arranges them:

    rank = pp_rank * dp + dp_rank              pp   stages of layers, from one to the next goes a pipeline
                                               dp   ranks that hold the same layers and share out each batch
    ep_rank = dp_rank % ep                     ep   neighbours among the dp that share out the experts of their layers

        pp = 2, dp = 4, ep = 2:      stage 0 | 0 1 2 3 |      experts of the first half: ranks 0 2, 4 6
                                     stage 1 | 4 5 6 7 |      of the second half:        ranks 1 3, 5 7

Neighbours in number are neighbours in space, so what is sent most (tokens to experts) goes the shortest way. No tensor
parallelism: V3 does without it.

Every parameter is held by a group of ranks, its replicas, that must stay equal: a dense one by the dp ranks of its
stage, an expert by those of them with the same ep_rank; with DualPipe, which runs each stage on the ranks pp_rank and
pp-1-pp_rank of the pipeline, by both of these. After backward each rank has the gradient of its own sequences,
of an expert those of its ep neighbours too; the sum over the replicas is the gradient of the whole batch. Who applies
it? Either everyone, with AdamW's two moments for every parameter, or (ZeRO-1) for each parameter one owner: gradients
go to the owner only, it alone keeps the moments, and it sends the updated weight back. The same bytes cross the wires
(a sum for all is a sum at one place and a way back), and the moments' memory is divided by the number of replicas, as
evenly as whole tensors allow. Nobody waits for a sum while backward still has work to do.

One process is a mesh of one: its groups are None, and a sum over such a group is what was there. No other code runs.

A checkpoint is a folder of safetensors and JSON, nothing pickled:

    out/tiny/step_00000500/rank_00000.safetensors     weights, gate biases, moments, averages: one entry per official
                           rank_00001.safetensors     tensor name, prefixed by what it is ("exp_avg/model.layers.3...");
                                                      each rank writes what it owns, all at once
                           state.json                 step, Config, data identity, counters, every file's hash, and in
                                                      which file each tensor is
                           tokenizer.json
             latest                                   the name of the newest whole checkpoint

Tensors go by the name that the released checkpoint gives them, expert by expert, so a file says nothing of how the run
was laid out over ranks: whoever reads it takes the names it needs. (torch.distributed.checkpoint pickles its metadata.)

The order of writing is what makes a crash harmless: everything goes to a temporary folder, is synced to the disk, the
folder is renamed, and only then does `latest` change, by a rename too: who reads a run while it writes goes by it. (To
resume, all whole checkpoints are looked at: after a crash between the two renames there is a newer one.) The last two
are kept. The room knows nothing of the model.
"""
import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import configs
from configs import UserError

try:
    import fcntl
except ImportError:                                                                        # Windows
    fcntl = None

KEEP = 2


# --- the ranks --------------------------------------------------------------------------------------------------------

@dataclass
class Mesh:
    """Where this process stands among the ranks of a run; by default it is alone."""
    rank: int = 0
    world: int = 1
    local: int = 0                                       # number among the ranks of its machine
    nodes: int = 1                                       # machines
    store: object = None                                 # torch's table of keys and values, which every rank reaches
    timeout: float = 600.0                               # seconds
    dp: int = 1
    pp: int = 1
    ep: int = 1
    ep_nodes: int = 1                                    # machines over which ep neighbours stand
    pp_group: object = None                              # those that see the same sequences
    replicas: dict = field(default_factory=dict)         # (expert?, copied in the pipeline?): who holds a parameter
    inside: object = None                                # ep neighbours on one machine
    between: object = None                               # ep neighbours with the same place on each machine

    @property
    def dp_rank(self):
        return self.rank % self.dp

    @property
    def pp_rank(self):
        return self.rank // self.dp

    @property
    def ep_rank(self):
        return self.rank % self.ep

    def arrange(self, c, batches):
        """Fit the config's layout, and the sizes of its batches, to the ranks that are there; returns itself. UserError
        says what doesn't fit."""
        def fit(right, key, message):
            if not right:
                raise UserError(f"--{key}={getattr(c, key)}: {message}")

        self.timeout, self.nodes = c.timeout, c.nodes or self.nodes
        self.pp, self.ep, self.dp = c.pp, c.ep, c.dp or self.world // c.pp
        remedy = "give another --world" if c.plan and c.world else \
            "torchrun --nproc-per-node=N starts N on a machine; --plan only looks"
        ranks = f"{self.world} rank{'s' * (self.world > 1)}"
        fit(self.world % self.pp == 0, "pp", f"{ranks} can't be cut into pipelines of so many; {remedy}")
        fit(self.world == self.pp * self.dp, "dp" if c.dp else "pp", f"pp * dp must be the number of ranks, and "
            f"{self.pp} * {self.dp} is not {self.world}; {remedy}")
        fit(self.world % self.nodes == 0, "nodes", f"{ranks} can't be shared out evenly over so many machines; "
            f"give a divisor")
        fit(self.dp % self.ep == 0, "ep", f"does not divide dp = {self.dp} (ranks / pp); start more ranks with "
            f"torchrun, or give one that does")
        fit(c.n_routed_experts % self.ep == 0, "ep", f"does not divide n_routed_experts = {c.n_routed_experts}; "
            f"give one that does")
        here = self.world // self.nodes
        fit(self.ep % here == 0 or here % self.ep == 0, "ep", f"neither a multiple nor a divisor of a machine's "
            f"{here} ranks")
        self.ep_nodes = max(1, self.ep // here)
        fit(c.n_limited_groups == c.n_expert_groups or c.n_expert_groups % self.ep_nodes == 0, "ep", f"stands on "
            f"{self.ep_nodes} machines, and they don't divide n_expert_groups = {c.n_expert_groups}")
        for size in batches:
            fit(size % self.dp == 0, "batch_size", f"{size} sequences can't be shared out evenly over dp = {self.dp} "
                f"ranks; give a multiple of that" + (f", and --batch_multiple={self.dp}, which keeps the ramp to those "
                                                     f"that can" if c.batch_ramp else ""))
        return self

    def device(self, device):
        """This rank's own of the devices of its machine."""
        if device.type != "cuda" or self.world == 1:
            return device
        if self.local >= torch.cuda.device_count():
            raise UserError(f"rank {self.rank} is number {self.local + 1} on its machine, which has "
                            f"{torch.cuda.device_count()} GPUs; start fewer ranks there, or use --device=cpu")
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def connect(self, device):
        """Open the connections between the ranks. UserError where the device has none."""
        if self.world == 1:
            return
        if device.type == "mps" or device.type == "cuda" and not dist.is_nccl_available():
            raise UserError(f"--device={device.type}: this torch can't send between "
                            f"{'GPUs: it was built without NCCL' if device.type == 'cuda' else 'ranks there'}; use "
                            f"--device=cpu, or one rank")
        patience = datetime.timedelta(seconds=self.timeout)
        # NCCL's guard would leave a note of a rank that died in torchrun's own store, where the ranks that are started
        # after it find the note, take it for theirs, and wait.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=self.store,
                                rank=self.rank, world_size=self.world, timeout=patience)

        def group(ranks):
            return dist.new_group(sorted(ranks), patience, use_local_synchronization=True) if len(ranks) > 1 else None

        here = self.ep // self.ep_nodes
        neighbours = range(self.rank - self.ep_rank, self.rank - self.ep_rank + self.ep)
        self.pp_group = group(range(self.dp_rank, self.world, self.dp))
        self.replicas = {kind: group(ranks) for kind, ranks in self.sharers().items()}
        self.inside = group(neighbours[self.ep_rank // here * here:][:here])
        self.between = group(neighbours[self.ep_rank % here::here])

    def sharers(self):
        """{(expert?, copied in the pipeline?): the ranks that hold such a parameter of this one's, in order}."""
        def stage(pp_rank, step):
            return {*range(pp_rank * self.dp + self.rank % step, (pp_rank + 1) * self.dp, step)}

        mine, twin = self.pp_rank, self.pp - 1 - self.pp_rank
        return {(expert, copied): sorted(stage(mine, step) | (stage(twin, step) if copied else set()))
                for expert, step in ((False, 1), (True, self.ep)) for copied in (False, True)}

    def same(self, what, values):
        """UserError on every rank where a rank's dict of `values` is not that of rank 0."""
        first, *others = self.gather(values)
        for rank, other in enumerate(others, 1):
            for key, value in first.items():
                if other.get(key) != value:
                    raise UserError(f"{what}: {key} is {value!r} on rank 0 and {other.get(key)!r} on rank {rank}; it "
                                    f"must be the same on all")

    def one_first(self, make):
        """make(), on one rank of a machine before the others, which then find what it has left on the disk."""
        key = f"made/{self.rank - self.local}"
        if self.local:
            self.store.wait([key], datetime.timedelta(hours=12))
        made = make()
        if self.world > 1 and not self.local:
            self.store.set(key, "")
        return made

    def total(self, numbers):
        """The sums over all ranks of {name: number}, in float64, the same on each rank."""
        if self.world == 1:
            return numbers
        sums = torch.tensor(list(numbers.values()), dtype=torch.float64)
        dist.all_reduce(sums)
        return dict(zip(numbers, sums.tolist()))

    def most(self, number):
        """The largest of the ranks' numbers; nobody goes on before all have come here."""
        largest = torch.tensor(number, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def gather(self, value):
        """[the value of each rank]."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


def together(tensors):
    """The tensors in one piece, to travel; where there is one only, itself."""
    return tensors[0].flatten() if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])


def apart(flat, tensors):
    """The piece as tensors like those that it was made of."""
    return [part.view_as(t) for t, part in zip(tensors, flat.split([t.numel() for t in tensors]))]


def add(tensors, group):
    """Add to each of the tensors, in place, those of the other ranks of the group: one exchange for all."""
    if group is not None and tensors:
        flat = together(tensors)
        dist.all_reduce(flat, group=group)
        for t, total in zip(tensors, apart(flat, tensors)):
            t.copy_(total)


# --- starting and failing together ------------------------------------------------------------------------------------

def cli(main):
    """configs.cli(main) as one rank of those that torchrun has started: rank 0 alone speaks, main(argv, mesh) gets a
    Mesh that knows its rank, and of all the errors the first is told, with its rank; the others follow from it."""
    number = lambda key, default: int(os.environ.get(key, default))
    rank, world = number("RANK", 0), number("WORLD_SIZE", 1)
    mesh = Mesh(rank, world, number("LOCAL_RANK", rank), max(1, world // number("LOCAL_WORLD_SIZE", world)))
    if world == 1:
        configs.cli(lambda argv: main(argv, mesh))
    if rank:
        sys.stdout = open(os.devnull, "w")

    def together(argv):
        mesh.store = store()
        try:
            code = main(argv, mesh)
            if dist.is_initialized():
                dist.destroy_process_group()
            return code
        except Exception as e:
            code, message = failure(mesh, e)
            farewell(mesh)
            if message is None:                                              # somebody else was first, and has told
                return code
            raise (UserError if code == 2 else RuntimeError)(message) from e

    try:
        configs.cli(together)
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)                                                           # no thread waits for lost connections


def store():
    """torch's TCPStore, where torchrun has put it; without torchrun, rank 0 opens it at MASTER_ADDR:MASTER_PORT."""
    try:
        table = next(dist.rendezvous("env://"))[0]
        return dist.PrefixStore(f"start {restarts()}", table)          # nothing that ranks wrote before they died
    except ValueError as e:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {str(e).strip()}; start the ranks with "
                        f"torchrun") from None
    except dist.DistNetworkError as e:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(e):
            raise UserError(f"{at}: the port is in use; give another with torchrun --master-port=N, or "
                            f"--standalone on one machine") from None
        raise UserError(f"{at}: rank 0 does not answer there ({str(e).splitlines()[0]})") from None


def restarts():
    """How often torchrun --max-restarts has started this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def failure(mesh, e):
    """(exit code, message) for the exception `e` of this rank; the message is None where another rank failed before.

    When a transfer fails or takes longer than the timeout, somebody else is to blame, who may not be able to say so.
    All who can still speak raise their hand in the store; who doesn't is named."""
    code = 2 if isinstance(e, UserError) else 1
    who, patience = f"rank {mesh.rank} of {mesh.world}", min(5, mesh.timeout)
    try:
        mesh.store.set(f"failed/{mesh.rank}", "")
        if mesh.store.compare_set("failed first", "", who) != who.encode():
            mesh.store.wait(["told"], datetime.timedelta(seconds=patience + 1))         # this rank may keep the store
            return code, None
        # Where it and its cause were raised. A transfer is waited for in C++, without a frame: the line tells.
        raised = [at for one in (e, e.__cause__) if one for at in traceback.extract_tb(one.__traceback__)[-1:]]
        if code == 2:
            message = f"{who}: {e}" if mesh.rank else str(e)
        elif not any(os.path.join("torch", "distributed") in at.filename or "work.wait()" in at.line for at in raised):
            message = f"{who} failed"
        else:
            silent, until = set(range(mesh.world)), time.time() + patience
            while silent and time.time() < until:
                silent -= {rank for rank in silent if mesh.store.check([f"failed/{rank}"])}
                time.sleep(0.1)
            names = ", ".join(map(str, sorted(silent)))
            message = f"{who} waited in vain" + (f"; no answer from rank {names}: gone, or it hangs" if names else "")
        mesh.store.set("told", "")
        return code, message
    except dist.DistNetworkError:
        return code, f"{who} failed, and whoever keeps the store, rank 0 or torchrun, is gone"
    except dist.DistError:                                     # the wait took too long
        return code, f"{who} failed after another rank, which has ended before it could say why"


def farewell(mesh):
    """Rank 0 may be the one that keeps the store: it leaves when the others have said that they do, or are silent."""
    with contextlib.suppress(dist.DistError):
        if mesh.rank:
            mesh.store.set(f"leaves/{mesh.rank}", "")
        else:
            mesh.store.wait([f"leaves/{rank}" for rank in range(1, mesh.world)], datetime.timedelta(seconds=2))


@contextlib.contextmanager
def claimed(out_dir, mesh):
    """Make the folder and keep other runs out of it until the end of the block, or of the process, whatever ends it.
    UserError if it can't be made or is taken. (Windows has no such locks: there nothing is kept out.) A folder in which
    nothing was put is not left behind."""
    path, lock = Path(out_dir), None
    if mesh.rank == 0:
        try:
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            lock = open(path / "lock", "a")
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"{out_dir}: another run is at work there; wait for its end, or give another --out_dir") \
                from None
        except OSError as e:
            raise UserError(f"--out_dir={out_dir}: cannot be made ({e.strerror}); give another") from None
        for left in path.glob("step_*.tmp"):                             # a crash while saving
            shutil.rmtree(left, ignore_errors=True)
    mesh.most(0)
    try:
        yield
    finally:
        if lock:
            with contextlib.suppress(OSError):                           # gone already, or somebody's by now
                if made and os.listdir(path) == ["lock"]:
                    os.unlink(path / "lock")
                    os.rmdir(path)
            lock.close()


# --- ZeRO-1 -----------------------------------------------------------------------------------------------------------

def size(group):
    return 1 if group is None else dist.get_world_size(group)


def owners(sizes, ranks):
    """{name: the rank, of so many with the same tensors, that owns it} for {name: numbers in it}: the largest first,
    each to the rank that has least so far."""
    load, out = [0] * ranks, {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        out[name] = load.index(min(load))
        load[out[name]] += size
    return out


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients, and new weights, travel together: those of one group and one owner."""
    group: object
    owner: int                                           # its number in the group
    mine: bool                                           # the owner is this rank
    params: list = field(default_factory=list)
    missing: float = math.inf                            # gradients to come before their sum may start
    flat: object = None                                  # what travels, while it does
    work: object = None

    def room(self, p, most):
        """Whether p may travel with the others in a message of up to `most` bytes."""
        return sum(q.nbytes for q in self.params) + p.nbytes <= most and p.dtype == self.params[0].dtype


class Shares:
    """The parameters that this rank holds, {name: (parameter, the group of its replicas)}, and who owns which.

    owned: {name: parameter} that this rank saves and counts, of each parameter one replica's; updated: those that its
    optimizer works on, with ZeRO-1 the owned ones, else all. dtype: in which gradients are summed; None: their own.

    Sums start while backward goes on. Gradients travel in buckets, filled in the order in which backward comes to the
    parameters, from the model's end. A bucket sets off when its gradients have all come and the buckets before it are
    on their way: so the order is the same on all ranks, as their exchanges want it. What has not set off by the end of
    backward does so then.
    """
    BUCKET = 25 * 2**20                                  # bytes; a larger tensor travels alone

    def __init__(self, held, zero1=True, dtype=None):
        self.zero1, self.dtype, self.buckets, self.bucket, self.off, sizes = zero1, dtype, [], {}, 0, {}
        for name, (p, group) in held.items():
            sizes.setdefault(group, {})[name] = p.numel()
        owner = {name: rank for group in sizes for name, rank in owners(sizes[group], size(group)).items()}
        mine = {name: group is None or owner[name] == dist.get_rank(group) for name, (_, group) in held.items()}
        self.owned = {name: p for name, (p, _) in held.items() if mine[name]}
        self.updated = self.owned if zero1 else {name: p for name, (p, _) in held.items()}
        filling = {}
        for name, (p, group) in reversed(held.items()):
            if group is None:
                continue
            bucket = filling.get((group, owner[name]))
            if not bucket or not bucket.room(p, self.BUCKET):
                bucket = filling[group, owner[name]] = Bucket(group, owner[name], mine[name])
            else:
                self.buckets.remove(bucket)              # moved to the end: it is complete when its last gradient is
            bucket.params.append(p)
            self.buckets.append(bucket)
            self.bucket[p] = bucket

    def expect(self, times):
        """So many gradients will be added to each parameter's before `sum_gradients`: let their sums start early, where
        `arrived` is told of every one of them."""
        for bucket in self.buckets:
            bucket.missing = times * len(bucket.params)

    def arrived(self, p):
        """A gradient has been added to p.grad: a hook for autograd's register_post_accumulate_grad_hook."""
        if p in self.bucket:
            self.bucket[p].missing -= 1
            while self.off < len(self.buckets) and not self.buckets[self.off].missing:
                self.set_off()

    @torch.no_grad()
    def set_off(self):
        """Start the sum of the next bucket."""
        bucket, self.off = self.buckets[self.off], self.off + 1
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.params]
        for p in bucket.params:
            p.grad = None
        bucket.flat = together(grads).to(self.dtype or grads[0].dtype)
        if self.zero1:
            bucket.work = dist.reduce(bucket.flat, group=bucket.group, group_dst=bucket.owner, async_op=True)
        else:
            bucket.work = dist.all_reduce(bucket.flat, group=bucket.group, async_op=True)

    @torch.no_grad()
    def sum_gradients(self):
        """Sum every gradient over the replicas of its parameter: for the owner alone or, without ZeRO-1, for all."""
        while self.off < len(self.buckets):
            self.set_off()
        for bucket in self.buckets:
            bucket.work.wait()
            if any(p.grad is not None for p in bucket.params):
                raise RuntimeError("a gradient came after its bucket had set off: `expect` was told of fewer")
            if bucket.mine or not self.zero1:
                for p, grad in zip(bucket.params, apart(bucket.flat.to(bucket.params[0].dtype), bucket.params)):
                    p.grad = grad
            bucket.work, bucket.flat, bucket.missing = None, None, math.inf
        self.off = 0

    def clip(self, most, mesh):
        """Scale the summed gradients so that the norm of all of them together, every parameter of the model once, is at
        most `most`; returns the norm before that, the same float on each rank."""
        norm = get_total_norm([p.grad for p in self.owned.values() if p.grad is not None])
        total = mesh.total({"squares": float(norm) * float(norm)})["squares"]
        norm = torch.full_like(norm, math.sqrt(total))
        clip_grads_with_norm_(list(self.updated.values()), most, norm)
        return float(norm)

    @torch.no_grad()
    def send_updated(self):
        """With ZeRO-1 the owners' new weights set off to all replicas; nobody may read them before `receive_updated`,
        nor write to them."""
        for bucket in self.buckets if self.zero1 else ():
            bucket.flat = together(bucket.params)
            bucket.work = dist.broadcast(bucket.flat, group=bucket.group, group_src=bucket.owner, async_op=True)

    @torch.no_grad()
    def receive_updated(self):
        """... and arrive."""
        for bucket in self.buckets if self.zero1 else ():
            bucket.work.wait()
            for p, new in zip(bucket.params, apart(bucket.flat, bucket.params)) if not bucket.mine else ():
                if new.data_ptr() == p.data_ptr():
                    torch.autograd.graph.increment_version(p)            # written to without its knowledge
                else:
                    p.copy_(new)
            bucket.work, bucket.flat = None, None


# --- checkpoints: files -----------------------------------------------------------------------------------------------

def write_atomic(path, text):
    """Replace the file `path` by `text`; a reader sees the old content or the new, whatever happens in between."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def sync(path):
    """Ask the operating system to put a file, or a folder's list of names, on the disk."""
    if os.name == "nt" and Path(path).is_dir():                                       # Windows syncs no folders
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- checkpoints: written ---------------------------------------------------------------------------------------------

def copied(tensors):
    """Copies on the CPU. Views share memory with their parameter, and safetensors wants each tensor in one piece."""
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def write_checkpoint(out_dir, step, tensors, state, tokenizer, rank=0, ranks=1, timeout=600.0):
    """Write {name: tensor}, `copied`, and the JSON-able `state` as the checkpoint of `step`; returns its folder.

    tokenizer: text of tokenizer.json. Keeps the last KEEP checkpoints. Every one of `ranks` ranks calls it with its own
    tensors, on the same disk; rank 0 waits for the others' parts, which appear in the folder, and makes the checkpoint
    of them. No rank talks to another, so a thread may do it while the ranks train. UserError if the disk is full or
    not writable, or a part is missing: the checkpoints before this one stay whole.
    """
    out_dir = Path(out_dir)
    final = out_dir / f"step_{step:08d}"
    temporary = out_dir / f"step_{step:08d}.tmp"
    try:
        if ranks == 1:
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=ranks > 1)
        file = temporary / f"rank_{rank:05d}.safetensors"
        save_file(tensors, file)
        sync(file)
        part = {"hash": file_hash(file), "names": list(tensors)}
        write_atomic(file.with_suffix(".json"), json.dumps(part))
        if rank:
            return final
        files, index = {}, {}
        for file in (f"rank_{r:05d}.safetensors" for r in range(ranks)):
            part = taken((temporary / file).with_suffix(".json"), timeout)
            files[file] = part["hash"]
            index.update(dict.fromkeys(part["names"], file))
        write_atomic(temporary / "tokenizer.json", tokenizer)
        files["tokenizer.json"] = file_hash(temporary / "tokenizer.json")
        state = {"format": 1, "step": step, "files": files, **state, "index": index}
        write_atomic(temporary / "state.json", json.dumps(state, indent=1))
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)                              # a run that was resumed passes here again
        os.rename(temporary, final)
        write_atomic(out_dir / "latest", final.name + "\n")
        sync(out_dir)
    except (OSError, SafetensorError) as e:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{final}: checkpoint could not be written ({e}); those before it are whole: free some "
                        f"space and go on with --resume") from None
    for old in checkpoints(out_dir)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def taken(path, timeout):
    """The part that a rank reports in the JSON file `path`, once it does; the file is then removed."""
    until = time.time() + timeout
    while not path.exists():
        if time.time() > until:
            raise TimeoutError(f"{path.stem} has not written its part within {timeout:.0f} seconds")
        time.sleep(0.01)
    part = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return part


class Saver:
    """Saves in a thread: `save` returns when the tensors are copied to CPU memory. One checkpoint is on its way at a
    time; an error of the thread comes out at the next call, or at the end."""

    def __init__(self, out_dir, mesh):
        self.out_dir, self.mesh, self.thread, self.error = out_dir, mesh, None, None

    def save(self, step, tensors, state, tokenizer):
        self.wait()

        def write(tensors):
            try:
                write_checkpoint(self.out_dir, step, tensors, state, tokenizer, self.mesh.rank, self.mesh.world,
                                self.mesh.timeout)
            except BaseException as e:
                self.error = e
        self.thread = threading.Thread(target=write, args=(copied(tensors),), daemon=True)
        self.thread.start()

    def wait(self):
        if self.thread:
            self.thread.join()
        if self.error:
            error, self.error = self.error, None
            raise error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.wait()
            self.mesh.most(0)                                # rank 0 is done too: now all may leave
        elif self.thread:
            # What was begun before the error may still come to its end; if it waits for a rank that is gone, it won't.
            self.thread.join(10 if self.mesh.world == 1 else 1)


# --- checkpoints: read ------------------------------------------------------------------------------------------------

def checkpoints(out_dir):
    """Whole checkpoints in out_dir, oldest first."""
    try:
        os.stat(out_dir)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise UserError(f"--out_dir={str(out_dir)[:80]}: {e.strerror if isinstance(e, OSError) else e}; give another") \
            from None
    return sorted(p for p in Path(out_dir).glob("step_" + 8 * "[0-9]") if (p / "state.json").is_file())


def latest(out_dir):
    """The checkpoint that a run's `latest` names (the newest, if it names none), or `out_dir` itself if it is one.
    UserError if there is none."""
    out_dir = Path(out_dir)
    if (out_dir / "state.json").is_file():
        return out_dir
    have = checkpoints(out_dir)
    if not have:
        raise UserError(f"{out_dir}: no checkpoint there; train one first (python train.py config/tiny.py)")
    try:
        named = out_dir / (out_dir / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        named = None
    return named if named in have else have[-1]


def read_state(path):
    """The state.json of a checkpoint folder as a dict. UserError if it is not one or is damaged."""
    path = Path(path) / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        right = all(isinstance(state[key], kind) for key, kind in (("step", int), ("config", dict), ("files", dict)))
        if state["format"] == 1 and right and state["config"] and state["files"]:
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: not a checkpoint of this project, or damaged; remove its folder and use the one before")


def checked(path, mesh=None):
    """read_state(path), once every file's hash is what it says; of several ranks each reads its share of the files.
    UserError on all of them names the first that is damaged."""
    mesh = mesh or Mesh()
    try:
        state, wrong = read_state(path), []
        wrong = [Path(path) / file for file, digest in list(state["files"].items())[mesh.rank::mesh.world]
                 if not (Path(path) / file).is_file() or file_hash(Path(path) / file) != digest]
        error = wrong and f"{wrong[0]}: missing, truncated or altered (its hash differs from state.json's); remove " \
                          f"{path} and use the checkpoint before it"
    except UserError as e:
        error = str(e)
    if told := [error for error in mesh.gather(error) if error]:
        raise UserError(told[0])
    return state


def load_tensors(path, state, wanted):
    """Copy every tensor of `wanted` {name: tensor} from the checkpoint folder `path`, whose `checked` state this is.
    UserError if one is missing or of another shape."""
    path, missing = Path(path), dict(wanted)
    for file in sorted({state["index"][name] for name in wanted if name in state["index"]}):
        with safe_open(path / file, framework="pt") as f:
            for name in [name for name in missing if state["index"].get(name) == file]:
                tensor, target = f.get_tensor(name), missing.pop(name)
                if tensor.shape != target.shape:
                    raise UserError(f"{path / file}: {name} has shape {list(tensor.shape)}, this model "
                                    f"{list(target.shape)}; was the config changed?")
                with torch.no_grad():
                    target.copy_(tensor)
    if missing:
        raise UserError(f"{path}: tensor {sorted(missing)[0]} is missing ({len(missing)} in all); "
                        f"was the config changed?")


def load_checkpoint(path, wanted):
    """Copy every tensor of `wanted` {name: tensor} from the checkpoint folder `path`; returns its state.

    UserError if a file is truncated or altered (its hash tells), or a tensor is missing or of another shape.
    """
    state = checked(path)
    load_tensors(path, state, wanted)
    return state
