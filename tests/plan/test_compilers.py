"""What the compilers of absent hardware say of a step that does not fit."""

import contextlib
import types

import jax
import pytest

from jaxinfra.plan import compilers

REFUSED = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total"
    " memory required for HLO temporaries (1.23T) exceeds available HBM (15.75G). HLO"
    " module: jit_train_step.\nSee https://openxla.org/xla/errors/error_1000"
)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (REFUSED, round(1.23 * 2**40)),
        (REFUSED.replace("1.23T", "19.76G"), round(19.76 * 2**30)),
        (REFUSED.replace("1.23T", "812.5M"), round(812.5 * 2**20)),
        (
            "Ran out of memory in memory space hbm. Used 17.2G of 15.75G hbm. Exceeded"
            " hbm capacity by 1.45G. HLO module: jit_train_step.",
            round(17.2 * 2**30),
        ),
        ("Ran out of memory in memory space vmem. Used 17.2M of 16M vmem.", None),
        ("INVALID_ARGUMENT: no such option", None),
    ],
)
def test_what_a_refused_program_needs_is_read_from_the_compilers_words(message, size):
    assert compilers.refused_bytes(message) == size


@pytest.mark.parametrize("message", [REFUSED, "INTERNAL: something else"])
def test_a_step_that_does_not_fit_is_told_apart_from_other_failures(
    message, monkeypatch
):
    def refuse():
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax, "set_mesh", lambda mesh: contextlib.nullcontext())
    lowered = types.SimpleNamespace(compile=refuse)
    step = types.SimpleNamespace(lower=lambda state, batch: lowered)
    layout = types.SimpleNamespace(mesh=None)
    experiment = types.SimpleNamespace(layout=layout, train_step=step)
    if message != REFUSED:
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            compilers.compile_step(experiment, None, None)
        return
    with pytest.raises(compilers.DoesNotFit) as caught:
        compilers.compile_step(experiment, None, None)
    assert caught.value.peak_bytes == round(1.23 * 2**40)
