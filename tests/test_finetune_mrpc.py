"""finetune_mrpc.py: against a plain loop, across processes, through a stop, on bad files."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pandas
import pytest
import torch
import transformers
from conftest import SHARED, needs_shared
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing

import finetune_mrpc
import runtime
from configurator import load
from finetune_mrpc import METRICS, Config, epoch_batches, main, read_pairs

SCRIPT = Path(finetune_mrpc.__file__)
WORDS = "the firm sold its old plant to a rival for ten million dollars on late last Monday".split()
HEADER = "sentence1\tsentence2\tlabel\n"


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
    train = make_pairs(83, 1)  # 83 = 10 x 8 + 3: a short last batch
    train.to_csv(home / "train.tsv", sep="\t", index=False)
    make_pairs(37, 2).to_csv(home / "dev.tsv", sep="\t", index=False)
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(train.sentence2, 400, special_tokens=special, show_progress=False)
    bpe._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, **{f"{k}_token": v for k, v in names.items()})
    shape = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "type_vocab_size": 1,
             "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 66,
             "initializer_range": 0.05, "pad_token_id": 1}
    for name, dropout, family in (("roberta", 0.1, "Roberta"), ("still", 0, "Roberta"),
                                  ("bert", 0, "Bert")):
        config = getattr(transformers, f"{family}Config")(
            **shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        torch.manual_seed(0)
        getattr(transformers, f"{family}ForMaskedLM")(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return home


@pytest.fixture(scope="module")
def recipe(home):
    """Five epochs of 11 iterations in fp32."""
    return Config(model=str(home / "roberta"), train_file=str(home / "train.tsv"),
                  validation_file=str(home / "dev.tsv"), max_epochs=5, learning_rate=1e-2,
                  log_interval=1, mixed_precision="no", eval_batch_size=7,
                  out_dir=str(home / "whole"))


@pytest.fixture(scope="module")
def whole(recipe):
    """The folder of one uninterrupted run of the recipe."""
    main(recipe)
    return Path(recipe.out_dir)


def resume(folder, **given):
    """main() as `--out_dir=folder --resume` and what else is given."""
    cfg = Config(out_dir=str(folder), resume=True, **given)
    cfg.given = {"out_dir", "resume", *given}
    return main(cfg)


def command_of(cfg, *more):
    """cfg as a command line."""
    names = ("model", "train_file", "validation_file", "learning_rate", "max_epochs",
             "log_interval", "eval_batch_size", "mixed_precision")
    return [str(SCRIPT), *(f"--{name}={getattr(cfg, name)}" for name in names), *more]


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def losses(folder):
    return [row["loss"] for row in runtime.read_log(Path(folder) / "log.csv")]


def same_weights(one, other):
    one, other = (load_file(Path(f) / "model.safetensors") for f in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def checkpoint_names(folder):
    return [int(p.name[11:]) for p in runtime.checkpoints(folder)]


# ---------------------------------------------------------------------------------------------
# files


@needs_shared
def test_original_corpus_is_read_whole():
    """Quotation marks taken for quotes swallow line ends: 3,9xx pairs instead of 4,076."""
    train, test = (read_pairs(str(SHARED / f"msr_paraphrase_{s}.txt")) for s in ("train", "test"))
    assert (len(train), len(test)) == (4076, 1725)
    assert train.sentence1[0].startswith('Amrozi accused his brother, whom he called "the witness"')
    assert round((test.label == "1").mean(), 3) == 0.665


def test_all_formats_give_the_same_pairs(tmp_path):
    """A BOM in the first column's name, 'NA' read as missing, quotes eaten, labels as text; -2 and
    -2.0 two labels."""
    table = pandas.DataFrame({
        "sentence1": ['He said: "no"', "NA", "null, he wrote", "7", "Straße"],
        "sentence2": ['"No," said he', "Not available", "12", "seven", "street"],
        "label": [1, 0, 0, 1, 1],
    })
    table.to_csv(tmp_path / "a.csv", index=False)
    table.astype({"label": float}).to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    msr = ["#1 String", "#2 String", "Quality"]
    for name, header in (("a.tsv", list(table)), ("msr.txt", msr), ("qqp.tsv", ["q 1", "q2", "y"])):
        lines = ["\t".join(header), *("\t".join(map(str, row)) for row in table.values)]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    table["Quality"] = 1 - table.label  # a column that is called label is the label
    table.to_csv(tmp_path / "both.csv", index=False)
    expected = table.astype({"label": str}).values[:, :3].tolist()
    for name in ("a.csv", "a.parquet", "a.jsonl", "a.tsv", "msr.txt", "both.csv"):
        assert read_pairs(str(tmp_path / name)).values.tolist() == expected, name
    assert read_pairs(str(tmp_path / "qqp.tsv"), ["q 1", "q2", "y"]).values.tolist() == expected
    (tmp_path / "minus.tsv").write_text(HEADER + "a\tb\t-2\na\tb\t-2.0\n")
    assert read_pairs(str(tmp_path / "minus.tsv")).label.tolist() == ["-2", "-2"]


@pytest.mark.parametrize("name, text, words", [
    ("x.tsv", "sentence1\tlabel\nA b\t1\n", "no column sentence2"),
    ("x.tsv", HEADER + "A\tB\t1\n" * 2 + "C\tD\t2\n", "pair 3: the label '2' is none of 0, 1"),
    ("x.tsv", HEADER + "A\tB\t1\nC\tD\t2\n" * 2, "dev.tsv, pair 1: the label '0'"),
    ("x.tsv", HEADER + "A\tB\t\n", "pair 1: label is empty"),
    ("x.tsv", HEADER + "A\tB\t-1\n", "pair 1: label is empty"),
    ("x.tsv", HEADER + "A\tB\t-1.0\n", "pair 1: label is empty"),
    ("x.tsv", HEADER + "A\t \t1\n", "pair 1: sentence2 is empty"),
    ("x.tsv", HEADER, "no pairs"),
    ("x.tsv", "", "x.tsv cannot be read"),
    ("x.csv", "sentence1,sentence2,label\nA, b,C,1\n", "more cells"),
    ("x.tsv", HEADER + "A\tB\n", "label is empty"),
    ("x.jsonl", '{"sentence1": "A", "sentence2": null, "label": 1}\n', "sentence2 is empty"),
    ("x.jsonl", '{"sentence1": \n', "cannot be read"),
    ("x.parquet", "not parquet", "cannot be read"),
    ("missing.tsv", None, "No such file"),
    ("x.tsv", HEADER + "A\tB\t1\n" * 5, "fewer than one batch of 8"),
])
def test_bad_file_is_one_line(name, text, words, recipe, tmp_path, fails):
    """A traceback, a dropped row or a run that was overwritten before the file was read."""
    if text is not None:
        (tmp_path / name).write_text(text)
    kept = tmp_path / "run" / "checkpoint-000001"
    kept.mkdir(parents=True)
    bad = replace(recipe, train_file=str(tmp_path / name), out_dir=str(kept.parent), overwrite=True)
    fails(1, lambda: main(bad), words)
    assert kept.exists()


def test_no_network_names_the_way_out(recipe, monkeypatch, fails):
    """Half a minute of retries and a traceback instead of the options that work offline."""

    def offline(remedy):
        raise runtime.UserError(f"no connection to huggingface.co; {remedy}")

    monkeypatch.setattr("prepare.require_network", offline)
    for change in ({"train_file": "", "validation_file": ""}, {"model": "bert-base-uncased"}):
        fails(1, lambda c=change: main(replace(recipe, **c)), "no connection to huggingface.co",
              "local", "--train_file")
    monkeypatch.setattr("prepare.require_network", lambda *args: None)
    fails(1, lambda: main(replace(recipe, model="bert-base-uncased")), "bert-base-uncased",
          "local folder", "--train_file")


def test_wrong_options_exit_with_2(recipe, whole, fails):
    """Options found to be wrong after an hour of training, or after the old run was deleted."""
    before = checkpoint_names(whole)
    for wrong in ({"batch_size": 0}, {"max_length": 3}, {"max_length": 65}, {"seeds": "1,x"},
                  {"seeds": "1,1"}, {"predict": ("a", "b", "c")}, {"predict": ("", " ")},
                  {"seed": 2**64}, {"columns": "a,b"}, {"warmup_iters": 55}, {"compare": ("a",)},
                  {"resume": True, "overwrite": True}, {"model": str(whole / "best")}):
        fails(2, lambda w=wrong: main(replace(recipe, **{"overwrite": True} | w)), "--")
    fails(1, lambda: main(recipe), "--resume", "--overwrite")
    fails(2, lambda: resume(whole, seed=7, batch_size=5), "seed is 7 but was 42", "5 but was 8")
    fails(2, lambda: resume(whole, max_epochs=3), "past the 33 iterations", "--max_epochs")
    assert checkpoint_names(whole) == before


def test_a_strangers_code_is_not_run(recipe, tmp_path, fails, monkeypatch):
    """transformers asks whether to run it: a y that waits on standard input is enough."""
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "mystery", "auto_map": {"AutoConfig": "evil.C"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    fails(1, lambda: main(replace(recipe, model=str(tmp_path), out_dir=str(tmp_path / "o"))),
          "cannot load", str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_model_folder_is_not_trained_into(recipe, home, fails):
    """The model that was started from overwritten."""
    folder = home / "roberta"
    before = sorted(folder.iterdir())
    fails(2, lambda: main(replace(recipe, out_dir=str(folder), overwrite=True)),
          "must lie outside of the --out_dir", str(folder))
    assert sorted(folder.iterdir()) == before


# ---------------------------------------------------------------------------------------------
# data


def test_held_out_tenth_is_fixed(recipe, capsys):
    """A validation split that moves with the seed: runs would be compared on other pairs."""
    (one, _), (other, _) = (
        finetune_mrpc.load_pairs(replace(recipe, validation_file="", seed=s)) for s in (1, 2))
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


@pytest.mark.parametrize("name, tokens", [("roberta", 64), ("bert", 66)])
def test_all_positions_are_used(home, name, tokens):
    """BERT cut at 511 of 512 tokens, or RoBERTa, whose positions start at 2, an index error."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(home / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / name)
    pairs = pandas.DataFrame({"sentence1": ["firm " * 99], "sentence2": ["plant " * 99]})
    (pair,) = finetune_mrpc.encode(Config(), model, tokenizer, pairs)
    assert len(pair["input_ids"]) == tokens
    model(input_ids=torch.tensor([pair["input_ids"]]))


