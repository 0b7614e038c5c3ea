"""configurator.py: what is typed or written is taken as declared, or refused in one line."""

import dataclasses
import json
import subprocess
import sys
import typing
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import typeguard
from conftest import ROOT, one_line
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import configurator

SCRIPTS = ["prepare", "train", "sample", "train_roberta", "finetune_mrpc"]


@dataclass
class Config:
    """One field of each kind."""

    whole: int = 1  # a number
    share: float = 0.5  # a fraction
    flag: bool = False  # a switch
    name: str = "x"  # a word
    path: str | None = None  # perhaps a word
    count: int | None = None  # perhaps a number
    passes: float | None = None  # count in another unit
    mode: Literal["auto", "no"] = "auto"  # one of two
    words: tuple[str, ...] = ()  # several
    batch_size: int = 3  # two words
    RETIRED: ClassVar = {"lr": "--share"}
    ALTERNATIVES: ClassVar = (("count", "passes"),)


def declared(script):
    """The Config of a script, without its slow imports: what stands above the first guard."""
    head = (ROOT / f"{script}.py").read_text("utf-8").split('if __name__ == "__main__":')[0]
    module = type(sys)(script + "_head")
    sys.modules[module.__name__] = module
    module.__file__ = str(ROOT / f"{script}.py")
    exec(compile(head, f"{script}.py", "exec"), module.__dict__)
    return module.Config


CONFIGS = {"every kind": Config} | {name: declared(name) for name in SCRIPTS}
FIELDS = [(config, f.name) for config in CONFIGS.values() for f in dataclasses.fields(config)]


def load(*argv):
    return configurator.load(Config, argv)


@pytest.fixture
def refused(capsys):
    """refused(argv, *words): loading it ends with code 2 and one line that holds all of `words`."""

    def refused(argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            load(*argv)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and not out
        one_line(err, *words)

    return refused


@pytest.fixture
def config_file(tmp_path):
    """config_file(text) -> the path of a config file that holds it."""

    def write(text, name="c.py"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


# ---------------------------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize("argv, name, value", [
    ("--whole 3", "whole", 3), ("--whole -3", "whole", -3), ("--whole=1 --whole=2", "whole", 2),
    ("--share -1e-4", "share", -1e-4), ("--share=2", "share", 2.0), ("--name=", "name", ""),
    ("--name=-x", "name", "-x"), ("--path=None", "path", None), ("--path=none", "path", "none"),
    ("--count 7", "count", 7), ("--mode=no", "mode", "no"), ("--batch-size=5", "batch_size", 5),
    ("--words a b", "words", ("a", "b")), ("--flag", "flag", True), ("--flag=True", "flag", True),
    ("--flag True", "flag", True), ("--flag --whole=3", "flag", True),
    ("--flag --flag=False", "flag", False), ("--flag False --whole=3", "flag", False)])
def test_values_typed(argv, name, value):
    """Would catch 2 for a float that stays an int, and --resume that needs =True."""
    found = getattr(load(*argv.split()), name)
    assert found == value and type(found) is type(value)
    assert load("--name", "", "--path=a b\nc") == Config(name="", path="a b\nc")


@pytest.mark.parametrize("argv, words", [
    ("--whole=1.5", ["--whole", "'1.5'"]), ("--whole=1e3", ["--whole", "'1e3'"]),
    ("--share=much", ["--share", "'much'"]), ("--flag=yes", ["--flag", "'yes'", "True", "False"]),
    ("--no-flag", ["--no-flag"]), ("--mode=fast", ["--mode", "'fast'", "auto"]),
    ("--whole", ["--whole"]), ("--wole=3", ["--wole", "Perhaps you meant", "--whole"]),
    ("--name a b", ["b"]), ("-x", ["-x"]), ("whole=3", ["'whole=3'", "--seed=1"]),
    ("no/such.py", ["no/such.py", "not there"]), ("--lr=1", ["--lr is now --share"])])
def test_wrong_options(refused, argv, words):
    """Would catch a typo that passes, and what tyro draws around its message."""
    refused(argv.split(), *words)


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), separate=st.booleans(), typed=st.text()
       | st.integers().map(str) | st.floats().map(str)
       | st.sampled_from(["True", "None", "│", "─" * 90, "-", "--", "1e400", "٣", "1_0", "'"]))
@example((Config, "whole"), False, "9" * 5000)
@example((Config, "whole"), True, "\x00\r\n\u2028x")
@example((Config, "share"), False, "\ud800")
def test_anything_typed(capsys, field, separate, typed):
    """Would catch any text for any option of any script that ends in a traceback, a second line or
    a value of another type than declared."""
    config, name = field
    capsys.readouterr()
    try:
        argv = [f"--{name}", typed] if separate else [f"--{name}={typed}"]
        value = getattr(configurator.load(config, argv), name)
        typeguard.check_type(value, typing.get_type_hints(config)[name])
        assert capsys.readouterr() == ("", "")
    except SystemExit as stop:
        out, err = capsys.readouterr()
        assert stop.code == 2 and not out
        assert err.count("\n") == 1 and err.startswith("error: ") and len(err) > 20


