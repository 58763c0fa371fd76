"""The losses of short runs are those that are stored, of the code before the loss was its own."""

import json

import pytest
from loss_curves import RUNS, STORED, curve

QUICK = ("main job", "d1")
EXPECTED = json.loads(STORED.read_text())


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name not in QUICK)]
)
def test_the_loss_curve_is_the_stored_one(name, tmp_path):
    found, expected = curve(name, str(tmp_path)), EXPECTED[name]
    assert found["completions"] == expected["completions"], "another word was drawn: not a matter of rounding"
    # Losses are sums of terms of order 1 that may cancel: their rounding is that of the terms.
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6, abs=1e-6)
