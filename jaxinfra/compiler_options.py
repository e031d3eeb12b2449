"""Options of the compiler, by what is compiled and for which platform.

Data, not code: each entry says what it was measured to do. Imports no jax.
"""

# Drawing random numbers: at full optimisation XLA's CPU backend spends 5.5 s on the 16
# arrays of gpt2_124m and 1.6 s at level 1, and the program runs as fast (1.9, 2.1 s).
INIT: dict[str, dict[str, int]] = {"cpu": {"xla_backend_optimization_level": 1}}


def for_init(platform: str) -> dict[str, int]:
    """Options for the program that makes the first parameters."""
    return INIT.get(platform, {})
