"""fine-tuning a 22M encoder on pairs beside the lesson's fp32 loop, tokens/s; 3 minutes"""

import random

import torch

from bench.turns import Side, compare, logged_speed


def lesson(model, file):
    """Tokens, padding not counted, of 20 updates of 8 pairs by the plain loop of a lesson."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    model = AutoModelForSequenceClassification.from_pretrained(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    with open(file, encoding="utf-8") as f:
        pairs = [line.split("\t") for line in f.read().splitlines()[1:]]
    while True:
        tokens = 0
        for _ in range(20):
            first, second, labels = zip(*random.sample(pairs, 8), strict=True)
            batch = tokenizer(first, second, padding=True, return_tensors="pt")
            loss = model(**batch, labels=torch.tensor([int(label) for label in labels])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tokens += int(batch["attention_mask"].sum())
        yield tokens


def write_model(folder, tiny):
    """A random BERT of MiniLM's shape and a tokenizer of 30,522 words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 64} if tiny else shape
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape))
    model.save_pretrained(folder)
    engine = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30_522)}, "w0"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="w0").save_pretrained(
        folder)


def run(cfg, folder):
    """640 pairs of random words, as long as MSR's pairs: 53 +- 14 tokens."""
    def text(length):
        return " ".join(f"w{random.randrange(1, 30_522)}" for _ in range(length))

    random.seed(1)
    lengths = [int(min(55, max(10, random.gauss(26, 7)))) for _ in range(640)]
    pairs = [f"{text(n)}\t{text(n)}\t{i % 2}" for i, n in enumerate(lengths)]
    for name, rows in {"train": pairs, "val": pairs[:16]}.items():
        rows = ["sentence1\tsentence2\tlabel", *rows]
        (folder / f"{name}.tsv").write_text("\n".join(rows), encoding="utf-8")
    write_model(folder / "model", cfg.tiny)
    model, file = str(folder / "model"), str(folder / "train.tsv")
    options = {"model": model, "train_file": file, "validation_file": str(folder / "val.tsv"),
               "max_iters": 40, "log_interval": 20}
    return compare(cfg, {"fine-tune 22M, 8 pairs an update (tokens/s)": [
        Side("finetune_mrpc.py", logged_speed, ("finetune_mrpc", options, str(folder))),
        Side("plain fp32 loop", lesson, (model, file))]})
