"""Trains as one of the workers of a `MultiWorkerMirroredStrategy`.

    python -m workers.multi_worker PATH

pickles the results of some optimizers, of `fit`, and the error of Keras's own.
`TF_CONFIG` says which worker it is, and `PYTHONPATH` has the examples.
"""

import functools
import pickle
import sys
from pathlib import Path

import tensorflow as tf
from multi_worker import FitStrategy

from helpers.cases import FEW
from helpers.strategies import SOME_SCHEMES
from helpers.strategies import fit_on
from helpers.strategies import train_schemes


def main(path):
    strategy = FitStrategy()  # Only the examples know how to `fit` under it.
    results = {}
    for case in FEW:
        # XLA does its work for every optimizer in `test_strategies.py`.
        make = functools.partial(case.make, jit_compile=case in FEW[:2])
        results[case.id] = train_schemes(strategy, make, SOME_SCHEMES)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    fitted = fit_on(strategy, options)
    del FitStrategy.reduce
    error = ""
    try:
        fit_on(strategy, options)
    except ValueError as e:
        error = str(e)
    path.write_bytes(pickle.dumps((results, fitted, error)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
