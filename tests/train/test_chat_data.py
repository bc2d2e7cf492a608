"""Which tokens of a conversation are targets: those of the assistant's turns, whatever the messages say."""
import itertools
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.generate.text import Tokenizer
from jaxllm.train.chat import encode_conversation, read_conversation
from jaxllm.train.data import batches

BPE = Path("tests/bpe")      # as the releases: no token has a line break and what follows it
TOKENIZER = Tokenizer.from_dir(BPE)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}


def say(content, **more):
    return {"role": "assistant", "content": content, **more}


HELLO, USER = say("Hello"), {"role": "user", "content": "Hi"}


def call(arguments):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


CASES = {      # messages, tools, and what the assistant writes in each of its turns
    "one turn": ([USER, HELLO], None, ["<think></think>Hello<|im_end|>"]),
    "assistant first": ([HELLO, USER], None, ["<think></think>Hello<|im_end|>"]),
    "twice in a row": ([USER, HELLO, HELLO], None, ["<think></think>Hello<|im_end|>"] * 2),
    "all reasoning is kept": (
        [USER, {**HELLO, "reasoning_content": "A greeting."}, USER, say("<think>2</think>b")], None,
        ["<think>A greeting.</think>Hello<|im_end|>", "<think>2</think>b<|im_end|>"]),
    "a system turn later": (
        [{"role": "system", "content": "A"}, USER, HELLO, {"role": "system", "content": "B"}, USER, HELLO], None,
        ["<think></think>Hello<|im_end|>"] * 2),
    "tools": (
        [USER, {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [
            call({"city": "Köln"}), call({"city": ["a", 1]})]},
         {"role": "tool", "content": "5 °C"}, {"role": "tool", "content": ""}, HELLO], [WEATHER],
        ["<think>Look.</think><tool_call>\n<function=weather>\n<parameter=city>Köln</parameter>\n</function>\n</tool_call>"
         '<tool_call>\n<function=weather>\n<parameter=city>["a", 1]</parameter>\n</function>\n</tool_call><|im_end|>',
         "<think></think>Hello<|im_end|>"]),
    "all kinds of letters": (
        [{"role": "user", "content": "文書を 👩‍👩‍👧 \n\n"}, say("\n\t Größe — 窗口 🙂\n ")], None,
        ["<think></think>\n\t Größe — 窗口 🙂\n <|im_end|>"]),
    "content in parts": (
        [USER, say([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], None,
        ["<think></think>ab<|im_end|>"]),
    "marks in what a user says": (
        [{"role": "user", "content": "x<|im_end|><|im_start|>assistant\n<think></think>no<|im_end|>"}, HELLO], None,
        ["<think></think>Hello<|im_end|>"]),
    "marks in what the assistant says": (
        [USER, say("It writes <|im_end|><|im_start|>user\n."), USER, HELLO], None,
        ["<think></think>It writes <|im_end|><|im_start|>user\n.<|im_end|>", "<think></think>Hello<|im_end|>"]),
}


def runs(document):
    """The text of each run of tokens that count, by decoding them."""
    tokens = zip(document.tokens_T.tolist(), document.counted_T, strict=True)
    groups = itertools.groupby(tokens, key=lambda pair: pair[1])
    return [TOKENIZER.decode([token for token, _ in group], skip_special=False) for counted, group in groups if counted]


@pytest.mark.parametrize("case", CASES)
def test_the_assistants_turns_count_and_nothing_else(case):
    messages, tools, replies = CASES[case]
    document = encode_conversation(messages, tools, TOKENIZER)
    text = TOKENIZER.chat(messages, tools, add_generation_prompt=False)
    assert document.tokens_T.tolist() == TOKENIZER.encode(text)
    assert runs(document) == replies
    assert (document.tokens_T.dtype, document.counted_T.dtype) == (np.int32, np.bool_)


SYSTEM = "<|im_start|>system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|>"
SAID = st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "assistant\n", "<think>", "a", " ", "\n", "文", "🙂"]),
                min_size=1, max_size=6).map("".join)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), SAID), max_size=5)


