"""KantaiBERT: a tokenizer and a RoBERTa from scratch on one text, with transformers' Trainer.

    python train_roberta.py config/kantaibert_small.py    # about 3 minutes on 2 CPU cores
    python train_roberta.py config/kantaibert.py          # the book's model, 84M parameters
    python train_roberta.py --source=my.txt --out_dir=out/mine
    python train_roberta.py config/kantaibert_small.py --fill_mask "Reason is <mask>."
    torchrun --nproc_per_node 2 train_roberta.py ...      # GPUs or CPUs; batch x 2

out_dir becomes a transformers folder (AutoTokenizer and AutoModelForMaskedLM load it), beside
checkpoint-* folders, run.json, log.csv and loss.png.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from configurator import at_least, changed, fail, load


@dataclass
class Config:
    """Train a RoBERTa and its tokenizer on a text, then let it fill in a masked word."""

    # text and tokenizer
    source: str = "kant"  # preset, file, folder, 'glob/*.txt' or URL; blank lines are skipped
    tokenizer: str | None = None  # tokenizer folder or tokenizer.json; None: train one on the text
    vocab_size: int = 52_000  # of the tokenizer trained here, at most: a small text gives fewer
    block_size: int = 128  # tokens an example at most, <s> and </s> included
    packing: bool = False  # False: an example is a line; True: lines joined into full blocks
    mlm_probability: float = 0.15  # share of the tokens to predict
    val_fraction: float = 0.1  # share of the lines held out for evaluation: the last ones
    # model
    n_layer: int = 6
    n_head: int = 12
    n_embd: int = 768
    max_position_embeddings: int = 514  # 512 tokens: RoBERTa's first position is number 2
    dropout: float = 0.1
    init_std: float = 0.02  # of the first weights; a narrow model learns sooner with more
    # training
    max_epochs: float = 1.0  # passes over the examples; also the length of the schedule
    max_steps: int = 0  # updates after which to stop, the schedule unchanged; 0: the whole recipe
    batch_size: int = 64  # examples a micro-batch, on each process
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5  # then linear to zero
    warmup_steps: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    mixed_precision: Literal["auto", "fp16", "bf16", "no"] = "auto"  # auto: bf16 where it is fast
    # run
    out_dir: str = "out/kantaibert"
    data_dir: str = "data"  # downloads go into its folder kant, or roberta for another URL
    seed: int = 1337
    resume: bool = False  # go on from the newest checkpoint in out_dir
    overwrite: bool = False  # start again although out_dir holds checkpoints
    log_steps: int = 10
    eval_steps: int = 500  # and at the end
    save_steps: int = 10_000  # and at the end
    save_total_limit: int = 2  # newest checkpoints kept
    fill_mask: str = ""  # text with <mask>: only fill it in, with the finished run in out_dir


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import contextlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import broadcast_object_list
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaConfig, RobertaTokenizer

import prepare
import runtime
from runtime import say

FIXED = "n_layer n_head n_embd max_position_embeddings vocab_size block_size packing".split()
COLUMNS = [*runtime.LOG_COLUMNS, "val_accuracy"]


# ---------------------------------------------------------------------------------------------
# text -> tokenizer -> examples -> batches


def read_lines(paths):
    """Yield the lines that are not blank, without byte-order mark and line end."""
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig") as f:
                yield from (line.rstrip("\n") for line in f if not line.isspace())
        except UnicodeDecodeError as error:
            fail(f"{path} is not UTF-8: it holds byte {error.object[error.start]:#04x}; "
                 f"convert it: iconv -f ENCODING -t utf-8 {path}")  # fmt: skip
        except OSError as error:
            fail(f"{path} cannot be read: {error.strerror}")


def train_tokenizer(lines, vocab_size, folder):
    """Train a byte-level BPE and write it into `folder`, as the book does: two files."""
    bpe, specials = ByteLevelBPETokenizer(), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(lines, vocab_size, 2, special_tokens=specials, show_progress=False)
    bpe.save_model(str(folder))


def open_tokenizer(path, cfg):
    """The transformers tokenizer in a folder (or its tokenizer.json); none of its code is run.

    A folder with only vocab.json and merges.txt is RoBERTa's. Exits with code 1 where it cannot be
    read or lacks what masked language modelling needs.
    """
    if not Path(path).exists():
        fail(f"--tokenizer {path}: no such folder or tokenizer.json")
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    try:
        if (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
            mask = AddedToken("<mask>", lstrip=True, special=True)  # takes the space before it
            names = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
            tokenizer = RobertaTokenizer(**names, mask_token=mask)
        else:
            only_here = {"local_files_only": True, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(folder, **only_here)
        engine = tokenizer.backend_tokenizer
    except Exception as error:  # the tokenizers library raises nothing more precise
        fail(f"--tokenizer {path} cannot be read as a tokenizer: {error}")
    needs = [f"{name}_token" for name in ("cls", "sep", "pad", "mask")]
    if missing := [name for name in needs if getattr(tokenizer, name) is None]:
        fail(f"--tokenizer {path} has no {', '.join(missing)}; leave it out to train one")
    engine.no_truncation()
    engine.no_padding()
    tokenizer.model_max_length = cfg.max_position_embeddings - tokenizer.pad_token_id - 1
    if cfg.block_size > tokenizer.model_max_length:  # positions start behind the padding's id
        fail(f"--tokenizer {path} pads with token {tokenizer.pad_token_id}; --block_size "
             f"{cfg.block_size} and --max_position_embeddings {cfg.max_position_embeddings} then "
             f"do not go together", 2)  # fmt: skip
    return tokenizer


def encode(lines, tokenizer, block_size, packing):
    """Lines -> the examples, a list of integer arrays of 1 to block_size - 2 tokens, no <s> </s>.

    Packed, the lines are one text joined by spaces, cut into full blocks; the last block reaches
    back into the one before it, so that it is full too.
    """
    room, engine, rows = block_size - 2, tokenizer.backend_tokenizer, []
    engine.encode_special_tokens = True  # "<mask>" in a text is text
    for at in range(0, len(lines), 4096):
        some = [" " + x.strip() if packing else x for x in lines[at : at + 4096]]
        some = engine.encode_batch_fast(some, add_special_tokens=False)
        rows += [np.array(row.ids, dtype=np.int32) for row in some]
    engine.encode_special_tokens = False
    if packing and rows:
        text = np.concatenate(rows)
        rows = [text[i : i + room] for i in range(0, len(text) - room + 1, room)]
        rows += [text[-room:]] if len(text) % room else []
    if longer := sum(len(row) > room for row in rows):
        say(f"{longer:,} line(s) longer than --block_size {block_size} are cut there; "
            "--packing=True keeps all of a line")  # fmt: skip
    return [row[:room] for row in rows if len(row)]


class Masked(torch.utils.data.Dataset):
    """masked[epoch, i]: example i as (ids, labels), between <s> and </s>, masked BERT's way.

    mlm_probability of the tokens are to predict: 80 % of them become <mask>, 10 % a random token,
    10 % stay (arXiv:1810.04805). It depends on (seed, epoch, i) alone, so neither the batch size
    nor the processes nor a resume change it. Labels are -100 where nothing is to predict.
    """

    def __init__(self, examples, tokenizer, cfg):
        self.examples, self.tokenizer, self.size = examples, tokenizer, len(tokenizer)
        self.seed, self.share = cfg.seed, cfg.mlm_probability

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        epoch, i = key
        ids, random = self.examples[i].copy(), np.random.default_rng((self.seed, epoch, i))
        chosen, fate = random.random((2, len(ids)))
        chosen = chosen < self.share
        labels = np.where(chosen, ids, -100)
        ids[chosen & (fate < 0.8)] = self.tokenizer.mask_token_id
        swapped = chosen & (fate >= 0.9)
        ids[swapped] = random.integers(self.size, size=swapped.sum())
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return np.r_[first, ids, last], np.r_[-100, labels, -100]


class Order(torch.utils.data.Sampler):
    """(epoch, i) of every example of a run: a fresh permutation each epoch, from epoch 1, and on
    over epoch ends, so that every batch is full. A function of (seed, place in the run) alone."""

    def __init__(self, examples, length, seed):
        self.examples, self.length, self.seed = examples, length, seed

    def __len__(self):
        return self.length

    def __iter__(self):
        for place in range(self.length):
            epoch, at = divmod(place, self.examples)
            if at == 0:
                shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.examples)
            yield epoch + 1, int(shuffled[at])


def collate(pairs, pad_id):
    """(ids, labels) pairs -> one batch without padding to speak of: several short examples share a
    row (first fit, rows of 64 tokens or of the longest example) and do not see each other.

    Returns input_ids, labels, position_ids and segments, each (R, T); segments numbers the
    examples of a row from 1, and is 0 on padding.
    """
    room, rows = max(64, *(len(ids) for ids, _ in pairs)), []
    for pair in pairs:
        row = next((r for r in rows if r[0] + len(pair[0]) <= room), None)
        if row is None:
            rows.append(row := [0, []])
        row[0] += len(pair[0])
        row[1].append(pair)
    shape = len(rows), -(-max(used for used, _ in rows) // 8) * 8  # (R, T), T as GPUs like it
    fills = {"input_ids": pad_id, "labels": -100, "position_ids": pad_id, "segments": 0}
    batch = {name: np.full(shape, fill, dtype=np.int64) for name, fill in fills.items()}
    for r, (_, members) in enumerate(rows):
        at = 0
        for number, (ids, labels) in enumerate(members, 1):
            here = r, slice(at, at + len(ids))
            batch["input_ids"][here], batch["labels"][here] = ids, labels
            batch["position_ids"][here] = pad_id + 1 + np.arange(len(ids))
            batch["segments"][here] = number
            at += len(ids)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


# ---------------------------------------------------------------------------------------------
# model and Trainer


class RobertaForMaskedLM(transformers.RobertaForMaskedLM):
    """transformers' own, except that the vocabulary head sees only the positions to predict.

    The name is kept: it is what config.json tells other programs to load.
    """

    def forward(self, input_ids, segments=None, labels=None, num_items_in_batch=None, **kwargs):
        """Without `segments` transformers' own. With: the loss is summed over the M positions to
        predict, divided by `num_items_in_batch` (None: M), and the logits are (M, vocabulary)."""
        if segments is None:
            return super().forward(input_ids, labels=labels, **kwargs)
        same = segments[:, None, :, None] == segments[:, None, None, :]  # (R, 1, T, T)
        hidden = self.roberta(input_ids, attention_mask=same, **kwargs)[0]  # (R, T, C)
        chosen = labels != -100
        logits = self.lm_head(hidden[chosen]).float()  # (M, V)
        loss = F.cross_entropy(logits, labels[chosen], reduction="sum")
        count = chosen.sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(count).clamp(min=1)  # a short line may have none
        return transformers.modeling_outputs.MaskedLMOutput(loss=loss, logits=logits)


def make_model(cfg, vocab_size, special):
    """A fresh model. special: the ids of <s>, <pad> and </s>."""
    bos, pad, eos = special
    return RobertaForMaskedLM(RobertaConfig(
        vocab_size=vocab_size, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
        hidden_size=cfg.n_embd, intermediate_size=4 * cfg.n_embd, type_vocab_size=1,
        max_position_embeddings=cfg.max_position_embeddings, initializer_range=cfg.init_std,
        hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=cfg.dropout,
        bos_token_id=bos, pad_token_id=pad, eos_token_id=eos))  # fmt: skip


def learning_rate(t, cfg, recipe_steps):
    """The rate of update t (from 0): warm-up from above 0, then linear to zero over the recipe.
    Past the recipe the last rate stays. A function of t and the settings: nothing to restore."""
    if t < cfg.warmup_steps:
        return cfg.learning_rate * (t + 1) / (cfg.warmup_steps + 1)
    span = max(recipe_steps - cfg.warmup_steps, 1)
    return cfg.learning_rate * max(recipe_steps - t, 1) / span


class Trainer(transformers.Trainer):
    """The Trainer with this project's order of examples, evaluation and checkpoints."""

    def __init__(self, cfg, examples, **kwargs):
        self.cfg, self.examples, self.bad_in_a_row = cfg, examples, 0
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset=None):
        return Order(len(self.train_dataset), self.examples, self.cfg.seed)

    def _clip_grad_norm(self, model):
        """Clip; skip an update whose gradient is not finite, and stop after ten in a row."""
        norm = super()._clip_grad_norm(model)
        self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
        if self.bad_in_a_row:
            model.zero_grad()  # no gradient: the optimizer leaves every weight as it is
        if self.bad_in_a_row == 10:
            fail(f"step {self.state.global_step}: 10 updates in a row had a non-finite gradient; "
                 "go on with --resume=True and a lower --learning_rate")  # fmt: skip
        return norm

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss and accuracy over all masked tokens of the held-out lines and, for train_loss, of as
        many training examples; the masks are the same each time, no random state is touched."""
        self.model.eval()
        metrics, rank, size = {}, self.args.process_index, self.cfg.batch_size
        n_train, n_val = len(self.train_dataset), len(self.eval_dataset)
        some = range(0, n_train, max(1, n_train // (n_val or n_train)))
        splits = ("train", self.train_dataset, some), ("val", self.eval_dataset, range(n_val))
        for name, data, chosen in splits:
            total = torch.zeros(3, device=self.args.device)  # summed loss, hits, masked tokens
            for at in range(rank * size, len(chosen), self.args.world_size * size):
                batch = self.data_collator([data[0, i] for i in chosen[at : at + size]])
                batch = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    out = self.model(**batch, num_items_in_batch=1)
                answers = batch["labels"][batch["labels"] != -100]  # (M,)
                hits = (out.logits.argmax(-1) == answers).sum()
                total += torch.stack([out.loss, hits.float(), out.loss.new_tensor(len(answers))])
            loss, hits, count = self.accelerator.reduce(total).tolist()
            if count:
                metrics |= {f"{name}_loss": loss / count, f"{name}_accuracy": hits / count}
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model, trial):
        """Write into a folder beside it, which gets the name checkpoint-STEP once it is whole."""
        with runtime.disk_errors(self.args.output_dir):
            self._write_checkpoint()
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self):
        final = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        beside = final.with_name(f".tmp-{final.name}")
        self.save_model(str(beside), _internal_call=True)
        self._save_optimizer_and_scheduler(str(beside))
        self._save_scaler(str(beside))  # no random state: Diary seeds every update
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (beside / "training_args.bin").unlink()  # a pickle, and nothing here reads it
            (beside / "run.json").write_text(json.dumps(asdict(self.cfg), indent=2) + "\n")
            self.state.save_to_json(str(beside / "trainer_state.json"))
            runtime.seal_folder(beside, final)
            for old in runtime.checkpoints(final.parent)[self.cfg.save_total_limit :]:
                runtime.remove(old)


class Diary(transformers.TrainerCallback):
    """What happens around an update: its rate and seed before it; signals and the log after it."""

    def __init__(self, cfg, recipe_steps, accelerator, stop):
        self.cfg, self.recipe_steps, self.accelerator = cfg, recipe_steps, accelerator
        self.stop, self.signum, self.seconds = stop, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.folder = state.is_world_process_zero, Path(args.output_dir)
        if self.first:
            with runtime.disk_errors(self.folder):
                self.write = runtime.open_log(self.folder / "log.csv", COLUMNS, state.global_step)
        self.bar = runtime.progress_bar(state.max_steps, state.global_step, shown=self.first)
        self.say = say if self.bar.disable else self.bar.write
        self.tokens, self.clock = state.num_input_tokens_seen, time.perf_counter()

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.rate = learning_rate(state.global_step, self.cfg, self.recipe_steps)
        for group in optimizer.param_groups:
            group["lr"] = self.rate
        place = np.random.SeedSequence((self.cfg.seed, state.global_step, args.process_index))
        torch.manual_seed(int(place.generate_state(1)[0]))  # dropout: a function of the place

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.clock
        self.clock = time.perf_counter()
        seen = self.accelerator.gather(torch.tensor([self.stop.signum], device=args.device))
        self.signum = int(seen.max())  # a signal to one process stops all, after the same update
        if self.signum:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        control.should_log |= control.should_evaluate or control.should_training_stop
        self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        if not self.first or "loss" not in logs:  # the Trainer's summary at the end has none
            return
        speed = (state.num_input_tokens_seen - self.tokens) / self.seconds
        self.tokens, self.seconds = state.num_input_tokens_seen, 0.0
        self.row = {"iter": state.global_step, "tokens": self.tokens, "lr": self.rate,
                    "loss": logs["loss"], "grad_norm": logs["grad_norm"],
                    "tokens_per_s": round(speed)}  # fmt: skip
        self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s")
        if self.bar.disable:
            say(f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, "
                f"lr {self.rate:.2e}, {speed:,.0f} tokens/s")  # fmt: skip
        if not control.should_evaluate:  # else the row waits for on_evaluate
            with runtime.disk_errors(self.folder):
                self.write(self.row)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.first:
            with runtime.disk_errors(self.folder):
                self.write({**self.row, **{k: v for k, v in metrics.items() if k in COLUMNS}})
                runtime.plot_log(self.folder / "log.csv", self.folder / "loss.png")
            self.say(f"step {state.global_step}: " + "; ".join(
                f"{name} loss {metrics[f'{name}_loss']:.4f}, perplexity "
                f"{math.exp(min(metrics[f'{name}_loss'], 700)):.2f}, masked accuracy "
                f"{metrics[f'{name}_accuracy']:.1%}"
                for name in ("train", "val") if f"{name}_loss" in metrics))  # fmt: skip
        self.clock = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.clock = time.perf_counter()


# ---------------------------------------------------------------------------------------------
# the run


def fill_mask(text, folder):
    """Print the five likeliest tokens for each <mask> of `text`, by the model in `folder`."""
    only_here = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **only_here)
        model = AutoModelForMaskedLM.from_pretrained(folder, **only_here).eval()
    except Exception as error:  # OSError, ValueError, RuntimeError, KeyError, SafetensorError ...
        fail(f"{folder} holds no masked language model that can be read: {error}")
    inputs = tokenizer(text, return_tensors="pt")
    at = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not at or inputs["input_ids"].shape[1] > tokenizer.model_max_length:
        fail(f"--fill_mask {text[:50]!r} must hold {tokenizer.mask_token} and at most "
             f"{tokenizer.model_max_length} tokens", 2)  # fmt: skip
    with torch.no_grad():
        scores = model(**inputs).logits[0, at].float().softmax(-1)  # (masks, V)
    say(text)
    scores, tokens = scores.topk(min(5, scores.shape[1]))
    for number in range(len(at)):
        if len(at) > 1:
            say(f"mask {number + 1}:")
        for score, token in zip(scores[number].tolist(), tokens[number].tolist(), strict=True):
            say(f"  {score:.4f}  {tokenizer.decode([token])!r}")


def check(cfg):
    """Exit with code 2 unless the numbers of `cfg` make sense together."""
    at_least(cfg, 1, "n_layer", "n_head", "n_embd", "batch_size", "gradient_accumulation_steps",
             "log_steps", "eval_steps", "save_steps", "save_total_limit")  # fmt: skip
    at_least(cfg, 0, "max_steps", "warmup_steps", "weight_decay", "learning_rate", "seed",
             "dropout", "val_fraction", "mlm_probability", "max_epochs", "grad_clip")  # fmt: skip
    at_least(cfg, 3, "block_size")  # <s>, a token, </s>
    at_least(cfg, 261, "vocab_size")  # 256 bytes and 5 special tokens
    for name in ("dropout", "val_fraction", "mlm_probability"):
        if getattr(cfg, name) >= 1:
            fail(f"--{name} must be below 1, not {getattr(cfg, name)}", 2)
    for name in ("max_epochs", "mlm_probability", "grad_clip"):
        if not getattr(cfg, name):
            fail(f"--{name} must be above 0", 2)
    if cfg.block_size + 2 > cfg.max_position_embeddings:
        fail(f"--block_size {cfg.block_size} needs --max_position_embeddings {cfg.block_size + 2} "
             f"or more, not {cfg.max_position_embeddings}", 2)  # fmt: skip
    if cfg.n_embd % cfg.n_head:
        fail(f"--n_embd {cfg.n_embd} is no multiple of --n_head {cfg.n_head}", 2)


def choose_start(cfg):
    """Apply --resume and --overwrite to out_dir; the checkpoint to start from (str), or None."""
    out_dir, found = Path(cfg.out_dir), runtime.start_run(cfg.out_dir, cfg.resume, cfg.overwrite)
    for checkpoint in found:
        if not (wrong := runtime.damage(checkpoint)):
            old = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
            for name in FIXED:
                if old[name] != (new := getattr(cfg, name)):
                    fail(f"--{name} is {new} but {checkpoint} was trained with {old[name]}; "
                         "resume with that, or start again with --overwrite=True")  # fmt: skip
            return str(checkpoint)
        say(f"warning: {checkpoint}: {wrong}; trying the one before")
    if found:
        fail(f"no checkpoint in {out_dir} is whole; start again with --overwrite=True")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (out_dir / name).unlink(missing_ok=True)  # of the run before
    return None


def run(cfg, accelerator, lines, stop):
    """Train on `lines` in cfg.out_dir, which is locked, and fill in a first mask."""
    out_dir, first = Path(cfg.out_dir), accelerator.is_main_process

    # ---- where to start, tokenizer: the first process acts, the others wait for it
    tokenizer, start = cfg.tokenizer and open_tokenizer(cfg.tokenizer, cfg), [None]
    if first:
        with runtime.disk_errors(out_dir):
            start = [choose_start(cfg)]
            (out_dir / "run.json").write_text(json.dumps(asdict(cfg), indent=2) + "\n")
            if not start[0] and not tokenizer:
                train_tokenizer(lines, cfg.vocab_size, out_dir)
    start = broadcast_object_list(start)[0]
    if start or not tokenizer:
        tokenizer = open_tokenizer(start or out_dir, cfg)

    # ---- examples, model
    n_val = max(1, int(len(lines) * cfg.val_fraction)) if cfg.val_fraction and lines[1:] else 0
    train_set, val_set = (
        Masked(encode(some, tokenizer, cfg.block_size, cfg.packing), tokenizer, cfg)
        for some in (lines[: len(lines) - n_val], lines[len(lines) - n_val :]))  # fmt: skip
    per_update = cfg.batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
    if not len(train_set):
        fail(f"--source {cfg.source} holds nothing that --tokenizer {cfg.tokenizer} can encode")
    recipe_steps = math.ceil(len(train_set) * cfg.max_epochs / per_update)
    steps = cfg.max_steps or recipe_steps
    torch.manual_seed(cfg.seed)
    special = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    model = make_model(cfg, len(tokenizer), special)
    say("configuration:", ", ".join(f"{k}={v!r}" for k, v in changed(cfg).items()) or "defaults")
    device = accelerator.device
    say(f"{device.type} x {accelerator.num_processes}, precision {accelerator.mixed_precision}; "
        f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}; {len(lines):,} "
        f"lines: {len(train_set):,} examples to train on, {len(val_set):,} held out; "
        f"{steps:,} steps of {per_update} examples")  # fmt: skip
    if steps > recipe_steps:
        say(f"--max_steps {steps} is more than the recipe's {recipe_steps}: beyond it the learning "
            "rate stays where it ended; --max_epochs stretches the recipe instead")  # fmt: skip

    # ---- training
    args = transformers.TrainingArguments(
        output_dir=str(out_dir), seed=cfg.seed, use_cpu=device.type == "cpu", report_to="none",
        accelerator_config={"use_configured_state": True},  # the one made above
        bf16=accelerator.mixed_precision == "bf16", fp16=accelerator.mixed_precision == "fp16",
        per_device_train_batch_size=cfg.batch_size, max_steps=steps,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        lr_scheduler_type="constant", weight_decay=cfg.weight_decay,  # the rate: see Diary
        max_grad_norm=cfg.grad_clip, logging_steps=cfg.log_steps, logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=cfg.eval_steps, save_steps=cfg.save_steps,
        include_num_input_tokens_seen="non_padding", remove_unused_columns=False,
        ddp_find_unused_parameters=False, dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True, log_level="error")  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # a process a GPU: no DataParallel behind one's back
    diary = Diary(cfg, recipe_steps, accelerator, stop)
    trainer = Trainer(
        cfg, steps * per_update, model=model, args=args, callbacks=[diary],
        train_dataset=train_set, eval_dataset=val_set, processing_class=tokenizer,
        data_collator=lambda pairs: collate(pairs, tokenizer.pad_token_id))  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=start)
    if diary.signum:
        say(f"saved at step {trainer.state.global_step}; go on with --resume=True")
        raise SystemExit(128 + diary.signum)

    # ---- the finished model becomes out_dir's own, file by file, and answers a first question
    with runtime.disk_errors(out_dir):
        trainer.save_model(str(out_dir / ".tmp-final"))
        if first:
            tokenizer.backend_tokenizer.model.save(str(out_dir / ".tmp-final"))  # vocab, merges
            (out_dir / ".tmp-final/training_args.bin").unlink()
            for path in (out_dir / ".tmp-final").iterdir():
                path.replace(out_dir / path.name)
            (out_dir / ".tmp-final").rmdir()
    if first:
        fill_mask(f"Human thinking involves human {tokenizer.mask_token}.", out_dir)
    accelerator.wait_for_everyone()


def main(cfg):
    """Train as `cfg` says; or, with cfg.fill_mask, ask the run that is there."""
    check(cfg)
    transformers.logging.disable_progress_bar()
    if cfg.fill_mask:
        finished = (Path(cfg.out_dir) / "model.safetensors").exists()
        found = [cfg.out_dir] if finished else runtime.checkpoints(cfg.out_dir)
        if not found:
            fail(f"--fill_mask asks a finished run, and {cfg.out_dir} holds none; train it first: "
                 "the same command without --fill_mask")  # fmt: skip
        return fill_mask(cfg.fill_mask, found[0])
    accelerator = runtime.make_accelerator(cfg.mixed_precision)
    raw_dir = Path(cfg.data_dir, cfg.source if cfg.source in prepare.PRESETS else "roberta")
    with accelerator.main_process_first():  # it downloads, the others find the file
        lines = list(read_lines(prepare.source_files(cfg.source, raw_dir)))
    if not lines:
        fail(f"--source {cfg.source} holds no text: every line is blank")
    with contextlib.ExitStack() as at_the_end:
        if accelerator.is_main_process:
            at_the_end.callback(runtime.lock_folder(cfg.out_dir).release)
        stop = runtime.StopSignal()
        at_the_end.callback(stop.release)
        run(cfg, accelerator, lines, stop)


if __name__ == "__main__":
    main(CFG)
