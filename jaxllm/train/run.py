"""What a run is: the settings of a run file, which is Python, checked and with every path made absolute.

    output = "../../build/nano"
    model = "../mimo-nano"
    data = {"text/*.jsonl.xz": 1.0}
    steps = 1000
"""
import ast
import dataclasses
import difflib
import json
import os
import runpy
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxllm.axes import parse_mesh

AT_LEAST_2 = ("context",)
AT_LEAST_1 = ("batch", "accumulate", "steps", "save_every", "keep", "log_every")
ABOVE_0 = ("learning_rate", "epsilon", "clip", "initializer_range")
AT_LEAST_0 = ("seed", "warmup", "decay", "heldout_every", "final_learning_rate", "weight_decay", "mtp_weight",
              "balance_weight", "bias_update")
SHARES = ("beta1", "beta2")                            # at least 0, below 1
CHANGEABLE = ("steps", "mesh", "save_every", "keep", "log_every", "heldout_every", "on_nonfinite")   # when resumed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of a run. What constructs is consistent. Errors: ValueError naming the key."""
    output: str                                  # folder that the run makes: checkpoints, metrics, curves
    model: str | None = None                     # folder to start from: hub, converted, or of another run
    config: dict[str, Any] | None = None         # the hub's config keys of a new model, or to be changed of `model`
    tokenizer: str | None = None                 # folder with the tokenizer's files; default: the model's
    data: dict[str, float]                       # JSON Lines file, or pattern of names -> its share of the tokens
    heldout: dict[str, str] = dataclasses.field(default_factory=dict)     # name -> JSON Lines file to evaluate on
    format: Literal["text", "chat"] = "text"     # of the data's lines: {"text": ...} or {"messages": [...]}
    on_broken: Literal["stop", "skip"] = "stop"  # at a line of the data that cannot be used
    context: int = 512                           # T, tokens of a row
    batch: int = 8                               # B, rows of a step, over all processes
    accumulate: int = 1                          # parts of a batch that go through the model one after the other
    steps: int                                   # of the optimizer
    seed: int = 0                                # of random weights and of the order of the data
    initializer_range: float = 0.02              # standard deviation of random matrices
    learning_rate: float = 3e-4                  # after the warm-up
    final_learning_rate: float = 0.0             # after the last step
    warmup: int = 0                              # first steps, in which the rate rises linearly
    decay: int = 0                               # last steps, in which it falls to the final rate; constant between
    schedule: Literal["cosine", "linear"] = "cosine"      # how it falls
    weight_decay: float = 0.1                    # of matrices
    beta1: float = 0.9                           # of Adam
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0                            # largest norm of the gradient
    dtype: Literal["float32", "bfloat16"] = "float32"     # what the model computes in
    master: bool = False                         # keeps parameters in float32 though it computes in bfloat16
    remat: bool = False                          # computes each layer again for its gradient: less memory, more time
    mesh: str = ""                               # as in "data=2,expert=2,tensor=2"; default: one device
    mtp_weight: float = 0.3                      # of the MTP blocks' mean loss; 0: `model`'s blocks stay as they are
    balance_weight: float = 1e-4                 # of the balance loss of experts
    bias_update: float = 1e-3                    # what a step adds to or takes from each router bias
    train: tuple[str, ...] = ("*",)              # patterns of the paths of the parameters that are trained
    lora: dict[str, Any] | None = None           # r, lora_alpha, target_modules as PEFT has them: trains such adapters
    save_every: int = 500                        # steps between checkpoints
    keep: int = 3                                # checkpoints that are kept
    log_every: int = 10                          # steps between lines of metrics
    heldout_every: int = 0                       # steps between evaluations; 0: at the end only
    on_nonfinite: Literal["stop", "skip"] = "stop"        # at a loss or gradient that is infinite or not a number

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Run).items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), hint))
        for names, is_good, expected in BOUNDS:
            for name in names:
                if not is_good(value := getattr(self, name)):
                    raise ValueError(f"{name} = {value!r}: expected {expected}")
        _check_together(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "Run":
        """A run of these settings; `source` names them in errors."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"{source}: unknown key {name!r}; the nearest known key is {nearest!r} (a name for "
                                 "the file's own use begins with _)")
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in values and
                   field.default is field.default_factory is dataclasses.MISSING]
        if missing:
            raise ValueError(f"{source}: {missing[0]!r} is missing; it has no default")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


BOUNDS = ((AT_LEAST_2, lambda x: x >= 2, "2 or more"), (AT_LEAST_1, lambda x: x >= 1, "1 or more"),
          (AT_LEAST_0, lambda x: 0 <= x < float("inf"), "a finite number, 0 or more"),
          (ABOVE_0, lambda x: 0 < x < float("inf"), "a finite number above 0"),
          (SHARES, lambda x: 0 <= x < 1, "at least 0 and below 1"))


def read_run(file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """The run of a run file, with "key=value" of `overrides` instead of what the file says.

    Relative paths of the file are below its folder, those of overrides below the current one. Names that begin with _
    and imported modules are the file's own. Errors: ValueError naming file and key; OSError.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is no file: expected a run file, Python with lines such as context = 512")
    try:
        found = runpy.run_path(str(file))
    except Exception as error:      # whatever the file's own code raises
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    values = {name: value for name, value in found.items()
              if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    given = parse_overrides(overrides)
    return Run.from_dict(_absolute(values, file.parent) | _absolute(given, Path()),
                         f"{file} and --override" if given else str(file))


def resumed(folder: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """The run whose output is `folder`, to go on with. Errors: ValueError for an override that would make it another
    run."""
    file = Path(folder, "run.json")
    if not file.is_file():
        raise ValueError(f"{folder} holds no run (no run.json), so there is nothing to resume")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    given = parse_overrides(overrides)
    refused = sorted(given.keys() - set(CHANGEABLE))
    if refused:
        raise ValueError(f"--override {refused[0]} would make it another run; when a run is resumed, only "
                         f"{', '.join(CHANGEABLE)} can be changed")
    return Run.from_dict(values | given | {"output": os.path.abspath(folder)}, str(file))


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Key -> value, a Python literal where it is one and else text."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--override {override!r}: expected key=value, as in steps=100")
        try:
            values[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            values[key.strip()] = text.strip()
    return values


def _absolute(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The values with their paths absolute; of a wrong type as they are, to be refused."""
    def path(value: Any) -> Any:
        if not isinstance(value, str) or not value or "://" in value:      # gs://bucket/folder
            return value
        return os.path.abspath(folder / Path(value).expanduser())
    values = dict(values)
    for key in values.keys() & {"output", "model", "tokenizer"}:
        values[key] = path(values[key])
    for key in values.keys() & {"data", "heldout"}:
        if isinstance(values[key], Mapping):
            values[key] = {path(file): share for file, share in values[key].items()} if key == "data" else \
                {name: path(file) for name, file in values[key].items()}
    return values


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as a field's annotation has it: whole numbers for float, lists for tuples, null for None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _typed(name, value, args[0])
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name} = {value!r}: expected {' or '.join(map(repr, args))}")
        return value
    if origin is tuple and isinstance(value, list | tuple) and value:
        return tuple(_typed(f"{name}[{i}]", item, args[0]) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _typed(f"{name}[{key!r}]", item, args[1]) for key, item in value.items()}
    if hint is Any or hint is type(value) and value != "" or name == "mesh" and value == "":
        return value
    if hint is float and type(value) is int:
        return float(value)
    expected = {str: "text", int: "a whole number", float: "a number", bool: "True or False",
                tuple: "a list of texts", dict: "a dict with texts for keys"}[origin or hint]
    raise ValueError(f"{name} = {value!r}: expected {expected}")


def _check_together(run: Run) -> None:
    """What only several settings together can get wrong."""
    if run.model is None and run.config is None:
        raise ValueError("neither model nor config is given: expected a model to start from, or the config of one to "
                         "make")
    if run.model is None and run.tokenizer is None:
        raise ValueError("tokenizer is missing: with a config, name the folder that holds the tokenizer's files")
    if not run.data or not all(0 < share < float("inf") for share in run.data.values()):
        raise ValueError(f"data = {run.data}: expected one or more files, each with a share above 0")
    if run.warmup + run.decay > run.steps:
        raise ValueError(f"warmup = {run.warmup} and decay = {run.decay} are more than steps = {run.steps}")
    if run.final_learning_rate > run.learning_rate:
        raise ValueError(f"final_learning_rate = {run.final_learning_rate} is above learning_rate = "
                         f"{run.learning_rate}")
    if run.lora is not None:
        _check_lora(run, run.lora)
    data = parse_mesh(run.mesh)["data"]
    if run.batch % (run.accumulate * data):
        raise ValueError(f"batch = {run.batch} rows cannot be cut into accumulate = {run.accumulate} parts for mesh "
                         f"axis data = {data}: expected a multiple of {run.accumulate * data}")
    if run.master and run.dtype == "float32":
        raise ValueError("master = True is for dtype = 'bfloat16'; with float32 the parameters are float32 anyway")


def _check_lora(run: Run, lora: Mapping[str, Any]) -> None:
    wanted = {"r": (int,), "lora_alpha": (int, float), "target_modules": (str, list, tuple)}
    if lora.keys() != wanted.keys():
        raise ValueError(f"lora has the keys {', '.join(lora) or 'none'}; expected {', '.join(wanted)}")
    for name, kinds in wanted.items():
        value = lora[name]
        if type(value) not in kinds or (value <= 0 if int in kinds else not all(isinstance(x, str) for x in value)):
            raise ValueError(f"lora[{name!r}] = {value!r}: expected " + {
                "r": "a whole number, 1 or more", "lora_alpha": "a number above 0",
                "target_modules": "a list of names as in [\"q_proj\", \"v_proj\"], a regular expression, or "
                                  "\"all-linear\""}[name])
    if run.model is None:
        raise ValueError("lora is set and model is not: adapters are trained for a model that there is")
    if run.train != ("*",):
        raise ValueError(f"train = {list(run.train)} and lora are both set: with lora the adapters are trained alone")
