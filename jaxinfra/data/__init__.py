"""Data, from text to the global arrays of a training step.

The way of an item through the files:

    sources    text and JSONL files -> documents
    prepare    documents -> train and held-out, shuffled once, encoded; a data set
               folder, written whole or not at all
    tokenizer  text <-> ids
    shards     the folder, opened as memory maps, checked byte by byte
    packing    shards -> numbered rows of T + 1 tokens, with a segment beside each token
    order      turn in an epoch -> row, by a permutation that is computed, not stored
    batches    step -> rows -> HostBatch; what training may resume from
    device     HostBatch -> global `jax.Array`s, ahead of time; their digest

What a user can put right is a `config.DataError`.

The folder. `dataset.json` describes it; `train-00000.tokens.npy` holds ids, document
after document, each ended by the tokenizer's EOD id, and `train-00000.lengths.npy` the
tokens of each document; `held_out-...` the same of what is never trained on. Anyone
opens them with `np.load`. `shards` documents every key.

A row. Row i of a shard is `tokens[i * T : i * T + T + 1]`: a slice, so no plan is
stored and the row length is chosen when training starts. Segments tell apart the
documents in a row; 0 is padding. `packing` has the exact rule.

A batch. Global row g = step * batch_size + position; (epoch, turn) = divmod(g, rows);
the row is the epoch's permutation of the turn. So the batch of a step is a pure
function of (seed, data set, packing, step): the same on any number of hosts, on any
mesh and after any restart. `batches` defines every index.

The digest. `Dataset.digest` is the sha256 of `dataset.json`, which holds a checksum of
every file: it names the bytes. `Stream.identity()` holds it and goes to the checkpoint.
`device.digest` hashes a batch inside the jitted step, so that rows in the wrong place
show as well as wrong rows.

Only `device` imports jax: preparing and checking data needs numpy alone.
"""
