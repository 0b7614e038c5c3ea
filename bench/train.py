"""training GPT-2 124M beside transformers' model in the plainest loop, tokens/s; 3 minutes"""

import numpy as np
import torch

import train
from bench.plain import DEVICE, updates
from bench.turns import BF16, SHAPE, Side, compare
from model import GPT, GPTConfig
from runtime import make_accelerator

CPU_WORK = (SHAPE, 2, 1, 256, 0.1)  # the arguments of both sides: 2 x 256 tokens, dropout 0.1


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
        accelerator.unwrap_model(model).compile()
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


def run(cfg, folder):
    """On a GPU 480 x 1,024 tokens, with as many sequences at once as nanoGPT has, and more."""
    matrices = 6 * 124e6  # FLOPs of a token; attention comes on top
    if DEVICE == "cpu":
        return compare(cfg, {"train 124M, 2 x 256, dropout 0.1 (tokens/s)": [
            Side("train.py", ours, CPU_WORK, BF16, matrices + 12 * 12 * 768 * 256, ours=True),
            Side("transformers, plain fp32 loop", updates, CPU_WORK)]})
    many = (SHAPE, 32, 15, 1024, 0.0)
    few = (SHAPE, 12, 40, 1024, 0.0)
    return compare(cfg, {"train 124M, 480 x 1,024, compiled (tokens/s)": [
        Side("train.py, 32 at once", ours, many, BF16, matrices + 12 * 12 * 768 * 1024),
        Side("nanoGPT's settings, 12 at once", updates, few),
        Side("nanoGPT's settings, 32 at once", updates, many)]})
