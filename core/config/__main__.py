"""``python -m triptych.core.config > configs/schema.json``: the schema anew from the models."""

import json

from triptych.core.config.schema import schema

if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
