"""What XLA makes of an update on a CPU; an older XLA makes other programs."""

import re

import numpy as np
import pytest

from helpers.programs import main_of
from helpers.programs import program_of
from keras_blockwise import BAGM
from keras_blockwise import BlockAdam
from keras_blockwise.execution.xla_cpu.encoded import AT_ONCE

# The names of variables say little of their blocks.
NAMES = pytest.mark.filterwarnings("ignore:Names and shapes")
pytestmark = [pytest.mark.tensorflow, NAMES]


@pytest.mark.parametrize(
    "scheme, shape",
    [
        ("variable", (512, 8)),
        ("output_unit", (512, 8)),
        ("input_unit", (256, 16)),
    ],
)
def test_rows_are_written_in_place(scheme, shape, short_rows):
    """A copy for every row would make the step a hundred times slower.

    Of one with an axis of one entry, where a row is one of the kernel, too.
    """
    program = program_of(BAGM(blocking=scheme), shape, "ab")
    made = re.findall(r"= \w+\[([\d,]*)\]\S* (copy|fusion)\(", program)
    large = [
        operation
        for dims, operation in made
        if np.prod([int(n) for n in dims.split(",") if n]) == np.prod(shape)
    ]
    assert " while(" in program
    assert large == ["fusion"] * 4  # Two kernels, and the momentum of each.


@pytest.mark.parametrize(
    "scheme, shape", [("output_unit", (768, 8)), ("variable", (16, 512))]
)
def test_rows_in_8_bits_are_written_in_place(scheme, shape, short_rows):
    optimizer = BAGM(blocking=scheme, momentum_dtype="int8")
    program = program_of(optimizer, shape, "abc")
    made = re.findall(r"= (\w+)\[([\d,]+)\]\S* fusion\(", program)
    large = [
        kind
        for kind, dims in made
        if np.prod([int(n) for n in dims.split(",")]) == np.prod(shape)
    ]
    assert program.count(" while(") == 2
    # The weights and the codes of three kernels, of which two are in loops.
    assert sorted(large) == ["f32"] * 3 + ["s8"] * 3


@pytest.mark.parametrize(
    "scheme, count",
    [("variable", 3), ("output_unit", 16)],
    ids=["alone", "together"],
)
def test_a_sum_stands_next_to_the_momentum(scheme, count):
    """In the order of the program, the gradient is still in the cache."""
    layers = [f"dense_{i}" for i in range(count)]
    program = program_of(BlockAdam(blocking=scheme), (96, 64), layers)
    main = main_of(program)
    # What reads a gradient, in order, and whether it makes a whole variable.
    reads = re.findall(r"= f32\[([\d,]*)\]\S* fusion\(%arg(\d+)\.", main)
    # They come after the learning rate.
    gradients = range(1, 1 + count)
    whole = [
        (dims == "96,64", int(read))
        for dims, read in reads
        if int(read) in gradients
    ]
    assert whole == [(is_whole, i) for i in gradients for is_whole in (0, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cls", [BlockAdam, BAGM])
def test_a_narrow_momentum_needs_no_copy(cls, dtype):
    optimizer = cls(momentum_dtype="bfloat16")
    program = program_of(optimizer, (96, 64), "abc", dtype)
    main = main_of(program)
    made = re.findall(r"= (\w+)\[96,64\]\S* (?!parameter)(\w+)\(", main)
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    # The weights and the momentum of three kernels, and nothing else.
    assert sorted(made) == sorted([(kind, "fusion"), ("bf16", "fusion")] * 3)


@pytest.mark.parametrize(
    "cls, scheme, shape",
    [
        (BAGM, "output_unit", (512, 512)),
        (BlockAdam, "input_unit", (512, 512)),
        # One group in a row, and one that no small number divides.
        (BlockAdam, "input_unit", (1024, 192)),
        (BlockAdam, "input_unit", (1024, 131)),
    ],
)
def test_a_momentum_in_8_bits_is_nowhere_in_float32(cls, scheme, shape):
    optimizer = cls(momentum_dtype="int8", blocking=scheme)
    main = main_of(program_of(optimizer, shape, "abc"))
    made = re.findall(r"= (\w+)\[([\d,]+)\]\S* (?!parameter)(\w+)\(", main)
    large = sorted(
        kind
        for kind, dims, _ in made
        if np.prod([int(n) for n in dims.split(",")]) > np.prod(shape) // 2
    )
    # The weights and the codes of three kernels, none of which is copied.
    assert large == ["f32"] * 3 + ["s8"] * 3


def test_the_scales_of_few_variables_are_computed_at_once():
    """What is compared for them would be in memory all at once."""
    optimizer = BlockAdam(momentum_dtype="int8", blocking="output_unit")
    main = main_of(program_of(optimizer, (512, 512), "abcdef"))
    compared = re.findall(r"(%[\w.]+) = f32\[2,64,512\]", main)
    assert len(compared) == 6
    alive, most = set(), 0
    for line in main.splitlines():
        made = re.match(r"\s*(?:ROOT )?(%[\w.]+) =", line)
        if made and made[1] in compared:
            alive.add(made[1])
            most = max(most, len(alive))
        else:
            alive -= set(re.findall(r"%[\w.]+", line))
    assert most <= AT_ONCE


@pytest.mark.parametrize("cls", [BlockAdam, BAGM])
def test_blocks_of_one_entry_need_no_other_memory(cls):
    """What the weights and the momentum both need is made twice, not kept."""
    program = program_of(cls(blocking="coordinate"), (96, 64), "abc")
    main = main_of(program)
    made = re.findall(r"= f32\[96,64\]\S* (?!parameter)(\w+)\(", main)
    # The weights, the momentum and the velocity of three kernels.
    assert made == ["fusion"] * 9


def body_of_loop(program):
    name = re.search(r" while\(.* body=(%[\w.]+)", program)[1]
    return re.search(rf"^{re.escape(name)} .*?^}}", program, re.M | re.S)[0]


# What is written of two rows of a kernel, or of one with 256, and what else is
# computed: in 8 bits, for the scales.
STATE = {
    "float32": (["f32[256,2,8]"] * 2, []),
    "int8": (
        ["f32[2,256,8]", "s8[2,256,8]", "f32[2,1,8]"],
        ["f32[32,8]", "f32[8]", "f32[1,8]"],
    ),
}


@pytest.mark.parametrize("dtype", STATE)
def test_loops_share_no_memory(dtype, short_rows):
    """Otherwise XLA would run them one after the other."""
    optimizer = BAGM(blocking="output_unit", momentum_dtype=dtype)
    program = program_of(optimizer, (512, 8), "abc")
    made = re.findall(
        r"= (\w+\[[\d,]*\])\S* (fusion|copy)\(", body_of_loop(program)
    )
    # Besides, the next row, and whether there is one: the state, which has the
    # next row twice.
    written, others = STATE[dtype]
    assert sorted(made) == sorted([
        *[(name, "fusion") for name in written + others],
        ("f32[]", "fusion"), ("f32[]", "copy"), ("pred[]", "fusion"),
    ])  # fmt: skip
    # One kernel reads that of both loops when they have ended.
    main = main_of(program)
    element = (
        r"(%[\w.]+) = (\w+\[[\d,]*\])\S* get-tuple-element\(%(?:while|call)"
    )
    state = {
        name for name, kind in re.findall(element, main) if kind not in written
    }
    operands = re.findall(r"= f32\[512,8\]\S* fusion\((.*?)\)", main)
    assert len(state) == 2 * (3 + len(others))
    assert any(state <= set(re.findall(r"%[\w.]+", own)) for own in operands)
