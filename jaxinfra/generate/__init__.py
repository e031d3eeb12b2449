"""Text from a model: prefill, then one token at a time against a KV cache.

| file | subject |
|---|---|
| `cache` | the cache of a layer, and the attention that reads and writes it |
| `decode` | prompts of different lengths to texts: prefill and the decoding loop |
| `sample` | logits to a token: greedy, temperature, top-k, top-p |

The cache enters by the seam: the same model functions, with another `attend`.
"""
