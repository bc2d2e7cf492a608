"""Models for the tests of generation, and watchers of what they compile and run."""
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import pytest
from hub_maker import tiny_config, write_hub
from reciter import Reciter, write_reciter

import jaxllm


@pytest.fixture(scope="session")
def reciter(tmp_path_factory: pytest.TempPathFactory) -> Reciter:
    return write_reciter(tmp_path_factory.mktemp("reciter"))


@pytest.fixture(scope="session")
def speaker(reciter: Reciter) -> jaxllm.Model:
    """The reciter's model."""
    return jaxllm.load(reciter.folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers, full and dense, sliding with experts; no tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_hub(folder, tiny_config(num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1],
                                  hidden_size=32, eos_token_id=None, max_position_embeddings=1200), seed=2)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> jaxllm.Model:
    return jaxllm.load(tiny_folder)


@pytest.fixture(scope="session")
def compilations() -> Callable[[], AbstractContextManager[list[str]]]:
    """`with compilations() as compiled:` lists what XLA is asked to compile meanwhile."""
    @contextlib.contextmanager
    def watch() -> Iterator[list[str]]:
        compiled: list[str] = []

        def listen(event: str, seconds: float, **details: object) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                compiled.append(str(details.get("fun_name", event)))
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield compiled
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    return watch


@pytest.fixture
def advances(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of steps asked for at each call of the loop on the device."""
    calls: list[int] = []
    advance = jaxllm.generate.engine.advance

    def counted(model, state, sampling, stop_ids, steps, kind):  # type: ignore[no-untyped-def]
        calls.append(steps)
        return advance(model, state, sampling, stop_ids, steps, kind)
    monkeypatch.setattr(jaxllm.generate.engine, "advance", counted)
    return calls
