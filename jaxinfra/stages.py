"""Settings that change at steps, in closed form.

Such a setting is written VALUE VALUE@STEP VALUE@STEP ...: "8 16@200" is 8, and 16 from
step 200 on.
"""

import bisect
import fractions
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxinfra.config import ConfigError


class Stage(NamedTuple):
    """A value, and the first step that has it."""

    step: int
    value: fractions.Fraction | int


Weights = Mapping[str, Sequence[Stage]]  # of each data set


def parse(text: str, *, key: str) -> tuple[Stage, ...]:
    """The stages of a setting; raises ConfigError, naming `key`."""
    stages = []
    for number, word in enumerate(text.replace(",", " ").split()):
        value, _, step = word.partition("@")
        try:
            stage = Stage(int(step or 0), fractions.Fraction(value))
        except (ValueError, ZeroDivisionError):
            stage = Stage(-1, fractions.Fraction(0))
        is_later = stage.step > stages[-1].step if stages else stage.step == 0
        if "/" in word or not is_later or stage.value < 0 or bool(number) != bool(step):
            raise ConfigError(
                f"{key}={text!r}: {word!r} is not as in '8 16@200', which is 8, and 16 "
                "from step 200 on; steps must rise"
            )
        stages.append(stage)
    if not stages:
        raise ConfigError(f"{key} is empty; give it as in '8 16@200' or leave it out")
    return tuple(stages)


class BatchSizes:
    """Rows of every step, and before it."""

    def __init__(self, batch_size: int, ramp: str = ""):
        """`ramp`: stages that end with `batch_size`; empty: always that. Raises
        ConfigError."""
        if batch_size < 1:
            raise ConfigError(f"train.batch_size={batch_size} must be 1 or more")
        stages = parse(ramp or str(batch_size), key="train.batch_ramp")
        sizes = [stage.value for stage in stages]
        if any(size.denominator != 1 or size < 1 for size in sizes):
            raise ConfigError(f"train.batch_ramp={ramp!r} must be of whole rows from 1")
        if sizes[-1] != batch_size:
            raise ConfigError(
                f"train.batch_ramp={ramp!r} ends with {sizes[-1]} rows and "
                f"train.batch_size={batch_size}; set train.batch_size={sizes[-1]}"
            )
        self.ramp = ramp
        self.sizes = [int(size) for size in sizes]
        self._steps = [stage.step for stage in stages]
        self._rows_before = [0]
        for (begin, end), size in zip(itertools.pairwise(self._steps), self.sizes):
            self._rows_before.append(self._rows_before[-1] + (end - begin) * size)

    def of(self, step: int) -> int:
        """Rows of step `step`."""
        return self.sizes[self._stage(step)]

    def rows_before(self, step: int) -> int:
        """Rows of all steps before it: the number of its first global row."""
        stage = self._stage(step)
        return (
            self._rows_before[stage] + (step - self._steps[stage]) * self.sizes[stage]
        )

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self._steps, step) - 1
