"""One training on several ranks with the tiny pair, as a script; and how the tests launch it.

`torchrun ranks_training.py SETTINGS.json` trains, evaluates and saves, and the first rank writes
what was measured. The kind of parallelism comes from the environment, as accelerate sets it.

accelerate shards on GPUs only: on a CPU it silently takes DDP for FSDP. `shard_on_the_cpu` makes it
shard there too, and the script checks that it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from distill_pair import make_config, make_rows, make_student, make_teacher, make_tokenizer
from torch import Tensor
from transformers import TrainerCallback

from leaf_distill.training.token_kl import TokenKL
from leaf_distill.training.trainer import LeafTrainer

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "python" / "leaf_distill" / "configs"
DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""The environment of `make test-slow` that has DeepSpeed."""


# ---- in the test ----


def launch(
    directory: Path,
    config: str,
    *,
    killed: bool = False,
    python: Path | str = sys.executable,
    **settings: Any,
) -> None:
    """Train on two ranks under one of our accelerate configs; `killed`: expect that both die."""
    directory.mkdir(exist_ok=True)
    file = directory / "settings.json"
    file.write_text(json.dumps(settings))
    command = [str(python), "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}", __file__, str(file)]
    log = directory / "ranks.log"
    with (
        log.open("w") as out,
        subprocess.Popen(command, env=environment(config), stdout=out, stderr=out) as launched,
    ):
        try:
            code = launched.wait(timeout=300)
        finally:
            launched.terminate()  # SIGTERM: if it hangs, torchrun ends its ranks as well
    assert (code != 0) is killed, log.read_text()[-4000:]


def environment(config: str) -> dict[str, str]:
    """Return what `accelerate launch` gives its processes under one of our configs."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    given = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", "2", "script"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    # The settings say `use_cpu`, but accelerate would still ask for a GPU for each rank.
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # DeepSpeed's environment sees the packages of this one, but not what is installed editable.
    paths = (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", ""))
    ours["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # `launch` would list them
        _, given_to_ranks = prepare_deepspeed_cmd_env(arguments)
        built = {"TORCH_EXTENSIONS_DIR": str(DEEPSPEED / "extensions"), "DS_ACCELERATOR": "cpu"}
        return {**given_to_ranks, **ours, **built}
    return {**prepare_multi_gpu_env(arguments), **ours}


def measured(directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((directory / "measured.json").read_text())
    return result


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# ---- on each rank ----


def shard_on_the_cpu() -> None:
    """Let accelerate apply FSDP on a CPU as on GPUs."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plain, seen = AcceleratorState.__init__, []

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        seen.extend(plugin for plugin in [kwargs.get("fsdp_plugin")] if plugin is not None)
        if seen and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, seen[0]
            if self._mixed_precision != "no":
                seen[0].set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


class Kill(TrainerCallback):
    """The machine goes down after a step: no rank can do anything more."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Began(TrainerCallback):
    """Keeps the step that training went on from, and checks the wrapped student."""

    def __init__(self, trainer: LeafTrainer) -> None:
        self.trainer, self.at = trainer, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at = state.global_step
        check_wrapping(self.trainer)


def check_wrapping(trainer: LeafTrainer) -> None:
    """The student is wrapped as the environment says; nobody wraps or optimizes the teacher."""
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    teacher, students = trainer.teacher_model, list(trainer.model.parameters())
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
        assert all(hasattr(weight, "ds_id") for weight in students)
        # The reading of a checkpoint makes small weights whole, as the first pass does.
        resumed = trainer.state.global_step > 0
        assert resumed or not any(weight.numel() for weight in students)
        assert not any(hasattr(weight, "ds_id") for weight in teacher.parameters())
        assert not optimized & {id(weight) for weight in teacher.parameters()}
        return
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        assert trainer.accelerator.is_fsdp2
        assert all(isinstance(weight, DTensor) for weight in students)
        policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        assert policy is None or policy.reduce_dtype == torch.float32
    else:
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        assert not trainer.model_wrapped.find_unused_parameters
    assert optimized == {id(weight) for weight in students}
    assert not any(isinstance(weight, DTensor) for weight in teacher.parameters())
    assert not any(weight.requires_grad for weight in teacher.parameters())


@contextlib.contextmanager
def counted_gathers(model: torch.nn.Module) -> Iterator[list[int]]:
    """Count how often the whole head is made of its shards."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

    plain, count = fsdp.foreach_all_gather, [0]

    def gather(params: Any, *args: Any, **kwargs: Any) -> Any:
        head = model.get_output_embeddings()  # type: ignore[operator]
        modules = {id(one._module_info.module) for one in params}
        modules |= {id(one) for p in params for one in p._module_info.shared_modules}
        count[0] += id(head) in modules
        return plain(params, *args, **kwargs)

    fsdp.foreach_all_gather = gather
    try:
        yield count
    finally:
        fsdp.foreach_all_gather = plain


class Passes:
    """Counts the student's forward passes, apart from the checks before a training."""

    def __init__(self, trainer: LeafTrainer) -> None:
        self.trainer, self.train, self.eval = trainer, 0, 0
        trainer.model.register_forward_hook(self._see)

    def _see(self, *_: Any) -> None:
        self.train += self.trainer.is_in_train
        self.eval += not self.trainer.is_in_train


def train(settings: Mapping[str, Any], directory: Path) -> tuple[LeafTrainer, dict[str, Any]]:
    """Train the tiny pair as the settings say, and return what was measured."""
    rest = dict(settings)
    double, tied = rest.pop("double", True), rest.pop("tied", True)
    kill_after, resume = rest.pop("kill_after", None), rest.pop("resume", False)
    evaluate_first = rest.pop("evaluate_first", False)
    token_kl = rest.pop("token_kl", False)
    rows = make_rows()
    for row, text in zip(rows, rest.pop("answers", ()), strict=False):
        row["answer"] = text
    student, teacher = make_student(tie_word_embeddings=tied), make_teacher()
    if double:
        student, teacher = student.double(), teacher.double()
    config = make_config(directory / "run", **rest)
    trainer = LeafTrainer(student, teacher, config, rows, rows, make_tokenizer())
    began = Began(trainer)
    if config.world_size > 1:
        trainer.add_callback(began)
    if kill_after is not None:
        trainer.add_callback(Kill(kill_after))
    if token_kl:
        directory.mkdir(exist_ok=True)
        trainer.add_callback(TokenKL(trainer, directory))
    if evaluate_first:
        trainer.evaluate()
    passes = Passes(trainer)
    with counted_gathers(student) as gathers:
        trainer.train(resume_from_checkpoint=resume)
        trained = {"passes": passes.train, "gathers": gathers[0]}
    passes.eval = 0
    with counted_gathers(student) as gathers:
        trainer.evaluate()
        evaluated = {"passes": passes.eval, "gathers": gathers[0]}
    return trainer, {
        "log": trainer.state.log_history,
        "began": began.at,
        "train": trained,
        "eval": evaluated,
    }


def main(file: Path) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_the_cpu()
    trainer, result = train(json.loads(file.read_text()), file.parent)
    trainer.save_model(str(file.parent / "saved"))
    if trainer.is_world_process_zero():
        (file.parent / "measured.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def saved_weights(directory: Path) -> dict[str, Tensor]:
    """Return the weights of the saved student, as from_pretrained reads them."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory / "saved", dtype="auto")
    return dict(model.state_dict())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
