"""python -m bench: the taking of turns, the list of rows, peers that are not installed."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

from bench import turns
from bench.__main__ import describe_rows, main

CFG = SimpleNamespace(rounds=3, tiny=True, json=None)


def counting(file, name, amount):
    """A side that writes its name into a file at each turn."""
    print("this is no answer")  # a peer may print what it likes
    yield 0
    while True:
        with open(file, "a", encoding="utf-8") as f:
            f.write(name)
        yield amount, 2.0, {"loss": amount / 100}


def failing(file):
    """A side that cannot be set up."""
    raise FileNotFoundError(file)
    yield


@pytest.fixture(autouse=True)
def no_limits(monkeypatch):
    """Nothing here is about the speed of this machine."""
    monkeypatch.setattr(turns, "limits", lambda rounds, tiny: {})


def test_sides_take_turns(tmp_path, capsys):
    """Sides that run at the same time, or one after the other's last turn, measure each other and
    the machine's mood. The side's own seconds count; the ratio is ours over the peer's."""
    file = str(tmp_path / "turns")
    sides = [turns.Side("ours", counting, (file, "A", 300)),
             turns.Side("peer", counting, (file, "B", 100))]
    ours, peer = turns.compare(CFG, {"work (units/s)": sides})["table"]
    assert (tmp_path / "turns").read_text() == "ABABAB"
    assert ours["rates"] == [150.0] * 3 and peer["ratio"] == 3.0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1, "columns run together"
    assert "3.00 (3.00 to 3.00)" in table[-1] and "loss 1.000 +- 0.000" in table[-1]


def test_missing_peer_is_skipped_by_name(tmp_path, capsys):
    """A peer that is not installed ended the run in a traceback, after eight minutes."""
    file = str(tmp_path / "turns")
    sides = [turns.Side("ours", counting, (file, "A", 1)),
             turns.Side("no package", counting, (file, "B", 1), needs="not_a_package_of_anyone"),
             turns.Side("no Python", counting, (file, "C", 1), needs="json", python="/not/there")]
    result = turns.compare(CFG, {"work (units/s)": sides})
    assert (tmp_path / "turns").read_text() == "AAA"
    assert list(result["skipped"]) == ["no package", "no Python"]
    assert "not_a_package_of_anyone" in capsys.readouterr().out


def test_failing_side_is_named(tmp_path, fails):
    """A side that dies must not leave the others waiting for ever."""
    sides = [turns.Side("ours", counting, (str(tmp_path / "turns"), "A", 1)),
             turns.Side("broken peer", failing, ("x",))]
    fails(1, lambda: turns.take_turns(sides, 1), "broken peer")


def test_rows_are_named(fails):
    """--help did not say what can be measured; a typo was taken for a config file. Both must answer
    before anything slow is imported."""
    began = time.perf_counter()
    shown = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=ROOT, text=True,
                           capture_output=True, check=True).stdout
    seconds = time.perf_counter() - began
    rows = describe_rows()
    files = (ROOT / "bench").glob("*.py")
    assert set(rows) == {file.stem for file in files if "\ndef run(" in file.read_text()}
    assert all(f"{row}: {words}" in shown and "minute" in words for row, words in rows.items())
    assert seconds < 10
    fails(2, lambda: main(CFG, ["trian"]), "trian", "train", "--help")
    fails(2, lambda: main(CFG, []), "train", "--help")
