"""``python -m triptych.core.config`` writes ``configs/schema.json`` anew from the models."""

import json

from triptych.core.config.recipes import CONFIGS
from triptych.core.config.schema import schema

if __name__ == "__main__":
    (CONFIGS / "schema.json").write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
