"""The peers' training: transformers' GPT-2 in the plainest loops, in fp32."""

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from bench.turns import device_type


def make_model(shape, T, dropout, tied=True):
    """transformers' GPT-2 of that shape, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

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
    device = device_type()
    gpu = device == "cuda"
    vocab_size = shape["vocab_size"]
    padded = -(-vocab_size // 64) * 64 if gpu else vocab_size
    model = make_model(shape | {"vocab_size": padded}, T, dropout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=gpu or None)
    if gpu:
        model.compile()
    # as frequent as in a text, as in train.py
    data = (vocab_size ** torch.rand(micro_batches, rows, T + 1)).long().to(device) - 1
    while True:
        for _ in range(count):
            for batch in data:
                with torch.autocast(device, torch.bfloat16, enabled=gpu):
                    loss = loss_of(model, batch)
                (loss / micro_batches).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        yield count * data.size(0) * rows * T


def whole_run(folder, seed, shape, T, rows, stride, iterations, interval, eval_batches, rates,
              clip=math.inf, dropout=0.0, tied=True):
    """A run from the tokens in `folder` to its final losses, printed. Windows start at multiples of
    `stride`; every `interval` iterations `eval_batches` of both splits; at each epoch's start 50
    tokens without a cache. rates: (peak, last, iterations of warm-up) of the cosine."""
    data = {s: np.load(f"{folder}/{s}.npy").astype(np.int64) for s in ("train", "val")}
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = make_model(shape | {"vocab_size": int(data["train"].max()) + 1}, T, dropout, tied)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    starts = {split: np.arange(0, len(x) - T, stride) for split, x in data.items()}
    order = []

    def loss_at(split, some):
        windows = np.stack([data[split][i : i + T + 1] for i in some])
        return loss_of(model, torch.from_numpy(windows))

    @torch.no_grad()
    def evaluate(split, windows):
        parts = [windows[i : i + rows] for i in range(0, len(windows), rows)]
        model.eval()
        loss = sum(loss_at(split, part).item() * len(part) for part in parts) / len(windows)
        model.train()
        return loss

    for it in range(iterations):
        if len(order) < rows:
            order = random.permutation(starts["train"])
            model.generate(torch.from_numpy(data["val"][None, :4]), max_new_tokens=50,
                           do_sample=False, use_cache=False, pad_token_id=0)
        if it % interval == 0:
            for split in data:
                evaluate(split, random.permutation(starts[split])[: rows * eval_batches])
        peak, last, warmup = rates
        falling = 0.5 + 0.5 * math.cos(math.pi * (it - warmup) / (iterations - warmup))
        lr = peak * it / warmup if it < warmup else last + (peak - last) * falling
        optimizer.param_groups[0]["lr"] = lr
        batch, order = np.split(order, [rows])
        optimizer.zero_grad()
        loss_at("train", batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    n = (len(data["val"]) - 1) // T  # all windows of val, as many of train
    for split in data:
        print(f"{split} loss {evaluate(split, np.arange(n) * T):.3f}")
