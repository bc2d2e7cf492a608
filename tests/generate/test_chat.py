"""Chat templates: MiMo-V2's own against prompts worked out by hand, the folder's own templates, and the sandbox."""
import datetime
import json
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from jaxllm.generate.text import Tokenizer

NANO = Path(__file__).parents[2] / "configs" / "mimo-nano"
DEFAULT = "<|im_start|>system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|>"
USER = {"role": "user", "content": "Hello"}
WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "  The weather of a day.\n", "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "e.g. 上海", "enum": ["上海", "Köln"]},
            "days": {"type": "integer", "minimum": 1},
            "where": {"type": "array", "items": {"type": "string"}},
            "any": {},
        },
        "required": ["city"], "additionalProperties": False}}}
WEATHER_TEXT = """
<function>
<name>weather</name>
<description>The weather of a day.</description>
<parameters>
<parameter>
<name>city</name>
<type>string</type>
<description>e.g. 上海</description>
<enum>["上海", "Köln"]</enum>
</parameter>
<parameter>
<name>days</name>
<type>integer</type>
<minimum>1</minimum>
</parameter>
<parameter>
<name>where</name>
<type>array</type>
<items>{"type": "string"}</items>
</parameter>
<parameter>
<name>any</name>
</parameter>
<required>["city"]</required>
<additionalProperties>False</additionalProperties>
</parameters>
<strict>True</strict>
</function>"""
TOOLS_HEAD = """

# Tools

You may call one or more functions to assist with the user query.

You have access to the following functions:

<tools>"""
TOOLS_TAIL = """
</tools>

For each function call, output the function name and arguments in the following format:
<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>value_1</parameter>
<parameter=example_parameter_2>This is the value for the second parameter
that can span
multiple lines</parameter>
</function>
</tool_call>

<IMPORTANT>
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- DO NOT use function calls inside <think></think> tags.
- The value enclosed between parameter tags is preserved exactly as-is, including newlines and spaces.
</IMPORTANT>"""


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer.from_dir(NANO)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a tokenizer and nothing else; each test adds its template."""
    shutil.copy(NANO / "tokenizer.model", tmp_path)
    return tmp_path


def chat(folder: Path, template: object, messages=(USER,), config=(), **variables) -> str:
    """Renders with `template` in tokenizer_config.json."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **dict(config)}))
    return Tokenizer.from_dir(folder).chat(list(messages), **variables)


# --- MiMo-V2's own template, MODEL.md 5.2

def test_published_prompt(nano):
    """The check string of MODEL.md 5.1, which a V2.5 server was seen to receive."""
    prompt = nano.chat([USER], enable_thinking=False)
    assert prompt == (DEFAULT + "<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n<think></think>")
    tokens = nano.encode(prompt)
    assert tokens[0] == 1 and tokens[-2:] == [3, 4]          # <|im_start|> and <think></think> are single tokens
    assert nano.decode(tokens, skip_special=False) == prompt


def test_generation_prompt(nano):
    turn = DEFAULT + "<|im_start|>user\nHello<|im_end|>"
    assert nano.chat([USER]) == turn + "<|im_start|>assistant\n"
    assert nano.chat([USER], enable_thinking=True) == turn + "<|im_start|>assistant\n"
    assert nano.chat([USER], add_generation_prompt=False, enable_thinking=False) == turn


def test_system_turns(nano):
    """The first one replaces the default sentence; later ones are turns like others."""
    system = {"role": "system", "content": " Be brief. "}
    assert nano.chat([system, USER, {"role": "system", "content": "Now in French."}], add_generation_prompt=False) == (
        "<|im_start|>system\n Be brief. <|im_end|><|im_start|>user\nHello<|im_end|>"
        "<|im_start|>system\nNow in French.<|im_end|>")
    assert nano.chat([USER, system], add_generation_prompt=False) == (
        DEFAULT + "<|im_start|>user\nHello<|im_end|><|im_start|>system\n Be brief. <|im_end|>")
    assert nano.chat([], add_generation_prompt=False) == DEFAULT


