"""Fine-tune BERT on pairs of sentences: do the two mean the same (MRPC)?

    python finetune_mrpc.py config/mrpc.py                # bert-base-uncased, GLUE from the hub
    python finetune_mrpc.py --model=FOLDER --train_file=train.tsv --test_file=test.tsv
    python finetune_mrpc.py --train_file=qqp.tsv --columns=question1,question2,is_duplicate
    torchrun --nproc_per_node 2 finetune_mrpc.py ...      # two GPUs, or two processes on a CPU
    python finetune_mrpc.py --eval_only --validation_file=dev.tsv
    python finetune_mrpc.py --predict "He sold the firm." "The firm was sold by him."
    python finetune_mrpc.py --compare out/a out/b         # McNemar's test on their predictions

Writes out/mrpc/: best/ (a transformers folder), checkpoint-*, run.json, log.csv, loss.png,
results.json, predictions.tsv (worst mistakes first).
"""

from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

from configurator import changed, load


@dataclass
class Config:
    """Fine-tune BERT on pairs of sentences."""

    # model and data
    model: str = "bert-base-uncased"  # hub name or folder; one made by train_roberta.py will do
    train_file: str = ""  # TSV, CSV, JSONL or parquet; no file at all: GLUE MRPC from the hub
    validation_file: str = ""  # chooses the epoch; none: a fixed stratified tenth of train_file
    test_file: str = ""  # scored once, at the end
    columns: str = "sentence1,sentence2,label"  # the two texts and the label, of any kind
    max_length: int = 0  # tokens a pair, the rest is cut off; 0: as many as the model takes
    # training
    max_epochs: int = 3  # passes over the training pairs, an evaluation after each
    max_iters: int = 0  # stop after so many iterations of the schedule; 0: at its end
    batch_size: int = 8  # pairs that a process computes at once
    gradient_accumulation_steps: int = 1  # such batches a process and iteration
    length_window: int = 32  # batches among which pairs are grouped by length; 0: shuffled only
    both_orders: bool = False  # swap a pair's texts every other epoch; average at prediction
    learning_rate: float = 5e-5  # the highest; falls linearly to 0
    warmup_iters: int = 0  # iterations in which it rises to that
    weight_decay: float = 0.01  # on everything, as torch's AdamW does
    grad_clip: float = 0.0  # largest norm of the gradient; 0: off
    mixed_precision: Literal["auto", "fp16", "bf16", "no"] = "auto"  # auto: what is fast here
    seed: int = 42  # of the new head, the order of the pairs and dropout
    seeds: str = ""  # "1,2,3": a run for each in out_dir/seed-N; with --resume it goes on
    # evaluation
    eval_batch_size: int = 32  # changes the speed, not the result
    eval_only: bool = False  # score out_dir/best, or a --model that best/ was not made from
    predict: tuple[str, ...] = ()  # a FILE of pairs, or two texts; the model as in eval_only
    compare: tuple[str, ...] = ()  # two run folders, or predictions.tsv files, of the same pairs
    # run folder
    out_dir: str = "out/mrpc"  # everything is written here
    log_interval: int = 25  # iterations between two rows of log.csv
    keep_checkpoints: int = 2  # the newest ones
    resume: bool = False  # continue from the newest intact checkpoint, with its settings
    overwrite: bool = False  # start again in a folder that holds a run

    RETIRED: ClassVar = {"epochs": "--max_epochs", "max_steps": "--max_iters",
                         "lr": "--learning_rate"}


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import contextlib
import csv
import hashlib
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy
import pandas
import torch
import transformers
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy

import prepare
import runtime
from runtime import UserError, check_range, derive_seed, one_line, print0, run_script

