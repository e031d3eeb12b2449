import base64
import io
import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra import checks, options
from jaxinfra.config import ConfigError, DataError
from jaxinfra.data import prepare as preparation
from jaxinfra.data import (
    shards,
    tiktoken_ranks,
    tokenizer_files,
    tokenizer_training,
)
from jaxinfra.data import tokenizer as tokenizers_of_ours
from jaxinfra.data.tokenizer_json import HfTokenizer

tokenizers = pytest.importorskip("tokenizers")

CORPUS = preparation.CORPORA["shakespeare"].read_text(encoding="utf-8")[:150_000]
EOD = tokenizer_training.EOD
STRANGE = [
    "",
    " ",
    "  two  spaces ",
    "\n\n a\tb \r\n",
    "日本語 héllo wörld ﬁ \uff26\uff55",
    "😀👩\u200d👩\u200d👧 é e\u0301",
    "def f(x):\n    return x**2\n\n\n",
    "I'S it's WE'LL we'll 12345 1 234",
    "\u00a0nbsp\u2003em\u200bzw",
    "<|endoftext|> </s> <s> [SEP]",
]
TEXTS = [CORPUS[i : i + 997] for i in range(0, 60_000, 997)] + STRANGE
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe():
    return tokenizer_training.train_bpe([CORPUS], vocab_size=600)


@pytest.fixture
def folder(bpe, tmp_path):
    tokenizer_training.save(bpe, tmp_path)
    return tmp_path


def library(coder):
    return tokenizers.Tokenizer.from_str(coder.tokenizer_json)