def test_tools(nano):
    now = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}
    prompt = nano.chat([USER], tools=[WEATHER, now, {"name": "bare"}], add_generation_prompt=False)
    assert prompt == (
        DEFAULT.removesuffix("<|im_end|>") + TOOLS_HEAD + WEATHER_TEXT
        + "\n<function>\n<name>now</name>\n<parameters>\n</parameters>\n</function>"
        + "\n<function>\n<name>bare</name>\n<parameters>\n</parameters>\n</function>"
        + TOOLS_TAIL + "<|im_end|><|im_start|>user\nHello<|im_end|>")
    system = {"role": "system", "content": "Be brief."}
    assert nano.chat([system], tools=[WEATHER], add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief." + TOOLS_HEAD + WEATHER_TEXT + TOOLS_TAIL + "<|im_end|>")
    assert nano.chat([USER], tools=[]) == nano.chat([USER])


@pytest.mark.parametrize("message, text", [
    ({"content": "Hi."}, "<think></think>Hi."),
    ({"content": "Hi.", "reasoning_content": "A greeting.\n"}, "<think>A greeting.\n</think>Hi."),
    ({"content": "Hi.", "reasoning_content": ""}, "<think></think>Hi."),
    ({"content": "Hi.", "reasoning_content": None}, "<think></think>Hi."),
    ({"content": "<think>A greeting.</think>\nHi."}, "<think>A greeting.</think>\nHi."),
    ({"content": "A greeting.</think>Hi.</think>"}, "<think>A greeting.</think>Hi.</think>"),
    ({"content": None}, "<think></think>"),
    ({}, "<think></think>"),
])
def test_reasoning(nano, message, text):
    prompt = nano.chat([USER, {"role": "assistant", **message}], add_generation_prompt=False)
    assert prompt == f"{DEFAULT}<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n{text}<|im_end|>"


def test_reasoning_of_earlier_turns(nano):
    """Kept, unless told otherwise; then what follows the last user turn keeps it, also across tool results."""
    answers = [{"role": "assistant", "content": f"c{i}", "reasoning_content": f"r{i}"} for i in range(3)]
    messages = [USER, answers[0], USER, answers[1], {"role": "tool", "content": "t"}, answers[2]]
    user = "<|im_start|>user\nHello<|im_end|>"
    tool = "<|im_start|>tool\n<tool_response>\nt\n</tool_response>\n<|im_end|>"
    for variables, first in (({}, "r0"), ({"keep_all_reasoning": True}, "r0"), ({"keep_all_reasoning": False}, "")):
        assert nano.chat(messages, add_generation_prompt=False, **variables) == (
            f"{DEFAULT}{user}<|im_start|>assistant\n<think>{first}</think>c0<|im_end|>"
            f"{user}<|im_start|>assistant\n<think>r1</think>c1<|im_end|>"
            f"{tool}<|im_start|>assistant\n<think>r2</think>c2<|im_end|>")


def test_dropped_reasoning_inside_content(nano):
    """Reasoning ends at the first </think>; a later one belongs to the content."""
    answer = {"role": "assistant", "content": "<think>r<think></think>a</think>b"}
    assert nano.chat([answer, USER], add_generation_prompt=False, keep_all_reasoning=False) == (
        DEFAULT + "<|im_start|>assistant\n<think></think>a</think>b<|im_end|><|im_start|>user\nHello<|im_end|>")


def test_tool_calls_and_results(nano):
    """Calls follow the content directly and each other; consecutive results share a turn."""
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {
                 "city": "Köln <b>", "days": 2, "where": ["a", {"b": None}], "now": True, "x": "1\n2"}}},
             {"name": "now", "arguments": {}}]
    messages = [USER, {"role": "assistant", "content": "Let me look.", "tool_calls": calls},
                {"role": "tool", "content": "rain"}, {"role": "tool", "content": [{"type": "text", "text": "noon"}]},
                USER, {"role": "tool", "content": "late"}]
    assert nano.chat(messages, add_generation_prompt=False) == (
        DEFAULT + "<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n<think></think>Let me look."
        '<tool_call>\n<function=weather>\n<parameter=city>Köln <b></parameter>\n<parameter=days>2</parameter>\n'
        '<parameter=where>["a", {"b": null}]</parameter>\n<parameter=now>True</parameter>\n'
        "<parameter=x>1\n2</parameter>\n</function>\n</tool_call><tool_call>\n<function=now>\n</function>\n</tool_call>"
        "<|im_end|><|im_start|>tool\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>\n"
        "<|im_end|><|im_start|>user\nHello<|im_end|><|im_start|>tool\n<tool_response>\nlate\n</tool_response>\n"
        "<|im_end|>")


def test_media_parts(nano):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}},
             {"type": "video"}, {"type": "audio"}, {"type": "text", "text": "b"}]
    image, video = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    assert nano.chat([{"role": "user", "content": parts}], add_generation_prompt=False) == (
        f"{DEFAULT}<|im_start|>user\na{image}{image}{video}<|mimo_audio_start|><|audio_pad|><|mimo_audio_end|>b<|im_end|>")


def test_text_is_never_a_template(nano):
    prompt = nano.chat([{"role": "user", "content": "{{ 1 + 1 }}{% if %}"}], add_generation_prompt=False)
    assert prompt == DEFAULT + "<|im_start|>user\n{{ 1 + 1 }}{% if %}<|im_end|>"


