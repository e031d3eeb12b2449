"""Perplexity of a published model whose matrices are rounded in every way we have.

    python scripts/peers/compress_model.py SOURCE FOLDER RESULT.json

Each way is a run of scripts/compress.py on the shipped text, whose last tenth is the
held-out part. What RESULT.json has already is not done again.
"""

import json
import pathlib
import re
import subprocess
import sys

COMPRESS = pathlib.Path(__file__).parent.parent / "compress.py"
WAYS = [
    ("int8", "nearest", 0),
    *(
        ("int4", method, group)
        for group in (64, 0)
        for method in ("nearest", "gptq", "awq")
    ),
    *(("nf4", method, 64) for method in ("nearest", "gptq", "awq")),
]
_FOUND = re.compile(r"perplexity ([\d.]+) -> ([\d.]+).*\n\s+([\d.]+) GB -> ([\d.]+) GB")


def main(source: str, folder: str, result: str) -> dict:
    file = pathlib.Path(result)
    found = json.loads(file.read_text()) if file.exists() else {"model": "", "ways": []}
    found["model"] = pathlib.Path(source).name
    done = {(way["format"], way["method"], way["group"]) for way in found["ways"]}
    for form, method, group in WAYS:
        if (form, method, group) in done:
            continue
        to = pathlib.Path(folder, f"{form}_{method}_{group}")
        command = [sys.executable, str(COMPRESS), "--from", source, "--to", str(to)]
        command += ["--format", form, "--method", method, "--group", str(group)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        before, after, whole, few = map(float, _FOUND.search(said.stdout).groups())
        found["perplexity"], found["gigabytes"] = before, whole
        found["ways"].append(
            {
                "format": form, "method": method, "group": group,
                "perplexity": after, "against": after / before - 1, "gigabytes": few,
            }
        )  # fmt: skip
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(form, method, group, after, file=sys.stderr)
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
