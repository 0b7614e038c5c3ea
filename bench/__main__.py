"""This project beside what a user would pick instead, on the same work in one run.

    python -m bench train                        # a row, or several: train decode
    python -m bench loss --peer ../old --json loss.json
    python -m bench --help                       # all rows, and about how long each takes

To add a row, add a file: --help shows its first line, and its run(cfg, folder) measures.
"""

import ast
import importlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from configurator import commit, load
from runtime import UserError, check_range, print0, run_script


@dataclass
class Config:
    """python -m bench ROW [ROW ...] [options]; minutes are for 2 cores and the default rounds"""

    rounds: int | None = None  # turns of each side; None: 5, or 3 or 1 in a long row
    json: str | None = None  # write the figures there too
    text: str | None = None  # prepare, roberta, char, loss, minutes: a file; None: the library's
    out_dir: str = "out/stdlib"  # quantize: a run of train.py
    peer: str | None = None  # loss: the folder of another checkout of this project
    RETIRED: ClassVar = {"run": "--out_dir"}


def describe_rows():
    """{row: the first line of its file}, read without an import: --help answers at once."""
    texts = {f.stem: f.read_text(encoding="utf-8") for f in Path(__file__).parent.glob("*.py")}
    return {row: ast.get_docstring(ast.parse(text)).splitlines()[0]
            for row, text in sorted(texts.items()) if "\ndef run(" in text}


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
        print0(f"\n{row}: {known[row]}\n")
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            results["rows"][row] = importlib.import_module(f"bench.{row}").run(cfg, Path(folder))
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
