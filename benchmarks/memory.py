"""State, and what a step needs above weights, gradients and state.

    python -m benchmarks.memory --model gpt2
    python -m benchmarks.memory --model resnet50 --schemes output_unit

Every optimizer has a process of its own. What its step needs is told twice: by
XLA, as all buffers of the compiled step that are no arguments, and on Linux by
the system, as the growth of the resident memory while a step is taken. Peers of
PyTorch have the second alone, and are left out where they are not installed.
"""

import ctypes
import gc
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from benchmarks import contestants
from benchmarks import goals
from benchmarks import models
from benchmarks import peers
from benchmarks import processes
from benchmarks import report
from benchmarks import timing

ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*)")
KERAS = {
    contestants.ADAM: keras.optimizers.Adam,
    contestants.ADAFACTOR: keras.optimizers.Adafactor,
    contestants.LION: keras.optimizers.Lion,
    contestants.SGD_MOMENTUM: partial(keras.optimizers.SGD, momentum=0.9),
    contestants.SGD: keras.optimizers.SGD,
}
TORCH = {
    "adam_mini": contestants.ADAM_MINI,
    "bitsandbytes": contestants.ADAM_8BIT,
}
STATE_GOALS = {
    contestants.FLOAT32: goals.STATE,
    contestants.BFLOAT16: goals.STATE_BFLOAT16,
    contestants.INT8: goals.STATE_INT8,
}
PEAK_GOALS = {
    contestants.FLOAT32: goals.PEAK,
    contestants.BFLOAT16: goals.PEAK,
    contestants.INT8: goals.PEAK_INT8,
}
# The state, and what a step needs by XLA and by the system where they tell.
Bytes = dict[str, Any]


def buffer_bytes(assignment: str) -> int:
    """Bytes of the buffers of a step that are none of its arguments."""
    return sum(
        int(size)
        for size, what in ALLOCATION.findall(assignment)
        if not what.startswith("parameter")
    )


def growth(step: peers.Step) -> int | None:
    """By how many bytes the process grows while it takes a step.

    The least of three times: what it does but once is no need of a step. And
    not of two in a row: the memory of one may be freed after the next begins.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    grown = []
    for _ in range(3):
        gc.collect()
        # What is free must not hide the growth.
        ctypes.CDLL(None).malloc_trim(0)
        before = processes.resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM.
        step()
        grown.append(processes.resident_bytes("VmHWM") - before)
    return min(grown)


def measure(model: str, name: str, dump: str) -> Bytes:
    """Bytes of one optimizer, in a process where XLA writes to `dump`."""
    specs = models.MODELS[model]()
    arrays = models.random_arrays(specs, 0.02, seed=0)
    variables = models.make_variables(specs, arrays)
    gradients = [tf.constant(array) for array in arrays]
    del arrays
    make = KERAS.get(name) or partial(peers.make_ours, name)
    optimizer = make()
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


def torch_state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors that an optimizer keeps, each counted once."""
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if hasattr(value, "data_ptr")
    }
    return sum(tensors.values())


def measure_torch(model: str, peer: str) -> Bytes:
    """Bytes of one optimizer of PyTorch."""
    specs = models.MODELS[model]()
    arrays = models.random_arrays(specs, 0.02, seed=0)
    optimizers = peers.torch_optimizers(specs, arrays, arrays, [peer])
    (optimizer,) = optimizers.values()
    for _ in range(3):
        optimizer.step()
    return {
        "state": torch_state_bytes(optimizer),
        "buffers": None,
        "growth": growth(optimizer.step),
    }


def measure_all(
    model: str, names: list[str], ours: list[str]
) -> dict[str, Bytes]:
    """Keras's Adam, the other peers and ours, one after the other."""
    dumping = partial(processes.dumping, measure, model)
    torch = partial(processes.alone, measure_torch, model)
    compiled = KERAS if "keras" in names else (contestants.ADAM,)
    calls = {
        **{name: partial(dumping, name) for name in compiled},
        **{TORCH[p]: partial(torch, p) for p in TORCH if p in names},
        **{name: partial(dumping, name) for name in ours},
    }
    with timing.progress_bar() as progress:
        tracked = progress.track(calls.items(), description=model)
        return {name: call() for name, call in tracked}


def judge(
    names: list[str],
    states: Mapping[str, float],
    steps: Mapping[str, Mapping[str, float]],
) -> list[goals.Verdict]:
    """The goals of ours, by the dtype of the momentum.

    Args:
        names: Ours.
        states: State by that of Adam.
        steps: What a step needs by the parameters, as each teller has it.
    """
    ratios: dict[goals.Goal, dict[str, float]] = {}
    for name in names:
        dtype = contestants.momentum(name)
        ratios.setdefault(STATE_GOALS[dtype], {})[name] = states[name]
        for teller, peaks in steps.items():
            if name in peaks:
                found = ratios.setdefault(PEAK_GOALS[dtype], {})
                found[f"{name}, {teller}"] = peaks[name]
    return [goals.judge(goal, found) for goal, found in ratios.items()]


def main() -> None:
    parser = report.make_parser(__doc__ or "")
    parser.add_argument(
        "--model",
        choices=models.MODELS,
        default="resnet50",
        help="default: %(default)s",
    )
    report.add_list(parser, "--peers", ("keras", *TORCH))
    report.add_list(parser, "--schemes", peers.SCHEMES)
    report.add_list(parser, "--momentum", contestants.MOMENTA)
    args = parser.parse_args()
    names, sentences = peers.without_missing(args.peers)
    for sentence in sentences:
        report.console.print(sentence)
    ours = contestants.our_names(args.schemes, args.momentum)
    results = measure_all(args.model, names, ours)
    size = models.size(models.MODELS[args.model]())
    adam = results[contestants.ADAM]["state"]
    states = {name: found["state"] / adam for name, found in results.items()}
    steps = {
        teller: {
            name: found[key] / (4 * size)
            for name, found in results.items()
            if found[key] is not None
        }
        for teller, key in (("by XLA", "buffers"), ("resident", "growth"))
    }
    columns = ["state, MB", "B/param", "/ Adam's"]
    columns += [f"step, {teller}" for teller in steps]
    table = report.make_table(
        f"{args.model}, {4 * size / 1e6:.4g} MB of parameters",
        ("optimizer", *columns),
        [
            (
                name,
                f"{found['state'] / 1e6:.2f}",
                f"{found['state'] / size:.3f}",
                f"{states[name]:.3f}",
                *(
                    f"{step[name]:.3f}" if name in step else ""
                    for step in steps.values()
                ),
            )
            for name, found in results.items()
        ],
    )
    table.caption = "steps: bytes above all else / bytes of the parameters"
    report.console.print(table)
    path = args.output / f"memory_{args.model}.json"
    report.save(path, args, results, judge(ours, states, steps))
    panels = {"State": states}
    panels |= {f"Step, {teller}": peaks for teller, peaks in steps.items()}
    report.draw_bars(
        path.with_suffix(".png"),
        f"{args.model}: memory",
        "state: share of Adam's; step: share of the bytes of the parameters",
        {
            title: {
                name: (value, f"{value:.3f}", name in ours)
                for name, value in values.items()
            }
            for title, values in panels.items()
            if values
        },
    )


if __name__ == "__main__":
    main()
