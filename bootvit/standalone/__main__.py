"""`python -m bootvit_networks IMAGE ...` beside a config.json: one JSON document a line."""

import json
import sys
from pathlib import Path
from typing import Any

from .images import BrokenImage
from .networks import load

if __name__ == "__main__":
    network = load(Path(__file__).resolve().parent.parent)
    broken = 0
    for name in sys.argv[1:]:
        said: dict[str, Any] = {"image": name}
        try:
            said["classes"] = network.classify([Path(name).read_bytes()])[0]
        except (OSError, BrokenImage) as err:
            said["error"], broken = str(err), 1
        print(json.dumps(said))
    sys.exit(broken)
