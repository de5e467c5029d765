"""Which path runs, and why.

Every mechanism of this project has a plain-torch form, the specification. Where a machine offers something faster, the
choice is made here, from what the tensors are (device, dtype), never from a global switch; the table that train.py
prints at its start says what was chosen and why, so that no fallback is silent.
"""
import ctypes
import functools
import os
import platform

import torch

from configs import UserError

# Dense BF16 peak of the GPUs we can name, in FLOP/s: the vendors' data sheets. An unknown GPU gets no MFU.
PEAK_BF16 = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. UserError where this machine has none."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in have.items() if there)
    if not have[name]:
        raise UserError(f"--device={name}: torch {torch.__version__} finds no such device here; use --device=cpu")
    return torch.device(name)


def keep_freed_memory():
    """Tell glibc to keep what torch frees on a CPU instead of giving it back to the system and faulting it in again,
    page by page, at every step: a small model's step takes up to a third less time. Elsewhere than on glibc nothing
    happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                                              # malloc.h
    mallopt(M_MMAP_THRESHOLD, 32 << 20)                                                      # the largest it takes
    mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def peak_flops(device, precision):
    """Peak FLOP/s of the matrix units that `precision` uses, or None where we don't know it; of BF16 for FP8 too, so
    that the two can be compared."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


@functools.cache
def has_triton():
    """Whether there is a Triton with all that the kernels import from it."""
    try:
        import triton.experimental.gluon.language.nvidia.hopper
        import triton.experimental.gluon.nvidia.hopper
        import triton.tools.tensor_descriptor  # noqa: F401
    except ImportError:
        return False
    return True


def no_triton(device):
    """Why kernels can't run on this device, or None."""
    if device.type != "cuda":
        return "no GPU"
    return None if has_triton() else "Triton is not installed"


def hopper(device):
    """Whether this GPU is an NVIDIA Hopper; AMD's numbers its own generations 9 too."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def latent_decode(device, dtype, r_kv, d_r):
    """(path, why) of attention over the latent cache: 'Triton' or 'torch'."""
    if no_triton(device):
        return "torch", no_triton(device)
    if not hopper(device):
        return "torch", "the kernel's tiles are made for Hopper"
    if dtype != torch.bfloat16:
        return "torch", "the kernel takes BF16"
    if any(d & d - 1 or d < 16 for d in (r_kv, d_r)) or r_kv > 512:
        return "torch", f"r_kv = {r_kv} and d_r = {d_r} are not both powers of two from 16 to 512"
    return "Triton", "one read of the cache for all heads, split over the sequence"


def multiprocessors(device):
    """How many programs a kernel needs to use all of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def attention(device, dtype, dims):
    """(path, why) of training attention for head dims (d_n, d_r, d_v): 'Triton' or 'torch SDPA'."""
    if no_triton(device):
        return "torch SDPA", no_triton(device)
    if not hopper(device):
        return "torch SDPA", "the kernels' tiles are made for Hopper"
    if dtype != torch.bfloat16:
        return "torch SDPA", "the kernels take BF16"
    if any(d & d - 1 or not 16 <= d <= most for d, most in zip(dims, (128, 64, 128))):
        return "torch SDPA", f"d_n, d_r, d_v = {', '.join(map(str, dims))} are not powers of two, 16 to 128 (d_r: 64)"
    return "Triton", "reads q, k_rope and v where they lie; cuDNN wants them concatenated and expanded"


def use_small_kernels(x):
    """RMSNorm and RoPE as one kernel each: Triton on a GPU, in float32 or less."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton()


def native_bf16():
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); elsewhere bf16 is slower than fp32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fast_bf16(device):
    """Whether BF16 products are faster than FP32 ones on this device."""
    return device.type == "cuda" or device.type == "cpu" and native_bf16()


def name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()}, " \
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores)"


def peak_memory(device):
    """Most bytes this process has held: on the GPU its allocator's peak, elsewhere the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                                                    # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def multiply_in_parts(x, dtype):
    """Whether a product of BF16 x in float32 is made of BF16 ones: on a GPU, whose tensor cores multiply these."""
    return x.is_cuda and x.dtype == torch.bfloat16 and dtype == torch.float32


def use_grouped_mm(x):
    """Experts as one grouped matrix product: on a GPU in BF16. On a CPU its backward is slower than a loop."""
    return x.is_cuda and x.dtype == torch.bfloat16


def use_graph(config, x, most):
    """Decoding tokens x [B, T] as a CUDA graph: where no operation of a step waits for the host. The loop over experts
    does, and off Hopper F.grouped_mm, which takes over beyond `most` tokens."""
    fast = x.is_cuda and config.precision == "bf16" and decode_kernels(x.device, torch.bfloat16)[0] == "Triton"
    return fast and (x.numel() <= most or hopper(x.device))


def captured(step, state, generator=None):
    """`step` as a CUDA graph: its hundreds of kernels are recorded once and started as one. A function that repeats
    them and returns step's result, always in the same memory. state: the tensors that step changes, which it finds as
    they are now; generator: what it draws from."""
    before = [tensor.clone() for tensor in state]
    step()                                                     # compile and allocate now, which can't be recorded
    graph = torch.cuda.CUDAGraph()
    if generator:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        out = step()
    for tensor, value in zip(state, before):
        tensor.copy_(value)
    return lambda step=step: graph.replay() or out             # step: holds what the graph reads


