"""The command line: `jaxllm convert`, `verify`, `export`, `generate`, `eval`, `usage`, `info`, `train`, `tokenizer`,
`plan`, `compile`.

Bad input (ValueError, OSError) is one line on stderr and exit status 2; anything else is a bug and keeps its traceback.
"""
import os
import sys
from collections.abc import Sequence

from jaxllm.cli.files import add_convert, add_export, add_verify
from jaxllm.cli.models import add_eval, add_generate, add_info
from jaxllm.cli.parser import Parser
from jaxllm.cli.tokenizer import add_tokenizer
from jaxllm.cli.tpu import add_compile, add_plan
from jaxllm.cli.train import add_train
from jaxllm.cli.usage import add_usage

# In the order of --help.
ADD = (add_convert, add_verify, add_export, add_generate, add_eval, add_usage, add_info, add_train, add_tokenizer,
       add_plan, add_compile)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command (default: of sys.argv); returns the exit status."""
    try:
        args = make_parser().parse_args(arguments)
        args.run(args)
        print(end="", flush=True)
    except BrokenPipeError:             # the reader of a pipe, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if type(error).__module__.partition(".")[0] not in ("builtins", "jaxllm"):
            raise                       # a kind of ValueError that JAX or numpy has for its callers' mistakes: ours
        print("jaxllm: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="jaxllm", description="MiMo-V2 in JAX: from a hub checkpoint to text on any device mesh.")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in ADD:
        add(verbs)
    return parser
