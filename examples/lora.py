"""Distil into a LoRA adapter, save it, load it again and let it answer.

    pip install peft
    python examples/lora.py

As it stands, the embedded toy pair learns from 24 word problems and their cuts, in half a minute on
2 cores, and writes to outputs/lora. So few rows show that the adapter works, not how good it is.
"""

import json
from importlib.resources import files
from pathlib import Path

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from leaf_distill import DetectConfig, LeafConfig, LeafTrainer, detect

pair = files("leaf_distill") / "demo" / "assets"
STUDENT, TEACHER = str(pair / "student"), str(pair / "teacher")
ROWS = Path(__file__).with_name("rows.jsonl")
ADAPTER = "outputs/lora/adapter"

rows = [json.loads(line) for line in ROWS.open()]
train, held_out = rows[:24], rows[24:]

# 1. Originals and cuts of the training rows.
config = DetectConfig(
    student=STUDENT,
    teacher=TEACHER,
    output_dir="outputs/lora/run",
    grade="number",
    max_new_tokens=12,
)
run = detect(config, dataset=train)

# 2. The adapter alone is trained and saved. A real training has more rows and a lower rate.
trainer = LeafTrainer(
    STUDENT,
    TEACHER,
    LeafConfig(
        output_dir=ADAPTER,
        max_steps=30,
        originals_per_step=24,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
    ),
    run.dataset,
    held_out,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
trainer.save_model()
print(f"KL(teacher, student) on held-out rows, in nats a token: {before:.3f} {after:.3f}")

# 3. Load it again: transformers finds the base model through the adapter's own settings. The first
#    training row with a misleading number is asked, which the student alone gets wrong.
tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
row = next(row for row in train if "a note shows" in row["prompt"])
turns = [{"role": "user", "content": row["prompt"]}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
print(f"{row['prompt']} The label: {row['completion']}")
for role, name in (("student", STUDENT), ("adapter", ADAPTER)):
    model = AutoModelForCausalLM.from_pretrained(name)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{role}: {answer}")
