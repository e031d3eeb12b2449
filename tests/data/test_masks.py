"""Which tokens count as targets: from the disk to the weights of the loss."""

import json

import jax
import numpy as np
import pytest

from jaxinfra.config import DataError
from jaxinfra.data import device, digests, shards, writer
from jaxinfra.data.batches import make_evaluation, make_stream
from jaxinfra.data.packing import Rows
from jaxinfra.data.tokenizer import ByteTokenizer
from jaxinfra.mesh import make_mesh
from jaxinfra.sharding import make_layout
from jaxinfra.train import objective

LENGTHS = [7, 31, 3, 19, 64, 1, 11]
LENGTH, BATCH_SIZE = 6, 4


def documents():
    rng = np.random.default_rng(0)
    ids = [np.append(rng.integers(1, 256, n - 1), 256) for n in LENGTHS]
    return ids, [rng.integers(0, 2, n).astype(np.uint8) for n in LENGTHS]


@pytest.fixture
def write(tmp_path):
    def write(name, *, has_masks=True, flip=None):
        ids, masks = documents()
        if flip is not None:
            masks[flip][0] ^= 1
        content = writer.SplitContent(
            documents=ids, text_bytes=9, masks=masks if has_masks else None
        )
        return writer.write_dataset(
            tmp_path / name,
            tokenizer=ByteTokenizer(),
            splits={"train": content},
            shard_tokens=40,
        )

    return write


def test_a_mask_lies_beside_the_tokens_of_each_shard(write):
    data = write("a")
    _, masks = documents()
    found = [np.load(f) for f in sorted(data.folder.glob("train-*.mask.npy"))]
    assert np.concatenate(found).tolist() == np.concatenate(masks).tolist()
    assert [f.size for f in found] == [
        s.tokens.size for s in data.split("train").shards
    ]
    assert all(f.dtype == np.uint8 for f in found)


def test_a_data_set_without_masks_is_what_it_was(write):
    data = write("a", has_masks=False)
    manifest = json.loads((data.folder / "dataset.json").read_text())
    assert manifest["splits"]["train"]["has_mask"] is False
    assert "mask_checksum" not in manifest["splits"]["train"]["shards"][0]
    assert not [*data.folder.glob("*.mask.npy")]
    stream = make_stream(data.split("train"), length=LENGTH, batch_size=2, seed=0)
    assert stream.batch(0).weights_BT1 is None
    assert (
        make_evaluation(data.split("train"), length=LENGTH, batch_size=1000)
        .batch(0)
        .weights_BT1
        is None
    )


def test_rows_carry_the_weight_of_each_token(write):
    split = write("a").split("train")
    packing = Rows(split, length=LENGTH)
    rows = packing.gather(np.arange(packing.num_rows))
    expected = []
    for shard in split.shards:
        for start in range(0, shard.tokens.size - 1, LENGTH):
            row = shard.mask[start : start + LENGTH + 1].tolist()
            expected.append(row + [0] * (LENGTH + 1 - len(row)))
    assert rows.weights_BT1.tolist() == expected
    assert rows.weights_BT1.dtype == np.uint8
    order = np.random.default_rng(0).permutation(packing.num_rows)
    assert np.array_equal(packing.gather(order).weights_BT1, rows.weights_BT1[order])
    plain = Rows(write("b", has_masks=False).split("train"), length=LENGTH)
    for ours, theirs in zip(rows[:2], plain.gather(np.arange(plain.num_rows))[:2]):
        assert np.array_equal(ours, theirs)


def test_bits_a_byte_of_text_are_told_only_where_all_of_it_counts(write):
    def bytes_per_token(data):
        split = data.split("train")
        return make_evaluation(split, length=LENGTH, batch_size=9).bytes_per_token

    assert bytes_per_token(write("a")) is None
    assert bytes_per_token(write("b", has_masks=False)) == 9 / sum(LENGTHS)


def test_the_last_evaluation_batch_is_filled_up_with_weight_0(write):
    split = write("a").split("train")
    evaluation = make_evaluation(split, length=LENGTH, batch_size=1000)
    num_rows = evaluation.rows.num_rows
    weights = evaluation.batch(0).weights_BT1
    assert not weights[num_rows:].any()
    assert weights[:num_rows].sum() > 0


def test_the_identity_of_a_stream_and_the_digest_of_a_batch_hold_the_mask(write):
    def stream(data):
        return make_stream(data.split("train"), length=LENGTH, batch_size=64, seed=0)

    first, flipped = stream(write("a")), stream(write("b", flip=1))
    assert first.identity() != flipped.identity()
    digest = jax.jit(digests.digest)
    assert int(digest(first.batch(0))) != int(digest(flipped.batch(0)))
    plain = stream(write("c", has_masks=False))
    assert int(digest(first.batch(0).per_token[:2])) == int(digest(plain.batch(0)))


def test_a_mask_that_is_damaged_or_missing_is_found(write):
    folder = write("a").folder
    path = folder / "train-00001.mask.npy"
    good = path.read_bytes()
    for place in (0, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"train-00001.mask.npy"):
            shards.open_dataset(folder)
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=r"train-00001.mask.npy"):
        shards.open_dataset(folder, verify=False)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001.mask.npy cannot be read"):
        shards.open_dataset(folder, verify=False)


def test_a_weight_is_0_or_1(tmp_path):
    content = writer.SplitContent(
        documents=[np.array([5, 256])], text_bytes=1, masks=[np.array([0, 2])]
    )
    data = writer.write_dataset(
        tmp_path / "a",
        tokenizer=ByteTokenizer(),
        splits={"train": content},
        shard_tokens=9,
    )
    assert shards.verify_dataset(data) == [
        "train-00000.mask.npy has weights that are not 0 or 1"
    ]


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["splits"]["train"].update(has_mask=False),
        lambda m: m["splits"]["train"]["shards"][0].pop("mask_checksum"),
        lambda m: m["splits"]["train"]["shards"][0].update(mask_file="../a.mask.npy"),
    ],
)
def test_the_keys_of_a_mask_are_strict(write, edit):
    path = write("a").folder / shards.MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="exactly the keys"):
        shards.open_dataset(path.parent)


def test_a_target_counts_by_the_weight_of_its_own_token(write):
    split = write("a").split("train")
    stream = make_stream(split, length=LENGTH, batch_size=BATCH_SIZE, seed=0)
    layout = make_layout(make_mesh({"data": 2}, devices=jax.devices()[:2]), zero=3)
    place = jax.NamedSharding(layout.mesh, jax.P(("data", "fsdp"), None))
    with jax.set_mesh(layout.mesh):
        batch = device.to_device(stream.batch, 1, batch_size=BATCH_SIZE, sharding=place)
        rows = objective.numbered(batch, layout.params)
        targets = [
            objective.make_targets(
                rows.tokens_BT1, rows.segments_BT1, layout.params, weights
            ).weights_BT
            for weights in (rows.weights_BT1, None)
        ]
    host = stream.batch(1)
    ours, all_of_them = map(np.asarray, targets)
    assert ours.dtype == np.float32
    assert np.array_equal(ours, all_of_them * host.weights_BT1[:, 1:])
    assert 0 < ours.sum() < all_of_them.sum()