def on_host(tensor):
    """A function that gives the tensor as lists; where there is a GPU it waits for what is launched by now and not for
    what is launched later."""
    if not tensor.is_cuda:
        return tensor.tolist
    copy, made = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    made.record()
    return lambda: made.synchronize() or copy.tolist()


def out_of_memory(error):
    """Whether this exception says that memory has run out: a GPU's, torch's on a CPU, or numpy's."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text)


def free_memory(device):
    """Bytes that are free, on the GPU or in this machine; None where we can't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):                                                       # not Linux
        return None


def decode_kernels(device, dtype):
    """(path, why) of the gate, the experts and Linear where few tokens are generated: 'Triton' or 'torch'."""
    if no_triton(device):
        return "torch", no_triton(device)
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "torch", "the kernels want an Ampere GPU or a later one"
    if dtype == torch.float64:
        return "torch", "the kernels sum in float32"
    return "Triton", "few kernels to start, each weight read where it is"


def use_decode_kernels(x, most):
    """Whether x [..., D] is so few rows, at most `most`, that generation's kernels take it; they have no gradients."""
    few = 0 < x.numel() <= most * x.shape[-1]
    return few and not torch.is_grad_enabled() and decode_kernels(x.device, x.dtype)[0] == "Triton"


def use_copied_experts(x, size):
    """On a CPU: whether copying the weights of the chosen experts, `size` numbers, takes less than sorting the rows."""
    return x.device.type == "cpu" and size <= 100_000 and not torch.is_grad_enabled()


def fp8_kernels(device):
    """(path, why) of FP8's products: 'Triton' or 'torch'."""
    if no_triton(device):
        return "torch", no_triton(device)
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return "torch", f"{torch.cuda.get_device_name(device)} does not multiply E4M3: NVIDIA's do from compute " \
                        f"capability 8.9"
    return "Triton", "and cuBLASLt for products of whole tiles" if hopper(device) else "the GPU has FP8"


def experts(device, dtype, dims, fp8=False):
    """(path, why) of the experts of many tokens, of dims (dim, moe_inter_dim), in `dtype` or FP8."""
    grouped = device.type == "cuda" and dtype == torch.bfloat16 and not fp8
    other = "F.grouped_mm" if grouped else "one product per busy expert"
    if no_triton(device) or not hopper(device):
        return other, no_triton(device) or "the kernels' tiles are made for Hopper"
    if dtype != torch.bfloat16:
        return other, "the kernels take BF16 and FP8"
    steps = (16, 128) if fp8 else (8, 8)
    if any(d % step for d, step in zip(dims, steps)):
        return other, "dim, moe_inter_dim = {}, {} are no multiples of {}, {}".format(*dims, *steps)
    return "Triton", "sorted by index, gathered while they are multiplied, summed by token"


def training_graph(device, c, world=1):
    """(path, why) of a Config's micro-batch, forward and backward, on one of `world` ranks: 'CUDA graph' or
    'launched'."""
    if device.type != "cuda" or not c.graph:
        return "launched", "no GPU" if c.graph else "--graph=False"
    if c.compile or world > 1:
        return "launched", "torch.compile's own" if c.compile else "ranks send tokens and gradients in between"
    if c.precision == "fp8_reference":
        return "launched", "the reference was asked for"
    if c.batch_size > c.micro_batch_size and c.batch_size % c.micro_batch_size:
        return "launched", "the last micro-batch is a smaller one: micro_batch_size does not divide batch_size"
    dtype, fp8 = torch.float32 if c.precision == "fp32" else torch.bfloat16, c.precision == "fp8"
    path, why = experts(device, dtype, (c.dim, c.moe_inter_dim), fp8)
    if path != "Triton":
        return "launched", f"the experts' rows are counted by the host ({why})"
    return "CUDA graph", "a micro-batch's kernels are started as one"


def table(device, config, world=1):
    """[(mechanism, path taken, why)] for the start-up table of a Config on one of `world` ranks."""
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    fp8 = config.precision.startswith("fp8")
    asked = ("torch", "the reference was asked for") if config.precision == "fp8_reference" else fp8_kernels(device)
    dims = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    latent = config.kv_lora_rank, config.qk_rope_head_dim
    fused = "fused" if device.type in ("cpu", "cuda") else "fused only on CPU and CUDA"
    rows = [
        ("attention", *attention(device, dtype, dims)),
        ("norm, RoPE", "torch" if no_triton(device) else "Triton", no_triton(device) or "one pass over memory each"
         + ("" if dims[1] & dims[1] - 1 == 0 else f"; RoPE in torch, d_r = {dims[1]} is no power of two")),
        *([("FP8", *asked)] if fp8 else []),
        ("experts", *(("one product per busy expert", asked[1]) if config.precision == "fp8_reference" else
                      experts(device, dtype, (config.dim, config.moe_inter_dim), fp8))),
        ("training", *training_graph(device, config, world)),
        ("generation", *decode_kernels(device, dtype)),
        ("decoding", *latent_decode(device, dtype, *latent)),
        ("optimizer", *(("torch AdamW", fused) if config.moments == "fp32" else ("AdamW of fp8.py", "BF16 moments"))),
    ]
    if config.bf16_head:
        rows.append(("head's loss", "BF16" if fast_bf16(device) else "FP32",
                     "bf16_head" if fast_bf16(device) else "bf16_head, but no BF16 in this processor"))
    return rows
