"""speed and memory of train.py against size, drawn in docs/scale.png; 10 minutes"""

from matplotlib.figure import Figure

from bench.scripts import ROOT, command, prepare_data
from bench.turns import Side, compare

BASE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 8, "block_size": 256}
SHAPES = [(4, 4, 128), (6, 6, 384), (8, 8, 512), (12, 12, 768), (24, 16, 1024)]
SWEEPS = {
    "M parameters": [dict(zip(BASE, shape, strict=False)) for shape in SHAPES],
    "block_size": [{"block_size": 2048 // b, "batch_size": b} for b in (16, 8, 4, 2, 1)],
    "batch_size": [{"batch_size": b} for b in (1, 2, 4, 8, 16, 32)],
    "processes": [{"processes": 1}, {"processes": 2, "batch_size": 4}],
}
TICKS = {"tokens/s": (300, 1000, 3000, 10_000, 30_000), "GB": (0.5, 1, 2, 4, 8)}
OPTIONS = """--dataset=scale --out_dir=OUT --max_iters=6 --log_interval=3 --eval_iters=1
    --sample_tokens=0 --optimizer=adamw"""


def side_of(change, folder):
    """train.py with one of SWEEPS' changes; its last tokens/s are those of iterations 4 to 6."""
    work = BASE | change
    processes = work.pop("processes", 1)
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] * (processes > 1)
    words = [*launch, "train.py", f"--data_dir={folder}", *OPTIONS.split(),
             *(f"--{name}={value}" for name, value in work.items())]
    return Side(" ".join(f"{name}={value}" for name, value in change.items()), command,
                (words, folder))


def run(cfg, folder):
    """Four sweeps, one quantity each: tables, and the picture."""
    prepare_data("scale", cfg.text or "stdlib", "bpe", folder, 4096)
    sweeps = {name: [side_of(change, folder) for change in changes]
              for name, changes in SWEEPS.items()}
    results = compare(cfg, sweeps, rounds=1)
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, len(SWEEPS), sharex="col", sharey="row")
    for column, (name, changes) in zip(axes.T, SWEEPS.items(), strict=True):
        points = [row["figures"] for row in results["table"] if row["work"] == name]
        sizes = [change.get(name) or figures[name][0]
                 for change, figures in zip(changes, points, strict=True)]
        for cell, (quantity, ticks) in zip(column, TICKS.items(), strict=True):
            cell.loglog(sizes, [figures[quantity][0] for figures in points], marker="o")
            cell.set(xlabel=name, ylabel=quantity)
            cell.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
            cell.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            cell.minorticks_off()
    figure.suptitle("train.py: width 384, 2,048 tokens an update, but for what is varied")
    figure.savefig(ROOT / "docs/scale.png", dpi=110)
    return results
