"""A model that calls tools as Hermes and Qwen do, and thinks: what it is made to say, and its template."""

SCRIPTS = {
    "[call]": ["<tool_call>", '\n{"name": "look", ', '"arguments": {"at": ', '"é 😀 me"', "}}\n", "</tool_call>"],
    "[two]": [
        "Sure", ".\n<tool_", 'call>{"name": "look", "arguments": {}}</tool_call>\n<tool_call>{"na',
        'me": "wait"}</tool_call>',
    ],
    "[text]": ["just ", "text"],
    "[broken]": ['<tool_call>{"name": "look", ', "oops"],
    "[empty]": [],
    "[hm]": ["<think>\nhm ", "hm\n</think>\n", "\nso ", "be it"],
}  # fmt: skip
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
)
