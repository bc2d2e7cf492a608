"""The command line: options reach what they set, bad input is one line, what is printed is what was asked for."""
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_distributed import FOUR_DEVICES, free_port

import jaxllm
from jaxllm.cli import main, models
from jaxllm.info import describe

ROOT = Path(__file__).parent.parent
NANO = str(ROOT / "configs" / "mimo-nano")
MESH = "data=2,expert=2,tensor=2"


@pytest.fixture(autouse=True)
def no_cache_in_the_users_home(monkeypatch):
    monkeypatch.setenv("JAXLLM_COMPILE_CACHE", "off")


@pytest.fixture
def asked(monkeypatch):
    """What the commands ask for, in order; the model that `load` gives them answers each prompt with itself."""
    calls = []

    def load(*arguments, **options):
        calls.append(("load", *arguments, *(item for item in options.items() if item[1])))
        return SimpleNamespace(generate=generate, stream=stream, tokenizer=SimpleNamespace(chat=chat))

    def generate(prompts, **settings):
        calls.append(("generate", prompts, settings))
        return [SimpleNamespace(text=f" after {prompt}") for prompt in prompts]

    def stream(prompt, **settings):
        calls.append(("stream", prompt, settings))
        yield from (" after", f" {prompt}")

    def chat(messages):
        (message,) = messages
        return f"<{message['role']}>{message['content']}"

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "describe", lambda *arguments: calls.append(("describe", *arguments)))
    monkeypatch.setattr(jax.distributed, "initialize", lambda: calls.append(("initialize",)))
    return calls


def run(*arguments, env=None, **options):
    """A jaxllm process of its own."""
    return subprocess.run([sys.executable, "-W", "error", "-m", "jaxllm", *arguments], capture_output=True, text=True,
                          env=os.environ | (env or {}), **options)


# ---- options ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "settings"), [
    ([], {}),
    (["--max-new-tokens", "7"], {"max_new_tokens": 7}),
    (["--max-new-tokens", "0"], {"max_new_tokens": 0}),      # what is wrong with it is for `generate` to say
    (["--temperature", "0.5"], {"temperature": 0.5}),
    (["--temperature", "-1"], {"temperature": -1.0}),
    (["--top-p", "0.9", "--top-k", "5"], {"top_p": 0.9, "top_k": 5}),
    (["--seed", "0"], {"seed": 0}),
    (["--stop", "a", "--stop", "\n\n"], {"stop": ["a", "\n\n"]}),
])
def test_settings(asked, options, settings):
    assert main(["generate", "MODEL", "p", "q", *options]) == 0
    assert asked == [("load", "MODEL", None, None), ("generate", ["p", "q"], settings)]
    asked.clear()
    assert main(["generate", *options, "MODEL", "p", "q"]) == 0      # options may come first, too
    assert asked == [("load", "MODEL", None, None), ("generate", ["p", "q"], settings)]


def test_mesh_and_dtype(asked):
    assert main(["generate", "MODEL", "p", "--mesh", "data=2", "--dtype", "bfloat16"]) == 0
    assert asked[0] == ("load", "MODEL", "data=2", "bfloat16")
    assert main(["generate", "MODEL", "p", "--replicate", "--adapter", "DIR"]) == 0
    assert asked[-2] == ("load", "MODEL", None, None, ("replicate", True), ("adapter", "DIR"))
    asked.clear()
    assert main(["info", "MODEL", "--mesh", "data=2"]) == main(["info", "MODEL"]) == 0
    assert asked == [("describe", "MODEL", "data=2"), ("describe", "MODEL", None)]


def test_chat(asked, capsys):
    assert main(["generate", "MODEL", "Hello", "Bye", "--chat", "--seed", "3"]) == 0
    assert asked[1] == ("generate", ["<user>Hello", "<user>Bye"], {"seed": 3})
    assert capsys.readouterr().out == "> Hello\n after <user>Hello\n---\n> Bye\n after <user>Bye\n"


def test_a_text_follows_its_prompt(asked, capsys):
    assert main(["generate", "MODEL", "p", "q\nr"]) == 0
    assert capsys.readouterr().out == "p after p\n---\nq\nr after q\nr\n"


