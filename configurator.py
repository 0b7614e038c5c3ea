"""A Config dataclass + config files + the command line -> one checked Config.

    python train.py config/verdict.py --max_iters 10 --compile=True

Leading words are config files: Python, run in order, whose public names must be fields of Config.
Options come last and win. `--help` prints the comments that stand beside the fields.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import runpy
import sys
import types
import typing

import typeguard
import tyro


def fail(message, code=1):
    """End the program with one line. code: 2 for a wrong command line or config, 1 for the rest."""
    if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks for all
        print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(code)


def at_least(cfg, minimum, *names):
    """Fail unless each named field of `cfg` is a number of at least `minimum`."""
    for name in names:
        if not minimum <= getattr(cfg, name) < float("inf"):  # nan and inf fail too
            fail(f"--{name} must be {minimum} or more, not {getattr(cfg, name)}", 2)


def read_config_file(path, config_class):
    """Run one config file and return its public names as a dict, each checked by name and type."""
    try:
        names = runpy.run_path(path)
    except OSError as error:
        fail(f"config file {path} cannot be read: {error.strerror or error}", 2)
    except Exception as error:  # it is the user's program: anything can happen in it
        fail(f"config file {path}: {type(error).__name__}: {error}", 2)
    declared, values = typing.get_type_hints(config_class), {}
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1) or [", ".join(declared)]
            fail(f"{path}: unknown name {name}; the nearest valid name is {near[0]}", 2)
        try:
            typeguard.check_type(value, declared[name])
            if isinstance(value, bool) and declared[name] in (int, float):
                raise typeguard.TypeCheckError("is a bool")
        except typeguard.TypeCheckError:
            want = getattr(declared[name], "__name__", None) or str(declared[name])
            want = str(declared[name]) if typing.get_origin(declared[name]) else want
            fail(f"{path}: {name} must be {want}, not {value!r} ({type(value).__name__})", 2)
        values[name] = float(value) if declared[name] is float else value
    return values


def load(config_class, argv=None):
    """Return config_class with config files and options applied; wrong input exits with code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    values = {}
    while argv and not argv[0].startswith("-"):
        values |= read_config_file(argv.pop(0), config_class)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            default, flags = config_class(**values), (tyro.conf.FlagConversionOff,)
            return tyro.cli(config_class, args=argv, default=default, config=flags)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        box = [line.strip("│ ") for line in said.getvalue().splitlines() if line[:1] == "│"]
        fail(" ".join(line for line in box if line.strip("─")), 2)  # tyro says it in a box


def changed(cfg):
    """The fields of `cfg` that differ from their defaults, as a dict."""
    return {f.name: v for f in dataclasses.fields(cfg) if (v := getattr(cfg, f.name)) != f.default}