COLUMNS = ["sentence1", "sentence2", "label"]
MSR_COLUMNS = {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"}
MRPC_NAMES = {"0": "not_equivalent", "1": "equivalent"}
METRICS = ["accuracy", "f1", "accuracy_f1_mean"]
OUTPUTS = [prefix + name for prefix in ("", "eval-")
           for name in ("results.json", "predictions.tsv", "test-predictions.tsv")]

# ---------------------------------------------------------------------------------------------
# pairs


def read_table(path):
    """A TSV, CSV, JSONL or parquet file. Between tabs a quotation mark is text, as in MSR's."""
    if path.endswith(".parquet"):
        return pandas.read_parquet(path)
    if path.endswith((".jsonl", ".json")):
        return pandas.read_json(path, lines=True, dtype=False)
    with open(path, encoding="utf-8-sig") as f:
        tabs = {"sep": "\t", "quoting": csv.QUOTE_NONE} if "\t" in f.readline() else {}
    table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", **tabs)
    if not isinstance(table.index, pandas.RangeIndex):  # pandas makes row names of them
        raise ValueError("more cells in a row than in the header")
    return table


def read_pairs(path, columns=COLUMNS):
    """The `columns` (two texts, perhaps labels) of a file, as a table with the names COLUMNS."""
    with one_line(f"{path} cannot be read", kinds=(OSError, ValueError)):
        table = read_table(path)
    if table.empty:
        raise UserError(f"{path} holds no pairs, only a header or nothing")
    table = table.rename(columns={old: new for old, new in MSR_COLUMNS.items()
                                  if old not in columns and new not in table})
    missing = [column for column in columns if column not in table]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}, only {', '.join(map(str, table))}; "
                        "give --columns=FIRST,SECOND,LABEL")
    table = table[columns].set_axis([*COLUMNS, "prediction"][: len(columns)], axis=1)
    for name, column in zip(table, columns, strict=True):
        if name not in COLUMNS[:2]:  # 1, 1.0 and " 1 " are one label; -1 is GLUE's "unknown"
            labels = table[name].astype(object).fillna("").map(str).str.strip()
            labels = labels.str.replace(r"^(-?)0*(\d+)(\.0+)?$", r"\1\2", regex=True)
            table[name] = labels.replace("-1", "")
        for row, cell in enumerate(table[name], 1):
            if not isinstance(cell, str) or not cell.strip():
                raise UserError(f"{path}, pair {row}: {column} is empty, or no text")
    return table.reset_index(drop=True)


def load_pairs(cfg):
    """({'train': table, 'validation': table, perhaps 'test'}, {label in the file: its name}), from
    the files; to train without a --train_file, MRPC from the hub, where each file replaces one
    split. In the tables a label is its place among the labels."""
    files = {"train": cfg.train_file, "validation": cfg.validation_file, "test": cfg.test_file}
    columns = cfg.columns.split(",")
    data = {split: read_pairs(path, columns) for split, path in files.items() if path}
    if not data or ("train" not in data and not cfg.eval_only):
        with loading("nyu-mll/glue"):  # MRPC's pairs, from the hub
            import datasets  # takes a second

            hub = datasets.load_dataset("nyu-mll/glue", "mrpc").with_format("pandas")
        tables = {split: hub[split][:][COLUMNS] for split in files}
        data = {split: table.astype({"label": str}) for split, table in tables.items()
                if table.label.min() >= 0} | data  # -1: GLUE keeps the labels to itself
    if not data.keys() & {"train", "validation"}:
        raise UserError("nothing to score: give --validation_file")
    counts = data["train" if "train" in data else "validation"].label.value_counts()
    if "train" in data:  # a label seen once is a typo, or the column holds numbers
        counts = counts[(counts > 1) | counts.index.isin(MRPC_NAMES)]
    if set(counts.index) <= set(MRPC_NAMES):  # also where one of the two never occurs
        labels = MRPC_NAMES if columns == COLUMNS else {"0": "0", "1": "1"}
    else:
        numbers = all(label.isdecimal() for label in counts.index)
        labels = {label: label for label in sorted(counts.index, key=int if numbers else None)}
    for split, table in data.items():
        unknown = table.label[~table.label.isin(list(labels))]
        if len(unknown):
            raise UserError(f"{files[split]}, pair {unknown.index[0] + 1}: the label "
                            f"{unknown.iloc[0]!r} is none of {', '.join(labels)}"[:300])
        data[split] = table.assign(label=table.label.map(list(labels).index))
    if "validation" not in data:
        with one_line(f"{cfg.train_file} is too small to hold out a tenth",
                      "give --validation_file", ValueError):
            data["train"], data["validation"] = train_test_split(
                data["train"], test_size=0.1, random_state=0, stratify=data["train"].label)
        print0(f"no --validation_file: a fixed stratified tenth of {cfg.train_file} is held out")
    print0("pairs:", ", ".join(f"{len(table):,} {split}" for split, table in data.items()),
           f"labelled {', '.join(labels.values())}")
    return data, labels


@contextlib.contextmanager
def loading(name):
    """One clear error for whatever goes wrong while `name`, a folder or of the hub, is loaded."""
    remedy = "give --train_file and a local folder as --model, or set HF_HUB_OFFLINE=1 to use " \
             "what was downloaded before"
    if not Path(name).is_dir():  # an error at once, not after half a minute of retries
        prepare.require_network(f"{name} is no folder here; {remedy}")
    with one_line(f"cannot load {name}", remedy):  # a stranger's folder, or a cache
        yield


# ---------------------------------------------------------------------------------------------
# model


