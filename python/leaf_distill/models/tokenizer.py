"""Loads the tokenizer of a model, and compares the tokenizers of a teacher and a student."""

from __future__ import annotations

from typing import Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from leaf_distill.models.source import TOKENIZER_FILES, locate_model, unreadable

_PROBE_TEXTS: Final = (
    "Tom has 12 apples, buys 1,234 more and eats 0.5; how many are left?",
    "  two  spaces\tand a tab\n\nit's DON'T isn't \u00e9 e\u0301 \u00df na\u00efve",
    "def f(x):\n    return x**2  # \u4e2d\u6587 \u0440\u0443\u0441 \U0001f600",
)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a model, whose offsets are needed.

    An adapter without a tokenizer has that of its base model. A tokenizer without a pad token gets
    its end token as one.

    Args:
        name: a directory, a hub name, a ``.gguf`` file or the directory of an adapter.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        ValueError: the path or the tokenizer is missing, or it has no offsets.
    """
    source = locate_model(name)
    while source.base is not None and not source.has(*TOKENIZER_FILES):
        source = source.base
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.place, trust_remote_code=trust_remote_code, **source.arguments
        )
        tokenizer("1 2")  # one without an unknown token may refuse every text
    except Exception as error:  # damaged files raise whatever their parser raises
        raise ValueError(unreadable("tokenizer", name, error)) from error
    check_fast(tokenizer, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or "<|pad|>"
    return tokenizer


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError with the first difference if the two tokenizers are different ones.

    An added token that only one of them has, such as a pad token, is no difference.
    """
    reason = "distillation compares the two models token by token; choose two of one family"
    wanted = "tokenizers: must be the same for teacher and student"
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    added = {*student.added_tokens_encoder, *teacher.added_tokens_encoder}
    for token in sorted({*ours, *theirs}, key=lambda t: (theirs.get(t, ours.get(t, 0)), t)):
        ids = theirs.get(token), ours.get(token)
        if ids[0] == ids[1] or (None in ids and token in added):
            continue
        raise ValueError(
            f"{wanted}, got token {token!r} as {_id(ids[0])} in the teacher's and {_id(ids[1])} in "
            f"the student's; {reason}"
        )
    for text in _PROBE_TEXTS:
        pieces = [one(text, add_special_tokens=False)["input_ids"] for one in (teacher, student)]
        if pieces[0] != pieces[1]:
            raise ValueError(
                f"{wanted}, got two that split {text!r} differently, into {len(pieces[0])} and "
                f"{len(pieces[1])} tokens; {reason}"
            )


def have_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Return whether two models split texts alike, as `check_same_tokenizer` asks for."""
    try:
        check_same_tokenizer(teacher, student)
    except ValueError:
        return False
    return True


def check_fast(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError unless the tokenizer tells the characters of its tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer: must be a fast one, which knows the characters of its tokens, got "
            f"{type(tokenizer).__name__} for {name!r}; save it as tokenizer.json"
        )


def _id(index: int | None) -> str:
    return "absent" if index is None else f"number {index}"