def test_message_on_any_terminal(run):
    """tyro draws its box with other signs where the output is not UTF-8: once an empty message."""
    env = {"PYTHONIOENCODING": "cp1252"}
    result = run("prepare.py", "--val_fraction=muç", env=env, encoding="cp1252")
    assert result.returncode == 2
    one_line(result.stderr, "--val_fraction", "'mu")


@pytest.mark.parametrize("rank, world, expected", [("0", "8", 1), ("1", "8", 0), ("1", None, 1)])
def test_eight_processes_say_it_once(capsys, monkeypatch, rank, world, expected):
    """Would catch the same line from each process of a run, or nothing from one that is alone."""
    monkeypatch.setenv("RANK", rank)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(SystemExit):
        load("--wole=1")
    assert capsys.readouterr().err.count("error") == expected


def test_last_said_wins_and_given_knows_it(config_file):
    """README's own example once trained 90 iterations with --max_iters=10: the file's max_epochs
    won. `given` decides what a resumed run takes from the command, so a default said counts."""
    recipe = config_file("passes = 2.5\nwhole = 1\n_free = 3")
    cfg = load(recipe, "--count=7")
    assert (cfg.count, cfg.passes) == (7, None)
    assert cfg.given == {"passes", "whole", "count"}
    again = load(config_file("count = 3", "d.py"), recipe)
    assert (again.count, again.passes) == (None, 2.5)
    both = load(config_file("count = None\npasses = 1.5", "e.py"))  # a base recipe's, undone
    assert (both.count, both.passes) == (None, 1.5)


def test_help(capsys):
    """Would catch a help without the comments beside the fields."""
    with pytest.raises(SystemExit) as stop:
        load("--flag", "--help")
    out = capsys.readouterr().out
    assert not stop.value.code
    assert "One field of each kind." in out and "a fraction (default: 0.5)" in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once(script):
    """Would catch a slow import above the command line: counted in modules, not in seconds."""
    code = f"""import sys, runpy
sys.argv = ["{script}.py", "--help"]
try: runpy.run_path("{script}.py", run_name="__main__")
except SystemExit: pass
print([m for m in ("torch", "transformers", "datasets", "tokenizers") if m in sys.modules])"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr
    assert "--" in result.stdout


# ---------------------------------------------------------------------------------------------
# config files


def test_file_computes(config_file, monkeypatch, tmp_path):
    """Would catch a file whose imports, functions, lists or base recipe are no settings any more,
    an int for a float that stays one, and an option that loses to a file."""
    monkeypatch.syspath_prepend(tmp_path)
    config_file("whole = 5\nshare = 1\nname = 'base'", "base_recipe.py")
    text = """
import math
from base_recipe import *
_steps = [2, 3]
def double(x):
    return 2 * x
whole = double(math.floor(math.pi)) * _steps[1]
path = None
count = 4
mode = "no"
flag = True
words = ["a", "b"]
"""
    cfg = load(config_file(text), "--name=c", "--count=9")
    assert cfg == Config(18, 1.0, True, "c", None, 9, None, "no", ("a", "b"))
    assert type(cfg.share) is float


@pytest.mark.parametrize("text, words", [
    ("wole = 3", ["wole", "--whole"]), ("for i in range(3): pass", ["--i"]),
    ("whole = 1.0", ["whole", "1.0"]), ("whole = True", ["whole", "True"]),
    ("count = False", ["count", "False"]), ("share = True", ["share", "True"]),
    ("flag = 1", ["flag", "'1'"]), ("mode = 'fast'", ["mode", "auto", "'fast'"]),
    ("lr = 3", ["--lr is now --share"]), ("\nwhole = ", ["line 2", "SyntaxError"]),
    ("a = 0\n\ndef f():\n    1 / 0\nf()", ["line 4", "ZeroDivisionError"]),
    ("import json\n\njson.loads('\\n\\n\\n{')", ["line 3", "JSONDecodeError"]),
    ("raise SystemExit('stop here')", ["line 1", "SystemExit", "stop here"]),
    ("\n\nimport nowhere_at_all", ["line 3", "nowhere_at_all"]), ("x" + " = (" * 500, ["Error"]),
    (b"name = '\xff'", ["SyntaxError"]), (b"whole = 1\x00", ["null byte"])])
def test_wrong_config_file(refused, config_file, text, words):
    """Would catch a mistake that passes, a traceback, and an error without file and line."""
    path = config_file(text)
    refused([path], f"config file {path}", *words)


def test_shipped_config_files_load():
    """Would catch a recipe with a name that its script does not know."""
    mine = {"kantaibert": "train_roberta", "mrpc": "finetune_mrpc"}
    paths = sorted((ROOT / "config").glob("*.py"))
    assert paths
    for path in paths:
        script = next((s for key, s in mine.items() if path.stem.startswith(key)), "train")
        configurator.load(CONFIGS[script], [str(path)])


def test_changed_is_what_differs():
    """Would catch a start line that lists every default, or that JSON cannot say."""
    assert configurator.changed(load()) == {} and load() == Config()
    cfg = Config(whole=2, path="p")
    assert json.loads(json.dumps(configurator.changed(cfg))) == {"whole": 2, "path": "p"}
