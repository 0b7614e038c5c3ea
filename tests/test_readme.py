"""README.md: its commands name files and options that exist, and the main one works."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import configurator

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
LINES = [part.split(" #")[0].strip() for line in BLOCKS.splitlines() for part in line.split("&&")]
TORCHRUN = "torch.distributed.run"
COMMANDS = sorted({line for line in LINES if re.search(r"\w+\.py", line)})


def test_there_are_commands():
    """Would catch a pattern above that no longer finds any."""
    assert len(COMMANDS) >= 10 and len(README.splitlines()) <= 250


@pytest.mark.parametrize("command", COMMANDS)
def test_options_and_files_exist(command, monkeypatch):
    """Would catch README commands with an option, a recipe or a script that is gone."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    for word in words[:script]:
        assert not word.endswith(".yaml") or Path(word).exists(), word
    assert Path(words[script]).exists()
    module, argv = import_module(Path(words[script]).stem), words[script + 1 :]
    if module.__name__ == "bench" and argv and argv[0] in module.WORK:
        argv = argv[1:]
    if module.__name__ != "model":
        configurator.load(module.Config, argv)


TINY_GPT = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=8 --batch_size=2 --eval_iters=1 "
TINY_GPT += "--max_epochs=0 --max_iters=2 --gradient_accumulation_steps=1 --sample_tokens=2"
TINY_BERT = "--n_layer=1 --n_head=1 --n_embd=16 --max_steps=1 --vocab_size=300 --block_size=32"
PAIRS = "--train_file=train.tsv --validation_file=dev.tsv --max_steps=1 --overwrite=True"
SHORT = {  # what a command gets besides, so that it ends in a second; no network
    "prepare.py": "--source=text.txt --vocab_size=300 --tokenizer=bpe",
    "train.py": TINY_GPT + " --overwrite=True",
    "sample.py": "--max_new_tokens=2",
    "report.py": "",
    "train_roberta.py": TINY_BERT + " --source=text.txt --overwrite=True",
    "finetune_mrpc.py": PAIRS + " --model=out/kantaibert_small",
}


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch):
    """Would catch a command of the README that ends in an error; in its order, in one folder, with
    a tiny model and text. Not run: pip, pytest, stress (a test of its own) and bench (hours)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "text.txt").write_text(Path(subprocess.__file__).read_text("utf-8"), "utf-8")
    rows = [f"He sold firm {i}.\tFirm {i} was sold.\t{i % 2}" for i in range(16)]
    for name in ("train.tsv", "dev.tsv"):
        Path(name).write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]), "utf-8")
    ran = []
    for line in LINES:
        words = shlex.split(line)
        script = next((word for word in words if word in SHORT), None)
        if not script or "pip" in words:
            continue
        if "--shard=0/2" in words:  # a vocabulary that is at hand
            Path("a.txt").write_text("one document", "utf-8")
            words += ["--source=[at]*.txt", "--tokenizer=data/mine/tokenizer.json"]
        else:
            words += SHORT[script].split()
        while words[0].startswith("OMP"):
            words.pop(0)
        before = {"python": [sys.executable], "torchrun": [sys.executable, "-m", TORCHRUN]}
        before["accelerate"] = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
        words = [*before[words[0]], *words[1:]]
        words[words.index(script)] = str(ROOT / script)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stdout[-500:], done.stderr[-1000:])
        ran.append(script)
    assert set(ran) == set(SHORT) and len(ran) >= 15


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_every_recipe_loads(recipe, monkeypatch):
    """Would catch a recipe with a name that its script lost; every recipe says what to expect."""
    monkeypatch.chdir(ROOT)
    script = {"kant": "train_roberta", "mrpc": "finetune_mrpc"}.get(recipe[:4], "train")
    configurator.load(import_module(script).Config, [f"config/{recipe}"])
    assert (ROOT / "config" / recipe).read_text("utf-8").startswith(("#", '"""'))


def test_prepare_train_sample(tmp_path):
    """Would catch a pipeline whose stages do not fit: real text, real command lines."""
    (tmp_path / "text.txt").write_text(Path(subprocess.__file__).read_text("utf-8"), "utf-8")
    tiny = "--n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --max_iters=40 --eval_interval=20"
    steps = [
        "prepare.py --dataset=mine --source=text.txt --vocab_size=512",
        f"train.py --dataset=mine {tiny} --eval_iters=2 --sample_tokens=8",
        'sample.py --start="def " --max_new_tokens=30',
    ]
    said = []
    for step in steps:
        script, *options = shlex.split(step)
        command = [sys.executable, str(ROOT / script), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    losses = [float(x) for x in re.findall(r"val loss ([\d.]+)", said[1])]
    assert losses[-1] < losses[0] - 1
    assert "def " in said[2] and "tokens/s" in said[2]
