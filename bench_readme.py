"""bench.py readme: the tables and figures of the README, from results/*.json."""
import statistics

import torch

import cluster
import configs
import dualpipe
from bench_mla import cache_per_token
from bench_ranks import off
from configs import UserError
from measure import HERE, RESULTS, call, load
from model import arithmetic
from parallel import Mesh, write_atomic

# --- the README -------------------------------------------------------------------------------------------------------

def clusters():
    """V3's own 2048 GPUs under each schedule, as cluster.py plans them."""
    v3 = configs.read(HERE / "configs/v3_671b.py")
    v3 = configs.Config(**{key: value for key, (value, _) in v3.items()}).replace(precision="fp8", moments="bf16")
    a, lines = arithmetic(v3), ["| schedule | a step, s | bubble | exchanges hidden, s | exposed | tokens/s a GPU | "
                                "the fullest GPU, GB | of them activations |", "|---|---|---|---|---|---|---|---|"]
    for kind in dualpipe.KINDS:
        c = v3.replace(pipeline=kind)
        mesh = Mesh(world=2048, nodes=256).arrange(c, [c.batch_size])
        (n, _), m = cluster.plan(c, mesh, a=a), cluster.fullest(c, mesh, a)
        lines.append(f"| {kind} | {n['step']:.1f} | {n['bubble']:.1%} | {n['hidden']:.1f} | {n['exposed']:.1f} | "
                     f"{n['tokens_per_s']:,.0f} | {m['most'] / 1e9:.0f} | {m['activations'] / 1e9:.0f} |")
    return "\n".join(lines)


def many_ranks(m):
    """What bench.py cluster has measured, part by part."""
    where = f"{m['gpus']} x {m['gpu']}" if m["gpu"] else f"{m['gpus']} processes of {m['cpu']}"
    out = [f"{where}, torch {m['torch']}."]
    if "parity" in m:
        rows = {(r["layout"], r["precision"]): r for r in m["parity"]["rows"]}
        cell = lambda r: f"{r['loss']:.0e} | {r['weights']:.0e} | {r['all_gradients']:.0e}, {r['gradients']:.0e}" \
            if r else " | | "
        out += ["", f"| {m['parity']['steps']} steps of a small V3 against one rank | FP32: losses | weights | "
                    "gradients of step 1 | BF16: losses | weights | gradients |", "|---|---|---|---|---|---|---|",
                *(f"| {layout} | {cell(rows.get((layout, 'fp32')))} | {cell(rows.get((layout, 'bf16')))} |"
                  for layout in dict.fromkeys(layout for layout, _ in rows)), "",
                "Relative differences: of the worst step, of all weights together, of all gradients and of the worst. "
                "Where experts are spread, their sums are rounded to BF16 once more, and a token whose gate is near a "
                "tie goes to another expert: one of n rows more or less changes its gradient by about 1 / sqrt(n)."]
    if "exchange" in m:
        e = m["exchange"]
        out += ["", f"| what experts send, {e['tokens']:,} tokens of V3 | nodes x ranks | MB to others | ms | GB/s | "
                    "the all-to-all alone, GB/s |", "|---|---|---|---|---|---|",
                *(f"| {r['what']}, {r['dtype'].upper()} | {r['shape']} | {r['bytes'] / 1e6:.1f} | "
                  f"{r['seconds'] * 1e3:.2f} | {r['bytes'] / r['seconds'] / 1e9:.0f} | "
                  f"{r['wire_bytes'] / r['wire_seconds'] / 1e9:.0f} |" for r in e["rows"])]
        if "link" in e:
            out += ["", f"The link, measured with large messages: {e['link']['all_to_all'] / 1e9:.0f} GB/s a rank in "
                        f"an all-to-all, {e['link']['send_receive'] / 1e9:.0f} from neighbour to neighbour. A dispatch "
                        f"also learns how many rows come, copies its rows together, and sends their weights."]
    if "overlap" in m:
        o = m["overlap"]
        out += ["", "| a pair of chunks, two of V3's layers each | in turns, ms | one after the other | without "
                    "exchanges | exchanges under kernels |", "|---|---|---|---|---|",
                *(f"| {r['precision'].upper()}, {4096 * r.get('sequences', 1):,} tokens | {r['in_turns_ms']:.1f} | "
                  f"{r['one_after_the_other_ms']:.1f} | "
                  f"{r['without_ms']:.1f} | " + (f"{r['under_kernels']:.0%}" if "under_kernels" in r else "") + " |"
                  for r in o["rows"])]
        if "timeline" in o:
            out += ["", "![two pairs on several GPUs: arithmetic and exchanges](results/cluster.png)"]
    if "scaling" in m:
        share = lambda x: f"{x:.0%}" if x else ""
        out += ["", "| model, parameters | ranks | tokens/s | MFU | of one GPU's tokens/s, each | memory of a GPU, GB "
                    "| planned | makespan against simulated |", "|---|---|---|---|---|---|---|---|",
                *(f"| {r['model']}, {r['parameters'] / 1e9:.2f}B | {r['layout']} | {r['tokens_per_s']:,.0f} | "
                  f"{share(r['mfu'])} | {share(r['efficiency'])} | "
                  f"{r['peak_bytes'] / 1e9:.1f} | {r['planned_bytes'] / 1e9:.1f} | "
                  + (f"{r['computed'] / r['simulated'] - 1:+.1%}" if "simulated" in r else "") + " |"
                  for r in m["scaling"]["rows"])]
    if "restart" in m and m["restart"]["code"] == 0:
        r = m["restart"]
        out += ["", f"A rank killed in step 13 of 20, under `torchrun --max-restarts=1`: the job went on from "
                    f"{r['resumed']} by itself, {r['seconds']:.0f} s in all"
                    + (f"; the losses of all steps are one rank's to {r['loss']:.0e}." if "loss" in r else ".")]
    return "\n".join(out)


