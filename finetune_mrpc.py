"""Fine-tune BERT on pairs of sentences: do the two say the same (MRPC)?

    python finetune_mrpc.py config/mrpc.py                    # bert-base-uncased, GLUE from the hub
    python finetune_mrpc.py --model FOLDER --train_file train.tsv --validation_file dev.tsv
    torchrun --nproc_per_node 2 finetune_mrpc.py ...          # two GPUs, or two processes on a CPU
    python finetune_mrpc.py --eval_only=True --validation_file dev.tsv
    python finetune_mrpc.py --predict "He sold the firm." "The firm was sold by him."

Writes out/mrpc/: best/ (a transformers folder), checkpoint-*, log.csv, loss.png, results.json,
predictions.tsv (worst mistakes first), confusion.png.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from configurator import at_least, changed, fail, load


@dataclass
class Config:
    """Fine-tune BERT on pairs of sentences."""

    # model and data
    model: str = "bert-base-uncased"  # hub name or folder; one made by train_roberta.py will do
    train_file: str = ""  # TSV, CSV, JSONL or parquet; no file at all: GLUE MRPC from the hub
    validation_file: str = ""  # none beside a train_file: a fixed stratified tenth of that
    test_file: str = ""  # scored once, at the end
    max_length: int = 0  # tokens a pair, the rest is cut off; 0: as many as the model takes
    # training
    epochs: int = 3  # passes over the training pairs, an evaluation after each
    max_steps: int = 0  # stop after so many updates; 0: the whole recipe, whose decay always holds
    batch_size: int = 8  # pairs that a process computes at once
    gradient_accumulation_steps: int = 1  # such batches a process and update
    length_window: int = 32  # batches among which pairs are grouped by length; 0: shuffled only
    lr: float = 5e-5  # falls linearly to 0
    weight_decay: float = 0.01  # on everything, as torch's AdamW does
    grad_clip: float = 0.0  # largest norm of the gradient; 0: off
    mixed_precision: Literal["auto", "fp16", "bf16", "no"] = "auto"  # auto: what this device likes
    seed: int = 42  # of the new head, the order of the pairs and dropout
    seeds: str = ""  # "1,2,3": one run for each, then mean and deviation
    # evaluation
    eval_batch_size: int = 32  # changes the speed, not the result
    eval_only: bool = False  # score out_dir/best, or a --model that is fine-tuned already
    predict: tuple[str, ...] = ()  # a FILE of pairs, or two sentences; the model as in eval_only
    # run folder
    out_dir: str = "out/mrpc"  # everything is written here
    log_interval: int = 25  # updates between two rows of log.csv
    keep_checkpoints: int = 2  # the newest ones
    resume: bool = False  # go on from the newest whole checkpoint of out_dir
    overwrite: bool = False  # start again in a folder that holds a run


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import contextlib
import csv
import hashlib
import json
import math
import shutil
import statistics
import time
from pathlib import Path

import huggingface_hub
import pandas
import torch
import transformers
from accelerate.utils import broadcast_object_list
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy

import runtime
from runtime import say

LABELS = {0: "not_equivalent", 1: "equivalent"}
COLUMNS = ["sentence1", "sentence2", "label"]
ORIGINAL = {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"}  # MSR's names
METRICS = ["accuracy", "f1", "accuracy_f1_mean"]

# ---------------------------------------------------------------------------------------------
# pairs


def read_pairs(path, wanted=COLUMNS):
    """The pairs of a TSV, CSV, JSONL or parquet file as a table with the columns `wanted`.

    Between tabs a quotation mark is text, as in the original corpus. A bad row ends the program.
    """
    try:
        if path.endswith(".parquet"):
            table = pandas.read_parquet(path)
        elif path.endswith((".jsonl", ".json")):
            table = pandas.read_json(path, lines=True, dtype=False)
        else:
            with open(path, encoding="utf-8-sig") as f:
                tabs = "\t" in f.readline()
            options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
            options |= {"sep": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
            table = pandas.read_csv(path, **options)
            if not isinstance(table.index, pandas.RangeIndex):  # pandas makes row names of them
                raise ValueError("more cells in a row than in the header")
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
    table = table.rename(columns=ORIGINAL)
    for column in wanted:
        if column not in table and len(table.columns):
            fail(f"{path} has no column {column}, only {', '.join(map(str, table))}; it needs "
                 f"{', '.join(wanted)} or the original {', '.join(ORIGINAL)}")  # fmt: skip
    if not len(table):
        fail(f"{path} holds no pairs, only a header or nothing")
    table = table[wanted].copy()
    for column in wanted[:2]:
        for row, text in enumerate(table[column], 1):
            if not isinstance(text, str) or not text.strip():
                fail(f"{path}, pair {row}: {column} is empty")
    if "label" in wanted:
        labels = [{"0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(str(v).strip()) for v in table.label]
        if None in labels:
            row = labels.index(None)
            fail(f"{path}, pair {row + 1}: the label is {table.label[row]!r}; it must be 0 or 1")
        table["label"] = labels
    return table


def load_pairs(cfg):
    """{'train': table, 'validation': table, perhaps 'test'}, from the files or else the hub."""
    files = {"train": cfg.train_file, "validation": cfg.validation_file, "test": cfg.test_file}
    data = {split: read_pairs(path) for split, path in files.items() if path}
    if not data or ("train" not in data and not cfg.eval_only):
        say("pairs: GLUE MRPC from the hub, nyu-mll/glue")
        try:
            import datasets

            hub = datasets.load_dataset("nyu-mll/glue", "mrpc").with_format("pandas")
        except Exception as error:  # no network, a proxy, a full disk: the way out is the same
            fail(f"no GLUE MRPC from the hub ({type(error).__name__}: {error}); give --train_file "
                 f"and --validation_file, and a local folder as --model")  # fmt: skip
        hub = {split: hub[split][:][COLUMNS] for split in files}
        data = {split: table for split, table in hub.items() if table.label.min() >= 0} | data
    if "validation" not in data:
        if "train" not in data:
            fail("nothing to score: give --validation_file")
        try:
            data["train"], data["validation"] = train_test_split(
                data["train"], test_size=0.1, random_state=0, stratify=data["train"].label
            )
        except ValueError as error:
            fail(f"no tenth of {cfg.train_file} for validation ({error}): give --validation_file")
        say(f"no --validation_file: a fixed stratified tenth of {cfg.train_file} is held out")
    say("pairs: " + ", ".join(f"{len(table):,} {split}" for split, table in data.items()))
    return data


def attention(device_type):
    """transformers' attention for this device; None: its default. On a CPU sdpa takes 1.4 times as
    long as eager (2 cores, bf16)."""
    return "eager" if device_type == "cpu" else None


def load_model(name, accelerator, finetuned=False):
    """(model, tokenizer) of a hub name or folder. finetuned: its head must be there already."""
    options = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    options["attn_implementation"] = attention(accelerator.device.type)
    try:
        with accelerator.local_main_process_first():
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=2, dtype=torch.float32, output_loading_info=True, **options
            )
            types = ["token_type_ids"] * (getattr(model.config, "type_vocab_size", 0) > 1)
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                name, model_input_names=["input_ids", *types, "attention_mask"]
            )
    except Exception as error:  # anything can be wrong with a stranger's folder
        fail(f"cannot load the model {name} ({str(error).strip().splitlines()[0]}); without "
             f"network give a local folder as --model")  # fmt: skip
    new = sorted(info["missing_keys"])
    if finetuned and new:
        fail(f"{name} is not fine-tuned on pairs, it has no {new[0]}; train it first")
    if tokenizer.pad_token_id is None:
        fail(f"the tokenizer of {name} has no padding token; choose a model like BERT")
    if not finetuned:
        size = f"{model.num_parameters() / 1e6:.1f}M parameters"
        say(f"model: {name}, {size}, new: {', '.join(new) or 'nothing'}")
    return model, tokenizer


def encode(model, tokenizer, table, max_length):
    """A list of {input_ids, attention_mask, labels}, one a pair, not padded."""
    room = getattr(model.config, "max_position_embeddings", 512)
    room -= (getattr(model.config, "pad_token_id", 0) or 0) + 1  # RoBERTa's positions start there
    columns = tokenizer(list(table.sentence1), list(table.sentence2), truncation=True,
                        max_length=min(max_length or room, room))  # fmt: skip
    columns["labels"] = list(table.label) if "label" in table else [0] * len(table)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def epoch_batches(lengths, size, window, seed, epoch):
    """The row numbers of each batch of an epoch: a pure function of the arguments.

    A shuffle, cut into batches, the last of them short. With a window, each `window` batches of the
    shuffle are sorted by length before the cut and the batches are shuffled after it: every epoch
    still makes new batches, and padding adds 2 % to the tokens of MRPC instead of 35 %.
    """
    generator = torch.Generator().manual_seed(mix(seed, "order", epoch))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if window:
        chunks = [order[i : i + window * size] for i in range(0, len(order), window * size)]
        order = [row for chunk in chunks for row in sorted(chunk, key=lengths.__getitem__)]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if window:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    return batches


def mix(*parts):
    """A seed for torch, a pure function of the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


