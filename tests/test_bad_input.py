"""Bad command lines, configurations and files: one line, the promised code, nothing changed."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from conftest import one_line, snapshot

import configurator
import prepare

TINY = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=2"]
PAIRS = "sentence1\tsentence2\tlabel\n" + "the cat sat\ta cat was sitting\t1\n" * 9


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a prepared data set, odd texts, odd pairs and odd config files."""
    folder = tmp_path_factory.mktemp("home")
    text = Path(json.__file__).read_text("utf-8")
    files = {
        "text.txt": text,
        "empty.txt": "",
        "short.txt": "abc",
        "blank.txt": "\n\n \n",
        "unknown.py": "batch_sise = 4",
        "typed.py": 'batch_size = "4"',
        "broken.py": "batch_size = (",
        "raises.py": "batch_size = 1 / 0",
        "header.tsv": "sentence1\tsentence2\tlabel\n",
        "nolabel.tsv": "sentence1\tsentence2\nx\ty\n",
        "label2.tsv": PAIRS + "one\ttwo\t2\n",
        "gap.tsv": PAIRS + "\ttwo\t1\n",
        "pairs.tsv": PAIRS,
        "bad.jsonl": "{",
        "tokenizer.json": "{}",
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "latin1.txt").write_bytes("déjà vu ".encode("latin-1") * 9)
    (folder / "nothing").mkdir()
    source = str(folder / "text.txt")
    prepare.main(prepare.Config("mine", source, "char", data_dir=str(folder / "data")))
    (folder / "data" / "hurt").mkdir()
    (folder / "data" / "hurt" / "meta.json").write_text("{", encoding="utf-8")
    return folder


