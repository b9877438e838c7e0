"""Trains on a TPU with `TPUStrategy`.

    python examples/tpu.py --tpu NAME

NAME is that of the TPU, or "local" on a machine that has one. Without a TPU,

    pip install 'jax[tpu]'
    python examples/tpu.py --dry-run

compiles the training step with the compiler of a TPU v5e and shows the memory
it needs.
"""

import argparse
import os
import sys
from importlib.util import find_spec

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
from digits_dataset import load
from distributed import make_compiled_model
from distributed import make_parser
from distributed import train
from rich.console import Console
from rich.table import Table


def fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


def connect(name: str) -> tf.distribute.TPUStrategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (OSError, RuntimeError, ValueError, tf.errors.OpError) as error:
        fail(
            f"No TPU {name!r} was found ({type(error).__name__}). Check the "
            "name, or compile without a TPU: python examples/tpu.py --dry-run"
        )
    return tf.distribute.TPUStrategy(resolver)


def dry_run(args: argparse.Namespace) -> None:
    """Compiles the training step of one core, beside that of Adam."""
    if not find_spec("jax") or not find_spec("libtpu"):
        fail("--dry-run needs the compiler: pip install 'jax[tpu]'")
    from tpu_compile import compile_for_tpu
    from tpu_compile import training_step

    _, info = load(args.dataset)
    images = tf.zeros((args.batch_size, *info.features["image"].shape))
    labels = tf.zeros((args.batch_size,), tf.int64)
    table = Table(title="Training step on one core of a TPU v5e, in bytes")
    table.add_column("Optimizer")
    for column in ("Arguments", "Updated in place", "Temporary", "Code"):
        table.add_column(column, justify="right")
    for name in dict.fromkeys([args.optimizer, "Adam"]):
        model = make_compiled_model(name, info.features)
        step = training_step(model)
        _, memory = compile_for_tpu(step, (images, labels))
        sizes = (
            memory.argument_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
        )
        table.add_row(name, *(f"{size:,}" for size in sizes))
    Console().print(table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tpu", metavar="NAME", help='its name, or "local"')
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        dry_run(args)
    elif args.tpu:
        train(connect(args.tpu), args)
    else:
        parser.error("no TPU was given: --tpu NAME, or --dry-run without one")


if __name__ == "__main__":
    main()
