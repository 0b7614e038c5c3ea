"""training 124M at 1, 2, 4 ... threads beside the plain loop, tokens/s; 3 minutes a count"""

import os

from bench.plain import updates
from bench.train import cpu_work, ours
from bench.turns import Side, compare


def run(cfg, folder):
    """Powers of two up to the cores of the machine; a GPU is hidden."""
    comparisons = {}
    for count in [2**i for i in range(os.cpu_count().bit_length())]:
        env = {"OMP_NUM_THREADS": str(count), "CUDA_VISIBLE_DEVICES": ""}
        comparisons[f"train 124M, 2 x 256, {count} thread(s) (tokens/s)"] = [
            Side("train.py", ours, cpu_work(cfg), env=env),
            Side("transformers, plain fp32 loop", updates, cpu_work(cfg), env=env)]
    return compare(cfg, comparisons, rounds=3)