def load_model(name, accelerator, names=None):
    """(model, tokenizer) of a hub name or folder. names: those of the labels that a new head is
    made for; None: the model must be fine-tuned already."""
    # only the weights: config.json may have been edited
    wrong = Path(name, "SHA256SUMS").exists() and runtime.verify_checksums(name, "model")
    if wrong:
        raise UserError(f"{name}: {wrong}; train it again")
    # On a CPU sdpa takes 1.4 times as long as eager (2 cores, bf16).
    options = {"attn_implementation": "eager" if accelerator.device.type == "cpu" else None,
               "dtype": torch.float32, "output_loading_info": True}
    with loading(name), accelerator.local_main_process_first():
        safe = {"trust_remote_code": False}  # no code of a stranger's folder
        config = transformers.AutoConfig.from_pretrained(name, **safe)
        config.id2label = dict(sorted(config.id2label.items()))  # the order of the logits
        own = {str(label).lower() for label in config.id2label.values()}
        if names and own != {label.lower() for label in names}:
            options["ignore_mismatched_sizes"] = len(own) != len(names)  # another task's head
            config.id2label = dict(enumerate(names))
            config.label2id = {label: i for i, label in enumerate(names)}
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, config=config, **options, **safe)
        types = ["token_type_ids"] * (getattr(config, "type_vocab_size", 0) > 1)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, model_input_names=["input_ids", *types, "attention_mask"], **safe)
    new = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if new and not names:
        raise UserError(f"{name} is not fine-tuned on pairs, it has no {new[0]}; train it first")
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {name} has no padding token; choose a model like BERT")
    print0(f"model: {name}, {model.num_parameters() / 1e6:.1f}M parameters, "
           f"new weights: {', '.join(new) or 'none'}")
    return model.to(accelerator.device), tokenizer


def label_ids(model, labels):
    """The model's id of each of `labels`: by name where the names match, else by number. A model
    may count its labels in another order than the file."""
    for spell in (str, str.lower):  # Yes and yes may be two labels, or one
        own = {spell(str(name)): int(i) for i, name in model.config.id2label.items()}
        for names in (labels.values(), labels):
            ids = [own[spell(name)] for name in names if spell(name) in own]
            if len(set(ids)) == len(labels):
                return ids
    numbers = any(re.match(r"-?\d", name) for name in own)  # 1, 2 and 3 are no 0, 1 and 2
    if not numbers and all(label.isdecimal() and int(label) < len(own) for label in labels):
        return [int(label) for label in labels]
    raise UserError(f"the pairs are labelled {', '.join(labels)}, but the model knows "
                    f"{', '.join(own)}; rename the labels in one of them")


def encode(cfg, model, tokenizer, table, swap=False, ids=()):
    """A list of {input_ids, attention_mask, ...}, one a pair, not padded. swap: the second text
    first. ids: add the labels, by the model's ids."""
    limit = getattr(model.config, "max_position_embeddings", 512)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limit -= padding + 1  # RoBERTa's positions start behind the padding's
    if cfg.max_length > limit:
        raise UserError(f"--max_length is {cfg.max_length}; the model takes {limit} tokens", 2)
    first, second = COLUMNS[1::-1] if swap else COLUMNS[:2]
    columns = tokenizer(list(table[first]), list(table[second]), truncation=True,
                        max_length=cfg.max_length or min(limit, tokenizer.model_max_length))
    if ids:
        columns["labels"] = [ids[label] for label in table.label]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# ---------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def predict(cfg, accelerator, model, tokenizer, table):
    """Logits (n, labels) in fp32 on the CPU, in the order of `table`, the same in every process."""
    collate = transformers.DataCollatorWithPadding(tokenizer)
    logits = torch.zeros(len(table), model.config.num_labels, device=accelerator.device)
    orders = (False, True) if getattr(model.config, "both_orders", False) else (False,)
    model.eval()
    for swap in orders:
        pairs = encode(cfg, model, tokenizer, table, swap)
        rows = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["input_ids"]))
        batches = cut(rows, cfg.eval_batch_size)
        with accelerator.autocast():  # around all: weights are cast once, not for every batch
            for batch in batches[accelerator.process_index :: accelerator.num_processes]:
                inputs = collate([pairs[i] for i in batch]).to(accelerator.device)
                logits[batch] += model(**inputs).logits.float() / len(orders)  # (B, labels)
    model.train()
    logits = accelerator.reduce(logits).cpu()  # a row is 0 in all processes but the one that had it
    if not logits.isfinite().all():
        raise UserError("the model's answers are not finite numbers; its weights are damaged")
    return logits


