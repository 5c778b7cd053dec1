"""The shipped chat templates: the very prompts of the models, with marks around what the assistant says."""

import pytest
from conftest import TINY_VLM
from transformers import AutoTokenizer

from prunetune.data_recipes.chat_templates import check_marks, registered_templates

USER, SAID, MORE = "What is red?", "The circle", "And blue?"
IM = "<|im_start|>"
# What each model's own template makes of a picture with a question: Qwen's, InternVL's and LLaVA's published ones.
PROMPTS = {
    "qwen2_5_vl": f"{IM}system\nYou are a helpful assistant.<|im_end|>\n"
    f"{IM}user\n<|vision_start|><|image_pad|><|vision_end|>{USER}<|im_end|>\n{IM}assistant\n",
    "qwen3_vl": f"{IM}user\n<|vision_start|><|image_pad|><|vision_end|>{USER}<|im_end|>\n{IM}assistant\n",
    "internvl": f"{IM}user\n<IMG_CONTEXT>\n{USER}<|im_end|>\n{IM}assistant\n",
    "llava_onevision": f"{IM}user <image>\n{USER}<|im_end|>{IM}assistant\n",
}
ENDS = {
    "qwen2_5_vl": "<|im_end|>\n",
    "qwen3_vl": "<|im_end|>\n",
    "internvl": "<|im_end|>\n",
    "llava_onevision": "<|im_end|>",
}


def user(text, image=False):
    content = [{"type": "text", "text": text}]
    return {"role": "user", "content": [{"type": "image"}, *content] if image else content}


SPOKEN = {"role": "assistant", "content": [{"type": "text", "text": SAID}]}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_VLM)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_the_models_own_and_training_begins_with_them(name, tokenizer):
    template = registered_templates()[name].read_text()
    check_marks(template)

    def rendered(messages, prompt):
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    first = rendered([user(USER, image=True)], True)
    assert first == PROMPTS[name]
    trained = rendered([user(USER, image=True), SPOKEN], False)
    assert trained == first + SAID + ENDS[name]
    again = rendered([user(USER, image=True), SPOKEN, user(MORE)], True)
    assert again.startswith(trained) and again.count(f"{IM}user") == 2 and again.endswith(f"{IM}assistant\n")


@pytest.mark.parametrize("name", PROMPTS)
def test_every_answer_is_marked_with_its_end(name):
    """What transformers takes for the assistant's, by the marks alone."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [user(USER, image=True), SPOKEN, user(MORE), SPOKEN]
    texts, marks = render_jinja_template(
        [conversation],
        chat_template=registered_templates()[name].read_text(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
    )
    assert [texts[0][start:end] for start, end in marks[0]] == [f"{SAID}<|im_end|>"] * 2
