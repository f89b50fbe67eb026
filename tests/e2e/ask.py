"""A client in the cluster's network: one chat completion through the OpenAI client, printed as JSON.

BASE_URL MODEL PROMPT
"""

import json
import sys

import openai

base_url, model, prompt = sys.argv[1:]
client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
try:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=64
    )
except openai.APIStatusError as error:
    print(json.dumps({"status": error.status_code, "body": error.body}))
else:
    print(json.dumps({"text": reply.choices[0].message.content}))
