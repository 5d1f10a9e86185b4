"""list the models that can be named

example:
  moekit presets --json
"""

import argparse
from typing import Any

from moekit.cli.output import emit
from moekit.cli.parser import Add


def options(add: Add) -> None:
    """Adds none."""


def run(args: argparse.Namespace) -> int:
    from moekit.config import preset, preset_names, summary
    from moekit.tables import presets_tables

    rows: list[dict[str, Any]] = []
    for name in preset_names():
        config = preset(name)
        parameters = {"total": config.num_parameters, "active": config.num_active_parameters}
        rows.append({"name": name, "parameters": parameters, "description": summary(config)})
    return emit(args, {"presets": rows}, lambda: presets_tables(rows))