def scores(counts):
    """{metric: value} of a confusion matrix, an array of shape (label, prediction). F1 is that of
    the second label where there are two, else the mean over the labels that occur."""
    right = counts.diagonal()
    seen = counts.sum(1) + counts.sum(0)  # 0: neither there nor predicted, so not in the mean
    f1 = 2 * right / numpy.maximum(seen, 1)
    f1 = f1[1] if len(counts) == 2 else f1.sum() / (seen > 0).sum()
    accuracy = right.sum() / counts.sum()
    return dict(zip(METRICS, (accuracy, f1, (accuracy + f1) / 2), strict=True))


def calibration_error(logits, truth):
    """Expected calibration error, 10 bins (arXiv 1706.04599): mean |confidence - accuracy|."""
    sure, guess = logits.softmax(-1).max(-1)
    gaps = sure - (guess == truth).float()
    bins = (sure * 10).long().clamp(max=9)
    return torch.zeros(10).index_add_(0, bins, gaps).abs().sum().item() / len(truth)


def evaluate(cfg, accelerator, model, tokenizer, table, labels, ids, name):
    """(metrics, logits) of a model on a table of pairs. ids: the model's, one a label."""
    logits = predict(cfg, accelerator, model, tokenizer, table)[:, ids]
    truth = torch.tensor(table.label.tolist())
    k, n = len(labels), len(table)
    counts = confusion_matrix(truth.numpy(), logits.argmax(-1).numpy(), labels=range(k))
    one_answer = numpy.zeros_like(counts)  # the positive label, or else the most frequent
    one_answer[:, 1 if k == 2 else counts.sum(1).argmax()] = counts.sum(1)
    found = scores(counts) | {"loss": cross_entropy(logits, truth)}
    found |= {f"baseline_{m}": scores(one_answer)[m] for m in METRICS[:2]}
    found = {key: float(value) for key, value in found.items()}
    print0(f"{name}, {n:,} pairs:", ", ".join(f"{key} {v:.4f}" for key, v in found.items()))
    if (counts.sum(0) > 0).sum() == 1:
        print0(f"warning: the model calls every pair {[*labels.values()][counts.sum(0).argmax()]}")
    # A bootstrap over the pairs: to draw n of them is to draw n cells of the confusion matrix.
    draw = numpy.random.default_rng(0).multinomial
    drawn = [scores(draw(n, counts.ravel() / n).reshape(k, k)) for _ in range(1000)]
    for m in METRICS:
        found[f"{m}_interval"] = numpy.quantile([s[m] for s in drawn], [0.025, 0.975]).tolist()
    found |= {"n": n, "ece": calibration_error(logits, truth), "confusion": counts.tolist()}
    return found, logits


def report(cfg, accelerator, data, labels, folder, prefix="", **more):
    """Score the model in `folder`; write results.json and predictions.tsv."""
    model, tokenizer = load_model(folder, accelerator)
    out_dir = Path(cfg.out_dir)
    ids = label_ids(model, labels)
    own = model.config.id2label
    if len(ids) < len(own):  # the model can answer what no pair of the file is
        data = {split: table.assign(label=table.label.map(ids.__getitem__))
                for split, table in data.items()}
        spelled = dict(zip(ids, labels.items(), strict=True))
        labels = dict(spelled.get(i, (str(name), str(name))) for i, name in own.items())
        ids = list(own)
    results = {"labels": list(labels.values()), "model": folder, **more}
    for split in [s for s in ("validation", "test") if s in data]:
        found, logits = evaluate(cfg, accelerator, model, tokenizer, data[split], labels, ids,
                                 f"{split}, {folder}")
        low, high = found["accuracy_interval"]
        print0(f"{split}: accuracy {low:.3f} to {high:.3f} (95 %), calibration error "
               f"{found['ece']:.3f}")
        results |= found if split == "validation" else {"test": found}
        name = prefix + "test-" * (split == "test")
        if accelerator.is_main_process:
            with runtime.disk_errors(out_dir):
                table = add_predictions(data[split], logits, list(labels))
                table["label"] = [list(labels)[i] for i in table.label]
                wrong = table.label != table.prediction
                order = (table.probability * (1 - 2 * wrong)).argsort()  # worst mistakes first
                runtime.write_text(out_dir / f"{name}predictions.tsv",
                                   tab_separated(table.iloc[order]) + "\n")
    write_json(out_dir / f"{prefix}results.json", results)
    print0(f"wrote {prefix}results.json and {name}predictions.tsv into {out_dir}")
    return results


def write_json(path, content):
    """Write a JSON file, from the first process."""
    if runtime.is_first_process():
        with runtime.disk_errors(path.parent):
            runtime.write_text(path, json.dumps(content, indent=2) + "\n")


