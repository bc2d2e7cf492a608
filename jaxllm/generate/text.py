"""Text in and out: the tokenizer that a model folder holds, and tokens turned into text while they arrive.

Every token stands for a few bytes (vocabulary.py), and a text is those bytes one after the other, read as UTF-8. That
one rule holds for byte-level BPE, for sentencepiece with byte fallback, and for a stream as for a whole. So a stream
keeps at most three bytes of an unfinished character and the beginning of a stop string, and a token costs the same
however long the text before it is. Only the first token differs: sentencepiece drops the space that it put there.
"""
import codecs
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.generate.chat import ChatTemplate, read_json
from jaxllm.generate.vocabulary import JsonVocabulary, SentencePieceVocabulary, Vocabulary


class Tokenizer:
    """A folder's tokenizer and chat template; made by `Tokenizer.from_dir`."""

    def __init__(self, vocabulary: Vocabulary, folder: Path, padded_to: int):
        self.vocabulary = vocabulary
        self._folder = folder
        self._padded_to = padded_to
        self._later_piece = functools.cache(functools.partial(vocabulary.piece, at_start=False))

    @classmethod
    def from_dir(cls, folder: str | Path, padded_to: int | None = None) -> "Tokenizer | None":
        """Reads `tokenizer.json`, else `tokenizer.model`, of a folder; None where it holds neither.

        padded_to: the model's vocabulary (`Config.vocab_size`), which may be larger than the tokenizer's. The ids
        between the two are rows that pad the embedding: they decode to nothing.

        Raises ValueError, naming the file, for a broken file and for a tokenizer with more tokens than the model.
        """
        folder = Path(folder).absolute()
        if (path := folder / "tokenizer.json").is_file():
            vocabulary: Vocabulary = JsonVocabulary(path)
        elif (path := folder / "tokenizer.model").is_file():
            vocabulary = SentencePieceVocabulary(path)
        else:
            return None
        padded_to = vocabulary.size if padded_to is None else padded_to
        if vocabulary.size > padded_to:
            raise ValueError(f"{path}: holds token ids up to {vocabulary.size - 1}, but the model's vocab_size is "
                             f"{padded_to}; the tokenizer and the model do not belong together")
        return cls(vocabulary, folder, padded_to)

    @property
    def vocab_size(self) -> int:
        """The tokenizer's largest id plus one; the model's vocabulary may be larger."""
        return self.vocabulary.size

    def encode(self, text: str) -> list[int]:
        """The text's token ids. Special tokens that the text spells out are recognised; none are added.

        With sentencepiece, the text after such a token is encoded like a text of its own.
        """
        if not isinstance(text, str):
            raise ValueError(f"expected a string to encode, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds half a surrogate pair at character {error.start}, "
                             "which is no Unicode text") from error
        return self.vocabulary.encode(text)

    def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; special tokens leave nothing, or with `skip_special=False` their own spelling.

        Bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id outside the (padded) vocabulary.
        """
        return _Detokenizer(self, skip_special).push(tokens, final=True)

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
             add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt text of a conversation by the folder's chat template, to be passed to `encode`.

        messages: mappings with `role`, `content` and what else the template reads (`reasoning_content`, `tool_calls`).
        variables: go to the template as they are (`enable_thinking=False`). A folder without a template gets MiMo-V2's
        if its tokenizer knows ChatML's tokens.

        Raises ValueError with the folder and the reason.
        """
        return self._template.render(messages, tools, add_generation_prompt, variables)

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        chatml = ("<|im_start|>", "<|im_end|>")
        return ChatTemplate.from_dir(self._folder, all(self.vocabulary.token_id(token) is not None for token in chatml))

    def piece(self, token: int, at_start: bool) -> bytes | None:
        """The bytes that one token adds to a text, at its start or later; None for an id that only pads the vocabulary.

        Raises ValueError for an id outside the (padded) vocabulary.
        """
        if not 0 <= token < self._padded_to:
            raise ValueError(f"token id {token} is not in the vocabulary of {self._folder}: 0 to {self._padded_to - 1}"
                             "; for a larger embedding give padded_to=config.vocab_size to Tokenizer.from_dir")
        if token >= self.vocabulary.size:
            return None
        return self.vocabulary.piece(token, at_start) if at_start else self._later_piece(token)


class TextStream:
    """Text of tokens as they arrive, up to the first stop string.

    The pieces that `push` and `finish` return, joined, are `tokenizer.decode` of all tokens, cut before the first stop
    string: the one whose last character comes first, and of those that end there the longest. No piece ends inside a
    character or holds what could still become a stop string. Stop strings are looked for in the decoded text, where
    special tokens leave nothing: stop at those by id.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop: expected a list of strings that are not empty, found {stop!r}")
        self.stopped = False         # a stop string was completed
        self._stop = tuple(stop)
        self._detokenizer = _Detokenizer(tokenizer, skip_special=True)
        self._held = ""              # the longest end of the text so far that a stop string begins with

    def push(self, tokens: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is now final. Once stopped, it ignores them and returns ""."""
        return "" if self.stopped else self._release(self._detokenizer.push(tokens))

    def finish(self) -> str:
        """The rest, when no token will follow; U+FFFD for a character left unfinished. A second call gives ""."""
        if self.stopped:
            return ""
        text = self._release(self._detokenizer.push((), final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)[1]]
        sizes = (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size]))
        final = len(text) - max(sizes, default=0)
        self._held = text[final:]
        return text[:final]


class _Detokenizer:
    """Tokens to text, a few at a time; it keeps an unfinished character's bytes, and whether the text has begun."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_start = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.vocabulary.utf8_errors)

    def push(self, tokens: Iterable[int], final: bool = False) -> str:
        return self._utf8.decode(b"".join(self._piece(operator.index(token)) for token in tokens), final)

    def _piece(self, token: int) -> bytes:
        vocabulary = self._tokenizer.vocabulary
        if self._skip_special and token in vocabulary.special:
            return b""
        piece = self._tokenizer.piece(token, self._at_start)
        if piece is None:
            return b""
        self._at_start = self._at_start and vocabulary.strips_every_leading_space and not piece
        return piece


def load_stop_ids(folder: str | Path, config_eos: Sequence[int]) -> tuple[int, ...]:
    """The token ids that end a text, ascending: config.json's (passed) and those of generation_config.json, if there.

    Raises ValueError, naming the file, for broken JSON and an `eos_token_id` that is neither an id nor a list of ids.
    """
    path = Path(folder) / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{path}: eos_token_id is {found!r}; expected a token id or a list of token ids")
    return tuple(sorted({*config_eos, *ids}))