# ---------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def predict(cfg, accelerator, model, tokenizer, features):
    """Logits (n, 2) in fp32 on the CPU, in the order of `features`, the same in every process."""
    collate = transformers.DataCollatorWithPadding(tokenizer)
    rows = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
    batches = [rows[i : i + cfg.eval_batch_size] for i in range(0, len(rows), cfg.eval_batch_size)]
    logits = torch.zeros(len(rows), 2, device=accelerator.device)
    model.eval()
    for batch in batches[accelerator.process_index :: accelerator.num_processes]:
        inputs = collate([features[i] for i in batch]).to(accelerator.device)
        del inputs["labels"]
        with accelerator.autocast():
            logits[batch] = model(**inputs).logits.float()  # (B, 2)
    model.train()
    return accelerator.reduce(logits).cpu()  # a row is 0 in all processes but the one that had it


def evaluate(cfg, accelerator, model, tokenizer, features, name):
    """(metrics, logits): accuracy, F1, loss, and what calling every pair equivalent would get."""
    logits = predict(cfg, accelerator, model, tokenizer, features)
    truth, guess = [f["labels"] for f in features], logits.argmax(-1).tolist()
    found = {"accuracy": accuracy_score(truth, guess)}
    found["f1"] = f1_score(truth, guess, zero_division=0)
    found["accuracy_f1_mean"] = (found["accuracy"] + found["f1"]) / 2
    found["loss"] = cross_entropy(logits, torch.tensor(truth)).item()
    found["baseline_accuracy"] = statistics.fmean(truth)
    found["baseline_f1"] = f1_score(truth, [1] * len(truth), zero_division=0)
    say(f"{name}, {len(truth):,} pairs: {', '.join(f'{k} {v:.4f}' for k, v in found.items())}")
    if len(set(guess)) == 1:
        say(f"warning: the model calls every pair {LABELS[guess[0]]}")
    return {key: float(value) for key, value in found.items()} | {"n": len(truth)}, logits


