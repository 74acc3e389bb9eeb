"""``epmoe train``: trains a configuration, or explains what it would train."""

from __future__ import annotations

import sys
from pathlib import Path

from epmoe import env
from epmoe.config_file import check_layout, load_config


def train(config: Path, overrides: list[str], dry_run: bool) -> None:
    """Checks the configuration before torch is imported, then trains.

    Args:
        config: YAML file.
        overrides: ``section.key=value``.
        dry_run: Only print the resolved configuration and its sizes.
    """
    cfg = load_config(config, overrides)
    check_layout(cfg, env.world_size())
    if dry_run:
        from epmoe.cli.explain import explain

        print(explain(cfg, env.world_size()))
        return
    from epmoe.train.run import train as run_training

    run_training(cfg, sys.argv)