@pytest.mark.parametrize("message, reason", [
    ({"role": "developer", "content": "x"}, "role developer; known: system, user, assistant, tool"),
    ({"role": "user", "content": [{"type": "smell"}]}, "type smell; known: text, image, video, audio"),
    ({"role": "user", "content": ["x"]}, "a content part must be a mapping"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]},
     "arguments of a call of f must be a mapping"),
])
def test_what_our_template_refuses(nano, message, reason):
    with pytest.raises(ValueError, match=f"mimo-nano .*fails on this conversation: .*{reason}"):
        nano.chat([message])


@pytest.mark.parametrize("messages", ["Hello", [{"content": "x"}], ["Hello"], [{"role": 3}], {"role": "user"}, None])
def test_messages_of_the_wrong_shape(nano, messages):
    with pytest.raises(ValueError, match="messages: expected a list of mappings with a role"):
        nano.chat(messages)


# --- where the template comes from

def test_jinja_file_before_config_before_ours(folder):
    assert Tokenizer.from_dir(folder).chat([USER]).startswith(DEFAULT)
    assert chat(folder, "config {{ messages[0].content }}") == "config Hello"
    (folder / "chat_template.jinja").write_text("é {{ messages[0].content }}", "utf-8")
    assert Tokenizer.from_dir(folder).chat([USER]) == "é Hello"


def test_named_templates(folder):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    assert chat(folder, named) == "plain"
    assert chat(folder, named, tools=[WEATHER]) == "tools 1"
    assert chat(folder, named[:1], tools=[WEATHER]) == "plain"
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: no chat template named 'default', only"):
        chat(folder, named[1:])


def test_special_tokens_and_variables(folder):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}{{ extra }}|{{ tools is none }}"
    assert chat(folder, template, config=config, extra=3) == "<s>Hello</s>3|True"


def test_what_hub_templates_use(folder):
    """Trimmed blocks, loop controls, JSON with its letters, the date."""
    template = ("{% for m in messages %}\n  {% if m.role == 'system' %}\n    {% continue %}\n  {% endif %}\n"
                "{{ m.content }}\n{% endfor %}\n{{ {'a': 'é<'} | tojson }} "
                "{{ {'a': [1]} | tojson(indent=1) }} {{ strftime_now('%Y') }}")
    text = chat(folder, template, [{"role": "system", "content": "no"}, USER])
    assert text.rsplit(" ", 1)[0] == 'Hello\n{"a": "é<"} {\n "a": [\n  1\n ]\n}'
    assert abs(int(text.rsplit(" ", 1)[1]) - datetime.date.today().year) <= 1    # the year may turn during the test


def test_no_template_and_no_chatml(tmp_path):
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|im_start|>": 1}, unk_token="a"))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: no chat template .*lacks .*add a chat_temp"):
        Tokenizer.from_dir(tmp_path).chat([USER])


# --- what a template must not do

@pytest.mark.parametrize("template, reason", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "is broken at line 1"),
    ("a\n{{ messages[0]", "is broken at line 2"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ messages[0].content + 3 }}", "TypeError"),
    ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ("{{ missing.attribute }}", "UndefinedError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
])
def test_template_error(folder, template, reason):
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*config\.json: the chat template .*{reason}"):
        chat(folder, template)


@pytest.mark.parametrize("escape", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['datetime'] }}",
    "{{ strftime_now.__globals__.keys() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__.__base__}'.format(3) }}",
    "{{ (messages[0] | attr('__class__')).x }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{% set _ = messages.clear() %}",
    "{{ range(10000000) | list | length }}",
])
def test_sandbox(folder, escape):
    messages = [dict(USER)]
    with pytest.raises(ValueError, match=r"SecurityError: access to|OverflowError: Range too big"):
        chat(folder, escape, messages)
    assert messages == [USER]


@pytest.mark.parametrize("content, reason", [
    ("{", "not valid JSON"), ("[]", "expected a JSON object"),
    *[(json.dumps({"chat_template": bad}), "chat_template is .*expected a string or a list")
      for bad in (3, {"default": "x"}, ["x"], [{"name": "default"}], [{"name": 1, "template": "x"}])],
])
def test_broken_tokenizer_config(folder, content, reason):
    (folder / "tokenizer_config.json").write_text(content)
    tokenizer = Tokenizer.from_dir(folder)                   # text without chat still works
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {reason}"):
        tokenizer.chat([USER])


def test_template_file_that_is_no_text(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8"):
        Tokenizer.from_dir(folder).chat([USER])
