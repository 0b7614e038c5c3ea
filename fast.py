"""Stand-ins with torch's names that only make a CPU faster, and quantized weights for decoding.

model.py imports dropout, Linear and scaled_dot_product_attention from here. Delete this file and
every script computes the same up to rounding, slower; only sample.py's --quantize is gone.
"""

import math
import warnings

import torch
import torch.nn as nn
from torch.nn import functional as F

GROUP = 32  # inputs that share a scale and an offset in int4
MAX_TOKENS = 512  # of context: beyond it the scores kept for backward take too much memory


def cpu_has(*features):
    """Whether the CPU has one of these instruction sets, by torch.cpu.get_capabilities' names."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(feature) for feature in features)


def dropout(x, p=0.5, training=True):
    """F.dropout. On a CPU it draws 64 random bits once and uses them as four 16-bit numbers: a
    quarter of the time, and p is rounded to a multiple of 1/65536."""
    if not training or p == 0 or x.device.type != "cpu":
        return F.dropout(x, p, training)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    threshold = min(round(p * 65536) - 32768, 32767)  # beyond an int16's range it would wrap
    keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= threshold
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False,
                                 enable_gqa=False):
    """F.scaled_dot_product_attention. On a CPU PyTorch's fused kernel has no dropout, and training
    in bf16 it takes up to four times as long as the plain products here, which keep T x T scores
    and round them to bf16.

    q (B, nh, T, hs), k and v (B, nkv, T, hs) -> (B, nh, T, hs).
    """
    # without gradients the products gain nothing
    pays = dropout_p > 0 or (q.dtype == torch.bfloat16 and torch.is_grad_enabled()
                             and q.size(-2) <= MAX_TOKENS)
    plain = (q.is_cpu and q.dim() == 4 and q.size(2) == k.size(2)
             and (enable_gqa or q.size(1) == k.size(1)))
    if not pays or not plain or attn_mask is not None or not is_causal:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal,
                                              enable_gqa=enable_gqa)
    B, nh, T, hs = q.shape
    future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)  # added: 0 for the past
    # the queries that share a head of keys and values are one after another: no copies of those
    q = (q * (1 / math.sqrt(hs))).reshape(B, k.size(1), -1, hs)
    scores = (q @ k.transpose(-2, -1)).view(B, nh, T, T) + future
    weights = dropout(scores.softmax(-1, dtype=q.dtype), dropout_p)
    return (weights.view(B, k.size(1), -1, T) @ v).view(B, nh, T, -1)


class Linear(nn.Linear):
    """nn.Linear. Without gradients, fp32 on a CPU goes through oneDNN, which shares out one row
    among all cores where PyTorch's MKL uses one: half of the time of a decoding step."""

    def forward(self, x):
        plain = x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and x.numel()
        plain = plain and x.size(-1) == self.in_features and torch.backends.mkldnn.is_available()
        other = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if not plain or other or torch.compiler.is_compiling():  # which has kernels of its own
            return super().forward(x)
        bias = None if self.bias is None else self.bias.contiguous()  # oneDNN takes it to be
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024), which iterates in bf16. A CPU without bf16
    instructions does that at a quarter of its fp32 speed, so there this one iterates in fp32."""

    @torch.no_grad()
    def step(self, closure=None):
        usual = all(p.is_cpu and group["nesterov"] and group["adjust_lr_fn"] == "match_rms_adamw"
                    for group in self.param_groups for p in group["params"])
        if cpu_has("avx512_bf16", "amx_bf16") or not usual or closure is not None:
            return super().step(closure)
        for group in self.param_groups:
            lr = float(group["lr"])
            for p in [p for p in group["params"] if p.grad is not None]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(buffer, group["momentum"])
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(orthogonalize(nesterov, group), alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(x, group):
    """Newton-Schulz: x (m, n) -> about the orthogonal factor of its polar decomposition."""
    a, b, c = group["ns_coefficients"]
    y = x.T if x.size(0) > x.size(1) else x
    y = y / y.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if x.size(0) > x.size(1) else y


class QuantizedLinear(nn.Module):
    """A Linear for decoding: weights in bf16, or, on a CPU only, in int8 with one scale an output
    (each row of x is rounded to 8 bits, too) or in int4 with a scale and an offset for every GROUP
    inputs of an output. Weights in bf16 and int8 are in no state_dict, and oneDNN's can't be
    copied: quantize last."""

    def __init__(self, linear, kind):
        super().__init__()
        self.kind = kind
        self.bias = linear.bias
        self.out_features = linear.out_features
        weight = linear.weight.detach().float()
        if kind == "bf16":
            self.packed = weight.bfloat16()
            self.blocked = (weight.is_cpu and torch.backends.mkldnn.is_available()
                            and torch.ops.mkldnn._is_mkldnn_bf16_supported())
            if self.blocked:  # in the order in which oneDNN's kernel reads them
                self.packed = torch.ops.mkldnn._reorder_linear_weight(self.packed, 1)
        elif kind == "int8":
            scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
            zero_points = torch.zeros(len(scale), dtype=torch.long)
            with warnings.catch_warnings():  # PyTorch 2.13 announces the end of qint8 tensors
                warnings.simplefilter("ignore")
                weight = torch.quantize_per_channel(weight, scale, zero_points, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(weight, None)
            # without AVX512-VNNI the kernel adds products of 8 bits in 16: x gets 7, so they fit
            self.narrow = bool(cpu_has("avx2") and not cpu_has("avx512_vnni"))
        else:
            # the kernel wants whole groups and 16 outputs, and is fastest with 64
            self.padding = -linear.in_features % GROUP
            weight = F.pad(weight, (0, self.padding, 0, -self.out_features % 64))
            groups = weight.unflatten(1, (-1, GROUP))  # (outputs, groups, GROUP)
            low, high = groups.aminmax(dim=2, keepdim=True)
            scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
            offset = (low + 8 * scale).bfloat16()  # of the 16 levels -8 .. 7
            levels = ((groups - offset) / scale).round().clamp(-8, 7) + 8
            weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.flatten(1).int(), 1)
            self.register_buffer("weight", weight)
            scale = torch.cat((scale, offset), dim=2).transpose(0, 1).contiguous()
            self.register_buffer("scale", scale)

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        if self.kind == "bf16" and self.blocked:
            rows = rows.bfloat16()
            y = torch.ops.mkldnn._linear_pointwise(rows, self.packed, None, "none", [], "")
        elif self.kind == "bf16":
            y = F.linear(rows.bfloat16(), self.packed)
        elif self.kind == "int8" and len(rows) == 1:
            y = torch.ops.quantized.linear_dynamic(rows.float(), self.packed, self.narrow)
        elif self.kind == "int8":  # the kernel has one scale for all rows: give each row its own
            rows = rows.float()
            largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
            y = torch.ops.quantized.linear_dynamic(rows / largest, self.packed, self.narrow)
            y = y * largest
        else:
            rows = F.pad(rows.bfloat16(), (0, self.padding)).contiguous()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scale)
            y = y[:, : self.out_features]
        y = y.to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)


def quantize(model, kind):
    """Replace the Linear layers of an eval-mode model by QuantizedLinear, in place: 'bf16', 'int8'
    or 'int4', a half, a quarter or a sixth of the bytes that a decoding step reads. Embeddings stay
    as they are. On an NVIDIA GPU the whole model becomes bf16: each conversion would be one more
    kernel."""
    if kind == "bf16" and model.lm_head.weight.is_cuda:
        return model.bfloat16()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantizedLinear(child, kind))
    return model
