"""Tokenizers, conversations and texts for the tests of the data room."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mebp_triton.data.loading import load_data

SENTENCES = [
    "The cat sat on the mat and looked at the dog.",
    "What is two plus two? Two plus two is four.",
    "user system assistant answer question, a short text about tokens\n",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "What is two plus two?"}]
ANSWER = [{"role": "assistant", "content": "four."}]
TALK = [{"role": "system", "content": "Be short."}, *QUESTION, *ANSWER, {"role": "user", "content": "And three?"}]
TALK += [{"role": "assistant", "content": "Five."}]


def byte_bpe(chat_template=CHATML, **special):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **special)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows(data):
    """``(ids, labels)`` of every row, as lists."""
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in data]


def trained_text(tokenizer, labels):
    """The stretches of a row that are trained, as texts."""
    stretches, inside = [], False
    for label in labels:
        if label != -100:
            stretches = [*stretches[:-1], [*stretches[-1], label]] if inside else [*stretches, [label]]
        inside = label != -100
    return [tokenizer.decode(stretch) for stretch in stretches]


def text_data(tokenizer, write, tokens, max_length):
    """``tokens`` tokens of plain text in windows."""
    text = tokenizer.decode(encode(tokenizer, " ".join(SENTENCES) * 20)[:tokens])
    assert len(encode(tokenizer, text)) == tokens
    return load_data(write("text.txt", text), tokenizer, max_length)
