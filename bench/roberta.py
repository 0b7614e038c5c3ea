"""KantaiBERT, 84M, 64 lines an update, beside the Trainer's defaults, tokens/s; 5 minutes"""

import time

import train_roberta
from bench.turns import Side, compare, logged_speed, read_text


def trainer_defaults(file, tokenizer, shape, folder):
    """Tokens/s, padding not counted, of the last of six updates by transformers' Trainer as it
    comes: fp32 on a CPU, lines padded to the longest, the vocabulary head over every position."""
    import transformers

    tokenizer = train_roberta.open_tokenizer(tokenizer)
    model = train_roberta.make_model(train_roberta.Config(**shape), tokenizer)
    model = transformers.RobertaForMaskedLM(model.config)
    with open(file, encoding="utf-8") as f:
        lines = tokenizer(f.read().splitlines(), truncation=True, max_length=128)["input_ids"]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer)
    tokens = []  # of each batch
    ends = []  # when each update ended

    def count(batch):
        tokens.append(sum(len(row["input_ids"]) for row in batch))
        return collate(batch)

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    yield 0
    while True:
        tokens.clear()
        ends.clear()
        transformers.Trainer(
            model, transformers.TrainingArguments(
                folder, max_steps=6, per_device_train_batch_size=64, save_strategy="no",
                report_to="none", disable_tqdm=True),
            data_collator=count, train_dataset=[{"input_ids": ids} for ids in lines],
            callbacks=[Clock]).train()
        yield sum(tokens[3:6]), ends[5] - ends[2], {}


def run(cfg, folder):
    """Both with one tokenizer, of the whole text, on 4,096 of its lines."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32} if cfg.tiny else {}
    lines = [line for line in read_text(cfg.text).splitlines() if line.strip()]
    lines = lines[: 600 if cfg.tiny else None]
    vocabulary = train_roberta.train_tokenizer(lines, 300 if cfg.tiny else 52_000)
    train_roberta.make_tokenizer(*vocabulary).save_pretrained(folder / "tokenizer")
    file = folder / "lines.txt"
    file.write_text("\n".join(lines[:4096]), encoding="utf-8")
    options = {"source": str(file), "tokenizer": str(folder / "tokenizer"), "max_iters": 6,
               "log_interval": 3, "eval_interval": 0, **shape}
    return compare(cfg, {"KantaiBERT 84M, 64 lines an update (tokens/s)": [
        Side("train_roberta.py", logged_speed, ("train_roberta", options, str(folder))),
        Side("Trainer's defaults", trainer_defaults,
             (str(file), str(folder / "tokenizer"), shape, str(folder / "peer")))]}, rounds=3)
