"""lm-evaluation-harness on a model of ours (extra `eval`): neither torch nor
transformers is needed.

`make_lm` gives the harness what its own `hf` backend gives: the same split of context
and continuation, the same rolling windows, BOS before a text where the tokenizer writes
one, a context cut at its beginning, texts cut at stop strings.

Limits: `hf` would also write the EOS that some tokenizers put behind every text, and
tidy spaces for those that ask for it; num_beams and penalties are refused.
"""

# pyright: reportMissingImports=false

import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxinfra.config import ConfigError, did_you_mean
from jaxinfra.data import chat_template
from jaxinfra.generate import rows
from jaxinfra.generate.rows import Score
from jaxinfra.interop.source_text import SourceText

MAX_LENGTH = 2048  # of the harness, where a model says nothing
_MAX_NEW_TOKENS = 256
_RESAMPLES = 1000  # for a standard error within 3%, where it has no formula
# Settings of generation that change nothing at these values.
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
    "use_cache": True,
}  # fmt: skip


def make_lm(
    text: SourceText,
    score: Score,
    complete: Callable[..., list[str]],
    *,
    name: str,
    max_length: int = 0,
    seed: int = 0,
) -> Any:
    """An `lm_eval.api.model.TemplateLM`, to be called where the model's mesh is set.

    complete: an `until.Complete`, its parameters given, that writes by text.decode.
    max_length: tokens that the model reads at once; 0 takes text's, or the harness's
    2048.
    """
    try:
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
        from lm_eval.models import utils as model_utils
    except ImportError as error:
        raise ConfigError(
            "--harness needs the extra eval: pip install 'jaxinfra[eval]'"
        ) from error
    length = max_length or text.max_length or MAX_LENGTH
    eod_id, bos_id = text.tokenizer.eod_id, text.named_bos_id
    first_id = eod_id if bos_id is None else bos_id
    has_names = text.library is not None
    first_name = text.library.id_to_token(first_id) if has_names else None
    eod_name = text.library.id_to_token(eod_id) if has_names else None

    class OurLM(TemplateLM):
        """See `make_lm`."""

        max_length = length
        max_gen_toks = _MAX_NEW_TOKENS

        @property
        def eot_token_id(self) -> int:
            return eod_id

        @property
        def prefix_token_id(self) -> int:
            return first_id

        @property
        def tokenizer_name(self) -> str:
            return utils.sanitize_model_name(name)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **unused: Any
        ) -> list[int]:
            ids = text.encode(string)
            has_first = first_name is not None and string.startswith(first_name)
            if add_special_tokens is None:
                add_special_tokens = not has_first
            if add_special_tokens and text.tokenizer.bos_id is not None:
                return [text.tokenizer.bos_id, *ids]
            return ids

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
        ) -> list[tuple[float, bool]]:
            asked = [
                rows.continuation(context, following, length=length)
                for _, context, following in requests
            ]
            answers = [
                (math.fsum(found.logprobs_Q.tolist()), bool(found.is_greedy_Q.all()))
                for found in score(asked)
            ]
            for (texts, _, _), answer in zip(requests, answers, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
            return answers

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            windows = [
                (number, *utils.make_disjoint_window(window))
                for number, request in enumerate(requests)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=first_id,
                    max_seq_len=length,
                    context_len=1,
                )
            ]
            found = self._loglikelihood_tokens([(None, c, f) for _, c, f in windows])
            sums = [0.0] * len(requests)
            for (number, _, _), (logprob, _) in zip(windows, found, strict=True):
                sums[number] += logprob
            for request, total in zip(requests, sums, strict=True):
                self.cache_hook.add_partial(
                    "loglikelihood_rolling", request.args, total
                )
            return sums

        def generate_until(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[str]:
            groups: dict[tuple, list[tuple[int, list[int], list[str]]]] = {}
            for number, request in enumerate(requests):
                context, settings = request.args
                settings = model_utils.normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
                until = model_utils.handle_stop_sequences(
                    settings.pop("until", None), eos=eod_name
                )
                ids = self.tok_encode(context) or [first_id]
                group = groups.setdefault(_sampling(dict(settings)), [])
                group.append((number, ids, until))
            texts = [""] * len(requests)
            for (tokens, temperature, top_k, top_p), group in groups.items():
                found = complete(
                    [np.array(ids) for _, ids, _ in group],
                    [until for _, _, until in group],
                    max_new_tokens=tokens,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    seed=seed,
                )
                for (number, _, _), answer in zip(group, found, strict=True):
                    texts[number] = answer
            for request, answer in zip(requests, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, answer)
            return texts

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return text.chat.source if chat_template and text.chat else None

        def apply_chat_template(
            self,
            chat_history: list[dict[str, str]],
            add_generation_prompt: bool = True,
        ) -> str:
            if text.chat is None:
                raise ConfigError(f"{name} has no chat template; leave it out")
            return _conversation(text.chat, chat_history, add_generation_prompt)

    return OurLM()


def run(
    lm: Any,
    tasks: Sequence[str],
    *,
    folder: pathlib.Path | None = None,
    limit: int | None = None,
    has_chat: bool = False,
) -> dict[str, dict[str, float]]:
    """Figures of the harness's tasks by task and name, standard errors among them.

    folder: of YAML tasks, which are then the only ones known. limit: items of a task.
    has_chat: asks by the chat template.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    # Its pool of processes would be forked from this one, whose threads jax has begun.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    manager = TaskManager(
        include_path=None if folder is None else str(folder),
        include_defaults=folder is None,
    )
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(
                f"--harness {task}: there is no such task"
                f"{did_you_mean(task, manager.all_tasks)}"
            )
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        apply_chat_template=has_chat,
        log_samples=False,
        bootstrap_iters=_RESAMPLES,
    )
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in figures.items()
            if isinstance(value, int | float)
        }
        for task, figures in (found or {}).get("results", {}).items()
    }


def _sampling(settings: dict[str, Any]) -> tuple[int, float, int, float]:
    """(new tokens, temperature, top_k, top_p) of the harness's normalized settings."""
    tokens = settings.pop("max_gen_toks")
    is_drawn = settings.pop("do_sample", False)
    temperature = float(settings.pop("temperature", 0.0) or 0.0)
    top_k = int(settings.pop("top_k", 0) or 0)
    top_p = float(settings.pop("top_p", 1.0) or 1.0)
    for key, value in settings.items():
        if key not in _NEUTRAL or value != _NEUTRAL[key]:
            raise ConfigError(
                f"the task asks for generation with {key}={value!r}, which is not done "
                "here; take it out of the task's generation_kwargs"
            )
    return tokens, temperature if is_drawn else 0.0, top_k, top_p


def _conversation(
    chat: chat_template.ChatTemplate, messages: list[dict[str, str]], is_prompt: bool
) -> str:
    """The messages as text, and the header of an answer if `is_prompt`, else up to the
    end of the last message, which is to be continued."""
    written = chat.render(messages, is_prompt=is_prompt)
    for mark in (chat_template.START, chat_template.END):
        written = written.replace(mark, "")
    if is_prompt:
        return written
    last = messages[-1]["content"].strip()
    return written[: written.rindex(last) + len(last)]