@pytest.mark.parametrize(("prompts", "options", "call"), [
    (["p"], [], "stream"), (["p"], ["--chat"], "stream"), (["p", "q"], [], "generate"),
    (["p"], ["--distributed"], "generate"),      # not every process has a terminal, and all must run the same steps
])
def test_one_prompt_on_a_terminal_comes_in_pieces(asked, capsys, monkeypatch, prompts, options, call):
    """With the same result as into a file."""
    assert main(["generate", "MODEL", *prompts, "--seed", "1", *options]) == 0
    into_a_file, calls = capsys.readouterr().out, asked.copy()
    asked.clear()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", "MODEL", *prompts, "--seed", "1", *options]) == 0
    assert [calls[-1][0], asked[-1][0]] == ["generate", call] and asked[-1][2] == {"seed": 1}
    assert capsys.readouterr().out == into_a_file


def test_distributed_joins_first_and_one_prints(asked, capsys, monkeypatch):
    assert main(["generate", "MODEL", "p", "--distributed"]) == 0
    assert [call[0] for call in asked] == ["initialize", "load", "generate"]
    assert capsys.readouterr().out == "p after p\n"
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert main(["generate", "MODEL", "p", "--distributed"]) == 0
    assert capsys.readouterr().out == ""


# ---- errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "message"), [
    ([], "the following arguments are required: COMMAND (see jaxllm --help)"),
    (["fly"], "argument COMMAND: invalid choice: 'fly'"),
    (["generate"], "the following arguments are required: MODEL, PROMPT (see jaxllm generate --help)"),
    (["generate", NANO], "the following arguments are required: PROMPT"),
    (["generate", NANO, "p", "--stream"], "unrecognized arguments: --stream"),
    (["generate", NANO, "p", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["generate", NANO, "p", "--seed", "-1"], "seed = -1: expected a whole number from 0"),
    (["generate", NANO, "p", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["generate", NANO, "p", "--mesh", "experts=2"], "unknown axis 'experts'; the axes are data, expert, tensor"),
    (["generate", NANO, "p", "--mesh", "data=16"], "needs 16 devices, but there are 8"),
    (["generate", NANO, "p", "--max-new-tokens", "0"], "max_new_tokens = 0: expected a whole number from 1 up"),
    (["generate", NANO, "p", "--max-new-tokens", "-3"], "max_new_tokens = -3"),
    (["generate", NANO, "p", "--temperature", "-1"], "temperature = -1.0: expected a number from 0 up"),
    (["generate", NANO, "p", "--temperature", "nan"], "temperature = nan"),
    (["generate", NANO, "p", "--top-p", "0"], "top_p = 0.0: expected a number above 0 and up to 1"),
    (["generate", NANO, "p", "--top-k", "-2"], "top_k = -2"),
    (["generate", NANO, "p", "--stop", ""], "stop = ['']: expected strings that are not empty"),
    (["generate", NANO, "p", ""], "prompt 1 is empty"),
    (["generate", NANO, "p" * 9000], "max_position_embeddings = 4096"),
    (["generate", "no/such/folder", "p"], "no/such/folder is not a folder"),
    (["info", "no/such/folder"], "no/such/folder/config.json: no such file"),
    (["info", NANO, "--mesh", "tensor=3"], "one must divide the other"),
    (["convert", NANO], "the following arguments are required: OUT_DIR (see jaxllm convert --help)"),
    (["convert", NANO, NANO], "already holds something"),
    (["convert", "no/such/folder", "out"], "no/such/folder"),
])
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and os.listdir(tmp_path) == []
    assert re.fullmatch(r"jaxllm: error: \S.*\n", printed.err) and message in printed.err      # . is no line break


def test_errors_of_several_lines_and_of_the_system(monkeypatch, capsys):
    for error, said in ((ValueError("one\n  two"), "one two"), (PermissionError(13, "Permission denied", "x"),
                                                                "[Errno 13] Permission denied: 'x'")):
        monkeypatch.setattr(models, "describe", raising(error))
        assert main(["info", NANO]) == 2
        assert capsys.readouterr().err == f"jaxllm: error: {said}\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    for error in (TypeError("a bug"), RuntimeError("a bug"), AssertionError("a bug"), KeyError("a bug"),
                  jax.dtypes.TypePromotionError("a bug"), np.exceptions.AxisError("a bug")):
        monkeypatch.setattr(models, "describe", raising(error))
        with pytest.raises(type(error), match="a bug"):
            main(["info", NANO])


