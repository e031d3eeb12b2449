"""Chat templates: conversations to text, by Jinja in a sandbox.

A template sees the messages, the tools, the special tokens' texts and the helpers that
Hugging Face gives it; it reaches no attribute of Python, no file and no network, and
changes nothing. `{% generation %}` ... `{% endgeneration %}` marks what the model says.
jinja2 before 3.1.6 lets a template out of its sandbox (CVE-2025-27516): refused.

Limits: a template may take any time or memory; use those of people you trust.
Source of names and settings: `chat_template_utils.py` of huggingface/transformers.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfra.config import DataError
from jaxinfra.data import tokenizer_files, urls
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokenizer_json import NEEDS_HF, HfTokenizer

# Noncharacters of Unicode, never in text that is interchanged: within a name that a
# message may not write, and around what the model says.
GUARD, START, END = "\ufdd0", "\ufdd1", "\ufdd2"
_SAFE_JINJA = (3, 1, 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A Jinja template, and what it sees besides the messages.

    special_tokens: bos_token, eos_token and others by name. date: what `strftime_now`
    tells, so that a data set does not depend on the day that it is made.
    """

    source: str
    special_tokens: Mapping[str, str]
    date: datetime.date

    def render(
        self, messages: Sequence[Any], *, tools: Any = None, is_prompt: bool = False
    ) -> str:
        """The messages as text, answers between marks if the template marks them;
        `is_prompt`: with the header of an answer at the end.

        Raises DataError with what the template, or the sandbox, has against them.
        """
        try:
            return self._compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=is_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template may do anything with a message
            raise DataError(
                f"the chat template fails: {type(error).__name__}: {error}"
            ) from error

    @property
    def has_marks(self) -> bool:
        """Whether it marks what the model says."""
        return self._compiled.environment.has_marks

    @functools.cached_property
    def _compiled(self) -> Any:
        return _environment(self.date).from_string(self.source)


def load(
    tokenizer: Tokenizer,
    *,
    folder: str | pathlib.Path = "",
    file: str | pathlib.Path = "",
    date: datetime.date,
) -> ChatTemplate | None:
    """The template in `file`, or of the tokenizer's folder; None if it has none.

    A folder has it as chat_template.jinja, or in tokenizer_config.json; of several by
    name, the default. Raises DataError if it cannot be read or compiled.
    """
    urls.check_local(file, key="chat_template", fix="copy the file here first")
    settings = tokenizer_files.settings_of(folder) if folder else {}
    source = settings.get("chat_template")
    if isinstance(source, list):
        source = {t["name"]: t["template"] for t in source}.get("default")
    path = pathlib.Path(folder).expanduser()
    own = (path if path.is_dir() else path.parent) / "chat_template.jinja"
    if file or (folder and own.is_file()):
        try:
            source = pathlib.Path(file or own).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file or own} cannot be read ({error})") from error
    if not isinstance(source, str):
        return None
    special = {
        key: value
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, str)
    }
    if isinstance(tokenizer, HfTokenizer):
        name = tokenizer.library_tokenizer(has_special_text=True).id_to_token
        bos = "" if tokenizer.bos_id is None else name(tokenizer.bos_id)
        special = {"bos_token": bos, "eos_token": name(tokenizer.eod_id)} | special
    template = ChatTemplate(source=source, special_tokens=special, date=date)
    try:
        _ = template._compiled
    except Exception as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"the chat template of {file or folder} is not Jinja ({error}); fix it, or "
            "give another one with --chat_template"
        ) from error
    return template


def _environment(date: datetime.date) -> Any:
    """The sandbox; `strftime_now` tells of `date`."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise DataError(NEEDS_HF.format(what="a chat template")) from error
    version = importlib.metadata.version("jinja2")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < _SAFE_JINJA:
        raise DataError(
            f"jinja2 {version} lets a chat template out of its sandbox; upgrade it: "
            "pip install 'jinja2>=3.1.6'"
        )

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} puts marks around what it holds."""

        tags = {"generation"}  # noqa: RUF012  # jinja2 asks for a set

        def parse(self, parser: Any) -> list[Any]:
            next(parser.stream)
            environment.has_marks = True
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, end = (
                jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)])
                for mark in (START, END)
            )
            return [start, *body, end]

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        text = json.dumps(
            value,
            ensure_ascii=False,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        if ensure_ascii:  # but for a guard, which is to be found again
            escaped = lambda found: json.dumps(found[0])[1:-1]
            text = re.sub(f"[^\0-\x7f{GUARD}]", escaped, text)
        return text

    environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.has_marks = False
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = date.strftime
    return environment
