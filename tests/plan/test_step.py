"""What a plan adds to the compiled program: how often a pipeline's branches run."""

import dataclasses

import pytest
from plan import programs

from jaxinfra import options
from jaxinfra.config import MeshConfig
from jaxinfra.plan import cost, program
from jaxinfra.plan.step import pipeline_shares


def pipelined(**changes):
    config = options.load_config("tiny")
    train = dataclasses.replace(config.train, microbatches=8)
    model = dataclasses.replace(config.model, **{"repeats": 8} | changes)
    mesh = MeshConfig(data=1, pipeline=4)
    return dataclasses.replace(config, train=train, model=model, mesh=mesh)


def test_a_pass_is_paid_while_some_stage_makes_it_and_done_by_the_mean_stage():
    assert pipeline_shares(options.load_config("tiny")) == {}
    shares = pipeline_shares(pipelined())
    # 1f1b: the last of 8 microbatches goes 3 stages down, and 3 back; a stage makes 8.
    ticks = 8 + 2 * 3
    for scope, paid in {"forward": 8 + 3, "backward": 8 + 3, "enter": 8}.items():
        found = shares[f"/{scope}"]
        assert found.secs == pytest.approx((1 - paid / ticks, paid / ticks)), scope
        assert found.work == pytest.approx((1 - 8 / ticks, 8 / ticks)), scope
    assert shares["/weight"].secs == shares["/weight"].work == (1.0, 0.0)
    assert len(shares) == 5, "even stages lack no layer"


def test_layers_that_a_stage_lacks_are_paid_for_by_the_busiest_stage():
    """6 repeats on 4 stages: 2, 2, 1, 1."""
    share = [*pipeline_shares(pipelined(repeats=6)).values()][-1]
    assert share.secs == pytest.approx((0, 1))
    assert share.work == pytest.approx((1 / 4, 3 / 4))


def test_a_share_is_of_its_own_conditional_alone():
    shares = pipeline_shares(pipelined(repeats=6))
    cond = "jit(step)/while/body/eval_jaxpr/forward/cond"
    layer = f"{cond}/branch_1_fun/while/body/eval_jaxpr/cond"
    ring = f"{layer}/branch_1_fun/jvp(attention)/while/body/cond"

    def secs(scope):
        text = programs.LOOP.replace("jit(step)/slot/cond", scope)
        return cost.play(
            program.parse(text),
            clock=cost.cycles_at(1e3),
            link_bytes_per_sec=1.0,
            shares=shares,
        ).scopes["jit(step)/update/neg"]

    assert secs(cond) == pytest.approx(0.5 * 11 / 14)
    assert secs(layer) == secs(ring) == pytest.approx(0.5)
