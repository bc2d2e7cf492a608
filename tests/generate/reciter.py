"""A hub folder whose model recites a text, so that tests of text and stops know what must come."""
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from hub_maker import tiny_config, write_hub
from safetensors.numpy import load_file, save_file

# Every language, and emoji of one code point and of several.
RECITAL = ("上海的菜单已经打开,今天没有纸了。The menu shows \"Settings\" twice; Settings!\n\n"
           "プリンターの電源が入っています。프린터가 켜져 있습니다. Où est « le café » ? Größe ändern, "
           "schöne Grüße. ¿Dónde está el señor? ok 🙂 👩‍👩‍👧‍👦, then one more line of plain words, so that more than "
           "the default number of tokens is there: fin.")


@dataclasses.dataclass(frozen=True)
class Reciter:
    """A hub folder whose model, greedy, goes from each piece of a text to the next, and after the last to `end`.

    The pieces, which may begin and end inside a character, have the ids `first`, `first` + 1, ... The ids below are the
    256 bytes; byte b leads to piece b % len(pieces). So the last token of a prompt says where the text starts.
    """
    folder: Path
    pieces: list[bytes]
    first: int
    end: int

    def prompt(self, i: int) -> list[int]:
        """A prompt of one token that continues with piece i."""
        return [self.first + i - 1] if i else [0]

    def tokens(self, i: int, num: int) -> list[int]:
        """The num tokens that follow `prompt(i)`; so many must be there."""
        assert i + num <= len(self.pieces)
        return list(range(self.first + i, self.first + i + num))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of pieces, U+FFFD for a character cut at either end."""
        return b"".join(self.pieces[token - self.first] for token in tokens).decode(errors="replace")


def cut(text: bytes) -> list[bytes]:
    """The text in pieces of two or three bytes, a few longer so that no two are the same."""
    rng, begin = np.random.default_rng(0), 0
    pieces: list[bytes] = []
    while begin < len(text):
        size = int(rng.integers(2, 4))
        while text[begin:begin + size] in pieces or len(text) - begin - size == 1:
            size += 1
        pieces.append(text[begin:begin + size])
        begin += size
    return pieces


def byte_letters() -> list[str]:
    """How byte-level BPE spells each byte: printable Latin-1 as itself, the others in order from U+0100 on."""
    printable = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


def write_tokenizer(file: Path, pieces: list[bytes]) -> None:
    """Bytes 0 to 255, then the pieces, which no text encodes to, then a special token."""
    letters = byte_letters()
    words = [*letters, *("".join(letters[byte] for byte in piece) for piece in pieces)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(file))


def write_reciter(folder: Path) -> Reciter:
    """The whole folder; eos_token_id in config.json is `end`."""
    pieces, first, D = cut(RECITAL.encode()), 256, 128
    end = first + len(pieces)
    W = end + 1 + -(end + 1) % 8                               # some ids that only pad the embedding
    write_hub(folder, tiny_config(num_hidden_layers=1, hybrid_layer_pattern=[0], moe_layer_freq=[0], hidden_size=D,
                                  vocab_size=W, eos_token_id=end, max_position_embeddings=4096))
    write_tokenizer(folder / "tokenizer.json", pieces)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "norm" in name:
            weights[name] = np.ones_like(weights[name])
        elif "o_proj" in name or "down_proj" in name:
            weights[name] = np.zeros_like(weights[name])       # attention and MLP add nothing
    embed_WD = np.random.default_rng(0).standard_normal((W, D)).astype(np.float32)
    embed_WD *= D**0.5 / np.linalg.norm(embed_WD, axis=1, keepdims=True)       # so that the norm changes nothing
    next_W = np.array([first + byte % len(pieces) for byte in range(first)] + list(range(first + 1, W)) + [0])
    head_WD = np.zeros_like(embed_WD)
    np.add.at(head_WD, next_W, embed_WD)                       # a token is likely after what resembles those before it
    weights |= {"model.embed_tokens.weight": embed_WD, "lm_head.weight": head_WD}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Reciter(folder, pieces, first, end)
