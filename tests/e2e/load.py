"""A bounded load from the cluster's network: CLIENTS requests at a time for SECONDS.

BASE_URL MODEL CLIENTS SECONDS; prints failures.
"""

import asyncio
import sys
import time

import httpx
import openai


async def main(base_url: str, model: str, clients: int, seconds: float) -> None:
    http = httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0, max_connections=None), timeout=120)
    client = openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, http_client=http)
    end = time.monotonic() + seconds
    sent = failed = refused = 0

    async def user() -> None:
        nonlocal sent, failed, refused
        while time.monotonic() < end:
            sent += 1
            try:
                await client.completions.create(
                    model=model, prompt="word " * 100, max_tokens=200, temperature=0, extra_body={"ignore_eos": True}
                )
            except openai.RateLimitError:
                refused += 1
                await asyncio.sleep(0.5)
            except openai.OpenAIError as error:
                failed += 1
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                await asyncio.sleep(0.5)

    await asyncio.gather(*(user() for _ in range(clients)))
    await client.close()
    print(f"{sent} sent, {refused} refused, {failed} failed")


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
