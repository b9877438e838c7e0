"""How a step is run: one plain path, and a fast one for TensorFlow.

The backend is chosen once, when the package is imported, as Keras does.
"""

from typing import Any

import keras

Execution: Any
if keras.backend.backend() == "tensorflow":
    from keras_blockwise.execution.tensorflow import TensorFlowOptimizer

    Execution = TensorFlowOptimizer
else:
    from keras_blockwise.execution.plain import PlainOptimizer

    Execution = PlainOptimizer
