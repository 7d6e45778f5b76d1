"""lm-eval on a trained model: its numbers beside plain forward passes, beside the server's, and in a real task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.served import EOS_ID, ByteTokenizer, Served, served
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from biroute.configs.errors import UsageError
from biroute.launcher.evaluate.harness import needs
from biroute.launcher.evaluate.harness.model import HarnessModel
from biroute.launcher.evaluate.harness.needs import needs_of, open_tasks
from biroute.launcher.evaluate.harness.run import score_harness
from biroute.launcher.evaluate.ranks import EvaluationRanks

LENGTH = 96
LONG = "".join(chr(97 + n * n % 26) for n in range(120))  # of equal tokens, routes would be ties
QUESTIONS = [
    {"question": f"What is {n} of 床前明月光?", "choices": ["one", "two of them", "3"], "answer": n % 3}
    for n in range(5)
]
TASK = """
task: {name}
tag: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""


@pytest.fixture(scope="module")
def tiny() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture
def trained(tiny: Served) -> Any:
    model = tiny.worker.model
    return SimpleNamespace(model=model, tokenizer=ByteTokenizer(), config=SimpleNamespace(model=model.model))


def harness(trained: Any, said: list[str] | None = None) -> HarnessModel:
    return HarnessModel(trained, EvaluationRanks(), (said if said is not None else []).append)


def asked(kind: Any, *arguments: tuple[Any, ...], task: str = "some") -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=(task, number, 1))
        for number, one in enumerate(arguments)
    ]