PREPARE = [
    (["--dataset=x"], 2, ["x", "--source"]),
    (["--dataset=../x", "--source=text.txt"], 2, ["../x"]),
    (["--dataset=a/b", "--source=text.txt"], 2, ["a/b"]),
    (["--dataset=", "--source=text.txt"], 2, ["--dataset"]),
    (["--dataset=n", "--source=gone.txt"], 1, ["gone.txt"]),
    (["--dataset=n", "--source=nothing"], 1, ["nothing", ".txt"]),
    (["--dataset=n", "--source=no/*.such"], 1, ["no/*.such"]),
    (["--dataset=n", "--source=empty.txt"], 1, ["empty.txt"]),
    (["--dataset=n", "--source=latin1.txt"], 1, ["latin1.txt", "0xe9"]),
    (["--dataset=n", "--source=short.txt", "--tokenizer=char"], 1, ["split", "--val_fraction"]),
    (["--dataset=n", "--source=text.txt", "--vocab_size=60000"], 1, ["60000", "--vocab_size"]),
    (["--dataset=n", "--source=text.txt", "--vocab_size=7"], 2, ["--vocab_size", "7"]),
    (["--dataset=n", "--source=text.txt", "--tokenizer=gpt9"], 2, ["gpt9", "char"]),
    (["--dataset=n", "--source=text.txt", "--tokenizer=tokenizer.json"], 1, ["tokenizer.json"]),
    (["--dataset=n", "--source=text.txt", "--val_fraction=0"], 2, ["--val_fraction", "0"]),
    (["--dataset=n", "--source=text.txt", "--val_fraction=nan"], 2, ["nan"]),
    (["--datasets=n"], 2, ["--datasets"]),
]
TRAIN = [
    (["unknown.py"], 2, ["unknown.py", "batch_sise", "batch_size"]),
    (["typed.py"], 2, ["typed.py", "batch_size", "int", "'4'"]),
    (["broken.py"], 2, ["broken.py", "SyntaxError"]),
    (["raises.py"], 2, ["raises.py", "ZeroDivisionError"]),
    (["gone.py"], 2, ["gone.py"]),
    (["--batch_size=two"], 2, ["batch", "two"]),
    (["--batch_size=0"], 2, ["--batch_size", "0"]),
    (["--batch_size=1.5"], 2, ["1.5"]),
    (["--compile=maybe"], 2, ["maybe"]),
    (["--resume"], 2, ["resume"]),
    (["--learning_rate=fast"], 2, ["fast"]),
    (["--learning_rate=-1"], 2, ["--learning_rate", "-1"]),
    (["--learning_rate=inf"], 2, ["--learning_rate", "inf"]),
    (["--mixed_precision=int4"], 2, ["int4", "bf16"]),
    (["--optimizer=sgd"], 2, ["sgd", "adamw"]),
    (["--init=xavier"], 2, ["xavier", "gpt2"]),
    (["--n_layer=0"], 2, ["--n_layer", "0"]),
    (["--n_head=3"], 2, ["--n_head 3", "--n_embd 8"]),
    (["--dropout=1"], 2, ["--dropout", "1"]),
    (["--beta1=1"], 2, ["--beta1", "1"]),
    (["--grad_clip=-2"], 2, ["--grad_clip", "-2"]),
    (["--eval_iters=0"], 2, ["--eval_iters"]),
    (["--keep_checkpoints=0"], 2, ["--keep_checkpoints"]),
    (["--sample_temperature=nan"], 2, ["nan"]),
    (["--seed=-1"], 2, ["--seed", "-1"]),
    (["--dataset=gone"], 1, ["gone", "prepare.py"]),
    (["--dataset=hurt"], 1, ["hurt"]),
    (["--dataset=../mine"], 2, ["../mine"]),
    (["--out_dir=out/../../x"], 2, ["out/../../x"]),
    (["--block_size=99999"], 1, ["train.npy", "99999", "--block_size"]),
    (["--batch_size=9999"], 1, ["train.npy", "9999", "--batch_size"]),
    (["--init_from=gpt5"], 2, ["gpt5", "gpt2-xl"]),
    (["--init_from=nothing"], 1, ["nothing"]),
    (["--resume=True"], 1, ["--resume=True"]),
    (["--resume=True", "--overwrite=True"], 2, ["--resume=True", "--overwrite=True"]),
    (["--no_such=1"], 2, ["no_such"]),
]
SAMPLE = [
    ([], 1, ["out", "train.py"]),
    (["--out_dir=nothing"], 1, ["nothing", "checkpoint"]),
    (["--top_p=0"], 2, ["--top_p", "0"]),
    (["--top_p=1.1"], 2, ["--top_p", "1.1"]),
    (["--top_k=0"], 2, ["--top_k", "0"]),
    (["--temperature=-1"], 2, ["--temperature", "-1"]),
    (["--num_beams=0"], 2, ["--num_beams", "0"]),
    (["--max_new_tokens=0"], 2, ["--max_new_tokens"]),
    (["--init_from=gpt7"], 2, ["gpt7"]),
]
ROBERTA = [
    (["--source=empty.txt"], 1, ["empty.txt"]),
    (["--source=blank.txt"], 1, ["blank.txt"]),
    (["--source=gone.txt"], 1, ["gone.txt"]),
    (["--source=latin1.txt"], 1, ["latin1.txt"]),
    (["--source=text.txt", "--n_head=5"], 2, ["--n_head 5"]),
    (["--source=text.txt", "--block_size=600"], 2, ["600"]),
    (["--source=text.txt", "--tokenizer=gone"], 1, ["gone"]),
    (["--fill_mask=no mask here"], 1, ["out/kantaibert"]),
]
MRPC = [
    (["--train_file=gone.tsv"], 1, ["gone.tsv"]),
    (["--train_file=header.tsv"], 1, ["header.tsv"]),
    (["--train_file=nolabel.tsv"], 1, ["nolabel.tsv", "label"]),
    (["--train_file=label2.tsv"], 1, ["label2.tsv", "2"]),
    (["--train_file=gap.tsv"], 1, ["gap.tsv", "sentence1"]),
    (["--train_file=bad.jsonl"], 1, ["bad.jsonl"]),
    (["--seeds=1,x"], 2, ["1,x"]),
    (["--batch_size=0"], 2, ["--batch_size"]),
    (["--predict", "a", "b", "c"], 2, ["3"]),
    (["--eval_only=True", "--validation_file=pairs.tsv"], 1, ["best"]),
]
TABLE = [("prepare", *r) for r in PREPARE] + [("train", *r) for r in TRAIN]
TABLE += [("sample", *r) for r in SAMPLE] + [("train_roberta", *r) for r in ROBERTA]
TABLE += [("finetune_mrpc", *r) for r in MRPC]


def test_the_table_is_as_long_as_promised():
    assert len(TABLE) >= 60


@pytest.mark.parametrize("script, options, code, words", TABLE)
def test_one_line_and_nothing_changed(home, script, options, code, words, capsys, monkeypatch):
    """Would catch a traceback, a second line, another code, a file made or lost."""
    monkeypatch.chdir(home)
    if script == "train":
        files = [o for o in options if not o.startswith("-")]
        first = ["--dataset=mine", *TINY, "--max_iters=1"]
        options = files + first + [o for o in options if o.startswith("-")]
    before = {k: v for k, v in snapshot(home).items() if v and not k.endswith(".lock")}
    module = import_module(script)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(configurator.load(module.Config, options))
    assert stop.value.code == code
    one_line(capsys.readouterr().err, *words)
    after = {k: v for k, v in snapshot(home).items() if v and not k.endswith(".lock")}
    assert before == after
