"""What the examples with a strategy of `tf.distribute` have in common.

`train` is the same for every strategy: the variables are created under its
scope, and `fit` does the rest.
"""

import argparse
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from digits import OPTIMIZERS
from digits import make_model
from digits_dataset import Digits
from digits_dataset import load
from rich.console import Console
from rich.table import Table

SHARD_BY_IMAGE = tf.data.Options()
SHARD_BY_IMAGE.experimental_distribute.auto_shard_policy = (
    tf.data.experimental.AutoShardPolicy.DATA
)


def make_parser(docstring: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=docstring.partition("\n")[0])
    parser.add_argument("--dataset", default=Digits.name)
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS.keys(), default="BlockAdam"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images of each replica"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tiny", action="store_true", help="train for three steps only"
    )
    return parser


def make_compiled_model(name: str, features: Any) -> keras.Model:
    """The model of `digits.py`, with one of its optimizers."""
    cls, rate, arguments = OPTIMIZERS[name]
    model = make_model(features)
    model.compile(
        optimizer=cls(rate, **arguments),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(strategy: Any, args: argparse.Namespace, verbose: int = 1) -> None:
    """Trains a model on all replicas of a strategy and prints a table."""
    keras.utils.set_random_seed(args.seed)
    replicas = strategy.num_replicas_in_sync
    batch_size = args.batch_size * replicas
    splits, info = load(args.dataset)
    images, test_images = (s.with_options(SHARD_BY_IMAGE) for s in splits)
    if args.tiny:
        args.epochs = 1
        images, test_images = images.take(3 * batch_size), test_images.take(50)
    # The loss of a replica is a mean, so all need the same number of images.
    batches = images.cache().shuffle(10_000, seed=args.seed)
    batches = batches.batch(batch_size, drop_remainder=True).prefetch(2)

    with strategy.scope():
        model = make_compiled_model(args.optimizer, info.features)
    times: list[float] = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: times.append(time.perf_counter())
    )
    model.fit(
        batches,
        epochs=args.epochs,
        shuffle=False,  # The batches are shuffled already.
        callbacks=[clock],
        verbose=verbose,
    )
    # All workers take part, and one of them tells the result.
    loss, accuracy = model.evaluate(test_images.batch(batch_size), verbose=0)
    if verbose:
        table = Table(title=info.full_name, show_header=False)
        for row in [
            ("Strategy", type(strategy).__name__),
            ("Replicas", f"{replicas}"),
            ("Images per step", f"{batch_size}"),
            ("Optimizer", args.optimizer),
            ("Epochs", f"{args.epochs}"),
            ("Test loss", f"{loss:.3f}"),
            ("Test accuracy", f"{accuracy:.1%}"),
            ("Median ms per step", f"{1000 * np.median(np.diff(times)):.1f}"),
        ]:
            table.add_row(*row)
        Console().print(table)
