"""training GPT-2 124M beside transformers' model in the plainest loop, tokens/s; 3 minutes"""

import numpy as np
import torch

import train
from bench.plain import updates
from bench.turns import BF16, Side, compare, device_type, shape
from model import GPT, GPTConfig
from runtime import make_accelerator


def ours(shape, rows, micro_batches, T, dropout, count=3):
    """Tokens of `count` of train.py's own updates, `rows` sequences of T a micro-batch."""
    torch.manual_seed(1)
    accelerator = make_accelerator("auto")
    device = accelerator.device
    cfg = train.Config(optimizer="adamw", learning_rate=1e-4, batch_size=rows,
                       gradient_accumulation_steps=micro_batches, block_size=T)
    model = GPT(GPTConfig(**shape, block_size=T, dropout=dropout)).to(device).train()
    optimizers = train.make_optimizers(model, cfg, device)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    if device.type == "cuda":
        train.try_compile(model, cfg, accelerator)
    sequences = rows * micro_batches
    # some tokens as frequent as in a text: the gradients of embeddings notice
    tokens = (shape["vocab_size"] ** np.random.rand(4 * sequences * T + 1)).astype(np.int64) - 1
    n = train.count_windows(tokens, T)
    iteration = 0
    while True:
        for _ in range(count):
            windows = train.windows_of(iteration, sequences, n, cfg.seed)
            batches = (train.read_windows(tokens, some, T, shape["vocab_size"], device)
                       for some in windows.reshape(micro_batches, rows))
            train.update(model, optimizers, batches, cfg, accelerator)
            iteration += 1
        yield count * sequences * T


def cpu_work(cfg):
    """The arguments of both sides on a CPU: 2 x 256 tokens, dropout 0.1."""
    return shape(cfg), 2, 1, 32 if cfg.tiny else 256, 0.1


def run(cfg, folder):
    """On a GPU 480 x 1,024 tokens, with as many sequences at once as nanoGPT has, and more."""
    limit = (BF16, 6 * 124e6 + 12 * 12 * 768 * 256)  # FLOPs of a token: matrices, attention
    if device_type() == "cpu":
        work = cpu_work(cfg)
        return compare(cfg, {"train 124M, 2 x 256, dropout 0.1 (tokens/s)": [
            Side("train.py", ours, work, limit),
            Side("transformers, plain fp32 loop", updates, work)]})
    T, sequences = (64, 96) if cfg.tiny else (1024, 480)
    many, few = ((shape(cfg), rows, sequences // rows, T, 0.0) for rows in (32, 12))
    limit = (BF16, 6 * 124e6 + 12 * 12 * 768 * 1024)
    return compare(cfg, {"train 124M, 480 x 1,024, compiled (tokens/s)": [
        Side("train.py, 32 at once", ours, many, limit),
        Side("nanoGPT's settings, 12 at once", updates, few),
        Side("nanoGPT's settings, 32 at once", updates, many)]})
