"""`dist-train VERB ...`: the command line. Engines are imported by the verb that needs them, so that --help is instant."""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dist_train import __version__
from dist_train.errors import DistTrainError

if TYPE_CHECKING:
    from dist_train.commands.record import Record

_USERS_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 2 an error that the user can mend (one message), 85 start again, 130 interrupted."""
    options = make_parser().parse_args(arguments)
    code = _run(options)
    if folder := getattr(options, "launch_dir", None):
        from dist_train.ranks import tell_exit

        tell_exit(folder, code)
    return code


def _run(options: argparse.Namespace) -> int:
    try:
        text = options.run(options)
    except DistTrainError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in _USERS_FAULTS or not error.filename:
            raise
        return _fail(f"{error.filename}: {error.strerror}; mend that or choose another folder")
    except KeyboardInterrupt:
        return _fail("interrupted; the same command takes the work up again", code=130)
    if text:
        print(text, flush=True)
    return 0


def _fail(message: str, code: int = 2) -> int:
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
    print(f"dist-train: error{rank}: {message}", file=sys.stderr, flush=True)
    return code


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="dist-train",
        description="Distributed training of generative models of 3-D crystal structures.",
        epilog="Start with: dist-train demo. Every verb has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"dist-train {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_demo(verbs)
    _add_config(verbs)
    _add_voxelize(verbs)
    _add_verify(verbs)
    _add_inspect(verbs)
    _add_plan(verbs)
    _add_train(verbs)
    _add_report(verbs)
    _add_launch(verbs)
    _add_register(verbs)
    _add_release(verbs)
    _add_fit_prior(verbs)
    _add_fit_properties(verbs)
    _add_evaluate(verbs)
    _add_generate(verbs)
    _add_embed(verbs)
    _add_nearest(verbs)
    _add_score(verbs)
    _add_bench(verbs)
    return parser


Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _verb(verbs: Verbs, name: str, help: str, description: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help,
        description=description or help,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    return parser


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="run file; without one, the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting; may be repeated")


def _load(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    from dist_train.config import load_config

    return load_config(options.config, tuple(options.set))


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="bundle folder, or models:/NAME@ALIAS in an MLflow registry")
    parser.add_argument(
        "--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow server of a models:/ name"
    )


def _corrections_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corrections", type=_count, default=argparse.SUPPRESS, metavar="N",
        help="how often what was decoded is encoded again, and its latent corrected by what it lacks: nearer with more, and "
        "slower; without it, 16 at most",
    )  # fmt: skip


def _record_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record",
        action="store_true",
        help="also write figures, page and table to MLflow, below the run of a models:/ name",
    )


def _cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="keep the shards of a URL below it; without it, ~/.cache"
    )


def _source_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", help="folder of shards, or its fsspec URL")
    source.add_argument(
        "--data", nargs="+", default=[], metavar="INPUT", help="CIF files, folders, archives, Parquet tables"
    )
    _cache_option(parser)


def _add_demo(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "demo",
        "the main job on the shipped crystals: voxelise, train, resume, register, evaluate",
        "Runs every stage on the crystals in data/sample, in about ten minutes on two cores, without server, account or "
        "GPU. Everything is written below --out.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder; an earlier demo is replaced")
    parser.add_argument("--port", type=int, default=0, help="port of the two training ranks; 0 takes a free one")
    parser.add_argument("--epochs", type=int, help="train for fewer epochs than the run file says (a shorter, worse demo)")
    parser.set_defaults(run=_demo)


def _count(text: str) -> int:
    """A whole number from 0 up."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def _demo(options: argparse.Namespace) -> str:
    from dist_train.demo import run_demo

    return run_demo(options.out, options.port, options.epochs)


def _add_config(verbs: Verbs) -> None:
    parser = _verb(verbs, "config", "print the resolved config of a run, every setting with its value")
    _config_options(parser)
    parser.add_argument("--print", action="store_true", help="print the settings (the default)")
    parser.set_defaults(run=lambda options: _load(options).to_yaml().rstrip())


def _add_voxelize(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "voxelize", "crystals (CIF, Parquet) to WebDataset shards, on Ray",
        "Reads data.inputs and writes tar shards, index.json and rejected.csv to data.shards. A finished folder of the same "
        "settings is left as it is; an interrupted job goes on where it stopped.",
    )  # fmt: skip
    _config_options(parser)
    parser.add_argument("--address", help="running Ray cluster to join, 'auto' finds it; short for data.ray_address")
    parser.set_defaults(run=_voxelize)


