"""A small tokenizer by CLIP's conventions, for a CLIP that starts from random weights."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer


SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
MAX_TOKENS = 77
# Words of captions and of common class names, so that names that come later are not spelled letter by letter.
WORDS = """
a an the of in on at with and is there this that two three some many photo picture image drawing view scene small large
red orange yellow green blue purple pink brown white black grey dark light dry wet old new bright
sky cloud sun mountain hill rock sand soil grass field plant flower tree leaf forest water river lake sea road street
path bridge rail pavement building house roof wall window door fence sign pole lamp car truck bus bicycle motorcycle
train boat plane person man woman child people dog cat horse cow sheep bird animal chair table bed sofa floor ceiling
food fruit bread bottle cup plate book screen phone clothes shoe bag
"""


def learn_tokenizer(sentences: Iterable[str], vocab_size: int = 1024) -> CLIPTokenizer:
    """
    A byte-level BPE learned from `sentences` and `WORDS`: lower case, `</w>` ends a word, SOS and EOS come last.

    Every byte is in the vocabulary, inside and at the end of a word, so that no text is unknown.

    Args:
        sentences (iterable of `str`): what it should be good at, such as class names.
        vocab_size (`int`): the most tokens there may be; the bytes and the two special tokens take 514.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in letters]
    # An empty CLIPTokenizer lends its rules for splitting text, so that merges are learned on what it will be given.
    rules = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=letters,
        # Given an order here, as otherwise a hash map decides it, and with it ties among merges.
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator([*sentences, WORDS], trainer)
    merges: list[Any] = [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*letters, *endings, *(first + second for first, second in merges), *SPECIAL_TOKENS])
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
