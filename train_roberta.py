"""KantaiBERT: a tokenizer and a RoBERTa from scratch on one text, with Hugging Face's Trainer.

    python train_roberta.py config/kantaibert_small.py    # about a minute on 2 CPU cores
    python train_roberta.py config/kantaibert.py          # the book's model, 84M parameters
    python train_roberta.py --source=my.txt --out_dir=out/mine
    python train_roberta.py --out_dir=out/mine --resume   # continue from the newest checkpoint
    python train_roberta.py config/kantaibert_small.py --fill_mask "Reason is <mask>."
    torchrun --nproc_per_node 2 train_roberta.py ...      # GPUs or CPUs; batch x 2

out_dir ends as a transformers folder (AutoTokenizer and AutoModelForMaskedLM load it), beside
checkpoint-* folders, run.json, log.csv and loss.png. Read train(), near the end, first.
"""

from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

from configurator import changed, load


@dataclass
class Config:
    """Train a RoBERTa and its tokenizer on a text, then let it fill in a masked word."""

    # text and tokenizer
    source: str = "kant"  # file, folder, 'glob/*.txt', URL or preset (none of the hub's)
    tokenizer: str | None = None  # tokenizer folder or tokenizer.json; None: train one on the text
    vocab_size: int = 52_000  # of the tokenizer trained here, at most: a small text gives fewer
    block_size: int = 128  # tokens an example at most, <s> and </s> included
    packing: bool = False  # False: an example is a line; True: a full block of the joined lines
    mlm_probability: float = 0.15  # share of the tokens to predict; evaluation is always at 0.15
    val_fraction: float = 0.1  # share of the lines held out for evaluation: the last ones
    # model
    n_layer: int = 6  # blocks
    n_head: int = 12  # heads a block
    n_embd: int = 768  # width
    max_position_embeddings: int = 514  # 512 tokens: RoBERTa's first position is number 2
    dropout: float = 0.1  # of activations and attention
    init_std: float = 0.02  # of the initial weights
    local_heads: bool = False  # heads begin by looking at neighbours: no plateau at the start
    # one iteration = one update of batch_size x gradient_accumulation_steps x processes examples
    max_epochs: float = 1.0  # passes over the examples; also the length of the schedule
    max_iters: int = 0  # iterations after which to stop, the schedule unchanged; 0: all of it
    batch_size: int = 64  # examples of a micro-batch on each process
    gradient_accumulation_steps: int = 1  # micro-batches an update
    learning_rate: float = 5e-5  # at its peak, then linear to zero
    muon_lr: float | None = None  # that of Muon, for hidden matrices; None: AdamW for all
    warmup_iters: int = 0  # iterations of linear warm-up from zero
    weight_decay: float = 0.0  # of matrices; with muon_lr of the hidden ones
    grad_clip: float = 1.0  # norm the gradient is clipped to; 0: not clipped
    mixed_precision: Literal["auto", "fp16", "bf16", "no"] = "auto"  # auto: bf16 where it is fast
    # run: how often to log, evaluate and save; how many checkpoints to keep
    out_dir: str = "out/kantaibert"
    data_dir: str = "data"  # downloads go into its folder kant (a preset's name) or roberta
    seed: int = 1337  # of the weights, the order, the masks and dropout
    resume: bool = False  # continue from the newest intact checkpoint in out_dir
    overwrite: bool = False  # start again in an out_dir that holds a run
    log_interval: int = 10  # iterations between rows of log.csv
    eval_interval: int = 500  # iterations between evaluations; 0: only at the end
    save_interval: int = 10_000  # iterations, 0: none; besides: every 15 minutes and at the end
    keep_checkpoints: int = 2  # newest ones kept
    fill_mask: str = ""  # text with <mask>: only fill it in, with the run in out_dir
    RETIRED: ClassVar = {"optimizer": "--muon_lr",
                         "max_steps": "--max_iters", "warmup_steps": "--warmup_iters",
                         "log_steps": "--log_interval", "eval_steps": "--eval_interval",
                         "save_steps": "--save_interval", "save_total_limit": "--keep_checkpoints"}


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import hashlib
import json
import math
import re
import shutil
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_model
from tokenizers import AddedToken
from torch.nn.utils.rnn import pad_sequence

import prepare
import runtime
from runtime import UserError, check_range, disk_errors, first_line, one_line, print0