def _voxelize(options: argparse.Namespace) -> str:
    from dist_train.commands.shards import voxelize

    if options.address:
        options.set.append(f"data.ray_address={options.address}")
    config = _load(options)
    return voxelize(config.data, config.grid)


def _add_verify(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "verify", "check shards against their index, byte for byte and sample for sample",
        "Names every damaged shard and sample; exit code 2 where there are any that were not repaired.",
    )  # fmt: skip
    parser.add_argument("shards", type=Path, help="folder with index.json")
    parser.add_argument("--quick", action="store_true", help="sizes and hashes only")
    parser.add_argument("--quarantine", action="store_true", help="move damaged shards to SHARDS/quarantined")
    parser.add_argument("--repair", action="store_true", help="move them, and build them again from the run's inputs")
    parser.add_argument("--workers", type=_count, default=os.cpu_count() or 1, help="processes")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> str:
    from dist_train.commands.shards import verify_shards

    return verify_shards(options.shards, options.workers, options.quick, options.quarantine, options.repair)


def _add_inspect(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "inspect", "show one sample of shards as numbers and a picture",
        "Structure, grid, channels, species and what the decoder gives back; slices and projections with the atoms on top.",
    )  # fmt: skip
    parser.add_argument("shards", help="folder with index.json, or its fsspec URL")
    _cache_option(parser)
    parser.add_argument("sample", nargs="?", help="key of the sample or id of the crystal; without it, the first sample")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), metavar="PNG", help="picture to write")
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> str:
    from dist_train.commands.shards import inspect_shards

    return inspect_shards(options.shards, options.cache_dir, options.sample, options.out)


def _add_plan(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "plan", "what a training will take: steps, memory, arithmetic, bytes, checkpoints, hours",
        "Needs the shards' index, no GPU and seconds. Warns of what would go wrong.",
    )  # fmt: skip
    _config_options(parser)
    parser.add_argument("--world-size", type=_positive, default=1, metavar="N", help="ranks (devices); without it, 1")
    parser.add_argument(
        "--device", choices=("h200", "h100", "a100", "l40s", "here"), default="h200",
        help="what the ranks run on; 'here' takes a few steps on this machine",
    )  # fmt: skip
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of its bf16 arithmetic that is reached")
    parser.add_argument("--network", type=float, default=25.0, metavar="GB/s", help="between ranks, of each")
    parser.add_argument("--disk", type=float, default=1.0, metavar="GB/s", help="that a rank writes checkpoints at")
    parser.add_argument("--price", type=float, default=0.0, help="of a device and hour")
    parser.add_argument("--json", action="store_true", help="all figures as JSON")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> str:
    from dist_train.commands.planning import plan

    return plan(
        _load(options), options.world_size, options.device, options.utilisation, options.network, options.disk,
        options.price, options.json,
    )  # fmt: skip


def _add_train(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "train", "train, or go on from the newest checkpoint",
        "One process, or one rank under a launcher: dist-train launch, deepspeed, torchrun or srun. A run_dir with a "
        "checkpoint is taken up where it stopped.",
    )  # fmt: skip
    _config_options(parser)
    parser.add_argument("--launch-dir", type=Path, metavar="DIR", help="folder that dist-train launch shares with its ranks")
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> str:
    from dist_train.ranks import take_environment, told_once

    with told_once(options.launch_dir):
        if options.launch_dir:
            take_environment(options.launch_dir)
        from dist_train.commands.training import train

        return train(_load(options))


def _add_report(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "report", "write the page of a training run: curves, figures, checkpoints, settings, crystals",
        "Training does it at its end; this works at any time, also while a run goes on. The page needs no network.",
    )  # fmt: skip
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write; without it, report.html in the folder")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> str:
    from dist_train.commands.report import report

    return report(options.run_dir, options.out)


