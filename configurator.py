"""A Config dataclass + config files + the command line -> one checked Config.

    python train.py config/verdict.py --max_iters 10 --compile=True

Leading words are config files: Python, run in order, whose public names must be fields of Config.
Options come last and win. `--help` prints the comments that stand beside the fields.
"""

import ast
import contextlib
import dataclasses
import difflib
import io
import os
import runpy
import sys
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
    if not os.path.isfile(path):
        fail(f"config file {path!r} is not there; options start with --, as --seed=1 does", 2)
    try:
        names = runpy.run_path(path)
        with open(path, "rb") as f:
            nodes = ast.walk(ast.parse(f.read()))
    except (Exception, SystemExit) as error:  # it is the user's program: anything can happen in it
        fail(f"config file {path}: {type(error).__name__}: {error}", 2)
    imports = [n.names for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    free = {name.asname or name.name.partition(".")[0] for some in imports for name in some}
    declared, values = typing.get_type_hints(config_class), {}
    for name, value in names.items():
        if name not in declared and (name.startswith("_") or name in free or callable(value)):
            continue
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1) or [", ".join(declared)]
            fail(f"{path}: unknown name {name}; the nearest valid name is {near[0]}", 2)
        want = declared[name]
        try:
            typeguard.check_type(value, want)
            if isinstance(value, bool) and bool not in (want, *typing.get_args(want)):
                raise typeguard.TypeCheckError("a bool is no number here")
            values[name] = float(value) if want is float else value
        except (typeguard.TypeCheckError, OverflowError):
            want = want if typing.get_origin(want) else want.__name__
            fail(f"{path}: {name} must be {want}, not {value!r} ({type(value).__name__})", 2)
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
            return tyro.cli(
                config_class, args=argv, default=default, config=flags, use_underscores=True
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]  # 0: a headline
        fail(" ".join(line for line in lines if line.strip("─-╰╯")), 2)  # tyro draws a box


def changed(cfg):
    """The fields of `cfg` that differ from their defaults, as a dict."""
    return {f.name: v for f in dataclasses.fields(cfg) if (v := getattr(cfg, f.name)) != f.default}
