"""The GPT: configuration, blocks, loss, KV cache, sampling, beams, GPT-2 weights in and out.

    python model.py export out/verdict FOLDER    # a run -> a transformers folder

GPT-2 (Radford et al. 2019) with its parameter names; `qkv_bias`, `tie_weights` and `init` also give
the model of "Build a Large Language Model (From Scratch)" (Raschka 2024, chapter 4).
Shapes: B batch, T time (at most block_size), C n_embd, V vocab_size, nh heads of hs = C / nh each.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import fail


@dataclass
class GPTConfig:
    """The architecture. The defaults are GPT-2 124M."""

    block_size: int = 1024  # positions: the longest context
    vocab_size: int = 50257  # token ids 0 .. vocab_size - 1
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads, a divisor of n_embd
    n_embd: int = 768  # width
    dropout: float = 0.0  # on embeddings, attention weights and both residual branches
    bias: bool = True  # in LayerNorm and every Linear but c_attn and lm_head
    qkv_bias: bool = True  # in c_attn
    tie_weights: bool = True  # lm_head shares wte
    init: Literal["gpt2", "torch"] = "gpt2"  # normal 0.02 with scaled residuals, or PyTorch's own


def dropout(x, p, training):
    """F.dropout; on a CPU four 16-bit random numbers are cut out of one of 64 bits, which takes a
    quarter of the time and rounds p to a multiple of 1/65536."""
    if not training or p == 0 or x.device.type != "cpu":
        return F.dropout(x, p, training)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 65536) - 32768
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.p = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, position=0):
        """x (B, T, C) at positions position .. position + T - 1 -> (B, T, C).

        cache (2, B, nh, block_size, hs) holds the keys and values before `position`; this call
        adds its own.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh, T, hs)
        mask = None
        if cache is not None:
            cache[0, :, :, position : position + T] = k
            cache[1, :, :, position : position + T] = v
            k, v = cache[:, :, :, : position + T]  # (B, nh, position + T, hs)
            if position and T > 1:
                mask = torch.ones(T, position + T, dtype=torch.bool, device=x.device).tril(position)
        p = self.p if self.training else 0.0
        if p and x.device.type == "cpu":  # no fused kernel there knows dropout
            past = torch.ones(T, T, dtype=torch.bool).tril()
            scores = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).masked_fill(
                ~past, -torch.inf
            )
            y = dropout(scores.softmax(-1, dtype=q.dtype), p, True) @ v  # (B, nh, T, hs)
        else:
            causal = position == 0 and T > 1
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, T, C)
        return dropout(self.c_proj(y), self.p, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.p = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C); GPT-2 has the tanh form
        return dropout(self.c_proj(x), self.p, self.training)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, position=0):
        x = x + self.attn(self.ln_1(x), cache, position)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """The keys and values of `filled` positions: kv (n_layer, 2, B, nh, block_size, hs)."""

    def __init__(self, model, batch_size):
        c, wte = model.config, model.transformer.wte.weight
        shape = (c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.kv, self.filled = torch.zeros(shape, dtype=wte.dtype, device=wte.device), 0


class GPT(nn.Module):
    def __init__(self, config):
        """Exits with code 2 where `config` describes no model."""
        super().__init__()
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(config, name) < 1:
                fail(f"--{name} must be 1 or more, not {getattr(config, name)}", 2)
        if config.n_embd % config.n_head:
            fail(f"--n_embd {config.n_embd} is no multiple of --n_head {config.n_head}", 2)
        if not 0 <= config.dropout < 1:
            fail(f"--dropout {config.dropout} must be at least 0 and below 1", 2)
        if config.init not in ("gpt2", "torch"):
            fail(f"--init {config.init!r} must be gpt2 or torch", 2)
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if config.init == "gpt2":
            for name, p in self.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(p)
                elif p.dim() == 2:  # residual projections start smaller: GPT-2 report, section 2.3
                    residual = name.endswith("c_proj.weight")
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer if residual else 1))

    def count_parameters(self):
        """The number of weights, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, idx, cache=None):
        """idx (B, T) -> (B, T, C) after the last LayerNorm. With a KVCache, idx goes on from it."""
        position = 0 if cache is None else cache.filled
        steps = torch.arange(position, position + idx.size(1), device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(steps)
        x = dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache.kv[i], position)
        if cache is not None:
            cache.filled += idx.size(1)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, return_logits=True):
        """Next-token logits and, where targets are given, their mean cross-entropy in nats.

        idx, targets (B, T) of token ids, T at most block_size; a target of -100 does not count.
        Returns (logits (B, T, V), loss or None); (None, loss) with return_logits=False, which
        spares the memory of the logits.
        """
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens exceed block_size {self.config.block_size}")
        x = self.hidden(idx)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return (logits if return_logits else None), loss

    # -----------------------------------------------------------------------------------------
    # generation

    @torch.no_grad()
    def next_logits(self, idx, cache=None):
        """Logits (B, V) after the last token of idx (B, T), window slid to block_size.

        With a KVCache only what it does not hold yet is computed, until the window is full:
        positions are absolute, so from then on a slide changes every token of the window.
        """
        if cache is None or idx.size(1) > self.config.block_size:
            x = self.hidden(idx[:, -self.config.block_size :])
        else:
            x = self.hidden(idx[:, cache.filled :], cache)
        return self.lm_head(x[:, -1])

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None,
               generator=None, kv_cache=True):  # fmt: skip
        """Yield the next tokens (B, 1) one step at a time; see `generate`."""
        cache = KVCache(self, idx.size(0)) if kv_cache else None
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits = self.next_logits(idx, cache)
            new = sample_token(logits, temperature, top_k, top_p, generator)
            if eos_id is not None:
                new = torch.where(ended, eos_id, new)
                ended = ended | (new == eos_id)
            yield new
            if ended.all():
                return
            idx = torch.cat((idx, new), dim=1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, num_beams=1,
                 eos_id=None, generator=None, kv_cache=True):  # fmt: skip
        """idx (B, T) -> (B, T + up to max_new_tokens): the prompt and its continuation.

        temperature 0 is greedy; top_k (clamped to V) and top_p (Holtzman et al. 2020, the smallest
        set whose probability reaches p) narrow the choice; num_beams > 1 searches instead of
        drawing. A row that produced eos_id is filled with it; all rows ended ends the call.
        """
        if num_beams > 1:
            return self.beam_search(idx, max_new_tokens, num_beams, eos_id, kv_cache)[0]
        settings = (temperature, top_k, top_p, eos_id, generator, kv_cache)
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *settings)], dim=1)

    @torch.no_grad()
    def beam_search(self, idx, max_new_tokens, num_beams, eos_id=None, kv_cache=True):
        """The best of `num_beams` continuations of each row by summed log-probability.

        Returns (tokens (B, T + n), log-probability of the n new tokens (B,)). The greedy
        continuation always stays among the beams, so the result is never less probable than it.
        """
        B, K, V, device = idx.size(0), num_beams, self.config.vocab_size, idx.device
        idx = idx.repeat_interleave(K, dim=0)  # (B * K, T); beam 0 of a row is the greedy one
        score = torch.full((B, K), -torch.inf, device=device)
        score[:, 0] = 0.0  # all beams are alike at first: only one may branch
        ended = torch.zeros(B, K, dtype=torch.bool, device=device)
        cache = KVCache(self, B * K) if kv_cache else None
        first = torch.arange(B, device=device)[:, None] * K  # (B, 1) row of beam 0
        for _ in range(max_new_tokens):
            logp = F.log_softmax(self.next_logits(idx, cache).float(), dim=-1).view(B, K, V)
            if eos_id is not None:  # an ended beam has one free continuation: more eos
                stay = torch.full((V,), -torch.inf, device=device)
                stay[eos_id] = 0.0
                logp = torch.where(ended[..., None], stay, logp)
            total = score[..., None] + logp  # (B, K, V)
            greedy = total[:, 0].argmax(-1, keepdim=True)  # (B, 1), an index into K * V
            rest = total.view(B, K * V).scatter(1, greedy, -torch.inf)
            others = rest.topk(min(K - 1, K * V - 1), dim=1).indices
            chosen = torch.cat((greedy, others), dim=1)  # (B, K)
            score = total.view(B, K * V).gather(1, chosen)
            rows, new = (first + chosen // V).flatten(), (chosen % V).view(-1, 1)
            idx = torch.cat((idx[rows], new), dim=1)
            if cache is not None:
                cache.kv = cache.kv[:, :, rows]
            if eos_id is not None:
                ended = ended.flatten()[rows].view(B, K) | (new.view(B, K) == eos_id)
                if ended.all():
                    break
        best = score.argmax(dim=1, keepdim=True)
        return idx[(first + best).flatten()], score.gather(1, best).flatten()

    # -----------------------------------------------------------------------------------------
    # weights in and out

    @classmethod
    def from_checkpoint(cls, folder):
        """The model in a checkpoint folder of train.py, on the CPU, in eval mode."""
        from safetensors.torch import load_model

        try:
            saved = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            model = cls(GPTConfig(**saved["model"]))
            load_model(model, Path(folder) / "model.safetensors")
        except Exception as error:  # whatever a damaged or foreign folder can do
            fail(f"{folder} is no whole checkpoint of this project: {str(error).splitlines()[0]}")
        return model.eval()

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """GPT-2 weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl or a transformers folder."""
        from transformers import GPT2LMHeadModel

        known = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
        if name not in known and not Path(name).is_dir():
            fail(f"--init_from {name!r} is neither a folder nor one of {', '.join(known)}", 2)
        try:
            hf = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            fail(f"cannot load {name}: {str(error).splitlines()[0]}; the hub needs a network, "
                 "a local transformers folder does not")  # fmt: skip
        c = hf.config
        if (c.model_type, c.activation_function) != ("gpt2", "gelu_new"):
            fail(f"{name} is a {c.model_type} with {c.activation_function}; this needs a GPT-2")
        ours = GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, dropout,
                         tie_weights=c.tie_word_embeddings)  # fmt: skip
        model = cls(ours)
        model.load_state_dict(from_hf_layout(hf.state_dict()))
        return model.eval()

    def to_hf(self, folder=None):
        """This model as transformers' GPT2LMHeadModel, saved to `folder` where one is given.

        Biases that this model lacks become zeros, an untied head stays untied: equal logits.
        """
        from transformers import GPT2Config, GPT2LMHeadModel

        c = self.config
        config = GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
            tie_word_embeddings=c.tie_weights,
        )  # fmt: skip
        hf = GPT2LMHeadModel(config)
        zeros = {k: torch.zeros_like(v) for k, v in hf.state_dict().items() if k.endswith("bias")}
        hf.load_state_dict(zeros | from_hf_layout(self.state_dict()))
        hf.eval()
        if folder is not None:
            hf.save_pretrained(folder)
        return hf


def from_hf_layout(state_dict):
    """Turn the Linear weights over: transformers' GPT-2 keeps them (in, out). Its own inverse."""
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {k: v.t().contiguous() if k.endswith(turned) else v for k, v in state_dict.items()}


def next_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) -> the probabilities (B, V) that `sample_token` draws from, temperature > 0."""
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # no overflow near 0
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.size(-1)))  # ids, not a threshold: ties stay out
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    probabilities = F.softmax(logits, dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # probability of the more likely ones
        ordered[before >= top_p] = 0.0  # the first one has 0 before it ...
        ordered[:, 0] = probabilities.max(-1).values  # ... and stays even for top_p = 0
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token (B, 1) from logits (B, V); temperature 0 takes the most likely."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = next_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator)
