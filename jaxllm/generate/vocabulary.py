"""The bytes behind each token, out of the two libraries that read tokenizer files.

Where the bytes of a text are not UTF-8, U+FFFD stands in: byte-level BPE marks each broken sequence once, byte fallback
marks each byte, as the two libraries do. One difference is on purpose: for one bad byte in a run of fallback bytes
`tokenizers` gives up the whole run, which no stream could know in time; the run's good characters stay here.
"""
import codecs
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from jaxllm.generate.chat import read_json

# Decoders of tokenizer.json under which a token's text does not depend on its neighbours, but for being the first.
_LOCAL_DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
_FALLBACK_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Vocabulary(Protocol):
    """What both libraries can say about a vocabulary."""

    size: int                            # largest id plus one
    special: set[int]
    utf8_errors: str                     # the codec's error handler for bytes that are not UTF-8
    strips_every_leading_space: bool     # the text has not begun while its tokens add nothing

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written in the text are recognised, none are added."""

    def token_id(self, content: str) -> int | None:
        """The id of a token by its content; None if there is none."""

    def piece(self, token: int, at_start: bool) -> bytes | None:
        """The bytes that a token (0 to size - 1) adds, at the start of a text or later; None for an id without one."""


class JsonVocabulary:
    """tokenizer.json by the `tokenizers` library."""

    strips_every_leading_space = False

    def __init__(self, path: Path):
        spec = read_json(path)
        try:
            self._library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:       # the library raises nothing more specific
            raise ValueError(f"{path}: the tokenizers library cannot read it ({error}); is the file whole?") from error
        self._library.no_truncation()    # settings of whoever saved the file; a prompt is never cut in silence
        self._library.no_padding()
        ids = self._library.get_vocab(with_added_tokens=True).values()
        self.size = max(ids, default=-1) + 1
        self.special = {token for token, added in self._library.get_added_tokens_decoder().items() if added.special}
        decoders = _decoders(path, spec.get("decoder"))
        self._is_byte_level = "ByteLevel" in decoders
        self._has_fallback_bytes = "ByteFallback" in decoders
        self.utf8_errors = "replace" if self._is_byte_level else "jaxllm.mark_each_byte"
        # any token with text of its own: what another one adds after it is what that one adds after the start
        texts = ((token, self._text(token)) for token in sorted(ids))
        self._anchor = next((token for token, text in texts if text and "\ufffd" not in text), None)

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def token_id(self, content: str) -> int | None:
        return self._library.token_to_id(content)

    def piece(self, token: int, at_start: bool) -> bytes | None:
        content = self._library.id_to_token(token)
        if content is None:              # ids may have gaps
            return None
        if self._is_byte_level:
            return _byte_level(content)
        if self._has_fallback_bytes and (byte := _FALLBACK_BYTE.fullmatch(content)):
            return bytes.fromhex(byte[1])
        if at_start or self._anchor is None:
            return self._text(token).encode()
        return self._text(self._anchor, token).removeprefix(self._text(self._anchor)).encode()

    def _text(self, *tokens: int) -> str:
        return self._library.decode(tokens, skip_special_tokens=False)


class SentencePieceVocabulary:
    """tokenizer.model by sentencepiece."""

    utf8_errors = "jaxllm.mark_each_byte"

    def __init__(self, path: Path):
        # here, because few folders need it
        import sentencepiece

        try:
            self._library = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: sentencepiece cannot read it ({error}); is the file whole?") from error
        self.size = self._library.vocab_size()
        self.special = {token for token in range(self.size) if self._library.is_control(token)}
        space = self.token_id("▁")
        self.strips_every_leading_space = space is not None and self._library.decode([space, space]) == ""
        self._cut_out = {self._library.id_to_piece(token): [token] for token in self.special} | self._space_mark()
        names = sorted(map(re.escape, self._cut_out), key=len, reverse=True)
        self._names = re.compile(f"({'|'.join(names)})") if names else None

    def _space_mark(self) -> dict[str, list[int]]:
        """The letter that the library writes for a space, in bytes, where the vocabulary has them all.

        Where the library puts a space before each part that it encodes, cutting it out would lose more than it saves.
        """
        ids = [self.token_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        spelled = [token for token in ids if token is not None]
        return {"▁": spelled} if len(spelled) == len(ids) and self._library.normalize("a") == "a" else {}

    def encode(self, text: str) -> list[int]:
        """Control pieces, which the library takes for plain text, and "▁", which it takes for a space, are cut out."""
        parts = self._names.split(text) if self._names else [text]
        tokens: list[int] = []
        for i, part in enumerate(parts):                     # texts at even places, names at odd ones
            tokens += self._library.encode(part) if i % 2 == 0 else self._cut_out[part]
        return tokens

    def token_id(self, content: str) -> int | None:
        token = self._library.piece_to_id(content)           # the unknown token's, if there is none
        return token if self._library.id_to_piece(token) == content else None

    def piece(self, token: int, at_start: bool) -> bytes | None:
        content = self._library.id_to_piece(token)
        if token in self.special:                            # the library always leaves them out
            return content.encode()
        if self._library.is_byte(token):
            return bytes.fromhex(content[3:5])
        if at_start or self._library.is_unknown(token):
            return self._library.decode([token]).encode()
        return content.replace("▁", " ").encode()


def _decoders(path: Path, spec: Mapping[str, Any] | None) -> set[str]:
    """The kinds of decoder that a tokenizer.json chains; ValueError for a chain under which text cannot be streamed."""
    steps = _flattened(spec)
    kinds = {step["type"] for step in steps}
    refused = [step for step in steps if not _is_local(step)]
    if refused or ("ByteLevel" in kinds and kinds - {"ByteLevel", "Fuse"}):
        raise ValueError(f"{path}: with the decoder {refused or steps} a token's text depends on its neighbours, so it "
                         f"cannot be streamed; supported: ByteLevel alone, or a chain of "
                         f"{', '.join(sorted(_LOCAL_DECODERS - {'ByteLevel'}))} (Replace of one character, Strip only "
                         "at the start)")
    return kinds


def _flattened(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if spec is None:
        return []
    return [leaf for step in spec["decoders"] for leaf in _flattened(step)] if spec["type"] == "Sequence" else [spec]


def _is_local(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in _LOCAL_DECODERS and step.get("stop", 0) == 0


def _byte_level(content: str) -> bytes:
    """The bytes behind a token of byte-level BPE, which spells each as one letter; added tokens may be plain text."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in content)
    except KeyError:
        return content.encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes are numbered on from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)             # registered for decoding only
    return "\ufffd" * (error.end - error.start), error.end


_BYTE_OF_CHARACTER = _byte_of_character()
codecs.register_error("jaxllm.mark_each_byte", _mark_each_byte)
