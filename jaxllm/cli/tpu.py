"""The verbs about hardware that is not here: plan, compile."""
import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from jaxllm.axes import make_abstract_mesh
from jaxllm.cli.models import MESH_HELP, RESIDENT_HELP
from jaxllm.cli.parser import Verbs
from jaxllm.config import Config
from jaxllm.model import check_mesh
from jaxllm.tpu import plan as step_planner
from jaxllm.tpu import train_plan as train_planner
from jaxllm.tpu.chips import Slice, all_slices, slice_of
from jaxllm.tpu.held import Held
from jaxllm.tpu.offload import offload_plans, parse_size
from jaxllm.tpu.plan import Plan, smallest
from jaxllm.tpu.program import compile_step, devices_of, params_of
from jaxllm.tpu.report import Report, report_of
from jaxllm.tpu.steps import STEPS, TRAIN, TRAIN_CONTEXT, Training, Work, training_of, work_of
from jaxllm.tpu.train_plan import TrainPlan
from jaxllm.tpu.train_program import compile_train
from jaxllm.train.memory import show
from jaxllm.usage import read_usage

CONTEXT = 32768
WEIGHTS = ("mxfp4", "fp8", "int4")
RUNNERS_UP = 4


def add_plan(verbs: Verbs) -> None:
    verb = verbs.add_parser("plan", help="whether a model fits a slice, and how fast it could be there",
                            description="Tells the bytes of each device by kind, the best mesh and the runners-up, and "
                                        "the time of a step at 100% of the rates in the data sheets, which no program "
                                        "reaches; of training also the days of a run. Reads only config.json, and "
                                        "needs no device and no compiler.")
    add_step(verb, "as in v6e:8x8, h100:8, gpu:8x24GB, or all; an unknown one lists those there are")
    verb.add_argument("--host", metavar="SIZE", help="memory of the slice's hosts, as in 1TB: experts that do not fit "
                                                     "the devices lie there, and are brought over when chosen")
    verb.add_argument("--usage", metavar="FILE", help="with --host: how often each expert is chosen, as jaxllm usage "
                                                      "wrote it (default: all alike)")
    verb.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> None:
    held = held_of(args)
    work = asked(args, held.config)
    if args.usage and not args.host:
        raise ValueError("--usage says which experts stay on a device, and goes with --host")
    found: Sequence[Any]
    if args.host:
        found = with_host(args, held, work)
        tell(found)
    elif args.on == "all":
        found = smallest(partial(plans_on, held, work), all_slices())
        if not found:
            raise ValueError(f"{args.model}: no slice of the table holds it with {work.batch} rows of {work.context}")
        print("\n".join(x.row() for x in found))
    else:
        on = slice_of(args.on)
        found = on_slice(held, on, args.mesh, work)
        if found[0].on.num_chips < on.num_chips:
            print(f"no mesh over all {on.num_chips} of {on.name} holds it: {found[0].on.num_chips} take part")
        tell(found)
    write(args, [x.to_dict() for x in found], found[0])


def tell(found: Sequence[Any]) -> None:
    print("\n".join(x.row() for x in found[:1 + RUNNERS_UP]))
    print(found[0].describe())


def with_host(args: argparse.Namespace, held: Held, work: Work | Training) -> Sequence[Plan]:
    """Plans with experts in host memory."""
    if isinstance(work, Training):
        raise ValueError(f"--host is for steps that no gradient is taken of, not for --step {TRAIN}")
    if args.on == "all":
        raise ValueError("--host is the memory of one slice's hosts: name the slice with --on")
    on = slice_of(args.on)
    mesh = mesh_on(held, on, args.mesh, work) if args.mesh else None
    usage = read_usage(args.usage, held.config) if args.usage else None
    return offload_plans(held, on, work, parse_size(args.host), mesh, usage)


def asked(args: argparse.Namespace, config: Config) -> Work | Training:
    """The step that the arguments name. ValueError for those that belong to another."""
    usual = TRAIN_CONTEXT if args.step == TRAIN else CONTEXT
    context = usual if args.context is None else args.context
    if args.step == TRAIN:
        return training_of(config, args.batch, context, args.lora, args.tokens)
    if args.lora is not None:
        raise ValueError(f"--lora is for --step {TRAIN}, not {args.step}")
    return work_of(config, args.step, args.batch, context, args.tokens)


def planner(work: Work | Training) -> Any:
    """Whose `plan` and `plans` are for such work."""
    return train_planner if isinstance(work, Training) else step_planner


def plans_on(held: Held, work: Work | Training, on: Slice) -> list[Any]:
    return planner(work).plans(held, on, work)


