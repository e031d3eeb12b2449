"""Run as a program, with libtpu: what pipelines cost, as its compiler says.

    python pipeline_memory.py RESULTS.json [--budget SECS] [--hlo FOLDER] [--only NAME]

Compiles the gradient of one step for 8 v5p chips in one pipeline, by every schedule and
by plain autodiff of a GPipe loop: 80 layers of Llama-3-8B's size (10 a stage), rows of
4096 tokens, one a microbatch. Writes bytes of arguments, results and temporaries; a
case that RESULTS.json has is not run again.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import time
from typing import NamedTuple

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import program_flops  # beside this file
from jax.experimental import topologies

import jaxinfra as ji
from jaxinfra import compiler_options, params, precision, sharding
from jaxinfra.models import transformer
from jaxinfra.ops import attention, loss, seam
from jaxinfra.parallel import pipeline, schedules
from jaxinfra.train import accumulation, objective, pipelined

STAGES, LENGTH, VOCAB = 8, 4096, 128_256
MODEL = ji.ModelConfig(
    vocab_size=VOCAB,
    width=4096,
    ffn_width=14_336,
    num_heads=32,
    num_kv_heads=8,
    repeats=10 * STAGES,
    tied=False,
)
# Those of the target, but for the wide VMEM, which takes most of a compiler's time and
# changes next to nothing of memory.
OPTIONS = compiler_options.for_device("TPU v5", "xla_tpu_scoped_vmem_limit_kib=")


class Case(NamedTuple):
    """How the 80 layers are pipelined."""

    schedule: str
    virtual: int = 1
    microbatches: int = 32
    recompute: bool = False
    remat: str = "full"
    is_balanced: bool = True


# In the order of their worth.
CASES = {
    "1f1b": Case("1f1b"),
    "1f1b, not balanced": Case("1f1b", is_balanced=False),
    "1f1b, recomputed": Case("1f1b", recompute=True),
    "gpipe by autodiff": Case("autodiff"),
    "gpipe": Case("gpipe"),
    "gpipe, recomputed": Case("gpipe", recompute=True),
    "1f1b, 64 microbatches": Case("1f1b", microbatches=64),
    "1f1b, recomputed, 64 microbatches": Case("1f1b", microbatches=64, recompute=True),
    "interleaved 2": Case("interleaved", virtual=2),
    "zero_bubble": Case("zero_bubble"),
    "1f1b, recomputed, remat none": Case("1f1b", recompute=True, remat="none"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--hlo", type=pathlib.Path, help="where programs are kept")
    args = parser.parse_args()
    found = json.loads(args.results.read_text()) if args.results.exists() else {}
    results = found.get("cases", {})
    began = time.monotonic()
    for name, case in CASES.items():
        if name not in args.only:
            continue
        if name in results or time.monotonic() - began > args.budget:
            continue
        results[name], text = compiled(case)
        print(name, results[name], flush=True)
        args.results.write_text(json.dumps(compared(results), indent=1) + "\n")
        if args.hlo:
            (args.hlo / f"{name}.hlo").write_text(text)


def compared(cases: dict) -> dict:
    """The cases, and what temporaries are of one another."""
    size = {name: case["temporaries_gb"] for name, case in cases.items()}
    found: dict = {"cases": cases}
    for form in ("", ", recomputed"):
        ratios = {
            "over autodiff": (f"1f1b{form}", "gpipe by autodiff"),
            "over gpipe": (f"1f1b{form}", f"gpipe{form}"),
            "over not balanced": (f"1f1b{form}", f"1f1b{form}, not balanced"),
            "64 over 32": (f"1f1b{form}, 64 microbatches", f"1f1b{form}"),
        }
        found[f"1f1b{form}"] = {
            name: size[a] / size[b]
            for name, (a, b) in ratios.items()
            if a in size and b in size
        }
    return found


def compiled(case: Case):
    """(what the compiler says of the gradient of one step, its program)."""
    schedule, virtual, microbatches, recompute, remat, is_balanced = case
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
    mesh = ji.make_mesh({"pipeline": STAGES}, devices=topology.devices)
    layout, policy = ji.make_layout(mesh, zero=1), precision.policy("bfloat16")

    def model_of(rules):
        ops = seam.Ops(seam.make_einsum(policy, rules), attention.make_attend(rules))
        return transformer.make_model(
            MODEL, ops=ops, policy=policy, rules=rules, remat=remat
        )

    with jax.set_mesh(mesh):
        model = model_of(layout.params)
        weights = params.abstract(model.specs, layout, layout.params, jnp.float32)
        place = jax.NamedSharding(mesh, ji.spec(layout.params, "batch"))
        of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        shape = (microbatches, LENGTH + 1)
        batch = objective.Rows(
            of(jnp.int32, *shape), of(jnp.int32, *shape), of(jnp.uint32, shape[0])
        )
        loss_config = loss.LossConfig(
            vocab_size=VOCAB, policy=policy, rules=layout.params
        )
        if schedule == "autodiff":
            table = None
            inner = model_of(pipeline.inside(layout.params))
            grad_fn = objective.grad_of(
                by_autodiff(model, inner, loss_config, layout, microbatches, remat)
            )
        else:
            table = schedules.make(
                schedule, stages=STAGES, virtual=virtual, microbatches=microbatches
            )
            grad_fn = pipelined.make_pipelined(
                model_of,
                MODEL,
                loss_config,
                layout=layout,
                schedule=schedules.balanced(table) if is_balanced else table,
                remat=remat,
                recompute=recompute,
            ).grad_fn
        lowered = jax.jit(grad_fn).lower(weights, (), batch, None)
        began = time.monotonic()
        program = lowered.compile(compiler_options=OPTIONS)
    memory = program.memory_analysis()
    figures = {
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "results_gb": memory.output_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "compile_secs": time.monotonic() - began,
        "jax": jax.__version__,
    }
    text = program.as_text()
    if table is not None:
        often = microbatches / table.ticks
        shares = dict.fromkeys(("forward", "backward", "weight"), virtual * often)
        shares |= dict.fromkeys(("enter", "leave"), often)
        figures["matmul_flops"] = program_flops.matmul_flops(text, shares)
        figures["over_schedule"] = figures["matmul_flops"] / implied_flops(case)
    return figures, text


def implied_flops(case: Case) -> float:
    """Matmul FLOPs a device that the schedule means, attention's own left out: a layer
    forward, once more where stages are recomputed, and twice back; with full remat once
    more, but for its last matmul, whose result no gradient needs. The head's part of a
    stage, three times."""
    D, F, H = MODEL.width, MODEL.ffn_width, MODEL.head_width
    heads = 2 * MODEL.num_heads + 2 * MODEL.num_kv_heads
    layer = 2 * LENGTH * (D * H * heads + 3 * D * F)
    passes = (3 + case.recompute) * layer
    if case.remat == "full":
        passes += layer - 2 * LENGTH * D * F
    head = 3 * 2 * LENGTH * D * VOCAB / STAGES
    return case.microbatches * (MODEL.repeats / STAGES * passes + head)


def by_autodiff(model, inner, loss_config, layout, microbatches, remat):
    """GPipe as a loop of forward passes that jax differentiates, each layer
    rematerialised: how pipelines in JAX are mostly written. Embedding and head are
    outside the loop, over all microbatches."""
    assert remat == "full"
    rules, ticks = layout.params, microbatches + STAGES - 1

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x_BTD, weights, context):
        return inner.block(weights, x_BTD, context, MODEL.pattern[0], 0, None)[0]

    def stages(weights, x_MBTD, positions_MBT, segments_MBT):
        stage = jax.lax.axis_index("pipeline")
        take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)

        def tick(x_BTD, t):
            first = take(x_MBTD, jnp.minimum(t, microbatches - 1))
            m = jnp.clip(t - stage, 0, microbatches - 1)
            context = inner.prepare(
                seam.Context(take(positions_MBT, m), take(segments_MBT, m))
            )
            x_BTD = jnp.where(stage == 0, first, x_BTD)
            y_BTD, _ = jax.lax.scan(
                lambda x, w: (layer(x, w, context), None), x_BTD, weights
            )
            pairs = [(i, (i + 1) % STAGES) for i in range(STAGES)]
            return jax.lax.ppermute(y_BTD, "pipeline", pairs), y_BTD

        _, y = jax.lax.scan(tick, jnp.zeros_like(x_MBTD[0]), jnp.arange(ticks))
        return y[None, STAGES - 1 :]

    def loss_fn(weights, model_state, batch, key):
        t = objective.make_targets(batch.tokens_BT1, batch.segments_BT1, rules)
        context = model.prepare(seam.Context(t.positions_BT, t.segments_BT))
        x = model.embed(weights, t.tokens_BT, context)
        parts = accumulation.split((x, t.positions_BT, t.segments_BT), microbatches)
        rows = jax.P(None, pipeline.ROW_AXES)
        y_SMBTD = jax.shard_map(
            stages,
            in_specs=(jax.P("pipeline"), rows, rows, rows),
            out_specs=jax.P("pipeline", *rows),
            axis_names=set(pipeline.MANUAL),
            check_vma=False,
        )(weights["pattern"][0], *parts)
        is_last = (jnp.arange(STAGES) == STAGES - 1)[:, None, None, None, None]
        y = jnp.sum(jnp.where(is_last, y_SMBTD, 0), axis=0, dtype=y_SMBTD.dtype)
        y = jax.lax.reshape(
            jnp.swapaxes(y, 0, 1),  # as accumulation.split had the rows
            x.shape,
            out_sharding=sharding.spec(rules, "batch", "length", "width"),
        )
        h_BTD, head_VD = model.unembed(weights, y)
        sums = loss.cross_entropy(
            h_BTD, head_VD, t.targets_BT, t.weights_BT, loss_config
        )
        return sums.nll, objective.Aux(jnp.sum(t.weights_BT), {})

    return loss_fn


if __name__ == "__main__":
    main()