def counterpart(name):
    """The run of bench.py fp8_quality that another is compared with: BF16 of the same seed, or its first seed."""
    seed = ", another seed"
    return None if name == "BF16" else "BF16" + seed if name.endswith(seed) and name != "BF16" + seed else "BF16"


def tables():
    """{name of a marked place in the README: its text}, from the committed results."""
    t, c, a, d, s = load("tiny"), load("char"), load("ablations"), load("decode"), load("speculation")
    attention, low, eight, part, quality = (load(n) for n in ("attention", "fp8_loss", "fp8", "layer", "fp8_quality"))
    p, o, small, bf16 = load("pipeline"), load("overlap"), load("fp8_tiny"), load("moments")
    mean = lambda runs, key: statistics.mean(r[key] for r in runs)
    spread = lambda runs, key: statistics.stdev(r[key] for r in runs) if len(runs) > 1 else 0.0
    vio = lambda runs: f"{mean(runs, 'max_vio'):.2f}" if mean(runs, "max_vio") else "-"
    out = {"dualpipe": f"```\n{dualpipe.table(dualpipe.parse([]))}\n```", "cluster": clusters()}
    if t:
        out["tiny"] = (
            f"| | |\n|---|---|\n| time, process start to last line | {t['seconds'] / 60:.1f} minutes "
            f"({t['tokens_per_s']:,.0f} tokens/s) |\n| validation | {t['val_bpb']:.3f} bits per byte, "
            f"{t['ratio']:.3f}x of `xz -9e` ({t['xz_bpb']:.3f}) |\n"
            f"| peak memory | {t['peak_bytes'] / 1e9:.2f} GB |\n| machine | {t['cpu']}, torch {t['torch']} |")
        out["sample"] = "```python\n" + t["sample"].strip() + "\n```"
    if t and c:
        row = lambda name, r, final: f"| {name} | " + " | ".join(
            f"{r['losses'][s]:.2f}" if s in r["losses"] else "" for s in ("100", "200", "400", "500", "1000")) \
            + f" | {final} | {r['python']} | `{r['data']['corpus_sha256'][:12]}` |"
        out["normal"] = "\n".join([
            "| config | step 100 | 200 | 400 | 500 | 1000 | validation | Python | corpus sha256 |",
            "|---|---|---|---|---|---|---|---|---|",
            row("tiny", t, f"{t['val_bpb']:.3f} bits per byte"),
            row("char (tiny Shakespeare)", c, f"{c['runs'][0]['final_loss']:.3f} nats per byte")])
    if c:
        out["char"] = "\n".join([
            "| | validation loss, nats per byte | seconds |", "|---|---|---|",
            *(f"| nanoGPT, 2000 steps | {r['nanogpt_loss']:.4f} | {r['nanogpt_seconds']:.1f} |\n"
              f"| nanoV3, step {r['step']}, its first evaluation at or under that | "
              f"{dict(map(tuple, c['evals']))[r['step']]:.4f} | {r['seconds']:.1f} ({r['ratio']:.2f}x) |"
              for r in c["runs"])])
    if a:
        out["ablations"] = "\n".join([
            "| variant | validation loss (mean ± std of the seeds) | MaxVio | seconds |", "|---|---|---|---|",
            *(f"| {name} | {mean(v['runs'], 'val_loss'):.4f} ± {spread(v['runs'], 'val_loss'):.4f} | "
              f"{vio(v['runs'])} | {mean(v['runs'], 'seconds'):.0f} |"
              for name, v in a["variants"].items())])
    if attention:
        cell = lambda r, way: " | ".join(
            f"{r['Triton, ' + way][key + '_ms']:.2f} ({r[way + ', times cuDNN'][key]:.2f}x)"
            for key in ("forward", "backward"))
        out["attention"] = "\n".join([
            "| batch, heads, tokens | forward, ms | backward, ms | kernel alone: forward | backward | memory |",
            "|---|---|---|---|---|---|",
            *(f"| {r['B']}, {r['H']}, {r['T']:,} | {cell(r, 'block')} | {cell(r, 'kernel')} | "
              f"{r['block, times cuDNN']['memory']:.2f}x |" for r in attention["shapes"]), "",
            f"{attention['gpu']}, dims {'/'.join(map(str, attention['shapes'][0]['dims']))}, BF16. In brackets: speed "
            f"against cuDNN; memory: the peak of the attention block, against the same. A V3 attention layer of 4,096 "
            f"tokens keeps " + "; ".join(f"{r['kept_bytes'] / 1e6:,.0f} MB with {name} ({r['ms']:.1f} ms)"
                                         for name, r in attention["recomputation"].items()) + ".", "",
            "| | torch: forward, backward, ms | torch.compile | Triton |", "|---|---|---|---|",
            *(f"| {name} | " + " | ".join(f"{r['forward_ms']:.3f}, {r['backward_ms']:.3f}" for r in forms.values())
              + " |" for name, forms in attention["small_ops"].items())])
    if d:
        shapes, error = d["attention"]["shapes"], d["attention"]["error"]
        out["decode"] = "\n".join([
            "| batch, heads, tokens held, queries | replayed, us | torch.compile | launched, us | torch.compile | "
            "cache, TB/s | TFLOP/s | FP8 cache |", "|---|---|---|---|---|---|---|---|",
            *(f"| {r['batch']}, {r['heads']}, {r['tokens']:,}, {r['queries']} | {r['us']:.0f} | "
              f"{r['compiled_us']:.0f} ({r['speedup']:.1f}x) | {r['launched_us']:.0f} | "
              f"{r['compiled_launched_us']:.0f} ({r['compiled_launched_us'] / r['launched_us']:.1f}x) | "
              f"{r['cache_tb_s']:.2f} | {r['tflops']:.0f} | {r['fp8_us']:.0f} |" for r in shapes), "",
            f"{d['gpu']}, V3's dims. Relative error: {error['triton']:.1e} (plain torch in BF16 {error['torch']:.1e}), "
            f"with an FP8 cache {error['triton_fp8']:.1e}.", "",
            "| generation, `config/bench_1b.py`, random weights | tokens/s | if it only read its weights and cache |",
            "|---|---|---|",
            *(f"| batch {g['batch']} | {g['tokens_per_s']:,.0f} | {g['limit_tokens_per_s']:,.0f} |"
              for g in d["generation"])])
    if low:
        of = lambda precision, key: [r[key] for r in low["runs"] if r["precision"] == precision]
        against = lambda precision: statistics.mean(of(precision, "loss")) / statistics.mean(of("bf16", "loss")) - 1
        names = {"fp32": "FP32", "bf16": "BF16", "fp8_reference": "FP8, the reference"}
        out["fp8_loss"] = "\n".join([
            "| products | training loss, last 100 steps, of each seed | against BF16 | validation loss |",
            "|---|---|---|---|",
            *(f"| {name} | {', '.join(f'{x:.4f}' for x in of(key, 'loss'))} | {against(key):+.2%} | "
              f"{', '.join(f'{x:.4f}' for x in of(key, 'val_loss'))} |" for key, name in names.items())])
    if eight and {"products", "few", "quantization"} <= eight.keys():
        ratio = lambda r, ours, theirs, what: f"{r[ours]:.0f}" + (
            f" ({r[ours] / r[theirs]:.2f}x {what})" if theirs in r else "")
        copy = eight["quantization"]["copy"]
        out["fp8_kernels"] = "\n".join([
            "| Linear: tokens, in, out | Fprop, TFLOP/s | against BF16 | Wgrad | added to a gradient |",
            "|---|---|---|---|---|",
            *(f"| {r['name']}: {r['M']}, {r['K']}, {r['N']} | {ratio(r, 'triton', 'cublas', 'cuBLASLt')} | "
              f"{r['triton'] / r['bf16']:.2f}x | {ratio(r, 'wgrad_triton', 'wgrad_cublas', 'cuBLASLt')} | "
              f"{ratio(r, 'wgrad_triton_add', 'wgrad_cublas_add', 'cuBLASLt and a sum')} |" for r in eight["products"]),
            "", "| few rows: rows, in, out | microseconds | cuBLASLt | BF16 |", "|---|---|---|---|",
            *(f"| {r['M']}, {r['K']}, {r['N']} | {r['triton']:.1f} | {r['cublas']:.1f} | {r['bf16']:.1f} |"
              for r in eight["few"]),
            "", "| in one pass | TB/s | against a copy | against torch.compile |", "|---|---|---|---|",
            *(f"| {name} | {r['triton'] / 1e12:.2f} | {r['triton'] / copy:.2f}x | "
              + (f"{r['triton'] / r['compiled']:.2f}x" if "compiled" in r else "") + " |"
              for name, r in eight["quantization"]["passes"].items())])
    if eight and {"linears", "square", "adamw"} <= eight.keys():
        cells = lambda r: f"{r['bf16']:.3f} | {r['fp8']:.3f} | {r['bf16'] / r['fp8']:.2f}x"
        row = lambda what, r: f"| {what} | {cells(r)} | {cells(r['launched'])} |"
        total = lambda rows: {key: sum(r[key] for r in rows) for key in ("bf16", "fp8")}
        every = total(eight["linears"]) | {"launched": total([r["launched"] for r in eight["linears"]])}
        out["fp8_linears"] = "\n".join([
            "| Linear: in, out | BF16, ms | FP8, ms | speed | launched: BF16 | FP8 | speed |",
            "|---|---|---|---|---|---|---|",
            *(row(f"{r['name']}: {r['in']}, {r['out']}", r) for r in eight["linears"]), row("together", every),
            *(row(f"{r['in']}, {r['out']}", r) for r in eight["square"]), "",
            f"{eight['gpu']}. AdamW, bytes read and written per second: " + "; ".join(
                f"{name} moments {r['bytes_per_s'] / 1e12:.2f} TB/s ({r['ms']:.2f} ms)"
                for name, r in eight["adamw"].items()) + "."])
    if part:
        sides, GB = part["runs"], lambda size: f"{size / 1e9:.2f}"
        line = lambda name, value: f"| {name} | " + " | ".join(map(value, sides)) + " |"
        out["layer"] = "\n".join([
            line("", lambda r: f"{r['precision'].upper()}, {r['moments'].upper()} moments"), "|---|---|---|",
            line("ms a step, 4096 tokens", lambda r: f"{r['ms']:.1f}"),
            line("... launched from Python", lambda r: f"{r['launched_ms']:.1f}"),
            line("tokens/s", lambda r: f"{r['tokens_per_s']:,.0f}"),
            line("TFLOP/s of the model", lambda r: f"{r['tflops']:.0f}"),
            line("GPU hours per trillion tokens", lambda r: f"{r['gpu_hours_per_trillion_tokens'] / 1e3:.0f}K"),
            line("peak memory, GB", lambda r: GB(r["peak_bytes"])),
            *(line(f"... {what}", lambda r, what=what: GB(r["bytes"][what])) for what in sides[0]["bytes"]), "",
            f"{part['gpu']}. FP8 against BF16: {part['speedup']:.2f}x the speed, {part['memory']:.2f}x the memory."])
    if quality:
        both = [{r["name"]: r for r in q["runs"]} for q in (load("fp8_quality_1000"), quality) if q]
        steps = [len(next(iter(runs.values()))["curve"]) for runs in both]

        def cell(runs, name):
            if name not in runs:
                return "- | -"
            run, other = runs[name], runs.get(counterpart(name))
            apart = f" ({run['loss'] / other['loss'] - 1:+.2%})" if other else ""
            return f"{run['loss']:.4f}{apart} | " + (f"{run['val_loss']:.4f}" if run["val_loss"] else "-")
        out["fp8_quality"] = "\n".join([
            "| |" + "".join(f" training loss, last 100 of {n:,} steps | validation |" for n in steps),
            "|---|" + "---|---|" * len(steps),
            *(f"| {name} | " + " | ".join(cell(runs, name) for runs in both) + " |"
              for name in {name: None for runs in reversed(both) for name in runs}), "",
            f"{quality['gpu']}; {steps[-1] * 32 * 1024 / quality['data']['train_tokens']:.2f} passes over the text in "
            f"the longest runs." + (f" BF16's model multiplied in FP8: validation {low:.4f} "
                                    f"({low / both[-1]['BF16']['val_loss'] - 1:+.2%})."
                                    if (low := quality.get("bf16_in_fp8")) else ""), "",
            "![loss in BF16 and FP8, and their distance](results/fp8_quality.png)"])
    if small:
        whole, low8 = small["runs"]
        out["fp8_tiny"] = (
            f"The default job, cut to 150 steps: {whole['loss']:.4f} nats per token in FP32 and {low8['loss']:.4f} in "
            f"FP8 ({small['difference']:+.2%}), training loss of the last 50 steps.")
    if bf16:
        out["moments"] = (
            f"The default job, cut to {bf16['width'] * len(bf16['curves']['fp32'])} steps, on a CPU: with BF16 moments "
            f"the training loss, in means of {bf16['width']} steps, is never more than {abs(bf16['most_apart']):.2%} "
            f"from that with FP32 ones, and {bf16['end']:+.2%} at the end.")
    if m := load("cluster"):
        out["many"] = many_ranks(m)
    out.setdefault("many", "(Not measured yet: `python bench.py cluster`.)")
    for place, section in {"fp8_kernels": "fp8", "fp8_linears": "fp8", "layer": "layer", "fp8_quality": "fp8_quality",
                           "fp8_tiny": "fp8_tiny", "step": "step"}.items():
        out.setdefault(place, f"(Not measured yet: `python bench.py {section}`.)")
    if p:
        cell = lambda r: "" if r is None else f"{min(r['measured']):.2f}" + (
            f" ({min(r['measured']) / r['simulated'] - 1:+.1%})" if "simulated" in r else "")
        find = lambda name, ranks: next((r for r in p["rows"] if (r["schedule"], r["ranks"]) == (name, ranks)), None)
        theirs = {"1f1b": "Schedule1F1B", "dualpipev": "ScheduleDualPipeV", "zbv": "ScheduleZBVZeroBubble"}
        out["pipeline"] = "\n".join([
            "| schedule | 4 ranks, 10 micro-batches: simulated, s | ours | torch's "
            "| 8 ranks, 20 micro-batches: simulated | ours | torch's |", "|---|---|---|---|---|---|---|",
            *(f"| {kind} | " + " | ".join(
                f"{'%.2f' % r['simulated'] if (r := find(kind, ranks)) else ''} | {cell(r)} | "
                f"{cell(find(theirs.get(kind), ranks))}" for ranks in (4, 8)) + " |"
              for kind in (*dualpipe.KINDS, "zbv"))])
    if o:
        least = min(o["without_ms"], *(r["in_turns_ms"] for r in o["rows"]))               # a pair at its fastest
        hidden = lambda r: 1 - (r["in_turns_ms"] - least) / (r["one_after_the_other_ms"] - least)
        out["overlap"] = "\n".join([
            "| exchanges / arithmetic | no exchanges, ms | one after the other | in turns | hidden |",
            "|---|---|---|---|---|",
            *(f"| {r['travel_ms'] / o['without_ms']:.2f} | {o['without_ms']:.1f} | {r['one_after_the_other_ms']:.1f} | "
              f"{r['in_turns_ms']:.1f} | {hidden(r):.0%} |"
              for r in sorted(o["rows"], key=lambda r: r["travel_ms"])),
            "", f"{o['gpu']}, two of {o['shape']}, in each chunk." + (
                f" In the figure {o['timeline']['under_kernels']:.0%} of the copies lie under kernels."
                if "timeline" in o else "")])
    if m := load("moe"):
        times = lambda r, form: (r[form]["forward_ms"], r[form]["both_ms"])
        cell = lambda r, form: "{:.2f}, {:.2f}".format(*times(r, form))
        beside = lambda r, form: f"{cell(r, form)} ({{:.2f}}x, {{:.2f}}x) | {{:.2f}}x".format(
            *(theirs / ours for theirs, ours in zip(times(r, "compiled"), times(r, form))),
            r[form]["kept_bytes"] / r["compiled"]["kept_bytes"])
        out["moe"] = "\n".join([
            "| tokens, experts, active, dim, inter | torch.compile: forward, both, ms | BF16 | kept | FP8 | kept |",
            "|---|---|---|---|---|---|",
            *(f"| {r['name']}: {r['tokens']:,}, {r['experts']}, {r['chosen']}, {r['dim']}, {r['inter']} | "
              f"{cell(r, 'compiled')} | {beside(r, 'Triton')} | {beside(r, 'Triton, FP8')} |" for r in m["layers"]), "",
            "| TFLOP/s of the first product alone | F.grouped_mm | BF16 | FP8 | FP8 and quantizing |",
            "|---|---|---|---|---|",
            *(f"| {r['name']} | {r['grouped_mm']:.0f} | {r['bf16']:.0f} | {r['fp8']:.0f} | {r['fp8_quantizing']:.0f} |"
              for r in m["products"]), "", f"{m['gpu']}, {m['torch']}; casting and quantizing the weights included."])
    if m := load("step"):
        ours = {"launched": "launched one by one", "graph": "as a CUDA graph, `train.py`'s way", "graph, FP8":
                "as a CUDA graph, `--precision=fp8 --moments=bf16`", "compiled": "`--compile=True`", "transformers":
                "transformers, grouped_mm", "transformers, compiled": "transformers, grouped_mm, torch.compile"}
        best = max((r["tokens_per_s"] for r in m["runs"] if "transformers" in r["name"]), default=None)
        out["step"] = "\n".join([
            "| a training step of config/bench_1b.py | tokens/s | against transformers' best | peak memory, GB |",
            "|---|---|---|---|",
            *(f"| {ours[r['name']]} | {r['tokens_per_s']:,.0f} | "
              f"{'%.2fx' % (r['tokens_per_s'] / best) if best else '-'} | {r['peak_bytes'] / 1e9:.1f} |"
              for r in m["runs"]), "",
            f"{m['gpu']}, {m['runs'][0]['tokens']:,} tokens. Ours keeps FP32 weights, gradients and, where nothing is "
            f"said, moments; transformers was given BF16 for all of them, half the bytes."])
        if small := {r["name"]: r["tokens_per_s"] for r in m.get("small", ())}:
            out["step"] += (
                f"\n\nThe same of `config/gpu.py`, whose kernels are short: {small['launched']:,.0f} tokens/s "
                f"launched, {small['graph']:,.0f} as a graph ({small['graph'] / small['launched']:.2f}x), "
                f"and {small['graph, FP8']:,.0f} in FP8, which costs more than it brings at 512 dims.")
    held = [(layout, max(layout["rows"], key=lambda row: sum(real for real, _ in row.values())), file)
            for file in ("memory", "memory_gpu") if (m := load(file)) for layout in m["layouts"]]
    if held:
        things = ("weights", "copies", "gradients", "moments", "activations", "average", "most")
        cell = lambda row, what: f"{row[what][0] / 1e6:,.1f}" if row.get(what, [0])[0] else ""
        where = {"memory": "", "memory_gpu": "config/bench_1b.py: "}
        out["memory"] = "\n".join([
            "| MB of the fullest rank | weights | copies | gradients | moments | activations | average, CPU | peak | "
            "the plan is off by at most |", "|---|---|---|---|---|---|---|---|---|",
            *(f"| {where[file]}{layout['layout']} | {' | '.join(cell(row, what) for what in things)} | "
              f"{off(layout):.1%} |" for layout, row, file in held)])
    if m := load("scaling"):
        ms = {name: 1e3 * statistics.median(times) for name, times in m["seconds"].items()}
        out["scaling"] = "\n".join([
            "| a step of the default job | ms | |", "|---|---|---|",
            f"| a plain loop | {1e3 * m['plain_seconds']:.0f} | |",
            f"| train.py, step by step in turn with it | {1e3 * m['composed_seconds']:.0f} | {m['overhead']:+.1%} |",
            f"| train.py, one process | {ms['one process']:.0f} | |",
            *(f"| train.py, {name}, twice the batch | {ms[name]:.0f} | {share:.0%} of twice the speed |"
              for name, share in m["efficiency"].items()), "",
            f"{m['cpu']}, a thread a process; medians of {m['steps']} steps in turn, and of {len(m['seconds']['dp2'])} "
            f"rounds of runs, of each the fastest tenth of its steps: others were at work on the machine (its load "
            f"before: {m['load_before']:.1f})."])
    for place in ("memory", "scaling"):
        out.setdefault(place, f"(Not measured yet: `python bench.py {place}`.)")
    if s:
        rows = lambda s: "\n".join([
            "| drafts | of them accepted | tokens per forward pass | time of the drafts / of a plain step | tokens/s | "
            "the same text |", "|---|---|---|---|---|---|",
            f"| 0 | | 1 | | {s['plain_tokens_per_s']:,.0f} | |",
            *(f"| {m['drafts']} | {m['acceptance']:.0%} | {m['tokens_per_forward']:.2f} | "
              f"{m['draft_over_plain']:.2f} | {m['tokens_per_s']:,.0f} ({m['speedup']:.2f}x) | "
              f"{m['identical']} of {s['prompts']} |"
              for m in s["modes"])])
        out["speculation"] = rows(s)
        if on_gpu := load("speculation_gpu"):
            of = on_gpu["config"]
            out["speculation"] += (f"\n\nThe same on an {on_gpu['gpu']}, {of['n_layers']} layers of {of['dim']} dims, "
                                   f"trained for {of['steps']} steps:\n\n{rows(on_gpu)}")
    return out


