"""This project beside what a user would pick instead, on the same work in one run.

    python -m bench train                        # a row, or several: train decode
    python -m bench loss --peer ../old --json loss.json
    python -m bench --help                       # all rows, and about how long each takes

To add a row, add a file: --help says its first line, and its run(cfg, folder) measures.
"""

import ast
import importlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from configurator import commit, load
from runtime import UserError, check_range, clock_text, print0, run_script

NO_ROWS = ("__init__", "__main__", "llama", "plain", "turns")


@dataclass
class Config:
    """python -m bench ROW [ROW ...] [options]; minutes are for 2 cores and the default rounds"""

    rounds: int | None = None  # turns of each side; None: 5, or 3 or 1 in a long row
    json: str | None = None  # write the figures there too
    text: str | None = None  # prepare, roberta, char, verdict, scale, loss: a file; None: a preset
    run: str = "out/stdlib"  # quantize: a run of train.py
    peer: str | None = None  # loss: the folder of another checkout of this project
    tiny: bool = False  # tiny models and texts, to see that a row runs: its figures mean nothing


def describe_rows():
    """{row: the first line of its file}, read without an import: --help answers at once."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    docs = {f.stem: ast.get_docstring(ast.parse(f.read_text(encoding="utf-8"))) for f in files}
    return {row: doc.splitlines()[0] for row, doc in docs.items() if row not in NO_ROWS}


def main(cfg, rows):
    """Measure `rows` and print their tables. Returns all figures, also written to cfg.json."""
    known = describe_rows()
    check_range(cfg, 1, "rounds")
    for row in rows or ["(none)"]:
        if row not in known:
            raise UserError(f"row {row} is none of {', '.join(known)}; python -m bench --help "
                            "says what they measure", 2)
    results = {"commit": commit(), "rows": {}}
    for row in rows:
        began = time.perf_counter()
        print0(f"\n{row}: {known[row]}\n")
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            results["rows"][row] = importlib.import_module(f"bench.{row}").run(cfg, Path(folder))
        print0(f"\n{row} took {clock_text(time.perf_counter() - began)}")
        if cfg.json:  # now: the next row may take an hour
            Path(cfg.json).write_text(json.dumps(results, indent=2), encoding="utf-8")
    return results


if __name__ == "__main__":
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # quiet sides
    argv = sys.argv[1:]
    rows = []
    while argv and not argv[0].startswith("-"):  # load() would take them for config files
        rows.append(argv.pop(0))
    Config.__doc__ += "".join(f"\n- {row}: {words}" for row, words in describe_rows().items())
    run_script(lambda cfg: main(cfg, rows), load(Config, argv))
