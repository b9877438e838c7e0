"""Trains on four replicas, in a process with four devices.

    python -m workers.four_replicas PATH

pickles the results of optimizers and options, with TensorFlow's collectives.
"""

import functools
import pickle
import sys
from pathlib import Path

import tensorflow as tf

from helpers import devices
from helpers.cases import LAST_OF_CLASS
from helpers.strategies import OPTIONS
from helpers.strategies import SOME_SCHEMES
from helpers.strategies import train_schemes
from helpers.strategies import train_with_option


def main(path):
    devices.set_up(4)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(4)])
    results = {}
    for case in LAST_OF_CLASS:
        make = functools.partial(case.make, jit_compile=True)
        results[case.id] = train_schemes(strategy, make, SOME_SCHEMES)
    for option in OPTIONS:
        results[option] = train_with_option(strategy, option)
    path.write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
