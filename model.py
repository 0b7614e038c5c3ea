"""The GPT: configuration, blocks, loss, KV cache, sampling, beams, GPT-2 weights in and out.

    python model.py export out/verdict FOLDER    # a run or checkpoint -> a transformers folder

GPT-2 (Radford et al. 2019) with its parameter names; `qkv_bias`, `tie_weights` and `init` also give
the model of "Build a Large Language Model (From Scratch)" (Raschka 2024, chapter 4).
Shapes: B batch, T time (at most block_size), C n_embd, V vocab_size, nh heads of hs = C / nh each.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import fail

if __name__ == "__main__":  # a wrong call is answered before the slow imports
    if {"-h", "--help"} & set(sys.argv):
        raise SystemExit(print(__doc__))
    if len(sys.argv) != 4 or sys.argv[1] != "export":
        fail("usage: python model.py export RUN FOLDER", 2)

import torch
import torch.nn as nn
from torch.nn import functional as F

from runtime import checkpoints, damage, disk_errors, remove, say, seal_folder


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
    edge = min(round(p * 65536) - 32768, 32767)  # past an int16's range it would wrap
    keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= edge
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


class Linear(nn.Linear):
    """nn.Linear; on a CPU one fp32 row goes through numpy, whose matrix-vector product uses all
    cores where PyTorch's uses one: a third of the time of a decoding step."""

    def forward(self, x):
        if (
            x.numel() == self.in_features
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        ):
            y = torch.from_numpy(self.weight.numpy() @ x.numpy().reshape(-1))
            y = y if self.bias is None else y + self.bias
            return y.view(*x.shape[:-1], self.out_features)
        return super().forward(x)


class PackedLinear(nn.Module):
    """A Linear for decoding: weights in bf16, or in int8 with one scale an output (CPU only)."""

    def __init__(self, linear, kind):
        super().__init__()
        weight, self.bias = linear.weight.detach(), linear.bias
        if kind == "int8":
            scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
            self.register_buffer("scale", scale.flatten().bfloat16())
            self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        else:
            self.register_buffer("weight", weight.bfloat16())

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1)).bfloat16()
        if self.weight.dtype == torch.int8:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight)
        y = y.to(x.dtype) if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


