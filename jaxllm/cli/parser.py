"""The parser that all verbs share."""
import argparse
from typing import NoReturn, TypeAlias


class Parser(argparse.ArgumentParser):
    """Its complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"
