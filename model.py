"""The GPT: configuration, attention, MLP, blocks, loss, initial weights. Copy it anywhere.

GPTConfig's defaults give GPT-2 (Radford et al. 2019), with its parameter names. Its fields also
give the model of "Build a Large Language Model (From Scratch)" (Raschka 2024, chapter 4),
Llama (Touvron et al. 2023: rope_theta, rms_norm, swiglu, no biases, n_kv_head) and Qwen3 (Yang et
al. 2025: Llama with qk_norm).

Shapes: B batch, T time (at most block_size), C n_embd, V vocab_size, nh query heads and nkv
key/value heads of hs = head_dim each, I n_inner.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

try:  # the same functions, faster on a CPU; delete fast.py and the model computes the same
    from fast import Linear, dropout, scaled_dot_product_attention
except ModuleNotFoundError:
    from torch.nn import Linear
    from torch.nn.functional import dropout, scaled_dot_product_attention


@dataclass
class GPTConfig:
    """The architecture; the defaults are GPT-2 124M. Raises ValueError where it is impossible."""

    block_size: int = 1024  # positions: the longest context
    vocab_size: int = 50257  # token ids 0 .. vocab_size - 1
    n_layer: int = 12  # blocks
    n_head: int = 12  # query heads a block
    n_embd: int = 768  # width
    dropout: float = 0.0  # on embeddings, attention weights and both residual branches
    bias: bool = True  # in LayerNorm and every Linear but c_attn and lm_head
    qkv_bias: bool = True  # in c_attn
    tie_weights: bool = True  # lm_head shares wte
    init: Literal["gpt2", "torch", "local"] = "gpt2"  # init_weights, PyTorch's own, look_back
    n_kv_head: int | None = None  # key/value heads, shared by groups of queries; None: n_head
    head_dim: int | None = None  # None: n_embd / n_head
    n_inner: int | None = None  # width inside the MLP; None: 4 n_embd, with swiglu 8/3 n_embd
    rope_theta: float | None = None  # base of rotary positions; None: learned positions
    rms_norm: bool = False  # RMSNorm instead of LayerNorm
    swiglu: bool = False  # SwiGLU instead of the tanh GELU
    qk_norm: bool = False  # RMSNorm on queries and keys, before the rotation
    embd_norm: bool = False  # RMSNorm without weights on token embeddings; export folds it into wte
    norm_eps: float = 1e-5  # of every norm

    def __post_init__(self):
        chosen = ("n_kv_head", "head_dim", "n_inner")  # below, where it is None
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", *chosen):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0 or value is None and name in chosen):
                raise ValueError(f"{name} must be a whole number above 0, not {value}")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.n_inner is None:
            # 8/3: three matrices of that width weigh as much as two of 4 n_embd (Shazeer 2020)
            self.n_inner = 8 * math.ceil(self.n_embd / 3) if self.swiglu else 4 * self.n_embd
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head "
                             f"{self.n_kv_head}")
        if self.rope_theta is not None and (self.head_dim % 2 or self.rope_theta <= 0):
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}, and "
                             f"rope_theta above 0, not {self.rope_theta}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.init not in ("gpt2", "torch", "local"):
            raise ValueError(f"init must be gpt2, torch or local, not {self.init!r}")
        if self.init == "local" and self.rope_theta is None:
            raise ValueError("init local needs rotary positions: a rope_theta")


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (Zhang & Sennrich 2019) with its weight in the dtype of x: under autocast PyTorch
    has no fused kernel for two dtypes."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config):
    """The norm over the C features."""
    if config.rms_norm:
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): turn each pair (x[i], x[i + hs/2]) of x (B, heads, T, hs)
    by its position's angle i. transformers pairs halves like this, the paper neighbours."""
    first, second = x.chunk(2, dim=-1)  # (B, heads, T, hs/2)
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.p = config.dropout
        heads = config.n_head + 2 * config.n_kv_head  # queries, keys and values in one product
        self.c_attn = Linear(config.n_embd, heads * config.head_dim, bias=config.qkv_bias)
        self.c_proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        norm = RMSNorm if config.qk_norm else nn.Identity  # which ignores its arguments
        self.q_norm = norm(config.head_dim, eps=config.norm_eps)
        self.k_norm = norm(config.head_dim, eps=config.norm_eps)

    def forward(self, x, rotation=None, cache=None):
        """x (B, T, C) -> (B, T, C). rotation: (cos, sin) of the T positions, (T, hs/2) each.

        cache(k, v) appends the new keys and values and returns all of them and a mask; see
        sample.KVCache.
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)  # (B, ., T, hs)
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rotation is not None:
            q = rotate(q, *rotation)
            k = rotate(k, *rotation)
        mask = None  # without a cache the mask is the causal triangle
        if cache is not None:
            k, v, mask = cache(k, v)  # (B, nkv, keys, hs)
        y = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.p if self.training else 0.0,
            is_causal=cache is None, enable_gqa=self.n_kv_head != self.n_head,
        )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, nh * hs)
        return dropout(self.c_proj(y), self.p, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_gate = None
        if config.swiglu:
            self.c_gate = Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.p = config.dropout

    def forward(self, x):
        if self.c_gate is None:
            x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, I); GPT-2 has the tanh form
        else:
            x = F.silu(self.c_gate(x)) * self.c_fc(x)  # (B, T, I)
        return dropout(self.c_proj(x), self.p, self.training)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotation=None, cache=None):
        x = x + self.attn(self.ln_1(x), rotation, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        modules = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.rope_theta is None:
            modules["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        modules["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        modules["ln_f"] = make_norm(config)
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if config.init != "torch":
            self.init_weights()
        if config.init == "local":
            self.look_back()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initial weights: normal with deviation 0.02, biases zero; the projections back
        into the residual stream are smaller by its number of additions (GPT-2 report, 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 2:
                residual = name.endswith("c_proj.weight")
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer if residual else 1))

    @torch.no_grad()
    def look_back(self):
        """Heads that random weights find late (docs/LOG.md). In the first layer heads 0, 1, 2 and 3
        begin by attending to the token 1, 2, 3 and 4 before. In the second layer head 0 begins as
        an induction head (Olsson et al. 2022): it attends to the token after an earlier occurrence
        of the present one, and copies it; weaker where 2 head_dim exceed n_embd.

        All token embeddings share a vector, which queries and keys of the first layer read; a
        head's query is turned by the angle of its distance (after mimetic initialization, Trockman
        & Kolter 2023).
        """
        config, attn = self.config, self.transformer.h[0].attn
        C, nh, nkv, hs = config.n_embd, attn.n_head, attn.n_kv_head, attn.head_dim
        shared = torch.ones(C)
        shared[1::2] = -1  # LayerNorm takes a mean away
        larger = 2 if config.tie_weights else 10  # a tied head would begin by repeating its input
        wte = self.transformer.wte.weight
        if not config.tie_weights:
            self.lm_head.weight.copy_(wte.roll(1, 1))  # its dimensions are not the input's
        wte.mul_(larger).add_(0.02 * larger * shared)

        even = torch.arange(0, hs, 2)
        key = config.rope_theta ** (-even / hs / 2)  # fast turns most: far away is small
        key *= 2 * math.sqrt(hs) / key.norm()
        cos, sin = self.rotation(-torch.arange(1, 5))  # (4, hs/2)
        weight = attn.c_attn.weight.view(-1, hs, C)  # (nh + 2 nkv, hs, C)
        for head in range(min(4, nh)):
            query = torch.cat((key * cos[head], key * sin[head]))
            weight[head] += query[:, None] * shared / C
        for head in range(nh, nh + nkv):
            weight[head, : len(key)] += key[:, None] * shared / C

        if config.n_layer == 1:
            return
        rows = nn.init.orthogonal_(torch.empty(2 * hs, C, dtype=torch.float32)).to(wte.dtype)
        rows -= rows.mv(shared)[:, None] * shared / C  # orthogonal to the shared vector, too
        value, out = rows.chunk(2)
        size = 1 if config.embd_norm else 0.02 * larger * math.sqrt(2)  # RMS of an embedding
        weight[nh + nkv] = value
        attn.c_proj.weight[:, :hs] = out.T * math.sqrt(C / hs) * size
        attn = self.transformer.h[1].attn
        weight = attn.c_attn.weight.view(-1, hs, C)
        slow = torch.arange(hs) % (hs // 2) >= hs // 4  # of low frequency: at any distance
        weight[0] = 4 * slow[:, None] * value  # query: the present token
        weight[nh] = 4 * slow[:, None] * out  # key: the one before, as the first layer wrote it
        weight[nh + nkv] = value
        copied = value.T * C / hs * size / 2  # half the token's embedding
        attn.c_proj.weight[:, :hs] = copied if config.tie_weights else copied.roll(1, 0)

    def count_parameters(self):
        """The number of weights, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def rotation(self, positions):
        """positions (T,) -> the cosines and sines of their angles, (T, hs/2) each, in fp32."""
        even = torch.arange(0, self.config.head_dim, 2, device=positions.device)
        frequencies = self.config.rope_theta ** (-even / self.config.head_dim)
        angles = positions[:, None] * frequencies
        return angles.cos(), angles.sin()

    def hidden(self, idx, cache=None):
        """idx (B, T) -> (B, T, C) after the last norm. With a cache (sample.KVCache), idx follows
        the tokens whose keys and values it holds."""
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.embd_norm:
            x = F.rms_norm(x, (x.size(-1),), eps=self.config.norm_eps)
        if cache is None:
            positions = torch.arange(idx.size(1), device=idx.device)
        else:
            positions = cache.positions(idx.size(1))  # (T,)
        rotation = None
        if self.config.rope_theta is None:
            x = x + self.transformer.wpe(positions)
        else:
            rotation = self.rotation(positions)
        x = dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            x = block(x, rotation, None if cache is None else cache.layers[i])
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, return_logits=True):
        """Next-token logits and, where targets are given, their mean cross-entropy in nats.

        idx, targets (B, T) of token ids, T at most block_size; a target of -100 does not count.
        Returns (logits (B, T, V), loss or None); (None, loss) with return_logits=False, which
        spares the memory of the logits. Raises ValueError where T exceeds block_size.
        """
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens exceed block_size {self.config.block_size}")
        logits = self.lm_head(self.hidden(idx))  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # fp32 under autocast
        return (logits if return_logits else None), loss