def add_predictions(table, logits, names):
    """`table` with the columns prediction and probability. names: of the columns of `logits`."""
    probability, guess = logits.softmax(-1).max(-1)
    guess = [names[i] for i in guess.tolist()]
    return table.assign(prediction=guess, probability=probability.numpy())


def tab_separated(table):
    """A table as a TSV; white space within a cell becomes one space."""
    rows = [table.columns, *table.itertuples(index=False)]
    return "\n".join("\t".join(" ".join(str(cell).split()) for cell in row) for row in rows)


def compare(folders):
    """McNemar's exact test: do two models differ on more pairs than chance explains? Returns how
    many pairs only the first and only the second has right, and p."""
    test = all(Path(folder, "test-predictions.tsv").exists() for folder in folders)
    name = "test-predictions.tsv" if test else "predictions.tsv"
    paths = [str(Path(f, name) if Path(f).is_dir() else f) for f in folders]
    keys = [*COLUMNS, "prediction"]
    one, other = (read_pairs(path, keys).sort_values(keys) for path in paths)
    if one[COLUMNS].values.tolist() != other[COLUMNS].values.tolist():
        raise UserError(f"{paths[0]} and {paths[1]} are not predictions for the same pairs")
    right = [(table.label == table.prediction).values for table in (one, other)]
    only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    # a fair coin, thrown once for each pair that only one of them has right
    p = float(binomtest(only[0], sum(only)).pvalue) if any(only) else 1.0
    for path, hits, alone in zip(paths, right, only, strict=True):
        print0(f"{path}: accuracy {hits.mean():.4f}, {alone} of {len(one):,} pairs right alone")
    print0(f"McNemar's exact test: p = {p:.4f}, {'' if p < 0.05 else 'not '}significant at 5 %")
    return {"only_first": only[0], "only_second": only[1], "n": len(one), "p": p}


# ---------------------------------------------------------------------------------------------
# training


def cut(rows, size):
    """A list in pieces of `size`, the last of them perhaps shorter."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def epoch_batches(lengths, size, window, seed, epoch):
    """The row numbers of each batch of an epoch: a pure function of the arguments.

    A shuffle, cut into batches, the last of them short. With a window, each `window` batches of the
    shuffle are sorted by length before the cut and the batches are shuffled after it: every epoch
    still makes new batches, and padding adds 2 % to the tokens of MRPC instead of 35 %.
    """
    # the fourth number keeps these seeds apart from dropout's (seed, iteration, rank)
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, 0, 1))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if not window:
        return cut(order, size)
    chunks = [sorted(chunk, key=lengths.__getitem__) for chunk in cut(order, window * size)]
    batches = cut([row for chunk in chunks for row in chunk], size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def learning_rate(cfg, iteration, total):
    """Up linearly over warmup_iters, then linearly down to 0 at `total`."""
    if iteration < cfg.warmup_iters:
        return cfg.learning_rate * (iteration + 1) / (cfg.warmup_iters + 1)
    return cfg.learning_rate * (total - iteration) / (total - cfg.warmup_iters)


def forward_backward(cfg, accelerator, model, collate, pairs, iteration):
    """Add the gradients of the mean loss over `pairs`, one iteration's for all processes, to the
    parameters. Returns this process's share of that loss."""
    world = accelerator.num_processes
    micro_batches = cut(pairs, cfg.batch_size)
    mine = micro_batches[accelerator.process_index :: world]
    # Dropout is a function of iteration and process: there is no random state to save.
    torch.manual_seed(derive_seed(cfg.seed, iteration, accelerator.process_index))
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(mine or micro_batches[:1]):  # none left in a short one: it weighs 0
        inputs = collate(batch).to(accelerator.device)
        labels = inputs.pop("labels")  # (B,)
        last = i + 1 >= len(mine)  # only then do the processes add up their gradients
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            logits = model(**inputs).logits  # (B, labels)
            # Each pair weighs the same, however the batches are cut: no mean of means.
            loss = cross_entropy(logits.float(), labels, reduction="sum") / len(pairs)
            loss = loss * bool(mine)
            accelerator.backward(loss * world)  # DDP divides by the number of processes
        total += loss.detach()
    return total


