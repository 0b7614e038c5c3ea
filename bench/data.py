"""reading batches beside training on them, tokens/s; 1 minute"""

import numpy as np
import torch

import train
from bench.train import cpu_work, ours
from bench.turns import Side, compare


def reading(file, rows, T):
    """Tokens of 100 batches that train.py reads from a file, far into a run, as after a resume."""
    tokens = np.load(file, mmap_mode="r")
    n = train.count_windows(tokens, T)
    start = 10_000_000
    while True:
        start += 100
        for iteration in range(start, start + 100):
            windows = train.windows_of(iteration, rows, n, 1337)
            train.read_windows(tokens, windows, T, 2**16, torch.device("cpu"))
        yield 100 * rows * T


def run(cfg, folder):
    """From a file of 100 million tokens."""
    work = cpu_work(cfg)
    file = str(folder / "train.npy")
    np.save(file, np.arange(10**5 if cfg.tiny else 10**8).astype(np.uint16))
    return compare(cfg, {"reading against training (tokens/s)": [
        Side("reading", reading, (file, work[1], work[3])), Side("train.py", ours, work)]})
