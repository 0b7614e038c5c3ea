"""finetune_mrpc.py: against a plain loop, across processes, through a stop, on bad files."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing

import finetune_mrpc
import runtime
from finetune_mrpc import METRICS, Config, epoch_batches, main, read_pairs

SCRIPT = Path(finetune_mrpc.__file__)
SHARED = Path(os.environ.get("SHARED_DATA_DIR", "")) / "msr_paraphrase_train.txt"
WORDS = "the firm sold its old plant to a rival for ten million dollars on late last Monday".split()


def make_pairs(n, seed):
    """Pairs of 3 to 17 words; the words of the second tell the label, but for one pair in ten."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        label, true = int(draw.random() < 0.6), draw.random() < 0.9
        first = draw.choices(WORDS, k=draw.randint(3, 17))
        second = draw.choices(WORDS[:8] if label == true else WORDS[8:], k=draw.randint(3, 17))
        rows.append((" ".join(first), " ".join(second), label))
    return pandas.DataFrame(rows, columns=["sentence1", "sentence2", "label"])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with what train_roberta.py leaves (tiny, untrained) and two files of pairs."""
    home = tmp_path_factory.mktemp("mrpc")
    train, dev = make_pairs(83, 1), make_pairs(37, 2)  # 83 = 10 x 8 + 3: a short last batch
    train.to_csv(home / "train.tsv", sep="\t", index=False)
    dev.to_csv(home / "dev.tsv", sep="\t", index=False)
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(train.sentence2, 400, special_tokens=special, show_progress=False)
    bpe._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, **{f"{k}_token": v for k, v in names.items()}
    )
    config = transformers.RobertaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=66, type_vocab_size=1, initializer_range=0.05,
    )  # fmt: skip
    for name, dropout in (("roberta", 0.1), ("still", 0.0)):
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        torch.manual_seed(0)
        transformers.RobertaForMaskedLM(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return home


@pytest.fixture(scope="module")
def recipe(home):
    """Five epochs of 11 updates in fp32."""
    return Config(
        model=str(home / "roberta"), train_file=str(home / "train.tsv"),
        validation_file=str(home / "dev.tsv"), epochs=5, lr=1e-2, log_interval=1,
        mixed_precision="no", eval_batch_size=7, out_dir=str(home / "whole"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(recipe):
    """The folder of one uninterrupted run of the recipe."""
    main(recipe)
    return Path(recipe.out_dir)


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def losses(folder):
    return [row["loss"] for row in runtime.read_log(Path(folder) / "log.csv")]


def same_weights(one, other):
    one, other = (load_file(Path(f) / "model.safetensors") for f in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def stopped(cfg, capsys):
    """Run to the exit that is expected: (code, the one line on stderr)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(cfg)
    code, said = stop.value.code, capsys.readouterr().err.strip()
    del stop  # its traceback keeps the lock of the folder alive
    assert said.startswith("error: ") and "\n" not in said
    return code, said


# ---------------------------------------------------------------------------------------------
# files


@pytest.mark.skipif(not SHARED.exists(), reason="SHARED_DATA_DIR has no msr_paraphrase_train.txt")
def test_original_corpus_is_read_whole():
    """Quotation marks taken for quotes swallow line ends: 3,9xx pairs instead of 4,076."""
    train = read_pairs(str(SHARED))
    test = read_pairs(str(SHARED).replace("train", "test"))
    assert (len(train), len(test)) == (4076, 1725)
    assert train.sentence1[0].startswith('Amrozi accused his brother, whom he called "the witness"')
    assert round(test.label.mean(), 3) == 0.665


