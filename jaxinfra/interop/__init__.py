"""Models and modules from outside, and back.

| file | subject |
|---|---|
| `pretrained` | a source of parameters: a run, a published folder, a GGUF file |
| `families` | the table of published families: their fields, their tensors' names |
| `hf_config`, `hf_fields` | `config.json` <-> `ModelConfig`, no field ignored |
| `hf` | published tensors <-> our arrays on a mesh, named by the spec tree |
| `tensorfile` | safetensors files, a tensor at a time |
| `gguf_file` | llama.cpp's files (extra `gguf`) |
| `same_model` | when two configs are one function; how layers are grouped |
| `export` | a published folder, or a run folder of one step, written whole or not |
| `checkpoints` | whole steps to Orbax and safetensors, and back |
| `tokenizers_of`, `source_text` | the tokenizer that belongs to a source |
| `lm_eval_adapter` | our models in lm-evaluation-harness (extra `eval`) |
| `flax_bridge`, `running_norm` | a user's flax module on our step |

How a published matrix becomes ours: it is [outputs, inputs], ours has its dims in the
order of its spec, and the spec's `contract` says which are inputs; layers, and experts,
are tensors of their own and dims of ours. So one function turns every tensor of every
family, and a family is a row of names. A new one needs its row in `families`, a golden
checkpoint with torch's logits in tests, and in the model only what it computes anew.

Limits: rotary scaling by yarn, dynamic or longrope, partial rotary and quantized
safetensors are refused; one process reads and writes. GGUF: llama, qwen2 and qwen3,
with byte-pair tokenizers.
"""