def report(cfg, accelerator, data, folder, more):
    """Score the model in `folder`; write results.json, predictions.tsv and confusion.png."""
    model, tokenizer = load_model(folder, accelerator, finetuned=True)
    model.to(accelerator.device)
    results, out_dir = {}, Path(cfg.out_dir)
    for split in [s for s in ("test", "validation") if s in data]:
        features = encode(model, tokenizer, data[split], cfg.max_length)
        name = f"{split}, {folder}"
        results[split], logits = evaluate(cfg, accelerator, model, tokenizer, features, name)
    results = results.pop("validation") | results | {"model": folder} | more
    if accelerator.is_main_process:
        probability, prediction = (column.numpy() for column in logits.softmax(-1).max(-1))
        table = data["validation"].assign(prediction=prediction, probability=probability)
        wrong = table.label != table.prediction  # surest first among them, last among the others
        table = table.iloc[(table.probability * (1 - 2 * wrong)).argsort(kind="stable")]
        lines = ["\t".join(table), *("\t".join(" ".join(str(v).split()) for v in row)
                                     for row in table.itertuples(index=False))]  # fmt: skip
        counts = pandas.crosstab(table.label, table.prediction)
        counts = counts.reindex(index=LABELS, columns=LABELS, fill_value=0).values
        with runtime.disk_errors(out_dir):
            write(out_dir / "predictions.tsv", "\n".join(lines) + "\n")
            write(out_dir / "results.json", json.dumps(results, indent=2) + "\n")
            draw_confusion(counts, out_dir / "confusion.png")
        say(f"wrote results.json, predictions.tsv, confusion.png into {out_dir}")
    return results


