"""State, and what a compiled step needs above weights, gradients and state.

    python -m benchmarks.memory --model gpt2
    python -m benchmarks.memory --model resnet50 --schemes output_unit

Every optimizer has a process of its own. What its step needs is told twice: by
XLA, as all buffers of the compiled step that are no arguments, and on Linux by
the system, as the growth of the resident memory while steps are taken.
"""

import ctypes
import gc
import math
import re
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import keras_blockwise as kb
from benchmarks import goals
from benchmarks import models
from benchmarks import peers
from benchmarks import processes
from benchmarks import report
from benchmarks import timing

BFLOAT16 = "bfloat16"
ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*)")


def make_optimizer(name: str) -> Any:
    if name == peers.ADAM:
        return keras.optimizers.Adam()
    cls, scheme, *dtype = name.split()
    arguments = {"momentum_dtype": dtype[0]} if dtype else {}
    return getattr(kb, cls)(blocking=scheme, **arguments)


def buffer_bytes(assignment: str) -> int:
    """Bytes of the buffers of a step that are none of its arguments."""
    return sum(
        int(size)
        for size, what in ALLOCATION.findall(assignment)
        if not what.startswith("parameter")
    )


def growth(step: peers.Step) -> int | None:
    """By how many bytes the process grows while it takes steps."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # What is free must not hide the growth.
    before = processes.resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM.
    for _ in range(5):
        step()
    return processes.resident_bytes("VmHWM") - before


def measure(model: str, name: str, dump: str) -> dict[str, Any]:
    """Bytes of one optimizer, in a process where XLA writes to `dump`."""
    specs = models.MODELS[model]()
    arrays = models.random_arrays(specs, 0.02, seed=0)
    variables = models.make_variables(specs, arrays)
    gradients = [tf.constant(array) for array in arrays]
    del arrays
    optimizer = make_optimizer(name)
    step = peers.keras_step(optimizer, variables, gradients, "compiled")
    for _ in range(3):
        step()
    assignments = Path(dump).glob("*buffer-assignment.txt")
    return {
        "state": sum(
            math.prod(v.shape) * tf.as_dtype(v.dtype).size
            for v in optimizer.variables
        ),
        "buffers": max(buffer_bytes(path.read_text()) for path in assignments),
        "growth": growth(step),
    }


def main() -> None:
    parser = report.make_parser(__doc__ or "")
    parser.add_argument(
        "--model",
        choices=models.MODELS,
        default="resnet50",
        help="default: %(default)s",
    )
    report.add_list(parser, "--schemes", peers.SCHEMES)
    args = parser.parse_args()
    names = [f"{cls} {scheme}" for cls in peers.OURS for scheme in args.schemes]
    names += [f"{name} {BFLOAT16}" for name in names]
    results = {}
    with timing.progress_bar() as progress:
        for name in progress.track(
            [peers.ADAM, *names], description=args.model
        ):
            results[name] = processes.dumping(measure, args.model, name)
    parameters = 4 * models.size(models.MODELS[args.model]())
    states = {
        name: result["state"] / results[peers.ADAM]["state"]
        for name, result in results.items()
    }
    buffers = {n: r["buffers"] / parameters for n, r in results.items()}
    grown = {
        name: result["growth"] / parameters
        for name, result in results.items()
        if result["growth"] is not None
    }
    table = report.make_table(
        f"{args.model}, {parameters / 1e6:.4g} MB of parameters",
        (
            "optimizer",
            "state, MB",
            "/ Adam's",
            "step, by XLA",
            "step, resident",
        ),
        [
            (
                name,
                f"{result['state'] / 1e6:.2f}",
                f"{states[name]:.3f}",
                f"{buffers[name]:.3f}",
                f"{grown[name]:.3f}" if name in grown else "",
            )
            for name, result in results.items()
        ],
    )
    table.caption = "steps: bytes above all else / bytes of the parameters"
    report.console.print(table)
    peaks = {f"{name}, by XLA": buffers[name] for name in names}
    peaks.update({f"{n}, resident": grown[n] for n in names if n in grown})
    wide = {n: states[n] for n in names if not n.endswith(BFLOAT16)}
    narrow = {n: states[n] for n in names if n.endswith(BFLOAT16)}
    verdicts = [
        goals.judge(goals.STATE, wide),
        goals.judge(goals.STATE_BFLOAT16, narrow),
        goals.judge(goals.PEAK, peaks),
    ]
    path = args.output / f"memory_{args.model}.json"
    report.save(path, args, results, verdicts)
    panels = {
        "State": states,
        "Step, by XLA": buffers,
        "Step, resident": grown,
    }
    report.draw_bars(
        path.with_suffix(".png"),
        f"{args.model}: memory",
        "state: share of Adam's; step: share of the bytes of the parameters",
        {
            title: {
                name: (value, f"{value:.3f}", name != peers.ADAM)
                for name, value in values.items()
            }
            for title, values in panels.items()
            if values
        },
    )


if __name__ == "__main__":
    main()
