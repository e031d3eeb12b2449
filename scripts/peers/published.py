"""What transformers makes of a published model: perplexity of a text, greedy text.

    python scripts/peers/published.py HF_DIR TEXT_FILE PROMPTS.json LENGTH TOKENS

For an environment with torch and transformers, in which jaxinfra is not. Every token of
the text is scored once, the first after EOS, each later window with as many tokens
before it as fit. Prints JSON: mean nats a token, what follows each prompt, seconds.
"""

import json
import pathlib
import sys
import time

import torch
import transformers


def main(folder, text_file, prompts_file, length, new_tokens):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    begin = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    load_secs, begin = time.perf_counter() - begin, time.perf_counter()
    text = pathlib.Path(text_file).read_text(encoding="utf-8")
    with torch.no_grad():
        nats, tokens = scored(model, tokenizer, text, int(length))
        score_secs, begin = time.perf_counter() - begin, time.perf_counter()
        prompts = json.loads(pathlib.Path(prompts_file).read_text())
        texts = [greedy(model, tokenizer, p, int(new_tokens)) for p in prompts]
    return {
        "tokens": tokens,
        "nats_per_token": nats / tokens,
        "texts": texts,
        "load_secs": load_secs,
        "score_secs": score_secs,
        "generate_secs": time.perf_counter() - begin,
    }


def scored(model, tokenizer, text, length):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids_T = torch.tensor([tokenizer.eos_token_id, *ids])
    total = 0.0
    for done in range(0, len(ids), length):
        end = min(done + length, len(ids))
        first = max(0, end - length)
        logits_TV = model(ids_T[None, first:end]).logits[0, done - first :]
        logprobs_TV = torch.log_softmax(logits_TV.double(), dim=-1)
        targets_T = ids_T[done + 1 : end + 1]
        total -= logprobs_TV.gather(1, targets_T[:, None]).sum().item()
    return total, len(ids)


def greedy(model, tokenizer, prompt, new_tokens):
    ids = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**ids, do_sample=False, max_new_tokens=new_tokens)
    return tokenizer.decode(found[0], skip_special_tokens=True)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps(main(*sys.argv[1:])))
