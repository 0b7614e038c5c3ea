"""sample.py: through its command line, on a run that train.py just made."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, one_line

import prepare
import sample
import train
from model import GPT

TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, max_iters=5)
TINY |= dict(warmup_iters=2, eval_iters=2, save_interval=2, mixed_precision="no")
TINY |= dict(sample_tokens=0, sample_start="ç")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with out/tiny: a character model whose text has two- and four-byte characters."""
    root = tmp_path_factory.mktemp("sample")
    words = "Every effort moves you ə ğ ı ö ş ç 🙂 çay kitab süd".split()
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (1200,), generator=draw).tolist()
    (root / "text.txt").write_text(" ".join(words[i] for i in picks), encoding="utf-8")
    source, data = str(root / "text.txt"), str(root / "data")
    prepare.main(prepare.Config("tiny", source=source, tokenizer="char", data_dir=data))
    train.main(train.Config("tiny", data_dir=data, out_dir=str(root / "out" / "tiny"), **TINY))
    return root


@pytest.fixture(scope="module")
def run_dir(root):
    return root / "out" / "tiny"


@pytest.fixture
def go(run_dir, capsys):
    """go(**options) -> (texts, what was printed), in this process."""

    def go(**options):
        options = {"out_dir": str(run_dir)} | options
        texts = sample.main(sample.Config(**options))
        return texts, capsys.readouterr().out

    return go


