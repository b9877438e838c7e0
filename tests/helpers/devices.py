"""How the backend is set up in every process of the tests."""

import os

import keras

from helpers.tensorflow import tf

# Whether to take the plain kernels on a CPU, too.
PLAIN = bool(os.environ.get("PLAIN"))


def set_up(count=2):
    """Logical devices, and the float64 that JAX does not have by default."""
    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_num_cpu_devices", 8)
    if tf is None:
        return
    if PLAIN:
        from keras_blockwise.execution import tensorflow

        tensorflow.FOR_CPU = tensorflow.PLAIN
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )
    # Many processes share the cores.
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
