"""Fewer bits: arrays, training, optimizer state and traffic in low precision.

`arrays` is what all of it is made of: a `QuantizedArray` is a pytree of low-bit values
and the scales of the groups that share one.
"""