def draw_confusion(counts, path):
    """A picture of how often each label (row) was called what (column)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues", vmin=0, vmax=2 * counts.max())
    for row in LABELS:
        for column in LABELS:
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", size=16)
    axes.set(xticks=[0, 1], yticks=[0, 1], xlabel="prediction", ylabel="label")
    axes.set_xticklabels(LABELS.values())
    axes.set_yticklabels(LABELS.values(), rotation=90, va="center")
    figure.savefig(path, dpi=110)


def write(path, text):
    """Write a text file that is whole or absent."""
    beside = path.with_name(f".tmp-{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


# ---------------------------------------------------------------------------------------------
# checkpoints


def save(accelerator, folder, state):
    """A checkpoint: what accelerate keeps, and config.json."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    with runtime.disk_errors(folder.parent):
        accelerator.save_state(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write(temporary / "config.json", json.dumps(state, indent=2) + "\n")
            runtime.seal_folder(temporary, folder)
            for old in runtime.checkpoints(folder.parent)[state["config"]["keep_checkpoints"] :]:
                runtime.remove(old)
    accelerator.wait_for_everyone()


def find_checkpoint(cfg, same):
    """(folder, state) to go on from, (None, None) for a fresh run. Exits where none will do."""
    found = runtime.start_run(cfg.out_dir, cfg.resume, cfg.overwrite)
    for folder in found:
        if what := runtime.damage(folder):
            say(f"warning: {folder}: {what}; trying the checkpoint before it")
            continue
        state = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, value in same.items():
            if state["same"][name] != value:
                fail(f"{name} is {value}, but {folder} was made with {state['same'][name]}", 2)
        say(f"going on from {folder}")
        return folder, state
    if found:
        fail(f"no checkpoint in {cfg.out_dir} is whole; start again with --overwrite=True")
    return None, None


def use_plain_names(accelerator):
    """Keep the names of the weights in checkpoints free of the 'module.' that DDP puts before them,
    so that one process can go on where two stopped."""

    def on_save(models, weights, folder):
        if weights:  # not where FSDP or DeepSpeed save their own
            weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models]

    def on_load(models, folder):
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)


# ---------------------------------------------------------------------------------------------
# training


