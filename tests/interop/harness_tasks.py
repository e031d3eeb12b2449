"""Small tasks for lm-evaluation-harness, made of the text that ships with the project:
multiple choice, last words, whole passages, generation."""

import json
import pathlib

TEXT = pathlib.Path(__file__).parents[2] / "jaxinfra/data/corpus/shakespeare.txt"

_COMMON = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
metadata:
  version: 1
"""
_TASKS = {
    "next_line": (
        "multiple_choice",
        """\
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: "\\n"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
""",
    ),
    "last_word": (
        "loglikelihood",
        """\
doc_to_text: "{{beginning}}"
doc_to_target: "{{word}}"
target_delimiter: " "
metric_list:
  - metric: perplexity
  - metric: acc
""",
    ),
    "passages": (
        "loglikelihood_rolling",
        """\
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    ),
    "line_end": (
        "generate_until",
        """\
doc_to_text: "{{context}}"
doc_to_target: "{{rest}}"
target_delimiter: " "
generation_kwargs:
  until: ["\\n", "the"]
  max_gen_toks: 20
  do_sample: false
metric_list:
  - metric: exact_match
""",
    ),
}
NAMES = tuple(_TASKS)


def write(folder: pathlib.Path, *, items: int, passage_chars: int) -> None:
    """YAML and JSON lines of all tasks, `items` of each."""
    lines = [line.strip() for line in TEXT.read_text().splitlines() if line.strip()]
    lines = [line for line in lines if len(line.split()) > 4]
    lines = lines[200 :: len(lines) // (9 * items)]
    text = TEXT.read_text()
    found = {name: [] for name in _TASKS}
    for i in range(items):
        one, two, three, *others = lines[9 * i : 9 * i + 7]
        answer = i % 4
        choices = [*others[:answer], three, *others[answer:]][:4]
        choices[answer] = three
        context = f"{one}\n{two}"
        found["next_line"].append(
            {"context": context, "choices": choices, "answer": answer}
        )
        *words, last = three.split()
        beginning = " ".join(words)
        found["last_word"].append({"beginning": beginning, "word": last})
        start = 20_000 * (i + 1)
        length = passage_chars + 37 * i  # with and without a window that is not full
        found["passages"].append({"passage": text[start : start + length]})
        found["line_end"].append(
            {"context": f"{context}\n{words[0]}", "rest": " ".join(words[1:])}
        )
    # Choices of one token each share what is read.
    found["next_line"].append(
        {"context": "To be or not to", "choices": ["b", "c", "d"], "answer": 0}
    )
    for name, (kind, rest) in _TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in found[name]))
        head = _COMMON.format(name=name, file=file, kind=kind)
        (folder / f"{name}.yaml").write_text(head + rest)
