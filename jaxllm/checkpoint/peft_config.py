"""adapter_config.json, as PEFT writes it (huggingface/peft 0.21): what of it is used, what changes nothing here, and
what is refused."""
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.checkpoint.errors import CheckpointError

KNOWN = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
         "target_parameters", "base_model_name_or_path", "init_lora_weights")
# What is of training alone, of bookkeeping, or of an option that is off
IGNORED = ("lora_dropout", "task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "megatron_core",
           "qalora_group_size")
OFF: tuple[Any, ...] = (None, False, 0, "none", "", [], {})      # of all other keys
STARTS = (None, True, False, "gaussian")        # other ways to begin change the base


@dataclass(frozen=True)
class PeftConfig:
    """The part that says what an adapter is. Patterns: what a module's name ends in, as a regular expression -> number.
    """
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    target_modules: str | list[str]
    target_parameters: list[str]
    base_model_name_or_path: str | None

    @staticmethod
    def parse(content: Mapping[str, Any], place: str) -> "PeftConfig":
        """Errors: CheckpointError naming the key whose value is none that is used here."""
        def require(key: str, is_good: bool, expected: str) -> None:
            if not is_good:
                raise CheckpointError(f"{place}: {key} = {content.get(key)!r}; expected {expected}")
        for key, value in content.items():
            if key not in KNOWN + IGNORED:
                require(key, value in OFF, "it to be off: an adapter that uses it computes what is not supported here")
        r: Any = content.get("r")
        alpha: Any = content.get("lora_alpha")
        ranks, alphas = content.get("rank_pattern") or {}, content.get("alpha_pattern") or {}
        modules, parameters = content.get("target_modules"), content.get("target_parameters")
        require("peft_type", content.get("peft_type") == "LORA", "LORA")
        require("r", _is_rank(r), "a whole number above 0")
        require("lora_alpha", _is_number(alpha) and alpha > 0, "a number above 0")
        require("rank_pattern", _is_pattern(ranks, _is_rank), "names of modules -> whole numbers above 0")
        require("alpha_pattern", _is_pattern(alphas, _is_number), "names of modules -> numbers")
        require("init_lora_weights", content.get("init_lora_weights") in STARTS,
                f"one of {STARTS}: others begin by changing the base model, which is not in the file")
        require("target_modules", modules is None or isinstance(modules, str) or _is_names(modules), "names")
        require("target_parameters", parameters is None or _is_names(parameters), "names")
        base = content.get("base_model_name_or_path")
        require("base_model_name_or_path", base is None or isinstance(base, str), "a name")
        is_rslora = content.get("use_rslora") or False
        require("use_rslora", isinstance(is_rslora, bool), "true or false")
        return PeftConfig(r, alpha, ranks, alphas, is_rslora, modules or [], parameters or [], base)

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """What multiplies lora_B @ lora_A of a module; of "" what it is for most."""
        alpha, r = self.alpha_pattern.get(_key(self.alpha_pattern, module), self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def _key(pattern: Mapping[str, Any], module: str) -> str:
    """The first key that means the module, as PEFT looks it up."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), module)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(value: Any, is_good: Callable[[Any], bool]) -> bool:
    try:
        return isinstance(value, dict) and all(re.compile(key) and is_good(value[key]) for key in value)
    except re.error:
        return False


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
