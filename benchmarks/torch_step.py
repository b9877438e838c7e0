"""A step with PyTorch beside Keras's Adam: small variables, and large ones.

    KERAS_BACKEND=torch python -m benchmarks.torch_step

Keras's own optimizers update all variables in calls of `torch._foreach`.
"""

from collections.abc import Callable

import keras

import keras_blockwise as kb
from benchmarks import goals
from benchmarks import models
from benchmarks import report
from benchmarks import timing
from benchmarks.contestants import ADAM

# Layers of one size, with biases or without.
MODELS = {
    "small": [
        spec for i in range(98) for spec in models.dense(f"dense_{i}", 16, 16)
    ],
    "large": [(f"dense_{i}/kernel", (1024, 1024)) for i in range(24)],
    "tiny": models.tiny(),
}
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
    parser = report.make_parser(__doc__ or "", rounds=15)
    report.add_list(parser, "--models", tuple(MODELS), tuple(MODELS)[:-1])
    args = parser.parse_args()
    rows, results, ratios = [], {}, {}
    panels: dict[str, report.Bars] = {}
    with timing.progress_bar() as progress:
        for model in args.models:
            steps = {
                name: make_step(MODELS[model], make)
                for name, make in OPTIMIZERS.items()
            }
            times = timing.interleave_steps(steps, args.rounds, progress, model)
            results[model] = times
            panels[model] = {}
            medians = timing.medians(times)
            for name, seconds in medians.items():
                ratio = seconds / medians[ADAM]
                if name != ADAM:
                    ratios[f"{name}, {model}"] = ratio
                spread = timing.spread(times[name])
                bar = 1e3 * seconds, f"{ratio:.2f}×", name != ADAM
                panels[model][name] = bar
                cells = f"{1e3 * seconds:.2f}", spread, f"{ratio:.2f}"
                rows.append((f"{model}: {name}", *cells))
    columns = ("variables", "ms", "±", f"/ {ADAM}")
    title = f"A step with {keras.backend.backend()}"
    report.console.print(report.make_table(title, columns, rows))
    path = args.output / "torch_step.json"
    report.save(path, args, results, [goals.judge(goals.TORCH_STEP, ratios)])
    label = f"median ms of a step (× {ADAM})"
    report.draw_bars(path.with_suffix(".png"), title, label, panels)


if __name__ == "__main__":
    main()
