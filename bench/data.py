"""reading batches beside training on them, tokens/s; 1 minute"""

import itertools

import numpy as np
import torch

from bench.train import CPU_WORK, ours
from bench.turns import Side, compare
from train import count_windows, read_windows, windows_of


def reading(file):
    """Tokens of 100 batches that train.py reads from a file, far into a run, as after a resume."""
    tokens = np.load(file, mmap_mode="r")
    _, rows, _, T, _ = CPU_WORK
    n = count_windows(tokens, T)
    for start in itertools.count(10_000_000, 100):
        for iteration in range(start, start + 100):
            read_windows(tokens, windows_of(iteration, rows, n, 1337), T, 2**16,
                         torch.device("cpu"))
        yield 100 * rows * T


def run(cfg, folder):
    """From a file of 100 million tokens."""
    np.save(folder / "train.npy", np.arange(10**8).astype(np.uint16))
    return compare(cfg, {"reading against training (tokens/s)": [
        Side("reading", reading, (folder / "train.npy",)), Side("train.py", ours, CPU_WORK)]})
