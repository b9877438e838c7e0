"""What `BlockMonitor` costs a step of `model.fit` at its default.

    python -m benchmarks.monitor

Every model trains with a monitor that looks at every tenth batch. The cost of a
look is the median time of these batches less that of all others, and its share
of a step at the default is a hundredth of it, over the time of a step. The
first look, which traces a function, is a column of its own.
"""

import statistics
from typing import Any

import numpy as np
from keras import losses

import keras_blockwise as kb
from benchmarks import fit
from benchmarks import report
from benchmarks import timing

EVERY = 10
DEFAULT = kb.BlockMonitor().every


def times_of(name: str, blocking: str, looks: int) -> dict[str, list[float]]:
    """Seconds of batches with a look, of the first of these, and of others."""
    model = fit.MODELS[name]()
    x, y = fit.data_for(model, EVERY * (looks + 1))
    model.compile(
        kb.BlockAdam(1e-3, blocking=kb.Blocking.from_model(model, blocking)),
        losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    clock = fit.Clock()
    callbacks = [kb.BlockMonitor(every=EVERY), clock]
    model.fit(x, y, fit.BATCH, verbose=0, callbacks=callbacks)
    seconds = np.diff(clock.ends)  # Without the first batch.
    looked = seconds[EVERY - 2 :: EVERY]
    others = np.delete(seconds, slice(EVERY - 2, None, EVERY))
    return {
        "first": [looked[0]],
        "looked": list(looked[1:]),
        "others": list(others[1:]),
    }


def main() -> None:
    parser = report.make_parser(__doc__ or "", rounds=12)
    report.add_list(
        parser, "--models", tuple(fit.MODELS), tuple(fit.MODELS)[:-1]
    )
    args = parser.parse_args()
    rows = []
    times: dict[str, Any] = {}
    with timing.progress_bar() as progress:
        cases = [
            (name, blocking)
            for name in args.models
            for blocking in ("output_unit", "coordinate")
        ]
        for name, blocking in progress.track(cases, description="models"):
            own = times_of(name, blocking, args.rounds)
            times[f"{name}, {blocking}"] = own
            step = statistics.median(own["others"])
            look = statistics.median(own["looked"]) - step
            rows.append(
                (
                    name,
                    blocking,
                    f"{1000 * step:.1f}",
                    f"{1000 * look:.1f}",
                    f"{look / DEFAULT / step:.2%}",
                    f"{own['first'][0] - step:.2f}",
                )
            )
    title = f"BlockMonitor, batches of {fit.BATCH}"
    columns = (
        *("model", "blocks", "ms per step", "ms per look"),
        *(f"share at every={DEFAULT}", "s, first look"),
    )
    report.console.print(report.make_table(title, columns, rows))
    report.write(args.output / "monitor.json", args, times)


if __name__ == "__main__":
    main()
