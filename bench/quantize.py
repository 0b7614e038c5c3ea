"""what bf16, int8 and int4 weights cost a trained run (--out_dir) in quality; half a minute"""

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import fast
import prepare
import sample
import train
from bench.turns import print_table


@torch.no_grad()
def run(cfg, folder):
    """Perplexity on the run's validation split, and how often the likeliest next token is that of
    the fp32 weights: given the text, and in 8 greedy continuations of 100 tokens."""
    checkpoint = sample.pick_checkpoint(cfg.out_dir)
    model, _, saved = sample.load_checkpoint(checkpoint)
    tokens = prepare.open_split(f"{saved['train']['data_dir']}/{saved['train']['dataset']}", "val")
    T = min(model.config.block_size, saved["train"]["block_size"])
    n = train.count_windows(tokens, T)
    windows = np.unique(np.linspace(0, n - 1, 100).astype(int))
    prompts = train.read_windows(tokens, windows[:: len(windows) // 8 or 1], T, 2**32,
                                 torch.device("cpu"))[0][:, :8]
    rows = [("weights", "val perplexity", "same likeliest token", "same greedy text")]
    results = []
    for kind in ("fp32", "bf16", "int8", "int4"):
        if kind != "fp32":
            model = fast.quantize(sample.load_checkpoint(checkpoint)[0], kind)
        losses = []
        likeliest = []
        for window in windows[:, None]:
            idx, targets = train.read_windows(tokens, window, T, 2**32, torch.device("cpu"))
            logits = model(idx)[0][0].float()  # (T, V)
            losses.append(cross_entropy(logits, targets[0]).item())
            likeliest.append(logits.argmax(-1))
        texts = [sample.generate(model, idx[None], 100, temperature=0)[0, 8:] for idx in prompts]
        chosen = torch.cat(likeliest), torch.cat(texts)
        if kind == "fp32":
            first = chosen
        same = [(a == b).float().mean().item() for a, b in zip(chosen, first, strict=True)]
        perplexity = math.exp(sum(losses) / len(losses))
        rows.append((kind, f"{perplexity:.3f}", *(f"{share:.2%}" for share in same)))
        results.append({"weights": kind, "perplexity": perplexity, "same": same})
    print_table(rows)
    return results