def pack(model, kind):
    """Swap the Linear layers of an eval-mode model for PackedLinear, in place: 'bf16' or 'int8',
    half or a quarter of the bytes that a decoding step reads. Embeddings stay as they are. On a GPU
    the whole model becomes bf16: each conversion would be a kernel more."""
    if kind == "bf16" and model.lm_head.weight.is_cuda:
        return model.bfloat16()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, kind))
    return model


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.p = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, position=0, later=None):
        """x (B, T, C) at positions position .. position + T - 1 -> (B, T, C).

        cache (2, B, nh, length, hs) holds the keys and values before `position`; this call adds its
        own. A CUDA graph must not depend on numbers: there T is 1, `position` a tensor (1,), and
        `later` (length,) is True past it.
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, nh, T, hs)
        p, mask = self.p if self.training else 0.0, None
        if cache is not None:
            new = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)  # (2, B, nh, T, hs)
            if later is not None:
                k, v = cache.index_copy_(3, position, new)  # (B, nh, length, hs)
            else:
                cache[:, :, :, position : position + T] = new
                k, v = cache[:, :, :, : position + T]  # (B, nh, position + T, hs)
                if position and T > 1:
                    mask = torch.ones(T, position + T, dtype=torch.bool, device=x.device)
                    mask = mask.tril(position)
        if later is not None or (p and x.device.type == "cpu"):  # no fused kernel is fast there
            later = torch.ones(T, T, dtype=torch.bool).triu(1) if later is None else later
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, keys)
            scores = scores.masked_fill(later, -torch.inf)
            y = dropout(scores.softmax(-1, dtype=q.dtype), p, True) @ v  # (B, nh, T, hs)
        else:
            causal = position == 0 and T > 1
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, T, C)
        return dropout(self.c_proj(y), self.p, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
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

    def forward(self, x, cache=None, position=0, later=None):
        x = x + self.attn(self.ln_1(x), cache, position, later)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """The keys and values of `filled` positions, of `length` at most (block_size at most).

    kv: (n_layer, 2, B, nh, length, hs). graph: a GraphedStep once there is one.
    """

    def __init__(self, model, batch_size, length):
        c, wte = model.config, model.transformer.wte.weight
        length = min(length, c.block_size)
        shape = (c.n_layer, 2, batch_size, c.n_head, length, c.n_embd // c.n_head)
        # zeros: a GraphedStep multiplies what is not filled by 0, and 0 * NaN is NaN
        self.kv, self.filled = torch.zeros(shape, dtype=wte.dtype, device=wte.device), 0
        self.graph = None


class GraphedStep:
    """A decoding step on an NVIDIA GPU, recorded once and replayed for every further token: some
    200 kernels of microseconds, and to start each one from Python takes longer than it runs."""

    def __init__(self, model, cache, token, position):
        """token (B, 1), position: what the first call will be given."""
        self.token, self.position = token.clone(), torch.tensor([position], device=token.device)

        def step():
            return model.lm_head(model.hidden(self.token, cache, self.position)[:, -1])

        with torch.cuda.device(token.device):
            step()  # what libraries set up at their first call cannot be recorded
            self.cuda_graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do meanwhile, such as NCCL's, is no error
            with torch.cuda.graph(self.cuda_graph, capture_error_mode="thread_local"):
                self.logits = step()

    def __call__(self, token, position):
        """token (B, 1) at `position` -> logits (B, V)."""
        self.token.copy_(token)
        self.position.fill_(position)
        self.cuda_graph.replay()
        return self.logits.clone()


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
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        if config.init == "gpt2":
            for name, p in self.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(p)
                elif p.dim() == 2:  # residual projections start smaller: GPT-2 report, section 2.3
                    residual = name.endswith("c_proj.weight")
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer if residual else 1))

    def tie_weights(self):
        """Let lm_head share wte if the config says so. accelerate calls it after FSDP has moved the
        model and parted the two."""
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def count_parameters(self):
        """The number of weights, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, idx, cache=None, position=0):
        """idx (B, T) -> (B, T, C) after the last LayerNorm. With a KVCache, `position` is the
        number of tokens before idx that it holds; see CausalSelfAttention."""
        if torch.is_tensor(position):
            steps, later = position, torch.arange(cache.kv.size(4), device=idx.device) > position
        else:
            steps = torch.arange(position, position + idx.size(1), device=idx.device)
            later = None
        x = self.transformer.wte(idx) + self.transformer.wpe(steps)
        x = dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache.kv[i], position, later)
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
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # fp32 under autocast
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
            return self.lm_head(x[:, -1])
        new, position = idx[:, cache.filled :], cache.filled
        cache.filled = idx.size(1)
        if idx.device.type == "cuda" and new.size(1) == 1:
            cache.graph = cache.graph or GraphedStep(self, cache, new, position)
            return cache.graph(new, position)
        return self.lm_head(self.hidden(new, cache, position)[:, -1])

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None,
               generator=None, kv_cache=True):  # fmt: skip
        """Yield the next tokens (B, 1) one step at a time; see `generate`."""
        cache = KVCache(self, idx.size(0), idx.size(1) + max_new_tokens) if kv_cache else None
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        threads, device = torch.get_num_threads(), idx.device.type
        by_numpy = (len(idx), device, self.lm_head.weight.dtype) == (1, "cpu", torch.float32)
        try:
            for _ in range(max_new_tokens):
                logits = self.next_logits(idx, cache)
                if by_numpy:  # see Linear: its threads work now, and two pools would fight
                    torch.set_num_threads(1)
                new = sample_token(logits, temperature, top_k, top_p, generator)
                if eos_id is not None:
                    new = torch.where(ended, eos_id, new)
                    ended = ended | (new == eos_id)
                yield new
                if eos_id is not None and ended.all():
                    return
                idx = torch.cat((idx, new), dim=1)
        finally:
            torch.set_num_threads(threads)

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
        cache = KVCache(self, B * K, idx.size(1) + max_new_tokens) if kv_cache else None
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
                held = cache.kv[..., : cache.filled, :]  # in place: a GraphedStep writes there
                held.copy_(held[:, :, rows])
            if eos_id is not None:
                ended = ended.flatten()[rows].view(B, K) | (new.view(B, K) == eos_id)
                if ended.gather(1, score.argmax(dim=1, keepdim=True)).all():  # scores only fall
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
        from transformers import GPT2Config, GPT2LMHeadModel

        known = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
        if name not in known and not Path(name).is_dir():
            fail(f"--init_from {name!r} is neither a folder nor one of {', '.join(known)}", 2)
        try:  # sdpa: a stranger's config must not choose the code that computes attention
            hf, report = GPT2LMHeadModel.from_pretrained(
                name, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
        except Exception as error:  # transformers and a stranger's files can fail in any way
            fail(f"cannot load {name}: {f'{error}.'.splitlines()[0]} The hub needs a network, "
                 "a local transformers folder does not")  # fmt: skip
        c, plain = hf.config, GPT2Config(n_inner=4 * hf.config.n_embd)
        c.n_inner = c.n_inner or plain.n_inner
        for key in ("activation_function", "layer_norm_epsilon", "n_inner", "scale_attn_weights",
                    "scale_attn_by_inverse_layer_idx"):  # fmt: skip
            if getattr(c, key) != getattr(plain, key):
                fail(f"{name} has {key} {getattr(c, key)}; only {getattr(plain, key)} works here")
        if missing := sorted(report["missing_keys"]):
            fail(f"{name} is no GPT-2, or a part of one: it has no {missing[0]}")
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
            tie_word_embeddings=c.tie_weights, bos_token_id=None, eos_token_id=None,
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
    if top_k is not None:  # first: what follows may round two logits to the same
        kept = logits.topk(min(top_k, logits.size(-1)))  # ids, not a threshold: ties stay out
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # no 0 / 0
    probabilities = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:  # rounding would drop the rarest at 1
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
    below = probabilities.cumsum(-1)  # one random number a row; multinomial would draw V of them
    u = torch.rand(len(below), 1, device=below.device, generator=generator)
    # scaled so that rounding cannot reach the end; right=True passes over probabilities of 0
    return torch.searchsorted(below, u * (1 - 2**-23) * below[:, -1:], right=True)


# ---------------------------------------------------------------------------------------------
# export


def hf_tokenizer(folder, name):
    """meta.json's tokenizer `name` as a tokenizers.Tokenizer: the file in `folder`, or tiktoken's
    vocabulary rebuilt with every id in its place."""
    from tokenizers import Tokenizer

    if name.endswith(".json"):
        return Tokenizer.from_file(str(Path(folder) / Path(name).name))
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    source = tiktoken.get_encoding(name)
    names = {i: token for token, i in source._special_tokens.items()}
    converter = TikTokenConverter(pattern=source._pat_str, extra_special_tokens=[*names.values()])
    converter.load_tiktoken_bpe = lambda _: source._mergeable_ranks
    vocab, merges = converter.extract_vocab_merges_from_model(None)
    for i in {*range(source.n_vocab)} - {*vocab.values()}:  # special tokens, and ids nobody has
        vocab[names.get(i, f"<|unused_{i}|>")] = i
    converter.extract_vocab_merges_from_model = lambda _: (vocab, merges)
    return converter.converted()


def model_card(model, saved, meta):
    """README.md of an exported model: what it is and the figures of its run."""
    c, name, source = model.config, saved["train"]["dataset"], meta["source"]
    if not source.startswith(("hf:", "https://", "http://")):
        source = Path(source).name  # no paths of the machine it was made on
    start = "from scratch" if saved["train"]["init_from"] == "scratch" else "from GPT-2 weights"
    rows = {
        "data set": f"{name} ({source})",
        "tokens": f"{meta['train_tokens']:,} train, {meta['val_tokens']:,} validation",
        "vocabulary": f"{meta['vocab_size']:,} ({meta['tokenizer']})",
        "model": f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}",
        "iteration": f"{saved['iter']:,}",
    }
    for key in [k for k in ("train_loss", "val_loss") if k in saved]:
        rows[key] = f"{saved[key]:.4f}, perplexity {math.exp(min(saved[key], 700)):.1f}"
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
        f"# {name}", "", f"A GPT of {model.count_parameters():,} parameters, trained {start}.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), "",
    ])  # fmt: skip