def _add_launch(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "launch", "start the ranks of a training: on this machine, over ssh on several, or under Slurm",
        "Checks everything first, then runs the launcher, passes SIGTERM, SIGINT and SIGUSR1 on to the ranks and leaves "
        "none behind. Exit code 85: the ranks saved a checkpoint because of a signal and want to be started again.",
    )  # fmt: skip
    _config_options(parser)
    parser.add_argument("--print", action="store_true", help="show what would run, to be copied (Slurm: the batch script)")
    parser.add_argument(
        "--launcher", choices=("deepspeed", "torchrun", "slurm"), default="deepspeed", help="what starts them"
    )
    parser.add_argument("--slurm", dest="launcher", action="store_const", const="slurm", help="short for --launcher slurm")
    parser.add_argument("--ranks", type=_positive, help="processes on this machine; without it, one a GPU, or one")
    parser.add_argument("--hostfile", type=Path, help="nodes, a line 'HOST slots=RANKS' each; reached by ssh, by pdsh's "
                        "options in PDSH_SSH_ARGS_APPEND")  # fmt: skip
    parser.add_argument("--nodes", type=_positive, help="nodes of a Slurm job")
    parser.add_argument("--ranks-per-node", type=_positive, help="processes (GPUs) on each node of a Slurm job")
    parser.add_argument("--master-addr", help="address of the first host of the hostfile, where its name isn't one")
    parser.add_argument("--port", type=_positive, help="where the ranks meet; a free one on this machine, 29500 on several")
    parser.add_argument("--restarts", type=_count, default=0, help="how often to start again after a rank was killed")
    parser.set_defaults(run=_launch)


def _positive(text: str) -> int:
    """A whole number from 1 up."""
    if not (number := _count(text)):
        raise argparse.ArgumentTypeError("0 is too few: give a whole number from 1 up")
    return number


def _launch(options: argparse.Namespace) -> str:
    from dist_train.commands.launch import LaunchOptions, make_plan, print_of, slurm_script, submit
    from dist_train.commands.supervise import run

    wanted = LaunchOptions(
        options.config, tuple(options.set), options.launcher, options.ranks, options.hostfile, options.nodes,
        options.ranks_per_node, options.master_addr, options.port,
    )  # fmt: skip
    if options.launcher == "slurm":
        script = slurm_script(wanted)
        return script.rstrip() if options.print else submit(script)
    plan = make_plan(wanted)
    if options.print:
        return print_of(plan)
    if code := run(plan, options.restarts):
        raise SystemExit(code)
    return ""


def _add_register(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "register", "register the model of a finished run in MLflow",
        "Training does it at its end, where tracking.uri is set; this is for a run whose server was away. The new version "
        "has the alias candidate, and champion where tracking.gate says so.",
    )  # fmt: skip
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--alias", help="alias to point at the version by hand; 'champion' wants a reason")
    parser.add_argument("--reason", help="why it becomes champion; kept with the version")
    parser.set_defaults(run=_register)
    _add_registry(verbs)


def _register(options: argparse.Namespace) -> str:
    from dist_train.commands.registry import register

    return register(options.run_dir, options.alias, options.reason)


def _add_release(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "release", "write a small bundle of a finished run, in half precision, with its card and figures",
        "Every verb that takes --model reads it. data/models holds the project's own.",
    )  # fmt: skip
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; its name is the model's")
    parser.add_argument("--evaluation", type=Path, help="folder of dist-train evaluate, whose metrics.json is kept")
    parser.set_defaults(run=_release)


def _release(options: argparse.Namespace) -> str:
    from dist_train.commands.release import release

    return release(options.run_dir, options.out, options.evaluation)


def _add_registry(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "registry", "list the versions of a model, promote one to champion, or go back",
        "A server's name and password come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or from "
        "~/.mlflow/credentials, never from a command line.",
    )  # fmt: skip
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    for action, told in (
        ("list", "all versions with their aliases and metrics"),
        ("promote", "make a version the champion; the old one stays as previous"),
        ("rollback", "make the previous champion the champion again"),
    ):
        verb = _verb(actions, action, told)
        if action == "promote":
            verb.add_argument("version", nargs="?", default="candidate", help="number or alias")
        if action != "list":
            verb.add_argument("--reason", required=True, help="why; kept with the version")
        verb.add_argument("--name", default="crystal-autoencoder", help="registered model")
        verb.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow server")
    parser.set_defaults(run=_registry)


def _registry(options: argparse.Namespace) -> str:
    from dist_train.commands.registry import list_versions, promote, rollback
    from dist_train.errors import ConfigError

    if not options.tracking_uri:
        raise ConfigError("which registry? Give --tracking-uri or set MLFLOW_TRACKING_URI")
    where = (options.tracking_uri, options.name)
    if options.action == "list":
        return list_versions(*where)
    return (
        promote(*where, options.version, options.reason) if options.action == "promote" else rollback(*where, options.reason)
    )


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """What was parsed, by the fields of a verb's options."""
    return {name: value for name, value in vars(options).items() if name not in ("run", "record")}


