"""Every family against torch's logits, and every tensor and option made to matter."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from golden_checkpoints import (
    AS_TORCH,
    FAMILIES,
    FLOAT32,
    GOLDEN,
    difference,
    layout_of,
    logits_of,
    read,
    torch_logits,
)

from jaxinfra import params
from jaxinfra.config import LayerConfig, RopeScaling
from jaxinfra.generate import score
from jaxinfra.interop import export, hf, hf_config, same_model, tensorfile

ONE, FOUR = {}, {"fsdp": 2, "tensor": 2}
# On a mesh a family takes 1 s to compile, so all but those of most kinds are slow.
QUICK = ("gpt2", "gemma2", "qwen3_moe")
CASES = [(family, ONE) for family in FAMILIES] + [
    pytest.param(f, FOUR, marks=[] if f in QUICK else pytest.mark.slow)
    for f in FAMILIES
]


@pytest.mark.parametrize(("family", "sizes"), CASES)
def test_logits_are_those_of_torch(family, sizes):
    published, layout = hf.open_folder(GOLDEN / family), layout_of(**sizes)
    with jax.set_mesh(layout.mesh):
        weights = read(published, layout)
        logits = logits_of(GOLDEN / family, published.model, weights, layout)
    assert logits.shape == torch_logits(GOLDEN / family).shape
    assert difference(GOLDEN / family, logits) <= AS_TORCH


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_every_tensor_matters(family):
    """Each layer's part of each of our arrays, changed alone, changes the logits."""
    published, layout = hf.open_folder(GOLDEN / family), layout_of()
    with jax.set_mesh(layout.mesh):
        weights = read(published, layout)
        logits_fn = score.make_logits(published.model, policy=FLOAT32, layout=layout)
        unseen = []
        for number, (path, array) in enumerate(params.named(weights)):
            stacked = "pattern" in path
            for layer in range(array.shape[0] if stacked else 1):
                index = (layer,) if stacked else (Ellipsis,)
                host = np.array(array)
                host[index] = 1.1 * host[index] + 0.01
                leaves = jax.tree.leaves(weights)
                leaves[number] = jax.device_put(host, array.sharding)
                changed = params.unflatten(weights, leaves)
                logits = logits_of(
                    GOLDEN / family, published.model, changed, layout, logits_fn
                )
                if difference(GOLDEN / family, logits) <= 10 * AS_TORCH:
                    unseen.append((path, layer))
    # A bias of all keys alike moves each score of a query by the same amount, but for
    # rotary positions, which turn it.
    allowed = {"gpt2": "key_bias"}.get(family)
    assert [p for p in unseen if not (allowed and p[0].endswith(allowed))] == []


def other_options(model):
    """(what, the model with one setting of its function changed)."""
    change = lambda **fields: dataclasses.replace(model, **fields)
    yield "norm_eps", change(norm_eps=0.1)
    yield "norm_from_zero", change(norm_from_zero=not model.norm_from_zero)
    yield "embedding_scale", change(embedding_scale=not model.embedding_scale)
    yield "scale_dim", change(attention_scale_dim=2 * model.head_width)
    yield "attention_softcap", change(attention_softcap=model.attention_softcap + 1)
    yield "logit_softcap", change(logit_softcap=model.logit_softcap + 1)
    gated = {"swiglu": "geglu", "geglu": "swiglu", "gelu_tanh": "relu_squared"}
    yield "activation", change(activation=gated[model.activation])
    if model.positions == "rotary":
        yield "rope_theta", change(rope_theta=model.rope_theta / 2)
        linear = RopeScaling(kind="linear", factor=2.0)
        other = linear if model.rope_scaling.kind == "none" else RopeScaling()
        yield "rope_scaling", change(rope_scaling=other)
    if model.experts_per_token:
        yield "experts_per_token", change(experts_per_token=1)
        yield "renormalize", change(router_renormalize=not model.router_renormalize)
    for i, layer in enumerate(model.layers):
        layers = list(model.layers)
        window = layer.window - 1 if layer.window else 16
        layers[i] = dataclasses.replace(layer, window=window)
        if i in (0, model.num_layers - 1):
            yield f"window of layer {i}", change(**same_model.stack(layers))
        if layer.rope_theta and i == 0:
            layers[i] = LayerConfig(window=layer.window)
            yield f"rope_theta of layer {i}", change(**same_model.stack(layers))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_matters(family):
    published, layout = hf.open_folder(GOLDEN / family), layout_of()
    unseen = []
    with jax.set_mesh(layout.mesh):
        for what, model in other_options(published.model):
            weights = read(published, layout, model)
            logits = logits_of(GOLDEN / family, model, weights, layout)
            if difference(GOLDEN / family, logits) <= 10 * AS_TORCH:
                unseen.append(what)
    assert unseen == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_and_written_again_is_the_same_to_the_byte(family, tmp_path):
    published, layout = hf.open_folder(GOLDEN / family), layout_of(fsdp=2, tensor=2)
    name = published.family.model_type
    with jax.set_mesh(layout.mesh):
        weights = read(published, layout)
        shutil.rmtree(tmp_path)
        export.write_published(
            tmp_path,
            weights,
            published.model,
            family=name,
            files={},
            shard_bytes=40_000,
        )
    assert (
        tmp_path / tensorfile.INDEX
    ).is_file()  # several files, so cut in the middle
    was = tensorfile.open_folder(GOLDEN / family)
    now = tensorfile.open_folder(tmp_path)
    assert was.keys() == now.keys()
    for tensor in was:
        assert was[tensor].read().tobytes() == now[tensor].read().tobytes(), tensor
    again = hf.open_folder(tmp_path).model
    assert same_model.differences(again, published.model) == []
    assert again.vocab_size == published.model.vocab_size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_found_for_a_model(family):
    """The first that fits computes the same, if it is not the family it came from."""
    model = hf.open_folder(GOLDEN / family).model
    fields = hf_config.write_config(model)
    assert same_model.differences(hf_config.read_config(fields), model) == []
    expected = {"phi3": "llama", "llama3": "llama", "gemma3": "gemma3_text"}
    assert fields["model_type"] == expected.get(family, family)