def fill(text):
    """The README with each marked place filled from the results."""
    for name, table in tables().items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = text.split(start)
        text = head + start + "\n" + table + "\n" + end + rest.split(end)[1]
    return text


def draw_loads(pyplot):
    """results/loads.png: both pictures, as shares of the mean load; blue is idle, red is busy."""
    r = load("loads")
    layers, steps = len(r["layers"]), torch.tensor(r["shares"])                               # [steps, layers, E]
    colours = dict(cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    figure, axes = pyplot.subplots(2, layers, figsize=(9, 4.2), squeeze=False, height_ratios=(3, 2),
                                   layout="constrained")
    for i, (above, below) in enumerate(axes.T):
        image = above.imshow(steps[:, i].T, extent=(r["steps"][0], r["steps"][-1], steps.shape[2] - 0.5, -0.5),
                             **colours)
        above.set(title=r["layers"][i], xlabel="step", yticks=range(steps.shape[2]))
        below.imshow([loads[i] for loads in r["kinds"].values()], **colours)
        below.set(xlabel="expert", xticks=range(steps.shape[2]), yticks=range(len(r["kinds"])),
                  yticklabels=list(r["kinds"]) if i == 0 else [])
    axes[0, 0].set_ylabel("expert")
    figure.colorbar(image, ax=axes, label="load / mean load")
    figure.savefig(RESULTS / "loads.png", dpi=110)


def draw_pairs(pyplot, timeline, title, name):
    """results/NAME: when there was arithmetic, and when an exchange."""
    figure, axes = pyplot.subplots(figsize=(8, 1.6))
    for row, (what, color) in enumerate((("kernels", "tab:blue"), ("copies", "tab:orange"))):
        axes.broken_barh([(start, end - start) for start, end in timeline[what]], (0.6 - row, 0.8), color=color)
    axes.set(yticks=[1, 0], yticklabels=["arithmetic", "exchanges"], xlabel="ms", title=title)
    figure.tight_layout()
    figure.savefig(RESULTS / name, dpi=110)


def readme(options):
    path = HERE / "README.md"
    write_atomic(path, fill(path.read_text(encoding="utf-8")))
    print("README.md: filled from results/")
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figure needs matplotlib: pip install -r requirements-extra.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    t = load("tiny")
    if not t:
        raise UserError("no results/tiny.json: python bench.py tiny makes it")
    step, loss, mtp, vio = zip(*t["curve"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    left.plot(step, loss, label="next token", linewidth=1)
    left.plot(step, mtp, label="the token after (MTP)", linewidth=1)
    left.set(xlabel="step", ylabel="nats per token", title="python train.py config/tiny.py: loss")
    left.legend()
    right.plot(step, vio, linewidth=1, color="tab:green")
    right.set(xlabel="step", ylabel="busiest expert / mean - 1", title="load, balanced by the gate bias",
              ylim=(0, None))
    figure.tight_layout()
    figure.savefig(RESULTS / "tiny.png", dpi=110)

    sizes = cache_per_token(configs.load(["configs/v3_671b.py"]))
    figure, axes = pyplot.subplots(figsize=(6, 1.8))
    bars = axes.barh(list(sizes), [size / 1e3 for size in sizes.values()])
    axes.bar_label(bars, [f"{size / 1e3:,.0f} KB" for size in sizes.values()], padding=4)
    axes.set(title="cache per token, DeepSeek-V3's shape", xscale="log", xlim=(10, 20_000))
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(RESULTS / "cache.png", dpi=110)
    call(["dualpipe.py", f"--png={RESULTS / 'dualpipe.png'}"], HERE)

    if "timeline" in (o := load("overlap") or {}):
        draw_pairs(pyplot, o["timeline"], "a forward and a backward chunk in turns", "overlap.png")
    if "timeline" in (o := (load("cluster") or {}).get("overlap", {})):
        draw_pairs(pyplot, o["timeline"], f"pairs of chunks on several GPUs, {o['timeline']['precision'].upper()}",
                   "cluster.png")

    figure, axes = pyplot.subplots(figsize=(6, 3))
    errors = load("fp8_error")["errors"]
    for numbers, style in zip(dict.fromkeys(r["numbers"] for r in errors), ("-", "--")):
        rows = [r for r in errors if r["numbers"] == numbers]
        for key, color in (("not_promoted", "tab:red"), ("promoted", "tab:blue")):
            axes.plot([r["K"] for r in rows], [r[key] for r in rows], style, color=color,
                      label=f"{key.replace('_', ' ')}, {numbers}")
    axes.set(yscale="log", xlabel="length of the product (K)", ylabel="relative error",
             title="FP8 products summed in 14 bits")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "fp8_error.png", dpi=110)
    if load("loads"):
        draw_loads(pyplot)

    if quality := load("fp8_quality"):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
        curves = {r["name"]: r["curve"] for r in quality["runs"]}
        for name, curve in curves.items():
            left.plot(curve, label=name, linewidth=0.7)
        left.set(xlabel="step", ylabel="nats per token", title="config/gpu.py: training loss")
        left.legend()
        smooth = {name: [statistics.mean(c[i - 50:i]) for i in range(50, len(c) + 1)] for name, c in curves.items()}
        for name in smooth:
            if other := smooth.get(counterpart(name)):
                right.plot(range(50, 50 + len(other)), [100 * (b / a - 1) for a, b in zip(other, smooth[name])],
                           label=name, linewidth=0.8)
        right.axhspan(-0.25, 0.25, color="0.9")
        right.set(xlabel="step", ylabel="% above, mean of 50 steps", title="from BF16 of the same seed; BF16's seeds")
        right.legend()
        figure.tight_layout()
        figure.savefig(RESULTS / "fp8_quality.png", dpi=110)
