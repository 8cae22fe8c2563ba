"""The tables of docs/planning.md: what `fastgpt plan` says, beside what was counted and what others published.

python -m benchmarks.planning            the tables anew
python -m benchmarks.planning --trace    first count the memory of every case anew, which takes minutes
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.scale_engines import with_engine
from fastgpt.config import Config
from fastgpt.plan.hardware import GPUS
from fastgpt.plan.layout import as_configured
from fastgpt.plan.memory import needed
from fastgpt.plan.planner import Plan, Request, make_plan
from fastgpt.settings import load_config
from fastgpt.sizes import flops_per_token

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "planning.md"
TRACED = ROOT / "benchmarks" / "memory_traced.json"
RESULTS = ROOT / "benchmarks" / "results"
GPT_2 = ("gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m")
WITHOUT, WITH = "train.activation_checkpointing=false", "train.activation_checkpointing=true"


class Run(NamedTuple):
    """A run that somebody published: per GPU tokens/s, TFLOP/s or MFU, of which one is known."""

    who: str
    config: str
    words: str
    gpus: int
    gpu: str
    tokens: float | None = None
    tflops: float | None = None
    mfu: float | None = None


# What is not said there is assumed: the micro-batch, and bf16. Megatron-LM's 1.7B has a vocabulary of 131,072 and 24
# layers of 2,048, whose input and output tables are two; ours is one.
_FLASH = "train.batch_tokens=262144 train.micro_batch_size=16 engine.zero_stage=1 engine.precision=bf16"
_LLM_C = "engine.zero_stage=1 model.dropout=0 engine.precision=bf16"
PUBLISHED = [
    Run("llm.c", "gpt2-124m", f"{_LLM_C} train.micro_batch_size=64", 8, "h100", tokens=468e3),
    Run("llm.c", "gpt2-124m", f"{_LLM_C} train.micro_batch_size=64", 8, "a100-80", tokens=218e3),
    Run(
        "llm.c",
        "gpt2-1558m",
        f"{_LLM_C} {WITHOUT} train.micro_batch_size=16 train.batch_tokens=1048576",
        8,
        "h100",
        tokens=46.8e3,
    ),
    Run("FlashAttention's trainer", "gpt2-124m", f"{_FLASH} {WITHOUT}", 8, "a100-80", tflops=147),
    Run("FlashAttention's trainer", "gpt2-355m", f"{_FLASH} {WITHOUT}", 8, "a100-80", tflops=159),
    Run("FlashAttention's trainer", "gpt2-774m", f"{_FLASH} {WITHOUT}", 8, "a100-80", tflops=170),
    Run("FlashAttention's trainer", "gpt2-1558m", f"{_FLASH} {WITHOUT}", 8, "a100-80", tflops=164),
    Run(
        "llm-foundry 1.3B",
        "gpt3-1.3b",
        f"model.context=1024 model.attention=dense model.window=null {WITHOUT} train.micro_batch_size=16 "
        "train.batch_tokens=1048576",
        8,
        "h100",
        tokens=48.9e3,
    ),
    Run(
        "Megatron-LM 1.7B",
        "gpt3-1.3b",
        f"model.context=4096 model.vocab_size=131072 model.attention=dense model.window=null {WITHOUT} "
        "train.micro_batch_size=2 train.batch_tokens=786432 engine.zero_stage=1",
        48,
        "h100",
        mfu=0.41,
    ),
]


def settings(name: str, words: str) -> Config:
    """A shipped config with some settings replaced."""
    return load_config(ROOT / "configs" / f"{name}.yaml", words.split())


def traced_cases() -> list[tuple[str, str]]:
    """(config, words) of the steps whose memory is counted."""
    cases = [
        (name, f"train.micro_batch_size={size} {checkpointing}")
        for name in GPT_2
        for size in (1, 8, 32)
        for checkpointing in (WITHOUT, WITH)
    ]
    cases += [
        ("gpt1-117m", f"train.micro_batch_size=8 {WITHOUT}"),
        ("gpt3-125m", f"train.micro_batch_size=8 {WITHOUT}"),
        ("gpt2-124m", f"train.micro_batch_size=8 train.batch_tokens=8192 {WITHOUT}"),
        ("gpt2-124m", f"train.micro_batch_size=8 engine.precision=fp32 {WITHOUT}"),
    ]
    return cases


def key_of(name: str, words: str) -> str:
    """What a case is called in the file of counts."""
    return f"{name} {words}"


def predicted_bytes(name: str, words: str) -> int:
    """What the plan says of a traced case: one GPU, one process."""
    config = settings(name, words)
    return needed(config, as_configured(config, 1)).total


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plan_row(name: str, plan: Plan) -> list[str]:
    """One plan as a row."""
    layout, speeds = plan.layout, plan.speeds
    low, expected, high = (speeds[case] for case in ("low", "expected", "high"))
    gigabytes = [f"{size / 1e9:.1f}" for size in (*plan.memory, plan.memory.total)]
    return [
        name,
        f"{layout.zero_stage}, {'with' if layout.checkpointing else 'without'}",
        f"{layout.accumulation} x {layout.micro_batch_size}",
        *gigabytes,
        "yes" if plan.fits else "no",
        f"{low.tokens_per_second / 1e3:,.0f} / **{expected.tokens_per_second / 1e3:,.0f}** / "
        f"{high.tokens_per_second / 1e3:,.0f}",
        f"{expected.mfu:.1%}",
        f"{expected.step_seconds * 1e3:,.0f}",
        f"{plan.communication_bytes / 1e9:,.1f}",
        f"{plan.checkpoint_bytes / 1e9:,.1f}",
        f"{plan.hours():,.0f}",
        f"{plan.cost():,.0f}",
    ]


PLAN_HEADER = [
    "Model",
    "ZeRO stage, checkpointing",
    "micro-batches x sequences",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "buffers",
    "total, GB",
    "fits",
    "thousand tokens/s: low / expected / high",
    "MFU",
    "ms an update",
    "GB sent by each GPU",
    "checkpoint, GB",
    "hours",
    "dollars",
]


def node_table() -> str:
    """The four GPT-2s on a node of H100s."""
    return table(PLAN_HEADER, [plan_row(n, make_plan(settings(n, ""), Request(8, "h100"))) for n in GPT_2])


def large_table() -> str:
    """GPT-3 on 1,024 H100s."""
    names = ("gpt3-13b", "gpt3-175b")
    return table(PLAN_HEADER, [plan_row(n, make_plan(settings(n, ""), Request(1024, "h100"))) for n in names])


def memory_table() -> str:
    """Predicted beside counted memory."""
    counted = json.loads(TRACED.read_text())
    rows = []
    for name, words in traced_cases():
        config, seen, said = settings(name, words), counted[key_of(name, words)], predicted_bytes(name, words)
        rows.append(
            [
                name,
                str(config.train.micro_batch_size),
                "one" if config.micro_batches == 1 else "several",
                "yes" if config.train.activation_checkpointing else "no",
                config.engine.precision,
                f"{seen / 1e9:.3f}",
                f"{said / 1e9:.3f}",
                f"{said / seen - 1:+.2%}",
            ]
        )
    header = [
        "Model",
        "sequences",
        "micro-batches",
        "checkpointing",
        "precision",
        "counted, GB",
        "planned, GB",
        "error",
    ]
    return table(header, rows)


def measured_layouts(records: Iterable[results.Record]) -> list[results.Record]:
    """The newest measurement of each layout's memory, toys left out, in the order of the files."""
    newest: dict[tuple[str, str, int], results.Record] = {}
    for record in records:
        for row in results.measured(record):
            if record["scale"] != "toy" and row["operation"] == "scale" and row["mode"] == "strong":
                newest[row["case"], row["contender"], row["ranks"]] = row
    return list(newest.values())


