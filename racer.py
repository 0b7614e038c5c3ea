"""train.py with value embeddings, as in modded-nanogpt and nanochat: no export format has them.

python racer.py                        # every option but --init_from; writes out/racer

In each layer a token adds an embedding of its own to its values, weighed by a gate per head (Zhou
et al. 2024, arXiv 2410.17897; gated as in nanochat). sample.py, report.py and convert.py refuse
such a run: samples.md has texts, and in a notebook `sample.GPT = racer.Racer` before
sample.load_run("out/racer") loads the model. The file is also an example of a fork: model.GPT with
one layer replaced, handed to train.py in one line.
"""

from dataclasses import dataclass

import configurator

if __name__ == "__main__":
    configurator.tune_threads()  # before torch loads

import torch
from torch import nn

import train
from model import GPT
from runtime import UserError, run_script

SCALE = 50  # AdamW moves a weight by about its rate: a factor acts as that many times the rate
GATE = 32  # features that the gates look at


@dataclass
class Config(train.Config):
    """Train a GPT with value embeddings."""

    out_dir: str | None = "out/racer"  # where to write


class ValueEmbeddings(nn.Module):
    """c_attn of layer i, with the embeddings added to its values."""

    def __init__(self, c_attn, model, i):
        super().__init__()
        self.c_attn = c_attn
        self.model = [model]  # in a list it is no part of this layer
        self.i = i

    def forward(self, x):
        """x (B, T, C) -> queries, keys and values (B, T, (nh + 2 nkv) hs)."""
        model = self.model[0]
        gates = 2 * torch.sigmoid(model.gates[self.i](x[..., :GATE]))  # (B, T, nkv)
        added = SCALE * model.transformer["wve"][self.i](model.idx)  # (B, T, nkv hs)
        added = (added.unflatten(-1, (gates.size(-1), -1)) * gates[..., None]).flatten(-2)
        qkv = self.c_attn(x)
        qk, v = qkv.split((qkv.size(-1) - added.size(-1), added.size(-1)), dim=-1)
        return torch.cat((qk, v + added.to(v.dtype)), dim=-1)


class Racer(GPT):
    def __init__(self, config):
        super().__init__(config)
        width = config.n_kv_head * config.head_dim
        # "w" first: train.py gives these the rate of embeddings
        self.transformer["wve"] = nn.ModuleList()
        self.gates = nn.ModuleList()
        for i, block in enumerate(self.transformer.h):
            self.transformer["wve"].append(nn.Embedding(config.vocab_size, width))
            nn.init.normal_(self.transformer["wve"][i].weight, std=0.06 / SCALE)
            self.gates.append(nn.Linear(min(GATE, config.n_embd), config.n_kv_head, bias=False))
            nn.init.zeros_(self.gates[i].weight)
            block.attn.c_attn = ValueEmbeddings(block.attn.c_attn, self, i)

    def hidden(self, idx, cache=None):
        self.idx = idx  # for the ValueEmbeddings
        return super().hidden(idx, cache)


def main(cfg):
    """train.main with this model."""
    if cfg.init_from != "scratch":
        raise UserError("racer.py cannot start from other weights; leave out --init_from", 2)
    train.GPT = Racer
    try:
        return train.main(cfg, "racer.py")
    finally:
        train.GPT = GPT


if __name__ == "__main__":
    run_script(main, configurator.load(Config))
