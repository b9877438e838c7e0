"""The mathematics of a step, in pure functions of `keras.ops`."""