def test_all_formats_give_the_same_pairs(tmp_path):
    """A BOM in the first column's name, 'NA' read as missing, quotes eaten, labels as text."""
    table = pandas.DataFrame({
        "sentence1": ['He said: "no"', "NA", "null, he wrote", "7", "Straße"],
        "sentence2": ['"No," said he', "Not available", "12", "seven", "street"],
        "label": [1, 0, 0, 1, 1],
    })  # fmt: skip
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    names = {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}
    for name, header in (("a.tsv", list(table)), ("msr.txt", [names[c] for c in table])):
        lines = ["\t".join(header), *("\t".join(map(str, row)) for row in table.values)]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    for name in ("a.csv", "a.parquet", "a.jsonl", "a.tsv", "msr.txt"):
        assert read_pairs(str(tmp_path / name)).values.tolist() == table.values.tolist(), name


HEADER = "sentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("x.tsv", "sentence1\tlabel\nA b\t1\n", "no column sentence2"),
        ("x.tsv", HEADER + "A\tB\t1\nC\tD\t2\n", "pair 2: the label is '2'"),
        ("x.tsv", HEADER + "A\tB\t\n", "the label is ''"),
        ("x.tsv", HEADER + "A\t \t1\n", "pair 1: sentence2 is empty"),
        ("x.tsv", HEADER, "no pairs"),
        ("x.tsv", "", "x.tsv cannot be read"),
        ("x.csv", "sentence1,sentence2,label\nA, b,C,1\n", "more cells"),
        ("x.tsv", HEADER + "A\tB\n", "the label is"),
        ("x.jsonl", '{"sentence1": "A", "sentence2": null, "label": 1}\n', "sentence2 is empty"),
        ("x.jsonl", '{"sentence1": \n', "cannot be read"),
        ("x.parquet", "not parquet", "cannot be read"),
        ("missing.tsv", None, "No such file"),
        ("x.tsv", HEADER + "A\tB\t1\n" * 5, "fewer than one batch of 8"),
    ],
)
def test_bad_file_is_one_line(name, text, words, recipe, tmp_path, capsys):
    """A traceback, a dropped row or a run that was overwritten before the file was read."""
    if text is not None:
        (tmp_path / name).write_text(text)
    kept = tmp_path / "run" / "checkpoint-000001"
    kept.mkdir(parents=True)
    bad = replace(recipe, train_file=str(tmp_path / name), out_dir=str(kept.parent), overwrite=True)
    code, said = stopped(bad, capsys)
    assert code == 1 and words in said and kept.exists()


def test_no_network_names_the_way_out(recipe, monkeypatch, capsys):
    """A page of retries and a traceback instead of the options that work offline."""

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", offline)
    code, said = stopped(replace(recipe, train_file="", validation_file=""), capsys)
    assert code == 1 and all(w in said for w in ("--train_file", "--validation_file", "--model"))
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", offline)
    code, said = stopped(replace(recipe, model="bert-base-uncased"), capsys)
    assert code == 1 and "bert-base-uncased" in said and "local folder" in said


def test_wrong_options_exit_with_2(recipe, whole, capsys):
    """Options found to be wrong after an hour of training."""
    both, other = {"resume": True, "overwrite": True}, {"resume": True, "seed": 7}
    words = {"seeds": "1,x"}, {"predict": ("a", "b", "c")}
    for wrong in ({"batch_size": 0}, {"max_length": 3}, *words, both, other):
        assert stopped(replace(recipe, **wrong), capsys)[0] == 2, wrong
    code, said = stopped(recipe, capsys)
    assert code == 1 and "--resume=True" in said and "--overwrite=True" in said


# ---------------------------------------------------------------------------------------------
# data


def test_held_out_tenth_is_fixed(recipe, capsys):
    """A validation split that moves with the seed: runs would be compared on other pairs."""
    one, other = (
        finetune_mrpc.load_pairs(replace(recipe, validation_file="", seed=s)) for s in (1, 2)
    )
    assert one["validation"].equals(other["validation"])
    assert (len(one["train"]), len(one["validation"])) == (74, 9)
    assert abs(one["validation"].label.mean() - one["train"].label.mean()) < 0.05
    assert "tenth" in capsys.readouterr().out


