"""tests/stress.py in its short form."""

import pytest
import stress


@pytest.mark.slow
def test_the_short_form_loses_nothing(capsys):
    """Would catch a checkpoint that is not whole, a resume that differs, a pickle that runs."""
    stress.main(is_long=False)
    said = capsys.readouterr().out
    assert said.count("| nothing |") == 2 - ("not tried" in said)
