"""The table of `bench.py compress`: a published model's perplexity on the last tenth of
the shipped text, its matrices rounded in every way, calibrated on the text before.

    python scripts/compression_table.py SOURCE RESULT.json [TOKENS ROWS LENGTH]

Each way is measured in the same process on the same TOKENS, and written down as soon as
it is known: what RESULT.json has is not done again, so a run may be cut short.
"""

import functools
import json
import math
import pathlib
import sys
import time
import types
from typing import Any

import compress as command  # scripts/compress.py
import jax
import numpy as np

from jaxinfra import mesh, precision, sharding
from jaxinfra.generate import score
from jaxinfra.interop import pretrained, tokenizers_of
from jaxinfra.quant import calibration
from jaxinfra.quant.compression import Compression
from jaxinfra.tune import roles

WAYS = [
    ("int8", "nearest", 0),
    ("int4", "nearest", 64),
    ("int4", "gptq", 64),
    ("int4", "awq", 64),
    ("int4", "nearest", 0),
    ("int4", "gptq", 0),
    ("int4", "awq", 0),
    ("nf4", "nearest", 64),
    ("nf4", "gptq", 64),
    ("nf4", "awq", 64),
]
TARGETS = "attention up gate down"


def table(
    source: str, result: pathlib.Path, tokens: int, rows: int, length: int
) -> dict[str, Any]:
    """Fills `result` up and returns what it holds."""
    about = {
        "model": pathlib.Path(source).name,
        "held_out_tokens": tokens,
        "calibrated_on": rows * length,
    }
    found = json.loads(result.read_text()) if result.exists() else about | {"ways": []}
    if any(found.get(key) != value for key, value in about.items()):
        raise SystemExit(f"{result} is of other settings; move it away")
    done = {(way["format"], way["method"], way["group"]) for way in found["ways"]}
    opened = pretrained.open_source(source)
    tokenizer = tokenizers_of.open_tokenizer(source, opened.model)
    texts = command.read_texts(types.SimpleNamespace(data=None, text=[]), tokenizer)
    batches = command.calibration_rows(texts.ids_N, rows, length, 1)
    policy = precision.policy("float32")
    one = jax.devices()[:1]
    layout = sharding.make_layout(mesh.make_mesh({}, devices=one))
    measure = functools.partial(
        command.perplexity,
        texts.held_out,
        tokenizer,
        score.make_score(opened.model, policy=policy, layout=layout),
        length=length,
        most=tokens,
    )

    def write() -> None:
        result.write_text(json.dumps(found, indent=1) + "\n")

    with jax.set_mesh(layout.mesh):
        model = command.model_of(opened.model, policy, layout)
        weights = opened.load(layout=layout, dtype=policy.param)
        if "perplexity" not in found:
            found["perplexity"] = measure(weights)
            found["gigabytes"] = sharding.bytes_per_device(weights) / 1e9
            write()
        matrices = tuple(roles.matrices("targets", TARGETS, model.specs))
        for form, method, group in WAYS:
            if (form, method, group) in done:
                continue
            how = Compression(
                format=form, method=method, group=group, matrices=matrices
            )
            begin = time.perf_counter()
            few, errors = calibration.compress(
                model, opened.model, weights, batches, how, layout=layout
            )
            secs = time.perf_counter() - begin
            perplexity = measure(few)
            found["ways"].append(
                {
                    "format": form,
                    "method": method,
                    "group": group,
                    "perplexity": perplexity,
                    "against": perplexity / found["perplexity"] - 1,
                    "nats_lost": math.log(perplexity / found["perplexity"]),
                    "gigabytes": sharding.bytes_per_device(few) / 1e9,
                    "secs": secs,
                }
            )
            if errors:  # measured where a method is calibrated
                mean = float(np.mean(list(errors.values())))
                found["ways"][-1]["mean_output_error"] = mean
            write()
            print(found["ways"][-1], file=sys.stderr)
    return found


if __name__ == "__main__":
    name, out, *numbers = sys.argv[1:]
    tokens, rows, length = map(int, numbers or (4096, 16, 128))
    table(name, pathlib.Path(out), tokens, rows, length)
