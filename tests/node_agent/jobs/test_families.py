"""A whole job on a model of each family, and the endpoint asked over HTTP for what it learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates import all_templates, write_folder
from small_models import write_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.material import Material
from coserve_agent.data.rendering import Renderer
from coserve_agent.settings import FeederSettings
from coserve_api.job import Schedule
from coserve_contract.messages import AdapterRecord, Completed

FAMILIES = (
    "qwen3",
    "llama3_2",
    *(pytest.param(each, marks=pytest.mark.nightly) for each in ("deepseek_r1_distill", "mistral", "gemma3")),
)
STEPS = 120
ROWS = [
    [("system", "be"), ("user", "one"), ("assistant", "two! three"), ("user", "four"), ("assistant", "five, six")],
    [("user", "seven "), ("assistant", "eight")],
]


def messages(row: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in row]


def write(folder: Path, template: str) -> int:
    write_folder(folder, template, "bytes")
    return len(PreTrainedTokenizerFast.from_pretrained(str(folder)))


def sharpen(folder: Path) -> None:
    """A random head is too flat to be sure of any token."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(6)
    model.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
async def test_an_endpoint_says_what_a_job_learned(
    cluster: Any, redis_server: Any, tmp_path: Path, family: str
) -> None:
    folder = write_model(tmp_path / "model", all_templates()[family], write, 2)
    sharpen(folder)
    (folder / "generation_config.json").unlink()
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": messages(row)}) + "\n" for row in ROWS))
    settings = FeederSettings(
        redis_url=redis_server.url, endpoint_uid=cluster.endpoint_uid, job_uid="x", job_name="x", dataset_path=data,
        dataset_root=tmp_path, model_path=folder, eval_percent=0, max_sequence_length=256, batch_size=2,
        max_steps=STEPS, seed=3,
    )  # fmt: skip
    tokenizer = Tokenizer(folder)
    cluster.material = Material.prepare(settings, Renderer(tokenizer, end_tokens(folder, tokenizer)), tokenizer.size)
    agent = await cluster.agent(model_path=folder)
    cluster.feed(cluster.a)
    await cluster.bind(
        cluster.a, agent, rank=32, alpha=64, learning_rate=2e-2, warmup_steps=5, weight_decay=0.0,
        schedule=Schedule.LINEAR, checkpoint_every_steps=1000,
    )  # fmt: skip
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    assert result.adapter is not None and result.loss is not None and result.loss < 0.05
    await cluster.store.set_adapters([AdapterRecord(**result.adapter.model_dump(), job_uid=cluster.a, rank=32)])

    async def listed() -> bool:
        return (await cluster.beat(agent)).adapters == {"tuned": 1}

    await cluster.until(listed)
    async with httpx.AsyncClient(base_url=await cluster.url(agent, "http"), timeout=60) as client:
        for row in ROWS:
            for n, (role, said) in enumerate(row):
                if role != "assistant":
                    continue
                body = {"model": "tuned", "messages": messages(row[:n]), "temperature": 0, "max_tokens": 40}
                (choice,) = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
                assert choice["finish_reason"] == "stop"
                assert choice["message"]["content"].removeprefix("\n</think>\n\n") == said
