"""tests/stress.py in its short form."""

import pytest


@pytest.mark.slow
def test_the_short_form_finds_nothing(run):
    """Would catch a traceback for a user's mistake, a checkpoint that is not whole, a resume that
    differs, a file lost to a mistyped option, a pickle that runs."""
    done = run("tests/stress.py", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout and "faults: tried" in done.stdout
