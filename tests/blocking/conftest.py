"""For tests whose layers have names of their own, or count from 0 themselves."""

import keras
import pytest


@pytest.fixture(autouse=True)
def fresh_keras():
    """Without `clear_session`, which takes longer than most of these tests."""
    keras.utils.set_random_seed(0)
