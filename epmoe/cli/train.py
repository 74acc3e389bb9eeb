"""``epmoe train``: trains a configuration, or explains what it would train."""

from __future__ import annotations

import sys
from pathlib import Path

from epmoe import env
from epmoe.config_file import check_layout, load_config
from epmoe.errors import printable
from epmoe.train.status import record_failed_start, refuse_if_stuck


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

        print(printable(explain(cfg, env.world_size())))
        return
    refuse_if_stuck(Path(cfg.out), cfg.model_dump(mode="json"))
    from epmoe.train.run import train as run_training

    try:
        run_training(cfg, sys.argv)
    except Exception as error:
        record_failed_start(Path(cfg.out), error)
        raise
