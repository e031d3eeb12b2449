"""What a plan adds to the compiled program: how often a pipeline's branches run."""

import dataclasses

import pytest

from jaxinfra import options
from jaxinfra.config import MeshConfig
from jaxinfra.plan.step import pipeline_shares


def test_a_pass_is_paid_for_in_the_ticks_in_which_some_stage_makes_it():
    config = options.load_config("tiny")
    assert pipeline_shares(config) == {}
    train = dataclasses.replace(config.train, microbatches=8)
    mesh = MeshConfig(data=1, pipeline=4)
    shares = pipeline_shares(dataclasses.replace(config, train=train, mesh=mesh))
    # 1f1b: the last of 8 microbatches goes 3 stages down, and 3 back.
    ticks = 8 + 2 * 3
    for scope, made in {"forward": 8 + 3, "backward": 8 + 3, "enter": 8}.items():
        found = shares[f"/{scope}/"]
        assert found == pytest.approx((1 - made / ticks, made / ticks)), scope
    assert shares["/weight/"] == (1.0, 0.0)