def on_slice(held: Held, on: Slice, mesh: str | None, work: Work | Training) -> list[Any]:
    """Plans that fit, the best first. ValueError says by how much it does not, and what is the smallest that does."""
    found = ([planner(work).plan(held, on, mesh_on(held, on, mesh, work), work)] if mesh
             else plans_on(held, work, on))
    if not found:
        raise ValueError(f"{held.name}: no mesh over the {on.num_devices} devices of {on.name} splits the model and "
                         f"{work.batch} rows evenly")
    if fitting := [x for x in found if x.fits]:
        return fitting
    best, usable = found[0], on.chip.usable_hbm.value
    search, slices = partial(smallest, partial(plans_on, held, work)), all_slices()
    fits = search([x for x in slices if x.chip == on.chip]) or search(slices)
    raise ValueError(f"{held.name} with {work.batch} rows of {work.context} does not fit {on.name}: a device would "
                     f"hold {show(best.peak)} of {show(usable)}, {show(best.peak - usable)} too much; "
                     + (f"the smallest that fits is {fits[0].on.name}" if fits else "no slice of the table holds it"))


def mesh_on(held: Held, on: Slice, mesh: str, work: Work | Training) -> AbstractMesh:
    """ValueError if the model, the slice or the rows do not go with this mesh."""
    abstract = make_abstract_mesh(mesh)
    check_mesh(held.config, abstract)
    if abstract.size != on.num_devices:
        raise ValueError(f"the mesh has {abstract.size} devices, but {on.name} has {on.num_devices}: all take part")
    if work.batch % abstract.shape["data"]:
        raise ValueError(f"batch = {work.batch} cannot be split over mesh axis data = {abstract.shape['data']}")
    return abstract


def add_compile(verbs: Verbs) -> None:
    verb = verbs.add_parser("compile", help="compile a step for TPUs that are not here",
                            description="Compiles the real step, at full size, for the real chip, with the compiler in "
                                        "libtpu, and tells its memory, the bytes that it moves beside the least "
                                        "possible, and its collectives. Reads only config.json.")
    add_step(verb, "a TPU slice, as in v6e:8x8; another lists those there are")
    verb.add_argument("--resident-experts", metavar="N", type=int, help=RESIDENT_HELP)
    verb.set_defaults(run=run_compile)


def run_compile(args: argparse.Namespace) -> None:
    on, held = slice_of(args.on), held_of(args)
    work = asked(args, held.config)
    devices = devices_of(on)
    if args.resident_experts is not None and (isinstance(work, Training) or not args.mesh):
        raise ValueError(f"--resident-experts is not for --step {TRAIN}" if isinstance(work, Training) else
                         "--resident-experts goes with --mesh: the best mesh by plan is one for a model that fits")
    mesh = args.mesh or on_slice(held, on, None, work)[0].mesh
    program = (compile_train(held, devices, mesh, work) if isinstance(work, Training) else
               compile_step(held.config, devices, mesh, work, held.all_params, args.resident_experts))
    report = report_of(program, Path(args.model).name, on)
    print(report.describe())
    write(args, report.to_dict(), report)


def add_step(verb: argparse.ArgumentParser, on: str) -> None:
    """The arguments of both verbs: what step of what model, and where."""
    verb.add_argument("model", metavar="MODEL", help="a folder with a config.json")
    verb.add_argument("--on", metavar="SLICE", required=True, help=on)
    verb.add_argument("--mesh", help=MESH_HELP.replace("one device", "the fastest by plan"))
    verb.add_argument("--step", choices=(*STEPS, TRAIN), default="decode", help="default decode")
    verb.add_argument("--weights", choices=WEIGHTS, help="experts as packed so (default: as the model has them)")
    verb.add_argument("--batch", metavar="B", type=int, default=64, help="rows (default 64)")
    verb.add_argument("--context", metavar="S", type=int,
                      help=f"tokens of each row (default {CONTEXT}, train {TRAIN_CONTEXT})")
    verb.add_argument("--tokens", metavar="T", type=whole,
                      help="new ones of a row (default: verify 4, prefill 4096); of a training run all, as in 15e12")
    verb.add_argument("--lora", metavar="R", type=int,
                      help="train adapters of this rank, of all projections, and not all parameters")
    verb.add_argument("--json", metavar="FILE", help="write the numbers there")
    verb.add_argument("--png", metavar="FILE", help="and a picture of them there")


def whole(text: str) -> int:
    """A whole number, also as 15e12."""
    value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def held_of(args: argparse.Namespace) -> Held:
    config = Config.from_hub(args.model)
    return Held(Path(args.model).name, config, params_of(args.model, config, args.weights))


def write(args: argparse.Namespace, numbers: object, found: Plan | TrainPlan | Report) -> None:
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")
    if args.png:
        from jaxllm.tpu.draw import draw  # matplotlib takes a second to import
        draw(found, args.png)
