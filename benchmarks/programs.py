"""XLA's optimized programs of the compiled step, up to names.

    python -m benchmarks.programs --output before
    python -m benchmarks.programs --output after --compare before

Writes the program of every optimizer and scheme for the shapes of a model, as
a CPU runs it, without the names of its instructions and where they come from.
With `--compare`, a table tells which programs are those of another directory;
"in another order" has the same instructions, of which some independent ones
stand elsewhere. The script calls the public optimizers alone, so that it also
runs in a copy of an earlier commit.
"""

import argparse
import hashlib
import os
import re
import tempfile
from pathlib import Path

import tensorflow as tf

import keras_blockwise as kb
from benchmarks import models
from benchmarks import report
from benchmarks import timing

DUMP = tempfile.mkdtemp()
# XLA reads them when it compiles for the first time.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP} "
    "--xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*"
)
OPTIMIZERS = (
    *("BlockAdam", "AdamMini", "BlockNadam"),
    *("BAGM", "BAG", "BlockRMSprop"),
)
SCHEMES = ("variable", "output_unit", "layer")
NAME = re.compile(r"%[\w.-]+")
NOISE = re.compile(
    r"HloModule [\w.-]+|, (?:metadata|frontend_attributes)=\{[^}]*\}"
    r"|[\w.-]+: (?=\(|[a-z]+\d*\[)|/\*index=\d+\*/"
    r"|, entry_computation_layout=.*"
)
ALIAS = re.compile(r"\{(\d+)\}: \((\d+), \{\}, [\w-]+\)")
CALL = re.compile(r" (?:fusion|call)\((.*?)\), .*(?:calls|to_apply)=(%[\w.-]+)")


def without_names(program: str) -> str:
    """A program whose names are numbers, in the order in which they occur.

    The number of an argument and of a result are names, too.
    """
    head, *lines = NOISE.sub("", program).strip().splitlines()
    # The first computation is what the later ones call: rename it first.
    arguments: dict[str, list[int]] = {}
    computation = ""
    for i, line in enumerate(lines):
        if line.endswith("{"):
            computation = NAME.search(line)[0]  # type: ignore[index]
            arguments[computation] = []
            lines[i] = f"{line.split('(')[0]}{{"
        if found := re.search(r"parameter\((\d+)\)", line):
            order = arguments[computation]
            order.append(int(found[1]))
            lines[i] = line.replace(found[0], f"parameter({len(order) - 1})")
        elif found := CALL.search(line):
            values = found[1].split(", ")
            values = [values[k] for k in arguments[found[2]]]
            start, end = found.span(1)
            lines[i] = line[:start] + ", ".join(values) + line[end:]
    # The last computation is the program: its arguments count when they are
    # used, and a result is known by the argument that it overwrites.
    start = max(i for i, line in enumerate(lines) if line.endswith("{"))
    names = [
        NAME.findall(line)[0] for line in lines[start:] if " parameter(" in line
    ]
    root = next(line for line in lines[start:] if "ROOT" in line)
    lines = lines[: start + 1] + [
        line
        for line in lines[start + 1 :]
        if " parameter(" not in line and line != root
    ]
    numbers: dict[str, str] = {}
    text = NAME.sub(
        lambda match: numbers.setdefault(match[0], f"%{len(numbers)}"),
        "\n".join(lines),
    )
    order = arguments[computation]
    overwritten = {
        int(result): names[order.index(int(argument))]
        for result, argument in ALIAS.findall(head)
    }
    results = sorted(
        f"{numbers.get(overwritten.get(i, ''), '')} <- {numbers[name]}"
        for i, name in enumerate(NAME.findall(root)[1:])
    )
    return "\n".join([text, *results])


def program_of(optimizer, variables, gradients) -> str:
    """The optimized program of the optimizer's own compiled update."""
    before = set(Path(DUMP).glob("*after_optimizations.txt"))
    optimizer.build(variables)
    optimizer.jit_compile = True  # At the first step.
    optimizer.apply(gradients)
    new = set(Path(DUMP).glob("*after_optimizations.txt")) - before
    largest = max(new, key=lambda path: path.stat().st_size)
    program = without_names(largest.read_text())
    for path in Path(DUMP).iterdir():
        path.unlink()
    return program


def compared(program: str, other: str) -> str:
    if program == other:
        return "equal"
    lines = [
        sorted(NAME.sub("%", text).splitlines()) for text in (program, other)
    ]
    return "equal in another order" if lines[0] == lines[1] else "DIFFERENT"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    report.add_list(
        parser, "--models", tuple(models.MODELS), ("gpt2", "resnet50")
    )
    report.add_list(parser, "--optimizers", OPTIMIZERS)
    report.add_list(parser, "--schemes", SCHEMES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--compare", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with timing.progress_bar() as progress:
        total = len(args.models) * len(args.optimizers) * len(args.schemes)
        task = progress.add_task("programs", total=total)
        for model in args.models:
            specs = models.MODELS[model]()
            arrays = models.random_arrays(specs, 0.02, seed=0)
            variables = models.make_variables(specs, arrays)
            gradients = [tf.constant(array) for array in arrays]
            for name in args.optimizers:
                for scheme in args.schemes:
                    optimizer = getattr(kb, name)(1e-3, blocking=scheme)
                    program = program_of(optimizer, variables, gradients)
                    path = args.output / f"{model}-{name}-{scheme}.txt"
                    path.write_text(program)
                    digest = hashlib.sha256(program.encode()).hexdigest()[:12]
                    same = ""
                    if args.compare:
                        other = (args.compare / path.name).read_text()
                        same = compared(program, other)
                    lines = f"{program.count(chr(10)):,}"
                    rows.append((model, name, scheme, lines, digest, same))
                    progress.advance(task)
    columns = ("model", "optimizer", "scheme", "lines", "digest", "compared")
    report.console.print(report.make_table("Compiled steps", columns, rows))


if __name__ == "__main__":
    main()
