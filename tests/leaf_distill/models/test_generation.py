"""Answers of real models: batched equals one by one, every way an answer ends, and drawn ones."""

from __future__ import annotations

import pytest
import torch

from leaf_distill.data.example import Answer, Example
from leaf_distill.data.prompt import Renderer
from leaf_distill.models import generation as predict

PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [20], [31, 32, 33], [11, 12, 13, 14]]


def generate(model, tokenizer, prompts, **options):
    ends = Renderer(tokenizer).end_ids
    return predict.generate(model, tokenizer, prompts, end_ids=ends, **options)


def one_by_one(model, prompt, count, **options):
    """The new tokens of transformers' own greedy generation of a single, unpadded prompt."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            **options,
        )
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer("bytes", "chatml")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batch_equals_one_by_one(make_model, tokenizer, kind):
    model = make_model(kind)
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert len({answer.text for answer in answers}) == len(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = one_by_one(model, prompt, 12)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer == Answer(text, 12, "cut_off")
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == answers


@pytest.mark.parametrize("who", ["config", "template", "tokenizer"])
def test_every_end_token_ends_the_answer(make_model, make_tokenizer, tokenizer, who):
    model = make_model()
    free = one_by_one(model, PROMPTS[0], 12)
    place = next(i for i in range(3, 12) if free[i] not in free[:i])
    if who == "config":
        model.generation_config.eos_token_id = [419, free[place]]
    elif who == "tokenizer":
        tokenizer = make_tokenizer("bytes", "plain")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[place])
    else:
        end = tokenizer.convert_ids_to_tokens(free[place])
        template = "{% for m in messages %}{{ m.content }}" + "<|im_end|>{% endfor %}"
        # Swap two rows of the head, so that the model says the template's end token there.
        tokenizer = make_tokenizer("bytes", template)
        im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        with torch.no_grad():
            model.lm_head.weight[[im_end, free[place]]] = model.lm_head.weight[
                [free[place], im_end]
            ]
        assert end != "<|im_end|>"
    answer = generate(model, tokenizer, PROMPTS, max_new_tokens=12)[0]
    assert answer == Answer(tokenizer.decode(free[:place]), place)


def test_end_at_the_limit_is_finished(make_model, tokenizer):
    model = make_model()
    free = one_by_one(model, PROMPTS[0], 12)
    place = next(i for i in range(3, 12) if free[i] not in free[:i])
    model.generation_config.eos_token_id = free[place]
    for count, verdict in ((place + 1, None), (place, "cut_off")):
        (answer,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=count)
        assert answer.verdict == verdict


def test_the_models_own_sampling_settings_do_not_count(make_model, tokenizer):
    model = make_model()
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1
    )
    settings = model.generation_config.to_dict()
    model.train()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == plain
    assert model.training
    assert model.generation_config.to_dict() == settings


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_invalid_logits_flag_their_row_only(make_model, tokenizer, value):
    model = make_model()
    prompts = [*PROMPTS[:2], [31, 400, 33], PROMPTS[3]]
    clean = generate(model, tokenizer, prompts, max_new_tokens=6)
    assert not any(400 in one_by_one(model, prompt, 6) for prompt in prompts)
    with torch.no_grad():
        model.model.embed_tokens.weight[400] = value
    answers = generate(model, tokenizer, prompts, max_new_tokens=6)
    assert [a.verdict for a in answers] == ["cut_off", "cut_off", "not_finite", "cut_off"]
    assert answers[:2] + answers[3:] == clean[:2] + clean[3:]


def test_invalid_after_some_tokens(make_model, tokenizer):
    model = make_model()
    third = one_by_one(model, PROMPTS[1], 3)[2]
    with torch.no_grad():
        model.model.embed_tokens.weight[third] = float("nan")  # read back at the fourth step
    answer = generate(model, tokenizer, PROMPTS[1:2], max_new_tokens=12)[0]
    assert (answer.verdict, answer.n_tokens) == ("not_finite", 3)


def test_padding_after_the_end_does_not_count(make_model, tokenizer):
    model = make_model()
    prompts = [PROMPTS[2], [41, 42, 43]]  # of one length: no padding before
    first = one_by_one(model, prompts[0], 2)
    assert first[1] not in one_by_one(model, prompts[1], 8)
    model.generation_config.eos_token_id = first[1]
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.pad_token_id] = float("nan")
    answers = generate(model, tokenizer, prompts, max_new_tokens=8)
    assert [answer.verdict for answer in answers] == [None, "cut_off"]


def test_masked_vocabulary_is_no_error(make_model, tokenizer):
    model = make_model()
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.arange(400, 420), -torch.inf)
    )
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    assert {answer.verdict for answer in answers} == {"cut_off"}


def test_positions_are_never_outgrown(make_model, tokenizer):
    model = make_model("gpt2")  # 48 positions
    long = [20 + i for i in range(44)]
    prompts = [PROMPTS[0], long, PROMPTS[1], long[::-1], long[:46]]
    answers = generate(model, tokenizer, prompts, max_new_tokens=30)
    assert [answer.n_tokens for answer in answers] == [30, 4, 30, 4, 4]
    assert {answer.verdict for answer in answers} == {"cut_off"}
    assert answers[1].text == tokenizer.decode(one_by_one(model, long, 4))
    assert answers[3].text == tokenizer.decode(one_by_one(model, long[::-1], 4))
    with pytest.raises(ValueError, match=r"prompts\[1\]: must have .*, got 48 tokens"):
        generate(model, tokenizer, [[1], [1] * 48], max_new_tokens=1)


@pytest.mark.parametrize("pad", ["outside the embedding", "none"])
def test_padding_is_a_token_that_the_model_has(make_model, make_tokenizer, pad):
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    if pad == "none":
        tokenizer.pad_token = None
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        assert tokenizer.pad_token_id == model.config.vocab_size
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected


def test_end_tokens_beyond_the_head_are_no_error(make_model, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[400] = torch.nan
    answers = predict.generate(
        model, tokenizer, [[31, 400], [31, 32]], end_ids=[2, 9999], max_new_tokens=4
    )
    assert [answer.verdict for answer in answers] == ["not_finite", "cut_off"]


def test_a_token_outside_the_embedding_is_named(make_model, tokenizer):
    with pytest.raises(ValueError, match=r"prompts\[1\]: must hold token ids below 420.*got 421"):
        generate(make_model(), tokenizer, [[1], [5, 421]], max_new_tokens=3)


def test_an_adapter_answers_and_keeps_its_settings(make_model, tokenizer):
    from peft import LoraConfig, get_peft_model

    plain = generate(make_model(), tokenizer, PROMPTS, max_new_tokens=6)
    adapted = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    inside = adapted.get_base_model()
    adapted.generation_config.eos_token_id = 400
    inside.generation_config.repetition_penalty = 9.0
    assert generate(adapted, tokenizer, PROMPTS, max_new_tokens=6) == plain  # untrained: no change
    assert adapted.generation_config.eos_token_id == 400
    assert inside.generation_config.repetition_penalty == 9.0


def test_bad_arguments(make_model, tokenizer):
    model = make_model()
    assert generate(model, tokenizer, [], max_new_tokens=3) == []
    with pytest.raises(ValueError, match=r"prompts\[1\]: must have .*, got 0 tokens"):
        generate(model, tokenizer, [[1], []], max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens: must be at least 1"):
        generate(model, tokenizer, [[1]], max_new_tokens=0)


@pytest.mark.parametrize("length", [1, 3])
def test_a_stop_string_ends_its_row_alone(make_model, tokenizer, length):
    model = make_model()
    free = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    text = free[0].text
    start = next(
        at for at in range(3, 9) if all(text[at : at + length] not in one.text for one in free[1:])
    )
    stop = text[start : start + length]
    stopped, *others = generate(model, tokenizer, PROMPTS, max_new_tokens=12, stop=["\0", stop])
    assert stopped.text == text[: text.find(stop)] and stopped.verdict is None
    tokens = one_by_one(model, PROMPTS[0], 12)
    assert stop in tokenizer.decode(tokens[: stopped.n_tokens], skip_special_tokens=True)
    assert stop not in tokenizer.decode(tokens[: stopped.n_tokens - 1], skip_special_tokens=True)
    assert others == free[1:]


def test_a_stop_string_in_the_prompt_ends_nothing(make_model, tokenizer):
    model = make_model()
    (free,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=6)
    before = tokenizer.decode(PROMPTS[0])
    stop = before[-2:] + free.text[:1]  # begins in the prompt
    assert stop not in free.text
    assert generate(model, tokenizer, PROMPTS[:1], max_new_tokens=6, stop=[stop]) == [free]


def test_draws_are_the_same_again_in_any_batch(make_model, tokenizer):
    model = make_model()

    def drawn(prompts, seeds):
        draws = predict.Draws(temperature=1.5, top_p=0.95, seeds=seeds)
        return generate(model, tokenizer, prompts, max_new_tokens=8, draws=draws)

    together = drawn([*PROMPTS, PROMPTS[0]], [1, 2, 3, 4, 5])
    assert together[0] != together[4]
    torch.manual_seed(7)  # the caller's state has no part in it, and keeps its own
    state = torch.get_rng_state()
    assert [
        drawn([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, (1, 2, 3, 4), strict=True)
    ] == together[:4]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(PROMPTS[:1], [6]) != drawn(PROMPTS[:1], [7])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (2.0, 0.6)])
def test_draws_follow_the_distribution(make_model, tokenizer, temperature, top_p):
    model, count = make_model(), 2000
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS[1]])).logits[0, -1] / temperature
    shares = {int(i): float(logits.softmax(-1)[i]) for i in logits.argsort(descending=True)}
    nucleus, total = {}, 0.0
    for token, share in shares.items():
        if total < top_p:
            nucleus[token], total = share, total + share
    draws = predict._Draw(temperature, top_p, list(range(count)), len(PROMPTS[1]), 1)
    scores = (logits * temperature).expand(count, -1)
    chosen = draws(torch.tensor([PROMPTS[1]] * count), scores).argmax(-1).tolist()
    assert set(chosen) <= set(nucleus)
    for token, share in list(nucleus.items())[:5]:
        expected = count * share / total
        assert abs(chosen.count(token) - expected) < 5 * (expected + 1) ** 0.5


def test_the_likeliest_token_alone_is_the_greedy_answer(make_model, tokenizer):
    model = make_model()
    draws = predict.Draws(temperature=3.0, top_p=1e-6, seeds=[1, 2, 3, 4])
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, draws=draws) == greedy


@pytest.mark.slow
def test_smollm2_answers(smollm2_path):
    from leaf_distill.models.loading import load_model
    from leaf_distill.models.tokenizer import load_tokenizer

    model, tokenizer = load_model(smollm2_path), load_tokenizer(smollm2_path)
    renderer = Renderer(tokenizer)
    questions = ["What is 2 + 3?", "Name one color of the rainbow.", "Say hello. \U0001f600"]
    examples = [Example(0, ({"role": "user", "content": q},), "") for q in questions]
    prompts = [renderer.prompt(example).input_ids.tolist() for example in examples]
    answers = generate(model, tokenizer, prompts, max_new_tokens=16)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = one_by_one(model, prompt, 16, pad_token_id=2)
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert (answer.verdict is None) == (2 in tokens)
    assert "5" in answers[0].text
