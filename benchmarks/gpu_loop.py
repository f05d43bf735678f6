"""Measures the loop on a GPU: saliency, batches, answers, `leaf detect`, the demo, distillation.

    python benchmarks/gpu_loop.py [--output build/gpu-loop] [--minutes 4] [--steps saliency,...]
        [--tiny]

The models have random weights, so that nothing has to be downloaded: a student of 1 billion
parameters and a teacher of 3 or 8 billion, in bfloat16; for distillation also a smaller pair with a
larger vocabulary. OUTPUT gets results.jsonl and summary.md,
which are written after every measure: a run that is stopped keeps what it has. `--tiny` rehearses
all steps on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "python"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import WhitespaceSplit  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from leaf_distill.data.collator import pad, plan_batches  # noqa: E402
from leaf_distill.data.example import Rendering  # noqa: E402
from leaf_distill.models.generation import generate  # noqa: E402
from leaf_distill.models.memory import default_batch_tokens  # noqa: E402
from leaf_distill.models.saliency import saliency  # noqa: E402

SIZES = {  # hidden, layers, heads, key-value heads, inner, vocabulary
    "student-1b": (2048, 16, 32, 8, 8192, 128256),
    "teacher-3b": (3072, 28, 24, 8, 8192, 128256),
    "teacher-8b": (4096, 32, 32, 8, 14336, 128256),
    "student-0.5b": (896, 24, 14, 2, 4864, 151936),
    "teacher-1.5b": (1536, 28, 12, 2, 8960, 151936),
    "tiny": (64, 2, 4, 2, 128, 512),
}
ROUNDS = 2
# A build that is on the path comes before the sources.
PATHS = {
    "PYTHONPATH": os.pathsep.join(
        filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "python"), str(ROOT)])
    )
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Run:
    """The options of one call and what it has measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.tiny: bool = arguments.tiny
        self.device = "cpu" if self.tiny else DEVICE
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.output: Path = arguments.output
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "results.jsonl").write_text("")
        self.lines: list[dict[str, Any]] = []
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        self.note("machine", name, torch=torch.__version__)

    def note(self, step: str, what: str, **values: Any) -> None:
        """Write one measure at once."""
        line = {"step": step, "what": what, **values}
        self.lines.append(line)
        with (self.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)
        rows = ["| step | what | result |", "| --- | --- | --- |"]
        for one in self.lines:
            found = ", ".join(f"{k} {v}" for k, v in one.items() if k not in ("step", "what"))
            rows.append(f"| {one['step']} | {one['what']} | {found} |")
        (self.output / "summary.md").write_text("\n".join(rows) + "\n")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def model(self, name: str, dtype: str = "bfloat16", seed: int = 0) -> Any:
        """Build a model with random weights on the device."""
        name, dtype = ("tiny", "float32") if self.tiny else (name, dtype)
        hidden, layers, heads, shared, inner, vocabulary = SIZES[name]
        config = LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            intermediate_size=inner,
            vocab_size=vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=name != "teacher-8b",
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(seed)
        with torch.device(self.device):
            built = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        return built.eval()

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float, float]:
        """Return the result, the seconds and the peak memory above the weights, in GB."""
        if self.device != "cuda":
            start = time.perf_counter()
            return work(), time.perf_counter() - start, 0.0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return result, seconds, (torch.cuda.max_memory_allocated() - before) / 1e9


def rows_of(run: Run, count: int, longest: int, vocabulary: int) -> list[Rendering]:
    """Draw rows: a prompt, and a completion of the same lengths as in school mathematics."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        length = int(draw.integers(longest // 5, longest))
        ids = draw.integers(3, vocabulary, length).astype(np.int32)
        labels = np.arange(length) >= length // 2
        offsets = np.zeros((length, 2), np.int32)
        rows.append(Rendering(ids, labels, offsets, ~labels))
    return rows


def bare(model: Any, rows: Sequence[Rendering], *, masked: bool = True) -> list[Any]:
    """Forward and backward to the input embeddings with nothing around it: full logits."""
    batch = {name: tensor.to(model.device) for name, tensor in pad(rows).items()}
    ids, labelled = batch["input_ids"], batch["loss_mask"]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    mask = batch["attention_mask"] if masked else None
    logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
    labels = ids.roll(-1, 1)[labelled]
    loss = torch.nn.functional.cross_entropy(logits[labelled].float(), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, embedded)
    return list(gradient.float().norm(dim=-1).cpu())


def release(model: Any, row: Rendering) -> Any:
    """The release's loop, repaired: one row, weights with gradients never set to zero."""
    ids = torch.from_numpy(row.input_ids).long().to(model.device)[None]
    labels = ids.masked_fill(~torch.from_numpy(row.loss_mask).to(model.device)[None], -100)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=labels).loss.backward()
    return np.linalg.norm(embedded.grad[0].float().cpu().numpy(), axis=-1)