try:  # torch.optim.Muon, faster on some CPUs
    from fast import Muon
except ModuleNotFoundError:
    from torch.optim import Muon

MASK = AddedToken("<mask>", lstrip=True, special=True)  # takes the space before it along
EVAL_PROBABILITY = 0.15  # of masking, whatever the training's, so that validation losses compare
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
               "vocab.txt", "model.safetensors")  # of a transformers folder; the weights last
FIXED = ("n_layer", "n_head", "n_embd", "max_position_embeddings", "block_size", "packing",
         "val_fraction", "seed", "init_std", "weight_decay", "local_heads")  # for a resumed run

# ---------------------------------------------------------------------------------------------
# text -> tokenizer -> examples -> batches


def read_lines(paths):
    """Yield the lines that are not blank, without byte-order mark and line end."""
    for path in paths:
        with open(path, encoding="utf-8-sig") as f:
            lines = "".join(prepare.read_pieces(f)).split("\n")
        yield from (line for line in lines if line.strip())


def train_tokenizer(lines, vocab_size):
    """Train RoBERTa's tokenizer, a byte-level BPE, on the lines, as the book does."""
    # The time grows with the square of a word's length: cut what is longer than any word.
    pieces = (piece for line in lines for piece in re.findall(r"\s*\S{1,1000}", line))
    ids = {name: i for i, name in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
    blank = transformers.RobertaTokenizer(ids, [], mask_token=MASK)
    return blank.train_new_from_iterator(pieces, vocab_size, min_frequency=2, show_progress=False)


def open_tokenizer(path):
    """The transformers tokenizer in a folder; vocab.json and merges.txt alone are RoBERTa's."""
    folder = Path(path)
    if folder.is_file() and folder.name in ("tokenizer.json", "vocab.json"):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"--tokenizer {path} is no folder, and no tokenizer.json in one", 2)
    with one_line(f"--tokenizer {path} cannot be read"):  # tokenizers raises plain Exceptions
        if (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
            tokenizer = transformers.RobertaTokenizer.from_pretrained(folder, mask_token=MASK)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    for name in ("cls_token", "sep_token", "pad_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"--tokenizer {path} has no {name}; leave it out")
    if tokenizer("").input_ids != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
        raise UserError(f"--tokenizer {path} does not put {tokenizer.cls_token} and "
                        f"{tokenizer.sep_token} around a text; give it such a post_processor")
    return tokenizer


def encode(lines, tokenizer, block_size, packing):
    """Lines -> the examples, a list of integer arrays of 1 to block_size - 2 tokens, no <s> </s>.
    Packed, they are one text joined by spaces, cut into full blocks."""
    longest = block_size - 2
    if packing:
        lines = [" " + line.strip() for line in lines]
    engine = tokenizer.backend_tokenizer
    engine.encode_special_tokens = True  # "<mask>" in a text is text
    examples = []
    for i in range(0, len(lines), 4096):  # an Encoding is many times larger than its ids
        encodings = engine.encode_batch_fast(lines[i : i + 4096], add_special_tokens=False)
        examples += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
    engine.encode_special_tokens = False
    if packing and examples:
        text = np.concatenate(examples)
        examples = [text[i : i + longest] for i in range(0, len(text) - longest + 1, longest)]
        if len(text) % longest:
            examples.append(text[-longest:])  # it reaches back into the one before, to be full
    cut = sum(len(ids) > longest for ids in examples)
    if cut:
        print0(f"{cut:,} line(s) are cut at --block_size {block_size}; --packing keeps all of them")
    return [ids[:longest] for ids in examples if len(ids)]


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """The permutation of 0..n-1 in which an epoch visits the examples."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class MaskedDataset(torch.utils.data.Dataset):
    """The examples of a whole run one after another, as (ids, labels) masked BERT's way.

    Each epoch is a fresh permutation, or without `length`, for evaluation, one pass in order.
    Masks and order depend on (seed, k) alone: neither batch size, processes nor a resume change
    them. Labels are -100 where nothing is to predict.
    """

    def __init__(self, examples, tokenizer, seed, probability, length=None):
        self.examples, self.tokenizer = examples, tokenizer
        self.seed, self.probability, self.length = seed, probability, length

    def __len__(self):
        return self.length or len(self.examples)

    def __getitem__(self, k):
        epoch, i = divmod(k, len(self.examples))
        if self.length is not None:
            epoch += 1  # 0 is the evaluation's
            i = int(epoch_order(self.seed, epoch, len(self.examples))[i])
        ids = self.examples[i].astype(np.int64)
        random = np.random.default_rng((self.seed, epoch, i))
        masked, action = random.random((2, len(ids)))
        masked = masked < self.probability
        labels = np.where(masked, ids, -100)
        # 80 % become <mask>, 10 % a random token, 10 % stay as they are (arXiv:1810.04805)
        ids[masked & (action < 0.8)] = self.tokenizer.mask_token_id
        swapped = masked & (action >= 0.9)
        ids[swapped] = random.integers(len(self.tokenizer), size=swapped.sum())
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return np.r_[first, ids, last], np.r_[-100, labels, -100]


def collate(examples, pad_id):
    """B (ids, labels) pairs -> one batch that row sharing keeps almost free of padding: short
    examples share a row (first fit, rows of 64 tokens or of the longest example) and do not see
    each other. --packing is another thing: it makes examples of full length.

    Returns input_ids, position_ids and segments, each (R, T): segments numbers the examples from 1
    and is 0 on padding; labels and where, each (B, L): where each label's token is in R x T.
    """
    longest = max(len(ids) for ids, _ in examples)
    width = -(-max(64, longest) // 8) * 8  # a multiple of 8, as GPUs like it
    tokens = torch.full((len(examples), width), pad_id)  # as if each example had a row
    positions = tokens.clone()
    segments = torch.zeros_like(tokens)
    used = [0] * len(examples)  # tokens in each row so far
    where = []
    for number, (ids, _) in enumerate(examples, 1):
        row = next(r for r, n in enumerate(used) if n + len(ids) <= width)
        columns = torch.arange(used[row], used[row] + len(ids))
        tokens[row, columns] = torch.from_numpy(ids)
        positions[row, columns] = pad_id + 1 + torch.arange(len(ids))  # as RoBERTa counts
        segments[row, columns] = number
        where.append(row * width + columns)
        used[row] += len(ids)
    R = sum(n > 0 for n in used)
    labels = [torch.from_numpy(labels) for _, labels in examples]
    return {"input_ids": tokens[:R], "position_ids": positions[:R], "segments": segments[:R],
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "where": pad_sequence(where, batch_first=True)}


# ---------------------------------------------------------------------------------------------
# model and measures


class RobertaForMaskedLM(transformers.RobertaForMaskedLM):
    """transformers' own, except that the vocabulary head sees only the positions to predict. The
    name is kept: it is what config.json tells other programs to load."""

    def forward(self, input_ids, segments=None, labels=None, where=None, num_items_in_batch=None,
                **kwargs):
        """Given a batch of collate(): logits (M, V) of the M positions to predict and their loss,
        a sum over `num_items_in_batch`, which the Trainer counts over a whole update (None: M)."""
        if segments is None:
            return super().forward(input_ids, labels=labels, **kwargs)
        same = segments[:, None, :, None] == segments[:, None, None, :]  # (R, 1, T, T)
        hidden = self.roberta(input_ids, attention_mask=same, **kwargs)[0]  # (R, T, C)
        masked = labels != -100  # (B, L)
        hidden = hidden.flatten(0, 1)[where[masked]]  # (M, C)
        logits = self.lm_head(hidden).float()  # (M, V)
        loss = F.cross_entropy(logits, labels[masked], reduction="sum")
        count = masked.sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(count).clamp(min=1)  # short lines may have none
        return transformers.modeling_outputs.MaskedLMOutput(loss=loss, logits=logits)


def make_model(cfg, tokenizer):
    """A RoBERTa with initial weights."""
    torch.manual_seed(cfg.seed)
    model = RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,  # ids may have gaps
        num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, hidden_size=cfg.n_embd,
        intermediate_size=4 * cfg.n_embd, type_vocab_size=1,
        max_position_embeddings=cfg.max_position_embeddings, initializer_range=cfg.init_std,
        hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=cfg.dropout,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id))
    if cfg.local_heads:
        look_at_neighbours(model.roberta, cfg.init_std)
    return model


@torch.no_grad()
def look_at_neighbours(roberta, std):
    """Initial weights with which heads 0, 1, 2, 3 ... attend to positions +1, -1, +2, -2 ... away.

    From random weights attention needs a thousand updates to find the neighbours, and the loss
    stays on the plateau that the words' frequencies give. So positions begin as sinusoids, which
    queries and keys read, and a head's query is turned by the angle of its distance (after
    mimetic initialization, Trockman & Kolter 2023). It is still the published architecture.
    """
    table = roberta.embeddings.position_embeddings
    width = table.embedding_dim // 2 * 2
    frequencies = math.pi * (torch.arange(width // 2) + 0.5) / (width // 2)
    angles = torch.arange(table.num_embeddings)[:, None] * frequencies
    table.weight[:, :width] = 2**0.5 * std * torch.cat((angles.sin(), angles.cos()), dim=1)
    table.weight[table.padding_idx] = 0.0
    n_head, hs = roberta.config.num_attention_heads, roberta.config.hidden_size
    hs //= n_head
    for attention in (layer.attention.self for layer in roberta.encoder.layer):
        for head in range(n_head):
            pairs = torch.arange(head, width // 2, n_head)[: hs // 2]  # of sine and cosine
            distance = (head // 2 + 1) * (-1) ** head
            turn = distance * frequencies[pairs]
            rows = head * hs + torch.arange(len(pairs))
            # at the right distance the scores are about 6, elsewhere 0
            for weight, sin, cos in ((attention.key.weight, torch.zeros(1), torch.ones(1)),
                                     (attention.query.weight, turn.sin(), turn.cos())):
                size = (12 / hs**0.5) ** 0.5
                weight[rows, pairs] = size * cos
                weight[rows, pairs + width // 2] = size * sin
                weight[rows + len(pairs), pairs + width // 2] = size * cos
                weight[rows + len(pairs), pairs] = -size * sin


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for the rest, as the one optimizer the Trainer takes."""

    def __init__(self, model, muon_lr, lr, weight_decay):
        hidden = [p for p in model.roberta.encoder.parameters() if p.ndim == 2]
        ids = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in ids]
        # match_rms_adamw: updates as large as AdamW's at that rate
        self.parts = (Muon(hidden, muon_lr, weight_decay, momentum=0.8, ns_steps=4,
                           adjust_lr_fn="match_rms_adamw"),
                      torch.optim.AdamW(rest, lr, weight_decay=0.0))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure=None):
        """Both parts update with the groups and the state of this object, which it saves."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()


def example_statistics(logits, labels):
    """For preprocess_logits_for_metrics: (M, V) logits and (B, L) labels -> (B, 3), each example's
    summed loss, hits and masked tokens. The Trainer gathers these instead of the logits."""
    masked = labels != -100
    answers = labels[masked]
    loss = F.cross_entropy(logits, answers, reduction="none")
    each = torch.stack([loss, logits.argmax(-1) == answers, torch.ones_like(loss)], 1)  # (M, 3)
    return each.new_zeros(len(labels), 3).index_add(0, masked.nonzero()[:, 0], each)


def compute_metrics(prediction):
    """Over all masked tokens. The Trainer's own loss is a mean of the batches' means."""
    loss, hits, count = prediction.predictions.astype(np.float64).sum(0)
    return {"loss": loss / (count or math.nan), "accuracy": hits / (count or math.nan)}


# ---------------------------------------------------------------------------------------------
# the Trainer: its arguments, one callback, and one method for whole checkpoints


def training_arguments(cfg, accelerator, iterations, evaluates):
    """The Trainer's own settings."""
    device = accelerator.device.type
    args = transformers.TrainingArguments(
        output_dir=cfg.out_dir, seed=cfg.seed, report_to="none",
        # the accelerator that main() made, and its precision
        accelerator_config={"use_configured_state": True}, use_cpu=device == "cpu",
        bf16=accelerator.mixed_precision == "bf16", fp16=accelerator.mixed_precision == "fp16",
        # MaskedDataset has the order of the whole run: a resume only skips what was seen
        max_steps=iterations, train_sampling_strategy="sequential", remove_unused_columns=False,
        per_device_train_batch_size=cfg.batch_size, per_device_eval_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        learning_rate=cfg.learning_rate, lr_scheduler_type="linear", warmup_steps=cfg.warmup_iters,
        weight_decay=cfg.weight_decay, max_grad_norm=cfg.grad_clip,
        logging_steps=cfg.log_interval, logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if evaluates else "no", eval_steps=cfg.eval_interval or iterations,
        save_strategy="steps" if cfg.save_interval else "no", save_steps=cfg.save_interval or 1,
        ddp_find_unused_parameters=False, dataloader_pin_memory=device == "cuda",
        disable_tqdm=True, log_level="error")
    # One process a GPU: no public argument keeps the Trainer from nn.DataParallel on several.
    args._n_gpu = min(args.n_gpu, 1)
    return args