def train(cfg, accelerator, data, stop):
    """One run with one seed, start to end. Returns what results.json says."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    out_dir, main_process = Path(cfg.out_dir), accelerator.is_main_process
    torch.manual_seed(cfg.seed)  # of the new head
    model, tokenizer = load_model(cfg.model, accelerator)
    pairs, validation = (encode(model, tokenizer, data[split], cfg.max_length)
                         for split in ("train", "validation"))  # fmt: skip
    lengths = [len(pair["input_ids"]) for pair in pairs]
    global_batch = cfg.batch_size * cfg.gradient_accumulation_steps * world
    if len(pairs) < global_batch:
        fail(f"{len(pairs)} training pairs are fewer than one batch of {global_batch}; "
             f"give more or a smaller --batch_size")  # fmt: skip
    per_epoch = math.ceil(len(pairs) / global_batch)
    total = per_epoch * cfg.epochs
    end = min(cfg.max_steps or total, total)

    def learning_rate(step):
        return cfg.lr * (1 - step / total)

    # ---- run folder
    same = {"model": cfg.model, "seed": cfg.seed, "training pairs": len(pairs),
            "pairs an update": global_batch, "length_window": cfg.length_window}  # fmt: skip
    found = [None, None]
    if main_process:
        with runtime.disk_errors(out_dir):
            out_dir.mkdir(exist_ok=True)
            found = list(find_checkpoint(cfg, same))
            write(out_dir / "config.json", json.dumps(asdict(cfg), indent=2) + "\n")
    folder, state = broadcast_object_list(found)
    state = state or {"step": 0, "tokens": 0, "metrics": None, "best_f1": -1.0,
                      "loss_sum": 0.0, "loss_pairs": 0}  # fmt: skip
    state |= {"config": asdict(cfg), "same": same}
    if main_process:
        names = [*runtime.LOG_COLUMNS, *METRICS]
        log = runtime.open_log(out_dir / "log.csv", names, keep_until=state["step"])

    # ---- optimizer
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate(state["step"]),
                                  weight_decay=cfg.weight_decay,
                                  fused=device.type in ("cpu", "cuda"))  # fmt: skip
    accelerator.free_memory()  # of the run with the seed before
    model, optimizer = accelerator.prepare(model, optimizer)
    if folder:
        accelerator.load_state(folder)
        set_lr(optimizer, learning_rate(state["step"]))
    say(f"{device.type} x {world}, precision {accelerator.mixed_precision}: {end:,} updates of "
        f"{global_batch} pairs, {per_epoch:,} an epoch")  # fmt: skip

    def validate():
        """Score the validation pairs, keep the best model by F1. Returns columns for the log."""
        plain = accelerator.unwrap_model(model)
        name = f"validation, update {state['step']}"
        found, _ = evaluate(cfg, accelerator, plain, tokenizer, validation, name)
        if main_process and found["f1"] > state["best_f1"]:
            with runtime.disk_errors(out_dir):
                plain.save_pretrained(out_dir / ".tmp-best")
                tokenizer.save_pretrained(out_dir / ".tmp-best")
                runtime.seal_folder(out_dir / ".tmp-best", out_dir / "best")
        train_loss = state["loss_sum"] / max(1, state["loss_pairs"])
        state.update(metrics=found, best_f1=max(found["f1"], state["best_f1"]))
        state.update(loss_sum=0.0, loss_pairs=0)
        scores = {name: found[name] for name in METRICS}
        return {"train_loss": train_loss, "val_loss": found["loss"]} | scores

    def write_log(row):
        if not main_process:
            return
        with runtime.disk_errors(out_dir):
            log(row)
            if "val_loss" in row:
                panel = "+".join(METRICS)
                runtime.plot_log(out_dir / "log.csv", out_dir / "loss.png", panel, unit="pair")

    collate = transformers.DataCollatorWithPadding(tokenizer)
    bar = runtime.progress_bar(end, state["step"], shown=main_process)
    batches, row, skipped, since, tokens_since = None, {}, 0, time.perf_counter(), state["tokens"]
    model.train()
    for step in range(state["step"], end):
        epoch, k = divmod(step, per_epoch)
        if not batches or k == 0:
            batches = epoch_batches(lengths, global_batch, cfg.length_window, cfg.seed, epoch)
        rows, loss = batches[k], torch.zeros((), device=device)
        parts = [rows[i : i + cfg.batch_size] for i in range(0, len(rows), cfg.batch_size)]
        mine = parts[rank::world]

        # ---- one update: forward, backward, step, schedule, zero_grad
        torch.manual_seed(mix(cfg.seed, step, rank))  # of dropout: no random state to restore
        for i, part in enumerate(mine or parts[:1]):  # no part left for this process: it weighs 0
            inputs = collate([pairs[row] for row in part]).to(device)
            labels = inputs.pop("labels")  # (B,)
            last = i + 1 >= len(mine)  # only then do processes add up their gradients
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                logits = model(**inputs).logits  # (B, 2)
                share = cross_entropy(logits.float(), labels, reduction="sum") / len(rows)
                share = share * bool(mine)
                accelerator.backward(share * world)  # DDP divides by the number of processes
            loss += share.detach()
        accelerator.unscale_gradients()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if cfg.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip, norm)
        told = accelerator.gather(torch.stack([loss, norm, loss.new_tensor(stop.signum)]))
        losses, norms, signals = told.view(world, 3).T.tolist()
        loss, norm, signum = sum(losses), norms[0], int(max(signals))
        finite = math.isfinite(loss + norm)
        skipped = 0 if finite else skipped + 1
        if skipped == 10:
            fail(f"loss {loss}, gradient norm {norm}: not finite in 10 updates in a row, the last "
                 f"of them {step + 1}; checkpoints are untouched; lower --lr")  # fmt: skip
        if finite or accelerator.scaler:  # a scaler skips by itself, and learns from it
            optimizer.step()
        set_lr(optimizer, learning_rate(step + 1))
        optimizer.zero_grad()

        # ---- log
        state.update(step=step + 1, metrics=None)
        state["tokens"] += sum(lengths[row] for row in rows)
        if finite:
            state["loss_sum"] += loss * len(rows)
            state["loss_pairs"] += len(rows)
        bar.update()
        epoch_ends, ends, row = k + 1 == per_epoch, state["step"] == end, {}
        if epoch_ends or ends or state["step"] % cfg.log_interval == 0:
            now = time.perf_counter()
            speed = round((state["tokens"] - tokens_since) / (now - since))
            since, tokens_since = now, state["tokens"]
            row = {"iter": state["step"], "tokens": state["tokens"], "lr": learning_rate(step),
                   "loss": loss, "grad_norm": norm, "tokens_per_s": speed}  # fmt: skip
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,} tokens/s")
            if bar.disable:
                say(f"update {state['step']}/{end}: loss {loss:.4f}, {speed:,} tokens/s")

        # ---- once in a while: evaluate, save, stop
        if epoch_ends:
            row |= validate()
            since = time.perf_counter()
        if row and (epoch_ends or not ends):
            write_log(row)
        if epoch_ends or ends or signum:
            save(accelerator, out_dir / f"checkpoint-{state['step']:06d}", state)
        if signum:
            say(f"saved {out_dir}/checkpoint-{state['step']:06d}; go on with --resume=True")
            raise SystemExit(128 + signum)
    bar.close()
    if not state["metrics"]:  # the end amid an epoch: the checkpoint knows nothing of this
        row |= validate()  # evaluation, so that a run that goes on equals one that never stopped
        if "iter" in row:
            write_log(row)
    accelerator.wait_for_everyone()
    more = {"seed": cfg.seed, "last": state["metrics"]}
    return report(cfg, accelerator, data, str(out_dir / "best"), more)


def set_lr(optimizer, lr):
    """Set the learning rate, a function of the update: no scheduler with a state to keep."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def train_seeds(cfg, accelerator, data, stop, seeds):
    """A run for each seed, in out_dir/seed-N; out_dir gets the means and the best run's files."""
    out_dir, runs = Path(cfg.out_dir), []
    if runtime.checkpoints(out_dir):
        fail(f"{out_dir} holds a run with one seed; choose another --out_dir for --seeds")
    for seed in seeds:
        folder = out_dir / f"seed-{seed}"
        resume = cfg.resume and bool(runtime.checkpoints(folder))
        say(f"\nseed {seed}, in {folder}")
        one = replace(cfg, seed=seed, out_dir=str(folder), resume=resume)
        runs.append(train(one, accelerator, data, stop))
    results = {"seeds": seeds, "runs": runs, "last": {}, "n": runs[0]["n"]}
    lasts = [run["last"] for run in runs]
    for epoch, into, found in (("best", results, runs), ("last", results["last"], lasts)):
        for name in [*METRICS, "loss", "baseline_accuracy", "baseline_f1"]:
            values = [run[name] for run in found]
            into[name] = statistics.fmean(values)
            into[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        figures = [f"{name} {into[name]:.4f} +- {into[name + '_std']:.4f}" for name in METRICS]
        say(f"{epoch} epoch, mean and deviation of {len(seeds)} seeds: {', '.join(figures)}")
    if accelerator.is_main_process:
        best = out_dir / f"seed-{max(runs, key=lambda run: run['f1'])['seed']}"
        beside = out_dir / ".tmp-best"
        shutil.copytree(best / "best", beside, ignore=shutil.ignore_patterns("SHA256SUMS"))
        runtime.seal_folder(beside, out_dir / "best")
        for name in ("predictions.tsv", "confusion.png"):
            shutil.copy(best / name, out_dir / name)
        write(out_dir / "results.json", json.dumps(results, indent=2) + "\n")


def finetuned_model(cfg):
    """The folder or name for --eval_only and --predict: a --model with a head, or out_dir/best."""
    config, best = Path(cfg.model, "config.json"), Path(cfg.out_dir, "best")
    if config.is_file() and "ForSequenceClassification" in config.read_text(encoding="utf-8"):
        return cfg.model
    if not best.is_dir() and cfg.model == Config.model:
        fail(f"{best} does not exist; train first, or name a fine-tuned --model")
    return str(best) if best.is_dir() else cfg.model


def print_predictions(cfg, accelerator):
    """For two sentences one line, for a file a TSV: what the model thinks, and how surely."""
    wanted = COLUMNS[:2]
    table = (read_pairs(cfg.predict[0], wanted) if len(cfg.predict) == 1
             else pandas.DataFrame([cfg.predict], columns=wanted))  # fmt: skip
    model, tokenizer = load_model(finetuned_model(cfg), accelerator, finetuned=True)
    features = encode(model, tokenizer, table, cfg.max_length)
    logits = predict(cfg, accelerator, model.to(accelerator.device), tokenizer, features)
    probability, prediction = (column.tolist() for column in logits.softmax(-1).max(-1))
    if len(cfg.predict) == 2:
        return say(f"{LABELS[prediction[0]]} {probability[0]:.4f}")
    say("\t".join([*wanted, "prediction", "probability"]))
    for first, second, *rest in zip(*map(table.get, wanted), prediction, probability, strict=True):
        say("\t".join(" ".join(str(cell).split()) for cell in (first, second, *rest)))


def main(cfg):
    """Train, or score, or predict."""
    at_least(cfg, 1, "epochs", "batch_size", "gradient_accumulation_steps", "eval_batch_size")
    at_least(cfg, 1, "log_interval", "keep_checkpoints")
    at_least(cfg, 0, "max_length", "max_steps", "length_window", "lr", "weight_decay", "grad_clip")
    if 0 < cfg.max_length < 8:
        fail(f"--max_length must be 8 or more, or 0, not {cfg.max_length}", 2)
    if len(cfg.predict) > 2:
        fail(f"--predict takes a file or two sentences, not {len(cfg.predict)}; quote them", 2)
    try:
        seeds = [int(word) for word in cfg.seeds.split(",")] if cfg.seeds else []
    except ValueError:
        fail(f"--seeds must look like 1,2,3, not {cfg.seeds!r}", 2)
    for library in (transformers, huggingface_hub):  # what they warn of is said here in a line
        library.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    accelerator = runtime.make_accelerator(cfg.mixed_precision)
    use_plain_names(accelerator)
    if cfg.predict:
        return print_predictions(cfg, accelerator)
    say("configuration:", ", ".join(f"{k}={v!r}" for k, v in changed(cfg).items()) or "defaults")
    data = load_pairs(cfg)
    if accelerator.is_main_process:
        lock = runtime.lock_folder(cfg.out_dir)  # noqa: F841  held until main returns
    if cfg.eval_only:
        return report(cfg, accelerator, data, finetuned_model(cfg), {})
    stop = runtime.StopSignal()
    if seeds:
        train_seeds(cfg, accelerator, data, stop, seeds)
    else:
        train(cfg, accelerator, data, stop)
    stop.release()


if __name__ == "__main__":
    main(CFG)