def measure_saliency(run: Run) -> None:
    """Time each contender on all rows, twice in turn after a pass that is not timed."""
    model = run.model("student-1b").requires_grad_(False)
    rows = rows_of(run, 8 if run.tiny else 256, 64 if run.tiny else 900, model.config.vocab_size)
    dtype = str(model.dtype).removeprefix("torch.")
    default = default_batch_tokens(model.config, dtype, run.device)
    unmasked = partial(bare, masked=False)
    contenders: list[tuple[str, Callable[[Any, Sequence[Rendering]], list[Any]], int]] = [
        ("ours, default", saliency, default),
        ("ours", saliency, 4096),
        *(("bare", bare, size) for size in (4096, 8192, 16384)),
        *(("bare, no mask", unmasked, size) for size in (4096, 8192)),
    ]
    best: dict[tuple[str, int], tuple[float, float]] = {}
    norms: list[Any] = []
    for timed in range(ROUNDS + 1):
        for what, work, size in contenders:
            plan = plan_batches([len(row) for row in rows], max_tokens=size)
            try:
                made, seconds, peak = run.timed(
                    lambda work=work, plan=plan: [work(model, [rows[i] for i in b]) for b in plan]
                )
            except torch.OutOfMemoryError:
                run.note("saliency", what, batch_tokens=size, result="out of memory")
                continue
            if timed:
                best[what, size] = min(best.get((what, size), (seconds, peak)), (seconds, peak))
            if work is saliency:
                pairs = zip(chain(*plan), chain(*made), strict=True)
                norms = [one.norms for _, one in sorted(pairs, key=lambda pair: pair[0])]
    for (what, size), (seconds, peak) in best.items():
        rate = round(len(rows) / seconds, 1)
        run.note("saliency", what, batch_tokens=size, rows_s=rate, peak_gb=round(peak, 2))
    model.requires_grad_(True)
    few = rows[: 4 if run.tiny else 48]
    release(model, few[0])
    made, seconds, peak = run.timed(lambda: [release(model, row) for row in few])
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    run.note(
        "saliency", "release loop, repaired",
        rows_s=round(len(few) / seconds, 1), peak_gb=round(peak + weights, 2),
        note="with the gradients of the weights",
    )  # fmt: skip
    close = [
        float(np.corrcoef(ours[:-1], theirs[:-1])[0, 1])
        for ours, theirs in zip(norms, made, strict=False)
    ]
    run.note("saliency", "norms of ours beside the release loop", least_correlation=min(close))