def rewrite(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def edit_json(folder, edit):
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def test_a_trained_tokenizer_has_the_size_asked_for_and_ends_with_eod(bpe):
    assert bpe.vocab_size == 600
    assert bpe.eod_id == 599
    assert bpe.bos_id is None
    assert library(bpe).id_to_token(599) == EOD


def test_training_twice_gives_the_same_tokenizer(bpe):
    again = tokenizer_training.train_bpe([CORPUS], vocab_size=600)
    assert again == bpe
    assert again.digest() == bpe.digest()
    other = tokenizer_training.train_bpe([CORPUS[:-500]], vocab_size=601)
    assert other.digest() != bpe.digest()


@settings(deadline=None)
@given(ANY_TEXT)
def test_byte_pairs_decode_to_the_text_they_were_made_of(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_ids_are_those_of_the_library_in_any_batch(bpe):
    expected = [e.ids for e in library(bpe).encode_batch(TEXTS[:-1])]
    assert [i.tolist() for i in bpe.encode_batch(TEXTS[:-1])] == expected
    assert [bpe.encode(t).tolist() for t in TEXTS[:-1]] == expected
    assert bpe.encode("abc").dtype == np.uint16


def test_no_text_is_a_special_token(bpe):
    text = f"a{EOD}b"
    assert library(bpe).encode(text).ids.count(bpe.eod_id) == 1
    ids = bpe.encode(text)
    assert bpe.eod_id not in ids
    assert bpe.decode(ids) == text


def test_an_end_of_document_that_its_file_calls_ordinary_is_still_none_of_text(folder):
    edit_json(folder, lambda t: t["added_tokens"][0].update(special=False))
    coder = tokenizer_files.load_tokenizer(folder)
    assert coder.eod_id not in coder.encode(f"a{EOD}b")


def test_end_and_beginning_of_a_document_decode_to_nothing(bpe):
    coder = HfTokenizer(bpe.tokenizer_json, 600, eod_id=599, bos_id=3)
    ids = np.concatenate([[3], coder.encode("one"), [599, 3], coder.encode(" two")])
    assert coder.decode(ids) == "one two"
    # Half a character on each side of an EOD is no character.
    first, second = coder.encode("é").tolist()
    assert coder.decode(np.array([first, 599, second])) == "\ufffd\ufffd"


def test_json_gives_an_equal_tokenizer(bpe):
    again = tokenizers_of_ours.from_json(json.loads(json.dumps(bpe.to_json())))
    assert again == bpe
    assert again.encode("Juliet").tolist() == bpe.encode("Juliet").tolist()


@pytest.mark.parametrize(
    "change",
    [{"extra": 1}, {"eod_id": 600}, {"bos_id": -1}, {"bos_id": "3"}, {"vocab_size": 5}],
)
def test_json_that_is_no_hugging_face_tokenizer_is_refused(bpe, change):
    with pytest.raises(DataError):
        tokenizers_of_ours.from_json(bpe.to_json() | change)


def test_a_vocabulary_size_that_is_not_the_tokenizers_is_found_when_it_is_used(bpe):
    coder = tokenizers_of_ours.from_json(bpe.to_json() | {"vocab_size": 700})
    with pytest.raises(DataError, match=r"has 600 ids, but .* vocab_size=700"):
        coder.encode("a")


def test_half_a_surrogate_pair_is_an_error(bpe):
    with pytest.raises(DataError, match="refuses the text"):
        bpe.encode("\ud800")


def test_a_data_set_holds_its_tokenizer_and_training_texts_alone_make_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("|".join(f"{CORPUS[i : i + 500]}" for i in range(0, 20_000, 500)))
    seen = []

    def make(texts):
        seen.extend(texts)
        return tokenizer_training.train_bpe(texts, vocab_size=300)

    data = preparation.prepare(
        [path],
        tmp_path / "set",
        tokenizer=make,
        split="documents",
        held_out=0.2,
        seed=0,
        document_separator="|",
    )
    again = shards.open_dataset(tmp_path / "set")
    assert len(seen) == data.split("train").num_documents == 32
    assert again.tokenizer == data.tokenizer
    tokens = again.split("train").shards[0].tokens
    assert again.tokenizer.decode(tokens) == "".join(seen)
    assert (tokens == 299).sum() == 32


def test_a_folder_and_its_file_give_the_tokenizer_with_the_policy_beside_it(
    bpe, folder
):
    for path in (folder, folder / "tokenizer.json", str(folder)):
        assert tokenizer_files.load_tokenizer(path) == bpe
    lone = folder / "mine.json"
    lone.write_text(bpe.tokenizer_json)
    with pytest.raises(DataError, match=r"does not say which .* --eod.*endoftext"):
        tokenizer_files.load_tokenizer(lone)
    assert tokenizer_files.load_tokenizer(lone, eod=EOD) == bpe


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("tokenizer_config.json", {"eos_token": "in"}, "in"),
        ("tokenizer_config.json", {"eos_token": {"content": "in"}}, "in"),
        ("special_tokens_map.json", {"eos_token": "in"}, "in"),
        ("generation_config.json", {"eos_token_id": [70, 71]}, 70),
        ("config.json", {"eos_token_id": 71}, 71),
    ],
)
def test_what_ends_a_document_is_told_by_the_settings(folder, name, value, expected):
    (folder / "tokenizer_config.json").unlink()
    (folder / name).write_text(json.dumps(value))
    coder = tokenizer_files.load_tokenizer(folder)
    if isinstance(expected, str):
        expected = library(coder).token_to_id(expected)
    assert coder.eod_id == expected


def test_an_end_of_document_that_is_no_token_gets_a_suggestion(folder):
    with pytest.raises(DataError, match=r"data.eod='<\|endoftxt\|>' .* did you mean <"):
        tokenizer_files.load_tokenizer(folder, eod="<|endoftxt|>")


def test_a_document_begins_as_the_settings_or_the_post_processor_say(bpe, folder):
    added = library(bpe)
    added.add_special_tokens(["<s>"])
    added.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 600)]
    )
    (folder / "tokenizer.json").write_text(added.to_str())
    load = tokenizer_files.load_tokenizer
    assert load(folder).bos_id is None  # tokenizer_config.json: add_bos_token false
    rewrite(folder, eos_token=EOD)
    assert load(folder).bos_id == 600
    assert load(folder, bos="never").bos_id is None
    assert 600 not in load(folder).encode("<s>a")
    rewrite(folder, eos_token=EOD, bos_token="in", add_bos_token=True)
    assert load(folder).bos_id == added.token_to_id("in")
    rewrite(folder, eos_token=EOD, bos_token="<s>", add_bos_token=False)
    assert load(folder).bos_id is None
    assert load(folder, bos="always").bos_id == 600


