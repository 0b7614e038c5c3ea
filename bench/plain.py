"""The peers' training: transformers' GPT-2 in the plainest loops, in fp32."""

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from bench.scripts import command, prepare_data
from bench.turns import Side, compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the sides' models run


def make_model(shape, T, dropout, tied=True):
    """transformers' GPT-2 of that shape, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow

    options = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    options |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    return GPT2LMHeadModel(GPT2Config(n_positions=T, use_cache=False, tie_word_embeddings=tied,
                                      **shape, **options)).train()


def loss_of(model, rows):
    """The mean loss of rows (B, T + 1)."""
    logits = model(rows[:, :-1]).logits  # (B, T, V)
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def updates(shape, rows, micro_batches, T, dropout, count=3):
    """Tokens of `count` updates. On a GPU with nanoGPT's settings instead: compiled, bf16, fused
    AdamW, the vocabulary padded to a multiple of 64."""
    torch.manual_seed(1)
    gpu = DEVICE == "cuda"
    padded = math.ceil(shape["vocab_size"] / 64) * 64 if gpu else shape["vocab_size"]
    model = make_model(shape | {"vocab_size": padded}, T, dropout).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=gpu or None)
    if gpu:
        model.compile()
    # as frequent as in a text, as in train.py
    data = (shape["vocab_size"] ** torch.rand(micro_batches, rows, T + 1)).long().to(DEVICE) - 1
    while True:
        for _ in range(count):
            for batch in data:
                with torch.autocast(DEVICE, torch.bfloat16, enabled=gpu):
                    loss = loss_of(model, batch)
                (loss / micro_batches).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        yield count * micro_batches * rows * T


@torch.no_grad()
def evaluate(model, windows, rows):
    """The mean loss over windows (N, T + 1), `rows` of them at once."""
    model.eval()
    losses = [loss_of(model, batch).item() * len(batch) for batch in windows.split(rows)]
    model.train()
    return sum(losses) / len(windows)


def whole_run(folder, seed, shape, T, rows, stride, iterations, interval, eval_batches, peak,
              last, warmup, clip=math.inf, dropout=0.0, tied=True):
    """A run from the tokens in `folder` to its final losses, printed. Windows start at multiples of
    `stride`; every `interval` iterations `eval_batches` of both splits; at each epoch's start 50
    tokens without a cache; the learning rate rises to `peak`, then falls to `last`, a cosine."""
    torch.manual_seed(seed)
    windows = {}  # of each split: (N, T + 1), a view
    for split in ("train", "val"):
        tokens = torch.from_numpy(np.load(f"{folder}/{split}.npy").astype(np.int64))
        windows[split] = tokens.unfold(0, T + 1, stride)
    model = make_model(shape, T, dropout, tied)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    order = []
    for it in range(iterations):
        if len(order) < rows:
            order = torch.randperm(len(windows["train"]))
            model.generate(windows["val"][:1, :4], max_new_tokens=50, do_sample=False,
                           use_cache=False, pad_token_id=0)
        if it % interval == 0:
            for some in windows.values():
                chosen = torch.randint(len(some), (rows * eval_batches,))
                evaluate(model, some[chosen], rows)
        falling = 0.5 + 0.5 * math.cos(math.pi * (it - warmup) / (iterations - warmup))
        lr = peak * it / warmup if it < warmup else last + (peak - last) * falling
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss_of(model, windows["train"][order[:rows]]).backward()
        order = order[rows:]
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    apart = {split: some[:: T // stride] for split, some in windows.items()}  # without overlap
    for split, some in apart.items():
        print(f"{split} loss {evaluate(model, some[: len(apart['val'])], rows):.3f}")


def compare_recipes(cfg, folder, recipe, text, tokenizer, rounds, shape, **loop):
    """train.py config/RECIPE.py beside whole_run(shape, **loop), both as commands."""
    shape["vocab_size"] = prepare_data(recipe, text, tokenizer, folder)
    ours = ["train.py", f"config/{recipe}.py", f"--data_dir={folder}", "--out_dir=OUT",
            "--seed=SEED"]
    call = f"whole_run('{folder}/{recipe}', SEED, {shape}, **{loop})"
    plain = ["-c", f"from bench.plain import whole_run; {call}"]
    return compare(cfg, {f"config/{recipe}.py, whole command (runs/h)": [
        Side("train.py", command, (ours, folder)),
        Side("the plain loop, transformers", command, (plain, folder))]}, rounds)
