"""Chat templates: a conversation becomes the prompt text that the model was trained on.

A template is a Jinja program that comes with the weights, so it is foreign code: it runs in Jinja's immutable sandbox,
without a loader, and whatever it does wrong is a ValueError. Names and filters are those that templates on the hub
expect: `raise_exception`, `strftime_now`, `tojson` (which keeps non-ASCII letters), loop controls, and the special
tokens of tokenizer_config.json (`bos_token`, `eos_token`, ...).
"""
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """A folder's templates by name (most have only "default"), and the special tokens they may write."""

    def __init__(self, source: str, templates: Mapping[str, str], special_tokens: Mapping[str, str]):
        self._source = source            # for errors
        self._templates = templates
        self._special_tokens = special_tokens

    @classmethod
    def from_dir(cls, folder: str | Path, knows_chatml: bool) -> "ChatTemplate":
        """`chat_template.jinja`, else `chat_template` of tokenizer_config.json, else MiMo-V2's for who knows ChatML.

        Raises ValueError, naming file and key, for an unreadable file, a template of the wrong type, and no template.
        """
        folder = Path(folder)
        config_path, jinja_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_json(config_path) if config_path.is_file() else {}
        special_tokens = _special_tokens(config)
        if jinja_path.is_file():
            return cls(str(jinja_path), {"default": _read_text(jinja_path)}, special_tokens)
        if config.get("chat_template") is not None:
            return cls(str(config_path), _named_templates(config_path, config["chat_template"]), special_tokens)
        if not knows_chatml:
            raise ValueError(f"{folder}: no chat template (chat_template.jinja, or chat_template in "
                             "tokenizer_config.json), and the tokenizer lacks <|im_start|> and <|im_end|>, which "
                             "MiMo-V2's own template needs; add a chat_template.jinja")
        ours = resources.files("jaxllm.generate").joinpath("chat_template.jinja").read_text("utf-8")
        return cls(f"{folder} (without a template of its own: MiMo-V2's)", {"default": ours}, special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None,
               add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        """The prompt text. Raises ValueError with the template's file and the reason, sandbox refusals included."""
        _check_messages(messages)
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ValueError(f"{self._source}: no chat template named 'default', only {sorted(self._templates)}")
        known = {**self._special_tokens, "messages": messages, "tools": tools,
                 "add_generation_prompt": add_generation_prompt}
        try:
            return _compiled(self._templates[name]).render({**known, **variables})
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self._source}: the chat template is broken at line {error.lineno}: "
                             f"{error.message}") from error
        except Exception as error:       # foreign code may raise anything
            raise ValueError(f"{self._source}: the chat template fails on this conversation: "
                             f"{type(error).__name__}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError, naming the file, for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); is the file whole?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def _named_templates(path: Path, value: Any) -> dict[str, str]:
    """A string is one template; a list holds {name, template}."""
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, dict) and {str} == {type(entry.get("name")), type(entry.get("template"))}
               for entry in entries):
        raise ValueError(f"{path}: chat_template is {value!r:.200}; expected a string or a list of {{name, template}}")
    return {entry["name"]: entry["template"] for entry in entries}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, each a string or an object that holds it as `content`; null means there is none."""
    values = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _check_messages(messages: Any) -> None:
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not is_list or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        raise ValueError("messages: expected a list of mappings with a role, such as "
                         f"{{'role': 'user', 'content': 'Hello'}}; found {messages!r:.200}")


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Plain JSON; Jinja's own filter escapes <, > and & for web pages, and every letter outside ASCII."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
