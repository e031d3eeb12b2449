"""Options that a user gave, shown to the compiler that is to take them.

Apart from `compiler_options`, which imports no jax. Only the compiler knows its options
and their values, so it is given a program of one addition before anything larger.
"""

import jax
import jax.numpy as jnp

from jaxinfra import compiler_options
from jaxinfra.config import ConfigError


def accepted_options(
    mesh: jax.sharding.Mesh, changes: str = ""
) -> dict[str, str] | None:
    """`compiler_options.options_for`; ConfigError, with what the compiler says, if it
    does not take them as `changes` has them."""
    options = compiler_options.options_for(mesh, changes)
    if not changes or not options:
        return options
    whole = jax.NamedSharding(mesh, jax.P())
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x: x + 1, compiler_options=options).lower(one)
        try:
            program.compile()
        except (jax.errors.JaxRuntimeError, ValueError, TypeError) as error:
            device = mesh.devices.flat[0]
            said = str(error).splitlines()[0]
            raise ConfigError(
                f"runtime.compiler_options={changes!r}: the compiler of"
                f" {device.device_kind} refuses it ({said}); correct the option's name"
                " or value, or leave it out"
            ) from error
    return options