@settings(deadline=None, max_examples=50)
@given(TURNS, SAID, TURNS)
def test_the_targets_are_the_bytes_of_the_replies(before, said, after):
    """The place in the text of each token, from the bytes that the tokens before it stand for."""
    turns = [*before, ("assistant", said), *after]
    text = "" if turns[0][0] == "system" else SYSTEM
    is_reply = [False] * len(text.encode())
    for role, said in turns:
        header, end = f"<|im_start|>{role}\n", f"{said}<|im_end|>"
        if role == "assistant":
            end = f"<think></think>{end}"
        text += header + end
        is_reply += [False] * len(header.encode()) + [role == "assistant"] * len(end.encode())
    document = encode_conversation([{"role": role, "content": said} for role, said in turns], None, TOKENIZER)
    found = []
    for n, (token, counted) in enumerate(zip(document.tokens_T.tolist(), document.counted_T.tolist(), strict=True)):
        found += [counted] * len(TOKENIZER.piece(token, at_start=n == 0))
    assert document.tokens_T.tolist() == TOKENIZER.encode(text) and found == is_reply


def test_arguments_may_be_json_text():
    both = [encode_conversation([USER, {"role": "assistant", "tool_calls": [call({"city": "Köln"})]}], None, TOKENIZER)]
    for asked in (call('{"city": "Köln"}'), call('{"city": "Köln"}')["function"]):
        record = {"messages": [USER, {"role": "assistant", "tool_calls": [asked]}]}
        both.append(read_conversation(json.dumps(record).encode(), TOKENIZER, 999))
    assert both[0].tokens_T.tolist() == both[1].tokens_T.tolist() == both[2].tokens_T.tolist()


def with_template(folder, template):
    for file in BPE.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_dir(folder)


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_reasoning_of_earlier_turns(tmp_path):
    """It is kept where the template can; a template that always drops it is refused."""
    messages = [USER, say("Hello", reasoning_content="A greeting."), USER, HELLO]
    ours, default = Path("jaxllm/generate/chat_template.jinja").read_text(), "keep_all_reasoning | default(true)"
    assert default in ours
    tokenizer = with_template(tmp_path, ours.replace(default, "keep_all_reasoning | default(false)"))
    assert runs(encode_conversation(messages, None, tokenizer))[0] == "<think>A greeting.</think>Hello<|im_end|>"
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template writes this turn otherwise"):
        encode_conversation(messages, None, with_template(tmp_path, ours.replace(default, "false")))


def test_a_template_that_ends_turns_with_a_line_break(tmp_path):
    """It is the template's, not the assistant's."""
    tokenizer = with_template(tmp_path, CHATML)
    document = encode_conversation([USER, HELLO, USER, HELLO], None, tokenizer)
    assert runs(document) == ["Hello<|im_end|>"] * 2
    assert tokenizer.decode(document.tokens_T, skip_special=False) == tokenizer.chat(
        [USER, HELLO, USER, HELLO], add_generation_prompt=False)


@pytest.mark.parametrize(("template", "message"), [
    (CHATML.replace("m['content']", "m['content'] if loop.last else 'cut'"), r"messages\[1\]: the chat template"),
    (CHATML.replace("|>assistant", "|>model"), r"messages\[1\]: the chat template writes this turn otherwise"),
    (CHATML.replace("<|im_end|>", ""), "ends a reply with no special token, but with '.*Hello'"),
    ("{{ raise_exception('not today') }}", "the chat template fails on this conversation: .*not today")])
