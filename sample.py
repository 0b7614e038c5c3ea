"""Stage 3: text from a trained model, printed as it is made.

python sample.py --start "Every effort moves you"       # the newest run under out/
python sample.py --out_dir=out/verdict --temperature=0 --start=FILE:prompt.txt
python sample.py --init_from=Qwen/Qwen3-0.6B --start="Once"    # GPT-2, Llama, Qwen3: hub or folder
python sample.py --interactive --quantize=int8

In a notebook: model, tokenizer, _ = load_run("out/verdict"); complete(model, tokenizer, "Every")
"""

import contextlib
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from configurator import load


@dataclass
class Config:
    """Generate text."""

    out_dir: str | None = None  # a run of train.py; None: the newest under out/
    checkpoint: str = "auto"  # newest, best, a checkpoint-...'s name; auto: best if clearly better
    init_from: str | None = None  # instead of a run: a GPT-2, Llama or Qwen3 on the hub or a folder
    start: str | None = None  # the prompt, or FILE:path; '': end-of-text; None: the run's own
    num_samples: int = 1  # texts, generated as one batch
    max_new_tokens: int = 200  # tokens a text at most
    temperature: float = 0.8  # below 1 less random, above 1 more; 0: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the smallest set whose probability reaches p
    num_beams: int = 1  # above 1: search for the likeliest text instead of drawing
    stop_at_eos: bool = True  # end a text at the end-of-text token
    kv_cache: bool = True  # False: recompute every token (slow, for comparison)
    seed: int = 1337  # the same seed gives the same text
    quantize: Literal["none", "bf16", "int8", "int4"] = "none"  # smaller weights; int: CPU only
    interactive: bool = False  # complete what is typed, line by line; Ctrl-D ends
    RETIRED: ClassVar = {"chat": "--interactive: it completes each line and forgets it"}


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import torch
from torch.nn import functional as F

import prepare
import runtime
from model import GPT, GPTConfig
from runtime import UserError, check_range, one_line, print0


