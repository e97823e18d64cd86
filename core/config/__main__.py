"""Prints the JSON Schema: ``python -m triptych.core.config > configs/schema.json``."""

import json

from triptych.core.config.schema import schema

if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