def test_interrupted(monkeypatch):
    monkeypatch.setattr(models, "describe", raising(KeyboardInterrupt()))
    assert main(["info", NANO]) == 130


def raising(error):
    def raise_it(*_):
        raise error
    return raise_it


def test_distributed_without_a_job(capsys, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", raising(ValueError("coordinator_address should be defined.")))
    assert main(["generate", NANO, "p", "--distributed"]) == 2
    said = capsys.readouterr().err
    assert "JAX finds no job" in said and "coordinator_address should be defined." in said and "srun" in said


def test_help(capsys):
    for arguments in ([], ["convert"], ["generate"], ["info"]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])
        assert stopped.value.code == 0 and capsys.readouterr().out.startswith("usage: jaxllm")


# ---- the real thing --------------------------------------------------------------------------------------------------

def test_the_installed_command():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="jaxllm")
    assert script.load() is main


def test_info(capsys):
    assert main(["info", NANO, "--mesh", MESH]) == 0
    assert capsys.readouterr().out == describe(NANO, MESH) + "\n"


def test_convert_then_generate(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", NANO, str(out)]) == 0
    assert re.fullmatch(rf"{out}: 113 arrays, 3 MTP blocks among them, 33,978,912 bytes in [\d.]+ s\n",
                        capsys.readouterr().out)
    model, prompts = jaxllm.load(NANO), ["上海是", "The menu"]
    written = [result.text for result in model.generate(prompts, max_new_tokens=5)]
    assert main(["generate", str(out), *prompts, "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == "{0}{2}\n---\n{1}{3}\n".format(*prompts, *written)


def test_convert_and_info_leave_accelerators_alone(tmp_path):
    """On a host of a TPU pod slice, opening the TPU would wait for the others; here there is none to be opened."""
    env = {"JAX_PLATFORMS": "no_such_platform"}
    for arguments in (["convert", NANO, str(tmp_path / "out")], ["info", NANO]):
        done = run(*arguments, env=env)
        assert done.returncode == 0, done.stderr
    assert run("generate", NANO, "p", env=env).returncode == 1


def test_a_reader_that_has_enough():
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, "-m", "jaxllm", "info", NANO], stdout=write, stderr=subprocess.PIPE,
                               env=buffered)
    os.close(write)
    assert process.communicate()[1] == b"" and process.returncode == 1


def test_two_processes_write_what_one_does():
    """A Slurm job of two processes as JAX sees it, on loopback; mesh axes cross from one to the other."""
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2", "XLA_FLAGS": FOUR_DEVICES, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxllm", "generate", NANO, "上海是", "The menu", "--max-new-tokens", "12",
               "--mesh", "expert=4,tensor=2", "--distributed"]
    processes = [subprocess.Popen(command, env=env | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
    try:
        outcomes = [process.communicate(timeout=300) for process in processes]      # 20 seconds on two idle cores
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outcomes
    # Gloo, which carries data between processes on CPU, also prints on stdout, while they find each other
    model, prompts = jaxllm.load(NANO, mesh="expert=4,tensor=2"), ["上海是", "The menu"]
    written = [result.text for result in model.generate(prompts, max_new_tokens=12)]
    first, second = (out for out, _ in outcomes)
    assert ("\n" + first).endswith("\n{0}{2}\n---\n{1}{3}\n".format(*prompts, *written))
    assert not any(prompt in second for prompt in prompts)


def test_training_in_several_processes_joins_first(monkeypatch, capsys):
    """The first process tells where the run has come to."""
    from jaxllm.cli import train
    from jaxllm.train import loop
    calls = []
    monkeypatch.setattr(train, "join_processes", lambda: calls.append("join"))
    monkeypatch.setattr(train, "read_run", lambda file, overrides: SimpleNamespace(lora=None))
    monkeypatch.setattr(loop, "train", lambda run, resume: (calls.append("train"), loop.Trained("OUT", 3, True))[1])
    assert main(["train", "run.py", "--distributed"]) == 0 and calls == ["join", "train"]
    assert capsys.readouterr().out.startswith("OUT: 3 steps; jaxllm export OUT HUB_DIR")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert main(["train", "run.py", "--distributed"]) == 0 and capsys.readouterr().out == ""
