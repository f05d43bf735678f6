"""The saliency of one prompt, to look at in a terminal, a notebook, a table or a file."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from leaf_distill.data.example import Example, Message
from leaf_distill.data.prompt import Renderer
from leaf_distill.io import write_bytes
from leaf_distill.models import saliency as passes
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.svg import BLUE, Cell, Note, Row, Scale, heat_map

if TYPE_CHECKING:
    import pandas
    from rich.text import Text

_BOLD: Final = 0.5  # seen also where colors are not, as in a notebook on GitHub
_NAMED: Final = 3  # tokens that `repr` names
RAMP: Final = tuple(step / 20 for step in range(21))
"""The tints of a scale from 0 to 1 in a figure."""
_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Saliency</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root {{ color-scheme: light dark }} body {{ max-width: 46rem; margin: 3rem auto; \
padding: 0 1rem }}</style></head>
<body>{body}</body></html>
"""


@dataclass(frozen=True, eq=False, repr=False)
class SaliencyResult:
    """The saliency of each token of the user's text for a model's loss.

    Attributes:
        text: the user's text, the content of the last message.
        tokens: the characters of each of its n tokens; tokens that are the bytes of one character
            share it.
        offsets: int32 [n, 2], the characters [start, stop) of each token in `text`.
        norms: float32 [n], the L2 norm of the loss's gradient at each token's embedding (Eq. 2).
        nll: the loss, the mean negative log-likelihood of the completion in nats per token.
        model: the model's name.
    """

    text: str
    tokens: list[str]
    offsets: npt.NDArray[np.int32]
    norms: npt.NDArray[np.float32]
    nll: float
    model: str

    def __repr__(self) -> str:
        """Return one line with the most salient tokens."""
        levels = self.saliency
        first = np.argsort(-levels, kind="stable")[:_NAMED]
        named = ", ".join(f"{self.tokens[i].strip()!r} {levels[i]:.2f}" for i in first)
        return (
            f"SaliencyResult({self._short_name()}, {len(self.tokens)} tokens, nll={self.nll:.3f}, "
            f"most salient: {named or 'none'})"
        )

    @property
    def saliency(self) -> npt.NDArray[np.float32]:
        """float32 [n], the norms scaled to [0, 1] over the user's text (Eq. 3)."""
        if not len(self.norms):
            return self.norms
        low, high = self.norms.min(), self.norms.max()
        return (self.norms - low) / (high - low) if high > low else np.zeros_like(self.norms)

    def show(self) -> None:
        """Print the text to the terminal; the stronger a token's saliency, the bluer it is."""
        from rich.console import Console

        Console().print(self._rich(), soft_wrap=True)

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row for each token: token, start, stop, saliency, grad_norm.

        Raises:
            ImportError: the package pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas: needs the package pandas, which is missing; run: pip install pandas"
            ) from error
        return pandas.DataFrame(self._rows())

    def save(self, path: str | Path, *, columns: int = 2) -> None:
        """Write HTML, JSON or SVG, as the path's suffix says; an existing file is replaced.

        Args:
            path: ends in .html, .json or .svg.
            columns: the width of an SVG, in columns of a paper with two: 1 or 2.

        Raises:
            ValueError: the suffix is another one, or `columns`.
        """
        path = Path(path)
        if path.suffix.lower() == ".svg":
            content = self._svg(columns)
        elif path.suffix.lower() == ".html":
            content = _PAGE.format(body=self._repr_html_())
        elif path.suffix.lower() == ".json":
            fields = {"model": self.model, "nll": self.nll, "text": self.text}
            content = json.dumps({**fields, "tokens": self._rows()}, ensure_ascii=False, indent=1)
        else:
            raise ValueError(f"path: must end in .html, .json or .svg, got {str(path)!r}; add one")
        # Half of a surrogate pair, which Python text may hold, has no bytes in UTF-8.
        write_bytes(path, content.encode("utf-8", "replace"))

    def _svg(self, columns: int) -> str:
        return heat_map(
            [Row("saliency", BLUE)],
            [Cell(text, (level or 0.0,)) for text, level, _ in self._cells()],
            [Scale("saliency", ("0", "1"), BLUE, RAMP)],
            title=self._caption("blue"),
            notes=[Note(self._short_name(), after=f", loss {self.nll:.3f} nats per token")],
            columns=columns,
        )

    def _repr_html_(self) -> str:
        """Return the colored text as HTML for a notebook."""
        pieces = []
        for text, level, title in self._cells():
            shown = html.escape(_printable(text))
            if level is not None:
                tint = f"rgb({' '.join(map(str, BLUE))} / {level:.2f})"
                shown = f"<strong>{shown}</strong>" if level >= _BOLD else shown
                shown = (
                    f'<span title="{html.escape(title)}" style="background:{tint}">{shown}</span>'
                )
            pieces.append(shown)
        caption = html.escape(_printable(self._caption()))
        return (
            '<div style="font-family:sans-serif;line-height:1.7">'
            f'<div style="opacity:.65;font-size:.8em">{caption}</div>'
            '<div style="white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext">'
            f"{''.join(pieces)}</div></div>"
        )

    def _rich(self) -> Text:
        from rich.text import Text

        shown = Text(f"{_printable(self._caption())}\n", style="dim")
        for text, level, _ in self._cells():
            # Black on a tint of white is readable on a dark and on a light terminal.
            tint = ",".join(str(round(255 - (level or 0) * (255 - part))) for part in BLUE)
            weight = "bold " if (level or 0) >= _BOLD else ""
            style = "not dim" if level is None else f"not dim {weight}black on rgb({tint})"
            shown.append(_printable(text), style=style)
        return shown

    def _caption(self, strongest: str = f"blue, bold from {_BOLD}") -> str:
        return (
            f"{self._short_name()}: saliency of {len(self.tokens)} tokens, from 0 (no color) to 1 "
            f"({strongest}); loss of the completion {self.nll:.3f} nats per token"
        )

    def _short_name(self) -> str:
        """Return the model's name, of an absolute path the last part."""
        return Path(self.model).name if Path(self.model).is_absolute() else self.model

    def _rows(self) -> list[dict[str, Any]]:
        names = ("token", "start", "stop", "saliency", "grad_norm")
        start, stop = self.offsets.T.tolist()
        columns = (self.tokens, start, stop, self.saliency.tolist(), self.norms.tolist())
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def _cells(self) -> list[tuple[str, float | None, str]]:
        """Split the text into pieces, each with its saliency (None outside tokens) and a title.

        Tokens that share characters make one piece, with the highest of their saliencies.
        """
        pieces: list[tuple[int, int, float | None, str]] = []
        end = 0
        for row in self._rows():
            start, stop, level = row["start"], row["stop"], row["saliency"]
            title = f"saliency {level:.3f}, grad_norm {row['grad_norm']:.3g}"
            if start < end:
                start, _, before, titles = pieces.pop()
                level, title = max(level, before or 0.0), f"{titles}\n{title}"
            elif end < start:
                pieces.append((end, start, None, ""))
            end = max(end, stop)
            pieces.append((start, end, level, title))
        if end < len(self.text):
            pieces.append((end, len(self.text), None, ""))
        return [(self.text[start:stop], level, title) for start, stop, level, title in pieces]