def train(cfg, stop):
    """A run in a folder that is locked, from beginning to end. stop: a StopSignal. Returns what
    results.json says."""
    # ---- settings, pairs and model
    out_dir = Path(cfg.out_dir)
    folder, saved = runtime.find_run(out_dir, cfg.resume, cfg.overwrite)
    if folder:
        if "config" not in saved:
            raise UserError(f"{out_dir} holds no run of this script; choose another --out_dir")
        cfg = runtime.resume_settings(cfg, saved["config"] | {"predict": (), "compare": ()})
        check_config(cfg)
    print0("configuration:", ", ".join(f"{k}={v!r}" for k, v in changed(cfg).items()) or "defaults")
    accelerator = runtime.make_accelerator(cfg.mixed_precision)
    data, labels = load_pairs(cfg)
    torch.manual_seed(cfg.seed)  # of the new head
    model, tokenizer = load_model(cfg.model, accelerator, list(labels.values()))
    model.config.both_orders = cfg.both_orders  # best/ knows how to predict
    tokenizer.model_max_length = cfg.max_length or tokenizer.model_max_length
    collate = transformers.DataCollatorWithPadding(tokenizer)
    ids = label_ids(model, labels)
    orders = [encode(cfg, model, tokenizer, data["train"], swap, ids)
              for swap in (False, True)[: 1 + cfg.both_orders]]
    lengths = [len(pair["input_ids"]) for pair in orders[0]]

    # ---- how many iterations, from which on
    world = accelerator.num_processes
    global_batch = cfg.batch_size * cfg.gradient_accumulation_steps * world
    if len(lengths) < global_batch:
        raise UserError(f"{len(lengths)} training pairs are fewer than one batch of {global_batch};"
                        " lower --batch_size")
    per_epoch = math.ceil(len(lengths) / global_batch)
    total = per_epoch * cfg.max_epochs
    end = min(cfg.max_iters or total, total)
    if cfg.warmup_iters >= total:
        raise UserError(f"--warmup_iters={cfg.warmup_iters} leaves none of {total} iterations", 2)
    same = what_stays(cfg, data, labels, global_batch)
    state = {"iteration": 0, "tokens": 0, "loss_sum": 0.0, "loss_pairs": 0, "skipped": 0,
             "metrics": None, "best_f1": -1.0, "resumed": [], "total": total}
    if folder:
        runtime.check_same(folder, saved.get("same", {}), same)
        was = saved.get("state", {})
        if was.keys() != state.keys() or was["iteration"] != int(folder.name[11:]):
            raise UserError(f"{folder} is of another version; start a new --out_dir")
        done, extend = was["iteration"], "to extend it give a higher --max_iters or --max_epochs"
        if end < done:
            raise UserError(f"{folder} is past the {end} iterations asked for; {extend}", 2)
        print0(f"resuming from {folder}" if done < end else
               f"the run is finished at iteration {done}; {extend}")
        if total != was["total"]:
            print0(f"the learning rate now falls to 0 at iteration {total}, not {was['total']}")
        state = was | {"total": total, "resumed": [*was["resumed"], done]}

    # ---- optimizer, run folder
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, fused=fused,
                                  weight_decay=cfg.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    if folder:
        runtime.load_checkpoint(accelerator, folder, [optimizer])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and cfg.overwrite:
        runtime.clear_run(out_dir, *OUTPUTS)
    info = {"script": "finetune_mrpc.py", "config": asdict(cfg), "same": same, "state": state,
            "started": saved.get("started") or time.strftime("%Y-%m-%d %H:%M"),
            "seconds": saved.get("seconds", 0.0), "machine": runtime.describe_machine(accelerator)}
    write_json(out_dir / "run.json", info)
    log = runtime.RunLog(out_dir, end, state["iteration"], accelerator.is_main_process,
                         [*runtime.LOG_COLUMNS, *METRICS])
    began = log.began - info["seconds"]
    updates = runtime.BadUpdates(state["skipped"])
    print0(f"{accelerator.device.type} x {world}, precision {accelerator.mixed_precision}: "
           f"{end:,} iterations of {global_batch} pairs, {per_epoch:,} an epoch")

    def validate(iteration):
        with log.stage("evaluation"):
            return evaluate(cfg, accelerator, bare, tokenizer, data["validation"], labels,
                            ids, f"iteration {iteration}")[0]

    def save(folder):  # what --resume needs
        accelerator.save_state(str(folder))
        info["seconds"] = time.perf_counter() - began
        write_json(folder / "run.json", info)

    def export(folder):  # a transformers folder
        if accelerator.is_main_process:
            bare.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    # ---- the loop
    stop.catch()
    batches = None
    tokens_before, seconds_before = state["tokens"], 0.0
    model.train()
    for iteration in range(state["iteration"], end):
        epoch, k = divmod(iteration, per_epoch)
        if batches is None or k == 0:
            batches = epoch_batches(lengths, global_batch, cfg.length_window, cfg.seed, epoch)
        # With both orders, a pair that came as (a, b) comes as (b, a) in the next epoch.
        pairs = [orders[(row + epoch) % len(orders)][row] for row in batches[k]]

        # ---- one update: learning rate, forward and backward, step
        with log.stage("updates"):
            lr = learning_rate(cfg, iteration, total)
            runtime.set_learning_rate([optimizer], lr)
            loss = forward_backward(cfg, accelerator, model, collate, pairs, iteration)
            norm = accelerator.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            (loss, norm), signum, late = stop.agree(accelerator, loss * world, norm)
            bad = updates.count(math.isfinite(loss + norm), iteration + 1)
            if not bad or accelerator.scaler:  # a scaler skips by itself, and learns from it
                optimizer.step()
            optimizer.zero_grad()

        # ---- log, and evaluate after each epoch
        done = iteration + 1
        epoch_ends = done % per_epoch == 0
        state.update(iteration=done, skipped=updates.skipped)
        state["tokens"] += sum(len(pair["input_ids"]) for pair in pairs)
        if not bad:
            state["loss_sum"] += loss * len(pairs)
            state["loss_pairs"] += len(pairs)
        row = {}
        if epoch_ends or done == end or done % cfg.log_interval == 0:
            tokens, seconds = state["tokens"], log.seconds["updates"]
            speed = round((tokens - tokens_before) / (seconds - seconds_before))
            tokens_before, seconds_before = tokens, seconds
            row = {"iter": done, "tokens": tokens, "lr": lr, "loss": loss, "grad_norm": norm,
                   "tokens_per_s": speed}
        log.progress(done, row and f"loss {loss:.4f}, {row['tokens_per_s']:,} tokens/s")
        if epoch_ends:
            found = validate(done)
            row |= {name: found[name] for name in METRICS} | {"val_loss": found["loss"]}
            row["train_loss"] = state["loss_sum"] / max(1, state["loss_pairs"])
            if found["f1"] > state["best_f1"]:
                runtime.save_checkpoint(accelerator, out_dir / "best", export)
                state["best_f1"] = found["f1"]
            state.update(metrics=found, loss_sum=0.0, loss_pairs=0)

        # ---- save, stop
        if row:
            log.write(row)
        if epoch_ends or done == end or signum or late:
            checkpoint = out_dir / f"checkpoint-{done:06d}"
            runtime.save_checkpoint(accelerator, checkpoint, save, cfg.keep_checkpoints)
            stop.saved_at = time.monotonic()
        if signum:
            break

    # ---- the best epoch, by F1 on the validation pairs
    _, signum, _ = stop.agree(accelerator)  # which ended the loop, or came later
    if signum:
        log.close()
        stop.exit(signum, out_dir)
    stop.release()  # all is saved: Ctrl-C ends it at once
    if end % per_epoch:  # no checkpoint knows of this: one that resumes ends as if never stopped
        state["metrics"] = validate(end)
        if state["best_f1"] < 0:
            runtime.save_checkpoint(accelerator, out_dir / "best", export)
    print0("time:", log.close())
    log.plot(METRICS[:2], "pair", state["resumed"])
    return report(cfg, accelerator, data, labels, str(out_dir / "best"), seed=cfg.seed,
                  last=state["metrics"], minutes=(time.perf_counter() - began) / 60)


