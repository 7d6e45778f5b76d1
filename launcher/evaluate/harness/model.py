"""A trained model as lm-eval sees it: log-likelihoods and texts, by the cached decode of `biroute generate`.

The conventions are lm-eval's: context and continuation are encoded together and cut apart behind the context's own
tokens; spaces at the context's end belong to the continuation; nothing is put before a context, because in training
texts begin anywhere, and an empty one is the end of a document; contexts too long lose their beginnings. What was cut
is counted. Log-probabilities have the bits that `biroute serve` reports, so lm-eval gets the same numbers from both.

Source: lm-eval 0.4.13, api/model.py (`TemplateLM`) and models/huggingface.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from biroute.configs.errors import UsageError
from biroute.launcher.evaluate.ranks import EvaluationRanks
from biroute.launcher.generate.continuation import Prompt, continue_prompts
from biroute.launcher.generate.sampling import log_probabilities
from biroute.launcher.generate.settings import Settings
from biroute.launcher.generate.trained import Trained

_BATCH = 8  # texts that are generated at the same time; changes none
# Of a task's generation_kwargs; others are said and passed over.
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_Scored = tuple[float, bool]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model for `lm_eval.evaluate`.

    Several ranks share its requests, so lm-eval itself sees one rank: all of them must make the same calls.

    Attributes:
        cut: how many contexts of each task were too long.
        merged: how many continuations of each task are no tokens of their own behind their context.
    """

    def __init__(self, trained: Trained, ranks: EvaluationRanks, say: Callable[[str], None]) -> None:
        """Take a model; `say` is called with a line about each setting of a task that is passed over."""
        super().__init__()
        self._trained, self._ranks, self._say = trained, ranks, say
        self._end = trained.tokenizer.eos_id
        self.cut: Counter[str] = Counter()
        self.merged: Counter[str] = Counter()
        self._passed_over: set[str] = set()
        self._task = ""

    @property
    def eot_token_id(self) -> int:
        """Return the end of a document, which stands before texts without a context."""
        return self._end

    @property
    def max_length(self) -> int:
        """Return the number of tokens that the model takes at once."""
        return self._trained.config.model.sequence_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Encode a text; the tokenizer adds no special token, whatever is asked for."""
        return self._trained.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[_Scored]:
        """Score continuations behind contexts; task by task, as only the requests know their tasks."""
        return self._by_task(requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, each behind the end of a document and every token once, in windows."""
        parts, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, windows):
                parts.append((context, continuation))
                owners.append(number)
        total = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(parts), strict=True):
            total[owner] += value
        return total

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue contexts, greedily unless the task samples; each ends at a stop text or the end of a document."""
        texts: list[str | None] = [None] * len(requests)
        samples: Counter[tuple[str, Settings]] = Counter()
        jobs: dict[Settings, list[tuple[int, Prompt]]] = defaultdict(list)
        for number, request in enumerate(requests):
            context, options = request.args
            settings = self._settings(options)
            keep = self.max_length - settings.max_tokens
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            self.cut[request.task_name or ""] += len(tokens) > keep
            prompt = Prompt(number, "", tuple(tokens[-keep:]), samples[context, settings])
            samples[context, settings] += 1  # a task that asks again wants another sample
            if self._ranks.mine(number):
                jobs[settings].append((number, prompt))
        for settings, work in jobs.items():
            prompts = [prompt for _, prompt in work]
            answers = continue_prompts(
                self._trained.model, self._trained.tokenizer, prompts, settings, batch_size=_BATCH
            )
            for (number, _), answer in zip(work, answers, strict=True):
                texts[number] = answer.text
        return self._ranks.join_items(texts)

    def _by_task(self, requests: list[Instance], score: Callable[..., list[_Scored]]) -> list[_Scored]:
        found: list[_Scored | None] = [None] * len(requests)
        by_task: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_task[request.task_name or ""].append(number)
        for task, numbers in by_task.items():
            self._task = task
            scores = score([requests[number] for number in numbers], disable_tqdm=True)
            for number, one in zip(numbers, scores, strict=True):
                found[number] = one
        return found  # type: ignore[return-value]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, behind = super()._encode_pair(context, continuation)
        before = before or [self.prefix_token_id]  # it was nothing but spaces
        if behind:
            return before, behind
        # The tokenizer has merged it into the context's last token: then it is scored as a text of its own.
        self.merged[self._task] += 1
        return before, self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[_Scored]:
        longest = self.max_length
        for (_context, text), context, continuation in requests:
            if len(continuation) > longest:
                raise UsageError(
                    f"--tasks=lm_eval:{self._task}: an answer ({text[:30]!r}...) has {len(continuation)} tokens, "
                    f"more than the {longest} of the model's sequences; leave the task out"
                )
            self.cut[self._task] += len(context) + len(continuation) > longest + 1
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _score(self, parts: Sequence[tuple[list[int], list[int]]]) -> list[_Scored]:
        """Score continuations behind their contexts, which lose their beginnings where they are too long."""
        by_inputs: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (context, continuation) in enumerate(parts):
            # Answers of one token share the pass of their context.
            if continuation:
                by_inputs[tuple([*context, *continuation][-(self.max_length + 1) : -1])].append(number)
        values = np.zeros(len(parts))
        greedy = np.array([0.0 if continuation else 1.0 / self._ranks.size for _, continuation in parts])
        for turn, (inputs, numbers) in enumerate(by_inputs.items()):
            if not self._ranks.mine(turn):
                continue
            most = max(len(parts[number][1]) for number in numbers)
            logits_SV = self._trained.model.every_logit(inputs, len(inputs) - most)
            rows = [log_probabilities(logits_V, self._trained.tokenizer.vocab_size) for logits_V in logits_SV]
            likeliest = [int((row == row.max()).nonzero()[0]) for row in rows]
            for number in numbers:
                continuation = parts[number][1]
                first = most - len(continuation)
                values[number] = sum(float(row[token]) for row, token in zip(rows[first:], continuation, strict=True))
                greedy[number] = likeliest[first:] == continuation
        joined = zip(self._ranks.join(values).tolist(), self._ranks.join(greedy).tolist(), strict=True)
        return [(value, bool(one)) for value, one in joined]

    def _settings(self, options: dict[str, Any]) -> Settings:
        """Turn a task's generation_kwargs into settings."""
        given = dict(normalize_gen_kwargs(options, default_max_gen_toks=256))
        stop = tuple(text for text in given.pop("until") if text)
        wanted = int(given.pop("max_gen_toks"))
        sampled = given.pop("do_sample")
        chosen = {name: given.pop(name) for name in _SETTINGS if given.get(name) is not None}
        for name in sorted(set(given) - self._passed_over):
            self._passed_over.add(name)
            self._say(f"{name}={given[name]!r} of a task's generation_kwargs is not known here, and passed over")
        if not sampled:
            chosen["temperature"] = 0.0
        try:
            return Settings(max_tokens=min(wanted, self.max_length - 1), stop=stop, **chosen)
        except (UsageError, TypeError) as error:
            raise UsageError(f"a task's generation_kwargs {options}: {error}") from None
