"""Pure math on arrays, and the seam that every weight goes through.

| file | subject |
|---|---|
| `seam` | `Ops(einsum, attend, dispatch)`: precision and ZeRO's gathers enter here |
| `attention` | causal attention: splash, cuDNN or XLA, and the table that chooses |
| `rematerialisation` | what a layer keeps for its backward pass, and where |
| `loss` | cross-entropy in chunks that make their own gradients |
| `layers` | embedding, norms, rotary positions, feed-forward, dropout |
| `experts` | which experts a token meets, and what its row tells of that |
| `grouped` | matmuls of rows that are grouped by expert, on one device |
| `varying` | between which devices a value differs |

Arrays come first and are named with their dims: B batch, T query length, S key length,
D width, K key heads, G query heads a key head, H head width, F ffn, V vocabulary, E
experts, k of them a token, C capacity. A function that sums over a dim which a mesh
axis splits says where the result lives (`out`).
"""
