"""What TensorFlow and XLA make of a step: the one place that looks inside.

`compiled_functions` and `indices_of_calls` know how the package keeps its
compiled functions.
"""

import tensorflow as tf

from helpers.cases import make_variables


def compiled_functions(optimizer):
    """The functions that XLA has compiled for an optimizer."""
    return [own.function for own in optimizer._compiled.functions.values()]


def indices_of_calls(optimizer):
    """The positions of the variables of each of these functions."""
    return {
        range(indices[0], indices[-1] + 1)
        for indices, *_ in optimizer._compiled.functions
    }


def count_traces(optimizer):
    """Appends to the list that it returns whenever the update is traced."""
    traces = []
    update = optimizer._update

    def counted(*args, **kwargs):
        traces.append(args)
        return update(*args, **kwargs)

    optimizer._update = counted
    return traces


def program_of(optimizer, shape, layers, dtype="float32"):
    """What XLA makes of a step of some kernels."""
    shapes = {f"{name}/kernel": shape for name in layers}
    variables = make_variables(shapes, dtype)
    optimizer.build(variables)
    gradients = [tf.ones(shape, dtype) for _ in variables]

    @tf.function(jit_compile=True, autograph=False)
    def step():
        optimizer.apply(gradients, variables)

    step()
    return step.experimental_get_compiler_ir()(stage="optimized_hlo")


def main_of(program):
    return program[program.index("ENTRY") :]


def is_xla(function):
    return function.function_def.attr["_XlaMustCompile"].b


def has_loop(function):
    return any(
        op.type.endswith("While") for op in function.graph.get_operations()
    )


def all_nodes(graph):
    """The operations of a graph and of the functions in its library."""
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def
