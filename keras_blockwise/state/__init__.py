"""The state of an optimizer: which numbers it has, where, and in which file."""
