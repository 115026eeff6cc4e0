"""What someone does who has the wheel, a model and ten minutes: own rows, train, task, evaluate, generate, check.

    python tests/stranger.py MODEL [LAYER]

runs in the current folder, which should be empty, with the `laai` beside this Python; stops at the first that
fails. No clone is needed: the rows are the bundled lexicon's antonyms, written as anyone's file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from laai_core.data import lexicon_pairs

ROWS = Path("my_words.jsonl")


def run(*command: str) -> str:
    """The command's standard output; what it says and does is shown."""
    print("$", *command, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}")
    return done.stdout


def main(model: str, layer: str = "3") -> None:
    """Every step; the baseline of the gate is the run itself, and then a run without the vector, which must fail."""
    with ROWS.open("w", encoding="utf-8") as file:
        for pair in lexicon_pairs("antonym")[0]:
            file.write(json.dumps({"input": pair.input, "output": pair.output}, ensure_ascii=False) + "\n")
    laai = [str(Path(sys.executable).with_name("laai"))]
    run(*laai, "train", "--model", model, "--examples", str(ROWS), "--layer", layer, "--output", "vectors/")
    run(*laai, "task", str(ROWS), "--output", "tasks")
    run(sys.executable, "-m", "lm_eval", "validate", "--tasks", "my_words", "--include_path", "tasks")
    for name, extra in (("steered", ",intervention=vectors"), ("plain", "")):
        arguments = ["--model", "hf-laai", "--model_args", f"pretrained={model}{extra}", "--tasks", "my_words"]
        arguments += ["--include_path", "tasks", "--device", "cpu", "--batch_size", "64", "--limit", "100"]
        run(sys.executable, "-m", "lm_eval", "run", *arguments, "--log_samples", "--output_path", f"results/{name}")
    vector = "vectors/my_words.safetensors"
    run(*laai, "generate", "--model", model, "--intervention", vector, "hot", "big", "--scale", "0,0.5,1")
    run(*laai, "check", "results/steered", "--against", "baseline.yaml", "--update")
    run(*laai, "check", "results/steered", "--against", "baseline.yaml")
    dropped = subprocess.run(
        [*laai, "check", "results/plain", "--against", "baseline.yaml"], capture_output=True, text=True
    )
    print(dropped.stdout, dropped.stderr, flush=True)
    if dropped.returncode != 1:
        sys.exit(f"the gate let a run without the vector pass (exit code {dropped.returncode})")


if __name__ == "__main__":
    main(*sys.argv[1:])