def export(run, folder):
    """Write a run's newest checkpoint (or `run` itself, where it is one) as a transformers folder:
    weights, tokenizer, generation settings, model card. The folder is whole or absent."""
    from transformers import PreTrainedTokenizerFast

    run, folder = Path(run), Path(folder).resolve()
    found = [run] if (run / "model.safetensors").exists() else checkpoints(run)
    if not found:
        fail(f"{run} is neither a run of train.py nor one of its checkpoints")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} exists and is not empty; name another folder")
    checkpoint = found[0]
    if wrong := damage(checkpoint):
        fail(f"{checkpoint} is not whole: {wrong}")
    hf = (model := GPT.from_checkpoint(checkpoint)).to_hf()
    try:
        saved, meta = (
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
            for name in ("config.json", "meta.json")
        )
        card, eot_id = model_card(model, saved, meta), meta["eot_id"]
        engine = hf_tokenizer(checkpoint, meta["tokenizer"])
    except Exception as error:  # a foreign file, or no network for a tiktoken vocabulary
        fail(f"the tokenizer of {checkpoint} cannot be had: {type(error).__name__}: {error}")
    engine.post_processor = None  # training adds no special token, whatever the tokenizer would
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokenizer = PreTrainedTokenizerFast(  # split_special_tokens: in text they are text
        tokenizer_object=engine, model_max_length=model.config.block_size,
        split_special_tokens=True, **dict.fromkeys(special, engine.id_to_token(eot_id)),
    )  # fmt: skip
    for settings in (hf.config, hf.generation_config):
        settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = eot_id
    hf.generation_config.max_length = model.config.block_size  # there are no positions beyond
    temporary = folder.with_name(f".tmp-{folder.name}")
    with disk_errors(temporary):
        remove(temporary)
        temporary.mkdir(parents=True)
        hf.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        named = temporary / "tokenizer_config.json"  # by a name that transformers 4 knows too
        text = named.read_text("utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
        named.write_text(text, "utf-8")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        seal_folder(temporary, folder)
    say(f"{checkpoint} -> {folder}")


if __name__ == "__main__":
    export(*sys.argv[2:])
