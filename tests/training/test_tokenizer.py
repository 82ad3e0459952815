"""The tokenizer of a CLIP from random weights follows CLIP's conventions."""

import pytest

from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.forked import run_script


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer(["traffic light", "hedgerow"])


def test_tokenizer_follows_clip(tokenizer):
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    ids = tokenizer("Hedgerow  TREE")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", "hedgerow</w>", "tree</w>", "<|endoftext|>"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (start, end)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hedgerow tree"


@pytest.mark.parametrize("text", ["zebra q x Ω 3", "ÿþ!?", "crosswalk-sign"])
def test_tokenizer_knows_any_text(tokenizer, text):
    assert tokenizer(text)["input_ids"].count(tokenizer.eos_token_id) == 1


def test_tokenizer_is_the_same_in_another_process(tokenizer, tmp_path):
    """With another hash seed."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "again.py").write_text(
        "from transformers import AutoTokenizer; from denseclip_hf.training.tokenizer import learn_tokenizer\n"
        f"print(AutoTokenizer.from_pretrained({str(tmp_path)!r})('a hedge')['input_ids'])\n"
        "print(learn_tokenizer(['traffic light', 'hedgerow'])('a hedge')['input_ids'])"
    )
    code, said = run_script(tmp_path / "again.py")
    assert code == 0 and said.splitlines().count(str(tokenizer("a hedge")["input_ids"])) == 2, said