def what_stays(cfg, data, labels, global_batch):
    """{name: value} of what a checkpoint is bound to."""
    names = ("model", "seed", "length_window", "both_orders", "max_length")
    same = {name: getattr(cfg, name) for name in names}
    same |= {"pairs an iteration": global_batch, "labels": list(labels)}
    for split in ("train", "validation"):
        content = data[split].to_csv(index=False).encode()
        same[f"content of the {split} pairs"] = hashlib.sha256(content).hexdigest()[:12]
    return same


def train_seeds(cfg):
    """main() once a seed, in out_dir/seed-N. Writes seeds.json: means, deviations and all runs."""
    jobs = []
    free = dict.fromkeys(("out_dir", "resume", "overwrite", "predict", "compare", "log_interval",
                          "max_iters", "max_epochs", "eval_batch_size", "keep_checkpoints"))
    for seed in cfg.seeds.split(","):  # all folders are looked at before the first run starts
        folder = Path(cfg.out_dir, f"seed-{int(seed)}")
        resume = cfg.resume and bool(not jobs or runtime.checkpoints(folder))
        one = replace(cfg, seed=int(seed), seeds="", out_dir=str(folder), resume=resume,
                      overwrite=cfg.overwrite or (cfg.resume and not resume))
        start, saved = runtime.find_run(folder, resume, one.overwrite)
        if start:  # an old run, which a killed --overwrite did not come to, is not taken for ours
            runtime.check_same(start, saved.get("config", {}) | free, asdict(one) | free)
        jobs.append(one)
    runs = [main(one) for one in jobs]
    figures = pandas.json_normalize(runs).drop(columns=["seed", "n"]).select_dtypes("number")
    mean, deviation = figures.mean(), figures.std()
    for name in [name for name in figures if name.split(".")[-1] in METRICS]:
        print0(f"{name}, mean and deviation of {len(runs)} seeds: {mean[name]:.4f} +- "
               f"{deviation[name]:.4f}")
    results = {**mean, **deviation.add_suffix("_std"), "n": runs[0]["n"], "runs": runs}
    write_json(Path(cfg.out_dir, "seeds.json"), results)
    print0(f"wrote {cfg.out_dir}/seeds.json; the best model of these: "
           f"{max(runs, key=lambda run: run['f1'])['model']}")
    return results