def log_probabilities(trained: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] of the next token, from the forward pass of training."""
    with torch.no_grad():
        logits = trained.model.layers(torch.tensor([tokens + [0] * (-len(tokens) % 8)]))[: len(tokens), 0]
    return logits[:, : ByteTokenizer.vocab_size].double().log_softmax(-1)


def plain(trained: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logs = log_probabilities(trained, [*context, *continuation][:-1])[-len(continuation) :]
    found = sum(float(log[token]) for log, token in zip(logs, continuation, strict=True))
    return found, logs.argmax(-1).tolist() == continuation


def test_continuations_behind_contexts(trained: Any) -> None:
    """Spaces go over to the continuation, an empty context is the end of a document, a long one loses its begin."""
    model = harness(trained)
    found = model.loglikelihood(
        asked("loglikelihood", ("To be  ", "or"), ("", "床"), ("   ", "x"), (LONG, "no"), ("To be", ""))
    )
    wanted = [
        plain(trained, list(b"To be"), list(b"  or")),
        plain(trained, [EOS_ID], list("床".encode())),
        plain(trained, [EOS_ID], list(b"   x")),
        plain(trained, list(LONG.encode())[-(LENGTH - 1) :], list(b"no")),
        (0.0, True),
    ]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert model.cut == {"some": 1}
    with pytest.raises(UsageError, match=r"lm_eval:some: an answer \('zzz.*\.\.\.\) has 97 tokens, more than the 96"):
        model.loglikelihood(asked("loglikelihood", ("a", "z" * 97)))


def test_greedy_is_said_of_the_likeliest_tokens_alone(trained: Any) -> None:
    best = int(log_probabilities(trained, list(b"To be"))[-1].argmax())
    scores = harness(trained)._score([(list(b"To be"), [token]) for token in (best, best ^ 1)])
    assert [greedy for _, greedy in scores] == [True, False]


def test_answers_of_one_token_share_a_pass(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, every = list[int](), trained.model.every_logit
    monkeypatch.setattr(
        trained.model, "every_logit", lambda tokens, first: passes.append(len(tokens)) or every(tokens, first)
    )
    model = harness(trained)
    found = model.loglikelihood(asked("loglikelihood", *[("Which one?", letter) for letter in "abcd"]))
    assert passes == [10] and len({value for value, _ in found}) == 4


def test_an_answer_without_tokens_of_its_own_is_counted(trained: Any) -> None:
    class Merging(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.replace("ab", "\x01"))

    trained.tokenizer = Merging()
    model = harness(trained)
    ((value, _),) = model.loglikelihood(asked("loglikelihood", ("a", "b")))
    assert value == pytest.approx(plain(trained, list(b"a"), list(b"b"))[0], abs=1e-4)
    assert model.merged == {"some": 1}


def test_rolling_scores_every_token_once(trained: Any) -> None:
    text = LONG + LONG[::-1] + "0123456789"
    whole, total = [EOS_ID, *text.encode()], 0.0
    for begin, end in ((0, 96), (96, 192), (192, 250)):  # targets; the last window has as much context as there is
        window = whole[max(0, end - LENGTH) : end + 1]
        total += plain(trained, window[: len(window) - (end - begin)], window[len(window) - (end - begin) :])[0]
    found = harness(trained).loglikelihood_rolling(asked("loglikelihood_rolling", (text,), ("",)))
    assert found == [pytest.approx(total, abs=1e-3), 0.0]


def test_generated_texts_end_where_the_task_says(trained: Any) -> None:
    said: list[str] = []
    model = harness(trained, said)
    greedy, long, one, two = model.generate_until(
        asked(
            "generate_until",
            ("To be", {"until": ["\n\n"], "max_gen_toks": 12}),
            (LONG, {"until": "?", "max_gen_toks": 500, "do_sample": False, "num_beams": 2}),
            *[("To be", {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 2,
        )
    )
    tokens = list(b"To be")
    for _ in range(12):
        tokens.append(int(log_probabilities(trained, tokens)[-1].argmax()))
    assert greedy == ByteTokenizer().decode(tokens[5:])
    assert one != two and model.cut == {"some": 1}
    # Of the long one only the last token leaves room.
    (tail,) = harness(trained).generate_until(asked("generate_until", (LONG[-1], {"until": "?", "max_gen_toks": 95})))
    assert long == tail
    assert said == ["num_beams=2 of a task's generation_kwargs is not known here, and passed over"]
    stop = greedy[3]
    (stopped,) = model.generate_until(asked("generate_until", ("To be", {"until": [stop], "max_gen_toks": 12})))
    assert stopped == greedy[: greedy.index(stop)]


def test_local_completions_get_the_numbers_of_the_model_itself(tiny: Served, trained: Any) -> None:
    client = LocalCompletionsAPI(base_url=f"{tiny.address}/completions", model="tiny", max_length=LENGTH)
    assert client.tokenizer_backend == "remote" and client.prefix_token_id == EOS_ID
    ours = harness(trained)
    pairs = asked("loglikelihood", ("To be", " or not"), ("", "床前"), ("To be", "!"), ("q  ", "r" * 60))
    assert client.loglikelihood(pairs) == ours.loglikelihood(pairs)
    texts = asked("loglikelihood_rolling", ("A text of the server's. 床",), ("b" * 90,))
    assert client.loglikelihood_rolling(texts) == ours.loglikelihood_rolling(texts)
    stop = ours.generate_until(asked("generate_until", ("To be", {"until": [], "max_gen_toks": 9})))[0][3:4]
    prompts = asked("generate_until", *[(text, {"until": [stop], "max_gen_toks": 9}) for text in ("To be", "床")])
    assert client.generate_until(prompts) == ours.generate_until(prompts)
    assert client.tokenizer.decode(client.tok_encode("床 x")) == "床 x"


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, file in (("ours_choice", "questions.jsonl"), ("ours_gone", "gone.jsonl")):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=tmp_path / file))
    return tmp_path


def test_a_task_of_ones_own_runs_without_internet(trained: Any, tasks: Path) -> None:
    names = ("ours_choice",)
    manager = open_tasks(names, tasks)
    (section,) = score_harness(trained, manager, names, EvaluationRanks(), limit=4, fewshot=None, say=lambda _: None)
    right = 0
    for one in QUESTIONS[:4]:
        context = list(f"{one['question']}\nAnswer:".encode())
        scores = [plain(trained, context, list(f" {choice}".encode()))[0] for choice in one["choices"]]  # type: ignore[attr-defined]
        right += scores.index(max(scores)) == one["answer"]
    assert section.name == "lm_eval/ours_choice" and section.measures["acc"].value == right / 4
    assert section.measures["acc"].count == section.measures["documents"].value == 4
    assert math.isclose(section.measures["acc"].error, math.sqrt(right / 4 * (1 - right / 4) / 3))
    assert "4 of 5 documents, 0-shot, task version 3" in section.about


def test_what_a_task_needs_is_said_before(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = open_tasks(("ours",), tasks)
    good, bad = needs_of(manager, ["ours"])
    assert (good.task, good.problem) == ("ours_choice", "") and "questions.jsonl" in good.words
    assert "gone.jsonl does not exist, seen from" in bad.problem
    monkeypatch.setattr(needs, "TaskManager", lambda **_: manager)
    with pytest.raises(UsageError, match=r"lm-eval has no task our_choice; did you mean lm_eval:ours_choice"):
        open_tasks(("our_choice",), tasks)
    with pytest.raises(UsageError, match=r"--lm-eval-include=.*nowhere is no folder"):
        open_tasks(("ours",), tasks / "nowhere")


def test_a_dataset_of_the_hub_is_there_or_not(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = open_tasks(("ours",), tasks)
    manager.task_index["ours_choice"].cfg |= {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy"}
    monkeypatch.setattr(needs.datasets.config, "HF_DATASETS_CACHE", tasks)
    for reached, cached, problem in ((False, False, "the hub is not reached"), (True, False, ""), (False, True, "")):
        monkeypatch.setattr(needs, "_reached", lambda reached=reached: reached)
        if cached:
            (tasks / "allenai___ai2_arc" / "ARC-Easy").mkdir(parents=True)
        (need,) = needs_of(manager, ["ours_choice"])
        assert bool(need.problem) == bool(problem) and problem in need.problem
        assert "allenai/ai2_arc (ARC-Easy)" in need.words
