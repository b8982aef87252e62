"""A small reader of JSON Schema: the keywords that the schema of report.json uses, and no other."""

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


def violations(value, schema, whole=None, where="report"):
    """What of a JSON value the schema does not allow, in words."""
    whole = whole or schema
    if schema is True:
        return []
    if schema is False:
        return [f"{where}: not allowed"]
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        return violations(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole, where)
    if "anyOf" in schema:
        choices = [violations(value, choice, whole, where) for choice in schema["anyOf"]]
        return [] if [] in choices else choices[0]
    if not isinstance(value, ACCEPTED[schema["type"]]) or (
        isinstance(value, bool) and schema["type"] != "boolean"
    ):
        return [f"{where}: {schema['type']} expected, got {value!r}"]
    if isinstance(value, list):
        items = enumerate(value)
        return [v for i, x in items for v in violations(x, schema["items"], whole, f"{where}[{i}]")]
    if not isinstance(value, dict):
        return []
    own, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    problems = [f"{where}: {key} missing" for key in schema.get("required", ()) if key not in value]
    for key, item in value.items():
        problems += violations(item, own.get(key, others), whole, f"{where}.{key}")
    return problems
