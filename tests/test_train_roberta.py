"""train_roberta.py: a tiny RoBERTa on made-up lines, against transformers' own."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import ROOT, snapshot
from torch.nn.utils.rnn import pad_sequence

import prepare
import runtime
import train_roberta
from configurator import changed, load
from runtime import UserError
from train_roberta import Config, MaskedDataset, collate, encode, open_tokenizer

TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=320, block_size=40, batch_size=6,
            learning_rate=1e-3, mixed_precision="no", log_interval=1, eval_interval=4)
SCORES = ["iter", "tokens", "lr", "loss", "grad_norm", "val_loss", "val_accuracy"]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """121 lines of 1 to 20 words, with a byte-order mark, CRLF and blank lines."""
    random = np.random.default_rng(0)
    words = "reason duty will law moral pure practical freedom human nature the of and is".split()
    lines = [" ".join(random.choice(words, random.integers(1, 21))) for _ in range(121)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines[:60], "", "  ", *lines[60:]]).encode())
    return path


def config(text, out_dir, **changes):
    return Config(**{"source": str(text), "out_dir": str(out_dir), **TINY, **changes})


def train(text, out_dir, **changes):
    return train_roberta.main(config(text, out_dir, **changes))


def resume(out_dir, *options):
    """Continue as the command line does, with no setting but those given."""
    return train_roberta.main(load(Config, [f"--out_dir={out_dir}", "--resume", *options]))


def command(cfg):
    options = [f"--{name}={value}" for name, value in changed(cfg).items()]
    return [str(ROOT / "train_roberta.py"), *options]


def log(out_dir, *columns):
    return [[row[c] for c in columns] for row in runtime.read_log(out_dir / "log.csv")]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def reseal(folder):
    """Make SHA256SUMS right again after a file was changed."""
    aside = folder.rename(folder.with_name("aside"))
    (aside / "SHA256SUMS").unlink()
    runtime.commit_folder(aside, folder)


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """The folder of a finished run of 7 iterations, a checkpoint every 2, of which 2 are kept."""
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    train(text, out_dir, max_iters=7, save_interval=2)
    return out_dir


@pytest.fixture(scope="session")
def tokenizer(finished):
    return open_tokenizer(finished)


# ---- loss, masks, examples


def test_loss_and_gradient_equal_transformers(tokenizer):
    """Several lines in a row that saw each other, wrong positions, a head on wrong positions or a
    wrong mean would show."""
    examples = [np.arange(10, 10 + n, dtype=np.int32) for n in (3, 30, 1, 17, 8, 22, 5)]
    masked = MaskedDataset(examples, tokenizer, seed=1, probability=0.4)
    pairs = [masked[i] for i in range(len(examples))]
    shared = collate(pairs, tokenizer.pad_token_id)
    assert shared["input_ids"].shape[0] < len(pairs)  # they do share rows
    ids, labels = ([torch.from_numpy(x) for x in column] for column in zip(*pairs, strict=True))
    ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    plain = {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}
    ours = train_roberta.make_model(Config(n_layer=2, n_head=2, n_embd=32), tokenizer).eval()
    theirs = transformers.RobertaForMaskedLM(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    expected = theirs(**plain, labels=labels)
    loss = ours(**shared).loss
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    loss.backward()
    expected.loss.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    logits = expected.logits.detach()
    assert torch.equal(ours(**plain).logits, logits)
    chosen = labels != -100
    loss, hits, count = train_roberta.example_statistics(logits[chosen], labels).sum(0)
    assert loss / count == pytest.approx(expected.loss.item(), abs=1e-5)
    assert hits == (logits.argmax(-1) == labels).sum() and count == chosen.sum()


def test_masks_are_berts_and_depend_on_the_place_alone(tokenizer):
    """15 % chosen, of these 80 % <mask>, 10 % random, 10 % kept; never <s> or </s>."""
    examples = [np.full(101, 50, dtype=np.int32) for _ in range(400)]
    masked = MaskedDataset(examples, tokenizer, 1337, 0.15)
    ids, labels = (np.stack(x) for x in zip(*(masked[i] for i in range(400)), strict=True))
    assert (ids[:, 0] == tokenizer.cls_token_id).all() and (labels[:, [0, -1]] == -100).all()
    assert (ids[:, -1] == tokenizer.sep_token_id).all() and examples[0].tolist() == [50] * 101
    chosen = labels != -100
    assert chosen[:, 1:-1].mean() == pytest.approx(0.15, abs=0.01)
    assert (ids[chosen] == tokenizer.mask_token_id).mean() == pytest.approx(0.8, abs=0.02)
    assert (ids[chosen] == 50).mean() == pytest.approx(0.1, abs=0.02)
    assert (labels[chosen] == 50).all() and (labels[7] != labels[8]).any()
    again = MaskedDataset(examples, tokenizer, 1337, 0.15)
    assert (again[7][0] == ids[7]).all() and (again[7][1] == labels[7]).all()


def test_a_run_visits_each_example_once_an_epoch(tokenizer):
    """An example left out or seen twice, masks that repeat, an order that a run's length moves."""
    examples = [np.full(30, 10 + i, dtype=np.int32) for i in range(7)]
    run = MaskedDataset(examples, tokenizer, 1, 0.15, length=18)
    which = [int(np.median(run[k][0])) - 10 for k in range(18)]
    assert sorted(which[:7]) == sorted(which[7:14]) == list(range(7)) and which[:7] != which[7:14]
    again = which.index(which[3], 7)
    assert (run[3][1] != run[again][1]).any()
    longer = MaskedDataset(examples, tokenizer, 1, 0.15, length=99)
    assert all((a == b).all() for k in range(18) for a, b in zip(run[k], longer[k], strict=True))


