"""Scores against log-softmax of whole logits, on one device and on a mesh."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxinfra import params, precision, sharding
from jaxinfra.config import LayerConfig, ModelConfig
from jaxinfra.generate import rows, score
from jaxinfra.mesh import make_mesh
from jaxinfra.models.specs import param_specs

FLOAT32 = precision.policy("float32")
CFG = ModelConfig(
    vocab_size=29,  # odd: padded where tensor is 2
    width=16,
    ffn_width=24,
    num_heads=4,
    num_kv_heads=2,
    pattern=(LayerConfig(window=4), LayerConfig(feed_forward="experts")),
    repeats=1,
    num_experts=3,
    experts_per_token=2,
    logit_softcap=3.0,
    tied=False,
    init_std=0.7,
)
ROUNDING = 2e-5  # float32 sums in another order
ONE, MESH = {"data": 1}, {"fsdp": 2, "tensor": 2}
ALIKE = {"fsdp": 2, "context": 2}  # along context all have the same tokens


class Setting(NamedTuple):
    tree: params.Tree
    layout: sharding.Layout
    logits: score.Logits
    score: score.ScoreRows

    def logits_of(self, ids_BT, *out):
        with jax.set_mesh(self.layout.mesh):
            return self.logits(self.tree, ids_BT, *out)

    def scores_of(self, *asked):
        with jax.set_mesh(self.layout.mesh):
            return self.score(self.tree, asked)


@functools.cache
def setting(cfg=CFG, **sizes):
    count = int(np.prod(list(sizes.values())))
    layout = sharding.make_layout(make_mesh(sizes, devices=jax.devices()[:count]))
    with jax.set_mesh(layout.mesh):
        tree = params.initialize(
            param_specs(cfg), jax.random.key(0), layout=layout, dtype=np.float32
        )
    how = {"policy": FLOAT32, "layout": layout}
    return Setting(
        tree, layout, score.make_logits(cfg, **how), score.make_score(cfg, **how)
    )


@functools.cache
def ids(shape=(5, 40)):
    return np.random.default_rng(2).integers(0, CFG.vocab_size, shape)


@functools.cache
def log_softmax():
    logits_BTV = setting(**ONE).logits_of(ids()).astype(np.float64)
    shifted_BTV = logits_BTV - logits_BTV.max(axis=-1, keepdims=True)
    return shifted_BTV - np.log(np.exp(shifted_BTV).sum(axis=-1, keepdims=True))


def check(found, b, first, last, start=0):
    """`found` scored tokens first .. last of row b after those from `start` on."""
    places_Q = np.arange(first - 1, last - 1) - start
    expected_QV = log_softmax()[b, places_Q]
    np.testing.assert_allclose(
        found.logprobs_Q,
        expected_QV[np.arange(last - first), ids()[b, first:last]],
        atol=ROUNDING,
    )
    is_greedy_Q = expected_QV.argmax(axis=-1) == ids()[b, first:last]
    np.testing.assert_array_equal(found.is_greedy_Q, is_greedy_Q)


@pytest.mark.parametrize("sizes", [ONE, MESH, ALIKE], ids=str)
@pytest.mark.slow
def test_scores_are_log_softmax_of_the_logits(sizes):
    spans = [(0, 1, 40), (1, 5, 9), (2, 3, 4), (3, 30, 31), (4, 1, 2)]
    asked = [rows.continuation(ids()[b, :m], ids()[b, m:n]) for b, m, n in spans]
    for found, span in zip(setting(**sizes).scores_of(*asked), spans, strict=True):
        check(found, *span)
    assert sum(f.is_greedy_Q.sum() for f in setting(**sizes).scores_of(*asked)) > 0


@pytest.mark.slow
def test_logits_are_the_same_on_a_mesh_in_a_given_array_and_without_padding():
    whole_BTV = setting(**ONE).logits_of(ids())
    assert np.abs(whole_BTV).max() <= CFG.logit_softcap
    out_BTV = np.full((5, 40, CFG.vocab_size), np.nan, np.float32)
    assert setting(**MESH).logits_of(ids(), out_BTV) is out_BTV
    np.testing.assert_allclose(out_BTV, whole_BTV, atol=ROUNDING)
    short_BTV = setting(**ONE).logits_of(ids()[:, :7])
    np.testing.assert_allclose(short_BTV, whole_BTV[:, :7], atol=ROUNDING)


def test_rows_that_begin_alike_are_read_once_and_scored_as_alone():
    row = ids()[0]
    spans = [(0, 7, 8), (0, 7, 12), (0, 3, 5), (1, 7, 8), (0, 7, 8)]
    asked = [rows.continuation(ids()[b, :m], ids()[b, m:n]) for b, m, n in spans]
    asked.append(rows.continuation(row[:7], row[7:8] * 0 + 11))
    found = setting(**ONE).scores_of(*asked)
    for one, span in zip(found, spans, strict=False):
        check(one, *span)
    expected = log_softmax()[0, 6, 11]
    np.testing.assert_allclose(found[-1].logprobs_Q, [expected], atol=ROUNDING)
    assert score._sharing(asked) in ([[3], [1, 0, 4, 5, 2]], [[1, 0, 4, 5, 2], [3]])


def test_one_program_serves_all_rows_up_to_a_power_of_two():
    case = setting(**ONE)._replace(
        score=score.make_score(CFG, policy=FLOAT32, layout=setting(**ONE).layout)
    )
    for length in (3, 11, 20, 31):
        case.scores_of(rows.continuation(ids()[0, :length], ids()[0, :2]))
    assert case.score.keywords["scores"]._cache_size() == 1


def test_what_the_model_does_not_have_is_refused():
    case = setting(**ONE)
    with pytest.raises(ValueError, match=r"ids from 0 to 29 .* the model has 0 to 28"):
        case.logits_of(np.array([[0, 29]]))
    with pytest.raises(ValueError, match="ids from -1"):
        case.scores_of(rows.Row(np.array([1]), np.array([0]), np.array([-1])))
    with pytest.raises(ValueError, match=r"has no places \[1\]"):
        case.scores_of(rows.Row(np.array([1]), np.array([1]), np.array([1])))
    learned = ModelConfig(
        vocab_size=29, width=8, num_heads=2, num_kv_heads=2, repeats=1,
        positions="learned", max_length=20,
    )  # fmt: skip
    case = setting(learned, **ONE)
    with pytest.raises(ValueError, match=r"21 tokens exceeds model.max_length=20"):
        case.logits_of(ids((1, 21)))
    assert np.isfinite(case.logits_of(ids((1, 20)))).all()
    assert np.isfinite(case.logits_of(ids((1, 17)))).all()