def saliency(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    messages: str | Sequence[Message],
    completion: str,
) -> SaliencyResult:
    """Measure the saliency of each token of a prompt for a model's loss on a completion.

    Args:
        model: a causal language model in memory, which stays as it is, or its name.
        tokenizer: its fast tokenizer, whose chat template renders the messages; None: the one
            beside the model.
        messages: a conversation that ends with the user's turn, or the user's text alone.
        completion: the answer that the model should give.

    Returns:
        The norms of the user's text (Eq. 2), with `show()`, `to_pandas()` and `save(path)`. A
        notebook displays the text colored.

    Raises:
        ValueError: the messages cannot be rendered, or the loss or a norm is not finite.
    """
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
    lazy = LazyModel(model, processing_class=tokenizer)
    rendering = Renderer(lazy.tokenizer).render(Example(0, tuple(turns), completion))
    (row,) = passes.saliency(lazy.load(), [rendering])
    name = lazy.name
    if row.invalid:
        raise ValueError(
            f"model: must have finite losses and gradients, got NaN or infinity from {name!r}; "
            "load it in float32, or choose another checkpoint"
        )
    text = str(turns[-1]["content"])
    offsets = rendering.offsets[rendering.domain]
    tokens = [text[start:stop] for start, stop in offsets]
    return SaliencyResult(text, tokens, offsets, row.norms[rendering.domain], row.nll, name)


def _printable(text: str) -> str:
    """Replace every control character but line breaks and tabs, and halves of surrogate pairs."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