def test_read_lines(text):
    """A byte-order mark or a carriage return would become tokens; a blank line an example."""
    lines = list(train_roberta.read_lines([text, text]))
    assert len(lines) == 242 and lines[0] == lines[121] and lines[0][0].isalpha()
    assert not any("\r" in line or line.endswith("\n") for line in lines)


def test_encode_lines_and_blocks(tokenizer):
    """Text that looks like a special token stays text; packed blocks are full and lose nothing."""
    lines = ["reason is <mask></s>", "x" * 500, " moral law "]
    rows = encode(lines, tokenizer, 40, packing=False)
    assert tokenizer.decode(rows[0]) == lines[0] and min(rows[0]) > 4
    assert [len(rows[1]), tokenizer.decode(rows[2])] == [38, lines[2]]
    blocks = encode(lines, tokenizer, 40, packing=True)
    assert {len(block) for block in blocks} == {38}
    whole = tokenizer.encode(f" reason is <mask></s> {'x' * 500} moral law",
                             split_special_tokens=True)[1:-1]
    overlap = len(blocks) * 38 - len(whole)
    assert np.concatenate([*blocks[:-1], blocks[-1][overlap:]]).tolist() == whole
    assert len(encode(["duty"], tokenizer, 40, packing=True)[0]) < 38  # one short text, one block


def test_the_tokenizer_is_the_books(text):
    """Other tokens than the class learns that the book uses; names of special tokens in a text."""
    lines = [*train_roberta.read_lines([text]), *["antinomy of <mask>, </s>"] * 3, "quid juris"]
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    book = tokenizers.ByteLevelBPETokenizer()
    book.train_from_iterator(lines, 5000, 2, special_tokens=names, show_progress=False)
    ours = train_roberta.train_tokenizer(lines, 5000).backend_tokenizer
    one, other = (json.loads(engine.to_str())["model"] for engine in (ours, book))
    assert one["vocab"] == other["vocab"] and one["merges"] == other["merges"]


def test_a_text_without_blanks_trains_a_tokenizer():
    """The merges of one endless word take time that grows with the square of its length."""
    random = np.random.default_rng(0)
    began = time.process_time()
    train_roberta.train_tokenizer(["".join(random.choice([*"ACGT"], 200_000))], 400)
    assert time.process_time() - began < 5