def _record(options: argparse.Namespace) -> Record | None:
    """Where --record writes, if it was given; from then on the model is the version that its alias stands for now."""
    if not options.record:
        return None
    from dist_train.commands.record import Record

    record = Record(options.model, options.tracking_uri)
    options.model = record.model
    return record


def _add_evaluate(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "evaluate", "reconstruct held-out crystals and measure, beside a baseline and two ceilings",
        "Prints a table and writes metrics.json, report.html, crystals.csv and CIF files. A crystal that the model can't "
        "hold and a failed decode are misses in every rate; inputs that can't be read are counted apart. Warns of crystals "
        "that the model was trained on.",
    )  # fmt: skip
    _model_options(parser)
    _record_option(parser)
    _source_options(parser)
    parser.add_argument("--split", help="split of the shards that the model was not trained on; without it, test")
    parser.add_argument(
        "--training", nargs="+", default=[], metavar="INPUT",
        help="crystals that the baseline looks up, as for --data; without it, the training split of the shards",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--limit", type=_positive, metavar="N", help="take the first N crystals only")
    parser.add_argument(
        "--move", type=_count, metavar="SEED",
        help="first move every crystal to a random origin, cell, orientation and order of atoms: the same crystal otherwise",
    )  # fmt: skip
    _corrections_option(parser)
    parser.add_argument(
        "--workers", type=_count, default=os.cpu_count() or 1, help="processes that read, decode and compare"
    )
    parser.add_argument("--samples", type=_count, default=16, help="crystals to sample for the report")
    parser.add_argument("--steps", type=_count, default=9, help="steps of the interpolation in the report; 0 for none")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> str:
    from dist_train.commands.evaluate import FILES, EvaluateOptions, evaluate
    from dist_train.tables import metrics_table

    record = _record(options)
    metrics = evaluate(EvaluateOptions(**_given(options)))
    told = [metrics_table(metrics), f"written to {options.out}: {', '.join(FILES)}, cifs/"]
    if record:
        told.append(record.write(f"evaluate {metrics['data']['source']}", metrics, options.out, FILES))
    return "\n".join(told)


def _add_fit_prior(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "fit-prior", "fit what samples are drawn from anew, to crystals of your choice",
        "Training does it at its end, for its own crystals. Fitted to others, such as those of one family, the networks "
        "make samples like these; the bundle counts them among its training crystals from then on.",
    )  # fmt: skip
    _model_options(parser)
    _source_options(parser)
    parser.add_argument("--split", help="split of the shards; without it, train")
    parser.add_argument(
        "--max-volume", type=_positive_float, metavar="A3",
        help="leave out crystals of more than so many A^3 an atom: databases hold cells whose atoms are hardly bound",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="bundle to write; may be that of --model")
    sizes = {"width": "of the flows' layers", "depth": "blocks of each flow", "steps": "of the training of each"}
    for name, what in sizes.items():
        parser.add_argument(f"--{name}", type=_positive, help=f"{what}; without it, as the model's run had it")
    parser.add_argument(
        "--temperature", type=_positive_float,
        help="of the compositions drawn: 1, as they occur; below, likely ones more often",
    )  # fmt: skip
    parser.add_argument("--seed", type=_count, default=0, help="same seed, same bytes")
    parser.add_argument("--workers", type=_count, default=os.cpu_count() or 1, help="processes that read and encode")
    parser.set_defaults(run=_fit_prior)


def _fit_prior(options: argparse.Namespace) -> str:
    from dist_train.commands.prior import FitPriorOptions, fit

    return fit(FitPriorOptions(**_given(options)))


def _add_fit_properties(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "fit-properties", "fit what reads properties off a model's latents, to labelled crystals",
        "Encodes the crystals of Parquet tables and fits to their labels, for each property, a direction in latent space "
        "and small networks; prints their errors on crystals held out, beside trivial ones; writes the bundle with them. "
        "volume_per_atom, density and n_atoms are computed, other labels are columns. Formulas aren't divided between "
        "crystals fitted and held out; where these have fewer than 20, near copies aren't.",
    )  # fmt: skip
    _model_options(parser)
    parser.add_argument("--data", nargs="+", type=Path, required=True, metavar="TABLE", help="Parquet tables of crystals")
    parser.add_argument(
        "--property", nargs="+", required=True, metavar="NAME[=COLUMN][:UNIT]",
        help="properties: band_gap, or band_gap=dir_gap:eV for the column dir_gap; null is unknown",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="bundle to write; may be that of --model")
    parser.add_argument("--test", nargs="+", type=Path, default=[], metavar="TABLE",
                        help="measure on these tables; without them, on a part of --data")  # fmt: skip
    parser.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE",
        help="of --data to measure on; what the model wasn't trained on comes first",
    )  # fmt: skip
    parser.add_argument("--seed", type=_count, default=0, help="of the split and the networks: same seed, same bytes")
    parser.add_argument("--steps", type=_positive, default=1500, help="of the training of each network, on 256 crystals")
    parser.add_argument("--workers", type=_count, default=os.cpu_count() or 1, help="processes that read crystals")
    parser.set_defaults(run=_fit_properties)


