"""The model in memory as lm-eval takes it: silent, stoppable, and nothing of an evaluation is left in it after."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from dora_lab.evaluation.shared import keeps_prompts, likelihoods
from dora_lab.tasks.limits import limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Cut = Callable[[str, str, Any], tuple[list[int], list[int]] | None]
Label = Callable[[str], str | None]
NO_LIMIT = 1 << 30  # tokens; of models without a last position


# a decorator hides HFLM's type: to type checkers the class is a bare `LM`
class Model(cast(Any, HFLM)):
    """lm-eval's wrapper; `tick` is called before each batch and may raise, which ends the evaluation.

    `cut` says which tokens of a request for a likelihood (context, continuation) are read and which are scored; where
    it answers None, lm-eval cuts the request itself. `reuse`: see `spec.Evaluation`; `label` finds the first one in a
    text that is being generated, and None before there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        tick: Callable[[], None],
        cut: Cut = lambda *_: None,
        reuse: bool = False,
        label: Label = lambda _: None,
    ) -> None:
        self._tick, self._cut, self._label = tick, cut, label
        self._reuse, self._shared = reuse, reuse and keeps_prompts(model)
        super().__init__(
            pretrained=model,
            tokenizer=cast(Any, tokenizer),
            backend="causal",
            batch_size=batch_size,
            # everything was found to fit before (`Protocol.check`); lm-eval's own guess, 2048, would cut
            max_length=limits(model).positions or NO_LIMIT,
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        cut: list[Any] = []
        for request in requests:
            pair = self._cut(request.args[0], request.args[1], self.tokenizer)
            if pair is None:
                return super().loglikelihood(requests, disable_tqdm=True)
            cut.append((request.args, *pair))
        return self._loglikelihood_tokens(cut, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        if not self._shared:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        pairs = [(list(context), list(continuation)) for _, context, continuation in requests]
        return likelihoods(self.model, pairs, self.batch_size, self.tokenizer.eos_token_id, self._tick)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        self._tick()
        if self._reuse and kwargs.get("num_beams", 1) == 1:
            ends = _AtFirstLabel(self.tokenizer, context.shape[1], self._label)
            kwargs["stopping_criteria"] = StoppingCriteriaList([ends])
        # the end-of-sequence token ends an answer (generate's own test); a text comparison per token is not needed
        return cast(
            torch.Tensor,
            self.model.generate(
                input_ids=context,
                max_length=max_length,
                # what fills an answer that ended early; a padding token that is an ordinary one would be decoded
                pad_token_id=self.tokenizer.eos_token_id,
                use_cache=True,
                **{name: value for name, value in kwargs.items() if name != "temperature"},
            ),
        )

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._tick()
        return super()._model_call(*args, **kwargs)


class _AtFirstLabel(StoppingCriteria):
    """Ends each text of a batch as soon as there is a label in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, label: Label) -> None:
        self._tokenizer, self._start, self._label = tokenizer, start, label

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([self._label(text) is not None for text in texts], device=input_ids.device)


@contextlib.contextmanager
def undisturbed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Put back everything that an evaluation touches: modes, generation settings, padding, all random states."""
    training = {name: module.training for name, module in model.named_modules()}
    settings = model.generation_config
    padding = tokenizer.pad_token, tokenizer.padding_side
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    # a checkpoint's own settings (sampling, temperature) would fill whatever a call leaves open
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        model.generation_config = settings
        tokenizer.pad_token, tokenizer.padding_side = padding
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and datasets talk a lot while doing what was asked."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.api.task")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
