"""Text from a model, and figures of it: a model is used here, and not trained.

| file | subject |
|---|---|
| `cache` | the cache of a layer, and the attention that reads and writes it |
| `decode` | prompts of different lengths to texts: prefill and the decoding loop |
| `sample` | logits to a token: greedy, temperature, top-k, top-p |
| `until` | texts up to a stop string |
| `rows` | what is to be scored: a text's tokens, a continuation, rolling windows |
| `score` | rows to logits, or to log-likelihoods of chosen tokens |
| `benchmarks` | perplexity, multiple choice, exact match |
| `settings` | what the command line of such a use says of devices and sampling |

The cache enters by the seam: the same model functions, with another `attend`. Scoring
needs none: it reads a row at once, with training's own attention. `rows`, `benchmarks`
and `settings` import no jax.
"""