# ---------------------------------------------------------------------------------------------
# training


def test_equals_a_plain_loop(recipe, tmp_path):
    """The lesson's loop without accelerate, one iteration after the other: a loss scaled, a
    schedule stepped twice, a last batch dropped or a metric on padded rows would all show."""
    cfg = replace(recipe, out_dir=str(tmp_path), length_window=0, warmup_iters=3)
    main(cfg)
    train = read_pairs(cfg.train_file).astype({"label": int})
    dev = read_pairs(cfg.validation_file).astype({"label": int})
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
    torch.manual_seed(cfg.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(cfg.model, num_labels=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate)
    iteration, expected = 0, []

    def forward(table):
        columns = list(table.sentence1), list(table.sentence2)
        inputs = tokenizer(*columns, truncation=True, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)  # the model has one type
        return model(**inputs, labels=torch.tensor(table.label.tolist()))

    for epoch in range(cfg.max_epochs):
        model.train()
        for rows in epoch_batches([0] * len(train), 8, 0, cfg.seed, epoch):
            torch.manual_seed(runtime.derive_seed(cfg.seed, iteration, 0))
            share = (iteration + 1) / 4 if iteration < 3 else (55 - iteration) / 52
            optimizer.param_groups[0]["lr"] = cfg.learning_rate * share
            loss = forward(train.iloc[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
            iteration += 1
    model.eval()
    with torch.no_grad():
        guess = forward(dev).logits.argmax(-1).tolist()
    assert losses(tmp_path) == pytest.approx(expected, abs=2e-5)
    last = results(tmp_path)["last"]
    assert last["accuracy"] == pytest.approx(accuracy_score(dev.label, guess))
    assert last["f1"] == pytest.approx(f1_score(dev.label, guess))
    assert last["accuracy"] > last["baseline_accuracy"]  # it has learned the rule


def test_accumulation_changes_nothing(recipe, home, tmp_path):
    """Means of means: short sentences in a small micro-batch would weigh more; a last short batch
    not stepped; a resume with another accumulation that makes no update at all."""
    cfg = replace(recipe, model=str(home / "still"), grad_clip=1.0, batch_size=6, max_iters=11)
    main(replace(cfg, out_dir=str(tmp_path / "6x1")))
    split = replace(cfg, batch_size=2, gradient_accumulation_steps=3, out_dir=str(tmp_path / "2x3"))
    main(replace(split, max_iters=5))
    resume(tmp_path / "2x3", batch_size=3, gradient_accumulation_steps=2, max_iters=11)
    one, other = (losses(tmp_path / name) for name in ("6x1", "2x3"))
    assert len(one) == 11 and one == pytest.approx(other, abs=2e-4)
    assert results(tmp_path / "6x1")["f1"] == results(tmp_path / "2x3")["f1"]


@pytest.mark.slow
@pytest.mark.network_loopback
def test_two_processes_equal_one(recipe, home, tmp_path):
    """Examples counted twice to fill the last batch; 'module.' in the names of the weights, which
    keeps one process from resuming; a process without rows in the last short batch that hangs."""
    cfg = replace(recipe, model=str(home / "still"), out_dir=str(tmp_path / "one"))
    main(cfg)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = command_of(cfg, "--batch_size=4", f"--out_dir={tmp_path / 'two'}")
    subprocess.run([*command, *more], check=True, timeout=300)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-3)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert two["n"] == 37 and [two[m] for m in METRICS] == [one[m] for m in METRICS]
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert len(read_pairs(str(tmp_path / "two" / "predictions.tsv"))) == 37
    resume(tmp_path / "two", batch_size=8, max_epochs=6)  # with one process
    assert losses(tmp_path / "two")[:55] == pytest.approx(losses(tmp_path / "one"), abs=2e-3)


def test_stopped_and_resumed_equals_uninterrupted(recipe, whole, tmp_path, capsys, monkeypatch):
    """Random state, order, schedule, optimizer or settings lost on the way; a damaged checkpoint
    used; a best/ from amid an epoch that only the interrupted run has seen."""
    main(replace(recipe, out_dir=str(tmp_path), max_iters=5))
    true = finetune_mrpc.evaluate

    def lucky(*args):
        found, *rest = true(*args)
        return found | ({"f1": 1.0} if args[7] == "iteration 14" else {}), *rest

    monkeypatch.setattr(finetune_mrpc, "evaluate", lucky)
    asked, make = [], runtime.make_accelerator
    monkeypatch.setattr(runtime, "make_accelerator", lambda p: asked.append(p) or make(p))
    resume(tmp_path, max_iters=14)
    assert asked == [recipe.mixed_precision] != ["auto"]  # which some machines make bf16
    assert checkpoint_names(tmp_path) == [14, 11]
    assert same_weights(tmp_path / "best", tmp_path / "checkpoint-000011")
    newest, older = runtime.checkpoints(tmp_path)
    first = runtime.read_run(older)
    (newest / "optimizer.bin").write_bytes(b"cut")
    found = resume(tmp_path, max_iters=0)
    said = capsys.readouterr().out
    assert "optimizer.bin is damaged" in said and "resuming from" in said
    saved = runtime.read_run(tmp_path / "checkpoint-000055")
    assert saved["state"]["resumed"] == [5, 11] and saved["script"] == "finetune_mrpc.py"
    assert saved["started"] == first["started"] and saved["seconds"] > first["seconds"] > 0
    for name in ("checkpoint-000055", "best"):
        assert same_weights(tmp_path / name, whole / name)
    optimizers = [(f / "checkpoint-000055" / "optimizer.bin") for f in (tmp_path, whole)]
    one, other = (torch.load(path, weights_only=True)["state"] for path in optimizers)
    assert all(torch.equal(one[k]["exp_avg_sq"], other[k]["exp_avg_sq"]) for k in other)
    assert (tmp_path / "predictions.tsv").read_text() == (whole / "predictions.tsv").read_text()
    assert losses(tmp_path) == losses(whole) and not list(tmp_path.glob(".tmp-*"))
    assert found["last"] == results(whole)["last"] == resume(tmp_path)["last"]
    assert "finished at iteration 55" in capsys.readouterr().out


def test_what_a_checkpoint_cannot_be_resumed_with(recipe, whole, home, tmp_path, fails):
    """Other pairs under the same name, unnoticed; right checksums over wrong contents: a
    traceback."""
    other = home / "other.tsv"
    make_pairs(83, 3).to_csv(other, sep="\t", index=False)
    fails(2, lambda: resume(whole, train_file=str(other)), "content of the train pairs")
    saved = runtime.read_run(runtime.checkpoints(whole)[0])
    odd = [saved | {"state": state} for state in ({}, saved["state"] | {"iteration": 7})]
    for name, content in (("model.safetensors", b"{}"), ("optimizer.bin", b"no pickle"),
                          ("run.json", b"[]"), ("run.json", b"{}"),
                          *(("run.json", json.dumps(info).encode()) for info in odd)):
        out_dir = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(whole, out_dir)
        for folder in runtime.checkpoints(out_dir):
            temporary = out_dir / "again"
            folder.rename(temporary)
            (temporary / name).write_bytes(content)
            (temporary / "SHA256SUMS").unlink()
            runtime.commit_folder(temporary, folder)
        fails(1, lambda o=out_dir: resume(o, max_epochs=6), "--")


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_continues(recipe, whole, tmp_path, number, code):
    """Work since the last epoch lost on a machine that is taken away."""
    command = [sys.executable, *command_of(recipe, f"--out_dir={tmp_path}")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("iteration 2/"):
                process.send_signal(number)
            last = line
        assert process.wait(120) == code
    assert last.rstrip().endswith(f"finetune_mrpc.py --out_dir={tmp_path} --resume")
    (saved,) = [n for n in checkpoint_names(tmp_path) if n % 11]
    assert runtime.verify_checksums(tmp_path / f"checkpoint-{saved:06d}") is None
    resume(tmp_path)
    assert same_weights(tmp_path / "checkpoint-000055", whole / "checkpoint-000055")


def test_a_signal_in_the_last_evaluation(recipe, tmp_path, monkeypatch):
    """It was forgotten: the whole report came, and exit code 0."""
    true = finetune_mrpc.evaluate

    def signalled(*args):
        if args[7] == "iteration 11":
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*args)

    monkeypatch.setattr(finetune_mrpc, "evaluate", signalled)
    with pytest.raises(SystemExit) as stop:
        main(replace(recipe, out_dir=str(tmp_path), max_epochs=1))
    assert stop.value.code == 143 and not (tmp_path / "results.json").exists()
    monkeypatch.undo()
    assert resume(tmp_path)["n"] == 37


def test_nan_is_skipped_and_ten_stop_the_run(recipe, tmp_path, monkeypatch, fails):
    """One bad batch that turns all weights into NaN; a run that goes on with them for days."""
    true, calls, bad = finetune_mrpc.cross_entropy, [], {3}

    def sometimes(logits, labels, reduction="mean"):
        calls.append(1)
        is_bad = reduction == "sum" and len(calls) in bad
        return true(logits, labels, reduction=reduction) * (float("nan") if is_bad else 1)

    monkeypatch.setattr(finetune_mrpc, "cross_entropy", sometimes)
    main(replace(recipe, out_dir=str(tmp_path), max_iters=6))
    assert [loss == loss for loss in losses(tmp_path)] == [True, True, False, True, True, True]
    saved = load_file(tmp_path / "checkpoint-000006" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    bad.update(range(len(calls), 9999))
    fails(1, lambda: resume(tmp_path, max_iters=0), "10 updates in a row")
    assert checkpoint_names(tmp_path) == [11, 6]  # the updates 7 to 11 were skipped
    assert same_weights(tmp_path / "checkpoint-000011", tmp_path / "checkpoint-000006")


def test_both_orders(recipe, tmp_path):
    """Predictions must not depend on which text comes first, also those of best/ alone."""
    names = {"sentence1": "sentence2", "sentence2": "sentence1"}
    swapped = pandas.read_csv(recipe.validation_file, sep="\t").rename(columns=names)
    swapped.to_csv(tmp_path / "swapped.csv", index=False)
    found = main(replace(recipe, both_orders=True, out_dir=str(tmp_path / "run"), max_epochs=3))
    mirrored = main(replace(recipe, eval_only=True, model=str(tmp_path / "run" / "best"),
                            validation_file=str(tmp_path / "swapped.csv"),
                            out_dir=str(tmp_path / "eval")))
    assert mirrored["loss"] == pytest.approx(found["loss"], abs=1e-5)


# ---------------------------------------------------------------------------------------------
# what is left behind


def test_results_and_predictions(whole, recipe):
    """Metrics of another model than the one saved; predictions in the wrong order, or quoted; an
    interval far from the binomial's."""
    found, dev = results(whole), pandas.read_csv(recipe.validation_file, sep="\t")
    lines = (whole / "predictions.tsv").read_text().splitlines()
    assert lines[0] == "sentence1\tsentence2\tlabel\tprediction\tprobability"
    rows = [line.split("\t") for line in lines[1:]]
    assert sorted(r[:2] for r in rows) == sorted(dev.values[:, :2].tolist())
    wrong = [r[2] != r[3] for r in rows]
    assert wrong == sorted(wrong, reverse=True)
    assert found["accuracy"] == pytest.approx(1 - sum(wrong) / 37)
    sure = [float(r[4]) for r in rows]
    assert sure[: sum(wrong)] == sorted(sure[: sum(wrong)], reverse=True) and min(sure) >= 0.5
    assert sure[sum(wrong) :] == sorted(sure[sum(wrong) :])
    assert found["f1"] == max(row["f1"] or 0 for row in runtime.read_log(whole / "log.csv"))
    assert found["n"] == 37 and found["accuracy_f1_mean"] == (found["accuracy"] + found["f1"]) / 2
    assert found["baseline_accuracy"] == pytest.approx(dev.label.mean())
    assert found["baseline_f1"] == pytest.approx(f1_score(dev.label, [1] * 37))
    (low, high), p = found["accuracy_interval"], found["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * (p * (1 - p) / 37) ** 0.5, abs=0.04)
    assert low < p < high and 0 <= found["ece"] < 1
    (a, b), (c, d) = found["confusion"]
    assert (a + d) / 37 == p and c + d == dev.label.sum()
    assert b + d == sum(r[3] == "1" for r in rows)
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    pipe = transformers.pipeline("text-classification", model=str(whole / "best"))
    said = pipe([{"text": r[0], "text_pair": r[1]} for r in rows])
    names = {"0": "not_equivalent", "1": "equivalent"}
    assert [s["label"] for s in said] == [names[r[3]] for r in rows]
    assert [s["score"] for s in said] == pytest.approx(sure, abs=1e-4)


def test_metrics_against_other_libraries():
    """Macro F1 of three labels, the bootstrap's interval or the calibration error computed wrong:
    figures that look right and are trusted."""
    draw = numpy.random.default_rng(1)
    truth, guess = draw.integers(0, 3, 301), draw.integers(0, 3, 301)
    counts = numpy.histogram2d(truth, guess, bins=3)[0].astype(int)
    found = finetune_mrpc.scores(counts)
    assert found["f1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    two = counts.copy()
    two[2], two[:, 2] = 0, 0  # a label that does not occur is in no mean
    assert finetune_mrpc.scores(two)["f1"] == pytest.approx(
        2 * (finetune_mrpc.scores(two[:2, :2][::-1, ::-1])["f1"]
             + finetune_mrpc.scores(two[:2, :2])["f1"]) / 4)
    logits = torch.tensor([[0.0, 0.0], [0.0, 4.0], [4.0, 0.0], [0.0, 4.0]])
    expected = (abs(0.5 - 1) + abs(3 * 0.98201 - 2)) / 4  # two bins: one pair, three pairs
    error = finetune_mrpc.calibration_error(logits, torch.tensor([0, 1, 0, 0]))
    assert error == pytest.approx(expected, abs=1e-4)


def test_compare(tmp_path, fails, capsys):
    """McNemar's p from the pairs that both have right, or from another order of the rows."""
    table = make_pairs(23, 5).astype(str)
    for name, flipped in (("a", [0, 1, 2]), ("b", [2, 3, 4, 5, 6, 7, 8, 9, 10, 11])):
        (tmp_path / name).mkdir()
        guess = [str(1 - int(v)) if i in flipped else v for i, v in enumerate(table.label)]
        rows = table.assign(prediction=guess).sample(frac=1, random_state=len(flipped))
        rows.to_csv(tmp_path / name / "predictions.tsv", sep="\t", index=False)
    both = str(tmp_path / "a"), str(tmp_path / "b" / "predictions.tsv")
    found = main(Config(compare=both))
    # 9 pairs only a has right, 2 only b: twice (1 + 11 + 55) / 2**11
    assert found == {"only_first": 9, "only_second": 2, "n": 23, "p": pytest.approx(0.0654297)}
    assert "not significant" in capsys.readouterr().out
    rows.head(22).to_csv(tmp_path / "a" / "predictions.tsv", sep="\t", index=False)
    fails(1, lambda: main(Config(compare=both)), "not predictions for the same pairs")
    fails(1, lambda: main(Config(compare=(both[0], str(tmp_path)))), "cannot be read")


def test_eval_only_and_predict(whole, recipe, home, tmp_path, capsys, fails):
    """The base encoder scored instead of the fine-tuned model; a file that needs a label; the
    training run's results replaced by those on another file."""
    before = {p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()}
    after = main(replace(recipe, eval_only=True, test_file=recipe.validation_file))
    assert {name: (whole / name).read_bytes() for name in before} == before
    assert all(after[m] == results(whole)[m] == after["test"][m] for m in METRICS)
    assert {p.name for p in whole.iterdir()} > {
        "eval-results.json", "eval-predictions.tsv", "eval-test-predictions.tsv"}

    new = "sentence1,sentence2\na firm,Yes: a firm\nthe plant,a rival\n"
    (tmp_path / "new.csv").write_text(new)
    capsys.readouterr()
    main(replace(recipe, predict=(str(tmp_path / "new.csv"),)))
    said = capsys.readouterr()  # a note as the first line of `--predict new.csv > new.tsv`
    table = [line.split("\t") for line in said.out.splitlines()]
    assert len(table) == 3 and "new weights: none" in said.err
    assert table[0] == ["sentence1", "sentence2", "prediction", "probability"]
    assert table[1][:2] == ["a firm", "Yes: a firm"]
    for name in ("predict", "compare"):  # an unset shell variable: it began to train
        empty = load(Config, [f"--{name}", f"--out_dir={tmp_path}"])
        fails(2, lambda cfg=empty: main(cfg), f"--{name}", "()")
    main(replace(recipe, predict=("a firm", "Yes: a firm")))
    word, probability = capsys.readouterr().out.splitlines()[-1].split()
    assert word == table[1][2] and word in ("not_equivalent", "equivalent")
    assert float(probability) == pytest.approx(float(table[1][3]), abs=1e-3)
    shutil.copytree(whole / "best", tmp_path / "best")
    shutil.copy(whole / "run.json", tmp_path)
    content = bytearray((whole / "best" / "model.safetensors").read_bytes())
    content[-1] ^= 128
    (tmp_path / "best" / "model.safetensors").write_bytes(content)
    fails(1, lambda: main(replace(recipe, eval_only=True, out_dir=str(tmp_path))), "is damaged")
    nowhere = replace(recipe, eval_only=True, out_dir=str(tmp_path / "none"))
    fails(1, lambda: main(nowhere), "not fine-tuned")
    other = replace(recipe, eval_only=True, model="no/such")  # out_dir/best was scored in its place
    fails(1, lambda: main(other), "cannot load no/such")
    head = str(whole / "best")  # of another task, such as NLI: not that, but what was made from it
    (tmp_path / "run.json").write_text(json.dumps({"config": {"model": head}}))
    for model, chosen in ((head, tmp_path / "best"), (Config.model, tmp_path / "best"),
                          (recipe.model, recipe.model)):
        cfg = replace(recipe, model=model, out_dir=str(tmp_path))
        assert finetune_mrpc.finetuned_model(cfg) == str(chosen)
    fails(1, lambda: finetune_mrpc.finetuned_model(Config(out_dir="none")), "train first")


def test_a_model_with_labels_in_another_order(whole, recipe, tmp_path, fails):
    """A stranger's model that says 0 for 'equivalent' scored upside down, or one with a third label
    whose config.json names them in another order than the logits; Yes and yes taken for one."""
    shutil.copytree(whole / "best", tmp_path / "mirror", ignore=lambda *_: ["SHA256SUMS"])
    config = json.loads((tmp_path / "mirror" / "config.json").read_text())
    weights = load_file(tmp_path / "mirror" / "model.safetensors")
    for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, tmp_path / "mirror" / "model.safetensors", metadata={"format": "pt"})
    cfg = replace(recipe, eval_only=True, model=str(tmp_path / "mirror"), out_dir=str(tmp_path))
    names = {"0": "Equivalent", "1": "Not_equivalent"}, {"0": "LABEL_0", "1": "LABEL_1"}
    for own, expected in zip(names, (results(whole)["accuracy"], 1 - results(whole)["accuracy"]),
                             strict=True):
        config |= {"id2label": own, "label2id": {v: int(k) for k, v in own.items()}}
        (tmp_path / "mirror" / "config.json").write_text(json.dumps(config))
        assert main(cfg)["accuracy"] == pytest.approx(expected)
    more = make_pairs(9, 4).assign(label=list("012012012"))
    more.to_csv(tmp_path / "three.csv", index=False)
    cfg = replace(cfg, train_file="", validation_file=str(tmp_path / "three.csv"))
    fails(1, lambda: main(cfg), "labelled 0, 1, 2", "label_0, label_1")
    for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
        old = weights[name]
        weights[name] = torch.cat([old, 0 * old[:1] - 9 * (old.ndim == 1)])
    save_file(weights, tmp_path / "mirror" / "model.safetensors", metadata={"format": "pt"})
    config |= {"id2label": {"2": "c", "0": "equivalent", "1": "not_equivalent"}}
    (tmp_path / "mirror" / "config.json").write_text(json.dumps(config))
    found = main(replace(cfg, validation_file=recipe.validation_file))
    assert found["accuracy"] == pytest.approx(results(whole)["accuracy"])
    assert found["labels"] == ["equivalent", "not_equivalent", "c"]
    more.assign(label=["Yes", "yes", "no"] * 3).to_csv(tmp_path / "three.csv", index=False)
    config |= {"id2label": {"0": "yes", "1": "no", "2": "c"}}
    (tmp_path / "mirror" / "config.json").write_text(json.dumps(config))
    fails(1, lambda: main(cfg), "labelled Yes, no, yes", "model knows yes, no, c")
    cfg = replace(cfg, validation_file=recipe.validation_file)
    for end in ("", ".0", " stars"):  # 1 was taken for 2
        config |= {"id2label": {str(i): f"{i + 1}{end}" for i in range(3)}}
        (tmp_path / "mirror" / "config.json").write_text(json.dumps(config))
        fails(1, lambda: main(cfg), "labelled 0, 1,", f"model knows 1{end}, 2{end}, 3{end}")


def test_three_labels_from_other_columns(recipe, home, tmp_path, capsys):
    """More than two labels forced into two, or the columns of another GLUE task not read."""
    table = make_pairs(70, 6).set_axis(["premise", "hypothesis", "gold"], axis=1)
    table["gold"] = [("entailment", "neutral", "contradiction")[i % 3] for i in range(70)]
    table.to_csv(tmp_path / "nli.tsv", sep="\t", index=False)
    cfg = replace(recipe, train_file=str(tmp_path / "nli.tsv"), validation_file="", max_epochs=1,
                  columns="premise,hypothesis,gold", out_dir=str(tmp_path / "run"), batch_size=7)
    found = main(cfg)
    assert found["labels"] == ["contradiction", "entailment", "neutral"] and found["n"] == 7
    assert found["baseline_accuracy"] == pytest.approx(3 / 7)
    main(replace(cfg, predict=("a firm", "a plant")))
    assert capsys.readouterr().out.split()[-2] in found["labels"]


def test_a_file_without_one_of_the_labels(recipe, tmp_path):
    """The answer that no pair of the file has could not be given: accuracy 1 on pairs all alike.
    And Yes was taken for yes."""
    table = make_pairs(70, 6).assign(label=["Yes", "yes", "$5_$"] * 23 + ["yes"])
    table.to_csv(tmp_path / "all.tsv", sep="\t", index=False)
    table[table.label == "yes"].to_csv(tmp_path / "one.tsv", sep="\t", index=False)
    cfg = replace(recipe, train_file=str(tmp_path / "all.tsv"), max_epochs=1, batch_size=7,
                  validation_file=str(tmp_path / "all.tsv"), out_dir=str(tmp_path / "run"))
    assert main(cfg)["labels"] == (labels := ["$5_$", "Yes", "yes"])
    best = SimpleNamespace(config=transformers.AutoConfig.from_pretrained(tmp_path / "run/best"))
    assert finetune_mrpc.label_ids(best, dict(zip(labels, labels, strict=True))) == [0, 1, 2]
    truth, said = pandas.read_table(tmp_path / "run" / "predictions.tsv")[
        ["label", "prediction"]].to_numpy().T
    assert results(tmp_path / "run")["accuracy"] == pytest.approx((truth == said).mean())
    weights = load_file(tmp_path / "run" / "best" / "model.safetensors")
    weights["classifier.out_proj.bias"] += torch.tensor([9.0, 0.0, 0.0])  # $5_$ whatever the pair
    save_file(weights, tmp_path / "run" / "best" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "run" / "best" / "SHA256SUMS").unlink()
    found = main(replace(cfg, eval_only=True, train_file="",
                         validation_file=str(tmp_path / "one.tsv")))
    assert (found["n"], found["accuracy"], found["baseline_accuracy"]) == (24, 0, 1)
    assert found["labels"] == labels
    assert set(pandas.read_table(tmp_path / "run" / "eval-predictions.tsv").prediction) == {"$5_$"}


def test_seeds(recipe, tmp_path, capsys, fails, monkeypatch):
    """A mean over one seed trained three times, or a best model that is another run's; old runs
    deleted by a command that fails, or taken for this one's after a killed --overwrite."""
    cfg = replace(recipe, out_dir=str(tmp_path), seeds="1,02", max_iters=3)
    again = replace(cfg, resume=True)
    fails(1, lambda: main(again), "seed-1 holds no checkpoint")
    found = main(cfg)
    runs = [results(tmp_path / f"seed-{s}") for s in (1, 2)]
    assert found["loss"] == pytest.approx((runs[0]["loss"] + runs[1]["loss"]) / 2)
    assert found["last.f1"] == pytest.approx((runs[0]["last"]["f1"] + runs[1]["last"]["f1"]) / 2)
    assert found["loss_std"] > 0 and found["n"] == 37 and found["runs"] == runs
    assert found == json.loads((tmp_path / "seeds.json").read_text())
    said, best = capsys.readouterr().out, max(runs, key=lambda run: run["f1"])["seed"]
    assert "mean and deviation of 2 seeds" in said
    assert said.endswith(f"the best model of these: {tmp_path / f'seed-{best}' / 'best'}\n")
    fails(1, lambda: main(cfg), "seed-1 holds a run", "--overwrite")
    fails(2, lambda: main(replace(again, overwrite=True)), "exclude each other")
    shutil.rmtree(tmp_path / "seed-2")  # killed before it
    longer = main(replace(again, log_interval=7))  # what changes no result may change
    assert longer["loss"] == pytest.approx(found["loss"], abs=1e-6)
    fails(1, lambda: main(replace(cfg, overwrite=True, model="no/such")), "cannot load no/such")
    assert all(runtime.checkpoints(tmp_path / f"seed-{s}") for s in (1, 2))

    changed, agree = {"learning_rate": 1e-3, "max_iters": 4}, runtime.StopSignal.agree
    monkeypatch.setattr(runtime.StopSignal, "agree",
                        lambda *a: (agree(*a)[0], signal.SIGTERM, False))
    with pytest.raises(SystemExit):  # stopped in its first seed
        main(replace(cfg, overwrite=True, **changed))
    monkeypatch.undo()
    fails(2, lambda: main(replace(again, **changed)), "seed-2", "learning_rate is 0.001 but was")
    assert checkpoint_names(tmp_path / "seed-2") == [3]
    one = resume(tmp_path / "seed-1")  # a run of its own, without the other seeds
    assert one["seed"] == 1 and checkpoint_names(tmp_path / "seed-1") == [4, 1]
    shutil.rmtree(tmp_path / "seed-2")
    assert [run["seed"] for run in main(replace(again, **changed))["runs"]] == [1, 2]


def test_one_class_is_warned_of(recipe, tmp_path, capsys):
    """An F1 of 0.8 on MRPC that only says 'yes' to everything."""
    main(replace(recipe, out_dir=str(tmp_path), learning_rate=0.0, max_iters=1))
    assert "warning: the model calls every pair" in capsys.readouterr().out
