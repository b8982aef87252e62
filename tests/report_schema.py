"""A small reader of JSON Schema: the keywords that the schema of report.json uses, and no other."""

import json

from prunekit.report import Report, schema

ACCEPTED = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
KNOWN = {
    *("$schema", "title", "description", "$defs", "$ref", "type", "anyOf"),
    *("properties", "required", "additionalProperties", "items"),
}


def read_report(folder):
    """The report.json of a run's folder, which must be as the schema says."""
    plain = json.loads((folder / "report.json").read_text())
    assert violations(plain, schema()) == []
    assert Report.from_plain(plain) == plain
    return plain


def violations(value, rules, whole=None, where="report"):
    """What of a JSON value the schema does not allow, in words."""
    whole = whole or rules
    if rules is True:
        return []
    if rules is False:
        return [f"{where}: not allowed"]
    assert rules.keys() <= KNOWN, rules.keys() - KNOWN
    if "$ref" in rules:
        return violations(value, whole["$defs"][rules["$ref"].rpartition("/")[2]], whole, where)
    if "anyOf" in rules:
        choices = [violations(value, choice, whole, where) for choice in rules["anyOf"]]
        return [] if [] in choices else choices[0]
    if not isinstance(value, ACCEPTED[rules["type"]]) or (
        isinstance(value, bool) and rules["type"] != "boolean"
    ):
        return [f"{where}: {rules['type']} expected, got {value!r}"]
    if isinstance(value, list):
        items = enumerate(value)
        return [v for i, x in items for v in violations(x, rules["items"], whole, f"{where}[{i}]")]
    if not isinstance(value, dict):
        return []
    own, others = rules.get("properties", {}), rules.get("additionalProperties", True)
    problems = [f"{where}: {key} missing" for key in rules.get("required", ()) if key not in value]
    for key, item in value.items():
        problems += violations(item, own.get(key, others), whole, f"{where}.{key}")
    return problems