def _fit_properties(options: argparse.Namespace) -> str:
    from dist_train.commands.properties import FitOptions, fit

    return fit(FitOptions(**_given(options)))


def _add_generate(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "generate", "crystals from a trained model: reconstruct, sample, target, interpolate or alter",
        "Writes CIF files in P1 and with symmetry, crystals.extxyz, a table, an archive and metrics.json. Same seed, same "
        "bytes. Each action has its own --help.",
    )  # fmt: skip
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="task")
    for action, told in (
        ("reconstruct", "known crystals through the model and back; what it can't take is counted"),
        ("sample", "new crystals, drawn as the training crystals lie in latent space"),
        ("target", "new crystals with wanted properties, by gradient steps in latent space from samples"),
        ("interpolate", "crystals on the way from each known one to the next"),
        ("alter", "known crystals with other elements, moved along a property, or others near them"),
    ):
        verb = _verb(actions, action, told)
        if action not in ("sample", "target"):
            verb.add_argument("inputs", nargs="+", metavar="IN", help="crystals: CIF files, folders, archives, Parquet")
        _model_options(verb)
        _record_option(verb)
        verb.add_argument("--out", type=Path, required=True, help="output folder; generated crystals in it are replaced")
        _GENERATE.get(action, lambda verb: None)(verb)
        if action != "sample":  # samples are redrawn instead
            _corrections_option(verb)
        _finish_options(verb)
    parser.set_defaults(run=_generate)


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", type=_positive, default=16, help="crystals to make")
    parser.add_argument("--seed", type=_count, default=0, help="same seed, same crystals")
    parser.add_argument("--composition", metavar="FORMULA", help="steer to crystals of this formula: BaTiO3")
    parser.add_argument("--elements", metavar="A,B,C", help="steer to crystals of these elements alone: Ba,Ti,O")


def _mere_sample_options(parser: argparse.ArgumentParser) -> None:
    _sample_options(parser)
    parser.add_argument(
        "--best-of", type=_positive, default=1, metavar="N",
        help="draw N latents for each crystal and keep the one that lies nearest to those of crystals: takes longer, and "
        "makes crystals with more symmetry",
    )  # fmt: skip


def _target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", nargs="+", action="extend", required=True, metavar="NAME=VALUE",
        help="properties wanted, such as band_gap=1.5, of those in the bundle (dist-train fit-properties)",
    )  # fmt: skip
    parser.add_argument("--extrapolate", action="store_true", help="take a target beyond all labels that were fitted")
    _sample_options(parser)


def _interpolate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_steps, default=9, help="crystals from each to the next, both ends included")
    parser.add_argument(
        "--path", choices=("linear", "spherical"), default="linear",
        help="straight through latent space, or on an arc around the mean of the training crystals",
    )  # fmt: skip


