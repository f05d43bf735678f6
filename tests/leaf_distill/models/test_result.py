"""The public `saliency` of one prompt: what it holds, and every way to look at it."""

from __future__ import annotations

import html
import json
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import leaf_distill
from leaf_distill.models.result import SaliencyResult

TEXT = 'Tom has 7 <b>apples</b> & "12" more 😀 [red]now[/red]\x1b[31m;\nhow many?'


@pytest.fixture(scope="module")
def result(make_model, make_tokenizer) -> SaliencyResult:
    return leaf_distill.saliency(make_model(), make_tokenizer(), TEXT, "19")


def test_the_tokens_are_those_of_the_users_text(result, make_model, make_tokenizer):
    assert result.text == TEXT and result.offsets[0, 0] == 0 and result.offsets[-1, 1] == len(TEXT)
    assert len(result.tokens) == len(result.norms) == len(result.offsets)
    assert result.tokens == [TEXT[start:stop] for start, stop in result.offsets]
    assert result.norms.dtype == np.float32 and (result.norms > 0).all() and result.nll > 0
    assert result.saliency.min() == 0 and result.saliency.max() == 1
    turns = [{"role": "user", "content": TEXT}]
    again = leaf_distill.saliency(make_model(), make_tokenizer(), turns, "19")
    np.testing.assert_array_equal(again.norms, result.norms)


def test_norms_are_those_of_the_definition(result, make_model, make_tokenizer):
    model, tokenizer = make_model().double(), make_tokenizer()
    prompt = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    before = tokenizer("<|im_start|>user\n")["input_ids"]
    ids, labels = tokenizer(prompt)["input_ids"], tokenizer("19<|im_end|>")["input_ids"]
    states = model.get_input_embeddings()(torch.tensor([ids + labels])).detach().requires_grad_()
    chances = model(inputs_embeds=states).logits[0].log_softmax(-1)
    loss = -chances[range(len(ids) - 1, len(ids + labels) - 1), labels].mean()
    (gradient,) = torch.autograd.grad(loss, states)
    norms = gradient[0].norm(dim=-1)[len(before) : len(before) + len(result.norms)]
    assert result.nll == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(result.norms, norms, rtol=1e-4)


def test_html_holds_the_whole_text_and_none_of_its_markup(result):
    page = result._repr_html_()
    body = page[page.index("pre-wrap") :]
    shown = html.unescape(re.sub(r"<[^>]*>", "", body[body.index(">") + 1 :]))
    assert shown == TEXT.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert "<b>" not in page and "\x1b" not in page
    assert "rgb(70 143 216 / 1.00)" in page and "rgb(70 143 216 / 0.00)" in page


def test_strong_tokens_are_bold_and_named():
    offsets, norms = np.array([[0, 1], [1, 3], [3, 5]], np.int32), np.array([1, 3, 2], np.float32)
    one = SaliencyResult("a b c", ["a", " b", " c"], offsets, norms, 0.25, "/models/mine")
    assert re.findall("<strong>(.*?)</strong>", one._repr_html_()) == [" b", " c"]
    assert repr(one) == (
        "SaliencyResult(mine, 3 tokens, nll=0.250, most salient: 'b' 1.00, 'c' 0.50, 'a' 0.00)"
    )
    assert ">mine: saliency of 3 tokens" in one._repr_html_() and one.model == "/models/mine"


def test_a_figure_names_no_directory_and_promises_nothing_bold(tmp_path):
    offsets, norms = np.array([[0, 1]], np.int32), np.ones(1, np.float32)
    for name in ("/models/mine", "/models/" + "long" * 60):
        SaliencyResult("a", ["a"], offsets, norms, 0.25, name).save(tmp_path / "one.svg")
        figure = (tmp_path / "one.svg").read_text("utf-8")
        assert "/models" not in figure and "bold" not in figure
        assert ", loss 0.250 nats per token</text>" in figure


def test_show_prints_the_text_as_it_is(result, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result.show()
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed  # the text's own
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    assert plain.split("\n", 1)[1] == TEXT.replace("\x1b", "\N{REPLACEMENT CHARACTER}") + "\n"
    assert f"saliency of {len(result.tokens)} tokens" in plain and plain != printed


def test_pandas(result, monkeypatch):
    table = result.to_pandas()
    assert list(table.columns) == ["token", "start", "stop", "saliency", "grad_norm"]
    assert table.token.tolist() == result.tokens and table.saliency.max() == 1
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="run: pip install pandas"):
        result.to_pandas()


def test_save(result, tmp_path):
    result.save(tmp_path / "one.svg", columns=1)
    figure = ElementTree.parse(tmp_path / "one.svg").getroot()
    assert figure.attrib["width"] == "240pt"
    shown = "".join(one.text or "" for one in figure.iter("{http://www.w3.org/2000/svg}text"))
    assert "".join(TEXT.replace("\x1b", "\u241b").replace("\n", "\u21b5").split()) in shown.replace(
        "saliency", ""
    )
    result.save(tmp_path / "one.html")
    assert result._repr_html_() in (tmp_path / "one.html").read_text("utf-8")
    result.save(str(tmp_path / "one.JSON"))
    saved = json.loads((tmp_path / "one.JSON").read_text("utf-8"))
    assert (saved["text"], saved["nll"]) == (TEXT, result.nll)
    assert [row["token"] for row in saved["tokens"]] == result.tokens
    for name in ("one.txt", "one"):
        with pytest.raises(ValueError, match=r"^path: must end in \.html, \.json or \.svg, got"):
            result.save(tmp_path / name)


def test_a_text_of_one_token_has_no_range():
    offsets, norms = np.array([[0, 1]], np.int32), np.ones(1, np.float32)
    one = SaliencyResult("a b", ["a"], offsets, norms, 1.0, "m")
    assert one.saliency.tolist() == [0.0] and one._repr_html_().endswith(" b</div></div>")


def test_what_cannot_be_measured_is_said(make_model, make_tokenizer):
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(ValueError, match="user"):
        leaf_distill.saliency(model, tokenizer, [{"role": "assistant", "content": "a"}], "b")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^model: must have finite losses and gradients"):
        leaf_distill.saliency(model, tokenizer, "a", "b")
