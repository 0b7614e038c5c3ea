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
