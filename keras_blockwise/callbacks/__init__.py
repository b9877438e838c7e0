"""Keras callbacks: learning rates from the loss, and what the blocks do."""

from keras_blockwise.callbacks.monitor import BlockMonitor
from keras_blockwise.callbacks.rates import HessianInformedRates

__all__ = ["BlockMonitor", "HessianInformedRates"]
