"""configurator.py: what is typed or written is taken as declared, or refused in one line."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
from dataclasses import dataclass
from typing import Literal

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
    mode: Literal["auto", "no"] = "auto"  # one of two


def declared(script):
    """The Config of a script, without its slow imports: what stands above the first guard."""
    head = (ROOT / f"{script}.py").read_text("utf-8").split('if __name__ == "__main__":')[0]
    module = type(sys)(script)
    sys.modules[script + "_head"] = module
    module.__name__, module.__file__ = script + "_head", str(ROOT / f"{script}.py")
    exec(compile(head, f"{script}.py", "exec"), module.__dict__)
    return module.Config


CONFIGS = {"every kind": Config} | {name: declared(name) for name in SCRIPTS}
FIELDS = [(config, f.name) for config in CONFIGS.values() for f in dataclasses.fields(config)]


@pytest.fixture
def config_file(tmp_path):
    """config_file(text) -> the path of a config file that holds it."""

    def write(text, name="c.py"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


# ---------------------------------------------------------------------------------------------
# the command line


def test_nothing_typed_is_the_defaults():
    """The dataclass is the only place where a default stands."""
    for config in CONFIGS.values():
        assert configurator.load(config, []) == config()


@pytest.mark.parametrize("argv, name, value", [
    (["--whole", "3"], "whole", 3),
    (["--whole=-3"], "whole", -3),
    (["--whole", "-3"], "whole", -3),
    (["--share=1e-4"], "share", 1e-4),
    (["--share", "-1e-4"], "share", -1e-4),
    (["--share=2"], "share", 2.0),
    (["--flag=True"], "flag", True),
    (["--flag", "False"], "flag", False),
    (["--name="], "name", ""),
    (["--name", ""], "name", ""),
    (["--name=-x"], "name", "-x"),
    (["--name=a b\nc"], "name", "a b\nc"),
    (["--path=None"], "path", None),
    (["--path=none"], "path", "none"),
    (["--count", "7"], "count", 7),
    (["--mode=no"], "mode", "no"),
    (["--whole=1", "--whole=2"], "whole", 2),
])  # fmt: skip
def test_values_typed(argv, name, value):
    """Every way to write an option, with the declared type: 2 for a float is 2.0."""
    found = getattr(configurator.load(Config, argv), name)
    assert found == value and type(found) is type(value)


def test_dashes_and_underscores():
    """--batch-size and --batch_size are the same option."""

    @dataclass
    class Long:
        batch_size: int = 1  # rows

    for option in ("--batch_size", "--batch-size"):
        assert configurator.load(Long, [option, "5"]).batch_size == 5


@pytest.mark.parametrize("argv, words", [
    (["--whole=1.5"], ["--whole", "'1.5'"]),
    (["--whole=1e3"], ["--whole", "'1e3'"]),
    (["--share=much"], ["--share", "'much'"]),
    (["--flag"], ["--flag"]),
    (["--flag=yes"], ["--flag", "'yes'", "True", "False"]),
    (["--no-flag"], ["--no-flag"]),
    (["--mode=fast"], ["--mode", "'fast'", "auto"]),
    (["--count=few"], ["--count", "'few'"]),
    (["--whole"], ["--whole"]),
    (["--wole=3"], ["--wole", "Perhaps you meant", "--whole"]),
    (["--name", "a", "b"], ["b"]),
    (["-x"], ["-x"]),
    (["whole=3"], ["'whole=3'", "--seed=1"]),
    ([""], ["''"]),
    (["no/such.py"], ["no/such.py", "not there"]),
    (["."], ["'.'"]),
])  # fmt: skip
def test_wrong_options(fails, argv, words):
    """One line that names the option and the value, whatever tyro draws around it."""
    fails(2, lambda: configurator.load(Config, argv), *words)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_message_on_any_terminal(encoding):
    """tyro draws its box with other signs where the output is not UTF-8: an empty message."""
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, str(ROOT / "prepare.py"), "--val_fraction=muç"]
    result = subprocess.run(command, env=env, capture_output=True)
    assert result.returncode == 2
    one_line(result.stderr.decode(encoding), "--val_fraction", "'mu", "share of the characters")


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), typed=st.text() | st.integers().map(str) | st.floats().map(
    str) | st.sampled_from(["True", "None", "│", "─" * 90, "-", "--", "1e400", "٣", "1_0", "'"]),
    separate=st.booleans())  # fmt: skip
@example((Config, "whole"), "9" * 5000, False)
@example((Config, "whole"), "\x00\r\n\u2028x", True)
@example((Config, "share"), "\ud800", False)
def test_anything_typed(capsys, field, typed, separate):
    """Any text for any option of any script gives a value of the declared type, or one line and
    exit code 2; never a traceback, never a second line."""
    config, name = field
    argv = [f"--{name}", typed] if separate else [f"--{name}={typed}"]
    capsys.readouterr()
    try:
        value = getattr(configurator.load(config, argv), name)
        typeguard.check_type(value, typing.get_type_hints(config)[name])
        assert capsys.readouterr() == ("", "")
    except SystemExit as stop:
        out, err = capsys.readouterr()
        assert stop.code == 2 and not out
        assert err.count("\n") == 1 and err.startswith("error: ") and len(err) > 20


def test_help(capsys):
    """The comments beside the fields are the help."""
    with pytest.raises(SystemExit) as stop:
        configurator.load(Config, ["--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    for word in ("One field of each kind.", "--share FLOAT", "a fraction (default: 0.5)"):
        assert word in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once(script):
    """The slow imports come after the command line is read: counted in modules, not seconds."""
    code = f"""import sys, runpy
