"""KantaiBERT, 84M, 64 lines an update, beside the Trainer's defaults, tokens/s; 5 minutes"""

import transformers

import train_roberta
from bench.scripts import logged_speed, read_text
from bench.turns import Side, compare


def trainer_defaults(file, folder):
    """Tokens/s, padding not counted, of three updates by transformers' Trainer as it comes: fp32 on
    a CPU, lines padded to the longest, the vocabulary head over every position."""
    tokenizer = train_roberta.open_tokenizer(folder / "tokenizer")
    config = train_roberta.make_model(train_roberta.Config(), tokenizer).config
    model = transformers.RobertaForMaskedLM(config)
    lines = file.read_text(encoding="utf-8").splitlines()
    ids = tokenizer(lines, truncation=True, max_length=128)["input_ids"]
    arguments = transformers.TrainingArguments(
        folder / "peer", max_steps=3, per_device_train_batch_size=64, save_strategy="no",
        report_to="none", disable_tqdm=True, include_num_input_tokens_seen="non_padding")
    while True:
        trainer = transformers.Trainer(
            model, arguments, transformers.DataCollatorForLanguageModeling(tokenizer),
            train_dataset=[{"input_ids": line} for line in ids])
        seconds = trainer.train().metrics["train_runtime"]
        yield {"rate": trainer.state.num_input_tokens_seen / seconds}


def run(cfg, folder):
    """Both with one tokenizer, of the whole text, on 4,096 of its lines."""
    lines = [line for line in read_text(cfg.text).splitlines() if line.strip()]
    train_roberta.train_tokenizer(lines, 52_000).save_pretrained(folder / "tokenizer")
    file = folder / "lines.txt"
    file.write_text("\n".join(lines[:4096]), encoding="utf-8")
    options = {"source": str(file), "tokenizer": str(folder / "tokenizer"), "max_iters": 6,
               "log_interval": 3, "eval_interval": 0}
    return compare(cfg, {"KantaiBERT 84M, 64 lines an update (tokens/s)": [
        Side("train_roberta.py", logged_speed, ("train_roberta", options, folder), ours=True),
        Side("Trainer's defaults", trainer_defaults, (file, folder))]}, rounds=3)
