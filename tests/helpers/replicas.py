"""Steps on the replicas of a `tf.distribute` strategy, and on one device."""

import numpy as np
import tensorflow as tf

from helpers.arrays import assert_near
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import SHAPES
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.training import graph
from helpers.training import train


def two_replicas():
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"],
        # The collectives of several strategies in one process clash.
        tf.distribute.ReductionToOneDevice(),
    )


def local_values(strategy, variable):
    """The numbers of a Keras variable on each replica."""
    return to_numpy(strategy.experimental_local_results(variable.value))


def replica_gradients(strategy, steps=3, shapes=SHAPES):
    """Other gradients for each replica: those of each step, and their sums."""
    number = strategy.num_replicas_in_sync
    replicas = [make_gradients(steps, shapes, seed) for seed in range(number)]
    sums = [
        [np.add.reduce(gs) for gs in zip(*given)] for given in zip(*replicas)
    ]
    return list(zip(*replicas)), sums


def distribute(strategy, replicas):
    """One value per replica from a list of tensors per replica."""
    return [
        strategy.experimental_distribute_values_from_function(
            lambda context, i=i: replicas[context.replica_id_in_sync_group][i]
        )
        for i in range(len(replicas[0]))
    ]


def train_replicas(
    strategy,
    make,
    steps,
    function=True,
    shapes=SHAPES,
    gradients_of=tensors,
):
    """Weights and state after training on all replicas, which are equal.

    Args:
        strategy: Where.
        make: Makes the optimizer.
        steps: What each replica receives in each step.
        function: Whether a step is a `tf.function`.
        shapes: Those of the variables.
        gradients_of: What each replica makes of it.
    """
    with strategy.scope():
        variables = make_variables(shapes)
        optimizer = make()
        optimizer.build(variables)

    def step(*given):
        strategy.run(lambda *given: optimizer.apply(gradients_of(given)), given)

    if function:
        step = tf.function(step, autograph=False)
    for replicas in steps:
        replicas = [
            [tf.convert_to_tensor(x) for x in given] for given in replicas
        ]
        step(*distribute(strategy, replicas))
    results = []
    for variable in [*variables, *optimizer.variables]:
        values = local_values(strategy, variable)
        assert len(values) == strategy.num_replicas_in_sync
        assert_same(values, values[:1] * len(values))
        results.append(values[0])
    return results


def check_replicas(strategy, make, shapes=SHAPES, **kwargs):
    """Against one device, on the sums and without XLA."""
    replicas, sums = replica_gradients(strategy, shapes=shapes)
    actual = train_replicas(strategy, make, replicas, shapes=shapes, **kwargs)
    assert_near(actual, train_plain(make, sums, shapes), 1e-6)


def train_plain(make, gradients, shapes=SHAPES):
    """Weights and state after training on one device, without XLA."""
    optimizer = make()
    optimizer.jit_compile = False
    return train(optimizer, make_variables(shapes), gradients, graph)
