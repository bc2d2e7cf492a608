"""The verb about tokenizers: tokenizer train."""
import argparse
from collections.abc import Sequence
from typing import Any

from jaxllm.cli.parser import Parser, Verbs


class OptionsBetween(Parser):
    """Options may stand between arguments, as in `TEXT TEXT --vocab 8192 OUT`; argparse takes the first TEXTs for all.

    The library has a method for that, which itself asks for the usual parse, but none that subcommands can be told of.
    """
    _is_usual = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore
        if self._is_usual:
            return super().parse_known_args(args, namespace)
        self._is_usual = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_usual = False


def add_tokenizer(verbs: Verbs) -> None:
    verb = verbs.add_parser("tokenizer", help="train a tokenizer", description="What there is to do with tokenizers.")
    add_train(verb.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=OptionsBetween))


def add_train(verbs: "argparse._SubParsersAction[Any]") -> None:
    verb = verbs.add_parser("train", help="learn a vocabulary from text",
                            description="Writes a sentencepiece tokenizer with byte fallback that loses nothing of any "
                                        "text, and has MiMo-V2's chat tokens.")
    verb.add_argument("texts", metavar="TEXT", nargs="+",
                      help="JSON Lines, one document a line in \"text\" (.jsonl), or plain UTF-8; .xz and .gz are "
                           "unpacked")
    verb.add_argument("out", metavar="OUT", help="a new or empty folder")
    verb.add_argument("--vocab", metavar="N", type=int, default=8192, help="number of tokens (default: 8192)")
    verb.add_argument("--shares", metavar="S,S,...", type=shares,
                      help="how much of the text each file is to be, as in 2,2,1 (default: all there is of each)")
    verb.set_defaults(run=run_train)


def shares(text: str) -> list[float]:
    return [float(share) for share in text.split(",")]


def run_train(args: argparse.Namespace) -> None:
    from jaxllm.train.tokenizer import train_tokenizer  # not with every other verb
    out = train_tokenizer(args.texts, args.out, args.vocab, args.shares)
    print(f"{out}: {args.vocab} tokens from {len(args.texts)} files")
