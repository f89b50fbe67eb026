"""Objects that the API server would take, drawn from the generated CRDs: types, bounds, patterns and CEL rules.

Rules about one string are met by construction, those about an object by leaving all but one of its alternatives out;
what is left to break (an order of two numbers) is for the caller to filter by the models, which know the same rules.
"""

from __future__ import annotations

import re
from typing import Any

from hypothesis import strategies as st

from coserve_api.common import format_duration
from coserve_api.generate import definitions

Schema = dict[str, Any]
ALTERNATIVES = re.compile(r"has\(self\.(\w+)\)")
MATCHES = re.compile(r"self\.matches\('((?:[^'\\]|\\.)*)'\)")
TEXT = st.characters(exclude_categories=("Cs",))


def objects(file: str, uids: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of the CRD in `file`, with the metadata that the API server adds."""
    (version,) = definitions()[file]["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    (name,) = (re.search(r"matches\('(.*?)'\)", rule["rule"]) for rule in schema["x-kubernetes-validations"][:1])
    longest = schema["properties"]["metadata"]["properties"]["name"]["maxLength"]
    names = st.from_regex(name[1], fullmatch=True).filter(lambda text: len(text) <= longest)
    label = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
    return st.fixed_dictionaries(
        {
            "metadata": st.fixed_dictionaries(
                {"name": names, "namespace": st.from_regex(label, fullmatch=True), "uid": uids}
            ),
            "spec": values(schema["properties"]["spec"]),
        }
    )


def values(schema: Schema) -> st.SearchStrategy[Any]:
    """Values of one node of a structural schema."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "x-kubernetes-int-or-string" in schema:
        return quantities(schema)
    match schema["type"]:
        case "string":
            return strings(schema)
        case "integer":
            return st.integers(schema["minimum"], schema["maximum"])
        case "boolean":
            return st.booleans()
        case "array":
            return arrays(schema)
        case "object" if "x-kubernetes-preserve-unknown-fields" in schema:
            return st.dictionaries(st.text(TEXT, max_size=20), ANYTHING, max_size=3)
        case "object" if "properties" in schema:
            return mappings(schema)
        case "object":
            names = st.text(TEXT, min_size=1, max_size=20)
            return st.dictionaries(names, values(schema["additionalProperties"]), max_size=3)
    raise AssertionError(schema)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | st.text(TEXT, max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(TEXT, max_size=5), inner, max_size=3),
    max_leaves=5,
)
"""JSON."""


def arrays(schema: Schema) -> st.SearchStrategy[list[Any]]:
    keys = schema.get("x-kubernetes-list-map-keys")
    kind = schema.get("x-kubernetes-list-type")
    unique = (lambda one: tuple(one[key] for key in keys)) if keys else repr if kind == "set" else None
    size = min(schema["maxItems"], 4)
    return st.lists(values(schema["items"]), min_size=schema.get("minItems", 0), max_size=size, unique_by=unique)


def mappings(schema: Schema) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: values(child) for name, child in schema["properties"].items()}
    required = {name: fields.pop(name) for name in schema.get("required", ())}
    drawn = st.fixed_dictionaries(required, optional=fields)
    for rule in (one["rule"] for one in schema.get("x-kubernetes-validations", ())):
        names = ALTERNATIVES.findall(rule)
        if "size() == 1" in rule or "!= has(" in rule:
            exactly_one = st.sampled_from(names).flatmap(
                lambda kept, names=names: fields[kept].map(lambda value: (set(names), {kept: value}))
            )
            drawn = st.tuples(drawn, exactly_one).map(
                lambda pair: {name: one for name, one in pair[0].items() if name not in pair[1][0]} | pair[1][1]
            )
        elif rule.startswith("!(has("):
            drawn = drawn.map(lambda one, names=names: {name: one[name] for name in one if name not in names[1:]})
    return drawn


def quantities(schema: Schema) -> st.SearchStrategy[int | str]:
    """Whole numbers, and text in every form; all of them in the bounds of what is memory."""
    (rule,) = schema["x-kubernetes-validations"]
    assert "isQuantity(self)" in rule["rule"]
    forms = st.sampled_from(["1.5Gi", "256Mi", "64Ti", "1e9", "2E9", "3000k", "1048576", "1.25G", "1048576000m"])
    return st.integers(2**20, 2**46) | st.integers(1, 64).map(lambda count: f"{count}.5Gi") | forms


def strings(schema: Schema) -> st.SearchStrategy[str]:
    longest, shortest = schema["maxLength"], schema.get("minLength", 0)
    rules = [one["rule"] for one in schema.get("x-kubernetes-validations", ())]
    if not rules:
        return st.text(TEXT, min_size=shortest, max_size=min(longest, 60))
    (rule,) = rules
    pattern = MATCHES.match(rule)[1].replace("\\\\", "\\").replace("\\'", "'")
    if "duration(" in rule:
        least = 0 if ">=" not in rule else 1
        drawn = st.integers(least, 3_600_000).map(format_duration) | st.integers(1, 3600).map(lambda n: f"{n}s")
    elif "double(" in rule:
        drawn = st.from_regex("0[.][1-8][0-9]{0,11}|[0-9]([.][0-9]{1,6})?[eE]-[1-9]", fullmatch=True)
        drawn = drawn.filter(lambda text: 1e-12 <= float(text) <= 0.9)
    else:
        drawn = st.from_regex(pattern, fullmatch=True) | longer(pattern, longest)
    if "startsWith('COSERVE_')" in rule:
        drawn = drawn.filter(lambda text: not text.startswith("COSERVE_") and text != "HOME")
        drawn |= st.sampled_from(["coserve_model_path", "Coserve_Model_Name", "coserve_endpoint_uid", "HOMES"])
    if "startsWith('coserve-')" in rule:
        drawn = drawn.filter(lambda text: not text.startswith("coserve-"))
    if "contains('..')" in rule:
        drawn = drawn.filter(lambda text: ".." not in text)
    return drawn.filter(lambda text: len(text) <= longest and re.fullmatch(pattern, text) is not None)


def longer(pattern: str, longest: int) -> st.SearchStrategy[str]:
    """Names as long as they may be, with everything in them that the pattern has; hypothesis' own are short."""
    samples = ("org/model-8b", "a.b_c/d-e", "pvc://claim.of.x/a/b.c_d=e+f@g", "file:///models/a/b", "https://a.b-c:81")
    stretched = [one.replace("b", "b" * (longest - len(one) + one.count("b")), 1) for one in samples]
    fitting = [one for one in (*samples, *stretched) if re.fullmatch(pattern, one) and len(one) <= longest]
    return st.sampled_from(fitting) if fitting else st.nothing()
