"""Loading that either succeeds or changes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import keras


@contextmanager
def all_or_nothing(model: keras.Model) -> Iterator[None]:
    """Undoes a loading that fails.

    Keras loads the weights of a model before the state of its optimizer, so a
    file whose optimizer does not fit, or that ends too early, leaves a mixture
    behind. Within this context an error leaves every weight and every state
    variable as it was. The values are kept in host memory meanwhile.

    Args:
        model: The model that is loaded into.

    Raises:
        The error of what is within the context.

    Example:

    ```python
    with kb.all_or_nothing(model):
        model.load_weights("model.weights.h5")
    ```
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    values = [(variable, variable.numpy()) for variable in variables]
    try:
        yield
    except BaseException:
        for variable, value in values:
            variable.assign(value)
        raise
