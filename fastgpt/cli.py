"""The command line: load the settings, import the command that is asked for, and tell how it ended."""

import argparse
import importlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import fastgpt
from fastgpt.arguments import parse, parser
from fastgpt.errors import RankLost, SharedError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake of the user's, 128 + n after signal n."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] != ["bench"]:  # which starts others too, as their users do
        before_pytorch()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that cannot show a character is no reason to stop
    try:
        return _run(words)
    except UserError as problem:
        _tell(problem)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # whoever read our output has gone; nothing more can be said to them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as problem:
        # a file or folder that cannot be used: the system's own words say why
        where = f"{problem.filename}: " if problem.filename else ""
        _tell(UserError(f"{where}{problem.strerror or problem}"))
        return 2


def before_pytorch() -> None:
    """What our processes set before PyTorch is loaded."""
    # OpenMP's threads that wait sleep instead of spinning. On cores shared with anything else, spinning costs a small
    # model most of its speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _run(words: list[str]) -> int:
    options = parse(words)
    if options.command is None:
        parser().print_help()
        return 2
    _log_to_stderr()
    run = {
        "train": _train,
        "finetune": _finetune,
        "predict": _predict,
        "features": _features,
        "evaluate": _evaluate,
        "ablate": _ablate,
        "prepare": _prepare,
        "generate": _generate,
        "plan": _plan,
        "bench": _bench,
    }
    return run[options.command](options)


def _train(options: argparse.Namespace) -> int:
    from fastgpt.config import Config
    from fastgpt.launch import engine_kind
    from fastgpt.launchers import find_launch
    from fastgpt.settings import read_settings

    try:
        words = [] if options.init is None else [f"train.init={options.init}"]
        config, places = read_settings(Config, options.config, [*options.overrides, *words])
        engine_kind(config, find_launch())
    except UserError as problem:
        raise SharedError(str(problem)) from None

    from fastgpt.train.command import run

    return _carry_out(lambda: run(config, must_resume=options.resume, places=places))


def _carry_out(run: Callable[[], Path]) -> int:
    """Train; the exit code of how it ended."""
    from fastgpt.train.saver import Interrupted

    try:
        run()
    except RankLost as problem:
        print(f"fastgpt: error on rank {_rank()}: {problem}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        if _rank() == 0:
            print(f"stopped by {stop}", file=sys.stderr)
        return stop.exit_code
    return 0


def _finetune(options: argparse.Namespace) -> int:
    from fastgpt.finetune_config import FinetuneConfig
    from fastgpt.settings import read_settings

    try:
        words = [f"pretrained={options.pretrained}", *options.overrides]
        config, places = read_settings(FinetuneConfig, options.config, words)
    except UserError as problem:
        raise SharedError(str(problem)) from None

    from fastgpt.train.finetune import run

    return _carry_out(lambda: run(config, must_resume=options.resume, places=places))


def _features(options: argparse.Namespace) -> int:
    from fastgpt.finetune_config import FinetuneConfig
    from fastgpt.settings import read_settings
    from fastgpt.train.features import features_command

    words = [f"pretrained={options.pretrained}", *options.overrides]
    features, labels = features_command(
        read_settings(FinetuneConfig, options.config, words)[0],
        out=options.out,
        split=options.split,
        layer=options.layer,
        pooling=options.pooling,
        batch_size=options.batch_size,
        device=options.device,
        backend=options.backend,
    )
    print(f"features: {features}" + (f"; labels: {labels}" if labels else ""))
    return 0


def _ablate(options: argparse.Namespace) -> int:
    from fastgpt.ablate.command import ablate
    from fastgpt.ablate.jobs import Stopped
    from fastgpt.ablate_config import AblateConfig
    from fastgpt.settings import read_settings

    try:
        failures = ablate(*read_settings(AblateConfig, options.config, options.overrides))
    except Stopped as stop:
        print(f"stopped by {stop}", file=sys.stderr)
        return stop.exit_code
    for failure in failures:
        print(f"fastgpt: error: {failure.job.label}: {failure.reason} (log: {failure.job.log})", file=sys.stderr)
    return 1 if failures else 0


def _predict(options: argparse.Namespace) -> int:
    from fastgpt.train.predict import predict_command

    predict_command(
        options.run,
        options.data,
        out=options.out,
        batch_size=options.batch_size,
        device=options.device,
        backend=options.backend,
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from fastgpt.evaluate.command import evaluate_command

    evaluate_command(
        options.model,
        options.heuristic,
        examples=options.examples,
        seed=options.seed,
        batch_size=options.batch_size,
        out=options.out,
        device=options.device,
        backend=options.backend,
    )
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from fastgpt.data.prepare import prepare
    from fastgpt.data.progress import shown_progress

    with shown_progress(f"preparing {options.source}") as progress:
        manifest = prepare(
            options.source,
            options.out,
            tokenizer=options.tokenizer,
            vocab_size=options.vocab_size,
            text_key=options.text_key,
            validation_fraction=options.validation_fraction,
            seed=options.seed,
            workers=options.workers,
            progress=progress,
        )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes of text")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from fastgpt.generate import generate_command

    generate_command(
        options.run,
        prompt=options.prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        samples=options.samples,
        device=options.device,
        backend=options.backend,
    )
    return 0


def _plan(options: argparse.Namespace) -> int:
    from fastgpt.plan.planner import Request, make_plan
    from fastgpt.plan.report import as_json, as_text
    from fastgpt.settings import load_config

    request = Request(
        options.gpus,
        options.gpu,
        per_node=options.gpus_per_node,
        network=None if options.network is None else options.network * 1e9,
        tokens=options.tokens,
        price=options.price,
        disk=options.disk * 1e9,
        host=None if options.host_memory is None else options.host_memory * 1e9,
        as_configured=options.as_configured,
    )
    plan = make_plan(load_config(options.config, options.overrides), request)
    print(json.dumps(as_json(plan), indent=1) if options.json else as_text(plan))
    return 0


def _bench(options: argparse.Namespace) -> int:
    root = Path(fastgpt.__file__).parents[1]
    if not (root / "benchmarks" / "step.py").is_file():
        raise UserError(
            "fastgpt bench: the benchmarks are part of the repository, not of an installed package; "
            "clone it, and install it with 'pip install -e .'"
        )
    sys.path.insert(0, str(root))
    if options.benchmark in ("curves", "profile"):  # which train in this process
        before_pytorch()
    benchmark = importlib.import_module(f"benchmarks.{options.benchmark}")
    given = {name: value for name, value in vars(options).items() if name not in ("command", "benchmark", "local_rank")}
    code: int = benchmark.run(**given)
    return code


def _rank() -> int:
    """This process's among those of its run; 0 where the launcher cannot be understood, which is told as it is."""
    from fastgpt.launchers import find_launch

    try:
        launch = find_launch()
    except UserError:
        return 0
    return launch.rank if launch else 0


def _log_to_stderr() -> None:
    """Our own messages, from rank 0; other libraries' only from warnings up."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    level = logging.INFO if _rank() == 0 else logging.ERROR
    for name in ("fastgpt", "fastgpt_kernels"):
        logging.getLogger(name).setLevel(level)


def _tell(problem: UserError) -> None:
    """One line on stderr; where every rank has the same to say, rank 0 says it."""
    rank = _rank()
    if rank == 0:
        print(f"fastgpt: error: {problem}", file=sys.stderr)
    elif not isinstance(problem, SharedError):
        print(f"fastgpt: error on rank {rank}: {problem}", file=sys.stderr)
