"""tests/stress.py in its short form."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("section", ["options", "texts", "pickles"])
def test_the_short_form_finds_nothing(run, section):
    """Would catch a traceback for a user's mistake, a file lost to a mistyped option, a pickle that
    runs. The other sections (files, URLs, scenarios, faults) take minutes: `--long`."""
    done = run("tests/stress.py", section, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout
