"""A client that streams all the time: BASE_URL MODEL RATE; RATE streams a second begin until a line comes on standard
input. What failed before anything of an answer came is sent once more, as OpenAI's client does by itself (RFC 9110,
9.2.2 allows it); an answer with an error status is not. Prints a JSON object: sent, again, and failed, a list.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import openai

TIMEOUT_S = 60
CLIENTS = 4


class Streams:
    """Threads with a client each, whose requests are spread over the period evenly."""

    def __init__(self, base_url: str, model: str, rate: float) -> None:
        self.base_url, self.model, self.period_s = base_url, model, CLIENTS / rate
        self.sent = self.again = 0
        self.failed: list[str] = []
        self.end = threading.Event()
        self._lock = threading.Lock()

    def run(self, number: int) -> None:
        begin, count = time.monotonic() + number * self.period_s / CLIENTS, 0
        url = f"{self.base_url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
            while not self.end.wait(max(0.0, begin + count * self.period_s - time.monotonic())):
                count += 1
                problem = self._stream(client)
                with self._lock:
                    self.sent += 1
                    self.failed += [problem] if problem else []

    def _stream(self, client: openai.OpenAI) -> str:
        """What went wrong, if anything did."""
        for last in (False, True):
            try:
                stream = client.completions.create(
                    model=self.model, prompt="the quick brown fox", max_tokens=16, temperature=0, stream=True,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
            except openai.APIConnectionError as error:
                if last:
                    return f"{time.strftime('%X')} {type(error).__name__}: {error.__cause__!r}"
                with self._lock:
                    self.again += 1
                continue
            except openai.OpenAIError as error:
                return f"{time.strftime('%X')} {type(error).__name__}: {error}"
            try:
                reason = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1]
            except Exception as error:  # the stream broke off, or ended with an error
                return f"{time.strftime('%X')} in a stream: {type(error).__name__}: {error}"
            return "" if reason == "length" else f"finish_reason is {reason}"
        return ""


if __name__ == "__main__":
    streams = Streams(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    threads = [threading.Thread(target=streams.run, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    streams.end.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"sent": streams.sent, "again": streams.again, "failed": streams.failed}))
