"""For layers with names of their own, or whose numbers are cleared there."""

import keras
import pytest


@pytest.fixture(autouse=True)
def fresh_keras():
    """Without `clear_session`, which takes longer than most of these tests."""
    keras.utils.set_random_seed(0)
