"""Full fine-tuning and QLoRA on the same tokens, for `bench.py qlora`.

    python scripts/qlora_runs.py SOURCE              all that is not in the results
    python scripts/qlora_runs.py SOURCE qlora 1e-3   kind, peak learning rate
    python scripts/qlora_runs.py SOURCE merged       checks adapters that are trained

SOURCE is a published model (a folder, a .gguf file or a run); its new domain is the
shipped text in passages of 1,000 tokens, of which every tenth is held out. Runs are
those of scripts/train.py in the system's temporary folder, saved every 20 steps: what
was cut short goes on there. Results go to scripts/results/qlora.json.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "qlora.json"
STEPS, ROWS, LENGTH, PASSAGE = 100, 4, 64, 1000
EVAL_BATCHES, EVAL_ROWS = 6, 8
WORK = pathlib.Path(tempfile.gettempdir()) / "jaxinfra-bench" / "qlora"
# Of the logits' standard deviation, in float64, where sums in another order make 2e-13.
# In float32 they make 2e-5 to 2e-4: some models make much of a last bit.
MERGED = 1e-9
# Of an array's largest value: float32 rounds the base, the pair's product, their sum.
ROUNDED = 2.0**-23
_LORA = ["--lora.rank", "16", "--lora.alpha", "32", "--lora.base", "nf4"]
# With moments in 8 bits, as QLoRA has them, twice the rank takes as many bytes.
_LORA += ["--lora.group", "32", "--optimizer.moments", "8bit"]
# Kind -> (settings, peak learning rates).
KINDS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "full": ([], (5e-5, 1e-4, 2e-4)),
    "qlora": (_LORA, (1e-3, 2e-3, 4e-3)),
}


def main(argv: list[str]) -> int:
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    source, *one = argv
    wanted = [(kind, rate) for kind, (_, rates) in KINDS.items() for rate in rates]
    if one == ["merged"]:
        for rate in KINDS["qlora"][1]:
            _record("qlora", rate, {"merged": _merged(source, _folder("qlora", rate))})
        return 0
    if one:
        wanted = [(one[0], float(one[1]))]
    for kind, rate in wanted:
        results = _results()
        if f"{rate:g}" in results.get(kind, {}).get("held_out_nats", {}):
            continue
        data = WORK / "data"
        if not (data / "dataset.json").is_file():
            _write_passages(source, data)
        if "before" not in results:
            _write(results | {"before": _before(source, data)})
        _record(kind, rate, run(source, data, _folder(kind, rate), kind, rate))
    return 0


def run(
    source: str, data: pathlib.Path, folder: pathlib.Path, kind: str, rate: float
) -> dict[str, Any]:
    """Held-out nats a token after the last step; bytes of what is trained and of its
    moments; of adapters, how far merged logits are off."""
    settings = {
        "run.dir": folder,
        "init.from": source,
        "init.model": "true",
        "data.path": data,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": f"{rate:g}",
        "optimizer.warmup_steps": 5,
        "optimizer.weight_decay": 0,
        "train.steps": STEPS,
        "train.batch_size": ROWS,
        "train.length": LENGTH,
        "train.save_every": 20,
        "checkpoint.keep": 1,
        "eval.every": STEPS,
        "eval.batches": EVAL_BATCHES,
        "eval.batch_size": EVAL_ROWS,
        "sample.tokens": 0,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    command = [sys.executable, ROOT / "scripts" / "train.py", *words, *KINDS[kind][0]]
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    sizes = [lines[0][f"memory/{part}_bytes"] for part in ("params", "opt")]
    found: dict[str, Any] = {
        "held_out_nats": lines[-1]["eval/loss"],
        "trained_and_moments_bytes": sum(sizes),
    }
    if kind == "qlora":
        found["merged"] = _merged(source, folder)
    return found


def _before(source: str, data: pathlib.Path) -> float:
    """Nats a token of the model as it comes, on the same rows."""
    import jax

    from jaxinfra import experiment, options, tasks
    from jaxinfra.config import Config
    from jaxinfra.data import shards
    from jaxinfra.interop import pretrained
    from jaxinfra.train import evaluate

    sizes = ["--train.length", str(LENGTH), "--eval.batch_size", str(EVAL_ROWS)]
    config = options.parse([*sizes, "--sample.tokens", "0"], Config(name="qlora"))
    opened, held_out = pretrained.open_source(source), shards.open_dataset(data)
    config = opened.adopt(config)
    config = experiment.resolve(config, held_out.tokenizer.vocab_size)

    def text(*of: Any) -> tasks.Task:
        return tasks.text(*of, data={"": held_out})

    exp = experiment.build(config, jax.devices()[:1], get_task=text)
    with jax.set_mesh(exp.layout.mesh):
        weights = opened.load(layout=exp.layout, dtype=exp.policy.param)
        rows = evaluate.eval_set(
            exp.task.eval_sets["held_out"],
            batches=EVAL_BATCHES,
            sharding=experiment.batch_sharding(exp.layout),
        )
        found = evaluate.evaluate(exp.eval_step, {"held_out": rows}, weights, ())
    return found["eval/held_out/loss"]


def _merged(source: str, folder: pathlib.Path) -> dict[str, float]:
    """Logits of the base beside its adapters against those of the merged arrays.

    Both in float32, and in float64 with float32's parameters: what is left there would
    be a defect, and how far either is from there is float32's own rounding.
    """
    import jax
    import numpy as np

    from jaxinfra import mesh, precision, sharding
    from jaxinfra.generate import score
    from jaxinfra.interop import pretrained, tuned_runs

    layout = sharding.make_layout(mesh.make_mesh({}, devices=jax.devices()[:1]))
    base, tuned = map(pretrained.open_source, (source, str(folder)))
    ids_BT = np.random.default_rng(0).integers(0, base.model.vocab_size, (2, LENGTH))

    def logits(weights: Any, policy: precision.Policy) -> np.ndarray:
        of = score.make_logits(base.model, policy=policy, layout=layout)
        return of(weights, ids_BT, np.empty((*ids_BT.shape, base.model.vocab_size)))

    policy = precision.policy("float32")
    with jax.set_mesh(layout.mesh):
        beside = tuned_runs.by_row(base, [str(folder)], [0, 0], layout=layout)
        merged = tuned.load(layout=layout, dtype=policy.param)
        apart_BTV, one_BTV = logits(beside, policy), logits(merged, policy)
        with _float64() as policy:
            beside = jax.tree.map(
                lambda x: x.astype(float) if x.dtype == np.float32 else x, beside
            )
            exact = _merge(beside)
            exact_apart_BTV = logits(beside, policy)
            exact_one_BTV = logits(exact, policy)
            off = lambda x, y: float(abs(x - y).max() / abs(x).max())
            rounded = max(jax.tree.leaves(jax.tree.map(off, exact, merged)))
    largest = lambda x, y: float(np.abs(x - y).max())
    return {
        "largest_difference": largest(apart_BTV, one_BTV),
        "largest_difference_in_float64": largest(exact_apart_BTV, exact_one_BTV),
        "beside_from_float64": largest(apart_BTV, exact_apart_BTV),
        "merged_from_float64": largest(one_BTV, exact_one_BTV),
        "logits_standard_deviation": float(exact_one_BTV.std()),
        "arrays_from_float64": rounded,
    }


def _merge(beside: Any) -> Any:
    """Parameters with the adapter of row 0 merged, by the package's own `merge`."""
    import jax

    from jaxinfra.quant import arrays
    from jaxinfra.tune import lora

    def pair(w: Any) -> Any:
        if not isinstance(w, lora.LowRankByRow):
            return w
        dim = w.ids_B.ndim - 1  # after layers
        a, b = (jax.lax.index_in_dim(x, 0, dim, keepdims=False) for x in (w.a, w.b))
        base = arrays.dequantize_tree(w.base, a.dtype)
        return lora.LowRank(base, a, b, 1.0, w.num_experts_dims)

    is_wrapped = lambda w: isinstance(w, lora.LowRankByRow)
    return lora.merge(jax.tree.map(pair, beside, is_leaf=is_wrapped))


