"""The strategy of the tests that have replicas."""

import tensorflow as tf


def two_replicas() -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"],
        # The collectives of several strategies in one process clash.
        tf.distribute.ReductionToOneDevice(),
    )
