"""speed and memory of train.py against size, drawn in docs/scale.png; 10 minutes"""

import os
import re

from matplotlib.figure import Figure

from bench.turns import ROOT, prepare_data, print_header, print_row, run_python

WIDTHS = (12, 12, 26, 10, 6)
BASE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 8, "block_size": 256}
SHAPES = [(4, 4, 128), (6, 6, 384), (8, 8, 512), (12, 12, 768), (24, 16, 1024)]
SWEEPS = {
    "parameters": [dict(zip(("n_layer", "n_head", "n_embd"), s, strict=True)) for s in SHAPES],
    "block_size": [{"block_size": 2048 // b, "batch_size": b} for b in (16, 8, 4, 2, 1)],
    "batch_size": [{"batch_size": b} for b in (1, 2, 4, 8, 16, 32)],
    "processes": [{"processes": 1}, {"processes": 2, "batch_size": 4}],
}
TICKS = {"tokens/s": (300, 1000, 3000, 10_000, 30_000), "GB a process": (0.5, 1, 2, 4, 8)}


def measure(folder, processes, work):
    """(millions of parameters, tokens/s of iterations 4 to 6, peak GB of a process) of train.py."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] * (processes > 1)
    options = [f"--{name}={value}" for name, value in work.items()]
    said, memory = run_python(
        [*launch, "train.py", "--dataset=scale", f"--data_dir={folder}", "--out_dir=OUT", *options,
         "--max_iters=6", "--log_interval=3", "--eval_iters=1", "--sample_tokens=0",
         "--optimizer=adamw"], folder, OMP_NUM_THREADS=str(max(1, os.cpu_count() // processes)))
    millions = float(re.search(r"([\d.]+)M parameters", said)[1])
    speed = re.search(r"iteration 6/.* ([\d,]+) tokens/s", said)[1]
    return millions, float(speed.replace(",", "")), memory


def run(cfg, folder):
    """Four sweeps, one quantity each; a table and the picture."""
    prepare_data("scale", cfg.text or "stdlib", "bpe", folder, 4096)
    print_header(("against", "parameters", "batch x block x processes", "tokens/s", "GB"), WIDTHS)
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, len(SWEEPS), sharex="col", sharey="row")
    results = []
    for column, (name, changes) in zip(axes.T, SWEEPS.items(), strict=True):
        points = []
        for change in changes[:2] if cfg.tiny else changes:
            work = BASE | change
            processes = work.pop("processes", 1)
            millions, speed, memory = measure(folder, processes, work)
            size = {"parameters": millions, "processes": processes}.get(name) or work[name]
            points.append((size, speed, memory))
            shape = f"{work['batch_size']} x {work['block_size']} x {processes}"
            print_row((name, f"{millions:.0f}M", shape, f"{speed:,.0f}", f"{memory:.2f}"), WIDTHS)
        results.append({"against": name, "points": points})
        sizes, *both = zip(*points, strict=True)
        for cell, values, (label, ticks) in zip(column, both, TICKS.items(), strict=True):
            cell.plot(sizes, values, marker="o")
            cell.set(xscale="log", yscale="log", ylabel=label if name == "parameters" else "")
            cell.set_xticks(sizes, [f"{x:.0f}" for x in sizes])
            cell.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            cell.minorticks_off()
            cell.grid(alpha=0.3)
        column[1].set_xlabel("millions of parameters" if name == "parameters" else name)
    figure.suptitle("train.py: width 384, 2,048 tokens an update, but for what is varied")
    figure.savefig(folder / "scale.png" if cfg.tiny else ROOT / "docs/scale.png", dpi=110)
    return results
