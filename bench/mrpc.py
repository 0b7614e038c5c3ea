"""fine-tuning a 22M encoder on pairs beside the lesson's fp32 loop, tokens/s; 3 minutes"""

import random

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from bench.scripts import logged_speed
from bench.turns import Side, compare

WORDS = [f"w{i}" for i in range(30_522)]


def lesson(folder, file):
    """Tokens, padding not counted, of 20 updates of 8 pairs by the plain loop of a lesson."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    pairs = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
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


def write_pairs(file, count):
    """Pairs of random words, as long as MSR's pairs: 53 +- 14 tokens."""
    lines = ["sentence1\tsentence2\tlabel"]
    for i in range(count):
        length = int(min(55, max(10, random.gauss(26, 7))))
        first, second = (" ".join(random.choices(WORDS[1:], k=length)) for _ in range(2))
        lines.append(f"{first}\t{second}\t{i % 2}")
    file.write_text("\n".join(lines), encoding="utf-8")


def run(cfg, folder):
    """A random BERT of MiniLM's shape and a tokenizer of as many words."""
    random.seed(1)
    write_pairs(folder / "train.tsv", 640)
    write_pairs(folder / "val.tsv", 16)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape))
    model.save_pretrained(folder / "model")
    engine = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "w0"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="w0")
    tokenizer.save_pretrained(folder / "model")
    options = {"model": str(folder / "model"), "train_file": str(folder / "train.tsv"),
               "validation_file": str(folder / "val.tsv"), "max_iters": 40, "log_interval": 20}
    return compare(cfg, {"fine-tune 22M, 8 pairs an update (tokens/s)": [
        Side("finetune_mrpc.py", logged_speed, ("finetune_mrpc", options, folder), ours=True),
        Side("plain fp32 loop", lesson, (folder / "model", folder / "train.tsv"))]})
