"""train_roberta.py: a tiny RoBERTa on made-up lines, against transformers' own."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

import runtime
import train_roberta
from configurator import load
from train_roberta import Config, Masked, Order, collate, encode, learning_rate, open_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=320, block_size=40, batch_size=8,
            learning_rate=1e-3, mixed_precision="no", log_steps=1, eval_steps=4)  # fmt: skip


@pytest.fixture(autouse=True)
def clean_process():
    """accelerate's state is the process's: give each test a fresh one."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """120 lines of 1 to 20 words, with a byte-order mark, CRLF and blank lines."""
    random = np.random.default_rng(0)
    words = "reason duty will law moral pure practical freedom human nature the of and is".split()
    lines = [" ".join(random.choice(words, random.integers(1, 21))) for _ in range(120)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines[:60], "", "  ", *lines[60:]]).encode())
    return path


def config(text, out_dir, **changes):
    return Config(**{"source": str(text), "out_dir": str(out_dir), **TINY, **changes})


def train(text, out_dir, **changes):
    """Run main; the exit code, 0 where it returns."""
    try:
        train_roberta.main(config(text, out_dir, **changes))
    except SystemExit as stop:
        return stop.code
    return 0


def command(cfg, *launcher):
    """The command line of `cfg`, under `launcher`."""
    options = [f"--{f.name}={getattr(cfg, f.name)}" for f in fields(Config)
               if getattr(cfg, f.name) != f.default]  # fmt: skip
    return [*(launcher or [sys.executable]), str(ROOT / "train_roberta.py"), *options]


def log(out_dir, *columns):
    return [[row[c] for c in columns] for row in runtime.read_log(Path(out_dir) / "log.csv")]


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """The folder of a finished run of 8 updates, a checkpoint every 2, of which 2 are kept."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train(text, out_dir, max_steps=8, save_steps=2) == 0
    return out_dir


@pytest.fixture(scope="session")
def tokenizer(finished):
    return open_tokenizer(finished, Config())


# ---- loss, masks, examples


