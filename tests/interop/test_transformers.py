"""What we write loads in stock transformers, and computes what it did before."""

import jax
import numpy as np
import pytest
from golden_checkpoints import (
    AS_TORCH,
    FAMILIES,
    GOLDEN,
    difference,
    layout_of,
)

from jaxinfra.interop import export, pretrained

pytestmark = pytest.mark.slow


def written(family, folder, dtype):
    source, layout = pretrained.open_source(str(GOLDEN / family)), layout_of()
    with jax.set_mesh(layout.mesh):
        weights = source.load(layout=layout, dtype=np.float32)
        export.write_published(
            folder, weights, source.model, family=source.family, dtype=dtype, files={}
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_same_logits_for_what_we_write(family, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    written(family, tmp_path / "model", np.float32)
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    ids = torch.from_numpy(np.load(GOLDEN / family / "ids.npy").astype(np.int64))
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    assert difference(GOLDEN / family, logits) <= AS_TORCH