def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) -> the probabilities (B, V) that `sample_token` draws from; temperature > 0.
    top_p is nucleus sampling (Holtzman et al. 2020)."""
    logits = logits.float()
    if top_k is not None:  # first: what follows may round two logits to the same
        kept = logits.topk(min(top_k, logits.size(-1)))  # ids, not a threshold: ties stay out
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # no 0 / 0
    probabilities = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:  # at 1 rounding would drop the rarest
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # probability of the more likely ones
        ordered[:, 1:][before[:, 1:] >= top_p] = 0.0  # the likeliest always stays
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token (B, 1) from logits (B, V); temperature 0 takes the most likely."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
    # One random number a row and a search; torch.multinomial would draw V of them.
    cumulative = probabilities.cumsum(-1)
    u = torch.rand(len(cumulative), 1, device=cumulative.device, generator=generator)
    # scaled so that rounding cannot reach the end; right=True passes over probabilities of 0
    new = torch.searchsorted(cumulative, u * (1 - 2**-23) * cumulative[:, -1:], right=True)
    return new.clamp(max=logits.size(-1) - 1)  # where weights diverged to nan: some token


class KVCache:
    """The keys and values kv (n_layer, 2, B, nkv, length, hs), length at most block_size, of
    `filled` positions. model.hidden calls positions(T) once and each block's attention
    layers[i](k, v); whoever calls model.hidden sets `filled` afterwards."""

    def __init__(self, model, batch_size, length):
        c = model.config
        weight = model.transformer.wte.weight
        shape = (c.n_layer, 2, batch_size, c.n_kv_head, min(length, c.block_size), c.head_dim)
        # zeros: a CUDAGraphStep multiplies unused slots by 0, and 0 * NaN is NaN
        self.kv = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.layers = [functools.partial(self.append, kv) for kv in self.kv]
        self.filled = 0
        self.mask = None  # (T, keys), True where a query may look; None: everywhere
        self.graph = None  # a CUDAGraphStep once there is one
        self.graph_position = None  # (1,) while it is captured

    def positions(self, T):
        """Positions (T,) of the next T tokens; also prepares the mask that all blocks share."""
        device = self.kv.device
        if self.graph_position is not None:
            # A CUDA graph bakes in Python ints at capture, so the position is a tensor and the
            # mask covers unused cache slots.
            self.mask = torch.arange(self.kv.size(4), device=device)[None] <= self.graph_position
            return self.graph_position
        keys = self.filled + T
        self.mask = None
        if T > 1:
            self.mask = torch.ones(T, keys, dtype=torch.bool, device=device).tril(self.filled)
        return torch.arange(self.filled, keys, device=device)

    def append(self, kv, k, v):
        """Append k, v (B, nkv, T, hs) to one block's kv (2, B, nkv, length, hs). Returns all keys
        and values (B, nkv, keys, hs) and the mask."""
        new = torch.stack((k, v))  # (2, B, nkv, T, hs)
        if self.graph_position is not None:
            return *kv.index_copy_(3, self.graph_position, new), self.mask
        keys = self.filled + k.size(2)
        kv[:, :, :, self.filled : keys] = new
        return *kv[:, :, :, :keys], self.mask


class CUDAGraphStep:
    """A decoding step on an NVIDIA GPU, captured once and replayed for every further token: it is
    some 200 kernels of microseconds, and starting each from Python takes longer than it runs."""

    def __init__(self, model, cache, token, position):
        """token (B, 1), position: what the first call will be given."""
        self.token = token.clone()
        self.position = torch.tensor([position], device=token.device)
        cache.graph_position = self.position
        with torch.cuda.device(token.device):
            model.lm_head(model.hidden(self.token, cache)[:, -1])  # lazy set-up cannot be captured
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do meanwhile, such as NCCL's, is no error
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = model.lm_head(model.hidden(self.token, cache)[:, -1])
        cache.graph_position = None

    def __call__(self, token, position):
        """token (B, 1) at `position` -> logits (B, V), the same tensor at every call."""
        self.token.copy_(token)
        self.position.fill_(position)
        self.graph.replay()
        return self.logits


def next_logits(model, idx, cache=None):
    """Logits (B, V) after the last token of idx (B, T), the window slid to block_size.

    With a KVCache only what it does not hold yet is computed, until the window is full: positions
    are absolute, so from then on a slide changes every token of the window.
    """
    with torch.inference_mode():
        if cache is None or idx.size(1) > model.config.block_size:
            logits = model.lm_head(model.hidden(idx[:, -model.config.block_size :])[:, -1])
        else:
            position = cache.filled
            new = idx[:, position:]
            if idx.device.type == "cuda" and new.size(1) == 1:
                cache.graph = cache.graph or CUDAGraphStep(model, cache, new, position)
                logits = cache.graph(new, position)
            else:
                logits = model.lm_head(model.hidden(new, cache)[:, -1])
            cache.filled = idx.size(1)
    return logits.clone()  # a tensor like any other, and not the graph's own


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None,
           generator=None, kv_cache=True):
    """Yield the next tokens (B, 1), one step at a time; see `generate`."""
    cache = KVCache(model, idx.size(0), idx.size(1) + max_new_tokens) if kv_cache else None
    ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        logits = next_logits(model, idx, cache)
        new = sample_token(logits, temperature, top_k, top_p, generator)
        if eos_id is not None:
            new = torch.where(ended, eos_id, new)
            ended = ended | (new == eos_id)
        yield new
        if eos_id is not None and ended.all():
            return
        idx = torch.cat((idx, new), dim=1)


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, num_beams=1,
             eos_id=None, generator=None, kv_cache=True):
    """idx (B, T) -> (B, T + up to max_new_tokens): the prompt and its continuation.

    temperature 0 is greedy; top_k (clamped to V) and top_p narrow the choice; num_beams > 1
    searches instead of drawing. After eos_id a row is filled with it; the call returns early when
    every row has ended. Past block_size the window slides. Call model.eval() first.
    """
    if num_beams > 1:
        return beam_search(model, idx, max_new_tokens, num_beams, eos_id, kv_cache)[0]
    new = stream(model, idx, max_new_tokens, temperature, top_k, top_p, eos_id, generator, kv_cache)
    return torch.cat([idx, *new], dim=1)


def beam_search(model, idx, max_new_tokens, num_beams, eos_id=None, kv_cache=True):
    """The best of `num_beams` continuations of each row by summed log-probability.

    Returns (tokens (B, T + n), log-probability of the n new tokens (B,)). The greedy continuation
    always stays among the beams, so the result is never less probable than it.
    """
    B, K, V = idx.size(0), num_beams, model.config.vocab_size
    idx = idx.repeat_interleave(K, dim=0)  # (B * K, T); beam 0 of a row is the greedy one
    score = torch.full((B, K), -torch.inf, device=idx.device)
    score[:, 0] = 0.0  # all beams are alike at first: only one may branch
    ended = torch.zeros(B, K, dtype=torch.bool, device=idx.device)
    cache = KVCache(model, B * K, idx.size(1) + max_new_tokens) if kv_cache else None
    first = torch.arange(B, device=idx.device)[:, None] * K  # (B, 1) row of beam 0
    for _ in range(max_new_tokens):
        logp = F.log_softmax(next_logits(model, idx, cache).float(), dim=-1).view(B, K, V)
        if eos_id is not None:  # an ended beam has one free continuation: more eos
            logp = logp.masked_fill(ended[..., None], -torch.inf)
            logp[..., eos_id].masked_fill_(ended, 0.0)
        total = (score[..., None] + logp).view(B, K * V)
        greedy = total[:, :V].argmax(-1, keepdim=True)  # (B, 1), an index into K * V
        others = total.scatter(1, greedy, -torch.inf).topk(K - 1, dim=1).indices
        chosen = torch.cat((greedy, others), dim=1)  # (B, K)
        score = total.gather(1, chosen)
        rows = (first + chosen // V).flatten()  # the beam that each new one continues
        new = (chosen % V).view(-1, 1)
        idx = torch.cat((idx[rows], new), dim=1)
        if cache is not None:
            held = cache.kv[..., : cache.filled, :]  # in place: a CUDAGraphStep writes there
            held.copy_(held[:, :, rows])
        if eos_id is not None:
            ended = ended.flatten()[rows].view(B, K) | (new.view(B, K) == eos_id)
            if ended.gather(1, score.argmax(dim=1, keepdim=True)).all():  # scores only fall
                break
    best = score.argmax(dim=1, keepdim=True)
    return idx[(first + best).flatten()], score.gather(1, best).flatten()


# ---------------------------------------------------------------------------------------------
# models and prompts


def load_checkpoint(folder):
    """(model, tokenizer, run.json) of a checkpoint of train.py, on the CPU, in eval mode. Raises
    UserError where the folder is damaged or another script's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    folder = Path(folder)
    if wrong := runtime.verify_checksums(folder):
        raise UserError(f"{folder} is damaged: {wrong}; name another --checkpoint")
    with one_line(f"{folder} is no checkpoint of train.py", "a RoBERTa answers train_roberta.py "
                  "--fill_mask, a BERT finetune_mrpc.py --predict",
                  (OSError, ValueError, TypeError, KeyError)):
        saved = runtime.read_run(folder)
        config = GPTConfig(**saved["model"])
    tokenizer = prepare.load_tokenizer(folder)
    model = GPT(config)  # a bug in the model keeps its traceback
    with one_line(f"{folder}/model.safetensors cannot be loaded",
                  "name another --checkpoint; a run of racer.py or of a fork needs its own model",
                  (OSError, RuntimeError, SafetensorError)):  # right checksums, wrong contents
        load_model(model, folder / "model.safetensors")
    return model.eval(), tokenizer, saved


