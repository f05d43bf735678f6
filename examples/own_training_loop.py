"""LeaF in your own training loop: capture gradients, detect spans, cut prompts, take one step.

    python examples/own_training_loop.py

Uses the kernels alone (`leaf_ext`); models and tokenizer are those of transformers. As it stands,
the embedded toy pair reads two word problems in 10 seconds on 2 cores; nothing is written.
"""

from importlib.resources import files

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import leaf_ext

pair = files("leaf_distill") / "demo" / "assets"  # put your own models here
tokenizer = AutoTokenizer.from_pretrained(pair / "student")
teacher = AutoModelForCausalLM.from_pretrained(pair / "teacher").requires_grad_(False)
student = AutoModelForCausalLM.from_pretrained(pair / "student")
texts = (
    "leo has 12 nuts . the sticker says 8 . leo drops 5 nuts . how many nuts does leo have now ?",
    "sam has 2 nuts . eva guesses 13 . sam gets 6 more nuts . how many nuts does sam have now ?",
)
answers = ("12 - 5 = 7 # 7 <end>", "2 + 6 = 8 # 8 <end>")
answers = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]


def render(text):
    """Ids of a prompt, and which of them are the user's text: the template is never searched."""
    mark = [{"role": "user", "content": "\ue000"}]
    template = tokenizer.apply_chat_template(mark, tokenize=False, add_generation_prompt=True)
    before, after = template.split("\ue000")
    found = tokenizer(before + text + after, add_special_tokens=False, return_offsets_mapping=True)
    first, last = len(before), len(before + text)
    inside = [max(a, first) < min(b, last) for a, b in found["offset_mapping"]]
    return found["input_ids"], inside


def batch(prompts, answers):
    """Ids and labels (-100 on prompts and padding), [B, T] each."""
    pairs = [(torch.tensor(p), torch.tensor(a)) for p, a in zip(prompts, answers, strict=True)]
    ids = pad_sequence([torch.cat(pair) for pair in pairs], True, tokenizer.pad_token_id)
    return ids, pad_sequence([torch.cat((p * 0 - 100, a)) for p, a in pairs], True, -100)


# 1. Spans of confounders, from the gradients of both models' losses at their input embeddings.
prompts, inside = map(list, zip(*map(render, texts), strict=True))
ids, labels = batch(prompts, answers)
masks = [torch.tensor(m + [False] * len(a)) for m, a in zip(inside, answers, strict=True)]
user_text = pad_sequence(masks, True)
gradients = []
for model in (teacher, student):
    with leaf_ext.capture_embedding_grad(model.get_input_embeddings()) as captured:
        loss = model(input_ids=ids, labels=labels).loss
    gradients.append(captured.grad(loss))
spans = leaf_ext.detect_spans(*gradients, user_text, threshold=0.10).tolist()

# 2. One counterfactual a span. A real loop keeps those that the teacher still answers correctly.
originals = len(prompts)
for prompt, answer, found in zip(prompts[:], answers[:], spans, strict=True):
    print("spans:", [tokenizer.decode(prompt[start:stop]) for start, stop in found])
    for cut in leaf_ext.cut_spans(prompt, found):
        print("cut:  ", tokenizer.decode(cut))
        prompts.append(cut)
        answers.append(answer)

# 3. One optimisation step on originals and counterfactuals.
ids, labels = batch(prompts, answers)
is_counterfactual = (torch.arange(len(ids)) >= originals)[:, None].expand_as(labels[:, 1:])
weight = leaf_ext.row_weights(is_counterfactual.flatten(), (labels[:, 1:] != -100).flatten())
student_hidden = student.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
teacher_hidden = teacher.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
heads = student.lm_head.weight, teacher.lm_head.weight
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
loss = leaf_ext.linear_dual_kl(student_hidden, heads[0], teacher_hidden, heads[1], weight)
loss.backward()
optimizer.step()
print(f"loss: {loss.item():.4f} nats a label")
