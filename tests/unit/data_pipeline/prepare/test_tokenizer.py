"""The tokenizer: nothing lost, bytes exact, training reproducible, unfit models refused."""

from __future__ import annotations

import io
import random
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from helpers.corpora import chinese_texts, english_texts
from hypothesis import example, given, settings
from hypothesis import strategies as st

from biroute.configs.data_section import TokenizerConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.sources import Document
from biroute.data_pipeline.prepare.tokenizer import (
    Tokenizer,
    TrainingSample,
    load_tokenizer,
    train_tokenizer,
    training_sentences,
)

TEXTS = [*english_texts(150), *chinese_texts(150)]
TOKENIZERS = {kind: train_tokenizer(TEXTS, TokenizerConfig(kind=kind, vocab_size=600)) for kind in ("bpe", "unigram")}
AWKWARD = (
    *("\u2581", "\0", "\r\n", "\n\n\n", "  ", "\t", "Ａ", "　", "\u0301", "😀", "\ufeff", "\u2585", "\u2028"),
    *("<unk>", "</s>", "<pad>", "<mask>", "<s>", "<0x0A>", "▁the", "汉", " the", "e\u0301", "\U0010ffff"),
)


def model_with(**options: Any) -> bytes:
    """A SentencePiece model as others train them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_sentences(TEXTS), model_writer=model, vocab_size=500, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=400)
@given(parts=st.lists(st.one_of(st.text(max_size=20), st.sampled_from(AWKWARD)), max_size=12))
@example(parts=list(AWKWARD))
@example(parts=["\u2581 \u2581\u2581 a"])
def test_every_text_comes_back_byte_for_byte(kind: str, parts: list[str]) -> None:
    tokenizer, text = TOKENIZERS[kind], "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())
    special = {tokenizer.unk_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}
    assert not special & set(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_batches_encode_as_single_texts(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    texts = ["", "a\u2581b", "plain", "\u2581", *TEXTS[:20]]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_special_pieces_have_no_bytes_and_the_rest_has() -> None:
    tokenizer = TOKENIZERS["bpe"]
    special = [tokenizer.unk_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
    assert len(set(special)) == 4
    sizes = tokenizer.token_bytes()
    assert [i for i in range(600) if sizes[i] == 0] == sorted(special)
    assert tokenizer.decode([*special, *tokenizer.encode("x")]) == "x"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_is_reproducible(kind: str) -> None:
    again = train_tokenizer(TEXTS, TokenizerConfig(kind=kind, vocab_size=600))
    assert again.fingerprint == TOKENIZERS[kind].fingerprint
    assert TOKENIZERS["bpe"].fingerprint != TOKENIZERS["unigram"].fingerprint


def drawn(alphabet: str, length: int = 20_000) -> str:
    return "".join(random.Random(0).choices(alphabet, k=length))


ODD_TEXTS = {
    "Chinese without a space": "".join(chinese_texts(400)).replace(" ", "").replace("\n", ""),
    "lines of Chinese": "".join(chinese_texts(400)).replace(" ", ""),
    "no space, no newline": "".join(english_texts(150)).replace(" ", "_").replace("\n", "-"),
    "digits alone": drawn("0123456789"),
    "emoji alone": drawn("".join(chr(0x1F600 + n) for n in range(60))),
    "Hangul alone": drawn("".join(chr(0xAC00 + n) for n in range(60))),
    "Arabic alone": drawn("".join(chr(0x627 + n) for n in range(36))),
}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", ODD_TEXTS)
def test_any_text_makes_a_tokenizer_that_changes_no_text(name: str, kind: str) -> None:
    """Also one in which no space, newline, digit or Latin letter ever occurs."""
    text = ODD_TEXTS[name]
    pieces = [text[n : n + 500] for n in range(0, len(text), 500)]
    tokenizer = train_tokenizer(pieces, TokenizerConfig(kind=kind, vocab_size=350))
    for probe in (*pieces[:20], *TEXTS[:5], "".join(AWKWARD)):
        assert tokenizer.decode(tokenizer.encode(probe)) == probe


def test_character_coverage_decides_which_characters_have_a_piece() -> None:
    """One character of a thousand is covered by 1.0 alone."""
    texts = ["the cat sat on the mat and ate the rat " * 5 + "鼠" * (n < 5) for n in range(25)]

    def pieces(coverage: float) -> int:
        tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=300, character_coverage=coverage))
        return len(tokenizer.encode("cat鼠")) - len(tokenizer.encode("cat"))

    assert pieces(0.98) == len("鼠".encode())
    assert pieces(1.0) == 1


def test_fingerprint_is_of_the_vocabulary_not_of_the_file(tmp_path: Path) -> None:
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False}
    options |= {"remove_extra_whitespaces": False, "model_type": "bpe"}
    one, other = model_with(num_threads=1, **options), model_with(num_threads=7, **options)
    assert one != other
    assert Tokenizer(one, "a").fingerprint == Tokenizer(other, "b").fingerprint
    assert Tokenizer(one, "a").fingerprint != TOKENIZERS["bpe"].fingerprint
    (tmp_path / "t.model").write_bytes(TOKENIZERS["bpe"].model_bytes)
    assert load_tokenizer(tmp_path / "t.model", 600).fingerprint == TOKENIZERS["bpe"].fingerprint


def test_fingerprint_sees_normalisation_and_kind() -> None:
    model = TOKENIZERS["bpe"].model_bytes
    # trainer_spec.model_type is field 3: "unigram" (1) instead of "bpe" (2), same pieces and scores.
    at = model.rindex(b"\x18\x02")
    changed = model[:at] + b"\x18\x01" + model[at + 2 :]
    assert Tokenizer(changed, "changed").fingerprint != TOKENIZERS["bpe"].fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization_rule_name": "identity"}, "has 0 byte pieces, not 256"),
        ({"byte_fallback": True}, "the model changes texts"),
        ({"byte_fallback": True, "normalization_rule_name": "identity"}, "add_dummy_prefix=false"),
        ({"byte_fallback": True, "eos_id": -1}, "no end-of-sentence piece"),
    ],
)
def test_models_that_lose_text_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^given: .*{message}"):
        Tokenizer(model_with(**options), "given")


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(UsageError, match=r"t\.model: the tokenizer cannot be read"):
        load_tokenizer(path)
    whole = TOKENIZERS["bpe"].model_bytes
    for content in (b"", b"no model", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"t\.model: "):
            load_tokenizer(path, 600)
    path.write_bytes(whole)
    with pytest.raises(UsageError, match=r"vocab_size=4096, but .*t\.model has 600 .*vocab_size=600"):
        load_tokenizer(path, 4096)


@pytest.mark.parametrize(
    ("texts", "config", "message"),
    [
        (["a few words"], {"vocab_size": 1000}, r"vocab_size=1000: the text yields only \d+ pieces"),
        (
            ["bc\0" * 9],
            {"vocab_size": 300},
            r"the text yields only 2\d\d pieces; give more text",
        ),  # 300 are the least
        (
            ["".join(map(chr, range(0x4E00, 0x5200)))],
            {"vocab_size": 300, "character_coverage": 1.0},
            r"vocab_size=300: the characters of the text need \d+",
        ),
        ([], {"vocab_size": 300}, "no text to train on"),
        (["\n\n\t"], {"vocab_size": 300}, "no text to train on"),
    ],
)
def test_text_that_cannot_make_the_vocabulary(texts: list[str], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_tokenizer(texts, TokenizerConfig(**config))


def test_long_lines_are_not_lost() -> None:
    line = (
        " ".join(["Zanzibar"] * 3000) + "汉字" * 4000
    )  # one line of 51 kB; the trainer drops what is over 4,192 bytes
    sentences = list(training_sentences([line, "short"]))
    assert "".join(sentences) == line + "short"
    assert all(len(sentence.encode()) <= 4192 for sentence in sentences)
    tokenizer = train_tokenizer([*TEXTS, line], TokenizerConfig(vocab_size=600))
    assert len(tokenizer.encode(" Zanzibar")) == 1


@pytest.mark.parametrize("line", ["x" * 40_000_000, "one two " * 5_000_000, "汉字" * 20_000_000])
def test_a_long_line_is_cut_in_linear_time(line: str) -> None:
    """A second; with a copy of the rest of the line for each sentence over a minute, which the clock cuts off."""
    end = time.monotonic() + 30
    characters = 0
    for sentence in training_sentences([line]):
        characters += len(sentence)
        assert time.monotonic() < end, f"{characters:,} of {len(line):,} characters"
    assert characters == len(line)


def test_sample_depends_on_the_documents_not_on_their_order() -> None:
    draw = random.Random(1)
    documents = [
        Document(text, len(text.encode()), n % 10 == 0, 0.5, draw.getrandbits(64)) for n, text in enumerate(TEXTS)
    ]
    samples = []
    for order in (documents, documents[::-1], draw.sample(documents, len(documents))):
        sample = TrainingSample(30_000)
        for document in order:
            sample.add(document)
        assert 30_000 <= sample.size_bytes <= 30_000 + max(document.size_bytes for document in documents)
        assert sample.size_bytes == sum(len(text.encode()) for text in sample.texts())
        samples.append(sample.texts())
    assert samples[0] == samples[1] == samples[2]
    assert not set(samples[0]) & {document.text for document in documents if document.heldout}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_damaged_model_is_one_line(kind: str) -> None:
    """Bytes changed, lost, put in, or the end cut off: refused, or a model that still is lossless."""
    draw, model, told = random.Random(1), TOKENIZERS[kind].model_bytes, list[str]()
    for n in range(300):
        damaged, at = bytearray(model), draw.randrange(len(model))
        if n % 4 == 0:
            damaged[at] = draw.randrange(256)
        elif n % 4 == 1:
            del damaged[at:]
        elif n % 4 == 2:
            del damaged[at : at + draw.randrange(1, 30)]
        else:
            damaged[at:at] = draw.randbytes(draw.randrange(1, 8))
        try:
            found = Tokenizer(bytes(damaged), "my.model")
        except UsageError as error:
            told.append(str(error))
        else:
            assert found.decode(found.encode("any text 汉字")) == "any text 汉字"
    assert len(told) > 200
    assert all(text.startswith("my.model: ") and "\n" not in text for text in told)
