"""the character recipe, whole command, beside nanoGPT's loop, runs an hour; 8 minutes"""

import math

import numpy as np
import torch

from bench.plain import loss_of, make_model
from bench.scripts import command, prepare_data, read_text
from bench.turns import Side, compare

T = 64  # tokens of context; this and the next three are of nanoGPT's recipe for a CPU
ROWS = 12  # sequences an update
ITERATIONS = 2000
WARMUP = 100


@torch.no_grad()
def evaluate(model, windows):
    """The mean loss over windows (N, T + 1)."""
    model.eval()
    losses = [loss_of(model, batch).item() * len(batch) for batch in windows.split(ROWS)]
    model.train()
    return sum(losses) / len(windows)


def whole_run(folder, seed, shape):
    """A run from the tokens in `folder` to its final losses, printed. Every 250 iterations it
    evaluates 20 batches of both splits; the learning rate falls from 1e-3 to 1e-4, a cosine."""
    torch.manual_seed(seed)
    windows = {}  # of each split: (N, T + 1), a view, one for each character
    for split in ("train", "val"):
        tokens = torch.from_numpy(np.load(f"{folder}/{split}.npy").astype(np.int64))
        windows[split] = tokens.unfold(0, T + 1, 1)
    model = make_model(shape, T, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    for it in range(ITERATIONS):
        if it % 250 == 0:
            for some in windows.values():
                evaluate(model, some[torch.randint(len(some), (20 * ROWS,))])
        falling = 0.5 + 0.5 * math.cos(math.pi * (it - WARMUP) / (ITERATIONS - WARMUP))
        lr = 1e-3 * it / WARMUP if it < WARMUP else 1e-4 + 9e-4 * falling
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        chosen = torch.randint(len(windows["train"]), (ROWS,))
        loss_of(model, windows["train"][chosen]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    apart = {split: some[::T] for split, some in windows.items()}  # without overlap
    for split, some in apart.items():
        print(f"{split} loss {evaluate(model, some[: len(apart['val'])]):.3f}")


def run(cfg, folder):
    """nanoGPT's recipe for a CPU, with transformers' GPT-2, on as many characters as it has."""
    file = folder / "text.txt"
    file.write_text(read_text(cfg.text)[:1_100_000], encoding="utf-8")
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128,
             "vocab_size": prepare_data("char", file, "char", folder)}
    ours = ["train.py", "config/char.py", f"--data_dir={folder}", "--out_dir=OUT", "--seed=SEED"]
    call = f"from bench.char import whole_run; whole_run('{folder}/char', SEED, {shape})"
    return compare(cfg, {"config/char.py, whole command (runs/h)": [
        Side("train.py", command, (ours, folder)),
        Side("the plain loop, transformers", command, (["-c", call], folder))]}, rounds=3)
