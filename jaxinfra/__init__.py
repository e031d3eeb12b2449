"""jaxinfra: JAX-native functional training of neural networks on TPU, GPU and CPU.

The public names below load their module when first used (PEP 562), so `import jaxinfra`
is free and loads no jax. README has them with an example; each package's docstring is
the chapter on its subject: `data`, `ops`, `models`, `train`, `checkpoint`,
`resilience`, `generate`, `tune`, `interop`.
"""

import importlib
from typing import Any

_HOMES = {
    "config": ("Config", "DataConfig", "EvalConfig", "LayerConfig", "MeshConfig",
               "ModelConfig", "OptimizerConfig", "QuantConfig", "TrainConfig",
               "CommConfig", "ConfigError"),
    "compiler_check": ("accepted_options",),
    "compiler_options": ("options_for",),
    "options": ("load_config",),
    "option_help": ("help_text",),
    "compositions": ("check_compositions",),
    "feature_checks": ("check_divisible", "check_features", "remat_names"),
    "mesh": ("make_mesh",),
    "slices": ("across_slices",),
    "sharding": ("Layout", "Rules", "make_layout", "spec"),
    "precision": ("Policy", "policy"),
    "params": ("ParamSpec", "initialize"),
    "ops.seam": ("Context", "Ops", "make_einsum"),
    "ops.attention": ("make_attend",),
    "ops.fused_attention": ("fused_attention",),
    "ops.hopper": ("grouped_on_hopper", "outer_on_hopper"),
    "ops.loss": ("LossConfig", "cross_entropy"),
    "launch.discovery": ("find_job", "with_job"),
    "parallel.context": ("make_split_attend", "row_order"),
    "parallel.expert": ("make_dispatch",),
    "parallel.schedules": ("schedule_of",),
    "quant.arrays": ("QuantizedArray", "dequantize", "quantize"),
    "models.transformer": ("Model", "make_model"),
    "data.prepare": ("prepare", "prepared"),
    "data.tokenizer_files": ("load_tokenizer",),
    "data.shards": ("open_dataset",),
    "data.char_tokenizer": ("CharTokenizer",),
    "data.tokenizer_json": ("HfTokenizer",),
    "data.batches": ("make_evaluation", "make_stream"),
    "data.mixture": ("Mixture",),
    "data.remote_folder": ("RemoteFolder",),
    "data.packing": ("Batch",),
    "data.digests": ("digest",),
    "data.device": ("prefetch", "to_device"),
    "train.profile": ("tracing",),
    "train.objective": ("Aux", "GradFn", "LossFn", "grad_of", "next_token_loss",
                        "with_row_ids"),
    "train.accumulation": ("accumulate", "accumulate_once", "accumulated"),
    "train.adafactor": ("adafactor",),
    "train.averaging": ("averaging",),
    "train.muon": ("orthogonalised_momentum",),
    "train.offload": ("check_activations", "state_on_host"),
    "train.turns": ("in_turn",),
    "ops.rematerialisation": ("rematerialised",),
    "train.routers": ("Routers",),
    "quant.recipe": ("Recipe", "make_recipe"),
    "quant.communication": ("gathered_in_few_bits", "low_bit_traffic"),
    "quant.matmul": ("low_precision_einsum",),
    "train.low_precision": ("in_low_precision", "low_precision_training"),
    "train.adam8": ("other_moments", "scale_by_adam8"),
    "train.rounding": ("apply_stochastic",),
    "train.pipelined": ("make_pipelined",),
    "train.optim": ("apply_nearest", "make_optimizer", "make_schedule"),
    "train.state": ("TrainState", "init_state", "make_shardings"),
    "train.resumption": ("newest_state",),
    "train.step": ("make_train_step",),
    "checkpoint.lifecycle": ("Checkpointer",),
    "resuming": ("as_begun", "begun", "refuse_changes", "rewind_metrics"),
    "checkpoint.restore": ("restore", "restore_latest"),
    "checkpoint.look": ("describe_checkpoint", "diff_checkpoints"),
    "checkpoint.staging": ("Staged", "copied_on_device", "cut_on_device"),
    "resilience.peers": ("compiled_by_all", "watched"),
    "remote.object_path": ("ObjectPath",),
    "remote.commits": ("object_folder",),
    "remote.lines": ("JsonParts", "rewind_parts"),
    "remote.ownership": ("acquire_object",),
    "checkpoint.partial": ("restore_part",),
    "checkpoint.read_back": ("read_back",),
    "checkpoint.retention": ("make_retain",),
    "generate.decode": ("continue_prompts", "generate_text", "make_generate"),
    "generate.rows": ("Row",),
    "generate.score": ("make_logits", "make_score"),
    "generate.until": ("make_complete",),
    "quant.aware": ("quantize_aware",),
    "tune.frozen": ("partly_frozen", "tuned_specs"),
    "interop.tuned_runs": ("read_tuned",),
    "interop.checkpoints": ("export_orbax", "export_safetensors",
                            "import_checkpoint"),
    "interop.flax_bridge": ("from_linen", "from_nnx"),
    "interop.lm_eval_adapter": ("make_lm",),
    "interop.pretrained": ("Source", "open_source"),
    "tasks": ("Task",),
    "experiment": ("Experiment", "build", "train"),
    "dry_run": ("trace",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxinfra' has no attribute {name!r}")
    module = importlib.import_module(f"jaxinfra.{_HOME[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
