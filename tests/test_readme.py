"""README.md: its commands name files and options that exist, and they work."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import configurator

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
LINES = [part.split(" #")[0].strip() for line in BLOCKS.splitlines() for part in line.split("&&")]
COMMANDS = sorted({line for line in LINES if re.search(r"\w+\.py", line)})


def test_the_pattern_finds_commands():
    """Would catch a pattern above that no longer finds any."""
    assert {"python prepare.py", "python train.py", "python sample.py"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_and_files_exist(command, monkeypatch):
    """Would catch README commands with an option, a recipe or a script that is gone."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert Path(words[script]).exists()
    if words[script].startswith("tests/"):
        return
    module = import_module(Path(words[script]).stem)
    argv = words[script + 1 :]
    if module.__name__ == "convert":  # its two leading words are a run and a folder
        argv = argv[2:]
    configurator.load(module.Config, argv)


TINY_GPT = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=8 --batch_size=2 --eval_iters=1 "
TINY_GPT += "--max_iters=2 --gradient_accumulation_steps=1 --sample_tokens=2 --warmup_iters=1"
TINY_BERT = "--n_layer=1 --n_head=1 --n_embd=16 --max_iters=1 --vocab_size=300 --block_size=32"
PAIRS = "--train_file=train.tsv --validation_file=dev.tsv --max_iters=1 --overwrite"
SHORT = {  # what a command gets besides, so that it ends in a second; no network
    "prepare.py": "--source=text.txt --vocab_size=300 --tokenizer=bpe",
    "train.py": TINY_GPT + " --overwrite",
    "sample.py": "--max_new_tokens=2",
    "report.py": "",
    "convert.py": "",
    "train_roberta.py": TINY_BERT + " --source=text.txt --overwrite",
    "finetune_mrpc.py": PAIRS + " --model=out/kantaibert_small",
}


def short_command(line):
    """The words of a README line made short, [] where it is not to be run."""
    words = shlex.split(line)
    script = next((word for word in words if word in SHORT), None)
    needs_hub = re.search(r"SmolLM2|Qwen/", line)
    if not script or "pip" in words or needs_hub:
        return []
    if "--shard=0/2" in words:  # a vocabulary that is at hand
        Path("a.txt").write_text("one document", "utf-8")
        words += ["--source=[at]*.txt", "--tokenizer=data/mine/tokenizer.json"]
    elif "--compare" not in line:  # that one compares what two runs left
        words = [word for word in words if not word.startswith("--minutes")]
        words[2:2] = ["--dataset=stdlib"] * (words == ["python", "prepare.py"])
        words += SHORT[script].split()
    while words[0].startswith("OMP"):
        words.pop(0)
    before = {"torchrun": [sys.executable, "-m", "torch.distributed.run"],
              "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"]}
    if words[0] in before:
        words[words.index(script)] = str(ROOT / script)
    return [*before.get(words[0], ["python"]), *words[1:]]


# a process that has paid for the imports and forks for each script
DRIVER = """
import json, subprocess, sys
sys.path[:0] = sys.argv[1:]
import finetune_mrpc, report, stress
for words in json.load(sys.stdin):
    if words[0] == "python":
        done = stress.run(words[1:], timeout=300)
        code, said = done.code, done.out + done.err
    else:
        done = subprocess.run(words, capture_output=True, text=True)
        code, said = done.returncode, done.stdout + done.stderr
    if code:
        sys.exit(f"{words}: exit code {code}: {said[-2000:]}")
"""


@pytest.mark.slow
@pytest.mark.network_loopback
def test_commands_run(tmp_path, monkeypatch):
    """Would catch a command of the README that ends in an error; in its order, in one folder, with
    a tiny model and text. Not run: pip, pytest, bench (hours) and what needs the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "text.txt").write_text(Path(subprocess.__file__).read_text("utf-8"), "utf-8")
    rows = [f"He sold firm {i}.\tFirm {i} was sold.\t{i % 2}" for i in range(17)]
    for name in ("train.tsv", "dev.tsv"):
        Path(name).write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]), "utf-8")
    commands = [words for words in map(short_command, LINES) if words]
    assert {word for words in commands for word in words} > set(SHORT)
    done = subprocess.run([sys.executable, "-c", DRIVER, str(ROOT), str(ROOT / "tests")],
                          input=json.dumps(commands), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_snippet_runs(tmp_path, monkeypatch):
    """Would catch a Python snippet that no longer fits the scripts."""
    monkeypatch.chdir(tmp_path)
    import prepare
    import train

    text = Path(subprocess.__file__).read_text("utf-8")
    Path("book.txt").write_text(text, "utf-8")
    prepare.main(prepare.Config("mine", ("book.txt",), "char"))
    tiny = dict(n_layer=1, n_head=1, n_embd=16, block_size=9, batch_size=3, eval_iters=1)
    main = train.main
    monkeypatch.setattr(train, "main", lambda cfg: main(replace(cfg, **tiny, max_iters=3)))
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1]
    names = {}
    exec(snippet, names)
    assert len(names["texts"]) == 1 and len(names["losses"]) >= 1


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_every_recipe_loads(recipe, monkeypatch):
    """Would catch a recipe with a name that its script lost, or that sets a default again."""
    monkeypatch.chdir(ROOT)
    script = {"kant": "train_roberta", "mrpc": "finetune_mrpc"}.get(recipe[:4], "train")
    config_class = import_module(script).Config
    cfg = configurator.load(config_class, [f"config/{recipe}"])
    assert (ROOT / "config" / recipe).read_text("utf-8").startswith(("#", '"""'))
    same = cfg.given - set(configurator.changed(cfg)) - {"dataset", "source", "out_dir"}
    assert not same, f"{recipe} sets defaults: {same}"


def test_prepare_train_sample(tmp_path):
    """Would catch a pipeline whose stages do not fit: real text, real command lines."""
    (tmp_path / "text.txt").write_text(Path(subprocess.__file__).read_text("utf-8"), "utf-8")
    tiny = "--n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --max_iters=40 --eval_interval=20"
    steps = [
        "prepare.py --dataset=mine --source=text.txt --vocab_size=512",
        f"train.py --dataset=mine {tiny} --eval_iters=2 --sample_tokens=8",
        'sample.py --start="def " --max_new_tokens=30',
    ]
    printed = []
    for step in steps:
        script, *options = shlex.split(step)
        command = [sys.executable, str(ROOT / script), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    losses = [float(x) for x in re.findall(r"val loss ([\d.]+),", printed[1])]
    assert losses[-1] < losses[0] - 1
    assert "def " in printed[2] and "tokens/s" in printed[2]
