"""Data, from text to the global arrays of a training step.

The way of an item through the files:

    sources    files -> documents; `readers` opens tables and compressed files
    prepare    documents -> held out or shuffled (`splits`), encoded by `recipes`; much
               text in `parts`, a process each, from `spans` of the files or by `relay`
    writer     ids -> a data set folder, written whole or not at all
    tokenizer  text <-> ids
    shards     the folder, opened as memory maps, checked byte by byte
    packing    shards -> numbered rows of T + 1 tokens, with a segment beside each token
    order      turn in an epoch -> row, by a permutation that is computed, not stored
    batches    step -> rows -> Batch; what training may resume from
    device     host arrays -> global `jax.Array`s, ahead of time; their digest

Beside the way: `cleaning` and `duplicates` leave documents out; `tokenizer_files` reads
the tokenizers of others, `tokenizer_training` makes one of a corpus; `chat` and
`chat_template` make documents of conversations, with answers alone as targets;
`megatron` takes the ids of a Megatron data set.

By URL (extra `remote`): `urls` names the schemes, `filesystems` opens them through
fsspec, `patience` tries again what may pass, and `storage` reads: texts for `sources`,
and whole or in part the files of a data set for `remote_file`, which checks every block
by the data set's own sums and keeps it in `block_cache`.

Not text: `examples` makes batches of labelled arrays, in the same words and by the same
`order`, for a task of one's own (`jaxinfra.tasks`); `idx` reads the files of MNIST and
its kin.

What a user can put right is a `config.DataError`.

The folder. `dataset.json` describes it; `train-00000.tokens.npy` holds ids, document
after document, each ended by the tokenizer's EOD id, and `train-00000.lengths.npy` the
tokens of each document; `held_out-...` the same of what is never trained on. Where not
every token is a target, `train-00000.mask.npy` says which are. Anyone opens them with
`np.load`. `shards` documents every key.

A tokenizer lies whole in `dataset.json`, with its policy: which id ends a document,
and which begins it, if any. Raw text never becomes a special token: "<|endoftext|>" in
a document is letters and signs. Chat templates write special tokens; the messages that
they are given do not.

A batch is a pure function of (seed, data set, packing, step): the same on any number of
hosts, on any mesh and after any restart. `packing` defines rows, `batches` every index.

The digest. `Dataset.digest` is the sha256 of `dataset.json`, which holds a checksum of
every file: it names the bytes. `Stream.identity()` holds it and goes to the checkpoint.
`digests.digest` hashes a batch inside the jitted step, so that rows in the wrong place
show as well as wrong rows.

Only `device`, `digests` import jax: preparing and checking data needs numpy alone, and
tokenizers from files the extra hf.
"""
