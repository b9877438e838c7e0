"""Trains on all GPUs of this machine with `MirroredStrategy`.

    python examples/multi_gpu.py
    python examples/multi_gpu.py --dataset mnist --batch-size 128
    python examples/multi_gpu.py --replicas 2

With `--replicas`, or where there is no GPU, the processor stands in for that
many of them. It is not faster than one: it shows that the same lines train
several replicas to the same weights.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
from distributed import make_parser
from distributed import train


def make_strategy(replicas: int | None) -> tf.distribute.Strategy:
    """A replica on each GPU, or as many as told on the processor."""
    if replicas is None and tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    replicas = replicas or 2
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * replicas,
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--replicas", type=int, help="replicas on the processor"
    )
    args = parser.parse_args()
    if args.replicas is not None and args.replicas < 1:
        parser.error(f"--replicas must be at least 1, not {args.replicas}")
    strategy = make_strategy(args.replicas)
    train(strategy, args)


if __name__ == "__main__":
    main()