def test_a_beginning_that_no_setting_names_cannot_be_asked_for(folder):
    with pytest.raises(DataError, match=r"data.bos=always, but .* names no BOS"):
        tokenizer_files.load_tokenizer(folder, bos="always")
    with pytest.raises(DataError, match=r"data.bos='sometimes'"):
        tokenizer_files.load_tokenizer(folder, bos="sometimes")


def test_holes_in_the_vocabulary_count(folder):
    edit_json(folder, lambda t: t["added_tokens"][0].update(id=700))
    edit_json(folder, lambda t: t["model"]["vocab"].update({EOD: 700}))
    coder = tokenizer_files.load_tokenizer(folder)
    assert coder.vocab_size == 701
    assert coder.eod_id == 700
    assert coder.decode(np.array([650])) == ""


def test_tokens_that_only_the_settings_list_are_added(folder):
    listed = {"600": {"content": "<|more|>", "special": True}}
    rewrite(folder, eos_token="<|more|>", added_tokens_decoder=listed)
    assert tokenizer_files.load_tokenizer(folder).eod_id == 600
    rewrite(folder, eos_token=EOD, added_tokens_decoder={"650": {"content": "<|x|>"}})
    with pytest.raises(DataError, match=r"'<\|x\|>' has id 650, and .* does not"):
        tokenizer_files.load_tokenizer(folder)