def _alter_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replace", nargs="+", default=[], metavar="OLD=NEW", help="elements to replace, such as Ti=Zr")
    parser.add_argument(
        "--scale", type=_positive_float, metavar="FACTOR",
        help="rescale the density: atoms become the known element whose atomic number is nearest to FACTOR times their own",
    )  # fmt: skip
    parser.add_argument(
        "--within", type=_positive_float, metavar="RADIUS", help="replace or scale only so many angstrom around --of"
    )
    parser.add_argument(
        "--of", nargs=3, type=float, metavar=("A", "B", "C"), help="fractional coordinates in the cell as given; periodic"
    )
    parser.add_argument(
        "--along", nargs="+", action="extend", default=[], metavar="NAME=AMOUNT",
        help="properties in the bundle, and how far to go along each, in standard deviations of its labels: band_gap=+1",
    )  # fmt: skip
    parser.add_argument(
        "--perturb", type=_positive_float, metavar="RADIUS",
        help="-n crystals at this distance in random directions of latent space, in standard deviations of the training "
        "crystals' latents",
    )  # fmt: skip
    parser.add_argument("-n", type=_positive, default=1, help="crystals around each one given, with --perturb")
    parser.add_argument("--seed", type=_count, default=0, help="of the directions")


_GENERATE = {
    "sample": _mere_sample_options, "target": _target_options, "interpolate": _interpolate_options, "alter": _alter_options,
}  # fmt: skip


def _finish_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--screen", dest="screens", nargs="+", action="extend", default=[], metavar="SCREEN",
        help="keep only crystals that pass, and count the others: valid (no atoms within 0.5 A), distance=1.0 (none within "
        "that), composition (charges balance; SMACT), novel (not trained on), unique (unlike those before)",
    )  # fmt: skip
    parser.add_argument(
        "--training", nargs="+", default=[], metavar="INPUT",
        help="crystals that aren't novel, nor what StructureMatcher finds like them; without it, that screen knows nearly "
        "exact copies of the model's training crystals",
    )  # fmt: skip
    parser.add_argument(
        "--symmetrize", type=_positive_float, metavar="TOLERANCE",
        help="snap atoms within so many angstrom of symmetry to it; without it, symmetry is only found, within 0.1 A",
    )  # fmt: skip
    parser.add_argument(
        "--relax", metavar="MODULE:FACTORY",
        help="relax atoms and cell by a calculator of ASE, such as ase.calculators.emt:EMT or chgnet.model:CHGNetCalculator",
    )  # fmt: skip
    parser.add_argument(
        "--relax-steps", type=_count, default=argparse.SUPPRESS, metavar="N",
        help="at most; without it, 200; 0 gives the energy alone",
    )  # fmt: skip
    parser.add_argument(
        "--density", choices=("cube", "chgcar"), help="also write each channel of each crystal's decoded grid"
    )
    parser.add_argument("--workers", type=_count, default=os.cpu_count() or 1, help="processes, where there is much to do")


