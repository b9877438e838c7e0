"""A step with PyTorch beside Keras's Adam: small variables, and large ones.

    KERAS_BACKEND=torch python -m benchmarks.torch_step

Keras's own optimizers update all variables in calls of `torch._foreach`.
"""

import argparse
from collections.abc import Callable

import keras
from rich.console import Console
from rich.table import Table

import keras_blockwise as kb
from benchmarks import models
from benchmarks import timing

# Layers of one size, with biases or without.
MODELS = {
    "small": [
        spec for i in range(98) for spec in models.dense(f"dense_{i}", 16, 16)
    ],
    "large": [(f"dense_{i}/kernel", (1024, 1024)) for i in range(24)],
    "tiny": models.tiny(),
}
ADAM = "Keras Adam"
OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    ADAM: lambda: keras.optimizers.Adam(),
    "BlockAdam, output_unit": lambda: kb.BlockAdam(),
    "BlockAdam, variable": lambda: kb.BlockAdam(blocking="variable"),
    "BAGM, output_unit": lambda: kb.BAGM(),
    "BAGM, variable": lambda: kb.BAGM(blocking="variable"),
}


def make_step(
    specs: models.Specs, make: Callable[[], keras.optimizers.Optimizer]
) -> Callable[[], object]:
    arrays = models.random_arrays(specs, 1.0, seed=0)
    variables = models.make_variables(specs, arrays)
    gradients = [keras.ops.convert_to_tensor(array) for array in arrays]
    optimizer = make()
    optimizer.build(variables)
    return lambda: optimizer.apply(gradients, variables)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default="small,large")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    table = Table(title=f"A step with {keras.backend.backend()}")
    for column in ("variables", "optimizer", "ms", "±", f"of {ADAM}"):
        table.add_column(column)
    with timing.progress_bar() as progress:
        for model in args.models.split(","):
            steps = {
                name: make_step(MODELS[model], make)
                for name, make in OPTIMIZERS.items()
            }
            times = timing.interleave_steps(steps, args.rounds, progress, model)
            medians = timing.medians(times)
            for name, seconds in medians.items():
                table.add_row(
                    model,
                    name,
                    f"{1e3 * seconds:.2f}",
                    timing.spread(times[name]),
                    f"{seconds / medians[ADAM]:.2f}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