def test_loss_and_gradient_equal_transformers(tokenizer):
    """Several lines in a row that saw each other, wrong positions or a wrong mean would show."""
    examples = [np.arange(10, 10 + n, dtype=np.int32) for n in (3, 30, 1, 17, 8, 22, 5, 11)]
    masked = Masked(examples, tokenizer, Config(mlm_probability=0.4))
    pairs = [masked[1, i] for i in range(len(examples))]
    longest = max(len(ids) for ids, _ in pairs)
    padded = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in pairs:
        gap = longest - len(ids)
        padded["input_ids"].append([*ids, *[tokenizer.pad_token_id] * gap])
        padded["labels"].append([*labels, *[-100] * gap])
        padded["attention_mask"].append([1] * len(ids) + [0] * gap)
    padded = {name: torch.tensor(np.array(rows)) for name, rows in padded.items()}
    packed = collate(pairs, tokenizer.pad_token_id)
    assert packed["input_ids"].shape[0] < len(pairs)  # they do share rows
    torch.manual_seed(0)
    ours = train_roberta.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=514, type_vocab_size=1)).eval()  # fmt: skip
    theirs = transformers.RobertaForMaskedLM(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    ours(**packed).loss.backward()
    theirs(**padded).loss.backward()
    assert ours(**packed).loss.item() == pytest.approx(theirs(**padded).loss.item(), abs=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    assert torch.equal(ours(**{k: padded[k] for k in ("input_ids", "attention_mask")}).logits,
                       theirs(**padded).logits)  # fmt: skip


def test_masks_are_berts_and_depend_on_the_place_alone(tokenizer):
    """15 % chosen, of these 80 % <mask>, 10 % random, 10 % kept; never <s> or </s>."""
    examples = [np.full(100, 50, dtype=np.int32) for _ in range(400)]
    masked = Masked(examples, tokenizer, Config())
    ids, labels = (np.stack(x) for x in zip(*(masked[1, i] for i in range(400)), strict=True))
    assert (ids[:, 0] == tokenizer.cls_token_id).all() and (labels[:, [0, -1]] == -100).all()
    assert (ids[:, -1] == tokenizer.sep_token_id).all() and examples[0].tolist() == [50] * 100
    chosen = labels != -100
    assert chosen[:, 1:-1].mean() == pytest.approx(0.15, abs=0.01)
    assert (ids[chosen] == tokenizer.mask_token_id).mean() == pytest.approx(0.8, abs=0.02)
    assert (ids[chosen] == 50).mean() == pytest.approx(0.1, abs=0.02)
    assert (ids[~chosen][labels[~chosen] != -100] == 50).all()
    again = Masked(examples, tokenizer, Config())
    assert all((a == b).all() for a, b in zip(masked[1, 7], again[1, 7], strict=True))
    assert (masked[1, 7][1] != masked[2, 7][1]).any() and (masked[1, 7][1] != masked[1, 8][1]).any()


def test_read_lines(text):
    """A byte-order mark or a carriage return would become tokens; a blank line an example."""
    lines = list(train_roberta.read_lines([text, text]))
    assert len(lines) == 240 and lines[0] == lines[120] and lines[0][0].isalpha()
    assert not any("\r" in line or line.endswith("\n") for line in lines)


def test_order_is_a_permutation_each_epoch():
    """A run must see each example once an epoch, wherever batches end, and a resume the rest."""
    places = list(Order(10, 25, seed=1))
    assert sorted(places[:10]) == [(1, i) for i in range(10)]
    assert sorted(places[10:20]) == [(2, i) for i in range(10)]
    assert [i for _, i in places[:10]] != [i for _, i in places[10:20]]
    assert places[:5] == list(Order(10, 5, seed=1))  # however long the run is


def test_encode_lines_and_blocks(tokenizer):
    """Text that looks like a special token stays text; packed blocks are full and lose nothing."""
    lines = ["reason is <mask></s>", "x" * 500, " moral law "]
    rows = encode(lines, tokenizer, 40, packing=False)
    assert tokenizer.decode(rows[0]) == lines[0] and min(rows[0]) > 4
    assert [len(rows[1]), tokenizer.decode(rows[2])] == [38, lines[2]]
    blocks = encode(lines, tokenizer, 40, packing=True)
    assert {len(block) for block in blocks} == {38}
    whole = tokenizer.encode(
        f" reason is <mask></s> {'x' * 500} moral law", split_special_tokens=True
    )
    overlap = len(blocks) * 38 - (len(whole) - 2)
    stream = np.concatenate([*blocks[:-1], blocks[-1][overlap:]])
    assert stream.tolist() == whole[1:-1]
    assert len(encode(["duty"], tokenizer, 40, packing=True)[0]) < 38  # one short text, one block


def test_learning_rate():
    """No update at rate zero, and a stop or a resume elsewhere must not move the schedule."""
    cfg = Config(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(t, cfg, 10) for t in range(12)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[9] == rates[11] == pytest.approx(1 / 6) and min(rates) > 0


# ---- whole runs


def test_accumulation_agrees(text, tmp_path):
    """8 x 1 and 2 x 4: a mean of micro-batch means would differ, the lines are of all lengths."""
    train(text, tmp_path / "a", max_steps=4, dropout=0.0)
    train(
        text, tmp_path / "b", max_steps=4, dropout=0.0, batch_size=2, gradient_accumulation_steps=4
    )
    a, b = (log(tmp_path / x, "tokens", "loss", "grad_norm") for x in "ab")
    assert len(a) == 4 and np.allclose(a, b, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_agree(text, tmp_path):
    """torchrun on a CPU must be one run of two processes, not two runs of one."""
    train(text, tmp_path / "one", max_steps=4, dropout=0.0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    cfg = config(text, tmp_path / "two", max_steps=4, dropout=0.0, batch_size=4)
    said = subprocess.run(command(cfg, *launcher), capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "cpu x 2" in said.stdout and said.stdout.count("step 4/4") == 1
    one, two = (log(tmp_path / x, "tokens", "loss", "grad_norm") for x in ("one", "two"))
    assert np.allclose(one, two, rtol=1e-5)
    one, two = (
        log(tmp_path / x, "train_loss", "val_loss", "val_accuracy")[-1] for x in ("one", "two")
    )
    assert np.allclose(one, two, rtol=1e-4)


def test_resume_is_bit_exact(text, finished, tmp_path):
    """N + N = 2N with dropout: weights, optimizer and log, over an epoch's end (14 updates)."""
    changes = dict(batch_size=2, gradient_accumulation_steps=4, save_steps=8)
    train(text, tmp_path / "whole", max_steps=16, **changes)
    train(text, tmp_path / "parts", max_steps=8, **changes)
    assert train(text, tmp_path / "parts", max_steps=16, resume=True, **changes) == 0
    for name in ("model.safetensors", "checkpoint-16/optimizer.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    columns = ["iter", "tokens", "lr", "loss", "grad_norm", "val_loss", "val_accuracy"]
    assert log(tmp_path / "whole", *columns) == log(tmp_path / "parts", *columns)
    assert len(log(tmp_path / "parts", "iter")) == 16


def test_checkpoints_are_whole_safe_and_few(finished):
    """Nothing in one needs unpickling code, nothing half written keeps the name."""
    assert [p.name for p in runtime.checkpoints(finished)] == ["checkpoint-8", "checkpoint-6"]
    assert not list(finished.glob(".tmp-*")) and not list(finished.rglob("*.bin"))
    for checkpoint in runtime.checkpoints(finished):
        assert runtime.damage(checkpoint) is None
        for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
            torch.load(path, weights_only=True)
    assert json.loads((finished / "run.json").read_text())["max_steps"] == 8


def test_a_damaged_checkpoint_is_passed_over(text, tmp_path, capsys):
    """A flipped byte in the newest must not be trained on; the one before it goes on."""
    train(text, tmp_path, max_steps=4, save_steps=2)
    weights = tmp_path / "checkpoint-4/model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    capsys.readouterr()
    assert train(text, tmp_path, max_steps=4, save_steps=2, resume=True) == 0
    assert "model.safetensors is damaged" in capsys.readouterr().out
    assert weights.read_bytes() == before


def test_refusals(text, tmp_path, capsys):
    """An old run is neither mixed with nor lost by accident."""
    train(text, tmp_path, max_steps=2)
    before = (tmp_path / "model.safetensors").read_bytes()
    assert train(text, tmp_path, max_steps=2) == 1
    assert train(text, tmp_path, max_steps=4, resume=True, n_embd=64) == 1
    assert train(text, tmp_path, max_steps=2, overwrite=True, block_size=600) == 2
    assert (tmp_path / "model.safetensors").read_bytes() == before
    refused, changed, wrong = capsys.readouterr().err.strip().splitlines()
    assert "--resume=True" in refused and "--overwrite=True" in refused
    assert "n_embd is 64" in changed and "32" in changed and "600" in wrong
    assert train(text, tmp_path, max_steps=2, overwrite=True, n_embd=16, vocab_size=300) == 0
    new = json.loads((tmp_path / "config.json").read_text())
    assert [new["hidden_size"], new["vocab_size"]] == [16, 300]


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(text, tmp_path, number, code):
    """A stopped run ends with 130 or 143, a whole checkpoint, and goes on from it."""
    cfg = config(text, tmp_path, max_steps=100_000)
    with open(tmp_path / "said.txt", "w") as said:
        run = subprocess.Popen(command(cfg), stdout=said, stderr=said)
    for _ in range(600):
        time.sleep(0.1)
        if "step 3/" in (tmp_path / "said.txt").read_text() or run.poll() is not None:
            break
    run.send_signal(number)
    assert run.wait(timeout=60) == code, (tmp_path / "said.txt").read_text()
    (checkpoint,) = runtime.checkpoints(tmp_path)
    step = int(checkpoint.name[11:])
    assert runtime.damage(checkpoint) is None and not (tmp_path / "model.safetensors").exists()
    assert train(text, tmp_path, max_steps=step + 1, resume=True) == 0
    assert [row[0] for row in log(tmp_path, "iter")] == list(range(1, step + 2))


def test_non_finite_gradients_stop_the_run(text, tmp_path, capsys):
    """A run that diverged must say so, not save ten checkpoints of nan."""
    assert train(text, tmp_path, max_steps=40, learning_rate=1e30, save_steps=1) == 1
    assert "non-finite gradient" in capsys.readouterr().err
    newest = runtime.checkpoints(tmp_path)[0]
    assert int(newest.name[11:]) < 40


@pytest.mark.parametrize("name, data, packing", [
    ("one line", b"Human reason.", False),
    ("one line packed", b"Human reason.", True),
    ("fewer lines than a batch", b"reason\r\nduty and will\r\n\r\n\r\npure", False),
    ("long lines", b"reason and duty " * 2000 + b"\nwill\n" * 3, False),
    ("long lines packed", b"reason and duty " * 2000 + b"\nwill\n" * 3, True),
])  # fmt: skip
def test_odd_texts_train(name, data, packing, tmp_path):
    """Each ends with a model whose loss is a number."""
    (tmp_path / "text.txt").write_bytes(data)
    assert train(tmp_path / "text.txt", tmp_path / "run", max_steps=2, packing=packing) == 0
    assert all(math.isfinite(row[0]) for row in log(tmp_path / "run", "loss"))
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("data, changes, code, words", [
    (b"", {}, 1, "holds no text"),
    (b" \n\t\r\n", {}, 1, "holds no text"),
    ("Königsberg\n".encode("latin-1"), {}, 1, "is not UTF-8"),
    (None, {}, 1, "no such file"),
    (b"reason", {"tokenizer": "nowhere"}, 1, "no such folder"),
    (b"reason", {"vocab_size": 100}, 2, "--vocab_size must be 261 or more, not 100"),
    (b"reason", {"n_head": 3}, 2, "no multiple of --n_head 3"),
    (b"reason", {"mlm_probability": 0.0}, 2, "--mlm_probability must be above 0"),
    (b"reason", {"resume": True}, 1, "holds no checkpoint"),
    (b"reason", {"fill_mask": "a <mask>"}, 1, "holds none"),
])  # fmt: skip
def test_errors_are_one_line(data, changes, code, words, tmp_path, capsys):
    """What is wrong, in one line, with the promised exit code."""
    if data is not None:
        (tmp_path / "text.txt").write_bytes(data)
    assert train(tmp_path / "text.txt", tmp_path / "run", **changes) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


# ---- what is left behind


def test_out_dir_loads_with_plain_transformers(finished, text):
    """The folder must be RoBERTa to others: class, specials, length, <s>...</s>, mask."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    model = transformers.AutoModelForMaskedLM.from_pretrained(finished)
    assert type(model) is transformers.RobertaForMaskedLM
    assert model.config.architectures == ["RobertaForMaskedLM"]
    assert (
        model.config.vocab_size
        == len(tokenizer)
        == len(json.loads((finished / "vocab.json").read_text()))
    )
    assert tokenizer.model_max_length == 512 and (finished / "merges.txt").exists()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    ids = tokenizer("reason is <mask>.").input_ids
    assert ids[0] == 0 and ids[-1] == 2 and ids.count(4) == 1
    without = tokenizer("reason is<mask>.").input_ids
    assert ids == without  # <mask> takes its space along: the word it hides begins with one
    best = transformers.pipeline("fill-mask", model=str(finished))("reason is <mask>.")
    assert len(best) == 5


def test_tokenizer_is_reused(text, finished, tmp_path):
    """--tokenizer takes the folder, its file, or the book's two files, and gives the same ids."""
    book = tmp_path / "book"
    book.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (book / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "other.txt").write_text("entirely different words\n" * 9)
    for k, path in enumerate((finished, finished / "tokenizer.json", book)):
        out_dir = tmp_path / f"run{k}"
        assert train(tmp_path / "other.txt", out_dir, max_steps=1, tokenizer=str(path)) == 0
        assert (out_dir / "vocab.json").read_bytes() == (finished / "vocab.json").read_bytes()
        sentence = "reason is <mask>."
        ours = transformers.AutoTokenizer.from_pretrained(out_dir)(sentence).input_ids
        assert ours == transformers.AutoTokenizer.from_pretrained(finished)(sentence).input_ids


def test_fill_mask_only_fills(text, finished, capsys):
    """It prints five candidates a mask, trains nothing, and needs no text."""
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert train("nowhere.txt", finished, fill_mask="reason is <mask> and <mask>.") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 + 2 * 6
    scores = [float(line.split()[0]) for line in lines[2:7]]
    assert scores == sorted(scores, reverse=True) and 0 < scores[0] < 1
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert train("nowhere.txt", finished, fill_mask="reason is pure.") == 2
    assert train("nowhere.txt", finished, fill_mask="reason " * 600 + "<mask>") == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_training_learns(text, tmp_path):
    """The loss must fall well below that of a guess among all tokens."""
    train(
        text,
        tmp_path,
        max_steps=60,
        batch_size=32,
        max_epochs=20,
        learning_rate=3e-3,
        eval_steps=60,
    )
    first, last = log(tmp_path, "loss")[0][0], log(tmp_path, "val_loss")[-1][0]
    assert last < first - 1.5
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "name, millions", [("kantaibert", (83, 84)), ("kantaibert_small", (0.3, 9))]
)
def test_configs(name, millions):
    """The recipes load, and have the size the README tells."""
    cfg = load(Config, [str(ROOT / f"config/{name}.py")])
    train_roberta.check(cfg)
    with torch.device("meta"):
        model = train_roberta.make_model(cfg, cfg.vocab_size, (0, 1, 2))
    assert millions[0] < model.num_parameters() / 1e6 < millions[1]
    assert asdict(cfg)["out_dir"] == f"out/{name}"
