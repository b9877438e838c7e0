"""One optimizer step, beside Keras, optax, PyTorch and adam_mini.

    python -m benchmarks.step --model gpt2
    python -m benchmarks.step --model resnet50 --peers keras,torch
    python -m benchmarks.step --model gpt2_2 --peers muon --schemes output_unit
    python -m benchmarks.step --model gpt2 --schemes output_unit \
        --momentum float32,int8

Applies the same random gradients to variables with the shapes of a model.
All contestants take part in every round. What a step has to read and write at
least is compared with the bandwidth of a plain copy, measured in the same
rounds. Peers that are not installed are left out. The 8-bit Adam of
bitsandbytes takes part if it is asked for: its steps on a CPU are long. With
the peer "muon", Keras's Muon and `BlockMuon` are alone: their steps take
seconds, so `gpt2_2` has two blocks of GPT-2 only.
"""

from benchmarks import contestants
from benchmarks import models
from benchmarks import peers
from benchmarks import report
from benchmarks import timing
from benchmarks.contestants import Contestant
from benchmarks.goals import judge_steps


def make_steps(
    model: str,
    names: list[str],
    schemes: list[str],
    modes: list[str],
    momenta: list[str],
) -> dict[Contestant, peers.Step]:
    specs = models.MODELS[model]()
    arrays = models.random_arrays(specs, 0.02, seed=0)
    gradients = models.random_arrays(specs, 1e-3, seed=1)
    variables = models.make_variables(specs, arrays)
    if "muon" in names:
        steps = peers.muon_steps(variables, gradients, schemes)
        return {**steps, **peers.copy_step(models.size(specs))}
    steps = peers.keras_steps(variables, gradients, schemes, modes, momenta)
    if "keras" not in names:
        steps = {c: step for c, step in steps.items() if c.is_ours}
    if "compiled" in modes:
        if "optax" in names:
            steps.update(peers.optax_steps(arrays, gradients))
        if {"torch", "adam_mini", "bitsandbytes"} & set(names):
            torch = peers.torch_optimizers(specs, arrays, gradients, names)
            steps.update(
                (Contestant(name, "compiled"), optimizer.step)
                for name, optimizer in torch.items()
            )
    steps.update(peers.copy_step(models.size(specs)))
    return steps


def main() -> None:
    parser = report.make_parser(__doc__ or "", rounds=30)
    parser.add_argument(
        "--model",
        choices=models.MODELS,
        default="resnet50",
        help="default: %(default)s",
    )
    names = ("keras", "optax", "torch", "adam_mini")
    every = (*names, "bitsandbytes", "muon")
    report.add_list(parser, "--peers", every, names)
    schemes = (*peers.SCHEMES, "coordinate")
    report.add_list(parser, "--schemes", schemes, peers.SCHEMES)
    report.add_list(parser, "--modes", peers.MODES)
    momenta = contestants.MOMENTA
    report.add_list(parser, "--momentum", momenta, momenta[:1])
    args = parser.parse_args()
    names, sentences = peers.without_missing(args.peers)
    for sentence in sentences:
        report.console.print(sentence)
    steps = make_steps(
        args.model, names, args.schemes, args.modes, args.momentum
    )
    with timing.progress_bar() as progress:
        times = timing.interleave_steps(
            steps, args.rounds, progress, args.model
        )
    seconds = timing.medians(times)
    size = models.size(models.MODELS[args.model]())
    copied = 8 * size / seconds[Contestant(contestants.COPY, "")] / 1e9
    rows = []
    results = []
    panels: dict[str, report.Bars] = {}
    for contestant, value in seconds.items():
        name, mode = contestant
        moved = peers.bytes_per_parameter(name)
        bandwidth = moved * size / value / 1e9
        reference = seconds.get(Contestant(contestants.ADAM, mode))
        ratio = "" if reference is None else f"{value / reference:.2f}"
        rows.append(
            (
                name,
                mode,
                f"{1000 * value:.2f}",
                timing.spread(times[contestant]),
                ratio,
                str(moved),
                f"{bandwidth:.1f}",
                f"{bandwidth / copied:.0%}",
            )
        )
        results.append(
            {
                "name": name,
                "mode": mode,
                "median seconds": value,
                "bytes per parameter": moved,
                "gigabytes per second": bandwidth,
                "seconds": times[contestant],
            }
        )
        if mode:
            panels.setdefault(mode, {})[name] = (
                1000 * value,
                f"{ratio}×" if ratio else "",
                contestant.is_ours,
            )
    title = f"{args.model}, {size / 1e6:.4g} million parameters"
    table = report.make_table(
        title,
        (
            "optimizer",
            "mode",
            "ms",
            "±",
            "/ Adam",
            "B/param",
            "GB/s",
            "/ copy",
        ),
        rows,
    )
    report.console.print(table)
    path = args.output / f"step_{args.model}.json"
    report.save(path, args, results, judge_steps(args.model, seconds))
    report.draw_bars(
        path.with_suffix(".png"),
        title,
        "median milliseconds per step (× Keras Adam in the same mode)",
        panels,
    )


if __name__ == "__main__":
    main()
