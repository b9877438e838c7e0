"""Files for TensorBoard, by the package `tensorboard`, on every backend."""

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_blockwise.plots import QUANTILES


class EventFile:
    """A file of events in a folder.

    Args:
        log_dir: The folder, which need not exist.
    """

    def __init__(self, log_dir: Any) -> None:
        if not isinstance(log_dir, str | os.PathLike):
            raise TypeError(
                "`log_dir` must be the path of a folder, or `None`. Received: "
                f"log_dir={log_dir!r}."
            )
        try:
            from tensorboard.summary.writer import event_file_writer
        except ImportError as error:
            raise ImportError(
                "`log_dir` needs the package tensorboard, which is not "
                f"installed. Received: log_dir={log_dir!r}. Do `python -m pip "
                "install tensorboard`, or leave it out: `history` has the "
                "same numbers."
            ) from error
        self._writer = event_file_writer.EventFileWriter(os.fspath(log_dir))

    def add(
        self,
        step: int,
        name: str,
        entries: Mapping[str, Any],
        step_sizes: np.ndarray,
    ) -> None:
        """Adds what is known of a variable after a step.

        Args:
            step: The number of the step.
            name: The name of the variable.
            entries: Those of the history.
            step_sizes: Those of the blocks.
        """
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        scalars = dict(entries)
        for q, value in zip(QUANTILES, scalars.pop("step_size")):
            scalars[f"step_size_{100 * q:.0f}"] = value
        summaries = [
            scalar_pb(f"{kind}/{name}", value)
            for kind, value in scalars.items()
        ]
        positive = step_sizes[(step_sizes > 0) & np.isfinite(step_sizes)]
        if positive.size:
            logarithms = np.log10(positive)
            summaries.append(
                histogram_pb(f"log10_step_size/{name}", logarithms)
            )
        for summary in summaries:
            self._writer.add_event(
                event_pb2.Event(
                    step=step, wall_time=time.time(), summary=summary
                )
            )

    def flush(self) -> None:
        self._writer.flush()