class RunCallback(transformers.TrainerCallback):
    """Seeds, bad gradients, signals; log.csv, loss.png and progress in place of its printer."""

    def __init__(self, done, last, rates, resumed, accelerator, stop, begin):
        self.done, self.last, self.rates, self.resumed = done, last, rates, resumed
        self.accelerator, self.stop, self.begin = accelerator, stop, begin
        self.bad, self.signum, self.begun = runtime.BadUpdates(), 0, False

    def on_train_begin(self, args, state, control, lr_scheduler, **kwargs):
        """A resumed run takes intervals and rate from its own settings, not the checkpoint's."""
        if self.done:
            if state.global_step != self.done or type(state.log_history) is not list:
                raise ValueError("trainer_state.json belongs to another checkpoint")
            state.compute_steps(args, state.max_steps)
            lr_scheduler.base_lrs = self.rates
            lr_scheduler.last_epoch -= 1
            lr_scheduler.step()
        self.begun = True  # all is loaded: what fails from here on is not the checkpoint's fault
        self.begin()
        first = state.is_world_process_zero
        self.log = runtime.RunLog(args.output_dir, self.last, self.done, first,
                                  [*runtime.LOG_COLUMNS, "val_accuracy"])
        self.tokens, self.seconds = state.num_input_tokens_seen, 0.0  # at the last row of log.csv
        self.clock = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        """Dropout is a function of the place in the run: there is no random state to save."""
        torch.manual_seed(runtime.derive_seed(args.seed, state.global_step, args.process_index))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Skip an update whose gradient is not finite; ten in a row end the run."""
        norm = float(state.grad_norm)
        if self.bad.count(math.isfinite(norm), state.global_step + 1):
            model.zero_grad()  # without a gradient the optimizer leaves every weight as it is
            self.log.print(f"warning: iteration {state.global_step + 1}: gradient norm "
                           f"{norm:.3g}, update skipped")

    def on_step_end(self, args, state, control, **kwargs):
        """A signal to any process stops all of them after this update, with a checkpoint."""
        now = time.perf_counter()
        self.log.seconds["updates"] += now - self.clock
        self.clock = now
        self.log.progress(state.global_step)
        _, self.signum, late = self.stop.agree(self.accelerator)
        last = state.global_step == self.last
        self.signum *= not last  # the run ends anyway
        control.should_training_stop |= last or self.signum > 0
        control.should_evaluate |= last and args.eval_strategy != "no"
        control.should_save |= control.should_training_stop or late
        # A row at each checkpoint: a resumed run's next mean loss starts there as well.
        control.should_log |= control.should_save or control.should_evaluate

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" not in logs:  # an evaluation or the summary
            return
        tokens, seconds = state.num_input_tokens_seen, self.log.seconds["updates"]
        speed = round((tokens - self.tokens) / (seconds - self.seconds))
        self.tokens, self.seconds = tokens, seconds
        self.row = {"iter": state.global_step, "tokens": tokens, "lr": logs["learning_rate"],
                    "loss": logs["loss"], "grad_norm": logs["grad_norm"], "tokens_per_s": speed}
        self.log.progress(state.global_step, f"loss {logs['loss']:.4f}, {speed:,} tokens/s")
        if not control.should_evaluate:
            self.log.write(self.row)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """The row of this iteration waited for its validation loss."""
        loss, accuracy = metrics["eval_loss"], metrics["eval_accuracy"]
        self.log.write(self.row | {"val_loss": loss, "val_accuracy": accuracy})
        self.log.print(f"iteration {state.global_step:,}: val loss {loss:.4f}, perplexity "
                       f"{runtime.perplexity(loss):.2f}, masked accuracy {accuracy:.1%}")
        self.log.plot(unit="masked token", resumed=self.resumed)
        self.clock = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.stop.saved_at = time.monotonic()
        self.clock = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.log.print(f"trained for {self.log.close()}")
        self.log.plot(unit="masked token", resumed=self.resumed)  # also without an evaluation


class Trainer(transformers.Trainer):
    """transformers' Trainer with checkpoints that are written whole and hold no pickled code."""

    def __init__(self, run, keep, **kwargs):
        self.run, self.keep = run, keep
        self.began = time.perf_counter() - run["seconds"]
        super().__init__(**kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """Keep it for the callback: a gradient clipped by an infinite norm is all zeros."""
        self.state.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.state.grad_norm

    def _load_rng_state(self, checkpoint):
        """There is none: dropout is a function of the place in the run."""

    def _save_checkpoint(self, model, trial):
        """Write aside what train(resume_from_checkpoint=...) reads; rename it when it is whole."""
        # Private, because no public method replaces a save: the Trainer's own writes in place, so
        # that a kill leaves half a checkpoint, and pickles its arguments and the random state.
        def write(folder):
            if self.args.should_save:
                self.model.save_pretrained(folder)
                self.processing_class.save_pretrained(folder)
                self.processing_class.backend_tokenizer.model.save(str(folder))  # the book's files
                torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
                if self.accelerator.scaler:
                    torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")
                self.state.save_to_json(str(folder / "trainer_state.json"))
                self.run["seconds"] = time.perf_counter() - self.began
                runtime.write_text(folder / "run.json", json.dumps(self.run, indent=2) + "\n")

        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step:06}")
        runtime.save_checkpoint(self.accelerator, folder, write, self.keep)


