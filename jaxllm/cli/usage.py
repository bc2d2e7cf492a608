"""The verb that counts which experts a model uses: usage."""
import argparse
import statistics

from jaxllm.calibrate import TOKENS
from jaxllm.cli.models import DTYPE_HELP, MESH_HELP
from jaxllm.cli.parser import Verbs
from jaxllm.generate.load import DTYPES, load
from jaxllm.usage_count import count_usage


def add_usage(verbs: Verbs) -> None:
    verb = verbs.add_parser("usage", help="count how often each expert is chosen over some text",
                            description="Writes for each layer how many tokens chose each expert. It tells generate, "
                                        "eval and plan which experts are to stay on the devices.")
    verb.add_argument("model", metavar="MODEL", help="a hub folder, or one that convert wrote")
    verb.add_argument("--text", metavar="FILE", nargs="+", required=True,
                      help="JSON Lines, one document a line in \"text\"; .xz and .gz are unpacked")
    verb.add_argument("--out", metavar="FILE", required=True, help="the JSON file to write")
    verb.add_argument("--tokens", metavar="N", type=int, default=TOKENS,
                      help=f"about so many are read, an equal number of each file (default {TOKENS})")
    verb.add_argument("--mesh", help=MESH_HELP)
    verb.add_argument("--dtype", choices=DTYPES, help=DTYPE_HELP)
    verb.add_argument("--resident-experts", metavar="N", type=int, help="as of generate")
    verb.set_defaults(run=run_usage)


def run_usage(args: argparse.Namespace) -> None:
    model = load(args.model, args.mesh, args.dtype, resident_experts=args.resident_experts)
    usage = count_usage(model, args.text, args.tokens)
    usage.write(args.out)
    num = model.config.n_routed_experts or 0
    shares = [statistics.mean(usage.shares(top).values()) for top in (num // 4, num // 2)]
    print(f"{args.out}: {usage.tokens} tokens in {len(usage.count)} layers; of {num} experts the {num // 4} used most "
          f"have {shares[0]:.0%} of the choices, the {num // 2} used most {shares[1]:.0%}")
