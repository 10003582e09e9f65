# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The conversion report, as JSON and in the model card."""

import json
from pathlib import Path

from modeling_mlip import MLIPConfig
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.model_card import write_model_card

from .parity import Report

REPORT_FILE = "conversion_report.json"
NOT_CHECKED = "Parity was not checked."


def write_reports(
    reports: dict[str, Report | None],
    notes: list[str],
    source: str,
    folder: Path,
    config: MLIPConfig | None,
    name: str | None = None,
) -> None:
    """Writes the parity reports to `REPORT_FILE` and the model card.

    Args:
        reports: by format; `None` where parity was not checked.
        source: a Hub id or a path. Of a path only the last part is written.
        config: `None` for a folder in another format than MLIP's.
        name: the name of the model; the name of the folder if not given.
    """
    parity = {format_name: report and report.to_dict() for format_name, report in reports.items()}
    shown_source = Path(source).resolve().name if Path(source).exists() else source
    content = {"source": shown_source, "notes": notes, "parity": parity}
    write_atomically(folder / REPORT_FILE, json.dumps(content, indent=2) + "\n")
    write_model_card(
        folder,
        results=[],
        config=config,
        dataset=None,
        base_model=source,
        training={},
        curves=None,
        conversion=dict(
            source=shown_source,
            notes=notes,
            reports=[str(report) if report else NOT_CHECKED for report in reports.values()],
        ),
        name=name,
    )
