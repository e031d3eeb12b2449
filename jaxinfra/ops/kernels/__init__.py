"""Fused kernels for one device's rows and heads; `ops.attention` chooses."""