# ---------------------------------------------------------------------------------------------
# the run


def fill_mask(text, folder):
    """Print the five likeliest tokens for each <mask> of `text`. Returns them, a list a mask."""
    with one_line(f"{folder} holds no masked language model"):
        fill = transformers.pipeline("fill-mask", model=str(folder), top_k=5,
                                     trust_remote_code=False,
                                     model_kwargs={"use_safetensors": True})
    tokenizer = fill.tokenizer
    ids = tokenizer(text).input_ids
    if tokenizer.mask_token_id not in ids or len(ids) > tokenizer.model_max_length:
        raise UserError(f"--fill_mask {text[:50]!r} must hold {tokenizer.mask_token} and at most "
                        f"{tokenizer.model_max_length} tokens", 2)
    answers = fill(text)
    answers = answers if isinstance(answers[0], list) else [answers]
    print0(text)
    for number, candidates in enumerate(answers, 1):
        print0(f"mask {number}:")
        for each in candidates:
            print0(f"  {each['score']:.4f}  {each['token_str']!r}")
    return answers


def check(cfg):
    """Raise UserError (code 2) unless the settings make sense together."""
    check_range(cfg, 1, "n_layer", "n_head", "n_embd", "batch_size", "log_interval")
    check_range(cfg, 1, "gradient_accumulation_steps", "keep_checkpoints")
    check_range(cfg, 0, "max_iters", "warmup_iters", "eval_interval", "save_interval")
    check_range(cfg, 0, "weight_decay", "learning_rate", "muon_lr", "init_std", "grad_clip")
    check_range(cfg, 0, "dropout", "val_fraction", high=0.99)
    check_range(cfg, 0.01, "mlm_probability", high=0.99)
    check_range(cfg, 1e-9, "max_epochs")
    check_range(cfg, 0, "seed", high=2**32 - 1)  # numpy's limit
    check_range(cfg, 3, "block_size")  # <s>, a token, </s>
    check_range(cfg, 261, "vocab_size")  # 256 bytes and 5 special tokens
    if prepare.preset_source(cfg.source).startswith("hf:"):
        raise UserError(f"--source {cfg.source} is a data set of the hub, which only prepare.py "
                        "reads; write its texts into a file and give that", 2)
    if cfg.n_embd % cfg.n_head:
        raise UserError(f"--n_embd {cfg.n_embd} is no multiple of --n_head {cfg.n_head}", 2)


