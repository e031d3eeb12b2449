"""Parameters taken from elsewhere: which, onto what, and what is said of it."""

import dataclasses

import jax
import numpy as np
import pytest
from golden_checkpoints import (
    AS_TORCH,
    GOLDEN,
    difference,
    layout_of,
    logits_of,
    read,
)

from jaxinfra.config import Config, ConfigError, DataError, LayerConfig, ModelConfig
from jaxinfra.interop import export, hf, pretrained, same_model

LLAMA = GOLDEN / "llama3"
V = 89


def begin(source, model, layout):
    with jax.set_mesh(layout.mesh):
        return source.begin(model, layout=layout, dtype=np.float32)


def test_a_published_model_becomes_the_first_parameters():
    source, layout = pretrained.open_source(str(LLAMA)), layout_of()
    weights, told = begin(source, source.model, layout)
    with jax.set_mesh(layout.mesh):
        expected = read(hf.open_folder(LLAMA), layout)
    assert jax.tree.all(jax.tree.map(np.array_equal, weights, expected))
    assert told == f"parameters from {LLAMA}: 16,832"


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_new_ids_begin_at_the_mean_and_padding_at_zero(sizes):
    source, layout = pretrained.open_source(str(LLAMA)), layout_of(**sizes)
    larger = dataclasses.replace(source.model, vocab_size=V + 4)
    weights, told = begin(source, larger, layout)
    table_VD = np.array(weights["embedding"])
    old_VD = np.array(begin(source, source.model, layout_of())[0]["embedding"])
    np.testing.assert_array_equal(table_VD[:V], old_VD)
    mean_D = old_VD.mean(axis=0)
    np.testing.assert_allclose(table_VD[V : V + 4], [mean_D] * 4, rtol=1e-5, atol=1e-7)
    assert not table_VD[V + 4 :].any()
    assert told.endswith("4 new ids begin at the mean of the others")


def test_ids_that_are_not_wanted_are_cut():
    source, layout = pretrained.open_source(str(LLAMA)), layout_of()
    smaller = dataclasses.replace(source.model, vocab_size=V - 9)
    weights, told = begin(source, smaller, layout)
    assert weights["embedding"].shape == (V - 9, source.model.width)
    assert told.endswith("the last 9 ids are cut")


def test_another_model_is_refused_with_the_keys_that_differ():
    source = pretrained.open_source(str(LLAMA))
    other = dataclasses.replace(source.model, width=64, repeats=3, norm_eps=1e-5)
    with pytest.raises(ConfigError) as raised:
        begin(source, other, layout_of())
    for part in (
        "3 layers against 2",
        "model.width=64 against 32",
        "--init.model true",
    ):
        assert part in str(raised.value)
    assert "dropout" not in str(raised.value)


def test_the_model_of_a_source_is_taken_but_for_what_only_training_reads():
    source = pretrained.open_source(str(LLAMA))
    mine = ModelConfig(width=8, dropout=0.1, document_mask=False)
    adopted = source.adopt(Config(name="x", model=mine)).model
    assert same_model.differences(adopted, source.model) == []
    assert (adopted.dropout, adopted.document_mask) == (0.1, False)
    assert adopted.vocab_size == V
    stated = dataclasses.replace(mine, vocab_size=100)
    assert source.adopt(Config(name="x", model=stated)).model.vocab_size == 100


def test_a_run_folder_of_a_published_model_gives_the_same_logits(tmp_path):
    """HF -> run -> HF: on another mesh, by RUN and RUN@STEP, in the grouping of layers
    that a config may have."""
    source, layout = pretrained.open_source(str(LLAMA)), layout_of(fsdp=2, tensor=2)
    with jax.set_mesh(layout.mesh):
        weights = source.load(layout=layout, dtype=np.float32)
        export.write_run(
            tmp_path / "run", weights, source.model, tokenizer=None, files={}
        )
    one = layout_of()
    for path in (tmp_path / "run", f"{tmp_path / 'run'}@0"):
        again = pretrained.open_source(str(path))
        assert again.model == source.model
        with jax.set_mesh(one.mesh):
            loaded = again.load(layout=one, dtype=np.float32)
            logits = logits_of(LLAMA, again.model, loaded, one)
        assert difference(LLAMA, logits) <= AS_TORCH
    with pytest.raises(ConfigError, match="is there already"):
        export.write_run(
            tmp_path / "run", weights, source.model, tokenizer=None, files={}
        )


def test_layers_may_be_grouped_otherwise_than_the_source_does():
    source, layout = pretrained.open_source(str(LLAMA)), layout_of()
    layer = LayerConfig()
    flat = dataclasses.replace(
        source.model, prefix=(layer,), pattern=(layer,), repeats=1
    )
    weights, _ = begin(source, flat, layout)
    with jax.set_mesh(layout.mesh):
        logits = logits_of(LLAMA, flat, weights, layout)
    assert difference(LLAMA, logits) <= AS_TORCH


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("aaaa", ("", "a", 4, "")),
        ("ababab", ("", "ab", 3, "")),
        ("aaaaabaaaaabaa", ("", "aaaaab", 2, "aa")),  # Gemma 3, with a remainder
        ("baaaa", ("b", "a", 4, "")),
        ("ab", ("", "ab", 1, "")),
    ],
)
def test_layers_are_grouped_so_that_the_fewest_stand_alone(layers, expected):
    kinds = {"a": LayerConfig(window=8), "b": LayerConfig()}
    made = same_model.stack([kinds[name] for name in layers])
    as_layers = lambda names: tuple(kinds[name] for name in names)
    prefix, pattern, repeats, suffix = expected
    assert made == {
        "prefix": as_layers(prefix),
        "pattern": as_layers(pattern),
        "repeats": repeats,
        "suffix": as_layers(suffix),
    }


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    source, layout = pretrained.open_source(str(LLAMA)), layout_of()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_params", full)
    with jax.set_mesh(layout.mesh):
        weights = source.load(layout=layout, dtype=np.float32)
    with pytest.raises(DataError, match="No space left on device"):
        export.write_published(tmp_path / "out", weights, source.model, files={})
    assert list(tmp_path.iterdir()) == []