def measure_batches(run: Run) -> None:
    """Fill a batch of the default size, for both models, and run out of memory on purpose."""
    for name in ("student-1b", "teacher-8b"):
        model = run.model(name).requires_grad_(False)
        dtype = str(model.dtype).removeprefix("torch.")
        size = default_batch_tokens(model.config, dtype, run.device)
        width = 32 if run.tiny else 1024
        rows = rows_of(run, max(1, size // width), width + 1, model.config.vocab_size)
        _, seconds, peak = run.timed(lambda model=model, rows=rows: saliency(model, rows))
        total = torch.cuda.get_device_properties(0).total_memory / 1e9 if not run.tiny else 0.0
        run.note(
            "batches", name, default_tokens=size, seconds=round(seconds, 2),
            peak_gb=round(peak, 2), gpu_gb=round(total, 1), tokens=len(rows) * width,
        )  # fmt: skip
        if run.device == "cuda" and name == "student-1b":
            allowed = torch.cuda.memory_allocated() / 1e9 + peak / 3
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(allowed / total)
            try:
                some = saliency(model, rows)
                run.note("batches", "a third of the memory", rows=len(some), of=len(rows))
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
        del model
        if run.device == "cuda":
            torch.cuda.empty_cache()


def measure_generation(run: Run) -> None:
    """Length buckets beside transformers' continuous batching.

    A random model hardly ever ends an answer: 1 % of its tokens end one here, drawn by chance.
    """
    model = run.model("student-1b")
    dtype = str(model.dtype).removeprefix("torch.")
    vocabulary = int(model.config.vocab_size)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0")
        )
    )
    draw = np.random.default_rng(0)
    ends = sorted(draw.choice(np.arange(3, vocabulary), vocabulary // 100, False).tolist())
    count, new = (6, 8) if run.tiny else (256, 256)
    rows = rows_of(run, count, 48 if run.tiny else 600, vocabulary)
    prompts = [row.input_ids.tolist() for row in rows]
    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    # By default the pages take 90 % of the memory, and filling a CPU's takes a minute.
    paging = ContinuousBatchingConfig(page_size=32, num_blocks=16) if run.tiny else None

    def buckets(size: int) -> list[list[int]]:
        answers: dict[int, Any] = {}
        for batch in plan_batches([len(one) + new for one in prompts], max_tokens=size):
            part = [prompts[at] for at in batch]
            made = generate(model, words, part, end_ids=ends, max_new_tokens=new)
            answers.update(zip(batch, made, strict=True))
        return [[int(word[1:]) for word in answers[at].text.split()] for at in range(len(prompts))]

    def continuous() -> list[list[int]]:
        made = model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=paging
        )
        return [list(one.generated_tokens) for one in made.values()]

    generate(model, words, prompts[:4], end_ids=ends, max_new_tokens=4)  # not timed
    default = default_batch_tokens(model.config, dtype, run.device, answers=True)
    kept: dict[str, list[list[int]]] = {}
    for what, work in (
        ("length buckets, 65536 tokens a batch", partial(buckets, 1 << 16)),
        ("length buckets, the default size", partial(buckets, default)),
        ("continuous batching", continuous),
    ):
        try:
            made, seconds, peak = run.timed(work)
        except Exception as error:  # whatever this version raises is the result
            run.note("generation", what, error=f"{error!r:.300}")
            continue
        kept[what] = [[t for t in one if t not in set(ends)] for one in made]
        tokens = sum(map(len, kept[what]))
        run.note(
            "generation", what, prompts=len(made), tokens=tokens,
            tokens_s=round(tokens / seconds), seconds=round(seconds, 2),
            peak_gb=round(peak, 2), attention=model.config._attn_implementation,
        )  # fmt: skip
    (_, ours), *others = kept.items() or [("", [])]
    for what, theirs in others:
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        run.note("generation", f"{what}: equal answers", equal=equal, of=len(prompts))


def save_pair(
    run: Run, folder: Path, student: str = "student-1b", teacher: str = "teacher-3b"
) -> None:
    """Write a student, a teacher, and rows of words that both know."""
    draw = np.random.default_rng(0)
    for seed, (role, name) in enumerate((("student", student), ("teacher", teacher))):
        model = run.model(name, seed=seed)
        vocabulary = int(model.config.vocab_size)
        model.save_pretrained(folder / role)
        words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
        made = Tokenizer(WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
            chat_template="{% for m in messages %}{{ m.content }} </s>{% endfor %}",
        ).save_pretrained(folder / role)  # fmt: skip
        del model
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(12 if run.tiny else 512):
            words_of = [
                " ".join(f"w{i}" for i in draw.integers(3, vocabulary, int(length)))
                for length in draw.integers(4, 20, 2) * (1 if run.tiny else 16)
            ]
            row = {"prompt": words_of[0], "completion": f"{words_of[1]} The answer is {index}."}
            file.write(json.dumps(row) + "\n")


def measure_detect(run: Run) -> None:
    """Run `leaf detect` beside its estimate: all saliencies; and the answers of both models."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        save_pair(run, folder)
        run.note("detect", "pair made", seconds=round(time.perf_counter() - start, 1))
        if run.device == "cuda":
            torch.cuda.empty_cache()
        common = [
            *(sys.executable, "-m", "leaf_distill", "detect"),
            *("--student", str(folder / "student"), "--teacher", str(folder / "teacher")),
            *("--dataset", str(folder / "rows.jsonl"), "--cache_dir", str(folder / "cache")),
            *("--dtype", "float32" if run.tiny else "bfloat16"),
        ]
        for name, options in (
            ("saliency", ("--select", "all", "--validate", "none")),
            ("answers", ("--max_rows", "6" if run.tiny else "256", "--max_new_tokens", "128")),
            (
                "intervention",
                (
                    *("--score", "intervention", "--select", "all", "--validate", "none"),
                    *("--max_rows", "4" if run.tiny else "24"),
                ),
            ),
        ):
            out = folder / name
            for dry in (("--dry_run",), ()):
                start = time.perf_counter()
                command = [*common, *options, *dry, "--output_dir", str(out)]
                done = subprocess.run(  # elsewhere than in the sources, which may have no build
                    command, cwd=folder, env=os.environ | PATHS, capture_output=True, text=True,
                    timeout=max(10.0, min(150.0, run.left())),
                )  # fmt: skip
                what = f"{name}, dry run" if dry else name
                (run.output / f"detect-{what.replace(', ', '-').replace(' ', '-')}.txt").write_text(
                    done.stdout + "\n" + done.stderr[-6000:]
                )
                seconds = round(time.perf_counter() - start, 1)
                run.note("detect", what, rc=done.returncode, seconds=seconds)
            for funnel in out.rglob("funnel.json"):
                run.note("detect", f"{name}, steps", **json.loads(funnel.read_text())["seconds"])


def measure_demo(run: Run) -> None:
    """Run the demo on each device; its numbers should agree."""
    for device in ("cpu",) if run.tiny else ("cuda", "cpu"):
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        start = time.perf_counter()
        command = [sys.executable, "-m", "leaf_distill", "demo", "--output_dir"]
        folder = run.output / f"demo-{device}"
        done = subprocess.run(
            [*command, str(folder)],
            env=os.environ | PATHS | hidden, capture_output=True, text=True,
            timeout=max(10.0, min(150.0, run.left())),
        )  # fmt: skip
        (run.output / f"demo-{device}.txt").write_text(done.stdout + done.stderr[-4000:])
        run.note(
            "demo", device, rc=done.returncode, seconds=round(time.perf_counter() - start, 1),
            tail=done.stdout[-600:].replace("\n", " / ").replace("|", "!"),
        )  # fmt: skip


def measure_distillation(run: Run) -> None:
    """Time steps of `LeafTrainer`, packed and padded, beside a plain loss, at two vocabularies."""
    pairs = (("student-1b", "teacher-3b"), ("student-0.5b", "teacher-1.5b"))
    for student, teacher in pairs[:1] if run.tiny else pairs:
        vocabulary = SIZES["tiny" if run.tiny else student][-1]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            save_pair(run, folder, student, teacher)
            if run.device == "cuda":
                torch.cuda.empty_cache()
            page = run.output / f"distillation-{vocabulary}.md"
            command = [
                *(sys.executable, str(ROOT / "benchmarks" / "training.py")),
                *(str(folder / name) for name in ("teacher", "student", "rows.jsonl")),
                *("--columns", json.dumps({one: one for one in ("prompt", "completion")})),
                *("--batch", "4" if run.tiny else "16", "--steps", "3" if run.tiny else "6"),
                *("--device", run.device, "--dtype", "float32" if run.tiny else "bfloat16"),
                *("--output", str(page)),
            ]
            done = subprocess.run(
                command, cwd=folder, env=os.environ | PATHS, capture_output=True, text=True,
                timeout=max(10.0, min(120.0, run.left())),
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"training.py failed at {vocabulary}: {done.stderr[-3000:]}")
        for line in page.read_text().partition("|---|")[2].splitlines()[1:]:
            name, speed, seconds, mib, ratio = (cell.strip() for cell in line.split("|")[1:-1])
            run.note(
                "distillation", name, vocabulary=vocabulary, tokens_s=speed, seconds=seconds,
                mib=mib, of_packed=ratio,
            )  # fmt: skip


STEPS = {
    "saliency": measure_saliency,
    "batches": measure_batches,
    "generation": measure_generation,
    "detect": measure_detect,
    "demo": measure_demo,
    "distillation": measure_distillation,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-loop")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--steps", default=",".join(STEPS), help="some of the steps, by comma")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps.split(",")) - set(STEPS):
        parser.error(f"--steps knows {', '.join(STEPS)}, got {', '.join(unknown)}")
    if not arguments.tiny and DEVICE == "cpu":
        parser.error("torch can use no CUDA GPU here; --tiny rehearses without one")
    run, failed = Run(arguments), 0
    for name in arguments.steps.split(","):
        if run.left() < 5:
            run.note(name, "left out: the time was spent")
            continue
        try:
            STEPS[name](run)
        except Exception:  # the later steps run all the same
            failed += 1
            traceback.print_exc()
            run.note(name, "failed", error=traceback.format_exc()[-400:].replace("\n", " / "))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