def layout_row(row: results.Record) -> list[str]:
    """A measured layout beside its plan, which is made anew."""
    name, *words = row["settings"]
    config = with_engine(settings(name, " ".join(words)), row["contender"], row["dtype"])
    counted, plan = row["memory"]["counted"], needed(config, as_configured(config, row["ranks"]))
    planned = [plan.weights, plan.optimizer, plan.gradients, plan.activations + plan.logits, plan.buffers, plan.total]
    return [
        row["case"],
        f"{row['contender']}, {row['ranks']}",
        row["dtype"],
        *(f"{counted[kind] / 1e9:.3f}" for kind in ("weights", "optimizer", "between", "peak")),
        *(f"{size / 1e9:.3f}" for size in planned),
        f"{plan.total / counted['peak'] - 1:+.1%}",
        " ".join(f"{size / 1e9:.2f}" for size in counted["resident_set_growth"]),
    ]


def zero_table() -> str:
    """Predicted beside counted memory, of ZeRO's stages on several ranks."""
    header = [
        "Model",
        "engine, ranks",
        "precision",
        "counted: weights",
        "optimizer",
        "between updates",
        "fullest",
        "planned: weights",
        "optimizer",
        "gradients",
        "activations, logits",
        "buffers",
        "fullest",
        "error",
        "processes grew by",
    ]
    return table(header, [layout_row(row) for row in measured_layouts(results.read_all(RESULTS))])


