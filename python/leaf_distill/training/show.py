"""`leaf distill --show N`: rows as the models read them, tokens and labels side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from leaf_distill.data.collator import ExampleDataset, prepare_dataset
from leaf_distill.data.example import ROLES, Example, Rendering, Role
from leaf_distill.data.prompt import Renderer
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.tokenizer import check_same_tokenizer
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.pair import make_renderers, max_length
from leaf_distill.training.sampler import StepSampler
from leaf_distill.training.teacher_cache import TeacherCache

COLUMN = 38
"""Characters of each of the two columns."""
BORDER = "\u2502"
"""Stands between two tokens, and between the columns."""


def show_rows(arguments: DistillArguments, config: LeafConfig, examples: list[Example]) -> None:
    """Print the first `arguments.show` rows of the training, originals and others in turn.

    The left column has all tokens, the right one those that are labels. Configurations and
    tokenizers are read, no weights.

    Raises:
        ValueError: a model cannot be read, the tokenizers differ, or no row can be trained on.
    """
    roles = ROLES if arguments.teacher_cache is None else ROLES[:1]
    trust = arguments.trust_remote_code
    models = {
        role: LazyModel(getattr(arguments, role), trust_remote_code=trust, argument=role)
        for role in roles
    }
    tokenizers = {role: model.tokenizer for role, model in models.items()}
    rows = {role: int(one.config.get_text_config().vocab_size) for role, one in models.items()}
    positions = {role: one.max_positions for role, one in models.items()}
    if arguments.teacher_cache is not None:
        cache = TeacherCache(arguments.teacher_cache)
        tokenizers["teacher"] = cache.tokenizer
        rows["teacher"] = cache.manifest["embedding_rows"]
        positions["teacher"] = cache.manifest["max_positions"]
    check_same_tokenizer(tokenizers["teacher"], tokenizers["student"])
    renderers = make_renderers(tokenizers, config)
    limit = max_length(positions, config.max_length)
    dataset, _ = prepare_dataset(
        examples, renderers, max_length=limit, embedding_rows=rows, name="dataset"
    )
    if not config.process_index:
        console = Console(highlight=False)
        for example in _in_turn(dataset, config)[: arguments.show]:
            for line in describe(example, renderers):
                console.print(line, soft_wrap=True)


def _in_turn(dataset: ExampleDataset, config: LeafConfig) -> list[Example]:
    """Return the rows in the order of the first epoch, an original and another one in turn."""
    sampler = StepSampler(
        dataset.originals,
        dataset.counterfactuals,
        failed=dataset.failed,
        failed_share=config.failed_share,
        batch_size=config.originals_per_step,
        seed=config.seed if config.data_seed is None else config.data_seed,
        drop_last=config.dataloader_drop_last,
    )
    rows = [dataset[at] for batch in sampler for at in batch]
    originals = [row for row in rows if row.branch == "original"]
    others = [row for row in rows if row.branch != "original"]
    pairs = zip_longest(originals, others)
    return [row for pair in pairs for row in pair if row is not None]


def describe(example: Example, renderers: Mapping[Role, Renderer]) -> Iterator[Text]:
    """Yield the lines for a row: a head, and the tokens for each model that reads other ones."""
    ours, theirs = (example.renderings[role] for role in ROLES)
    alike = ours.input_ids.tolist() == theirs.input_ids.tolist()
    labels = int(ours.loss_mask.sum())
    yield Text("")
    yield Text(f"row {example.row_id}, {example.branch}: {labels} labels", style="bold")
    if example.notes:
        yield Text(f"altered: {', '.join(example.notes)}")
    for role in ROLES[:1] if alike else ROLES:
        reader = "the student and the teacher read" if alike else f"the {role} reads"
        yield Text(f"{reader} {len(example.renderings[role])} tokens", style="bold")
        yield from columns(example.renderings[role], renderers[role].tokenizer)


def columns(rendering: Rendering, tokenizer: PreTrainedTokenizerBase) -> Iterator[Text]:
    """Yield a rendering's tokens in lines of two columns: all of them, and the labels."""
    yield Text(f"{'tokens':<{COLUMN}} {BORDER} labels", style="underline")
    line: list[tuple[str, bool]] = []
    pieces = shown(rendering.input_ids.tolist(), tokenizer)
    for piece, label in zip(pieces, rendering.loss_mask.tolist(), strict=True):
        room = COLUMN - sum(len(text) + 1 for text, _ in line)
        if line and (len(piece) + 1 > room or line[-1][0].endswith("\\n")):
            yield _line(line)
            line = []
        line.append((piece, label))
    yield _line(line)


def _line(tokens: Sequence[tuple[str, bool]]) -> Text:
    left, right = Text(), Text()
    for piece, label in tokens:
        left.append(piece, style="" if label else "dim").append(BORDER, style="dim")
        right.append(piece if label else "", style="green").append(BORDER if label else "")
    left.append(" " * (COLUMN - len(left)))
    return Text.assemble(left, f" {BORDER} ", right)


def shown(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return each token as text in one line: its characters, or its name where it has none."""
    pieces = []
    for index, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        text = str(tokenizer.decode([index]))
        if not text or "\ufffd" in text:  # a part of a character
            text = name
        elif name.startswith("\u2581") and not text.startswith(" "):
            text = f" {text}"  # the decoder drops a space in front
        text = repr(text.replace("\u2581", " "))[1:-1].replace("\\'", "'")
        pieces.append(text if len(text) < COLUMN else f"{text[: COLUMN - 5]}...")
    return pieces
