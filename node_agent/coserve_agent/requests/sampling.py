"""How a request wants its answer sampled, in the words that all APIs share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, field_validator

from coserve_agent.chat.message import StrictModel, without_nulls
from coserve_agent.model.generation_config import MinP, RepetitionPenalty, Temperature, TopK, TopP

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_SEED = (1 << 63) - 1
MAX_BIASES = 1024
MAX_COUNT = (1 << 31) - 1

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]


def _in_a_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


OneOrMoreStops = Annotated[Stops, BeforeValidator(_in_a_list, json_schema_input_type=Stop | Stops)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)]
Length = Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)]
TokenId = Annotated[int, Field(ge=0)]


class SamplingRequest(StrictModel):
    """Temperature 0 is greedy. Names beyond OpenAI's are vLLM's."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Annotated[StrictInt, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=64)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None
    ) = None
    min_tokens: Count | None = None
    ignore_eos: StrictBool | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _given_biases(cls, value: object) -> object:
        return without_nulls(value)