def test_command_line(root, run):
    """The newest run without --out_dir, a prompt from a file, tokens/s at the end."""
    (root / "prompt.txt").write_text("\ufeffEvery effort ə🙂", encoding="utf-8")
    options = ["--start", "FILE:prompt.txt", "--max_new_tokens=30", "--stop_at_eos=False"]
    done = run("sample.py", *options, cwd=root, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    first, *text, last = done.stdout.splitlines()
    assert first == f"sampling from {Path('out', 'tiny', 'checkpoint-000005')}"
    assert "\n".join(text).startswith("Every effort ə🙂")
    assert re.fullmatch(r"30 tokens in \d+\.\d s, \d+\.\d tokens/s", last)
    again = run("sample.py", *options, cwd=root)
    assert again.stdout.splitlines()[1:-1] == text  # the same seed


def test_wrong_calls_are_one_line(root, run_dir, run, fails, tmp_path):
    """Each names the option or the folder; nothing of PyTorch's comes through."""

    def wrong(code, *words, **options):
        options = {"out_dir": str(run_dir)} | options
        fails(code, lambda: sample.main(sample.Config(**options)), *words)

    for name, value in dict(
        num_samples=0, max_new_tokens=0, num_beams=0, temperature=-1.0, top_k=0, top_p=0.0,
        seed=-1,
    ).items():  # fmt: skip
        wrong(2, f"--{name}", str(value), **{name: value})
    wrong(2, "--top_p", "1.5", top_p=1.5)
    wrong(2, "--temperature", temperature=float("nan"))
    wrong(2, "--num_beams", num_beams=2, num_samples=2)
    wrong(1, "--checkpoint worst", "best", checkpoint="worst")
    wrong(1, "no checkpoint", "nowhere", out_dir=str(tmp_path / "nowhere"))
    wrong(1, "no such", start="FILE:no such")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    wrong(1, "latin.txt", start=f"FILE:{tmp_path / 'latin.txt'}")
    wrong(2, "--init_from", "gpt3", init_from="gpt3")
    broken = tmp_path / "run" / "checkpoint-000001"
    broken.mkdir(parents=True)
    wrong(1, "checkpoint-000001", out_dir=str(tmp_path / "run"))
    for options in (["--top_p=high"], ["--startt=x"], []):
        done = run("sample.py", *options)
        one_line(done.stderr)
        assert done.returncode == (2 if options else 1)
    one_line(done.stderr, "no run under out/", "python train.py")


def test_prompts(go):
    """The run's own, empty, longer than block_size, with a character the vocabulary lacks."""
    (text,), said = go(max_new_tokens=12)
    assert text.startswith("ç") and text in said
    (text,), said = go(start="", max_new_tokens=12)
    assert "<|endoftext|>" not in said and text in said
    long = "Every effort moves you " * 4
    (text,), _ = go(start=long, max_new_tokens=5)
    assert text.startswith(long) and len(text) <= len(long) + 5
    for unknown in ("wörld", "日本"):
        assert "warning: the model's vocabulary" in go(start=unknown, max_new_tokens=2)[1]
    assert "warning" not in go(start="Every ə", max_new_tokens=2)[1]


def test_samples_of_one_batch(go):
    """All rows are printed, each cut at its own end; they differ."""
    texts, said = go(start="E", num_samples=5, max_new_tokens=20, temperature=1.5)
    assert len({*texts}) == 5 and all(t.startswith("E") for t in texts)
    for i, text in enumerate(texts):
        assert f"--- sample {i + 1}\n{text}\n" in said
    assert "100 tokens in" in said


def test_seed(go):
    """The same seed gives the same text, another gives another; greedy needs none."""

    def text(**options):
        return go(start="E", max_new_tokens=40, **options)[0]

    assert text() == text() == text(kv_cache=False) != text(seed=2)
    assert text(temperature=0) == text(temperature=0, seed=2) == text(top_k=1)


def test_beams(go, run_dir):
    """The log-probability shown is the model's own for the text shown."""
    (text,), said = go(start="Every", num_beams=4, max_new_tokens=8, stop_at_eos=False)
    shown = float(re.search(r"log-probability (-[\d.]+), 4 beams", said)[1])
    model = GPT.from_checkpoint(run_dir / "checkpoint-000005")
    ids = torch.tensor([prepare.load_tokenizer(run_dir / "best").encode(text)])
    logp = model(ids[:, :-1])[0].log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert ids.size(1) == 13 and abs(logp[0, 4:].sum() - shown) < 1e-3
    (greedy,), _ = go(start="Every", temperature=0, max_new_tokens=8, stop_at_eos=False)
    ids = torch.tensor([prepare.load_tokenizer(run_dir / "best").encode(greedy)])
    logp = model(ids[:, :-1])[0].log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert shown >= logp[0, 4:].sum() - 1e-3


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_packed_weights(go, kind):
    """Rounded weights change a text little: greedy, this model says the same."""
    texts, said = go(start="Every", temperature=0, max_new_tokens=9, quantize=kind)
    assert texts == go(start="Every", temperature=0, max_new_tokens=9)[0] and texts[0] in said


def test_checkpoints(go, run_dir):
    """newest, best, or one by name."""
    names = {p.name for p in run_dir.glob("*/")}
    assert names == {"checkpoint-000004", "checkpoint-000005", "best"}
    assert "checkpoint-000005" in go(max_new_tokens=1)[1].splitlines()[0]
    for name in names:
        assert name in go(max_new_tokens=1, checkpoint=name)[1].splitlines()[0]


def test_the_newest_run_is_the_one_trained_last(root, run_dir, go, monkeypatch, tmp_path):
    """By its checkpoints' time, not by name; folders without a checkpoint do not count."""
    for i, name in enumerate(("zebra", "ant", "mule")):
        folder = tmp_path / "out" / name / "checkpoint-000001"
        folder.mkdir(parents=True)
        for file in (run_dir / "best").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        os.utime(folder, (1e9 + [1, 3, 2][i],) * 2)
    (tmp_path / "out" / "empty").mkdir()
    (tmp_path / "out" / "mrpc" / "checkpoint-000009").mkdir(parents=True)  # another script's
    monkeypatch.chdir(tmp_path)
    assert str(Path("out", "ant")) in go(out_dir=None, max_new_tokens=1)[1].splitlines()[0]


def endings(monkeypatch, ids):
    """Make every model produce `ids`, one after another, in all rows."""

    left = iter(ids)

    def next_logits(self, idx, cache=None):
        logits = torch.full((len(idx), self.config.vocab_size), -50.0)
        logits[:, next(left)] = 50.0
        return logits

    monkeypatch.setattr(GPT, "next_logits", next_logits)


def test_the_end_of_text(go, run_dir, monkeypatch):
    """It ends the text, is not shown, and is shown where it must not end it."""
    e = prepare.load_tokenizer(run_dir / "best").encode("E")[0]
    eot = json.loads((run_dir / "best" / "meta.json").read_text("utf-8"))["eot_id"]
    for options in (dict(), dict(num_samples=2), dict(num_beams=2)):
        endings(monkeypatch, [e, e, eot, e, e])
        texts, said = go(start="you", max_new_tokens=5, **options)
        assert {*texts} == {"youEE"} and "youEE\n" in said and "<|endoftext|>" not in said
        assert f"{3 * len(texts)} tokens in" in said
    endings(monkeypatch, [e, e, eot, e, e])
    assert go(start="you", max_new_tokens=5, stop_at_eos=False)[0] == ["youEE<|endoftext|>EE"]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A tiny random GPT-2 of transformers with a byte-level tokenizer beside it."""
    from test_model import byte_tokenizer

    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    hf = transformers.GPT2LMHeadModel(config).eval()
    hf.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def test_init_from_a_transformers_folder(gpt2_folder, run):
    """Greedy text equals transformers' own; ids past the tokenizer's are no crash."""
    done = run("sample.py", f"--init_from={gpt2_folder}", "--start=Every", "--temperature=0",
               "--max_new_tokens=8", "--stop_at_eos=False")  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokenizer = prepare.Tokenizer("t", prepare.open_tokenizer_file(gpt2_folder))
    hf = transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder)
    ids = torch.tensor([tokenizer.encode("Every")])
    ids = hf.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0]
    assert tokenizer.decode(i for i in ids if i < 257) in done.stdout


def test_streaming_shows_whole_characters(gpt2_folder, go, monkeypatch):
    """Bytes of a character come one token at a time: no replacement mark may flash by."""
    tokenizer = prepare.Tokenizer("t", prepare.open_tokenizer_file(gpt2_folder))
    wanted, shown = "ə🙂a", []
    endings(monkeypatch, [*tokenizer.encode(wanted), tokenizer.encode("ə")[0], 0])
    monkeypatch.setattr("builtins.print", lambda *words, end="\n", **_: shown.append(words[0]))
    (text,), _ = go(start="é", init_from=str(gpt2_folder), max_new_tokens=20)
    assert text == "é" + wanted + "\ufffd"  # a broken character at the very end is said so
    assert [part for part in shown if part][:-1] == ["é", "ə", "🙂", "a", "\ufffd"]


def test_an_exported_run_samples_the_same(go, run_dir, tmp_path):
    """train.py's own folders go through export, and come back with the same text."""
    from model import export

    export(run_dir, tmp_path / "out")
    texts, _ = go(start="Every", max_new_tokens=30)
    assert go(start="Every", max_new_tokens=30, init_from=str(tmp_path / "out"))[0] == texts
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    greedy = go(start="Every", max_new_tokens=11, temperature=0)[0][0]
    assert pipe("Every", do_sample=False)[0]["generated_text"] == greedy


# ---------------------------------------------------------------------------------------------
# chat


class Terminal:
    """sample.py --chat=True on a pseudo-terminal."""

    def __init__(self, cwd, *options):
        import fcntl
        import pty
        import termios

        self.master, slave = pty.openpty()
        command = [sys.executable, str(ROOT / "sample.py"), "--chat=True", *options]
        env = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def until(self, text, seconds=60):
        """Read until `text` appears; return what was seen since the last call."""
        end = time.monotonic() + seconds
        while text.encode() not in self.seen:
            left = end - time.monotonic()
            ready = left > 0 and select.select([self.master], [], [], left)[0]
            assert ready, f"{text!r} not in {self.seen.decode(errors='replace')!r}"
            self.seen += os.read(self.master, 4096)
        seen, _, self.seen = self.seen.partition(text.encode())
        return seen.decode(errors="replace")

    def type(self, keys):
        os.write(self.master, keys.encode())


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
def test_chat(root):
    """Ctrl-C stops the text and not the program, the prompt comes back, Ctrl-D ends with 0."""
    terminal = Terminal(root, "--max_new_tokens=100000", "--stop_at_eos=False", "--kv_cache=False")
    try:
        terminal.until("> ")
        terminal.type("Every ə\n")
        terminal.until("\n")  # the echo
        terminal.until("Every ə")  # the text has begun
        terminal.type("\x03")
        assert "tokens/s" not in terminal.until("\n> ")
        time.sleep(0.5)  # readline listens to signals a moment after it shows its prompt
        terminal.type("\x03")  # at the prompt: a new prompt
        terminal.until("\n> ")
        terminal.type("\x1b[A\n")  # arrow up: the line from before
        assert "Every ə" in terminal.until("\n")
        terminal.until("Every ə")
        terminal.type("\x03")
        terminal.until("\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


def test_chat_without_a_terminal(root, run):
    """Lines from a pipe, an empty one too; its end is the end. --start is the first of them."""
    options = ["--chat=True", "--start=you", "--max_new_tokens=5"]
    done = run("sample.py", *options, cwd=root, input="Every\n\n")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("tokens/s") == 3 and "Every" in done.stdout
    assert done.stdout.index("you") < done.stdout.index("Every")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupted_without_chat(root):
    """Ctrl-C during one text ends the program as the shell expects it, without a traceback."""
    command = [sys.executable, str(ROOT / "sample.py"), "--max_new_tokens=1000000"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        p.stdout.readline()  # sampling from ...
        p.stdout.read(20)
        p.send_signal(signal.SIGINT)
        p.stdout.read()
        assert p.wait(20) == 130 and b"Traceback" not in p.stderr.read()
