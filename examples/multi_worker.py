"""Trains on several machines with `MultiWorkerMirroredStrategy`.

    python examples/multi_worker.py --local 2

starts two workers on this machine, which talk over its loopback. On machines
of your own, run on each, with its own index:

    export TF_CONFIG='{"cluster": {"worker": ["host0:12345", "host1:12345"]},
                       "task": {"type": "worker", "index": 0}}'
    python examples/multi_worker.py
"""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
from digits_dataset import load
from distributed import make_parser
from distributed import train


class FitStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """A `MultiWorkerMirroredStrategy` under which Keras 3 can `fit`.

    Keras reduces more than TensorFlow can: a whole batch, of which it only
    needs shapes and dtypes, and scalars along an axis that they do not have.
    """

    def reduce(self, reduce_op: Any, value: Any, axis: Any = None) -> Any:
        if tf.nest.is_nested(value):
            return tf.nest.map_structure(self.first_local, value)
        scalar = self.first_local(value).shape.rank == 0
        return super().reduce(reduce_op, value, None if scalar else axis)

    def first_local(self, value: Any) -> Any:
        return self.experimental_local_results(value)[0]


def run_workers(count: int) -> int:
    """Runs this program once for each of some workers on this machine."""
    with ExitStack() as stack:  # Holds the ports until all are known.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("localhost", 0))
        hosts = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    workers = []
    for index in range(count):
        task = {"type": "worker", "index": index}
        config = {"cluster": {"worker": hosts}, "task": task}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        command = [sys.executable, *sys.argv]
        workers.append(subprocess.Popen(command, env=environment))
    # A worker waits for the others for ever: if one fails, end them all.
    codes = [worker.poll() for worker in workers]
    while None in codes and not any(codes):
        time.sleep(0.1)
        codes = [worker.poll() for worker in workers]
    for worker in workers:
        worker.terminate()
        worker.wait()
    return 1 if any(codes) else 0


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--local", type=int, metavar="N", help="run N workers on this machine"
    )
    args = parser.parse_args()
    if "TF_CONFIG" in os.environ:
        strategy = FitStrategy()
        is_first = strategy.cluster_resolver.task_id == 0
        train(strategy, args, verbose=int(is_first))
    elif args.local:
        load(args.dataset)  # Once, so that the workers need not all prepare it.
        sys.exit(run_workers(args.local))
    else:
        parser.error("set TF_CONFIG (see the top of this file), or --local 2")


if __name__ == "__main__":
    main()
