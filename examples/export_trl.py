"""Train with TRL on the originals and cuts that `detect` found; TRL needs to know nothing of LeaF.

    pip install trl
    python examples/export_trl.py

The dataset of `detect` has TRL's own layout, messages in `prompt` and `completion`. SFTTrainer
trains on the completions, without a teacher. As it stands, the embedded toy pair takes half a
minute on 2 cores, and writes to outputs/trl. Tried with TRL 1.16.
"""

from collections import Counter
from importlib.resources import files
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from leaf_distill import DetectConfig, detect

pair = files("leaf_distill") / "demo" / "assets"
STUDENT, TEACHER = str(pair / "student"), str(pair / "teacher")
ROWS = Path(__file__).with_name("rows.jsonl")

run = detect(
    DetectConfig(
        student=STUDENT,
        teacher=TEACHER,
        dataset=str(ROWS),
        output_dir="outputs/trl/run",
        grade="number",  # the toy's answers end with a number
        max_new_tokens=12,
    )
)

# Other settings of `detect` make rows that this layout cannot hold: those of `cross_branch` need a
# teacher, and those of `level="response"` begin with a context that is not to be trained.
rows = load_dataset("parquet", data_files=str(run.dataset), split="train")
rows = rows.filter(lambda row: row["branch"] != "cross" and not row["context"])
print(f"\nTRL gets {dict(Counter(rows['branch']))}; the first cut prompt:")
print(next(row["prompt"] for row in rows if row["branch"] == "counterfactual"))

config = SFTConfig(
    "outputs/trl/student",
    max_steps=20,
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    bf16=torch.cuda.is_available(),  # TRL's default, which a CPU refuses
)
trainer = SFTTrainer(STUDENT, args=config, train_dataset=rows)
trainer.train()
trainer.save_model()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
labels = [one for one in trainer.train_dataset[0]["labels"] if one != -100]
print(f"Trained on completions such as {trainer.processing_class.decode(labels)!r}")
print(
    f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f}; {config.output_dir} has the student"
)