# ---------------------------------------------------------------------------------------------
# main


def finetuned_model(cfg):
    """What --eval_only and --predict load: best/, or a --model that best/ was not made from."""
    best, made_from = Path(cfg.out_dir, "best"), None
    with contextlib.suppress(OSError, ValueError, KeyError):
        made_from = runtime.read_run(cfg.out_dir)["config"]["model"]
    if cfg.model not in (Config.model, made_from):
        return cfg.model
    if not best.is_dir():
        raise UserError(f"{best} does not exist; train first, or name a fine-tuned --model")
    return str(best)


def print_predictions(cfg):
    """Print the predictions for a file's pairs (a TSV) or two texts (a line); returns a table."""
    if len(cfg.predict) == 2:
        table = pandas.DataFrame([cfg.predict], columns=COLUMNS[:2])
    else:
        table = read_pairs(cfg.predict[0], cfg.columns.split(",")[:2])
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the predictions alone
        accelerator = runtime.make_accelerator(cfg.mixed_precision)
        model, tokenizer = load_model(finetuned_model(cfg), accelerator)
    logits = predict(cfg, accelerator, model, tokenizer, table)
    table = add_predictions(table, logits, model.config.id2label)
    one = f"{table.prediction[0]} {table.probability[0]:.4f}"
    print0(one if len(cfg.predict) == 2 else tab_separated(table))
    return table


def check_config(cfg):
    """Raise UserError for options that cannot be."""
    check_range(cfg, 1, "max_epochs", "batch_size", "gradient_accumulation_steps",
                "eval_batch_size", "log_interval", "keep_checkpoints")
    check_range(cfg, 0, "max_iters", "max_length", "length_window", "learning_rate",
                "warmup_iters", "weight_decay", "grad_clip")
    check_range(cfg, 0, "seed", high=2**63 - 1)
    columns, words = cfg.columns.split(","), cfg.seeds.split(",") if cfg.seeds else []
    model, trains = Path(cfg.model), not (cfg.eval_only or cfg.predict or cfg.compare)
    inside = model.is_dir() and model.resolve().is_relative_to(Path(cfg.out_dir).resolve())
    wrong = {
        "model must lie outside of the --out_dir that is written": trains and inside,
        "max_length must be 8 or more, or 0": 0 < cfg.max_length < 8,
        "columns must be three names, FIRST,SECOND,LABEL": "" in columns or len({*columns}) != 3,
        "predict takes a file or two texts, in quotation marks and not empty":
            len(cfg.predict) not in (1, 2) or not all(map(str.strip, cfg.predict)),
        "compare takes two run folders": len(cfg.compare) != 2,
        "seeds must be two or more different numbers, as in 1,2,3": cfg.seeds and not (
            all(word.isdecimal() and len(word) < 19 for word in words)
            and len(set(map(int, words))) == len(words) > 1),
    }
    # () where it is not said, or said with an unset shell variable behind it
    unsaid = {"predict", "compare"} - runtime.given_names(cfg)
    for message, is_wrong in wrong.items():
        if is_wrong and message.split()[0] not in unsaid:
            raise UserError(f"--{message}, not {getattr(cfg, message.split()[0])!r}", 2)


def main(cfg):
    """Train, score, predict or compare. Returns the results, as in results.json."""
    check_config(cfg)
    if cfg.compare:
        return compare(cfg.compare)
    transformers.utils.logging.set_verbosity_error()  # what it warns of is said here in a line
    transformers.utils.logging.disable_progress_bar()
    if cfg.predict:
        return print_predictions(cfg)
    if cfg.seeds and not cfg.eval_only:
        return train_seeds(cfg)
    with runtime.hold_run("finetune_mrpc.py", cfg.out_dir) as stop:
        if not cfg.eval_only:
            return train(cfg, stop)
        accelerator = runtime.make_accelerator(cfg.mixed_precision)
        data, labels = load_pairs(cfg)
        return report(cfg, accelerator, data, labels, finetuned_model(cfg), "eval-")


if __name__ == "__main__":
    run_script(main, CFG)
