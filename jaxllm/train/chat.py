"""Conversations to learn from: the tokens of the whole text, of which the assistant's replies are targets.

The text is what the model's chat template writes. What of it is a reply is found out from the template itself, never by
looking for marks in the text, which a message may spell out as well. Up to a reply the template is asked for a prompt,
and up to its end for a conversation; each must be how the text begins:

    prompt       <|im_start|>user\\nHi<|im_end|><|im_start|>assistant\\n
    with reply   <|im_start|>user\\nHi<|im_end|><|im_start|>assistant\\n<think></think>Hello<|im_end|>
    text         <|im_start|>user\\nHi<|im_end|><|im_start|>assistant\\n<think></think>Hello<|im_end|><|im_start|>...

So a reply is what the model itself has to write: reasoning, answer, calls of tools, and the token that ends the turn.
"""
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.generate.text import Tokenizer
from jaxllm.train.packing import Document

ROLES = ("system", "user", "assistant", "tool")
REPLY = ("content", "reasoning_content", "tool_calls")      # what an assistant's message may consist of
Message = Mapping[str, Any]


def read_conversation(line: bytes, tokenizer: Tokenizer, context: int) -> Document:
    """The conversation of one JSON line: an object with `messages`, a list of {"role", "content", ...} as in OpenAI's
    interface, and `tools`, if there are any. Errors: ValueError saying what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:      # bytes that are no UTF-8 too
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(messages := record.get("messages"), list) or not messages:
        raise ValueError("expected an object with 'messages', a list of one or more; found "
                         f"{line.decode(errors='replace').rstrip()[:80]}")
    if not isinstance(tools := record.get("tools"), list | None):
        raise ValueError(f"'tools' is {str(tools)[:80]}; expected a list")
    document = encode_conversation([checked(i, message) for i, message in enumerate(messages)], tools, tokenizer)
    if len(document) > context:
        raise ValueError(f"the conversation has {len(document)} tokens, more than context = {context}; a conversation "
                         "is never cut: shorten it, or raise context")
    return document


def checked(i: int, message: Any) -> Message:
    """Message i, with calls of tools as templates expect them. Errors: ValueError for one that says nothing, or by
    nobody we know."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise ValueError(f"messages[{i}]: role {role!r}; expected one of {', '.join(ROLES)}")
    if role == "assistant" and not any(message.get(key) for key in REPLY):
        raise ValueError(f"messages[{i}]: the assistant says nothing; expected {' or '.join(REPLY)}")
    if role != "assistant" and message.get("content") is None:
        raise ValueError(f"messages[{i}]: the {role} says nothing; expected content")
    if not (calls := message.get("tool_calls")):
        return message
    if not isinstance(calls, list):
        raise ValueError(f"messages[{i}]: 'tool_calls' is {str(calls)[:80]}; expected a list")
    return {**message, "tool_calls": [with_arguments(i, call) for call in calls]}


def with_arguments(i: int, call: Any) -> Any:
    """The call with its arguments as a mapping: OpenAI's interface has them as JSON text, templates do not parse."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValueError(f"messages[{i}]: a call of a tool is {str(call)[:80]}; expected an object with a 'function'")
    if not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        function = {**function, "arguments": json.loads(arguments)}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"messages[{i}]: the arguments of a call of {function.get('name')} are not valid JSON: "
                         f"{error}") from None
    return {**call, "function": function}


def encode_conversation(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, tokenizer: Tokenizer
                        ) -> Document:
    """The tokens of the whole text, in which the replies count. Errors: ValueError for a conversation without a reply,
    and where template or tokenizer do not let replies be told from the rest."""
    text, replies = find_replies(messages, tools, tokenizer)
    ids, counted, done = list[int](), list[bool](), 0
    for start, end in replies:
        prompt, turn = tokenizer.encode(text[done:start]), tokenizer.encode(text[done:end])
        if turn[:len(prompt)] != prompt:
            raise ValueError("a token of the text is partly prompt and partly reply: the reply that begins with "
                             f"{text[start:end][:20]!r} cannot be learned as the model would have to write it")
        if turn[-1] not in tokenizer.vocabulary.special:
            raise ValueError("the chat template ends a reply with no special token, but with "
                             f"{text[start:end][-20:]!r}: the model would never learn to stop")
        ids, counted = ids + turn, counted + [False] * len(prompt) + [True] * (len(turn) - len(prompt))
        done = end
    rest = tokenizer.encode(text[done:])
    if ids + rest != tokenizer.encode(text):
        raise ValueError("the tokenizer joins the end of a turn with the next, so replies cannot be told from the rest")
    return Document(np.array(ids + rest, np.int32), np.array(counted + [False] * len(rest), bool))


def find_replies(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, tokenizer: Tokenizer
                 ) -> tuple[str, list[tuple[int, int]]]:
    """The text, and [start, end) in it of each assistant's turn after the header, white space after it left out."""
    def write(num_messages: int, opens_reply: bool) -> str:
        # All reasoning is kept, where a template can: what was thought in earlier turns is to be learned as well.
        return tokenizer.chat(messages[:num_messages], tools, opens_reply, keep_all_reasoning=True)

    text, replies = write(len(messages), False), []
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        prompt, conversation = write(i, True), write(i + 1, False)
        if not (conversation.startswith(prompt) and text.startswith(conversation)):
            raise ValueError(f"messages[{i}]: the chat template writes this turn otherwise in the whole conversation "
                             "than on its own, so the reply cannot be told from the rest; end the conversation here, "
                             "or use a template that only ever appends")
        replies.append((len(prompt), len(conversation.rstrip())))
    if not replies:
        raise ValueError("no message is by the assistant, so there is nothing to learn")
    return text, replies