def test_what_cuts_or_fills_up_in_a_tokenizer_json_does_nothing_here(folder, bpe):
    def cut(value):
        value["truncation"] = {
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    edit_json(folder, cut)
    text = CORPUS[:500]
    assert (
        tokenizer_files.load_tokenizer(folder).encode(text).size
        == bpe.encode(text).size
    )


def test_a_model_smaller_than_the_tokenizer_is_refused(bpe):
    config = options.parse(["--model.vocab_size=512"], options.load_config("tiny"))
    with pytest.raises(ConfigError, match=r"model.vocab_size=512 is below .* 600"):
        checks.check(config, vocab_size=bpe.vocab_size)


def test_hugging_face_tools_load_a_saved_tokenizer(bpe, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == bpe.eod_id
    for text in TEXTS[:-1]:
        assert (
            theirs.encode(text, add_special_tokens=False) == bpe.encode(text).tolist()
        )


def test_a_folder_without_a_tokenizer_json_is_converted(bpe, tmp_path):
    pytest.importorskip("transformers")
    model = json.loads(bpe.tokenizer_json)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"] | {EOD: 599}))
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    rewrite(tmp_path, tokenizer_class="GPT2Tokenizer", eos_token=EOD)
    coder = tokenizer_files.load_tokenizer(tmp_path)
    assert coder.eod_id == 599
    for text in TEXTS:
        assert coder.encode(text).tolist() == bpe.encode(text).tolist()


def test_a_folder_that_is_none_of_a_tokenizer_is_one_error(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="makes no tokenizer of"):
        tokenizer_files.load_tokenizer(tmp_path)


# SentencePiece


def sentencepiece_model(**options):
    spm = pytest.importorskip("sentencepiece")
    lines = [line for line in CORPUS.splitlines() if line]
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *filter(str.strip, STRANGE[:-1])]),
        model_writer=file,
        minloglevel=2,
        **{"vocab_size": 700, "hard_vocab_limit": False} | options,
    )
    return file.getvalue()


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"model_type": "unigram", "byte_fallback": True},
        {"model_type": "bpe", "byte_fallback": True, **IDENTITY},
        {"model_type": "bpe", "user_defined_symbols": ["[A]", "in"], **IDENTITY},
        {"model_type": "bpe", "add_dummy_prefix": False, "character_coverage": 1.0},
    ],
    ids=["unigram", "unigram bytes", "llama", "user defined", "no prefix"],
)
def test_a_sentencepiece_model_gives_sentencepieces_ids(tmp_path, options):
    spm = pytest.importorskip("sentencepiece")
    data = sentencepiece_model(**options)
    (tmp_path / "tokenizer.model").write_bytes(data)
    coder = tokenizer_files.load_tokenizer(tmp_path / "tokenizer.model")
    theirs = spm.SentencePieceProcessor(model_proto=data)
    assert coder.vocab_size == theirs.vocab_size()
    assert (coder.eod_id, coder.bos_id) == (theirs.eos_id(), None)
    texts = [*TEXTS[:-1], " [A]the[A] [A] x"]
    for text, ids in zip(texts, coder.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode(text), text
        if theirs.unk_id() not in ids:  # whose text is another one there
            assert coder.decode(ids) == theirs.decode(ids.tolist()), text
    always = tokenizer_files.load_tokenizer(tmp_path / "tokenizer.model", bos="always")
    assert always.bos_id == theirs.bos_id()


def test_a_llama_like_sentencepiece_model_decodes_to_every_byte(tmp_path):
    data = sentencepiece_model(model_type="bpe", byte_fallback=True, **IDENTITY)
    (tmp_path / "a.model").write_bytes(data)
    coder = tokenizer_files.load_tokenizer(tmp_path / "a.model")
    for text, ids in zip(TEXTS, coder.encode_batch(TEXTS), strict=True):
        assert coder.decode(ids) == text
        assert not {0, 1, 2} & {*ids.tolist()}


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_control_pieces_are_none_of_text(tmp_path, model_type):
    data = sentencepiece_model(model_type=model_type, control_symbols=["<|x|>"])
    (tmp_path / "a.model").write_bytes(data)
    coder = tokenizer_files.load_tokenizer(tmp_path / "a.model")
    control = [coder.eod_id, coder.library_tokenizer(has_special_text=True)]
    control[1] = control[1].token_to_id("<|x|>")
    assert not {*control} & {*coder.encode("a </s> <|x|>b</s>").tolist()}


def test_a_unigram_whose_vocabulary_holds_its_special_tokens_spells_them_out():
    """As in tokenizer.json files of T5 and XLM-R: control pieces score 0 there."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "</s>ab\u2581")]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    coder = HfTokenizer(made.to_str(), vocab_size=len(pieces), eod_id=1)
    ids = coder.encode("a</s>b")
    assert 1 not in ids
    assert coder.decode(ids) == "a</s>b"


@pytest.mark.parametrize(
    "options", [{"model_type": "word"}, {"treat_whitespace_as_suffix": True}]
)
def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path, options):
    data = sentencepiece_model(**options)
    (tmp_path / "a.model").write_bytes(data)
    with pytest.raises(DataError, match="which is not read"):
        tokenizer_files.load_tokenizer(tmp_path / "a.model")


# tiktoken


@pytest.fixture
def ranks(bpe):
    """The trained merges as tiktoken ranks: bytes -> rank."""
    letters = {c: b for b, c in enumerate(tiktoken_ranks.byte_letters())}
    vocabulary = library(bpe).get_vocab(with_added_tokens=False)
    return {
        bytes(letters[c] for c in token): rank
        for token, rank in vocabulary.items()
        if rank < 599
    }


def write_ranks(path, ranks):
    lines = [b"%s %d\n" % (base64.b64encode(t), r) for t, r in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("pattern", [*tiktoken_ranks.PATTERNS])
def test_ranks_give_tiktokens_ids(tmp_path, ranks, pattern):
    tiktoken = pytest.importorskip("tiktoken")
    coder = tokenizer_files.load_tokenizer(
        write_ranks(tmp_path / "a.tiktoken", ranks), pattern=pattern
    )
    theirs = tiktoken.Encoding(
        "test",
        pat_str=tiktoken_ranks.PATTERNS[pattern],
        mergeable_ranks=ranks,
        special_tokens={EOD: 599},
    )
    assert (coder.vocab_size, coder.eod_id, coder.bos_id) == (600, 599, None)
    for text, ids in zip(TEXTS, coder.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == theirs.encode(text, disallowed_special=()), text
        assert coder.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "cl100k", "o200k"])
def test_text_is_split_as_tiktoken_splits_it(tmp_path, ranks, monkeypatch, name):
    tiktoken = pytest.importorskip("tiktoken")
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    described = {
        "gpt2": public.r50k_base,
        "cl100k": public.cl100k_base,
        "o200k": public.o200k_base,
    }[name]()
    theirs = tiktoken.Encoding(
        "test",
        pat_str=described["pat_str"],
        mergeable_ranks=ranks,
        special_tokens={EOD: 599},
    )
    path = write_ranks(tmp_path / "a.tiktoken", ranks)
    coder = tokenizer_files.load_tokenizer(path, pattern=name)
    for text, ids in zip(TEXTS, coder.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == theirs.encode(text, disallowed_special=()), text


def test_known_numbers_of_ranks_have_a_pattern_and_an_end():
    for number, (pattern, special) in tiktoken_ranks._KNOWN.items():
        assert pattern in tiktoken_ranks.PATTERNS
        assert min(special.values()) >= number or number == 50_280


def test_llamas_ranks_have_the_tokens_of_its_chat_template(
    tmp_path, ranks, monkeypatch
):
    _, special = tiktoken_ranks._KNOWN[128_000]
    monkeypatch.setitem(tiktoken_ranks._KNOWN, len(ranks), ("cl100k", special))
    coder = tokenizer_files.load_tokenizer(
        write_ranks(tmp_path / "a.tiktoken", ranks), bos="always"
    )
    made = coder.library_tokenizer(has_special_text=True)
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    ids = made.encode(text, add_special_tokens=False).ids
    assert [i for i in ids if i >= 128_000] == [128_000, 128_006, 128_007, 128_009]
    assert (coder.bos_id, coder.eod_id) == (128_000, 128_001)
    assert max(coder.encode(text)) < 599


def test_ranks_of_unknown_number_need_a_pattern(tmp_path, ranks):
    path = write_ranks(tmp_path / "a.tiktoken", ranks)
    with pytest.raises(DataError, match=r"has 599 ranks, .* --tiktoken_pattern"):
        tokenizer_files.load_tokenizer(path)


def test_a_pattern_is_for_ranks_alone(folder):
    with pytest.raises(DataError, match="no tiktoken ranks; leave the pattern out"):
        tokenizer_files.load_tokenizer(folder, pattern="gpt2")


# Damage


def damaged(tmp_path, data):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    return path


def test_a_damaged_tokenizer_json_is_one_error(tmp_path, bpe):
    text = bpe.tokenizer_json.encode()
    for bad in (text[:1000], b"{}", b"{", text.replace(b"BPE", b"PBE"), b'{"\xff": 1}'):
        with pytest.raises(DataError, match=r"tokenizer\.model"):
            tokenizer_files.load_tokenizer(damaged(tmp_path, bad))


def test_a_damaged_sentencepiece_model_is_one_error(tmp_path):
    data = sentencepiece_model(model_type="bpe")
    rng = np.random.default_rng(0)
    for _ in range(30):
        bad = bytearray(data[: rng.integers(len(data))])
        bad[rng.integers(len(bad))] ^= 255
        with pytest.raises(DataError):
            tokenizer_files.load_tokenizer(damaged(tmp_path, bad))
    for bad in (b"", b"\x00", b"some text\n"):
        with pytest.raises(
            DataError, match=r"no tokenizer.json, no tiktoken ranks and"
        ):
            tokenizer_files.load_tokenizer(damaged(tmp_path, bad))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [*lines[:3], b"!!!! 3", *lines[4:]], r":4 is not base64"),
        (lambda lines: [*lines[:9], b"YQ=="], r":10 is not base64"),
        (lambda lines: lines[1:], "256 bytes"),
        (lambda lines: [*lines, lines[0][:-1] + b"1"], "a rank of its own"),
        (lambda lines: [*lines, b"YWJjZGVm 99999999999"], "below 2147483648"),
        (lambda lines: [*lines, b"YWJjZGVm -1"], "a rank of its own"),
    ],
)
def test_damaged_ranks_are_one_error(tmp_path, ranks, edit, message):
    path = write_ranks(tmp_path / "a.tiktoken", dict(sorted(ranks.items())))
    path.write_bytes(b"\n".join(edit(path.read_bytes().splitlines())))
    with pytest.raises(DataError, match=message):
        tokenizer_files.load_tokenizer(path, pattern="gpt2")


@pytest.mark.parametrize("text", ["[1]", "{", "3"])
def test_damaged_settings_are_one_error(folder, text):
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        tokenizer_files.load_tokenizer(folder)


def test_without_the_extra_the_error_says_how_to_get_it(bpe, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for use in (
        lambda: tokenizer_files.load_tokenizer(folder),
        lambda: HfTokenizer(bpe.tokenizer_json, 600, 599).encode("a"),
        lambda: tokenizer_training.train_bpe(["a"], vocab_size=300),
    ):
        with pytest.raises(DataError, match=r"pip install 'jaxinfra\[hf\]'"):
            use()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("added_tokens_decoder", [1]),
        ("added_tokens_decoder", {"5": 5}),
        ("added_tokens_decoder", {"x": {"content": "a"}}),
        ("added_tokens_decoder", {"²": {"content": "a"}}),
        ("added_tokens_decoder", {"5": {}}),
        ("eos_token", [EOD]),
        ("eos_token", {"content": None}),
        ("eos_token_id", 99_999_999_999),
        ("eos_token_id", [1, "a"]),
        ("bos_token", ["a"]),
        ("add_bos_token", "yes"),
        ("chat_template", ["a"]),
        ("chat_template", [{"name": [], "template": "a"}]),
        ("chat_template", 5),
    ],
)
def test_settings_of_another_type_are_one_error(folder, key, value):
    rewrite(folder, **{"eos_token": EOD, key: value})
    with pytest.raises(DataError, match=rf"tokenizer_config\.json: {key} is .*must be"):
        tokenizer_files.load_tokenizer(folder)


@pytest.mark.parametrize("size", [0, 256, 10**12, 10**23])
def test_a_trained_vocabulary_holds_every_byte_and_fits(size):
    with pytest.raises(DataError, match=f"vocab_size={size} must be 257 or more"):
        tokenizer_training.train_bpe(["a"], vocab_size=size)


# In the cache of a run


def test_raw_text_is_prepared_with_a_tokenizer_from_files_once(folder, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(CORPUS[:5000])
    options = {"split": "tail", "held_out": 0.1, "seed": 0}
    options |= {"cache_dir": tmp_path / "cache", "tokenizer": str(folder)}
    first = preparation.prepared(text, **options)
    made = (first / "dataset.json").stat().st_mtime_ns
    assert preparation.prepared(text, **options) == first
    assert (first / "dataset.json").stat().st_mtime_ns == made
    assert preparation.prepared(text, **options, eod="in") != first
    data = shards.open_dataset(first)
    decoded = [
        data.tokenizer.decode(data.split(n).shards[0].tokens) for n in data.splits
    ]
    assert "".join(decoded) == CORPUS[:5000]


def test_documents_begin_and_end_with_their_tokens_and_a_cut_does_not(folder, tmp_path):
    rewrite(folder, eos_token=EOD, bos_token="in", add_bos_token=True)
    text = tmp_path / "a.txt"
    text.write_text("one two|three four|five six")
    data = preparation.prepare(
        [text],
        tmp_path / "set",
        tokenizer=str(folder),
        split="tail",
        held_out=0.5,
        seed=0,
        document_separator="|",
    )
    bos, eod = data.tokenizer.bos_id, data.tokenizer.eod_id
    train, held = (data.split(n).shards[0] for n in ("train", "held_out"))
    starts = [
        [d[0] == bos, d[-1] == eod]
        for shard in (train, held)
        for d in np.split(shard.tokens, np.cumsum(shard.lengths)[:-1])
    ]
    assert sorted(starts[:2]) == [[True, False], [True, True]]
    assert starts[2:] == [[False, True], [True, True]]
    assert held.lengths.sum() == held.tokens.size


@pytest.mark.parametrize("name", ["byte", "char"])
def test_an_end_of_document_cannot_be_chosen_where_there_is_one(tmp_path, name):
    text = tmp_path / "a.txt"
    text.write_text("one two")
    with pytest.raises(DataError, match="has its own EOD"):
        preparation.prepare(
            [text],
            tmp_path / "set",
            tokenizer=name,
            eod="x",
            split="tail",
            held_out=0.5,
            seed=0,
        )
    assert not pathlib.Path(tmp_path / "set").exists()