def _steps(text: str) -> int:
    """A whole number from 2 up."""
    if (number := _count(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text} is too few: both ends are included, give 2 or more")
    return number


def _positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def _generate(options: argparse.Namespace) -> str:
    from dist_train.commands.generation import OUTPUTS, GenerateOptions, generate, summary

    record = _record(options)
    generation = generate(GenerateOptions(**_given(options)))
    told = [summary(generation)]
    if record:
        told.append(record.write(f"generate {generation.title}", generation.metrics, options.out, OUTPUTS))
    return "\n".join(told)


def _add_embed(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "embed", "latents of many crystals, with what the model decodes them to, as Parquet tables, on Ray",
        "Writes part-XXXXX.parquet, a row for each crystal in their order (a failed one with a reason in its column error), "
        "and _embed.json to --output. The same command goes on where it was stopped and leaves finished parts alone.",
    )  # fmt: skip
    _model_options(parser)
    parser.add_argument(
        "--input", nargs="+", required=True, help="CIF files, folders, archives, Parquet tables, folders of shards, or URLs"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="output folder, seen by every worker")
    parser.add_argument(
        "--workers", type=_count, help="Ray workers, a CPU each; 0 works in this process without Ray; without it, all CPUs"
    )
    parser.add_argument("--address", help="running Ray cluster to join, 'auto' finds it; without it RAY_ADDRESS, or none")
    parser.add_argument(
        "--no-decode", dest="decode", action="store_false", help="latents alone: no decoded crystals, no checks; much faster"
    )
    parser.add_argument("--batch", type=_positive, default=32, help="crystals that the networks take at a time")
    parser.add_argument(
        "--part-rows", type=_positive, default=256, metavar="ROWS", help="files and rows of a part, a worker's unit of work"
    )
    parser.set_defaults(run=_embed)


def _embed(options: argparse.Namespace) -> str:
    from dist_train.commands.embed import EmbedOptions, embed

    return embed(EmbedOptions(**_given(options)))


def _add_nearest(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "nearest", "the crystals of dist-train embed's tables that a model's latents put nearest to a CIF",
        "Distances are Euclidean between latents; 1 is that of two training crystals on average. Digests tell which of them "
        "are the very same crystal, in whatever cell.",
    )  # fmt: skip
    parser.add_argument("crystals", nargs="+", metavar="CIF", help="CIF files, or whatever else holds crystals")
    parser.add_argument("--in", dest="latents", type=Path, required=True, metavar="DIR", help="output of dist-train embed")
    _model_options(parser)
    parser.add_argument("-k", type=_positive, default=5, help="crystals to name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write nearest.json and nearest.csv there")
    parser.set_defaults(run=_nearest)


def _nearest(options: argparse.Namespace) -> str:
    from dist_train.commands.embed import nearest_crystals

    return nearest_crystals(
        options.crystals, options.latents, options.model, options.tracking_uri, options.k, options.json, options.out
    )


def _add_score(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "score", "measure generated crystals against a data set: validity, coverage, uniqueness, novelty, METRe",
        "Reads folders, archives and tables of crystals, prints a table beside published figures and writes metrics.json. A "
        "generated crystal that can't be read (overlapping atoms, too) counts as failed. Compositional validity and COV "
        "need pip install 'dist-train[eval]'.",
    )  # fmt: skip
    parser.add_argument("generated", nargs="+", help="generated crystals: CIF files, folders, archives, Parquet")
    parser.add_argument("--reference", nargs="+", required=True, help="crystals to be like, such as a test split")
    parser.add_argument("--training", nargs="+", default=[], help="what the model was trained on, for novelty")
    parser.add_argument(
        "--data-set", choices=("perov-5", "carbon-24", "mp-20"), help="benchmark: cutoffs of COV and published figures"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/score"), help="output folder")
    parser.add_argument("--workers", type=_count, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--attempts", type=_positive, help="crystals that were asked for, where failed ones left no file")
    parser.add_argument("--limit", type=_positive, metavar="N", help="take N generated and N reference crystals at random")
    parser.add_argument("--seed", type=_count, default=0, help="of all random choices")
    parser.add_argument("--ceiling", action="store_true", help="also score as many reference crystals as if generated")
    parser.add_argument("--cache", type=Path, help="file of fingerprints to share; without it, fingerprints.npz in --out")
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> str:
    from dist_train.commands.scoring import score

    return score(
        options.generated, options.reference, options.training, options.data_set, options.out, options.workers,
        options.limit, options.seed, options.attempts, options.ceiling, options.cache,
    )  # fmt: skip


def _add_bench(verbs: Verbs) -> None:
    parser = _verb(verbs, "bench", "measure the speed of the project's core on this machine, beside the targets")
    parser.add_argument(
        "names", nargs="+", choices=("voxelize", "decode", "frames", "shard", "loader", "step", "kills", "generate"),
        help="what to measure",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object with `rows` instead of a table")
    parser.add_argument("--sample", type=Path, default=Path("data/sample"), help="folder of the shipped crystals")
    parser.add_argument("--model", type=Path, default=Path("data/models/perov_5"), help="of generate: bundle folder")
    parser.add_argument("-n", type=_positive, default=512, help="of generate: crystals")
    parser.add_argument("--workers", type=_positive, default=2, help="of generate: cores to use")
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> str:
    import json
    from dataclasses import asdict

    from dist_train.bench import Row, core_rows
    from dist_train.bench_frames import frame_rows
    from dist_train.bench_generate import generate_rows
    from dist_train.bench_shard import shard_rows
    from dist_train.bench_train import kill_rows, loader_rows, step_rows
    from dist_train.tables import bench_line

    others: dict[str, Callable[[Path], Iterator[Row]]] = {
        "frames": frame_rows, "shard": shard_rows, "loader": loader_rows, "step": step_rows, "kills": kill_rows,
        "generate": lambda sample: generate_rows(sample, options.model, options.n, options.workers),
    }  # fmt: skip
    rows = []
    for name in options.names:
        for row in others[name](options.sample) if name in others else core_rows(name, options.sample):
            rows.append(asdict(row))
            if not options.json:
                print(bench_line(rows[-1]), flush=True)
    return json.dumps({"rows": rows}, indent=1) if options.json else ""
