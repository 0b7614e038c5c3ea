"""training 124M at 1, 2, 4 ... threads beside the plain loop, tokens/s; 3 minutes a count"""

import os

import torch

from bench import plain, train
from bench.turns import Side, compare


def on_threads(count, function):
    """The turns of another side on so many threads of the CPU; a GPU is hidden."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(count)
    yield from function(*train.CPU_WORK)


def run(cfg, folder):
    """Powers of two up to the cores of the machine."""
    counts = [2**i for i in range(os.cpu_count().bit_length())]
    return compare(cfg, {f"train 124M, 2 x 256, {count} thread(s) (tokens/s)": [
        Side("train.py", on_threads, (count, train.ours), ours=True),
        Side("transformers, plain fp32 loop", on_threads, (count, plain.updates))]
        for count in counts}, rounds=3)
