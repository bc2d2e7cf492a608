"""Training a tokenizer: byte-pair encoding by sentencepiece, with bytes to fall back to, so that no text is lost.

Decoding gives back what was encoded, byte for byte: nothing is normalised, no space is put in front, runs of spaces and
line breaks stay as long as they are, and a character that the vocabulary lacks is spelled in UTF-8 bytes. A space or a
line break begins a piece and never stands inside one that began otherwise; punctuation may join the word before it,
and each digit stands alone. The same text gives the same files, bit for bit.

Ids: SPECIAL in that order, then <unk>, which no text needs, the 256 bytes, and what was learnt.
"""
import gzip
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxllm.documents import OPENERS, read_documents

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SPECIAL = (END_OF_TEXT, TURN, END_OF_TURN, *MARKS)      # the first three leave no text behind, the others themselves
UNKNOWN = len(SPECIAL)
SMALLEST = UNKNOWN + 1 + 256      # ids that every vocabulary has
COVERAGE = 0.998                  # of all characters, the rarest left to bytes: fewer tokens than with 0.9995
LONGEST = 10_000                  # characters of a sentence; sentencepiece counts those between spaces in 16 bits
JSON_LINES = (".jsonl", ".json")
RULES: dict[str, Any] = dict(
    model_type="bpe", byte_fallback=True, character_coverage=COVERAGE, normalization_rule_name="identity",
    remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True, split_digits=True,
    split_by_unicode_script=False, bos_id=-1, pad_id=-1, eos_id=0, eos_piece=END_OF_TEXT, unk_id=UNKNOWN,
    control_symbols=[TURN, END_OF_TURN], user_defined_symbols=list(MARKS), max_sentence_length=4 * LONGEST,
    num_threads=1, minloglevel=3)


def train_tokenizer(texts: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], vocab_size: int = 8192,
                    shares: Sequence[float] | None = None) -> Path:
    """Train a tokenizer on files of text and write its folder `out`, which `Tokenizer.from_dir` reads.

    texts: JSON Lines with a string "text" a line (names in .jsonl or .json), else plain UTF-8; .xz, .gz are unpacked.
    shares: how much of the training text, in bytes, each file is to be; as much is drawn as takes nothing twice.
    Without them all is read. out: a folder that does not exist or is empty; it is there whole or not at all.

    Returns `out`. Errors: ValueError for a file without text, shares that are none, a vocabulary that is smaller or
    larger than the text allows, an `out` that holds something; OSError.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already holds something; expected a new or empty folder; nothing was changed")
    if not texts:
        raise ValueError("no text to train a tokenizer on; expected one file or more")
    sentences = [list(_sentences(_read(file))) for file in texts]
    if shares is not None:
        sentences = _draw(sentences, _checked(shares, texts))
    model = _train([sentence for some in sentences for sentence in some], vocab_size)
    _write(out, {"tokenizer.model": model, "tokenizer_config.json": _json(_config()),
                 "generation_config.json": _json({"eos_token_id": [0, SPECIAL.index(END_OF_TURN)], "pad_token_id": 0})})
    return out


def _read(file: str | os.PathLike[str]) -> list[str]:
    path = Path(file)
    if (path.with_suffix("") if path.suffix in OPENERS else path).suffix in JSON_LINES:
        return read_documents(path)
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as content:
            text = content.read().decode()
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole file of UTF-8 text: {error}") from error
    if not text:
        raise ValueError(f"{path} holds no text; expected some to train a tokenizer on")
    return [text]


def _sentences(documents: Sequence[str]) -> Iterator[str]:
    """What pieces are learnt inside of: a line with the line breaks before it, as a word has its space before it."""
    for document in documents:
        for line in re.split(r"(?<=[^\n])(?=\n)", document):
            yield from (line[i:i + LONGEST] for i in range(0, len(line), LONGEST))


def _checked(shares: Sequence[float], texts: Sequence[object]) -> Sequence[float]:
    if len(shares) != len(texts):
        raise ValueError(f"{len(shares)} shares for {len(texts)} files; expected one for each")
    if not all(0 < share < math.inf for share in shares):
        raise ValueError(f"shares: {', '.join(map(str, shares))}; expected numbers above 0")
    return shares


def _draw(sentences: Sequence[Sequence[str]], shares: Sequence[float]) -> list[list[str]]:
    """Of each file's sentences as many as its share, in a fixed random order; the scarcest file is drawn whole."""
    lengths = [sum(len(sentence.encode()) for sentence in some) for some in sentences]
    unit = min(length / share for length, share in zip(lengths, shares, strict=True))
    drawn = []
    for some, share in zip(sentences, shares, strict=True):
        order, taken, left = random.Random(0).sample(some, len(some)), list[str](), unit * share
        while order and left > 0:
            taken.append(order.pop())
            left -= len(taken[-1].encode())
        drawn.append(taken)
    return drawn


def _train(sentences: Sequence[str], vocab_size: int) -> bytes:
    # here, because only who trains or reads a tokenizer.model needs it
    import sentencepiece

    if vocab_size <= SMALLEST:
        raise ValueError(f"vocab_size = {vocab_size}: {SMALLEST} ids are special tokens and bytes; expected more")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, **RULES)
    except RuntimeError as error:
        _explain(error, vocab_size)
    return model.getvalue()


def _explain(error: RuntimeError, vocab_size: int) -> NoReturn:
    """The limit that sentencepiece names only in the middle of its complaint."""
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        raise ValueError(f"vocab_size = {vocab_size} is too small for the characters of this text; sentencepiece "
                         f"allows {least[1]} or more") from error
    if most := re.search(r"Vocabulary size too high .* <= (\d+)", str(error)):
        raise ValueError(f"vocab_size = {vocab_size} is too large for so little text; sentencepiece allows at most "
                         f"{most[1]}") from error
    raise ValueError(f"sentencepiece cannot learn from this text: {error}") from error


def _config() -> dict[str, object]:
    """What other libraries are to know of the model: they add a space and a first token unless told otherwise."""
    return {"tokenizer_class": "LlamaTokenizer", "bos_token": None, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
            "unk_token": "<unk>", "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
            "legacy": False, "clean_up_tokenization_spaces": False}


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _write(out: Path, files: dict[str, bytes]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        part.chmod(0o755)      # mkdtemp's is for the owner alone
        for name, content in files.items():
            (part / name).write_bytes(content)
        part.rename(out)       # takes the place of an empty folder, of no other
    except BaseException:
        shutil.rmtree(part)
        raise
