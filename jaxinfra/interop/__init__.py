"""Borders with other libraries: `flax_bridge` brings linen and nnx modules to the
step."""
