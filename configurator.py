"""A Config dataclass + config files + the command line -> one checked Config.

    python train.py config/verdict.py --max_iters 10 --compile

Leading words are config files: Python, run in order, whose public names must be fields of Config
(but for modules and functions).
Options come last; what is said last wins. `--help` prints the comments that stand beside the
fields. A Config may name `RETIRED` options {old: new} and `ALTERNATIVES`, groups of fields that
set one thing (max_iters, max_epochs): one said later unsets the others of a config file.
"""

import contextlib
import dataclasses
import io
import os
import runpy
import subprocess
import sys
import traceback
import types
import typing

import tyro

# At a barrier a thread spins for some 100 microseconds, then sleeps. Threads that only spin starve
# each other once another process is busy on the same cores; waking those that sleep at once costs
# up to half of the speed: measured in docs/LOG.md.
OPENMP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}


def usage_error(message):
    """End the program with one line and exit code 2, as a command line parser does."""
    several = "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ
    if os.environ.get("RANK", "0") == "0" or not several:
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def read_config_file(path):
    """Run one config file and return what it sets, as command line options."""
    if not os.path.isfile(path):
        usage_error(f"config file {path!r} is not there; options start with --, as --seed=1 does")
    options = []
    try:
        for name, value in runpy.run_path(path).items():
            if name.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
                continue
            several = isinstance(value, list | tuple)
            options += [f"--{name}", *map(str, value)] if several else [f"--{name}={value}"]
    except (Exception, SystemExit) as error:  # it is the user's program: anything can happen in it
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = f", line {frames[-1]}" if frames else ""  # a SyntaxError's text names its line
        usage_error(f"config file {path}{line}: {type(error).__name__}: {error}")
    return options


def parse(config_class, options, default, place):
    """`default` with `options` applied. Returns (Config, the names that were given)."""
    spelled, names = [], []
    retired = getattr(config_class, "RETIRED", {})
    hints = typing.get_type_hints(config_class)
    for option, following in zip(options, [*options[1:], "--"], strict=False):
        spelled.append(option)
        if not option.startswith("--"):
            continue
        name = option[2:].partition("=")[0].replace("-", "_")
        names.append(name)
        if name in retired:
            usage_error(f"{place}--{name} is now {retired[name]}")
        switch = hints.get(name) in (bool, bool | None)
        if switch and "=" not in option and following.startswith("--"):
            spelled.append("True")  # --resume is short for --resume=True
    for group in getattr(config_class, "ALTERNATIVES", ()):
        if set(group) & set(names):
            default = dataclasses.replace(default, **{n: getattr(config_class, n) for n in group})
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            cfg = tyro.cli(config_class, args=spelled, default=default, use_underscores=True,
                           config=(tyro.conf.FlagConversionOff,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│ ") for line in printed.getvalue().splitlines()[1:]]  # 0: headline
        usage_error(place + " ".join(line for line in lines if line.strip("─-╰╯")))  # drawn box
    return cfg, names


def tune_threads():
    """Set OPENMP, where the user has not. It is read when torch loads."""
    for name, value in OPENMP.items():
        os.environ.setdefault(name, value)


def load(config_class, argv=None, files=True):
    """Return config_class with config files and options applied; wrong input exits with code 2.

    files: whether leading words are config files. The result's attribute `given` is the set of
    names that were said anywhere.
    """
    tune_threads()
    argv = list(sys.argv[1:] if argv is None else argv)
    cfg, given = config_class(), set()
    while files and argv and not argv[0].startswith("-"):
        path = argv.pop(0)
        cfg, names = parse(config_class, read_config_file(path), cfg, f"config file {path}: ")
        given |= set(names)
    cfg, names = parse(config_class, argv, cfg, "")
    cfg.given = given | set(names)
    return cfg


def commit():
    """The commit of this checkout, '' where it is none."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always"]
    with contextlib.suppress(OSError):  # no git
        return subprocess.run([*command, "--dirty"], capture_output=True, text=True,
                              check=False).stdout.strip()
    return ""


def changed(cfg):
    """The fields of `cfg` that differ from their defaults, as a dict."""
    return {f.name: v for f in dataclasses.fields(cfg) if (v := getattr(cfg, f.name)) != f.default}