@contextlib.contextmanager
def _float64() -> Iterator[Any]:
    """The policy in which the package computes in float64 where it says float32, as it
    does within: in modules that are loaded and for programs that are made there."""
    import jax
    import jax.numpy as jnp

    from jaxinfra import precision

    class Wide:
        float32 = jnp.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(jnp, name)

    ours = [m for name, m in sys.modules.items() if name.startswith("jaxinfra.")]
    dtypes = ("param", "compute", "reduce", "accumulate", "optimizer_state")
    with jax.enable_x64(True), contextlib.ExitStack() as stack:
        for module in ours:
            if getattr(module, "jnp", None) is jnp:
                stack.enter_context(mock.patch.object(module, "jnp", Wide()))
        yield precision.Policy(**dict.fromkeys(dtypes, jnp.dtype("float64")))


def _write_passages(source: str, folder: pathlib.Path) -> None:
    """The shipped text as a data set, in the model's ids."""
    import numpy as np

    from jaxinfra.data import prepare, writer
    from jaxinfra.interop import pretrained, tokenizers_of

    tokenizer = tokenizers_of.open_tokenizer(
        source, pretrained.open_source(source).model
    )
    text = pathlib.Path(prepare.CORPORA["shakespeare"]).read_text()
    ids_N = np.concatenate(list(tokenizer.encode_batch([text]))).astype(np.uint16)
    passages = np.array_split(ids_N, len(ids_N) // PASSAGE)
    parts = {"held_out": passages[9::10]}
    parts["train"] = [p for i, p in enumerate(passages) if i % 10 != 9]
    size = len(text.encode()) // len(passages)
    writer.write_dataset(
        folder,
        tokenizer=tokenizer,
        splits={
            name: writer.SplitContent(documents=part, text_bytes=size * len(part))
            for name, part in parts.items()
        },
        shard_tokens=10**6,
    )


def summary() -> dict[str, Any]:
    """The results, and what QLoRA reaches of full fine-tuning's gain, each at its best
    rate, from where the model in full precision begins."""
    results = _results()
    best = {kind: min(results[kind]["held_out_nats"].values()) for kind in KINDS}
    begin = results["before"]
    results["gain_nats"] = {kind: begin - nats for kind, nats in best.items()}
    results["part_of_the_gain"] = (begin - best["qlora"]) / (begin - best["full"])
    sizes = [results[kind]["trained_and_moments_bytes"] for kind in ("qlora", "full")]
    results["trained_and_moments_part"] = sizes[0] / sizes[1]
    return results


def _record(kind: str, rate: float, found: dict[str, Any]) -> None:
    """Writes a run's figures; then SystemExit if its merged logits or arrays are others
    than those of its adapters."""
    results = _results()
    entry = results.setdefault(kind, {})
    for name, value in found.items():
        if name in ("held_out_nats", "merged"):  # of each rate
            value = entry.get(name, {}) | {f"{rate:g}": value}
        entry[name] = value
    _write(results)
    if all(name in results for name in KINDS):
        _write(summary())
    print(kind, rate, entry)
    if off := found.get("merged"):
        limit = MERGED * off["logits_standard_deviation"]
        if not (
            off["largest_difference_in_float64"] <= limit
            and off["arrays_from_float64"] <= ROUNDED
        ):
            raise SystemExit(f"what is merged is off: {off}")


def _folder(kind: str, rate: float) -> pathlib.Path:
    return WORK / f"{kind}_{rate:g}_{STEPS}"


def _write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _results() -> dict[str, Any]:
    about = {"steps": STEPS, "tokens_a_step": ROWS * LENGTH}
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else about
    if any(found[key] != value for key, value in about.items()):
        raise SystemExit(f"{RESULTS} is of other settings; move it away")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
