"""Fine-tuning as the official client knows it, on a decoder in real vLLM: upload, job, events, chat, delete."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.conftest import Stack

pytestmark = pytest.mark.vllm

EXAMPLES = [
    {"messages": [{"role": "user", "content": "the capital of france"}, {"role": "assistant", "content": "paris"}]},
    {"messages": [{"role": "user", "content": "the lazy dog"}, {"role": "assistant", "content": "jumps over"}]},
]
VALIDATION = [{"input": "the film was", "output": "a joy"}]


def test_a_decoder_from_upload_to_deletion(stack: Stack) -> None:
    def jsonl(rows: list[Any]) -> bytes:
        return "\n".join(map(json.dumps, rows)).encode()

    with OpenAI(base_url=stack.base_url, api_key="none", _strict_response_validation=True) as client:
        training, validation = (
            client.files.create(file=jsonl(rows), purpose="fine-tune") for rows in (EXAMPLES, VALIDATION)
        )
        job = client.fine_tuning.jobs.create(
            model="tied/north",
            training_file=training.id,
            validation_file=validation.id,
            suffix="tuned",
            metadata={"temperature": "0.5"},
            hyperparameters={"n_epochs": 3},
        )
        deadline = time.monotonic() + 120
        while job.status in ("queued", "running"):
            assert time.monotonic() < deadline
            time.sleep(0.5)
            job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        model = str(job.fine_tuned_model)
        events = list(client.fine_tuning.jobs.list_events(job.id))
        metrics: list[Any] = [event.data for event in events if event.type == "metrics"]
        assert metrics[0]["validation_loss"] > 0, "the newest first"
        assert metrics[0]["mixed_loss"] > 0
        assert metrics[1]["losses"].keys() == {"base", "north", "east", "south"}
        assert sum(metrics[1]["merging_weights"].values()) == pytest.approx(1)
        assert metrics[1]["merging_weights"]["north"] == 0.5, "the target's share"
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "the capital of france"}], max_tokens=4
        )
        assert answer.model == model
        assert answer.choices[0].message.content
        assert client.models.delete(model).deleted
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(model)
        for file in (training, validation):
            client.files.delete(file.id)
