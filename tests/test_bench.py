"""python -m bench: the taking of turns, the list of rows, peers that are not installed."""

import subprocess
import sys
import time

import pytest
from conftest import ROOT

from bench import turns
from bench.__main__ import Config, describe_rows, main
from bench.scripts import command

CFG = Config(rounds=3)


def counting(file, name, amount):
    """A side that writes its name into a file at each turn."""
    print("this is no answer")  # a peer may print what it likes
    yield 0
    while True:
        with open(file, "a", encoding="utf-8") as f:
            f.write(name)
        yield {"rate": amount, "loss": amount / 100}


def by_its_own_clock():
    """A side that takes 100 s to set up, then 0.05 s for 7 units, on a clock that it moves."""
    clock = [time.perf_counter()]
    time.perf_counter = lambda: clock[0]  # in the side's process
    clock[0] += 100
    while True:
        yield 7
        clock[0] += 0.05


def failing():
    """A side that cannot be set up."""
    raise FileNotFoundError("x")
    yield


@pytest.fixture(autouse=True)
def fixed_limits(monkeypatch):
    """Nothing here is about the speed of this machine."""
    monkeypatch.setattr(turns, "limits", lambda: {turns.COPY: 600.0})


def test_sides_take_turns(tmp_path, capsys):
    """Sides that run at the same time, or one after the other's last turn, measure each other and
    the machine's mood; a ratio or a share of the limit is upside down; columns run together."""
    file = tmp_path / "turns"
    sides = [turns.Side("ours", counting, (file, "A", 300), turns.COPY, 1e9),
             turns.Side("peer", counting, (file, "B", 100))]
    ours, peer = turns.compare(CFG, {"work (units/s)": sides})["table"]
    assert file.read_text() == "ABABAB"
    assert ours["rates"] == [300] * 3 and peer["ratio"] == 3.0 and ours["share"] == 0.5
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({len(line) for line in table}) == 1  # aligned
    assert "3.00 (3.00 to 3.00)" in table[-1] and "loss 1.000 +- 0.000" in table[-1]


def test_turns_are_timed():
    """The set-up's time is counted, or a turn's is not."""
    answers, _ = turns.take_turns([turns.Side(name, by_its_own_clock) for name in "ab"], 3)
    assert [answer["rate"] for answer in answers] == pytest.approx([140] * 3)


def test_figures_are_those_of_the_end(tmp_path):
    """The last line of a run names its best val loss, which stood beside the bits per byte of its
    end."""
    said = "train loss 2.5 | val loss 3.2 | 1.4 bits per byte of val; best val loss 3.1"
    turn = command(["-c", f"print({said!r})"], tmp_path)
    next(turn)
    figures = next(turn)
    assert (figures["train loss"], figures["val loss"], figures["bits per byte"]) == (2.5, 3.2, 1.4)


def test_missing_peer_is_skipped_by_name(tmp_path, capsys):
    """A peer that is not installed ended the run in a traceback, after eight minutes."""
    file = tmp_path / "turns"
    sides = [turns.Side("ours", counting, (file, "A", 1)),
             turns.Side("no package", counting, (file, "B", 1), needs="not_a_package_of_anyone")]
    result = turns.compare(CFG, {"work (units/s)": sides})
    assert file.read_text() == "AAA" and list(result["skipped"]) == ["no package"]
    assert "not_a_package_of_anyone" in capsys.readouterr().out


def test_failing_side_is_named(tmp_path, fails):
    """A side that dies must not leave the others waiting for ever."""
    sides = [turns.Side("ours", by_its_own_clock), turns.Side("broken peer", failing)]
    fails(1, lambda: turns.take_turns(sides, 1), "broken peer")


def test_rows_are_named(fails):
    """--help did not say what can be measured; a typo was taken for a config file. Both must answer
    before anything slow is imported."""
    shown = subprocess.run([sys.executable, "-X", "importtime", "-m", "bench", "--help"], cwd=ROOT,
                           text=True, capture_output=True, check=True)
    rows = describe_rows()
    assert {"train", "decode", "prepare", "start", "char", "quantize", "mrpc", "roberta", "loss",
            "minutes"} == set(rows)
    assert all(f"{row}: {words}" in shown.stdout and "minute" in words
               for row, words in rows.items())
    assert "tyro" in shown.stderr and "torch" not in shown.stderr
    fails(2, lambda: main(CFG, ["trian"]), "trian", "train", "--help")
    fails(2, lambda: main(CFG, []), "train", "--help")