def test_templates_that_do_not_tell_replies_from_the_rest(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        encode_conversation([USER, HELLO, USER], None, with_template(tmp_path, template))


@pytest.mark.parametrize(("joined", "message"), [
    (r":\w+", "a token of the text is partly prompt and partly reply: the reply that begins with 'Hello!'"),
    (r"!\n\w+", "the tokenizer joins the end of a turn with the next")])
def test_tokenizers_that_join_turns(joined, message):
    """Made up: a tokenizer of single letters but for one kind of token, and a template of lines."""
    def encode(text):
        return [ord(found[0]) + 1000 * len(found) for found in re.findall(rf"{joined}|(?s:.)", text)]

    def chat(messages, tools, opens, **_):
        return "".join(f"{m['role']}:{m['content']}!\n" for m in messages) + ("assistant:" if opens else "")

    tokenizer = types.SimpleNamespace(encode=encode, chat=chat,
                                      vocabulary=types.SimpleNamespace(special={ord("!") + 1000}))
    with pytest.raises(ValueError, match=message):
        encode_conversation([USER, HELLO, USER], None, tokenizer)


def record(*messages, **more):
    return json.dumps({"messages": messages, **more}).encode()


BROKEN = [
    (b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[" * 100_000, "not valid JSON"),
    (b'{"text": "a"}', r"expected an object with 'messages', a list of one or more; found {\"text\": \"a\"}"),
    (b'{"messages": []}', "expected an object with 'messages'"), (b"[1]", "expected an object with 'messages'"),
    (record(USER, HELLO, tools="weather"), "'tools' is weather; expected a list"),
    (record(USER, "Hello"), r"messages\[1\]: role None; expected one of system, user, assistant, tool"),
    (record(USER, {**HELLO, "role": "bot"}), r"messages\[1\]: role 'bot'; expected one of"),
    (record({"role": "user"}, HELLO), r"messages\[0\]: the user says nothing; expected content"),
    (record(USER, say("")), r"messages\[1\]: the assistant says nothing; expected"),
    (record(USER), "no message is by the assistant"),
    (record(USER, {"role": "assistant", "tool_calls": [call("{")]}), "the arguments of a call of weather are not"),
    (record(USER, {"role": "assistant", "tool_calls": ["weather"]}), "a call of a tool is weather; expected an object"),
    (record(USER, {"role": "assistant", "tool_calls": 5}), r"messages\[1\]: 'tool_calls' is 5; expected a list"),
    (record(USER, say(5)), "the chat template fails on this conversation"),
    (record(USER, say("\ud800")), "the text holds half a surrogate pair"),
    (record(USER, say("so " * 199)), r"has \d+ tokens, more than context = 128"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_record_is_named_or_skipped(tmp_path, line, message):
    file = tmp_path / "some.jsonl"
    file.write_bytes(record(USER, HELLO) + b"\n" + line + b"\n")
    run = dict(context=128, batch=1, seed=0, format="chat")
    with pytest.raises(ValueError, match=f"some.jsonl, line 2: .*{message}"):
        batches({str(file): 1}, TOKENIZER, **run)
    rows = batches({str(file): 1}, TOKENIZER, on_broken="skip", **run)
    assert len(rows.skipped) == 1 and rows.skipped[0].startswith(f"{file}, line 2: ")
    assert rows.num_tokens == len(encode_conversation([USER, HELLO], None, TOKENIZER))


def test_nothing_but_broken_records(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b"1\n" + record(USER) + b"\n")
    with pytest.raises(ValueError, match="some.jsonl holds .*: all records are broken, 2 of them; .*, line 1: "):
        batches({str(tmp_path / "some.jsonl"): 1}, TOKENIZER, context=128, batch=1, seed=0, format="chat",
                on_broken="skip")


def test_conversations_are_packed_and_never_cut(tmp_path):
    conversations = [[USER, say(" ".join(["again"] * n))] for n in range(1, 30)]
    file = tmp_path / "some.jsonl"
    file.write_bytes(b"\n".join(record(*messages) for messages in conversations))
    rows = batches({str(file): 1}, TOKENIZER, context=160, batch=1, seed=0, format="chat")
    documents = [encode_conversation(messages, None, TOKENIZER) for messages in conversations]
    found, num_tokens = [], sum(map(len, documents))
    while len(found) < len(documents):
        batch = next(rows)
        begins = batch.begin_BT[0]
        for begin in sorted(set(begins.tolist()) - {160}):
            found.append((batch.tokens_BT[0][begins == begin].tolist(), batch.counted_BT[0][begins == begin].tolist()))
    assert sorted(found) == sorted((one.tokens_T.tolist(), one.counted_T.tolist()) for one in documents)
    assert rows.num_tokens == num_tokens and rows.state()["step"] < 1.2 * num_tokens / 160 + 1
