"""What a step costs under `MirroredStrategy`, beside Keras's Adam.

    python -m benchmarks.strategies

Applies gradients to the weights of a multilayer perceptron on two replicas,
which are logical devices of one processor, and measures nothing but that.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import keras_blockwise as kb

OPTIMIZERS = {
    "Keras Adam": keras.optimizers.Adam,
    "BlockAdam": kb.BlockAdam,
    "BAGM": kb.BAGM,
}


def make_step(strategy: Any, cls: Any, depth: int, width: int) -> Any:
    """A function that applies one gradient to the weights of all replicas."""
    with strategy.scope():
        model = keras.Sequential([keras.Input((width,))])
        for _ in range(depth):
            model.add(keras.layers.Dense(4 * width))
            model.add(keras.layers.Dense(width))
        optimizer = cls(1e-3)
        optimizer.build(model.trainable_variables)
    gradients = [tf.random.normal(w.shape) for w in model.trainable_variables]

    @tf.function(autograph=False)
    def step() -> None:
        strategy.run(lambda: optimizer.apply(gradients))

    return step


def measure(steps: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median seconds of each step; one after the other, in every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:  # Traces, compiles and warms up before.
                times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    seconds = measure(
        {
            name: make_step(strategy, cls, args.depth, args.width)
            for name, cls in OPTIMIZERS.items()
        },
        args.rounds,
    )
    table = Table(title=f"{4 * args.depth} variables on two replicas")
    table.add_column("Optimizer")
    table.add_column("Median ms per step", justify="right")
    table.add_column("Time of Keras Adam / time", justify="right")
    for name, value in seconds.items():
        ratio = seconds["Keras Adam"] / value
        table.add_row(name, f"{1000 * value:.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
