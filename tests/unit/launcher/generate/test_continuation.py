"""Continuations of many prompts: why they end, and that none depends on the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cached import VOCABULARY, cached_model, random_tokens, tiny_config
from torch import Tensor

from biroute.configs.errors import UsageError
from biroute.launcher.generate.continuation import Continuation, Prompt, continue_prompts, encode_prompts
from biroute.launcher.generate.settings import Settings
from biroute.model.decode.cached_model import CachedModel

EOS = 1


class LetterTokenizer:
    """Token n is the letter n, in bytes; 1 ends a document."""

    vocab_size, eos_id = VOCABULARY - 20, EOS

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(b"" if i == EOS else chr(i + 32).encode() for i in ids)


class Scripted(CachedModel):
    """Gives the highest logit to the tokens of a script, and to the vocabulary's padding a higher one."""

    def __init__(self, script: list[int], longest: int = 48) -> None:
        self.script = script
        self.model = tiny_config({"sequence_length": longest}).model

    def prefill(self, tokens: Any) -> Any:
        return [0], self._logits_of(0)

    def step(self, sequences: Any, tokens: Any) -> Tensor:
        for one in sequences:
            one[0] += 1
        return torch.stack([self._logits_of(one[0]) for one in sequences])

    def _logits_of(self, turn: int) -> Tensor:
        logits = torch.zeros(384)
        logits[self.script[turn]], logits[VOCABULARY - 20 :] = 9.0, 99.0
        return logits


def run(script: str, prompt: str = "p", **options: Any) -> Continuation:
    tokens = [EOS if letter == "$" else ord(letter) - 32 for letter in script]
    tokenizer = LetterTokenizer()
    prompts = encode_prompts([prompt], tokenizer, 48)  # type: ignore[arg-type]
    settings = Settings(temperature=0, **options)
    (answer,) = continue_prompts(Scripted(tokens), tokenizer, prompts, settings)  # type: ignore[arg-type]
    return answer


def test_each_way_to_end() -> None:
    ended = run("hello$")
    assert (ended.text, ended.reason, len(ended.tokens)) == ("hello", "end_of_document", 6)
    stopped = run("hello", stop=("ll", "z"))
    assert (stopped.text, stopped.reason, stopped.stopped_at, len(stopped.tokens)) == ("he", "stop", "ll", 4)
    limited = run("hello", max_tokens=3, stop=("lo",))
    assert (limited.text, limited.reason) == ("hel", "max_tokens")  # the l that was held back is given out
    full = run("a" * 10, prompt="p" * 45)
    assert (full.text, full.reason) == ("aaa", "model_length")


def test_prompts_that_do_not_fit() -> None:
    tokenizer: Any = LetterTokenizer()
    with pytest.raises(UsageError, match=r"prompt 1 has 48 tokens, but the model was trained with sequences of 48"):
        encode_prompts(["p", "p" * 48], tokenizer, 48)
    said: list[str] = []
    (cut,) = encode_prompts(["p" * 50 + "q"], tokenizer, 48, document_start=True, keep_last=2, say=said.append)
    assert cut.tokens == (ord("p"), ord("q"))
    assert said == ["prompt 0: only the last 2 of its 52 tokens are used (--truncate)"]
    both = encode_prompts(["x"], tokenizer, 48, samples=2, document_start=True)
    assert [(one.tokens, one.sample) for one in both] == [((EOS, ord("x")), 0), ((EOS, ord("x")), 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_gets_the_same_tokens_in_any_batch(temperature: float) -> None:
    model, tokenizer = cached_model(tiny_config()), LetterTokenizer()
    lengths = (1, 17, 30, 8, 3)
    prompts = [Prompt(n, "", tuple(random_tokens(length, seed=n))) for n, length in enumerate(lengths)]
    settings = Settings(temperature=temperature, max_tokens=12, seed=3)

    def tokens(chosen: list[Prompt], batch_size: int) -> dict[int, list[Any]]:
        answers = continue_prompts(model, tokenizer, chosen, settings, batch_size=batch_size)  # type: ignore[arg-type]
        assert [answer.prompt for answer in answers] == chosen
        return {answer.prompt.number: answer.tokens for answer in answers}

    alone = {n: tokens([prompt], 1)[n] for n, prompt in enumerate(prompts)}
    for batch_size in (1, 2, 3, 8):
        assert tokens(prompts, batch_size) == alone
        assert tokens(prompts[::-1], batch_size) == alone
    assert len({tuple(found) for found in alone.values()}) == len(prompts)


def test_samples_of_a_prompt_differ_and_seeds_too() -> None:
    model, tokenizer = cached_model(tiny_config()), LetterTokenizer()
    found = set()
    for seed in (0, 1):
        prompts = [Prompt(0, "", (5, 6, 7), sample) for sample in range(3)]
        answers = continue_prompts(model, tokenizer, prompts, Settings(max_tokens=8, seed=seed))  # type: ignore[arg-type]
        found |= {tuple(choice.token for choice in answer.tokens) for answer in answers}
    assert len(found) == 6


def test_pieces_of_a_text_are_told_as_they_come() -> None:
    seen: list[tuple[str, str | None]] = []
    tokenizer: Any = LetterTokenizer()
    prompts = encode_prompts(["p"], tokenizer, 48)
    continue_prompts(
        Scripted([ord("a") - 32, ord("床") % 200, EOS]), tokenizer, prompts, Settings(temperature=0),
        on_text=lambda answer, piece: seen.append((piece, answer.reason)),
    )  # fmt: skip
    assert [piece for piece, _ in seen] == ["a", chr(ord("床") % 200 + 32), ""]
    assert [reason for _, reason in seen] == [None, None, "end_of_document"]
