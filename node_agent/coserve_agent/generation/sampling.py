"""How the engine is to choose tokens, by what a request says and what the model's folder says."""

from __future__ import annotations

from typing import TypeVar

from coserve_agent.model.generation_config import SamplingDefaults
from coserve_agent.requests.common import Common
from coserve_agent.requests.structured import Structure
from coserve_engine.messages import SamplingParams

T = TypeVar("T")


def sampling_params(
    request: Common, max_tokens: int, defaults: SamplingDefaults, structure: Structure | None
) -> SamplingParams:
    """Of `request`, whose answer is held to `structure`; what it does not say is by `defaults`."""
    return SamplingParams(
        max_tokens=max(1, max_tokens),  # the engine computes a prompt for the token that follows it
        temperature=_said(request.temperature, defaults.temperature),
        top_p=_said(request.top_p, defaults.top_p),
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        top_k=max(0, _said(request.top_k, defaults.top_k)),
        min_p=_said(request.min_p, defaults.min_p),
        repetition_penalty=_said(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple((request.logit_bias or {}).items()),
        min_tokens=request.min_tokens or 0,
        logprobs=request.output_logprobs,
        prompt_logprobs=request.scored_prompt,
        grammar=None if structure is None else structure.grammar,
    )


def _said(value: T | None, default: T) -> T:
    return default if value is None else value