def newest_run():
    """The run of train.py under out/ that was saved last; its checkpoints have meta.json."""
    found = [*Path("out").glob("*/checkpoint-[0-9]*"), *Path("out").glob("*/best")]
    found = [folder for folder in found if (folder / "meta.json").exists()]
    if not found:
        raise UserError("no run under out/; train one: python train.py")
    return max(found, key=lambda checkpoint: checkpoint.stat().st_mtime).parent


def pick_checkpoint(out_dir, name="auto"):
    """The checkpoint folder `name` of a run. 'auto' is the newest, or best/ where that has a
    validation loss lower by 2 % or more."""
    out_dir = Path(out_dir)
    best = out_dir / "best"
    newest = next(iter(runtime.checkpoints(out_dir)), best)
    folder = newest if name in ("auto", "newest") else out_dir / name
    if not folder.is_dir():
        names = ", ".join(p.name for p in sorted(out_dir.glob("*/"))) or "nothing"
        raise UserError(f"--checkpoint {name}: no checkpoint in {out_dir}, which holds {names}; "
                        "train it or name another --out_dir")
    if name == "auto" and best.is_dir():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no loss to compare
            losses = [runtime.read_run(p)["val_loss"] for p in (newest, best)]
            if losses[1] < 0.98 * losses[0]:
                print0(f"val loss {losses[0]:.3f} in the newest checkpoint, {losses[1]:.3f} in "
                       "best/: taking best/; --checkpoint=newest takes the other")
                return best
    return folder


def load_run(out_dir=None, checkpoint="auto"):
    """(model, tokenizer, the run's prompt) of a run of train.py; out_dir None: the newest."""
    folder = pick_checkpoint(out_dir or newest_run(), checkpoint)
    print0(f"sampling from {folder}")
    model, tokenizer, saved = load_checkpoint(folder)
    return model, tokenizer, str(saved.get("train", {}).get("sample_start") or "")


def read_prompt(start):
    """The prompt's text: `start` itself, or the file named after FILE:."""
    try:
        if start.startswith("FILE:"):
            return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8-sig")
        start.encode()  # a terminal of another encoding hands over what is no text
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"the prompt {ascii(start[:99])}: {why}", 2) from error
    return start


def encode_prompt(model, tokenizer, text):
    """The token ids of a prompt; an empty one is the end-of-text token. Raises UserError."""
    ids = tokenizer.encode(text) or [tokenizer.eot_id]
    if ids == [None]:
        raise UserError("this tokenizer has no end-of-text token to begin with; give a prompt", 2)
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"the prompt has token {max(ids)}, past the model's vocabulary of "
                        f"{model.config.vocab_size}")
    return ids


