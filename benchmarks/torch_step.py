"""A step with PyTorch beside Keras's Adam: small variables, and large ones.

    KERAS_BACKEND=torch python -m benchmarks.torch_step

Keras's own optimizers update all variables in calls of `torch._foreach`.
"""

from collections.abc import Callable

import keras

import keras_blockwise as kb
from benchmarks import models
from benchmarks import report
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
    parser = report.make_parser(__doc__ or "", rounds=30)
    report.add_list(parser, "--models", list(MODELS), ["small", "large"])
    args = parser.parse_args()
    results = []
    with timing.progress_bar() as progress:
        for model in args.models:
            times = timing.interleave_steps(
                {
                    name: make_step(MODELS[model], make)
                    for name, make in OPTIMIZERS.items()
                },
                args.rounds,
                progress,
                model,
            )
            results.append({"model": model, "seconds": times})
    rows = [
        (
            f"{result['model']}, {name}",
            f"{1e3 * seconds:.2f}",
            timing.spread(result["seconds"][name]),
            f"{seconds / medians[ADAM]:.2f}",
        )
        for result in results
        for medians in [timing.medians(result["seconds"])]
        for name, seconds in medians.items()
    ]
    columns = ("variables, optimizer", "ms", "±", f"/ {ADAM}")
    title = f"A step with the backend {keras.backend.backend()}"
    report.console.print(report.make_table(title, columns, rows))


if __name__ == "__main__":
    main()
