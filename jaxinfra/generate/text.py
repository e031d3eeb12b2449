"""Text from text: a prompt to its continuation, by the settings of `SampleConfig`."""

from collections.abc import Sequence

import jax

from jaxinfra.config import ModelConfig, SampleConfig
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.generate import decode
from jaxinfra.params import Tree
from jaxinfra.precision import Policy
from jaxinfra.sharding import Layout


def continue_prompts(
    params: Tree,
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    settings: SampleConfig,
    *,
    model: ModelConfig,
    policy: Policy,
    layout: Layout,
    seed: int,
) -> list[str]:
    """Each prompt with its continuation, which ends with the document.

    Learned positions bound the tokens: what does not fit is not generated.
    """
    longest = max((len(tokenizer.encode(prompt)) for prompt in prompts), default=1)
    longest, num_tokens = max(longest, 1), settings.tokens
    if model.positions == "learned":
        num_tokens = min(num_tokens, model.max_length - longest)
    generate = decode.make_generate(
        model,
        policy=policy,
        layout=layout,
        max_new_tokens=num_tokens,
        capacity=longest + num_tokens,
        stop_ids=(tokenizer.eod_id,),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        vocab_size=tokenizer.vocab_size,
    )
    key = jax.random.key(seed)
    texts = decode.generate_text(params, prompts, tokenizer, generate=generate, key=key)
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
