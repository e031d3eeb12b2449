"""lm-evaluation-harness through our adapter: against a naive scorer that follows the
harness's words, and, where torch is installed, against its own `hf` backend."""

import functools
import json
import math
import shutil

import harness_tasks
import jax
import numpy as np
import pytest
from golden_checkpoints import AS_TORCH, FLOAT32, GOLDEN, layout_of

from jaxinfra.config import ConfigError
from jaxinfra.generate import score, until
from jaxinfra.interop import lm_eval_adapter, pretrained, source_text

tokenizers = pytest.importorskip("tokenizers")
instance = pytest.importorskip("lm_eval.api.instance")

LENGTH = 96  # below the passages' lengths, so that windows roll
# Nats: float32 log-likelihoods of some 100 tokens, summed.
ROUNDING = 2e-3


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setattr(
            "datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets")
        )
        yield


@pytest.fixture(
    scope="module", params=["BOS", pytest.param("no BOS", marks=pytest.mark.slow)]
)
def model_dir(request, tmp_path_factory):
    """The golden llama with a tokenizer of its 89 ids: characters and a few pairs."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(GOLDEN / "llama", folder)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=89, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(
        harness_tasks.TEXT.read_text().splitlines(keepends=True), trainer
    )
    made.decoder = tokenizers.decoders.Fuse()
    if request.param == "BOS":
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] "
        "{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[answer] {% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def text(model_dir):
    model = pretrained.open_source(str(model_dir)).model
    return source_text.open_text(str(model_dir), model, has_chat=True)


@pytest.fixture(scope="module")
def whole(model_dir):
    """ids [T] -> float64 log-probabilities [T, V]."""
    source, layout = pretrained.open_source(str(model_dir)), layout_of()
    with jax.set_mesh(layout.mesh):
        weights = source.load(layout=layout, dtype=np.float32)
    logits = score.make_logits(source.model, policy=FLOAT32, layout=layout)

    def log_probs(ids):
        with jax.set_mesh(layout.mesh):
            x_TV = logits(weights, np.array([ids]))[0].astype(np.float64)
        x_TV -= x_TV.max(axis=-1, keepdims=True)
        return x_TV - np.log(np.exp(x_TV).sum(axis=-1, keepdims=True))

    return log_probs


@pytest.fixture(scope="module")
def lm(model_dir, text):
    """Ours, on fsdp x tensor."""
    source, layout = pretrained.open_source(str(model_dir)), layout_of(fsdp=2, tensor=2)
    how = {"policy": FLOAT32, "layout": layout}
    with jax.set_mesh(layout.mesh):
        weights = source.load(layout=layout, dtype=np.float32)
        complete = until.make_complete(
            source.model,
            **how,
            to_text=text.decode,
            stop_ids=text.stop_ids,
            max_length=LENGTH,
        )
        yield lm_eval_adapter.make_lm(
            text,
            functools.partial(score.make_score(source.model, **how), weights),
            functools.partial(complete, weights),
            name=str(model_dir),
            max_length=LENGTH,
        )


def requests(kind, *arguments):
    return [instance.Instance(kind, {}, asked, i) for i, asked in enumerate(arguments)]


def naive(whole, context, following):
    """The harness's rule, a token at a time: inputs of LENGTH at most."""
    ids = (context + following)[-(LENGTH + 1) :][:-1]
    rows_QV = whole(ids)[-len(following) :]
    logprob = sum(rows_QV[i, t] for i, t in enumerate(following))
    return logprob, rows_QV.argmax(axis=-1).tolist() == following


def test_scores_are_those_of_a_naive_scorer(lm, text, whole):
    encode = functools.partial(lm.tok_encode, add_special_tokens=False)
    bos = [] if text.tokenizer.bos_id is None else [1]
    assert lm.tok_encode("What") == bos + encode("What")
    assert lm.tok_encode("<s>What") == [1, *encode("What")]
    assert (lm.prefix_token_id, lm.eot_token_id) == (1, 2)
    pairs = [
        ("To be, or not", " to be"),
        ("To be, or not ", "to be"),
        ("", "Who is there?"),
        ("a long context " * 14, "and its end"),
        ("To be, or not", " t"),
    ]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, following), (logprob, is_greedy) in zip(pairs, found, strict=True):
        kept = context.rstrip()
        whole_ids = bos + encode(context + following)
        context_ids = bos + encode(kept) if context else [1]
        if not context:
            whole_ids = [1, *encode(following)]
        expected = naive(whole, context_ids, whole_ids[len(context_ids) :])
        assert logprob == pytest.approx(expected[0], abs=ROUNDING)
        assert is_greedy == expected[1]


