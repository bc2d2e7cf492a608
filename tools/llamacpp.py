"""llama.cpp behind the interface of oracles.py, through llama-cpp-python's low-level calls.

The wheel carries no converter, so vendor/llama.cpp of the source release must lie at `<python prefix>/llama.cpp`. The
converter is told the hub file's own numbers: left alone it asks transformers' AutoConfig, which widens the window by 1.
"""
import contextlib
import ctypes
import io
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from oracles import NUM_THREADS, Greedy, rope_settings, window_keys

SOURCES = Path(sys.prefix) / "llama.cpp"


def convert_to_gguf(folder: Path, file: Path, with_mtp: bool = False) -> None:
    """Write `folder` as a float32 GGUF without vocabulary: token ids in, logits out. MXFP4 experts stay as they are."""
    if not (SOURCES / "conversion" / "mimo.py").is_file():
        raise ValueError(f"{SOURCES}: no llama.cpp sources with conversion/mimo.py; unpack vendor/llama.cpp of the "
                         "llama-cpp-python source release there")
    sys.path[:0] = [str(SOURCES / "gguf-py"), str(SOURCES)]
    import gguf
    from conversion.base import ModelBase
    from conversion.mimo import MimoV2Model

    config = json.loads((folder / "config.json").read_text())
    theta, _, share = rope_settings(config)
    config |= {"sliding_window": window_keys(config),
               "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}}

    class WithoutVocabulary(MimoV2Model):
        model_arch, no_mtp = MimoV2Model.model_arch, not with_mtp

        def set_vocab(self) -> None:
            self.gguf_writer.add_tokenizer_model("none")
            self.gguf_writer.add_vocab_size(config["vocab_size"])

    original = ModelBase.load_hparams
    ModelBase.load_hparams = staticmethod(lambda *_: config)
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):       # its progress bar; errors are exceptions
            WithoutVocabulary(folder, gguf.LlamaFileType.ALL_F32, file).write()
    finally:
        ModelBase.load_hparams = original
        logging.disable(logging.NOTSET)


class LlamaCpp:
    """float32 weights and float32 cache; one llama_batch holds the tokens of every sequence of a step.

    `flash` turns on llama.cpp's flash attention: a prefill of 512 takes a third of the time, and logits are off by 6e-3
    on mimo-nano and 1.6e-2 on the random models, so it is for timing alone.
    """

    def __init__(self, folder: str | Path, flash: bool = False):
        import llama_cpp

        self.lib, self.flash, self.version = llama_cpp, flash, llama_cpp.__version__
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)   # kept: C holds a pointer to it
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.last: Session | None = None
        self.num_vocab = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.gguf"
            convert_to_gguf(Path(folder), file)
            params = llama_cpp.llama_model_default_params()
            params.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise ValueError(f"{folder}: llama.cpp cannot load the file that its own converter made")

    def session(self, B: int, length: int) -> "Session":
        """A cleared session; the last one again when the sizes are the same, so that its buffers are warm."""
        if self.last is None or (self.last.B, self.last.length) != (B, length):
            if self.last is not None:
                self.last.close()
            self.last = Session(self, B, length)
        self.last.clear()
        return self.last

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        B, T = tokens_BT.shape
        return self.session(B, T).step(tokens_BT, keep=T).copy()

    def greedy(self, prompts_BT: np.ndarray, num_new: int) -> Greedy:
        B, T = prompts_BT.shape
        session, tokens_BT = self.session(B, T + num_new), np.empty((B, num_new), np.int32)
        start = time.perf_counter()
        tokens_BT[:, 0] = session.step(prompts_BT, keep=1)[:, -1].argmax(-1)
        first = time.perf_counter()
        for t in range(1, num_new):
            tokens_BT[:, t] = session.step(tokens_BT[:, t - 1 : t], keep=1)[:, -1].argmax(-1)
        return Greedy(tokens_BT, first - start, time.perf_counter() - first)


class Session:
    """One llama_context: B sequences of at most `length` tokens, all at the same position."""

    def __init__(self, owner: LlamaCpp, B: int, length: int):
        self.lib, self.num_vocab, self.B, self.length, self.position = owner.lib, owner.num_vocab, B, length, 0
        params = self.lib.llama_context_default_params()
        params.n_seq_max, params.n_ctx, params.n_batch = B, B * length, B * length
        params.n_threads = params.n_threads_batch = NUM_THREADS
        params.type_k = params.type_v = 0                                   # GGML_TYPE_F32
        params.flash_attn_type = (self.lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if owner.flash
                                  else self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        self.context = self.lib.llama_init_from_model(owner.model, params)
        if not self.context:
            raise ValueError(f"llama.cpp made no context of {B} sequences of {length} tokens")
        self.batch = self.lib.llama_batch_init(B * length, 0, 1)

    def close(self) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        self.position = 0

    def step(self, tokens_BT: np.ndarray, keep: int) -> np.ndarray:
        """Advance every sequence by T tokens; logits [B, keep, W] of the last `keep`, valid until the next step."""
        (B, T), batch = tokens_BT.shape, self.batch
        batch.n_tokens = B * T
        positions = np.arange(self.position, self.position + T)
        kept_BT = np.broadcast_to(np.arange(T) >= T - keep, (B, T))
        # Whole arrays where C has whole arrays: Python's time per token counts as the peer's.
        for pointer, values_BT in ((batch.token, tokens_BT), (batch.pos, np.broadcast_to(positions, (B, T))),
                                   (batch.n_seq_id, np.ones((B, T))), (batch.logits, kept_BT)):
            np.ctypeslib.as_array(pointer, (B * T,))[:] = values_BT.reshape(-1)
        for b in range(B):
            for t in range(T):
                batch.seq_id[b * T + t][0] = b
        code = self.lib.llama_decode(self.context, batch)
        if code != 0:
            raise ValueError(f"llama_decode returned {code}: {B} sequences of {T} tokens at position {self.position}")
        self.position += T
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (B, keep, self.num_vocab))