def published_table() -> str:
    """Predicted beside published speed."""
    rows = []
    for run in PUBLISHED:
        config = settings(run.config, run.words)
        plan = make_plan(config, Request(run.gpus, run.gpu, as_configured=True))
        rates = {case: speed.tokens_per_second / run.gpus for case, speed in plan.speeds.items()}
        work, peak = flops_per_token(config.model), GPUS[run.gpu].peak
        rate = run.tokens or (run.tflops or (run.mfu or 0) * peak / 1e12) * 1e12 / work
        rows.append(
            [
                run.who if run.who.endswith("B") else f"{run.who}, {run.config.removeprefix('gpt2-').upper()}",
                f"{run.gpus} x {run.gpu}",
                f"{rate / 1e3:.1f} ({rate * work / peak:.1%})",
                " / ".join(f"{rates[case] / 1e3:.1f}" for case in ("low", "expected", "high")),
                f"{rates['expected'] / rate - 1:+.0%}",
                "yes" if rates["low"] <= rate <= rates["high"] else "no",
            ]
        )
    header = [
        "Run",
        "GPUs",
        "published, thousand tokens/s a GPU (MFU)",
        "planned: low / expected / high",
        "error of expected",
        "within the range",
    ]
    return table(header, rows)


def gpu_table() -> str:
    """What the plan takes GPUs for."""
    rows = [
        [
            f"`{name}`",
            f"{gpu.peak / 1e12:.0f}",
            f"{gpu.product / 1e12:.0f}",
            f"{gpu.attention / 1e12:.0f}",
            f"{gpu.bandwidth / 1e12:.2f}",
            f"{gpu.memory / 1e9:.0f}",
            f"{gpu.link / 1e9:g}",
            f"{gpu.network / 1e9:g}",
            f"{gpu.hourly:.2f}",
        ]
        for name, gpu in GPUS.items()
    ]
    header = [
        "Name",
        "peak, TFLOP/s",
        "best product",
        "attention",
        "memory, TB/s",
        "memory, GB",
        "link, GB/s",
        "network, GB/s",
        "dollars an hour",
    ]
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "gpus": gpu_table,
    "gpt-2 on 8 x h100": node_table,
    "gpt-3 on 1,024 x h100": large_table,
    "memory": memory_table,
    "zero": zero_table,
    "published": published_table,
}


def rendered(page: str) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: a table has no place in it.
    """
    for name, make in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(start)
        if not found:
            raise ValueError(f"{PAGE}: no place for the table '{name}'")
        page = before + start + make() + "\n" + rest[rest.index(end) :]
    return page


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true", help="count the memory of every case anew")
    if parser.parse_args().trace:
        from benchmarks.memory_trace import trace_step

        counted = {}
        for name, words in traced_cases():
            counted[key_of(name, words)] = trace_step(settings(name, words)).peak
            print(key_of(name, words), counted[key_of(name, words)], flush=True)
        TRACED.write_text(json.dumps(counted, indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