def test_every_token_of_a_long_text_counts_once(lm, whole):
    passage = harness_tasks.TEXT.read_text()[3000:3200]
    for end in (1, 30, 200):
        ids = lm.tok_encode(passage[:end])
        total, done = 0.0, 0
        while done < len(ids):
            last = min(done + LENGTH, len(ids))
            following = ids[done:last]
            total += naive(whole, [1, *ids[:done]], following)[0]
            done = last
        asked = requests("loglikelihood_rolling", (passage[:end],))
        [found] = lm.loglikelihood_rolling(asked)
        assert found == pytest.approx(total, abs=ROUNDING)


def test_text_is_written_up_to_a_stop_string(lm, text, whole):
    def greedy(context, tokens):
        ids = lm.tok_encode(context)[-(LENGTH - tokens) :]
        first = len(ids)
        for _ in range(tokens):
            ids.append(int(whole(ids)[-1].argmax()))
            if ids[-1] == 2:
                break
        return text.decode(ids[first:])

    long = "once more unto the breach, " * 9
    whole_text = greedy("To be", 20)
    stop = whole_text[7:9]
    asked = [
        ("To be", {"until": [stop], "max_gen_toks": 20, "do_sample": False}),
        ("To be", {"until": ["~"], "max_gen_toks": 20, "temperature": 0.0}),
        (long, {"until": "~", "max_gen_toks": 10}),
    ]
    found = lm.generate_until(requests("generate_until", *asked))
    assert found == [whole_text.split(stop)[0], whole_text, greedy(long, 10)]


def test_what_is_drawn_is_repeatable_and_what_is_not_done_is_refused(lm):
    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    asked = requests("generate_until", ("To be", drawn), ("To be", drawn))
    first, second = lm.generate_until(asked)
    assert [first, second] == lm.generate_until(asked)
    assert first != second
    beams = {"until": [], "num_beams": 4}
    with pytest.raises(ConfigError, match="num_beams=4"):
        lm.generate_until(requests("generate_until", ("To be", beams)))


def test_conversations_are_written_by_the_template(lm):
    asked = [{"role": "user", "content": "Who?"}]
    assert lm.apply_chat_template(asked) == "<s>[user] Who?\n[answer] "
    begun = [*asked, {"role": "answer", "content": "It is"}]
    expected = "<s>[user] Who?\n[answer] It is"
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == expected
    assert lm.chat_template(True).startswith("{{ bos_token }}")
    assert "/" not in lm.tokenizer_name


def test_the_harness_runs_its_tasks(lm, tmp_path):
    harness_tasks.write(tmp_path, items=2, passage_chars=90)
    found = lm_eval_adapter.run(lm, harness_tasks.NAMES, folder=tmp_path)
    assert found["next_line"]["sample_len"] == 3
    assert math.isfinite(found["passages"]["bits_per_byte"])
    assert 0 <= found["line_end"]["exact_match"] <= 1
    with pytest.raises(ConfigError, match="did you mean passages"):
        lm_eval_adapter.run(lm, ["passage"], folder=tmp_path)


@pytest.mark.slow
def test_all_is_as_the_hf_backend_has_it(lm, model_dir, tmp_path):
    pytest.importorskip("torch")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness_tasks.write(tmp_path, items=8, passage_chars=150)
    theirs = HFLM(
        pretrained=str(model_dir), device="cpu", dtype="float32", batch_size=3,
        max_length=LENGTH,
    )  # fmt: skip

    def run(model):
        return lm_eval.simple_evaluate(
            model=model,
            tasks=list(harness_tasks.NAMES),
            task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
            bootstrap_iters=0,
        )

    ours, expected = run(lm), run(theirs)
    for task in harness_tasks.NAMES:
        figures = [
            {k: v for k, v in found["results"][task].items() if not isinstance(v, str)}
            for found in (ours, expected)
        ]
        assert figures[0] == pytest.approx(figures[1], rel=AS_TORCH)
        answers = [
            {s["doc_id"]: s["filtered_resps"] for s in found["samples"][task]}
            for found in (ours, expected)
        ]
        assert len(answers[1]) >= 8
        for number, answer in answers[1].items():
            for one, other in zip(
                np.ravel(answers[0][number]), np.ravel(answer), strict=True
            ):
                if task == "line_end" or str(other) in ("True", "False"):
                    assert str(one) == str(other)
                else:
                    assert float(one) == pytest.approx(float(other), abs=ROUNDING)
