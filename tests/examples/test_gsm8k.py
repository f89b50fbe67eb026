"""The examples' data: the split shares nothing, targets are what the marks say, the base model's folder loads."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from base_folder import SPECIAL_TOKENS, document, model_config
from gsm8k import DataError, Problem, Split, load_split, parse_problem, read_problems, split_problems
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "base-model"


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_split_has_its_sizes_and_shares_no_question(split: Split) -> None:
    parts = (split.base, split.job, split.held_out)
    assert [len(part) for part in parts] == [6500, 500, 473]
    questions = [{re.sub(r"\W+", " ", problem.question.lower()) for problem in part} for part in parts]
    assert len(set.union(*questions)) == 7473


def test_split_does_not_change(split: Split) -> None:
    assert split.job[0].question.startswith("The result from the 40-item Statistics exam")
    assert load_split() == split


def test_a_repeated_question_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl.gz"
    rows = [{"question": question, "answer": "<<1+1=2>>2\n#### 2"} for question in ("One  and one?", "one and One?")]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert len(read_problems(path)) == 1


def test_problems_without_steps_go_to_the_base(split: Split) -> None:
    assert all(problem.steps for problem in split.job + split.held_out)
    assert sum(not problem.steps for problem in split.base) == 95


def test_a_real_line_becomes_document_and_target() -> None:
    first = read_problems()[0]
    assert first.question.startswith("Natalia sold clips to 48 of her friends")
    assert first.worked.splitlines()[0] == "Natalia sold 48/2 = 24 clips in May."
    assert first.json_target() == '{"steps": ["48/2=24", "48+24=72"], "answer": 72}'


def test_no_mark_or_final_line_remains(split: Split) -> None:
    everything = split.base + split.job + split.held_out
    assert not [problem for problem in everything if "<<" in problem.worked or "####" in problem.worked]


def test_thousands_and_signs_read_as_numbers() -> None:
    assert parse_problem("q", "so <<2*540=1080>>1080\n#### 1,080").answer == 1080
    assert parse_problem("q", "colder\n#### -5").answer == -5


def test_errors_name_file_line_and_cause(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"question": "q", "answer": "no final line"}\n'))
    with pytest.raises(DataError, match=r"bad\.jsonl\.gz, line 1: .*no line '#### <number>'"):
        read_problems(path)
    with pytest.raises(DataError, match="no such file"):
        read_problems(tmp_path / "absent")
    with pytest.raises(DataError, match="the split needs 973"):
        split_problems([Problem("q", "w", ("1+1=2",), 2)])


def test_make_dataset_writes_the_messages_format(tmp_path: Path, split: Split) -> None:
    script = [sys.executable, str(EXAMPLES / "make_dataset.py"), "--out", str(tmp_path)]
    subprocess.run(script, check=True, capture_output=True)
    job = [json.loads(line) for line in (tmp_path / "job.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [len(job), len(held_out)] == [500, 24]
    question, answer = held_out[3]["messages"]
    assert question == {"role": "user", "content": split.held_out[3].question}
    assert json.loads(answer["content"])["answer"] == split.held_out[3].answer
    refused = subprocess.run([*script, "--job", "501"], check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--job is 501; it must lie between 1 and 500" in refused.stderr


def test_chat_template_round_trip(tokenizer: PreTrainedTokenizerBase, split: Split) -> None:
    problem = split.job[0]
    turns = problem.messages()["messages"]
    whole = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(whole["input_ids"]) == document(problem.question, problem.json_target())
    learned = [i for i, use in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if use]
    assert tokenizer.decode(learned) == problem.json_target() + "<|end|>"
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt + learned == whole["input_ids"]


def test_digits_are_single_tokens_and_specials_have_their_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|end|>", "<|pad|>", None)


def test_model_folder_is_small_and_loads_with_its_config() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 10_000_000
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert json.loads((MODEL / "config.json").read_text()) == model_config()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(value.numel() for value in model.parameters()) == 4_196_608


def test_base_model_predicts_its_text_far_better_than_chance(tokenizer: PreTrainedTokenizerBase, split: Split) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    losses = []
    for problem in split.held_out[:8]:
        ids = torch.tensor([tokenizer(document(problem.question, problem.worked))["input_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 3.0  # chance: ln 4096 = 8.3
