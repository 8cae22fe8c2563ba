"""What a finished run reached, for people and in `summary.json`."""

import json
from pathlib import Path
from typing import Any

from fastgpt.data.compression import compressed_bits_per_byte
from fastgpt.data.evaluation import covered_text
from fastgpt.data.shards import TokenShards
from fastgpt.files import write_atomically
from fastgpt.train.display import Display

# xz at its strongest reads about 2 MB/s: a larger validation text is compared by its beginning alone
_COMPARED_BYTES = 16 * 2**20


def summarise(folder: Path, validation: TokenShards, display: Display) -> None:
    """Print the run's result beside what general compressors reach on the same text, and write it down."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [r for r in records if r["split"] == "validation"]
    first, last = validations[0], validations[-1]
    text = covered_text(validation, last["predicted_tokens"])[:_COMPARED_BYTES]
    compressors = compressed_bits_per_byte(text)
    summary: dict[str, Any] = {
        "steps": last["step"],
        "tokens": last["tokens"],
        "first_validation_loss": first["loss"],
        "validation_loss": last["loss"],
        "perplexity": last["perplexity"],
        "bits_per_byte": last["bits_per_byte"],
        "compressors_bits_per_byte": compressors,
        "compared_bytes": len(text),
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    display.print(f"\nvalidation loss {first['loss']:.4f} at the start, {last['loss']:.4f} after step {last['step']}")
    display.print(f"bits per byte of the validation text ({last['bytes']:,} bytes):")
    display.print(f"  this model  {last['bits_per_byte']:.4f}")
    scope = "" if len(text) >= last["bytes"] else f"  (of its first {len(text):,} bytes)"
    for name, bits in compressors.items():
        display.print(f"  {name:<10}  {bits:.4f}{scope}")
    display.print("  (the compressors start from nothing; the model has read the training text)")
    display.print(f"\nrun folder {folder}; write with it: fastgpt generate {folder} --prompt '...'")
