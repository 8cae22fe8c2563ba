"""The words of the command line: commands, their arguments, and mistakes in one line."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastgpt.errors import UserError, did_you_mean

COMMANDS = ("train", "finetune", "predict", "features", "evaluate", "ablate", "prepare", "generate", "plan", "bench")
BENCHMARKS = ("step", "profile", "scale", "data", "start", "curves")

EPILOG = """\
examples:
  fastgpt train configs/quickstart.yaml
  fastgpt train configs/gpt2-124m.yaml out=runs/mine train.lr=3e-4
  deepspeed --num_gpus 8 --module fastgpt train configs/gpt2-1558m.yaml
  torchrun --nproc-per-node 8 -m fastgpt train configs/gpt2-1558m.yaml
  fastgpt generate runs/quickstart --prompt 'def main'
  fastgpt finetune runs/mine configs/finetune/sst2.yaml task.train=train.tsv task.validation=dev.tsv
  fastgpt predict runs/sst2 new.tsv --out predictions.jsonl
  fastgpt ablate configs/studies/transfer.yaml out=runs/study jobs=2
  fastgpt evaluate runs/mine --heuristic sst2=dev.tsv --heuristic winograd=wsc273.txt
  fastgpt plan configs/gpt2-1558m.yaml --gpus 8 --gpu h100
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with its mistakes as one line and with the nearest right command."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"argument (?:command|benchmark): invalid choice: '(.*)' \(choose", message)
        near = did_you_mean(unknown[1], (*COMMANDS, *BENCHMARKS)) if unknown else ""
        raise UserError(f"{self.prog}: {message}.{near}")


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    top = _Parser(
        prog="fastgpt",
        description="Train GPT-class models, from raw text to a trained GPT.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # the `deepspeed` launcher gives it before the command; the environment says the same
    top.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = top.add_subparsers(dest="command", metavar="command", parser_class=_Parser)

    train = commands.add_parser("train", help="train a model, or go on training it")
    _add_settings(train)
    train.add_argument("--resume", action="store_true", help="refuse to start anew where there is no checkpoint")
    train.add_argument("--init", metavar="MODEL", help="a run or a model folder to start from: train.init=MODEL")

    finetune = commands.add_parser("finetune", help="train a pre-trained model to do a task")
    finetune.add_argument("pretrained", metavar="model", help="a run, a checkpoint, or a Hugging Face folder")
    _add_settings(finetune)
    finetune.add_argument("--resume", action="store_true", help="refuse to start anew where there is no checkpoint")

    features = commands.add_parser("features", help="what a model makes of a task's examples, as NumPy arrays")
    features.add_argument("pretrained", metavar="model", help="a run, a checkpoint, or a Hugging Face folder")
    features.add_argument("config", help="a YAML file of settings, as for finetune")
    features.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")
    features.add_argument("--out", required=True, metavar="FILE", help="NAME.npy; NAME.labels.npy is written beside it")
    features.add_argument("--split", default="train", help="train, validation or test (default: %(default)s)")
    features.add_argument("--layer", type=int, help="after so many blocks, 0 the embedding (default: after the last)")
    features.add_argument("--pooling", default="extract", help="extract, mean or concat (default: %(default)s)")
    features.add_argument("--batch-size", type=int, default=32, help="examples of one pass (default: %(default)s)")
    _add_placing(features)

    ablate = commands.add_parser("ablate", help="compare many fine-tunings, in tables and figures")
    _add_settings(ablate)

    predict = commands.add_parser("predict", help="let a fine-tuned model do its task on new examples")
    predict.add_argument("run", help="a run of `fastgpt finetune`, or a checkpoint of it")
    predict.add_argument(
        "data", help="a file in the format of the training examples, with or without what is predicted"
    )
    predict.add_argument("--out", metavar="FILE", help="write JSON lines there (default: standard output)")
    predict.add_argument("--batch-size", type=int, default=32, help="examples of one pass (default: %(default)s)")
    _add_placing(predict)

    evaluate = commands.add_parser("evaluate", help="what a model does without being trained to")
    evaluate.add_argument("model", help="a run, a checkpoint, or a Hugging Face folder")
    evaluate.add_argument(
        "--heuristic",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="one of GPT-1's zero-shot heuristics (cola, sst2, race, storycloze, copa, hellaswag, winograd) and its "
        "data; may be given several times",
    )
    evaluate.add_argument("--examples", type=int, metavar="N", help="at most so many of each file (default: all)")
    evaluate.add_argument("--seed", type=int, default=0, help="which are chosen (default: %(default)s)")
    evaluate.add_argument("--batch-size", type=int, default=32, help="texts of one pass (default: %(default)s)")
    evaluate.add_argument("--out", metavar="FILE", help="write what is found there, as JSON")
    _add_placing(evaluate)

    prepare = commands.add_parser("prepare", help="turn text into token shards")
    prepare.add_argument("source", help=".txt, .jsonl or .jsonl.gz files, a folder of them, or 'stdlib'")
    prepare.add_argument("out", help="the folder to write; it must not exist")
    prepare.add_argument("--tokenizer", default="auto", help="a folder of tokenizer files; by default a BPE is trained")
    prepare.add_argument("--vocab-size", type=int, default=50257, help="largest vocabulary (default: %(default)s)")
    prepare.add_argument("--text-key", default="text", help="where a JSON line holds its text (default: %(default)s)")
    prepare.add_argument(
        "--validation-fraction", type=float, default=0.01, help="of the documents (default: %(default)s)"
    )
    prepare.add_argument(
        "--seed", type=int, default=1337, help="decides which documents validate (default: %(default)s)"
    )
    prepare.add_argument("--workers", type=int, help="processes (default: one a core)")

    generate = commands.add_parser("generate", help="let a trained model write")
    generate.add_argument("run", help="a run folder, a checkpoint, or a Hugging Face folder")
    generate.add_argument("--prompt", default="", help="the text to go on from")
    generate.add_argument("--max-tokens", type=int, default=200, help="tokens to write (default: %(default)s)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)"
    )
    generate.add_argument("--top-k", type=int, help="choose among the k likeliest tokens")
    generate.add_argument("--top-p", type=float, help="choose among the likeliest tokens of this joint probability")
    generate.add_argument(
        "--seed", type=int, default=0, help="the same seed writes the same text (default: %(default)s)"
    )
    generate.add_argument("--samples", type=int, default=1, help="how many texts (default: %(default)s)")
    _add_placing(generate)

    plan = commands.add_parser("plan", help="what a run needs, how fast it goes and what it costs, without a GPU")
    _add_settings(plan)
    plan.add_argument("--gpus", type=int, default=8, help="how many (default: %(default)s)")
    plan.add_argument("--gpu", default="h100", help="which: h100, h200, a100-80, rtx4090 ... (default: %(default)s)")
    plan.add_argument("--gpus-per-node", type=int, default=8, help="(default: %(default)s)")
    plan.add_argument("--network", type=float, metavar="GB/s", help="of each GPU to other nodes, in one direction")
    plan.add_argument("--tokens", type=float, help="of the run (default: what the settings ask for)")
    plan.add_argument("--price", type=float, metavar="USD", help="of a GPU-hour")
    plan.add_argument("--disk", type=float, default=2.0, metavar="GB/s", help="of a node, both ways (default: 2)")
    plan.add_argument("--host-memory", type=float, metavar="GB", help="of the host, for each GPU, to offload to")
    plan.add_argument("--as-configured", action="store_true", help="plan the settings as they are, not the best ones")
    plan.add_argument("--json", action="store_true", help="print JSON")

    bench = commands.add_parser("bench", help="measure, beside what else there is")
    benchmarks = bench.add_subparsers(dest="benchmark", metavar="benchmark", required=True, parser_class=_Parser)
    step = benchmarks.add_parser("step", help="whole training updates on random tokens")
    _add_settings(step)
    step.add_argument("--contenders", metavar="a,b,c", help="who is measured (default: all that the device can run)")
    step.add_argument("--peer-path", metavar="DIR", help="a folder with nanoGPT's model.py, to measure it too")
    step.add_argument("--rounds", type=int, default=10, help="turns of each (default: %(default)s)")
    step.add_argument("--label", default="", help="keeps it beside other measurements of the same file in the results")
    step.add_argument("--one-at-a-time", action="store_true", help="for a GPU that cannot hold all models at once")
    scale = benchmarks.add_parser("scale", help="ZeRO's stages on several ranks, beside one process and the plan")
    _add_settings(scale)
    scale.add_argument("--ranks", metavar="1,2,4", help="numbers of ranks (default: 1,2,4; on GPUs what there are)")
    scale.add_argument("--engines", metavar="a,b,c", help="of single, single-no-graph, zero0 to zero3 (default: all)")
    scale.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    data = benchmarks.add_parser("data", help="batches from token shards, on one core")
    data.add_argument("--rounds", type=int, default=10, help="turns of each (default: %(default)s)")
    data.add_argument("--toy", action="store_true", help="few tokens: to see that it works")
    start = benchmarks.add_parser("start", help="from the start of a process to its first update")
    start.add_argument("config", nargs="?", help="a YAML file of settings (default: the quickstart, and a small GPT-2)")
    start.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")
    start.add_argument("--rounds", type=int, default=5, help="fresh processes of each (default: %(default)s)")
    curves = benchmarks.add_parser("curves", help="the loss of a training run on real text, beside plain PyTorch's")
    curves.add_argument("config", nargs="?", help="a YAML file of settings (default: a small GPT-2)")
    curves.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")
    curves.add_argument("--seeds", type=int, default=4, help="further ones of plain PyTorch (default: %(default)s)")
    curves.add_argument(
        "--each", type=float, metavar="SECONDS", help="train ours and plain PyTorch for so long at most"
    )
    profile = benchmarks.add_parser("profile", help="where the time of an update goes")
    _add_settings(profile)
    profile.add_argument("--rounds", type=int, default=5, help="updates that are looked at (default: %(default)s)")
    for benchmark in (step, profile, scale, data, start, curves):
        _add_keeping(benchmark)
    return top


def _add_settings(command: argparse.ArgumentParser) -> None:
    """A file of settings, and words that replace some of them."""
    command.add_argument("config", help="a YAML file of settings")
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")


def _add_placing(command: argparse.ArgumentParser) -> None:
    """Where a trained model runs."""
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    command.add_argument(
        "--backend", default="auto", help="auto, triton, native, torch or reference (default: %(default)s)"
    )


def _add_keeping(benchmark: argparse.ArgumentParser) -> None:
    """What every benchmark is told of where its results go, and until when."""
    benchmark.add_argument("--seconds", type=float, help="begin nothing after so many seconds")
    benchmark.add_argument(
        "--out", metavar="FOLDER", help="of the results file (default: $OUT, else benchmarks/results)"
    )
    benchmark.add_argument("--commit", help="where git is not at hand to tell")
    # for the command that collects several parts
    benchmark.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    benchmark.add_argument("--until", type=float, help=argparse.SUPPRESS)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command.

    Raises:
        UserError: what is not an argument.
    """
    # options between the settings end argparse's list of them early: what is left over are settings too
    options, rest = parser().parse_known_args(words)
    wrong = [w for w in rest if w.startswith("-") or not hasattr(options, "overrides")]
    if wrong:
        raise UserError(f"fastgpt {options.command or ''}: {wrong[0]} is not an argument; see --help")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def at_least_one(option: str, value: int) -> None:
    """Raise UserError where an option that counts something is less than 1."""
    if value < 1:
        raise UserError(f"{option} must be at least 1, not {value}")


def output_file(path: str) -> Path:
    """The file that `--out` names. Raises UserError where no file can be written there."""
    out = Path(path)
    if out.is_dir():
        raise UserError(f"--out: {path} is a folder; give a file")
    if not out.parent.is_dir():
        raise UserError(f"--out: {path}: its folder {out.parent} is not there; make it first")
    return out