@pytest.mark.parametrize("window", [0, 4])
def test_batches_of_an_epoch(window):
    """A row lost or seen twice, an order that depends on what was drawn before, padding."""
    lengths = [random.Random(i).randint(5, 90) for i in range(203)]
    batches = epoch_batches(lengths, 8, window, 1, 0)
    torch.rand(5)
    assert batches == epoch_batches(lengths, 8, window, 1, 0)
    assert batches != epoch_batches(lengths, 8, window, 1, 1)
    assert batches != epoch_batches(lengths, 8, window, 2, 0)
    assert sorted(row for batch in batches for row in batch) == list(range(203))
    assert sorted(map(len, batches)) == [3] + [8] * 25
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert (padded < 1.3 * sum(lengths)) == bool(window)


# ---------------------------------------------------------------------------------------------
# training


def test_equals_a_plain_loop(recipe, tmp_path):
    """The lesson's loop without accelerate, step by step: a loss scaled, a schedule stepped twice,
    a last batch dropped or a metric computed on padded rows would all show."""
    cfg = replace(recipe, out_dir=str(tmp_path), length_window=0)
    main(cfg)

    train, dev = read_pairs(cfg.train_file), read_pairs(cfg.validation_file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
    torch.manual_seed(cfg.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(cfg.model, num_labels=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    total, step, expected = 55, 0, []

    def forward(table):
        columns = list(table.sentence1), list(table.sentence2)
        inputs = tokenizer(*columns, truncation=True, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)  # the model has one type
        return model(**inputs, labels=torch.tensor(table.label.tolist()))

    for epoch in range(cfg.epochs):
        model.train()
        for rows in epoch_batches([0] * len(train), 8, 0, cfg.seed, epoch):
            torch.manual_seed(finetune_mrpc.mix(cfg.seed, step, 0))
            optimizer.param_groups[0]["lr"] = cfg.lr * (total - step) / total
            loss = forward(train.iloc[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
            step += 1
        model.eval()
        with torch.no_grad():
            guess = forward(dev).logits.argmax(-1).tolist()
    assert losses(tmp_path) == pytest.approx(expected, abs=2e-5)
    last = results(tmp_path)["last"]
    assert last["accuracy"] == accuracy_score(dev.label, guess)
    assert last["f1"] == f1_score(dev.label, guess)
    assert last["accuracy"] > last["baseline_accuracy"]  # it has learned the rule


def test_accumulation_changes_nothing(recipe, home, tmp_path):
    """Means of means: short sentences in a small micro-batch would weigh more; a last short batch
    not stepped would make 10 updates an epoch out of 11."""
    for name, size, steps in (("8x1", 8, 1), ("2x4", 2, 4)):
        cfg = replace(
            recipe, model=str(home / "still"), out_dir=str(tmp_path / name), grad_clip=1.0
        )
        cfg = replace(cfg, batch_size=size, gradient_accumulation_steps=steps)
        main(cfg)
    one, other = (losses(tmp_path / name) for name in ("8x1", "2x4"))
    assert len(one) == 55 and one == pytest.approx(other, abs=2e-4)
    assert results(tmp_path / "8x1")["f1"] == results(tmp_path / "2x4")["f1"]


@pytest.mark.slow
def test_two_processes_equal_one(recipe, home, tmp_path):
    """Examples counted twice to fill the last batch; 'module.' in the names of the weights, which
    keeps one process from going on; a process without rows in the last short batch that hangs."""
    cfg = replace(recipe, model=str(home / "still"), out_dir=str(tmp_path / "one"))
    main(cfg)
    options = [f"--{name}={getattr(cfg, name)}" for name in (
        "model", "train_file", "validation_file", "lr", "epochs", "log_interval",
        "eval_batch_size", "mixed_precision")]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               SCRIPT, *options, "--batch_size=4", f"--out_dir={tmp_path / 'two'}"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, check=True, timeout=100)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert two["n"] == 37 and [two[m] for m in METRICS] == [one[m] for m in METRICS]
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert len(read_pairs(str(tmp_path / "two" / "predictions.tsv"))) == 37
    main(replace(cfg, out_dir=str(tmp_path / "two"), resume=True))  # one process goes on
    assert results(tmp_path / "two")["last"]["loss"] == pytest.approx(two["last"]["loss"], abs=1e-6)


def test_stopped_and_resumed_equals_uninterrupted(recipe, whole, tmp_path, capsys):
    """Random state, order, schedule or optimizer lost on the way; a damaged checkpoint used."""
    cfg = replace(recipe, out_dir=str(tmp_path))
    main(replace(cfg, max_steps=5))
    main(replace(cfg, max_steps=14, resume=True))
    newest = runtime.checkpoints(tmp_path)[0]
    assert [p.name[-2:] for p in runtime.checkpoints(tmp_path)] == ["14", "11"]
    (newest / "optimizer.bin").write_bytes(b"cut")
    main(replace(cfg, resume=True))
    said = capsys.readouterr().out
    assert f"{newest}: optimizer.bin is damaged" in said and "checkpoint-000011" in said
    for name in ("checkpoint-000055", "best"):
        assert same_weights(tmp_path / name, whole / name)
    optimizers = [(f / "checkpoint-000055" / "optimizer.bin") for f in (tmp_path, whole)]
    one, other = (torch.load(path, weights_only=True)["state"] for path in optimizers)
    assert all(torch.equal(one[k]["exp_avg_sq"], other[k]["exp_avg_sq"]) for k in other)
    assert (tmp_path / "predictions.tsv").read_text() == (whole / "predictions.tsv").read_text()
    assert losses(tmp_path)[-11:] == losses(whole)[-11:]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(recipe, whole, tmp_path, number, code):
    """Work since the last epoch lost on a machine that is taken away."""
    options = [f"--{name}={getattr(recipe, name)}" for name in (
        "model", "train_file", "validation_file", "lr", "epochs", "log_interval",
        "eval_batch_size", "mixed_precision")]  # fmt: skip
    command = [sys.executable, SCRIPT, *options, f"--out_dir={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("update 2/"):
                process.send_signal(number)
        assert process.wait(60) == code
    (saved,) = [p for p in runtime.checkpoints(tmp_path) if not int(p.name[-6:]) % 11 == 0]
    assert runtime.damage(saved) is None
    main(replace(recipe, out_dir=str(tmp_path), resume=True))
    assert same_weights(tmp_path / "checkpoint-000055", whole / "checkpoint-000055")


def test_nan_is_skipped_and_ten_stop_the_run(recipe, tmp_path, monkeypatch, capsys):
    """One bad batch that turns all weights into NaN; a run that goes on with them for days."""
    true, calls = finetune_mrpc.cross_entropy, []

    def sometimes(*args, bad=(3,), **kwargs):
        calls.append(1)
        return true(*args, **kwargs) * (float("nan") if len(calls) in bad else 1)

    monkeypatch.setattr(finetune_mrpc, "cross_entropy", sometimes)
    cfg = replace(recipe, out_dir=str(tmp_path), max_steps=6)
    main(cfg)
    assert [loss == loss for loss in losses(tmp_path)] == [True, True, False, True, True, True]
    saved = load_file(tmp_path / "checkpoint-000006" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    monkeypatch.setattr(
        finetune_mrpc, "cross_entropy", lambda *a, **k: sometimes(*a, bad=range(9999), **k)
    )
    code, said = stopped(replace(cfg, max_steps=0, resume=True), capsys)
    assert code == 1 and "10 updates in a row" in said
    assert runtime.checkpoints(tmp_path)[0].name == "checkpoint-000011"  # updates 7 to 11 skipped
    assert same_weights(tmp_path / "checkpoint-000011", tmp_path / "checkpoint-000006")


# ---------------------------------------------------------------------------------------------
# what is left behind


def test_results_and_predictions(whole, recipe):
    """Metrics of another model than the one saved; predictions in the wrong order, or quoted."""
    found, dev = results(whole), read_pairs(recipe.validation_file)
    lines = (whole / "predictions.tsv").read_text().splitlines()
    assert lines[0] == "sentence1\tsentence2\tlabel\tprediction\tprobability"
    rows = [line.split("\t") for line in lines[1:]]
    assert sorted((r[0], r[1]) for r in rows) == sorted(
        zip(dev.sentence1, dev.sentence2, strict=True)
    )
    wrong = [r[2] != r[3] for r in rows]
    assert wrong == sorted(wrong, reverse=True) and found["accuracy"] == 1 - sum(wrong) / 37
    sure = [float(r[4]) for r in rows]
    assert sure[: sum(wrong)] == sorted(sure[: sum(wrong)], reverse=True) and min(sure) >= 0.5
    assert sure[sum(wrong) :] == sorted(sure[sum(wrong) :])
    assert found["f1"] == max(row["f1"] or 0 for row in runtime.read_log(whole / "log.csv"))
    assert found["n"] == 37 and found["accuracy_f1_mean"] == (found["accuracy"] + found["f1"]) / 2
    assert found["baseline_accuracy"] == dev.label.mean()
    assert found["baseline_f1"] == f1_score(dev.label, [1] * 37)
    for name in ("loss.png", "confusion.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")

    pipe = transformers.pipeline("text-classification", model=str(whole / "best"))
    said = pipe([{"text": r[0], "text_pair": r[1]} for r in rows])
    names = {"0": "not_equivalent", "1": "equivalent"}
    assert [s["label"] for s in said] == [names[r[3]] for r in rows]
    assert [s["score"] for s in said] == pytest.approx(sure, abs=1e-4)


def test_eval_only_and_predict(whole, recipe, home, tmp_path, capsys):
    """The base encoder scored instead of the fine-tuned model; a file that needs a label."""
    before = results(whole)
    main(replace(recipe, eval_only=True, test_file=recipe.validation_file))
    after = results(whole)
    assert all(after[m] == before[m] == after["test"][m] for m in METRICS)

    (tmp_path / "new.csv").write_text(
        "sentence1,sentence2\na firm,Yes: a firm\nthe plant,a rival\n"
    )
    capsys.readouterr()
    main(replace(recipe, predict=(str(tmp_path / "new.csv"),)))
    table = [line.split("\t") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert table[0] == ["sentence1", "sentence2", "prediction", "probability"]
    assert table[1][:2] == ["a firm", "Yes: a firm"] and table[1][2] in "01"
    main(replace(recipe, predict=("a firm", "Yes: a firm")))
    word, probability = capsys.readouterr().out.splitlines()[-1].split()
    assert word == ["not_equivalent", "equivalent"][int(table[1][2])]
    assert float(probability) == pytest.approx(float(table[1][3]), abs=1e-3)
    nowhere = replace(recipe, eval_only=True, out_dir=str(tmp_path / "none"))
    assert "not fine-tuned" in stopped(nowhere, capsys)[1]


def test_seeds(recipe, tmp_path, capsys):
    """A mean over one seed trained three times, or a best folder that is another run's."""
    cfg = replace(recipe, out_dir=str(tmp_path), seeds="1,2", max_steps=3)
    main(cfg)
    found, runs = results(tmp_path), [results(tmp_path / f"seed-{s}") for s in (1, 2)]
    assert found["loss"] == pytest.approx((runs[0]["loss"] + runs[1]["loss"]) / 2)
    assert found["loss_std"] > 0 and found["n"] == 37
    best = max(runs, key=lambda run: run["f1"])["seed"]
    assert same_weights(tmp_path / "best", tmp_path / f"seed-{best}" / "best")
    assert runtime.damage(tmp_path / "best") is None
    assert "mean and deviation of 2 seeds" in capsys.readouterr().out


def test_one_class_is_warned_of(recipe, tmp_path, capsys):
    """An F1 of 0.8 on MRPC that only says 'yes' to everything."""
    main(replace(recipe, out_dir=str(tmp_path), lr=0.0, max_steps=1))
    assert "warning: the model calls every pair" in capsys.readouterr().out
