"""The peers' training: transformers' GPT-2 in the plainest loop, in fp32."""

import math

import torch
from torch.nn.functional import cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the sides' models run


def make_model(shape, T, dropout):
    """transformers' GPT-2 of that shape, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow

    options = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    options |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    return GPT2LMHeadModel(GPT2Config(n_positions=T, use_cache=False, **shape, **options)).train()


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
