"""Which entries of a variable share one adaptive step size."""
