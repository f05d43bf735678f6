"""The levels at which a row is analyzed: its user turns, and beginnings of its response.

Behind a border between two segments of the response (Figure 6), the prompt and the segments before
the border are what both models are given; the tokens of these segments may be cut, and the labels
are what follows.
"""

from __future__ import annotations

from collections.abc import Iterator

from leaf_distill.data.example import Example, Rendering, UnusableRow
from leaf_distill.data.prompt import Renderer
from leaf_distill.data.segments import split_response
from leaf_distill.detection.config import DetectConfig


def analyzed_turns(example: Example, turns: str) -> tuple[int, ...]:
    """Return the indices of the messages that are analyzed.

    Args:
        example: a row.
        turns: "all" user turns, the "last" one, or numbers of user turns, from 1 or from -1
            backwards. A number that the row does not have is left out.

    Raises:
        UnusableRow: the row has none of them.
    """
    users = [at for at, turn in enumerate(example.messages) if turn["role"] == "user"]
    if turns == "last":
        return (len(example.messages) - 1,)
    if turns != "all":
        wanted = [int(number) for number in turns.split(",")]
        places = [one - 1 if one > 0 else len(users) + one for one in wanted]
        users = sorted({users[at] for at in places if 0 <= at < len(users)})
        if not users:
            raise UnusableRow("no_such_turn", f"the row has none of the user turns {turns}")
    found = tuple(at for at in users if example.messages[at]["content"].strip())
    if turns != "all" and not found:
        raise UnusableRow("no_such_turn", f"of the user turns {turns} the row has blank ones alone")
    return found


def set_views(example: Example, config: DetectConfig) -> None:
    """Set `views`: nothing for the instruction level alone, where the row is its own view.

    A row whose response cannot be divided has no view at the response level.
    """
    if config.level == "instruction":
        return
    views = []
    if config.level == "both":
        views = [example.derived()]
        views[0].answers = dict(example.answers)  # of the same prompt
    if example.reply is None:
        views += _response_views(example, config)
    else:  # a template writes its further keys where it likes
        example.notes.append("response_not_divided")
    example.views = views


def _response_views(example: Example, config: DetectConfig) -> Iterator[Example]:
    text = example.completion
    borders = split_response(text, config.segments)
    if not borders:
        example.notes.append("response_not_divided")
    for segment, border in enumerate(borders, 1):
        yield example.derived(
            segment=segment,
            prefix=text[:border],
            completion=text[border:],
            # A row without an answer is graded against its whole completion, or by its tests.
            answer=example.answer if config.grade == "code" else example.gold,
        )


def render_view(renderer: Renderer, view: Example, config: DetectConfig) -> Rendering:
    """Render a view with its labels; those of the next part only, if that is the target.

    Raises:
        UnusableRow: as the renderer's.
    """
    if config.target == "rest" or not view.segment:
        return renderer.render(view)
    whole = view.prefix + view.completion
    borders = [*split_response(whole, config.segments), len(whole)]
    end = borders[view.segment] - len(view.prefix)
    if end >= len(view.completion):
        return renderer.render(view)
    part = view.derived(completion=view.completion[:end], answer=view.gold)
    return renderer.render(part)[:-1]  # the part has no end token


def end_with_views(example: Example) -> None:
    """Let a row leave that has views of which none is left, with the outcome that came last.

    The row was rendered and marked itself: where its views were not, it leaves at detection.
    """
    if example.outcome is not None or not example.views:
        return
    outcomes = [view.outcome for view in example.views]
    if all(outcome is not None for outcome in outcomes):
        stages = ("render", "predict", "mark", "detect", "prune", "validate")
        stage, reason, detail = max(
            (outcome for outcome in outcomes if outcome is not None),
            key=lambda outcome: stages.index(outcome.stage),
        )
        if stage in stages[:3]:
            stage, reason = "detect", f"response_{reason}"
        example.leave(stage, reason, detail)
