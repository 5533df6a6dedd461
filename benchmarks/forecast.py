"""What `ldm check` tells against what the run then shows: `python benchmarks/forecast.py [--images 960] [CONFIG …]`.

Memory and time of five small runs, or of configs of yours (whose output_dir is moved to a folder that goes away), each
told and seen in a process of its own. Told within 15% (memory) and 25% (time) is what is asked for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from tests import forecasts  # noqa: E402
from training.config import load, relocate  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=960, help="of each of the five runs")
    parser.add_argument("configs", nargs="*", help="config files, and key=value overrides for all")
    given = parser.parse_args()
    console, table = Console(width=100), Table("run", "memory told", "seen", "off by", "time told", "seen", "off by")
    with tempfile.TemporaryDirectory() as place:
        room = Path(place)
        files = [c for c in given.configs if "=" not in c]
        configs = [load(file, [c for c in given.configs if "=" in c]) for file in files]
        if not configs:
            data, parts = forecasts.pictures(room / "data", 300), forecasts.parts(room)
            configs = [forecasts.config_of(name, room / name, data, parts, given.images) for name in forecasts.TASKS]
        for config in configs:
            (moved,) = relocate([config], room / "runs")
            told, seen = forecasts.apart(forecasts.told, moved), forecasts.apart(forecasts.seen, moved)
            cells = []
            for key, unit, scale in (("bytes", "MiB", 2**20), ("seconds", "s", 1)):
                a, b = told[key], seen[key]
                cells += [f"{a / scale:,.0f} {unit}", f"{b / scale:,.0f} {unit}", f"{a / b - 1:+.1%}"]
            table.add_row(Path(config.output_dir).name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
