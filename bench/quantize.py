"""what bf16, int8 and int4 weights cost a trained run (--run) in quality; 3 minutes"""

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import fast
import prepare
import sample
import train
from bench.turns import print_header, print_row

WIDTHS = (8, 16, 22, 17)


@torch.no_grad()
def run(cfg, folder):
    """Perplexity on the run's validation split, and how often the likeliest next token is that of
    the fp32 weights: given the text, and in 8 greedy continuations of 100 tokens."""
    checkpoint = sample.pick_checkpoint(cfg.run)
    model, _, saved = sample.load_checkpoint(checkpoint)
    tokens = prepare.open_split(f"{saved['train']['data_dir']}/{saved['train']['dataset']}", "val")
    T = min(model.config.block_size, saved["train"]["block_size"])
    n = train.count_windows(tokens, T)
    windows = np.unique(np.linspace(0, n - 1, 4 if cfg.tiny else 100).astype(int))
    starts = np.linspace(0, len(tokens) - 9, 8).astype(int)
    results = []
    print_header(("weights", "val perplexity", "same likeliest token", "same greedy text"), WIDTHS)
    for kind in ("fp32", "bf16", "int8", "int4"):
        if kind != "fp32":
            model = fast.quantize(sample.load_checkpoint(checkpoint)[0], kind)
        loss = 0.0
        likeliest = []
        for window in windows:
            idx, targets = train.read_windows(tokens, np.array([window]), T, 2**32,
                                              torch.device("cpu"))
            logits = model(idx)[0][0].float()  # (T, V)
            loss += cross_entropy(logits, targets[0]).item() / len(windows)
            likeliest.append(logits.argmax(-1))
        prompts = [torch.from_numpy(tokens[i : i + 8].astype(np.int64))[None] for i in starts]
        texts = [sample.generate(model, idx, 100, temperature=0)[0, 8:] for idx in prompts]
        chosen = torch.cat(likeliest), torch.cat(texts)
        if kind == "fp32":
            first = chosen
        same = [(a == b).float().mean().item() for a, b in zip(chosen, first, strict=True)]
        print_row((kind, f"{math.exp(loss):.3f}", *(f"{share:.2%}" for share in same)), WIDTHS)
        results.append({"weights": kind, "perplexity": math.exp(loss), "same": same})
    return results
