"""A source, of which parts of some parameters stand for themselves."""
from collections.abc import Mapping

import numpy as np

from jaxllm.checkpoint.blocks import Index
from jaxllm.checkpoint.source import Source


class Selected:
    """The parameters of `source`, where some rows (int, along dim 0, in any order) of one are a parameter of their own.

    selected: path here -> (path there, rows). What is selected from is no parameter here.
    """

    def __init__(self, source: Source, selected: Mapping[str, tuple[str, np.ndarray]]):
        self.folder, self.source, self.selected = source.folder, source, selected
        whole = {path for path, _ in selected.values()}
        self.params = {path: held for path, held in source.params.items() if path not in whole} | {
            path: ((len(rows), *source.params[of][0][1:]), source.params[of][1])
            for path, (of, rows) in selected.items()}

    def read(self, path: str, index: Index) -> np.ndarray:
        """params[path][index], not empty."""
        if path not in self.selected:
            return self.source.read(path, index)
        of, rows = self.selected[path]
        return np.concatenate([self.source.read(of, (slice(row, row + 1), *index[1:])) for row in rows[index[0]]])

    def describe(self, path: str) -> str:
        return f"some of {self.source.describe(self.selected[path][0])}" if path in self.selected else \
            self.source.describe(path)