sys.argv = ["{script}.py", "--help"]
try: runpy.run_path("{script}.py", run_name="__main__")
except SystemExit: pass
print([m for m in ("torch", "transformers", "datasets", "tokenizers") if m in sys.modules])"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr
    assert "--seed" in result.stdout or script == "prepare"


# ---------------------------------------------------------------------------------------------
# config files


def test_files_in_order_then_options(config_file):
    """The last word wins: a later file over an earlier one, an option over both."""
    files = [config_file("whole = 2\nshare = 0.2"), config_file("whole = 3\nname = 'b'", "d.py")]
    cfg = configurator.load(Config, [*files, "--name=c"])
    assert (cfg.whole, cfg.share, cfg.name) == (3, 0.2, "c")


def test_file_computes(config_file):
    """Imports, functions and names with _ are free; an int for a float becomes one."""
    text = """
import math, os.path
from math import pi, floor as down
_steps = [2, 3]
for _i in _steps:
    pass
def double(x):
    return 2 * x
whole = double(down(pi)) * _steps[1]
share = 1
path = None
count = 4
mode = "no"
flag = True
"""
    cfg = configurator.load(Config, [config_file(text)])
    assert cfg == Config(18, 1.0, True, "x", None, 4, "no") and type(cfg.share) is float


def test_file_builds_on_another(config_file, monkeypatch, tmp_path):
    """`from base import *` brings another recipe's values, and its mistakes."""
    monkeypatch.syspath_prepend(tmp_path)
    config_file("whole = 5\nshare = 0.1", "base_recipe.py")
    cfg = configurator.load(Config, [config_file("from base_recipe import *\nshare = 0.2")])
    assert (cfg.whole, cfg.share) == (5, 0.2)


@pytest.mark.parametrize("text, words", [
    ("wohle = 3", ["wohle", "nearest valid name is whole"]),
    ("qqqq = 3", ["qqqq", "whole, share"]),
    ("for i in range(3): pass", ["unknown name i"]),
    ("whole = 1.5", ["whole must be int", "1.5", "float"]),
    ("whole = 1.0", ["whole must be int", "1.0"]),
    ("whole = True", ["whole must be int", "True", "bool"]),
    ("count = False", ["count must be int | None", "False"]),
    ("share = '0.1'", ["share must be float", "'0.1'", "str"]),
    ("share = True", ["share must be float", "True"]),
    ("share = 10**400", ["share must be float"]),
    ("flag = 1", ["flag must be bool", "1 (int)"]),
    ("name = None", ["name must be str", "None"]),
    ("name = str", ["name must be str", "type"]),
    ("def name(): pass", ["name must be str", "function"]),
    ("mode = 'fast'", ["mode must be", "auto", "'fast'"]),
    ("import os as name", ["name must be str", "module"]),
    ("whole = ", ["SyntaxError"]),
    ("whole = 1 / 0", ["ZeroDivisionError"]),
    ("raise SystemExit('stop here')", ["SystemExit", "stop here"]),
    ("import nowhere_at_all", ["nowhere_at_all"]),
    ("x" + " = (" * 500, ["Error"]),
    (b"name = '\xff'", ["SyntaxError"]),
    (b"whole = 1\x00", ["null byte"]),
])  # fmt: skip
def test_wrong_config_file(fails, config_file, text, words):
    """Each kind of mistake names the file, the name and the type, and ends with code 2."""
    path = config_file(text)
    fails(2, lambda: configurator.load(Config, [path]), path, *words)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([f.name for f in dataclasses.fields(Config)]), value=st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(),
    st.lists(st.integers()), st.sampled_from(["auto", 10**400, 1j])))  # fmt: skip
def test_anything_assigned(capsys, config_file, name, value):
    """Any value in a config file is of the declared type or refused in one line."""
    path = config_file(f"inf, nan = float('inf'), float('nan')\ndel inf, nan\n{name} = "
                       + repr(value).replace("inf", "float('inf')").replace(
                           "nan", "float('nan')") if isinstance(value, float)
                       else f"{name} = {value!r}")  # fmt: skip
    capsys.readouterr()
    try:
        found = getattr(configurator.load(Config, [path]), name)
        typeguard.check_type(found, typing.get_type_hints(Config)[name])
        assert isinstance(found, bool) == (name == "flag")
        assert type(found) is float or name != "share"
    except SystemExit as stop:
        assert stop.code == 2
        one_line(capsys.readouterr().err, path, name)


def test_shipped_config_files_load():
    """A recipe with a name that its script does not know would fail on the user's machine."""
    mine = {"kantaibert": "train_roberta", "mrpc": "finetune_mrpc"}
    paths = sorted((ROOT / "config").glob("*.py"))
    assert paths
    for path in paths:
        script = next((s for key, s in mine.items() if path.stem.startswith(key)), "train")
        configurator.load(CONFIGS[script], [str(path)])


# ---------------------------------------------------------------------------------------------
# helpers


def test_fail_is_one_line_from_the_first_process(capsys, monkeypatch):
    """Eight processes that fail alike would say it eight times."""
    for rank, expected in (("0", "error: a b c\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            configurator.fail("a\nb\r\n  c", 3)
        assert stop.value.code == 3 and capsys.readouterr().err == expected


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_at_least(fails, value):
    """nan passes every comparison that is written the wrong way round."""
    cfg = Config(share=value)
    fails(2, lambda: configurator.at_least(cfg, 1, "whole", "share"), "--share must be 1 or more")
    configurator.at_least(Config(share=1), 1, "whole", "share")


def test_changed():
    """The start line shows what differs from the defaults, as JSON can say it."""
    assert configurator.changed(Config()) == {}
    cfg = Config(whole=2, path="p")
    assert json.loads(json.dumps(configurator.changed(cfg))) == {"whole": 2, "path": "p"}