# ---- whole runs


@pytest.fixture(scope="session")
def one_process(text, tmp_path_factory):
    """A run of 5 iterations of 6 examples, without dropout."""
    out_dir = tmp_path_factory.mktemp("one") / "run"
    train(text, out_dir, max_iters=5, dropout=0.0)
    return out_dir


def test_accumulation_agrees(text, one_process, tmp_path):
    """A mean of micro-batch means would differ, the lines are of all lengths."""
    train(text, tmp_path, max_iters=5, dropout=0.0, batch_size=2, gradient_accumulation_steps=3)
    assert np.allclose(log(tmp_path, *SCORES[:5]), log(one_process, *SCORES[:5]), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.network_loopback
def test_two_processes_agree(text, one_process, tmp_path):
    """torchrun on a CPU must be one run of two processes, not two runs of one; an evaluation whose
    last batch is padded with examples of the first must not count them twice."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    cfg = config(text, tmp_path / "two", max_iters=5, dropout=0.0, batch_size=3)
    said = subprocess.run([*launcher, *command(cfg)], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert said.returncode == 0, said.stderr
    assert "cpu x 2" in said.stdout and said.stdout.count("iteration 5/5") == 1
    one, two = (log(x, *SCORES) for x in (one_process, tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert [x or 0 for x in a] == pytest.approx([x or 0 for x in b], rel=1e-4)


@pytest.mark.parametrize("more", [{}, {"muon_lr": 0.02, "local_heads": True}])
def test_resume_is_bit_exact(text, tmp_path, more):
    """N + N = 2N with dropout and accumulation: weights, optimizer and log, over an epoch's end."""
    changes = dict(batch_size=5, gradient_accumulation_steps=3, save_interval=5, max_epochs=3,
                   warmup_iters=3, eval_interval=5, **more)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(text, whole, max_iters=10, **changes)
    train(text, parts, max_iters=5, **changes)
    resume(parts, "--max_iters=10")
    for name in ("model.safetensors", "checkpoint-000010/optimizer.pt"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert log(whole, *SCORES) == log(parts, *SCORES) and len(log(parts, "iter")) == 10


@pytest.mark.parametrize("n_head, n_embd", [(2, 128), (3, 93), (1, 33)])
def test_local_heads_begin_at_their_neighbours(n_head, n_embd):
    """Would catch a wrong angle, a head that looks elsewhere, other weights than an odd width's."""
    tokenizer = train_roberta.train_tokenizer(["a"], 261)
    model = train_roberta.make_model(config("", "", n_head=n_head, n_embd=n_embd, dropout=0.0,
                                            local_heads=True, init_std=0.04), tokenizer).eval()
    model.set_attn_implementation("eager")
    weights = model(torch.full((1, 20), 5), output_attentions=True).attentions[0][0]  # (nh, T, T)
    for head, distance in zip(range(n_head), (1, -1, 2), strict=False):
        seen = weights[head].diagonal(distance)
        assert len(seen) == 20 - abs(distance)
        assert (seen > 0.1).all() and seen.mean() > 0.35  # a random head: 0.05


def test_resume_with_another_accumulation_or_schedule(text, one_process, tmp_path):
    """A resumed run that makes no update, or whose rate, intervals or position stay the old."""
    train(text, tmp_path, max_iters=3, dropout=0.0)
    resume(tmp_path, "--max_iters=5", "--batch_size=2", "--gradient_accumulation_steps=3")
    assert np.allclose(log(tmp_path, *SCORES[:5]), log(one_process, *SCORES[:5]), rtol=1e-5)
    resume(tmp_path, "--max_epochs=0.5", "--learning_rate=0.002", "--log_interval=2")
    assert [row[0] for row in log(tmp_path, "iter")] == [1, 2, 3, 4, 5, 6, 8, 10]
    assert log(tmp_path, "lr")[-2][0] == pytest.approx(0.002 * (10 - 7) / 10)
    assert read_json(tmp_path / "run.json")["resumed"] == [3, 5]


def test_checkpoints_are_whole_safe_and_few(finished):
    """Nothing in one needs unpickling code, nothing half written keeps the name."""
    names = [p.name for p in runtime.checkpoints(finished)]
    assert names == ["checkpoint-000007", "checkpoint-000006"]
    assert not list(finished.glob(".tmp-*")) and not list(finished.rglob("*.bin"))
    for checkpoint in runtime.checkpoints(finished):
        assert runtime.verify_checksums(checkpoint) is None
        for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
            torch.load(path, weights_only=True)
    run = read_json(finished / "run.json")
    assert run["max_iters"] == 7 and run["script"] == "train_roberta.py"
    assert run["seconds"] > 0 and run["started"]


def test_a_damaged_checkpoint_is_passed_over(text, tmp_path, capsys):
    """A flipped byte in the newest must not be trained on; the one before it goes on."""
    train(text, tmp_path, max_iters=5, save_interval=3)
    weights = tmp_path / "checkpoint-000005/model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    resume(tmp_path)
    assert "model.safetensors is damaged" in capsys.readouterr().out
    assert weights.read_bytes() == before
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    resume(tmp_path, "--max_iters=4")  # a shorter run: its model is not the damaged one
    assert read_json(tmp_path / "run.json")["max_iters"] == 4
    four = tmp_path / "checkpoint-000004/model.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == four.read_bytes()


def test_right_sums_and_wrong_contents_are_one_line(text, tmp_path, fails):
    """The Trainer traces back, or trains fresh weights where it finds none that fit."""
    train(text, tmp_path, max_iters=3)
    checkpoint = tmp_path / "checkpoint-000003"
    names = "model.safetensors optimizer.pt scheduler.pt trainer_state.json tokenizer.json".split()
    torch.save({}, tmp_path / "empty.pt")
    empty = (tmp_path / "empty.pt").read_bytes()
    wrong = [(name, b"no such file") for name in names]
    wrong += [("optimizer.pt", empty), ("scheduler.pt", empty),
              ("model.safetensors", safetensors.torch.save({"x": torch.ones(2)}))]
    for name, key, value in (("trainer_state.json", "global_step", 1), ("run.json", "resumed", 7),
                             ("run.json", "seconds", "x"), ("run.json", "dropout", "x")):
        content = read_json(checkpoint / name) | {key: value}
        wrong.append((name, json.dumps(content).encode()))
    for name, content in wrong:
        before = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        reseal(checkpoint)
        fails(1, lambda: resume(tmp_path, "--max_iters=5"), str(tmp_path))
        (checkpoint / name).write_bytes(before)


def test_refusals(text, tmp_path, capsys, fails, monkeypatch):
    """An old run is neither mixed with nor lost by accident."""
    out_dir = tmp_path / "run"
    train(text, out_dir, max_iters=3)
    before = snapshot(out_dir)
    (tmp_path / "other.txt").write_text("entirely different words\n" * 99)
    fails(1, lambda: train(text, out_dir), "--resume", "--overwrite")
    fails(2, lambda: resume(out_dir, "--n_embd=64", "--n_layer=3", "--batch_size=5"),
          "n_embd is 64 but was 32", "n_layer is 3", "examples_per_iteration is 5")
    fails(2, lambda: resume(out_dir, f"--source={tmp_path / 'other.txt'}"), "text_sha256")
    assert resume(out_dir) is None  # finished; a script that retries must end
    assert "finished at iteration 3" in capsys.readouterr().out
    fails(2, lambda: resume(out_dir, "--max_iters=2"), "done 3 iterations")
    for wrong in ({"block_size": 600}, {"text": "gone.txt"}, {"tokenizer": "gone"}):
        with pytest.raises(UserError):
            train(**{"text": text, "out_dir": out_dir, "overwrite": True} | wrong)
    after = snapshot(out_dir)
    assert all(before[name][0] == after[name][0] for name in before if before[name])
    handler, seen = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(train_roberta, "fill_mask",
                        lambda *args: seen.append(signal.getsignal(signal.SIGINT)))
    train(text, out_dir, max_iters=2, overwrite=True, n_embd=16, vocab_size=300)
    assert seen == [handler]  # Ctrl-C in the first answer promised a save, and made none
    new = read_json(out_dir / "config.json")
    assert [new["hidden_size"], new["vocab_size"]] == [16, 300]


def test_model_folders_are_not_overwritten(text, finished, tmp_path, fails):
    """A finished run without its checkpoints, or any model folder, was deleted unasked."""
    for name in train_roberta.MODEL_FILES[:3]:
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    fails(1, lambda: train(text, tmp_path, overwrite=True), "config.json", "--out_dir")
    (tmp_path / "run.json").write_text("{}")
    fails(1, lambda: train(text, tmp_path), "--overwrite")
    assert (tmp_path / "config.json").read_bytes() == (finished / "config.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(text, tmp_path, number, code):
    """A stopped run ends with 130 or 143, a whole checkpoint, and goes on from it."""
    cfg = config(text, tmp_path, max_epochs=10_000)
    with open(tmp_path / "said.txt", "w") as said:
        run = subprocess.Popen([sys.executable, *command(cfg)], stdout=said, stderr=said)
    for _ in range(1200):
        time.sleep(0.1)
        if "iteration 3/" in (tmp_path / "said.txt").read_text() or run.poll() is not None:
            break
    run.send_signal(number)
    status, said = run.wait(timeout=60), (tmp_path / "said.txt").read_text()
    assert status == code, said
    (checkpoint,) = runtime.checkpoints(tmp_path)
    done = int(checkpoint.name[11:])
    assert said.splitlines()[-1].endswith(f"--out_dir={tmp_path} --resume")
    assert not (tmp_path / "model.safetensors").exists()
    resume(tmp_path, f"--max_iters={done + 1}")
    assert [row[0] for row in log(tmp_path, "iter")] == list(range(1, done + 2))


def test_a_signal_in_the_last_update(text, tmp_path, monkeypatch):
    """The last evaluation was left out, and the command that was named ended in an error."""
    begin = train_roberta.RunCallback.on_step_begin

    def signalled(self, args, state, *more, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(self, args, state, *more, **kwargs)

    monkeypatch.setattr(train_roberta.RunCallback, "on_step_begin", signalled)
    train(text, tmp_path, max_iters=3, eval_interval=0)
    assert log(tmp_path, "val_loss")[-1][0] and (tmp_path / "model.safetensors").exists()


def test_non_finite_gradients(text, tmp_path, fails, monkeypatch, capsys):
    """One is skipped and the run goes on; ten in a row end it, and no nan is saved. A finite
    gradient whose norm overflows was clipped to zeros and passed for a good one."""
    forward = train_roberta.RobertaForMaskedLM.forward
    calls = []

    @functools.wraps(forward)  # the Trainer looks at its arguments
    def poisoned(self, *args, **kwargs):
        calls.append(1)
        out = forward(self, *args, **kwargs)
        out.loss = out.loss * {2: math.nan, 3: 1e30}.get(len(calls), 1.0)
        return out

    monkeypatch.setattr(train_roberta.RobertaForMaskedLM, "forward", poisoned)
    model = train(text, tmp_path / "one", max_iters=4, eval_interval=0, save_interval=0).model
    assert all(p.isfinite().all() for p in model.parameters())
    said = capsys.readouterr().out
    assert "warning: iteration 2: gradient norm nan, update skipped" in said
    assert "warning: iteration 3: gradient norm inf, update skipped" in said
    monkeypatch.undo()
    fails(1, lambda: train(text, tmp_path / "all", max_epochs=3, max_iters=40, learning_rate=1e30,
                           save_interval=1), "10 updates in a row", "non-finite")
    assert int(runtime.checkpoints(tmp_path / "all")[0].name[11:]) < 40


def test_a_forkers_bug_keeps_its_traceback(text, tmp_path, monkeypatch):
    """A typo in the model must not read as a damaged checkpoint or a full disk, resumed or not."""
    train(text, tmp_path / "a", max_iters=1)
    monkeypatch.setattr(train_roberta.RobertaForMaskedLM, "forward", lambda self, **batch: typo)  # noqa: F821
    with pytest.raises(NameError):
        train(text, tmp_path / "b", max_iters=1)
    with pytest.raises(NameError):
        resume(tmp_path / "a", "--max_iters=3")


LONG = b"reason and duty " * 2000 + b"\nwill\n" * 3


@pytest.mark.parametrize("data, packing", [
    (b"Human reason.", False), (b"Human reason.", True), (LONG, False), (LONG, True),
    (b"reason\r\nduty and will\r\n\r\n\r\npure", False)])
def test_odd_texts_train(data, packing, tmp_path):
    """One line, fewer lines than a batch, lines longer than a block: each ends with a model."""
    (tmp_path / "text.txt").write_bytes(data)
    train(tmp_path / "text.txt", tmp_path / "run", max_iters=2, max_epochs=9, packing=packing,
          grad_clip=0)  # which does not clip
    assert all(map(math.isfinite, sum(log(tmp_path / "run", "loss", "grad_norm"), [])))
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("data, changes, code, words", [
    (b" \n\t\r\n", {}, 1, "blank"),
    ("Königsberg\n".encode("latin-1"), {}, 1, "is not UTF-8"),
    (None, {}, 1, "no such file"),
    (b"reason", {"tokenizer": "nowhere"}, 2, "--tokenizer nowhere is no folder"),
    (b"reason", {"vocab_size": 100}, 2, "--vocab_size must be 261 or more, not 100"),
    (b"reason", {"n_head": 3}, 2, "no multiple of --n_head 3"),
    (b"reason", {"source": "azwiki"}, 2, "--source azwiki is a data set of the hub"),
    (b"reason", {"mlm_probability": 0.0}, 2, "--mlm_probability"),
    (b"reason", {"block_size": 600}, 2, "--max_position_embeddings 602"),
    (b"reason", {"seed": 2**64}, 2, "--seed"), (b"reason", {"grad_clip": -1.0}, 2, "--grad_clip"),
    (b"reason", {"max_iters": 9}, 2, "--max_epochs 54"),
    (b"reason", {"resume": True}, 1, "holds no checkpoint"),
    (b"reason", {"fill_mask": "a <mask>"}, 1, "holds no run")])
def test_errors_are_one_line(data, changes, code, words, tmp_path, fails):
    """What is wrong, in one line, with the promised exit code."""
    if data is not None:
        (tmp_path / "text.txt").write_bytes(data)
    changes = {"source": str(tmp_path / "text.txt")} | changes
    fails(code, lambda: train(None, tmp_path / "run", **changes), words)


# ---- what is left behind


def test_out_dir_loads_with_plain_transformers(finished):
    """The folder must be RoBERTa to others: class, specials, length, <s>...</s>, mask."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    model = transformers.AutoModelForMaskedLM.from_pretrained(finished)
    assert type(model) is transformers.RobertaForMaskedLM
    assert model.config.architectures == ["RobertaForMaskedLM"]
    size = len(read_json(finished / "vocab.json"))
    assert model.config.vocab_size == len(tokenizer) == size
    assert tokenizer.model_max_length == 512 and (finished / "merges.txt").exists()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    ids = tokenizer("reason is <mask>.").input_ids
    assert ids[0] == 0 and ids[-1] == 2 and ids.count(4) == 1
    # <mask> takes its space along: the word it hides begins with one
    assert ids == tokenizer("reason is<mask>.").input_ids


def test_tokenizer_is_reused(finished, tmp_path):
    """--tokenizer takes the folder, its file, or the book's two files, and gives the same ids."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    expected = transformers.AutoTokenizer.from_pretrained(finished)("reason is <mask>.").input_ids
    for path in (finished, finished / "tokenizer.json", tmp_path):
        assert open_tokenizer(path)("reason is <mask>.").input_ids == expected
    with pytest.raises(UserError, match="is no folder, and no tokenizer.json"):
        open_tokenizer(tmp_path / "merges.txt")  # any file of a folder meant its tokenizer.json
    (tmp_path / "other.txt").write_text("entirely different words\n" * 9)
    train(tmp_path / "other.txt", tmp_path / "run", max_iters=1, tokenizer=str(tmp_path))
    assert (tmp_path / "run/vocab.json").read_bytes() == (finished / "vocab.json").read_bytes()
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert ours("reason is <mask>.").input_ids == expected


@pytest.mark.parametrize("gap, wraps", [(50, True), (0, False)])
def test_tokenizers_of_others(gap, wraps, text, tmp_path, fails):
    """Ids with gaps were beyond the embedding; a tokenizer that adds no <s> </s>, as training
    does, gave a model that others ask differently from what it learnt."""
    ids = {name: i for i, name in enumerate(["<s>", "</s>", "<pad>", "<unk>", "<mask>"])}
    ids |= {chr(97 + i): 5 + gap + i for i in range(26)}
    engine = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="<unk>"))
    if wraps:
        engine.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>").save_pretrained(tmp_path / "t")
    cfg = config(text, tmp_path / "run", max_iters=1, tokenizer=str(tmp_path / "t"))
    if wraps:
        train_roberta.main(cfg)
        assert read_json(tmp_path / "run/config.json")["vocab_size"] == 5 + gap + 26
    else:
        fails(1, lambda: train_roberta.main(cfg), "does not put <s> and </s> around a text")


def test_a_url_with_a_key_is_resumed(text, tmp_path, monkeypatch):
    """The key is saved nowhere, so the run goes on with the file that it downloaded."""
    monkeypatch.setattr(prepare, "fetch", lambda url, raw_dir: text)
    train("http://host/a.txt?key=1", tmp_path / "run", max_iters=1)
    assert read_json(tmp_path / "run/run.json")["source"] == str(text)
    monkeypatch.setattr(prepare, "fetch", None)
    resume(tmp_path / "run", "--max_iters=2")
    assert log(tmp_path / "run", "iter")[-1] == [2]


def test_fill_mask_only_fills(finished, capsys, fails):
    """It prints five candidates a mask, trains nothing and needs no text."""
    before = snapshot(finished)
    answers = train("nowhere.txt", finished, fill_mask="reason is <mask> and <mask>.")
    scores = [each["score"] for each in answers[0]]
    assert len(answers) == 2 and scores == sorted(scores, reverse=True) and len(scores) == 5
    out = capsys.readouterr().out
    assert out.startswith(f"asking {finished}\n") and out.count("\n") == 2 + 2 * 6
    empty = load(Config, ["--fill_mask=", f"--out_dir={finished}"])  # an unset shell variable
    fails(2, lambda: train_roberta.main(empty), "<mask>")
    fails(2, lambda: train("nowhere.txt", finished, fill_mask="reason is pure."), "<mask>")
    fails(2, lambda: train("nowhere.txt", finished, fill_mask="reason " * 600 + "<mask>"), "512")
    assert before == snapshot(finished)


@pytest.mark.slow
def test_training_learns(text, tmp_path):
    """The loss must fall well below that of a guess among all tokens."""
    train(text, tmp_path, max_iters=60, batch_size=32, max_epochs=20, learning_rate=3e-3)
    assert log(tmp_path, "val_loss")[-1][0] < log(tmp_path, "loss")[0][0] - 1.5
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_no_validation(text, tmp_path):
    """Without an evaluation the losses were never drawn."""
    train(text, tmp_path, max_iters=1, val_fraction=0.0)
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("name, millions", [("kantaibert", 83.5), ("kantaibert_small", 0.7)])
def test_configs(name, millions, tokenizer, monkeypatch):
    """The recipes load, and have the size that they state."""
    cfg = load(Config, [str(ROOT / f"config/{name}.py")])
    train_roberta.check(cfg)
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: {"": cfg.vocab_size - 1})
    with torch.device("meta"):
        model = train_roberta.make_model(cfg, tokenizer)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.05)
    assert cfg.out_dir == f"out/{name}"