def printable(text):
    """`text` with control characters made visible, so that a model cannot steer the terminal."""
    visible = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"}
    return text.replace("\r\n", "\n").translate(visible | dict.fromkeys(range(127, 160), 0xFFFD))


# ---------------------------------------------------------------------------------------------
# the command line


def complete(model, tokenizer, text, cfg=None):
    """Continue `text`: print it as it is made, then tokens/s. Returns the cfg.num_samples texts."""
    cfg = cfg or Config()
    check_config(cfg)
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device).manual_seed(cfg.seed)
    show = printable if sys.stdout.isatty() else str
    prompt = encode_prompt(model, tokenizer, text)
    shown_prompt = prompt if text else []  # the end-of-text token that opens an empty one is not
    if tokenizer.count_lost(text, shown_prompt):
        print0("warning: the model's vocabulary cannot write this prompt; it sees something else")
    idx = torch.tensor([prompt] * cfg.num_samples, device=device)  # (B, T)
    eos_id = tokenizer.eot_id if cfg.stop_at_eos else None

    def text_of(row):
        ids = row.tolist()[len(prompt) :]
        if eos_id in ids:
            ids = ids[: ids.index(eos_id)]
        return tokenizer.decode(shown_prompt + ids)

    began = time.perf_counter()
    shown = ""
    if cfg.num_beams > 1:
        idx, logp = beam_search(model, idx, cfg.max_new_tokens, cfg.num_beams, eos_id, cfg.kv_cache)
    else:
        for new in stream(model, idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p,
                          eos_id, generator, cfg.kv_cache):
            idx = torch.cat((idx, new), dim=1)
            if cfg.num_samples == 1:
                made = text_of(idx[0]).rstrip("\ufffd\r")  # the rest may be to come
                print(show(made[len(shown) :]), end="", flush=True)
                shown = made
    seconds = time.perf_counter() - began
    texts = [text_of(row) for row in idx]
    if cfg.num_samples == 1:
        print(show(texts[0][len(shown) :]))
    else:
        print("\n".join(f"--- sample {i + 1}\n{show(text)}" for i, text in enumerate(texts)))
    if cfg.num_beams > 1:
        print(f"log-probability {logp[0]:.4f}, {cfg.num_beams} beams")
    count = (idx.size(1) - len(prompt)) * len(texts)
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", flush=True)
    return texts


def interact(model, tokenizer, text, cfg):
    """Continue `text` where there is one, then what is typed, line by line, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # editing and history; Windows has its own
        import readline  # noqa: F401
    sys.stdin.reconfigure(errors="surrogateescape")  # read_prompt reports what is not UTF-8
    print("type the beginning of a text; Ctrl-C stops a text, Ctrl-D ends")
    while True:
        try:
            complete(model, tokenizer, text or read_prompt(input("> ")), cfg)
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(f"error: {error}")
        except EOFError:
            print()
            return
        text = ""


def check_config(cfg):
    """Raise UserError (code 2) for options that cannot be."""
    check_range(cfg, 1, "num_samples", "max_new_tokens", "num_beams", "top_k")
    check_range(cfg, 0, "temperature")
    check_range(cfg, 0, "seed", high=2**63 - 1)
    check_range(cfg, 1e-9, "top_p", high=1)
    if cfg.num_beams > 1 and (cfg.top_k or cfg.top_p or cfg.num_samples > 1):
        raise UserError("--num_beams searches for one text, the likeliest: leave out --top_k, "
                        "--top_p and --num_samples", 2)


def main(cfg):
    """Generate, print, and return the texts (list of str, prompt included; interactive: None)."""
    check_config(cfg)
    given = None if cfg.start is None else read_prompt(cfg.start)
    runtime.tune_allocator()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if cfg.quantize.startswith("int") and str(device) != "cpu":
        raise UserError(f"--quantize={cfg.quantize} runs on a CPU, not on {device}; use bf16", 2)
    if cfg.init_from:
        import convert  # only here: it brings transformers along

        model, start = convert.from_pretrained(cfg.init_from), ""
        tokenizer = convert.load_tokenizer(cfg.init_from)
    else:
        model, tokenizer, start = load_run(cfg.out_dir, cfg.checkpoint)
    model.to(device)
    if cfg.quantize != "none":
        import fast  # only here: sample.py works without the file

        fast.quantize(model, cfg.quantize)
    if cfg.interactive:
        return interact(model, tokenizer, given or "", cfg)
    return complete(model, tokenizer, start if given is None else given, cfg)


if __name__ == "__main__":
    runtime.run_script(main, CFG)