def find_start(cfg):
    """Returns (settings, checkpoint or None, its run.json). Deletes nothing."""
    out_dir = Path(cfg.out_dir)
    start, saved = runtime.find_run(out_dir, cfg.resume, cfg.overwrite)
    there = [name for name in MODEL_FILES if (out_dir / name).exists()]
    known = (out_dir / "run.json").exists()
    if there and not (known and (cfg.resume or cfg.overwrite)):
        remedy = "start again with --overwrite" if known else "choose another --out_dir"
        raise UserError(f"{out_dir} holds {there[0]} of a finished model; {remedy}")
    if saved.get("script", "train_roberta.py") != "train_roberta.py":
        raise UserError(f"{start} is no checkpoint of this script; choose another --out_dir")
    if start:
        settings = saved | {"tokenizer": None}  # the checkpoint has its own
        if "max_epochs" in runtime.given_names(cfg):
            settings["max_iters"] = 0  # the old end is not meant then
        cfg = runtime.resume_settings(cfg, settings)
    check(cfg)
    return cfg, start, saved


def make_datasets(cfg, lines, tokenizer, per_iteration):
    """Returns (training set, evaluation set or None, iterations of the schedule)."""
    n_val = max(1, int(len(lines) * cfg.val_fraction)) if cfg.val_fraction and lines[1:] else 0
    halves = lines[: len(lines) - n_val], lines[len(lines) - n_val :]
    train, val = (encode(x, tokenizer, cfg.block_size, cfg.packing) for x in halves)
    if not train:
        raise UserError(f"--source {cfg.source}: every line is blank, or holds nothing that the "
                        "tokenizer can encode")
    iterations = math.ceil(len(train) * cfg.max_epochs / per_iteration)
    if cfg.max_iters > iterations:
        epochs = math.ceil(cfg.max_iters * per_iteration / len(train))
        raise UserError(f"--max_iters {cfg.max_iters} is more than --max_epochs {cfg.max_epochs:g} "
                        f"gives, {iterations} iterations; give --max_epochs {epochs}", 2)
    val_set = MaskedDataset(val, tokenizer, cfg.seed, EVAL_PROBABILITY)
    train_set = MaskedDataset(train, tokenizer, cfg.seed, cfg.mlm_probability,
                              length=iterations * per_iteration)
    return train_set, val_set if val else None, iterations


