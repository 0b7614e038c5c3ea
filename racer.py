"""A model with value embeddings, which racers of small models found and no export format carries.

python racer.py                        # every option and recipe of train.py; writes out/racer

In every layer each token adds an embedding of its own to its values, weighed by a gate per head
(Zhou et al. 2024, arXiv 2410.17897; gated as in nanochat). sample.py, report.py and convert.py
refuse such a run: samples.md has texts, and in a notebook `sample.GPT = racer.Racer` before
sample.load_run("out/racer") loads the model. The file is also an example of a fork: a subclass of
model.GPT, handed to train.py in one line.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn

import train
from configurator import load
from model import GPT
from runtime import run_script

SCALE = 50  # AdamW moves every weight by its rate: a factor here is a rate as many times as large


@dataclass
class Config(train.Config):
    """Train a GPT with value embeddings."""

    out_dir: str | None = "out/racer"  # where to write


class Racer(GPT):
    def __init__(self, config):
        super().__init__(config)
        width = config.n_kv_head * config.head_dim
        gate_width = min(32, config.n_embd)
        # "w" first: train.py gives these the rate of embeddings
        self.transformer["wve"] = nn.ModuleList()
        self.gates = nn.ModuleList()
        for i, block in enumerate(self.transformer.h):
            self.transformer["wve"].append(nn.Embedding(config.vocab_size, width))
            nn.init.normal_(self.transformer["wve"][i].weight, std=0.06 / SCALE)
            self.gates.append(nn.Linear(gate_width, config.n_kv_head, bias=False))
            nn.init.zeros_(self.gates[i].weight)
            block.attn.c_attn.register_forward_hook(functools.partial(self.add_values, i))

    def hidden(self, idx, cache=None):
        self.idx = idx  # for the hooks
        return super().hidden(idx, cache)

    def add_values(self, i, c_attn, inputs, qkv):
        """Called after c_attn of layer i with its input x (B, T, C) and output, queries, keys and
        values (B, T, (nh + 2 nkv) hs). Returns these with the embeddings added to the values."""
        gate = self.gates[i]
        gate = 2 * torch.sigmoid(gate(inputs[0][..., : gate.in_features]))  # (B, T, nkv)
        values = SCALE * self.transformer["wve"][i](self.idx)  # (B, T, nkv hs)
        values = (values.unflatten(-1, (gate.size(-1), -1)) * gate[..., None]).flatten(-2)
        qk, v = qkv.split((qkv.size(-1) - values.size(-1), values.size(-1)), dim=-1)
        return torch.cat((qk, v + values.to(v.dtype)), dim=-1)


if __name__ == "__main__":
    train.GPT = Racer
    run_script(train.main, load(Config))