def export(checkpoint, out_dir):
    """Copy model and tokenizer of a checkpoint into out_dir, each file whole or not at all."""
    with disk_errors(out_dir):
        for name in ("run.json", *MODEL_FILES):
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, out_dir / f".tmp-{name}")
                (out_dir / f".tmp-{name}").replace(out_dir / name)


def train(cfg, accelerator, lines, stop, start, saved):
    """The run, in a locked cfg.out_dir. Returns the Trainer, with .model, .processing_class (the
    tokenizer) and .state.log_history; None where the run was finished before."""
    out_dir, first = Path(cfg.out_dir), accelerator.is_main_process

    # ---- tokenizer, data, model
    if cfg.tokenizer or start:
        tokenizer = open_tokenizer(cfg.tokenizer or start)
    else:
        trained = train_tokenizer(lines, cfg.vocab_size) if first else None
        tokenizer = broadcast_object_list([trained])[0]
    # RoBERTa's positions start behind the padding's id.
    tokenizer.model_max_length = cfg.max_position_embeddings - tokenizer.pad_token_id - 1
    if cfg.block_size > tokenizer.model_max_length:
        raise UserError(f"--block_size {cfg.block_size} needs --max_position_embeddings "
                        f"{cfg.block_size + tokenizer.pad_token_id + 1} or more", 2)
    per_iteration = cfg.batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
    train_set, val_set, iterations = make_datasets(cfg, lines, tokenizer, per_iteration)
    model = make_model(cfg, tokenizer)

    # ---- where to start and where to end
    done, last = int(start.name[11:]) if start else 0, cfg.max_iters or iterations
    same = {name: getattr(cfg, name) for name in FIXED} | {"examples_per_iteration": per_iteration}
    same["optimizer"] = "adamw" if cfg.muon_lr is None else "muon"
    tokens = b",".join(ids.tobytes() for ids in train_set.examples)
    same["tokens_sha256"] = hashlib.sha256(tokens).hexdigest()  # another tokenizer shows here
    same["text_sha256"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    run = {"script": "train_roberta.py", **asdict(cfg), **same,
           "started": saved.get("started") or time.strftime("%Y-%m-%d %H:%M"),
           "seconds": saved.get("seconds", 0.0), "resumed": saved.get("resumed", []),
           "machine": runtime.describe_machine(accelerator)}
    if start:
        runtime.check_same(start, saved, same)
        run["resumed"].append(done)
        if done > last:
            raise UserError(f"{start} has done {done} iterations, more than the {last} asked for; "
                            "resume with a larger --max_epochs or --max_iters", 2)
        if done == last:
            if first:
                export(start, out_dir)  # where the run was killed before it got to this
            print0(f"the run is finished at iteration {done}; a longer one: {stop.command} "
                   "with a larger --max_epochs or --max_iters")
            return None
        if saved.get("max_epochs") != cfg.max_epochs:
            print0(f"the learning rate now falls to zero at iteration {iterations:,}")
    print0("configuration:", ", ".join(f"{k}={v!r}" for k, v in changed(cfg).items()) or "defaults")
    print0(f"{accelerator.device.type} x {accelerator.num_processes}, precision "
           f"{accelerator.mixed_precision}; {model.num_parameters():,} parameters, vocabulary "
           f"{len(tokenizer):,}; {len(lines):,} lines: {len(train_set.examples):,} examples to "
           f"train on, {len(val_set or ()):,} held out; {last:,} iterations of {per_iteration}")

    # ---- the Trainer
    muon = cfg.muon_lr is not None
    rates = [cfg.muon_lr if muon else cfg.learning_rate, cfg.learning_rate]
    optimizer = MuonAdamW(model, *rates, cfg.weight_decay) if muon else None

    def begin():
        """All is loaded: from here on the old run is gone."""
        if first:
            with disk_errors(out_dir):
                if cfg.overwrite:
                    runtime.clear_run(out_dir, *MODEL_FILES)
                runtime.write_text(out_dir / "run.json", json.dumps(run, indent=2) + "\n")
        accelerator.wait_for_everyone()
        stop.catch()

    callback = RunCallback(done, last, rates, run["resumed"], accelerator, stop, begin)
    trainer = Trainer(
        run, cfg.keep_checkpoints, model=model, processing_class=tokenizer, callbacks=[callback],
        args=training_arguments(cfg, accelerator, iterations, bool(val_set)),
        train_dataset=train_set, eval_dataset=val_set,
        optimizers=(optimizer, None), data_collator=partial(collate, pad_id=tokenizer.pad_token_id),
        preprocess_logits_for_metrics=example_statistics, compute_metrics=compute_metrics)
    trainer.remove_callback(transformers.PrinterCallback)
    try:
        if start:  # strictly: train() loads it again, but only warns about missing weights
            load_model(model, start / "model.safetensors")
        trainer.train(resume_from_checkpoint=start and str(start))
    except Exception as error:  # while it loads: right checksums say nothing of the contents
        if callback.begun or not start:
            raise
        raise UserError(f"{start} cannot be loaded: {first_line(error)[:150]}; start a new "
                        "--out_dir") from error
    if callback.signum:
        stop.exit(callback.signum, out_dir)
    stop.release()  # all is saved: Ctrl-C ends it at once

    # ---- the finished model becomes out_dir's own and answers a first question
    if first:
        export(out_dir / f"checkpoint-{last:06d}", out_dir)
        question = f"Human thinking involves human {tokenizer.mask_token}."
        if len(tokenizer(question).input_ids) <= tokenizer.model_max_length:
            fill_mask(question, out_dir)
    accelerator.wait_for_everyone()
    return trainer


def main(cfg):
    """Train as `cfg` says; or, with cfg.fill_mask, ask a run that is there."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # what it warns of is said here in a line
    if "fill_mask" in runtime.given_names(cfg):
        out_dir = Path(cfg.out_dir)
        whole = (p for p in runtime.checkpoints(out_dir) if not runtime.verify_checksums(p))
        folder = out_dir if (out_dir / "model.safetensors").exists() else next(whole, None)
        if not folder:
            raise UserError(f"--fill_mask: {out_dir} holds no run; train, or say which --out_dir")
        print0(f"asking {folder}")
        return fill_mask(cfg.fill_mask, folder)
    with runtime.hold_run("train_roberta.py", cfg.out_dir) as stop:
        cfg, start, saved = find_start(cfg)
        accelerator = runtime.make_accelerator(cfg.mixed_precision)
        raw_dir = Path(cfg.data_dir, cfg.source if cfg.source in prepare.PRESETS else "roberta")
        with accelerator.main_process_first():  # it downloads, the others find the file
            files = prepare.source_files(cfg.source, raw_dir)
            lines = list(read_lines(files))
        if prepare.hide_secrets(cfg.source) != cfg.source:  # which is printed and saved
            cfg = replace(cfg, source=str(files[0]))  # what was downloaded: no key, no network
        return train(cfg, accelerator, lines, stop, start, saved)


if __name__ == "__main__":
    runtime.run_script(main, CFG)
